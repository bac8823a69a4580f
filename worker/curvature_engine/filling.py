"""From an accumulator's result to the group that is returned."""

from typing import TypeVar

from torch import Tensor

from curvature_engine.extensions import WHOLE, Accumulator
from curvature_engine.results import Group

T = TypeVar("T")


def fill(group: Group, accumulator: Accumulator) -> None:
    """Put an accumulator's result into its group."""
    found = _in_order(accumulator.state() if accumulator.setting.part else accumulator.finish(), accumulator)
    group.missing = accumulator.missing
    if group.kind != "tensor":
        group.by_parameter = found
        return
    whole = found[WHOLE]
    assert isinstance(whole, Tensor)
    group.tensors[group.label] = whole


def _in_order(found: dict[str, T], accumulator: Accumulator) -> dict[str, T]:
    """Results in the model's order, in which they did not come; what belongs to no parameter comes last."""
    places = {name: i for i, name in enumerate(accumulator.setting.parameters)}
    return {name: found[name] for name in sorted(found, key=lambda name: places.get(name, len(places)))}
