"""The loss of a request: none, a name, a dictionary, or one of torch's loss modules."""

import sys
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from curvature_client._errors import refusal
from curvature_protocol.requests import LossRequest

REDUCTIONS = ("mean", "sum")
DEFAULT_IGNORE_INDEX = -100


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
        request = {"name": loss, "options": {}}
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
        return LossRequest.model_validate(dict(loss)).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        raise refusal(
            "invalid_request",
            f"loss: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}",
            param="loss",
            remedy='write {"name": "cross_entropy", "options": {…}}',
        ) from None


def _from_module(loss: Any) -> tuple[dict[str, Any], str]:
    torch = sys.modules.get("torch")  # whoever holds a loss module has imported it
    # A subclass may compute something else, so only the two classes themselves will do.
    if torch is not None and type(loss) is torch.nn.MSELoss:
        return {"name": "mse", "options": {}}, loss.reduction
    if torch is not None and type(loss) is torch.nn.CrossEntropyLoss:
        return {"name": "cross_entropy", "options": _cross_entropy_options(loss)}, loss.reduction
    raise refusal(
        "unknown_loss",
        f"a loss is a name, a dictionary, nn.CrossEntropyLoss(...) or nn.MSELoss(...); got {_describe(loss)}",
        param="loss",
        remedy="use one of these; no other loss is supported yet",
    )


def _cross_entropy_options(loss: Any) -> dict[str, Any]:
    if loss.weight is not None:
        raise _unsupported("weight")
    if loss.label_smoothing != 0.0:
        raise _unsupported("label_smoothing")
    return {} if loss.ignore_index == DEFAULT_IGNORE_INDEX else {"ignore_index": int(loss.ignore_index)}


def _unsupported(option: str) -> Exception:
    return refusal(
        "invalid_option",
        f"cross_entropy does not take {option} yet",
        param=f"loss.{option}",
        remedy=f"leave {option} at its default",
    )


def _describe(loss: Any) -> str:
    if isinstance(loss, type):
        return f"the class {loss.__name__} (make an instance: {loss.__name__}())"
    return getattr(loss, "__name__", None) or type(loss).__name__
