"""Which rows are which samples, and whether the closed forms add up.

The two run-time lines of defence. The probe tells each tap's rows apart and refuses coupled samples; the summed
closed forms are compared with ordinary autograd under the same random cotangent. Both happen once per path through a
program; a later batch on the same path only has its rows confirmed.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from curvature_engine.errors import EngineError
from curvature_engine.parameters import Parameter
from curvature_engine.precision import accumulation_dtype, all_finite
from curvature_engine.probe import (
    Attribution,
    Code,
    TapVerdict,
    Verdict,
    attribute,
    digits_of_elements,
    predicts,
    scaled,
)
from curvature_engine.reproducible import reproducible, without_cudnn
from curvature_engine.sample_axes import SampleAxes
from curvature_engine.sample_strides import spread_numbers
from curvature_engine.tape import Tap, Tape, Use, backward
from curvature_engine.watched import pull_back

# Of a sum's own size, and of the size of its terms.
TOLERANCE = {torch.float64: (1e-9, 1e-12), torch.float32: (1e-3, 1e-5)}
HALF_TOLERANCE = (5e-2, 1e-2)
_CHUNK_ROWS = 4096
_CHUNK_ELEMENTS = 2**22
"""Of what summing some rows takes beside them: a convolution's patches are its images many times over."""


def judge(outputs: Tensor, tape: Tape, parameters: Mapping[str, Parameter]) -> Verdict:
    """Probe every tap and verify every parameter that has closed forms only.

    Raises:
        EngineError: `coupled_samples`.
    """
    u = random_cotangent(outputs)
    leaves = [t for p in parameters.values() for t in p.tensors]
    edges = [edge for tap in tape.taps for edge in tap.edges]
    with reproducible(outputs.device), without_cudnn(outputs.device):
        if outputs.device.type == "cpu":
            first = backward(outputs, [*edges, *leaves], u)
        else:
            # All sendings ask for the same. Kernels that make a parameter's gradient as well may round otherwise (those
            # of batch normalisation do), which elements near zero further on show as if samples were mixed.
            first = [*backward(outputs, edges, u), *backward(outputs, leaves, u)]
        base, totals = first[: len(edges)], first[len(edges) :]
        code = Code.for_gradients(outputs.shape[0], base)
        factors = code.factors(outputs.device) if edges else []
        digits = [digits_of_elements(base, backward(outputs, edges, scaled(u, f)), code) for f in factors]
    verdicts, start = [], 0
    for tap in tape.taps:
        stop = start + len(tap.edges)
        verdict = attribute(tap, tap.shaped(base[start:stop]), [tap.shaped(d[start:stop]) for d in digits], code)
        if not verdict.pure and not tap.static:
            raise EngineError(
                "coupled_samples",
                f"samples are coupled at aten::{tap.name} of {tap.parameters} ({tap.place}): a row of its output "
                "belongs to several samples, so individual quantities are not defined there",
                param="model",
                remedy="remove operations across the batch axis (statistics over the batch, batch-wide attention)",
            )
        verdicts.append(verdict)
        start = stop
    uses = uses_by_parameter(tape, verdicts)
    mismatched, silent = _compared(tape, uses, parameters, base, totals)
    finite = all(all_finite(g) for g in first if g is not None)
    serving = {i for each in uses.values() for i, *_ in each}
    confirmable = all(
        v.attribution is not None or tap.static or i not in serving
        for i, (tap, v) in enumerate(zip(tape.taps, verdicts, strict=True))
    )
    return Verdict(tuple(verdicts), mismatched, silent, finite, confirmable)


Uses = Mapping[str, Sequence[tuple[int, Tap, Use]]]
"""Parameter → (number of a tap, the tap, the parameter's part in it)."""


