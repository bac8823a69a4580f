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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from curvature_engine.budget import Budget
from curvature_engine.chain import EdgeKey, Link, Links, Socket, anchor, edge_key, unsupported_chain
from curvature_engine.closed_form import PreparedUse
from curvature_engine.errors import EngineError, memory_ran_out
from curvature_engine.jacobians import Form, form_of
from curvature_engine.losses import BoundLoss
from curvature_engine.precision import accumulation_dtype

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True)
class Station:
    """A place on the way back.

    Attributes:
        layout: which elements of the tensor belong to which sample, [N, D]: flat positions; B's axes are in the
            order of its rows.
        B: [D, D].
    """

    socket: Socket
    layout: Tensor
    B: Tensor

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Tensors l, r of the socket's shape, with B = Σ l_n r_nᵀ over all pairs and their N parts.

        The parts stand where the samples do, so that what turns gradients of samples into columns of factors turns
        these into the two sides of a factor.
        """
        N, D = self.layout.shape
        for first in range(0, D, N):
            columns = self.B[:, first : first + N].T
            unit = torch.zeros_like(columns)
            unit[torch.arange(len(unit)), torch.arange(first, first + len(unit))] = 1
            yield self._spread(columns), self._spread(unit)

    def check_rows(self, prepared: PreparedUse) -> None:
        """Compare the samples' places with those that the probe found in a tap's rows.

        Raises:
            EngineError: `unsupported_model`.
        """
        N, D = self.layout.shape
        numbers = torch.arange(1, N + 1, dtype=torch.float64, device=self.layout.device)
        (shaped,) = prepared.tap.shaped([self._spread(numbers[:, None].expand(N, D))])
        assert shaped is not None
        rows = prepared.arranged_gradient(shaped).reshape(N, -1)
        if not torch.equal(rows, numbers[:, None].expand_as(rows)):
            raise unsupported_chain(
                f"the samples' rows at aten::{prepared.tap.name} ({prepared.tap.place}) are irregular"
            )

    def _spread(self, vectors: Tensor) -> Tensor:
        return spread(vectors, self.layout, self.socket.shape)


def spread(vectors: Tensor, layout: Tensor, shape: torch.Size) -> Tensor:
    """A tensor with vectors [n ≤ N, D] in the places of the first n samples, zero elsewhere."""
    full = vectors.new_zeros(shape.numel())
    full[layout[: len(vectors)].reshape(-1)] = vectors.reshape(-1)
    return full.view(shape)


@dataclass(frozen=True)
class Step:
    """One link of the chain, understood.

    Attributes:
        link: the operator; of several elementwise ones together the last.
    """

    link: Link
    source: Socket
    form: Form

    @property
    def target(self) -> Socket:
        """The operator's output."""
        return self.link.output

    def pull_back(self, cotangent: Tensor) -> Tensor:
        """From a cotangent of the operator's output to one of its input, both flat.

        Raises:
            EngineError: `unsupported_model` where no gradient goes that way.
        """
        given = cotangent.to(self.target.dtype).view(self.target.graph_shape)
        (found,) = torch.autograd.grad(
            (self.target.edge,), (self.source.edge,), (given,), retain_graph=True, allow_unused=True
        )
        if found is None:
            raise unsupported_chain(f"{self.link.title} edits a tensor in place through a view of another")
        return found.reshape(-1).to(accumulation_dtype(found.dtype))


def trace_chain(outputs: Tensor, links: Links, wanted: frozenset[EdgeKey]) -> list[Step]:
    """The operators from the outputs back to the layers wanted, by the edges of their outputs.

    Raises:
        EngineError: `unsupported_model` where there is no chain, with the operator at fault.
    """
    steps: list[Step] = []
    key, missing = _key_of(outputs), set(wanted)
    missing.discard(key)
    while missing:
        step = _step(links, links.maker(key))
        steps.append(step)
        key = step.source.key
        missing.discard(key)
    return steps


