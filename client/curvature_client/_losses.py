"""The loss of a request: none, a name, a dictionary, or one of torch's loss modules."""

import sys
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from curvature_client._errors import refusal
from curvature_protocol.requests import LossRequest

REDUCTIONS = ("mean", "sum")

MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "BCEWithLogitsLoss": ("bce_with_logits", {"weight": None, "pos_weight": None}),
    "CrossEntropyLoss": ("cross_entropy", {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}),
    "HuberLoss": ("huber", {"delta": 1.0}),
    "L1Loss": ("l1", {}),
    "MSELoss": ("mse", {}),
    "NLLLoss": ("nll", {"weight": None, "ignore_index": -100}),
    "PoissonNLLLoss": ("poisson_nll", {"log_input": True, "full": False, "eps": 1e-8}),
    "SmoothL1Loss": ("smooth_l1", {"beta": 1.0}),
}
"""Class in torch.nn → (the server's name, its options with their defaults)."""

ALIASES = {
    "binary_cross_entropy_with_logits": "bce_with_logits",
    "gaussian_nll_loss": "gaussian_nll",
    "huber_loss": "huber",
    "l1_loss": "l1",
    "mse_loss": "mse",
    "nll_loss": "nll",
    "poisson_nll_loss": "poisson_nll",
    "smooth_l1_loss": "smooth_l1",
}
"""Function of torch.nn.functional → the server's name, where they differ."""


def read_loss(loss: Any, reduction: str | None) -> tuple[dict[str, Any] | None, str]:
    """Bring a loss and a reduction into the form that the server reads.

    Returns:
        The loss (None asks for the server's default) and the reduction ("mean" where nobody says).

    Raises:
        UnprocessableError: an unknown kind of loss, an option of a module that the server cannot follow, or a module
            whose reduction contradicts `reduction`.
    """
    request: dict[str, Any] | None
    if loss is None:
        request = None
    elif isinstance(loss, str):
        request = {"name": ALIASES.get(loss, loss), "options": {}}
    elif isinstance(loss, Mapping):
        request = _from_mapping(loss)
    else:
        request, module_reduction = _from_module(loss)
        if reduction is not None and reduction != module_reduction:
            raise refusal(
                "invalid_option",
                f"the loss module says reduction={module_reduction!r}, the call reduction={reduction!r}",
                param="reduction",
                remedy="leave one of them out",
            )
        reduction = module_reduction
    reduction = "mean" if reduction is None else reduction
    if reduction not in REDUCTIONS:
        raise refusal(
            "invalid_option",
            f'reduction must be "mean" or "sum"; got {reduction!r}',
            param="reduction",
            remedy='under reduction="none" there is no single loss; individual values come from "batch_loss"',
        )
    return request, reduction


def _from_mapping(loss: Mapping[Any, Any]) -> dict[str, Any]:
    try:
        request = LossRequest.model_validate(dict(loss)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise refusal(
            "invalid_request",
            f"loss: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
            param="loss",
            remedy='write {"name": "cross_entropy", "options": {…}}',
        ) from None
    return {**request, "name": ALIASES.get(request["name"], request["name"])}


def _from_module(loss: Any) -> tuple[dict[str, Any], str]:
    torch = sys.modules.get("torch")  # whoever holds a loss module has imported it
    kind = type(loss).__name__
    # A subclass may compute something else, so only the classes themselves will do.
    if torch is None or kind not in MODULES or type(loss) is not getattr(torch.nn, kind):
        raise _unknown(loss)
    name, defaults = MODULES[kind]
    given = {option: _plain(f"loss.{option}", getattr(loss, option)) for option in defaults}
    options = {option: value for option, value in given.items() if value != defaults[option]}
    return {"name": name, "options": options}, loss.reduction


def _plain(param: str, value: Any) -> Any:
    """A tensor's numbers as lists; every one of them is a float64."""
    if not hasattr(value, "tolist"):
        return value
    if not bool(value.isfinite().all()):
        raise refusal(
            "invalid_option",
            f"{param} must hold finite numbers; got inf or nan",
            param=param,
            remedy="use a large number",
        )
    return value.detach().cpu().double().tolist()


def _unknown(loss: Any) -> Exception:
    if type(loss).__name__ == "GaussianNLLLoss":
        remedy = 'say {"name": "gaussian_nll", "options": {"var": …}}: the module does not know its variance'
    else:
        remedy = 'e.g. loss="cross_entropy", or a function of (outputs, targets) that returns each sample\'s loss [N]'
    return refusal(
        "unknown_loss",
        f"a loss is a name, a dictionary, or one of nn.{', nn.'.join(MODULES)}; got {_describe(loss)}",
        param="loss",
        remedy=remedy,
    )


def _describe(loss: Any) -> str:
    if isinstance(loss, type):
        return f"the class {loss.__name__} (make an instance: {loss.__name__}())"
    return getattr(loss, "__name__", None) or type(loss).__name__
