"""torch's loss modules, and its names of losses, in the registry's terms."""

from typing import Any

from torch import Tensor, nn

from curvature_engine.errors import EngineError

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
"""Function of torch.nn.functional → our name, where they differ."""

MODULES: dict[type[nn.Module], tuple[str, dict[str, Any]]] = {
    nn.BCEWithLogitsLoss: ("bce_with_logits", {"weight": None, "pos_weight": None}),
    nn.CrossEntropyLoss: ("cross_entropy", {"weight": None, "ignore_index": -100, "label_smoothing": 0.0}),
    nn.HuberLoss: ("huber", {"delta": 1.0}),
    nn.L1Loss: ("l1", {}),
    nn.MSELoss: ("mse", {}),
    nn.NLLLoss: ("nll", {"weight": None, "ignore_index": -100}),
    nn.PoissonNLLLoss: ("poisson_nll", {"log_input": True, "full": False, "eps": 1e-8}),
    nn.SmoothL1Loss: ("smooth_l1", {"beta": 1.0}),
}
"""Module → (our name, its options with their defaults)."""


_OF_GAUSSIAN = 'say {"name": "gaussian_nll", "options": {"var": …}}: the module does not know its variance'


def read_module(loss: nn.Module) -> tuple[str, dict[str, Any]]:
    """(name, options that differ from their defaults) of one of torch's loss modules.

    Raises:
        EngineError: `unknown_loss`; a subclass may compute something else, so only the classes themselves will do.
    """
    if type(loss) not in MODULES:
        raise EngineError(
            "unknown_loss",
            f"{type(loss).__name__} is no loss module that the engine knows",
            param="loss",
            remedy=_OF_GAUSSIAN
            if type(loss) is nn.GaussianNLLLoss
            else f"known modules: {', '.join(known.__name__ for known in MODULES)}; "
            "for a loss of your own, pass a scripted function of "
            "(outputs, targets) that returns each sample's loss",
        )
    name, defaults = MODULES[type(loss)]
    given = {option: _plain(getattr(loss, option)) for option in defaults}
    return name, {option: value for option, value in given.items() if value != defaults[option]}


def _plain(value: Any) -> Any:
    """A tensor's numbers as lists; every one of them is a float64."""
    return value.detach().double().tolist() if isinstance(value, Tensor) else value