def _step(links: Links, link: Link) -> Step:
    """The step back over one operator, or over elementwise ones whose branches come from one tensor."""
    sources = link.entry.inputs
    if not sources:
        raise unsupported_chain(f"it ends at {link.title}, and some layers stand beside it")
    if len(sources) > 1:
        return Step(link, _common_source(links, link), Form("diagonal", len(link.output.shape)))
    form = form_of(link, sources[0])
    if form is None:
        raise unsupported_chain(f"it does not know the Jacobian of {link.title}, {_shapes(link)}")
    return Step(link, sources[0], form)


def _common_source(links: Links, link: Link) -> Socket:
    """The one tensor from which elementwise operators alone make what a link joins (`x * sigmoid(x)`).

    Raises:
        EngineError: `unsupported_model` where there is none.
    """
    joined = unsupported_chain(f"{link.title} joins {len(link.entry.inputs)} branches")
    open_ends = {source.key: source for source in link.entry.inputs}
    if any(_is_not_elementwise(link, source) for source in link.entry.inputs):
        raise joined
    while len(open_ends) > 1:
        makers = [links.maker(key) for key in open_ends if links.has_maker(key)]
        if not makers:
            raise joined
        latest = max(makers, key=lambda maker: maker.number)  # nothing that comes after it is open any more
        if not latest.entry.inputs or any(_is_not_elementwise(latest, source) for source in latest.entry.inputs):
            raise joined
        del open_ends[latest.output.key]
        open_ends.update({source.key: source for source in latest.entry.inputs})
    (source,) = open_ends.values()
    return source


def _is_not_elementwise(link: Link, source: Socket) -> bool:
    form = form_of(link, source)
    return form is None or form.kind != "diagonal"


def _key_of(outputs: Tensor) -> EdgeKey:
    return edge_key(_output_edge(outputs))


def _output_edge(outputs: Tensor) -> GradientEdge:
    return torch.autograd.graph.get_gradient_edge(anchor(outputs))


def _shapes(link: Link) -> str:
    return f"from {list(link.entry.inputs[0].shape)} to {list(link.output.shape)}"


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
        layout = torch.arange(outputs.numel(), device=outputs.device).view(self._N, -1)
        D = layout.shape[1]
        B = torch.zeros(D, D, dtype=self._dtype, device=outputs.device)
        for v in range(self._bound.columns):
            column = self._bound.exact_column(v).reshape(self._N, D)
            (alive,) = column.any(0).nonzero(as_tuple=True)  # most columns are of one position only
            part = column[:, alive].to(self._dtype)
            B[alive[:, None], alive] += part.T @ part
        socket = Socket(0, _output_edge(outputs), outputs.shape, anchor(outputs).shape, outputs.dtype)
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
        return Station(source, flat[station.layout], station.B)

    def _applied(self, step: Step, station: Station) -> Station:
        layout = _layout_before(step, station.layout)
        passage = _Passage(step, layout, station.layout, self._generator)
        N, B = self._N, station.B
        kind = step.form.kind
        if kind == "diagonal":
            B = _average_diagonal(passage, B, N)
        elif kind == "constant":
            B = _conjugate(passage, B, N, self._budget.block_bytes)
        elif kind == "selected" and step.link.intact(step.source.position):
            B = _average_selected(passage, B, N)
        else:
            B = _average_varying(passage, B, N, self._budget.block_bytes)
        return Station(step.source, layout, B)