def uses_by_parameter(tape: Tape, verdicts: Sequence[TapVerdict]) -> Uses:
    """The uses that together make up each parameter's gradient, once the taps' rows are known.

    Of a provisional tap and the consumers of what was derived through it, one side counts.
    """
    serving = {
        i
        for i, (tap, verdict) in enumerate(zip(tape.taps, verdicts, strict=True))
        if tap.provisional and i not in tape.superseded and verdict.attribution is not None and tap.intact
    }
    found: dict[str, list[tuple[int, Tap, Use]]] = {}
    for i, tap in enumerate(tape.taps):
        if (tap.provisional and i not in serving) or not verdicts[i].reached:
            continue
        for use in tap.uses:
            if not use.watched.origins & serving:
                found.setdefault(use.watched.parameter, []).append((i, tap, use))
    return found


def random_cotangent(outputs: Tensor, seed: int = 0) -> Tensor:
    """A cotangent that reaches whatever can be reached."""
    device = outputs.device  # made there: nothing is sent
    generator = torch.Generator(device).manual_seed(0x5EED + seed)
    return torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device=device).to(outputs.dtype)


def proved_strides(verdict: Verdict, outputs: Tensor, tape: Tape, samples: SampleAxes) -> tuple[int | None, ...] | None:
    """The strides at which the operators themselves put the samples of all taps, where that is what the probe found.

    None where they do not say it of all. A later pass with these strides needs no probe.
    """
    if not samples.keeps_rows(outputs):
        return None
    for tap, found in zip(tape.taps, verdict.taps, strict=True):
        if found.attribution is not None and not _is_proved(tap, found.attribution):
            return None
    return tuple(tap.stride for tap in tape.taps)


def proved_attribution(tap: Tap, N: int) -> Attribution | None:
    """Which rows of a tap are which of N samples, as its operator alone says; None where that is no regular order."""
    rows = _proved_rows(tap, N)
    if rows is None or rows.numel() % N:
        return None
    orders = (Attribution(N, order, rows.numel()) for order in ("major", "minor"))
    return next((found for found in orders if _orders(found, rows)), None)


def _is_proved(tap: Tap, attribution: Attribution) -> bool:
    rows = None if attribution.index is not None else _proved_rows(tap, attribution.N)
    return rows is not None and rows.numel() == attribution.R and _orders(attribution, rows)


def _orders(attribution: Attribution, rows: Tensor) -> bool:
    """Whether an attribution arranges rows with these samples [R] by sample."""
    arranged = attribution.arrange(rows, 1)
    return torch.equal(arranged, torch.arange(attribution.N, device=rows.device)[:, None].expand_as(arranged))


def _proved_rows(tap: Tap, N: int) -> Tensor | None:
    """The sample of every row of a tap, [R], by its stride; None where a row is not one sample's."""
    if tap.stride is None or tap.rule is None:
        return None
    device, row_axes = tap.saved[0].device if tap.saved else torch.device("cpu"), tap.rule.row_axes
    numbers = tap.rule.canonical(spread_numbers(tap.shapes[0], tap.stride, N, device))
    if not numbers.numel():
        return None
    inner = range(row_axes, numbers.dim())
    rows = numbers
    for _ in inner:
        rows = rows.select(-1, 0)
    if any(numbers.stride(axis) and numbers.shape[axis] > 1 for axis in inner):
        whole = rows.view(*rows.shape, *(1 for _ in inner)).expand_as(numbers)
        if not torch.equal(numbers, whole):
            return None
    return rows.reshape(-1)


def confirm(
    verdict: Verdict, outputs: Tensor, tape: Tape, cotangent: Tensor, gradients: Mapping[int, Tensor | None]
) -> bool:
    """Whether the rows belong to the samples that a kept verdict says, as far as `cotangent` reaches.

    `gradients` are those that came to the taps, by number, under the cotangent.
    """
    attributions = {i: attribution for i in gradients if (attribution := verdict.taps[i].attribution) is not None}
    edges = [tape.taps[i].edges[0] for i in attributions]
    code = Code.for_gradients(outputs.shape[0], list(gradients.values()))
    for factors in code.factors(outputs.device) if edges else []:
        found = backward(outputs, edges, scaled(cotangent, factors))
        for (i, attribution), gradient in zip(attributions.items(), found, strict=True):
            tap = tape.taps[i]
            plain, (other,) = gradients[i], tap.shaped([gradient])
            if plain is None or other is None:  # where no gradient can come, none came under either
                continue
            if not predicts(tap, attribution, plain, other, factors):
                return False
    return True


