"""What an extension takes of matrices averaged over the samples: the way to its layers, and the layers' shares."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from curvature_engine.averaged import Arrangement, Averaged
from curvature_engine.averaging import Averaging, Station
from curvature_engine.budget import Budget
from curvature_engine.chain import EdgeKey, Links, edge_key, unsupported_chain
from curvature_engine.chain_steps import Step, trace_chain
from curvature_engine.closed_form import ClosedForm
from curvature_engine.contributions import Contribution
from curvature_engine.extensions import Accumulator
from curvature_engine.losses import BoundLoss
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.probe import Verdict


class AveragedFactors:
    """The averaged matrices of one batch, and the parameters that they are of use for.

    Args:
        links: the operators on record.
        contributions: by parameter, with the shapes that their parts will have, and no numbers.
        formed: the parameters that some accumulator has a form for.
        verdict: on the batch's path.

    Raises:
        EngineError: `unsupported_model` where there is no chain to those parameters' layers, or not the memory.
    """

    def __init__(
        self,
        outputs: Tensor,
        bound: BoundLoss,
        links: Links,
        contributions: Mapping[str, Contribution],
        formed: Collection[str],
        budget: Budget,
        verdict: Verdict,
    ) -> None:
        self._contributions, self._verdict = contributions, verdict
        self._wanted = _wanted(contributions, formed)
        steps: Sequence[Step] = trace_chain(outputs, links, frozenset(self._wanted))
        self._averaging = Averaging(outputs, bound, steps, budget)

    def add_to(self, accumulators: Sequence[Accumulator]) -> None:
        """Give every accumulator its parameters' matrices, or the reason why there are none."""
        for name, contribution in self._contributions.items():
            for accumulator in accumulators:
                accumulator.note_missing(name, contribution)
        with torch.no_grad():
            for station in self._averaging.run():
                for name, prepared in self._wanted.get(station.socket.key, ()):
                    averaged = Averaged(station.B, self._arrangement(station, prepared))
                    for accumulator in accumulators:
                        accumulator.add_averaged(name, self._contributions[name], averaged)

    def _arrangement(self, station: Station, prepared: PreparedUse) -> Arrangement:
        """Where a use has its layer's outputs. The shapes say it where samples come one after another."""
        layout, rule = station.layout, prepared.tap.rule
        known = None if rule is None or not layout.plain else rule.key
        key = "arrangement", prepared.tap_index, prepared.use.role, known, layout.N, layout.D, station.socket.shape
        if known is None:
            return Arrangement.of(prepared, station.arranged(prepared))
        return self._verdict.derived.recall(key, lambda: Arrangement.of(prepared, station.arranged(prepared)))


def _wanted(
    contributions: Mapping[str, Contribution], formed: Collection[str]
) -> dict[EdgeKey, list[tuple[str, PreparedUse]]]:
    """The parameters that have a form, by the edges of their layers' outputs.

    Raises:
        EngineError: `unsupported_model` where a parameter is of several layers.
    """
    wanted: dict[EdgeKey, list[tuple[str, PreparedUse]]] = defaultdict(list)
    for name, contribution in contributions.items():
        if name not in formed:
            continue
        assert isinstance(contribution, ClosedForm)
        uses = [prepared for prepared, _ in contribution.uses]
        if len(uses) > 1:
            calls = " and ".join(f"aten::{u.tap.name} ({u.tap.place})" for u in uses[:2])
            raise unsupported_chain(f"{name} is shared by {len(uses)} layers, {calls}")
        wanted[edge_key(uses[0].tap.edges[0])].append((name, uses[0]))
    return wanted