class _Passage:
    """Products with the J_nᵀ of one operator, a vector for each sample: [n ≤ N, D_out] → [N, D_in]."""

    def __init__(self, step: Step, before: Tensor, after: Tensor, generator: torch.Generator) -> None:
        self.step, self.before, self.after = step, before, after
        self._generator = generator

    def __call__(self, vectors: Tensor) -> Tensor:
        return self.step.pull_back(spread(vectors, self.after, self.step.target.shape))[self.before]

    def anew(self, vectors: Tensor) -> Tensor | None:
        """Products with one J for all samples, [m, D_out] → [m, D_in] for any m, by calling the operator once more.

        None where that is not as simple: for samples beside the first axis, and operators that edit or refuse.
        """
        step, call = self.step, self.step.link.call
        source, target = step.source, step.target
        if call.writes or not (_is_plain(self.before, source.shape) and _is_plain(self.after, target.shape)):
            return None
        m = len(vectors)
        with torch.enable_grad():
            x = torch.zeros(m, *source.shape[1:], dtype=source.dtype, device=vectors.device, requires_grad=True)
            arguments = list(step.link.arguments)
            arguments[source.position] = x
            try:
                y = call.invoke(arguments)
            except RuntimeError as error:
                if memory_ran_out(error):
                    raise
                return None
            if not isinstance(y, Tensor) or y.shape != (m, *target.shape[1:]) or not y.requires_grad:
                return None
            (found,) = torch.autograd.grad(y, x, vectors.to(y.dtype).reshape(y.shape))
        return found.reshape(m, -1).to(accumulation_dtype(found.dtype))

    def made_anew(self, vectors: Tensor) -> Tensor:
        """`anew` where it is known to work."""
        found = self.anew(vectors)
        assert found is not None
        return found

    def random(self) -> Tensor:
        """One vector [D_out] that finds out what is claimed of the Jacobian wrongly."""
        random = torch.randn(self.after.shape[1], generator=self._generator, dtype=torch.float64)
        return random.to(self.after.device, accumulation_dtype(self.step.target.dtype))

    def check(self, found: Tensor, expected: Tensor) -> None:
        """Compare what two ways give.

        Raises:
            EngineError: `verification_failed`.
        """
        ends = (self.step.source.dtype, self.step.target.dtype)  # a cast is as precise as the coarser one
        tolerance = max(_TOLERANCE.get(dtype, _HALF_TOLERANCE) for dtype in ends)
        if not bool(torch.isfinite(found).all()) or not bool(torch.isfinite(expected).all()):
            return
        if bool((found - expected).abs().max() > tolerance * expected.abs().max().clamp(min=1e-30)):
            raise EngineError(
                "verification_failed",
                f"{self.step.link.title} does not act as kfra takes it to; no result is given",
                param="kfra",
                remedy="please report this model; kflr gives Kronecker factors without this step",
            )


def _is_plain(layout: Tensor, shape: torch.Size) -> bool:
    """Whether samples lie along the first axis, their elements in order."""
    return len(layout) == shape[0] and torch.equal(
        layout.reshape(-1), torch.arange(layout.numel(), device=layout.device)
    )


def _average_diagonal(passage: _Passage, B: Tensor, N: int) -> Tensor:
    """B ⊙ 1/N Σ_n d_n d_nᵀ, in blocks of rows."""
    d = passage(B.new_ones(N, len(B)))
    u = passage.random()
    passage.check(passage(u.expand(N, -1)), d * u)
    result = torch.empty_like(B)
    for first in range(0, len(B), 1024):
        rows = slice(first, first + 1024)
        result[rows] = B[rows] * (d[:, rows].T @ d / N)
    return result


