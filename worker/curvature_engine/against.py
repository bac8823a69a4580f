"""Another batch beside the one that is analyzed, for dot products with its individual gradients.

It has a forward pass, a probe and a Z of its own; program, loss, reduction and parameters are the request's.
"""

from dataclasses import replace
from functools import cache
from typing import Any

from curvature_engine.batches import take_batch
from curvature_engine.contributions import Contribution
from curvature_engine.errors import EngineError
from curvature_engine.extensions import Against
from curvature_engine.losses import LossSpec
from curvature_engine.orders import Order
from curvature_engine.preparation import Limits, Preparer
from curvature_engine.program import Parameter
from curvature_engine.requests import Request


def take_up_others(order: Order, spec: LossSpec, selected: dict[str, Parameter]) -> None:
    """Run and probe every batch that a request names as `against`; one that several name, once.

    Raises:
        EngineError: whatever is wrong with such a batch, or with the model on it.
    """
    known: dict[int, Against] = {}
    for request in order.requests:
        given = request.options.get("against")
        if given is None:
            continue
        if id(given) not in known:
            known[id(given)] = _take_up(order, spec, selected, request, given)
        order.against[request.label] = known[id(given)]


def _take_up(order: Order, spec: LossSpec, selected: dict[str, Parameter], request: Request, given: Any) -> Against:
    own = replace(order, requests=[request], progress=None, warnings=[], against={})
    try:
        inputs, targets = given
        inputs, targets = take_batch(inputs, targets, order.program.device, of_images=order.channels_last)
        prepared = Preparer(own, spec, selected).prepare(inputs, targets, Limits())
    except EngineError as error:
        raise EngineError(
            error.code,
            f"in the batch given as {request.label}'s against: {error.message}",
            param=f"{request.extension.name}.against",
            remedy=error.remedy,
        ) from error
    order.warnings.extend(f"in the batch given as {request.label}'s against: {text}" for text in own.warnings)

    work = prepared.work
    assert work is not None

    @cache
    def contributions() -> dict[str, Contribution]:
        return work.gradient_contributions()

    held_bytes = prepared.plan.forward_bytes + work.tap_bytes() + work.arranged_bytes()
    return Against(prepared.bound.N, prepared.bound.Z, lambda name: contributions()[name], work, held_bytes)