def _compared(
    tape: Tape,
    uses: Uses,
    parameters: Mapping[str, Parameter],
    base: Sequence[Tensor | None],
    totals: Sequence[Tensor | None],
) -> tuple[frozenset[str], frozenset[str]]:
    """(parameters whose summed contributions differ from what autograd says, parameters of which it says zero)."""
    arrived: list[Tensor | None] = []
    start = 0
    for tap in tape.taps:
        stop = start + len(tap.edges)
        arrived.append(tap.shaped(base[start:stop])[0])
        start = stop
    wrong, silent, place = set(), set(), 0
    for name, parameter in parameters.items():
        parts = [t for t in totals[place : place + len(parameter.tensors)] if t is not None]
        place += len(parameter.tensors)
        own = uses.get(name, ())
        if any(tap.rule is None or not tap.intact for _, tap, _ in own):
            continue
        consumed = [(tap, use, g) for i, tap, use in own if (g := arrived[i]) is not None]
        expected = (parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)) if parts else None
        if own and (expected is None or not bool(expected.any())):
            silent.add(name)
        if not _agree(consumed, expected, parameter.tensor):
            wrong.add(name)
    return frozenset(wrong), frozenset(silent)


def _agree(consumed: Sequence[tuple[Tap, Use, Tensor]], expected: Tensor | None, parameter: Tensor) -> bool:
    """Whether the uses' summed closed forms are the gradient that autograd expects."""
    if expected is not None and not (expected.numel() and bool(torch.isfinite(expected).all())):
        return True
    total = _total(consumed, parameter)
    if not total.numel():
        return True
    expected = torch.zeros_like(total) if expected is None else expected.to(total.dtype)
    of_sum, of_terms = TOLERANCE.get(parameter.dtype, HALF_TOLERANCE)
    worst = (total - expected).abs_().max()
    if bool(worst <= of_sum * expected.abs().max()):
        return True
    # The terms may cancel (a bias of attention's keys has no gradient but rounding): measure by what was summed.
    return bool(worst <= of_terms * _total(consumed, parameter, magnitudes=True).max())


def _total(consumed: Sequence[tuple[Tap, Use, Tensor]], parameter: Tensor, *, magnitudes: bool = False) -> Tensor:
    """Σ over uses and rows, of the terms or of their magnitudes: [*parameter.shape]."""
    total = None
    for tap, use, g in consumed:
        if g.numel():
            part = pull_back(_summed(tap, use.role, g, magnitudes), use.watched.index, parameter.shape)[0]
            part = part.abs() if magnitudes else part
            total = part if total is None else total + part
    if total is None:
        return torch.zeros(parameter.shape, dtype=accumulation_dtype(parameter.dtype), device=parameter.device)
    return total


def _summed(tap: Tap, role: str, g: Tensor, magnitudes: bool) -> Tensor:
    """Σ over all rows of a tap: as if all belonged to one sample, a few rows at a time."""
    rule = tap.rule
    assert rule is not None
    rows = rule.canonical(g.to(accumulation_dtype(g.dtype)))
    R = max(1, rows.shape[: rule.row_axes].numel())
    whole = Attribution(1, "major", R)
    floats = [t.to(accumulation_dtype(t.dtype)) if t.is_floating_point() else t for t in rule.rows(tap.saved)]
    sized = [rule.magnitude(t) if magnitudes else t for t in floats]
    saved = [whole.arrange(t, rule.row_axes) for t in sized]
    arranged = whole.arrange(rows.abs() if magnitudes else rows, rule.row_axes)
    one = [s[:, :1] for s in saved], arranged[:, :1]
    held = max(rule.working_elements(role, *one), rule.into_elements(role, *one))
    size = max(1, min(_CHUNK_ROWS, _CHUNK_ELEMENTS // max(1, held)))
    total = None
    for first in range(0, R, size):
        chunk = slice(first, first + size)
        part = rule.per_sample(role, [s[:, chunk] for s in saved], arranged[:, chunk])
        total = part if total is None else total + part
    assert total is not None
    return total