def _conjugate(passage: _Passage, B: Tensor, N: int, block_bytes: int) -> Tensor:
    """Jᵀ B J, as many columns a pass as there is room for, or N where the operator takes only its own batch."""
    u = passage.random()
    same = passage(u.expand(N, -1))
    passage.check(same, same[:1].expand_as(same))
    size, pull_back = N, passage.__call__
    anew = passage.anew(u[None])
    if anew is not None:
        passage.check(anew, same[:1])
        pull_back = passage.made_anew
        size = max(N, block_bytes // ((len(B) + passage.before.shape[1]) * B.element_size()))
    half = _pulled_back(pull_back, B, size)  # row j: Jᵀ B[j], so B J
    return _pulled_back(pull_back, half.T.contiguous(), size)  # row i: Jᵀ (B J)[:, i]


def _pulled_back(pull_back: Callable[[Tensor], Tensor], vectors: Tensor, size: int) -> Tensor:
    parts = [vectors[first : first + size] for first in range(0, len(vectors), size)]
    return torch.cat([pull_back(part)[: len(part)] for part in parts])


def _average_selected(passage: _Passage, B: Tensor, N: int) -> Tensor:
    """1/N Σ_n of B's entries added up at the elements that sample n's outputs were selected from."""
    picked = _picked(passage)
    result = B.new_zeros(passage.before.shape[1], passage.before.shape[1])
    for row in picked:
        result.index_put_((row[:, None], row[None, :]), B, accumulate=True)
    u = passage.random()
    expected = torch.zeros_like(result[0]).expand(N, -1).clone().scatter_add_(1, picked, u.expand(N, -1))
    passage.check(passage(u.expand(N, -1)), expected)
    return result.div_(N)


def _picked(passage: _Passage) -> Tensor:
    """For each sample's outputs, which of the sample's inputs max-pooling took: [N, D_out]."""
    step = passage.step
    link, source, rows = step.link, step.source, step.form.row_axes
    pool = getattr(torch.ops.aten, f"{link.name}_with_indices")
    with torch.no_grad():
        _, indices = pool(*link.arguments)
    planes = source.shape[:rows].numel()
    plane = source.shape.numel() // planes
    starts = torch.arange(planes, device=indices.device).view(-1, 1) * plane
    flat = (indices.reshape(planes, -1) + starts).reshape(-1)
    number = torch.empty(source.shape.numel(), dtype=torch.long, device=flat.device)
    number[passage.before] = torch.arange(passage.before.shape[1], device=flat.device)
    return number[flat[passage.after]]


def _average_varying(passage: _Passage, B: Tensor, N: int, budget_bytes: int) -> Tensor:
    """1/N Σ_n J_nᵀ B J_n from the J_n themselves, row by row."""
    u = passage.random()
    every_other = torch.zeros(N, 1, dtype=B.dtype, device=B.device)
    every_other[::2] = 1
    passage.check(passage(every_other * u), every_other * passage(u.expand(N, -1)))
    D_out, D_in = len(B), passage.before.shape[1]
    together = max(1, min(N, budget_bytes // (D_out * D_in * B.element_size())))
    result = B.new_zeros(D_in, D_in)
    unit = torch.zeros_like(B[:1])
    for first in range(0, N, together):
        J = B.new_empty(min(together, N - first), D_out, D_in)
        for i in range(D_out):
            unit[0, i] = 1
            J[:, i] = passage(unit.expand(N, -1))[first : first + together]
            unit[0, i] = 0
        for Jacobian in J:
            result += Jacobian.T @ (B @ Jacobian)
    return result.div_(N)


# Layouts


def _sorted(station: Station) -> Station:
    """The same with each sample's elements in the order in which they stand in the tensor."""
    order = station.layout[0].argsort()
    if bool((order[1:] > order[:-1]).all()):
        return station
    return Station(station.socket, station.layout[:, order], station.B[order][:, order])


def _layout_before(step: Step, after: Tensor) -> Tensor:
    """Which elements of the operator's input belong to which sample.

    Raises:
        EngineError: `unsupported_model` where samples are not whole rows of the operator.
    """
    rows = (
        step.target.shape[: step.form.row_axes].numel() if step.form.kind != "diagonal" else step.target.shape.numel()
    )
    width_after, width_before = step.target.shape.numel() // rows, step.source.shape.numel() // rows
    number = after[:, ::width_after] // width_after  # [N, T]: the rows of each sample
    if not torch.equal(_elements(number, width_after), after):
        raise unsupported_chain(
            f"at {step.link.title}, {_shapes(step.link)}, a sample's elements are no rows of the operator's own"
        )
    return _elements(number, width_before)


def _elements(rows: Tensor, width: int) -> Tensor:
    """The flat positions of the elements of rows [N, T]: [N, T·width]."""
    return (rows[..., None] * width + torch.arange(width, device=rows.device)).flatten(1)
