"""Nobody times a wrong result: a peer's tensors are held against ours first, Monte Carlo with equal draws."""

import torch
from benchmarks.bench.jobs import Results, Values
from benchmarks.bench.works import KRONECKER
from torch import Tensor

TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-9}
"""Of the largest deviation, relative to a tensor's largest entry. Factors summed over 100,000 rows in another order,
and ReLUs whose input is a rounding error from zero, take some digits of float32's seven."""


class Differs(Exception):
    """A peer's result is another than ours: `by` how much, if it has the same names and shapes."""

    def __init__(self, message: str, by: float | None = None) -> None:
        super().__init__(message)
        self.by = by


def worst_error(ours: Results, theirs: Results) -> float:
    """Over all tensors.

    Raises:
        Differs: in names or shapes.
    """
    return max(_of_values(name, ours[name], theirs[name]) for name in theirs)


def check(ours: Results, theirs: Results, dtype: torch.dtype) -> float:
    """The worst error.

    Raises:
        Differs: in names, shapes, or by more than rounding.
    """
    error = worst_error(ours, theirs)
    if not error <= TOLERANCES[dtype]:
        raise Differs(f"differs from ours by {error:.1e}", error)
    return error


def _of_values(name: str, ours: Values, theirs: Values) -> float:
    missing = ours.keys() ^ theirs.keys()
    if missing and (name not in KRONECKER or ours.keys() - theirs.keys()):
        raise Differs(f"{name} has other parameters: {', '.join(sorted(missing)[:3])}")
    return max(_of_value(f"{name} of {key}", ours[key], theirs[key]) for key in ours)


def _of_value(what: str, ours: Tensor | tuple[Tensor, ...], theirs: Tensor | tuple[Tensor, ...]) -> float:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return _of_tensor(what, ours, theirs)
    return max(_of_tensor(what, a, b) for a, b in zip(ours, theirs, strict=True))


def _of_tensor(what: str, ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise Differs(f"{what} has shape {list(theirs.shape)}, ours {list(ours.shape)}")
    scale = theirs.detach().abs().max().clamp(min=torch.finfo(theirs.dtype).tiny)
    error = float((ours - theirs.detach()).abs().max() / scale)
    return error if error == error else float("inf")
