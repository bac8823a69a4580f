"""KFRA's recursion: the loss's Hessian in a layer's output, averaged over the samples at every operator on the way.

From Σ_n H_n in the program's outputs, each operator makes of the matrix B in its output the matrix
1/N Σ_n J_nᵀ B J_n in its input, J_n its Jacobian for sample n (Botev, Ritter & Barber 2017, eq. 21). B is [D, D], D the
elements of one sample. Products with J_nᵀ are ordinary backward passes through that one operator, which carry a vector
for each sample at once:

- elements that change places: B stays, the places change;
- diagonal J_n with diagonals d_n: B ⊙ 1/N Σ_n d_n d_nᵀ;
- one J for all samples: Jᵀ B J, many columns a pass;
- each output element selected from the input's: B's entries added up where they came from;
- others: J_n row by row, for as many samples together as fit the budget.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature_engine.budget import Budget
from curvature_engine.chain import Socket, anchor, unsupported_chain
from curvature_engine.chain_steps import Step, output_edge, shapes_of
from curvature_engine.errors import EngineError
from curvature_engine.losses import BoundLoss
from curvature_engine.passages import Passage, average_diagonal, average_selected, average_varying, conjugate
from curvature_engine.precision import accumulation_dtype
from curvature_engine.prepared_uses import PreparedUse
from curvature_engine.sample_layouts import Layout


@dataclass(frozen=True)
class Station:
    """A place on the way back.

    Attributes:
        layout: which elements of the tensor belong to which sample.
        B: [D, D], its axes in the order in which the layout has a sample's elements.
    """

    socket: Socket
    layout: Layout
    B: Tensor

    def arranged(self, prepared: PreparedUse) -> Tensor:
        """Where a tap has a sample's elements, as its rules see them: [1, T, …], numbers of B's rows, as float64.

        Compares the samples' places with those that the probe found in the tap's rows.

        Raises:
            EngineError: `unsupported_model`.
        """
        N, D = self.layout.N, self.layout.D
        numbers = torch.arange(N * D, dtype=torch.float64, device=self.layout.device).view(N, D)
        (shaped,) = prepared.tap.shaped([self.layout.spread(numbers, self.socket.shape)])
        assert shaped is not None
        rows = prepared.arranged_gradient(shaped)
        first = rows[:1]
        starts = D * torch.arange(N, dtype=torch.float64, device=rows.device).view(N, *[1] * (rows.dim() - 1))
        if rows.numel() != N * D or not torch.equal(rows, first + starts):
            raise unsupported_chain(
                f"the samples' rows at aten::{prepared.tap.name} ({prepared.tap.place}) are irregular"
            )
        return first


class Averaging:
    """The recursion on one batch.

    Raises:
        EngineError: `unsupported_model` where the matrices exceed the budget, before they are made.
    """

    def __init__(self, outputs: Tensor, bound: BoundLoss, steps: Sequence[Step], budget: Budget) -> None:
        self._outputs, self._bound, self._steps = outputs, bound, steps
        self._budget = budget
        self._dtype = accumulation_dtype(outputs.dtype)
        self._N = bound.N
        self._generator = torch.Generator().manual_seed(0xC4A1)
        self._check_size()

    def run(self) -> Iterator[Station]:
        """The outputs' own station, and that of every operator's input, on the way back.

        Raises:
            EngineError: `unsupported_model`, `verification_failed`.
        """
        station = self._start()
        yield station
        for step in self._steps:
            moved = step.form.kind == "moved"
            station = self._moved(step, station) if moved else self._applied(step, _sorted(station))
            yield station

    # The ends

    def _start(self) -> Station:
        outputs = self._outputs
        layout = Layout(self._N, outputs.numel() // self._N, outputs.device)
        B = self._bound.summed_hessian().to(self._dtype)
        socket = Socket(0, output_edge(outputs), outputs.shape, anchor(outputs).shape, outputs.dtype)
        return Station(socket, layout, B)

    def _check_size(self) -> None:
        """Three matrices of two stations are there at once; nothing smaller than one of them can do.

        Raises:
            EngineError: `unsupported_model`: smaller pieces, the remedy for memory that ran out, would not help.
        """
        element = torch.empty(0, dtype=self._dtype).element_size()
        for step in self._steps:
            D = [s.shape.numel() // self._N for s in (step.source, step.target)]
            needed = (D[0] ** 2 + D[0] * D[1] + D[1] ** 2) * element
            if needed > self._budget.total_bytes // 2:
                raise EngineError(
                    "unsupported_model",
                    f"kfra keeps square matrices of a sample's elements: {D[0]} and {D[1]} at {step.link.title}, "
                    f"{needed / 2**20:.3g} MiB in all; half the budget is {self._budget.total_bytes / 2**21:.3g} MiB",
                    param="kfra",
                    remedy="raise the memory budget, name later parameters alone in parameters=, or take kflr",
                )

    # One operator

    def _moved(self, step: Step, station: Station) -> Station:
        source = step.source
        places = torch.arange(source.shape.numel(), device=station.layout.device).view(source.shape)
        with torch.no_grad():
            moved = step.link.call.invoke([places, *step.link.arguments[1:]])
        if not isinstance(moved, Tensor) or moved.shape != step.target.shape:
            raise unsupported_chain(f"{step.link.title} gives several tensors")
        flat = moved.reshape(-1)
        if flat.numel() != places.numel() or not torch.equal(flat.sort().values, places.view(-1)):
            raise unsupported_chain(f"{step.link.title} takes a part of its input or repeats it")
        return Station(source, Layout.of(flat[station.layout.places]), station.B)

    def _applied(self, step: Step, station: Station) -> Station:
        layout = _layout_before(step, station.layout)
        passage = Passage(step, layout, station.layout, self._generator)
        N, B = self._N, station.B
        kind = step.form.kind
        if kind == "diagonal":
            B = average_diagonal(passage, B, N)
        elif kind == "constant":
            B = conjugate(passage, B, N, self._budget.block_bytes)
        elif kind == "selected" and step.link.intact(step.source.position):
            B = average_selected(passage, B, N)
        else:
            B = average_varying(passage, B, N, self._budget.block_bytes)
        return Station(step.source, layout, B)


def _sorted(station: Station) -> Station:
    """The same with each sample's elements in the order in which they stand in the tensor."""
    if station.layout.plain:
        return station
    places = station.layout.places
    order = places[0].argsort()
    if bool((order[1:] > order[:-1]).all()):
        return station
    return Station(station.socket, Layout.of(places[:, order]), station.B[order][:, order])


def _layout_before(step: Step, after: Layout) -> Layout:
    """Which elements of the operator's input belong to which sample.

    Raises:
        EngineError: `unsupported_model` where samples are not whole rows of the operator.
    """
    rows = (
        step.target.shape[: step.form.row_axes].numel() if step.form.kind != "diagonal" else step.target.shape.numel()
    )
    width_after, width_before = step.target.shape.numel() // rows, step.source.shape.numel() // rows
    if after.plain and rows % after.N == 0:
        return Layout(after.N, step.source.shape.numel() // after.N, after.device)
    number = after.places[:, ::width_after] // width_after  # [N, T]: the rows of each sample
    if not torch.equal(_elements(number, width_after), after.places):
        raise unsupported_chain(
            f"at {step.link.title}, {shapes_of(step.link)}, a sample's elements are no rows of the operator's own"
        )
    return Layout.of(_elements(number, width_before))


def _elements(rows: Tensor, width: int) -> Tensor:
    """The flat positions of the elements of rows [N, T]: [N, T·width]."""
    return (rows[..., None] * width + torch.arange(width, device=rows.device)).flatten(1)
