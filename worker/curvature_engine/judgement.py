"""Once per path through a program: which rows are which samples, and whether the closed forms add up.

The two run-time lines of defence. The probe tells each tap's rows apart and refuses coupled samples; the summed
closed forms are compared with ordinary autograd under the same random cotangent.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from curvature_engine.contributions import pull_back
from curvature_engine.errors import EngineError
from curvature_engine.losses import accumulation_dtype
from curvature_engine.probe import Attribution, Verdict, attribute, scaled_cotangents
from curvature_engine.program import Parameter
from curvature_engine.tape import Tap, Tape

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
_HALF_TOLERANCE = 5e-2
_CHUNK_ROWS = 4096


def judge(outputs: Tensor, tape: Tape, parameters: Mapping[str, Parameter]) -> Verdict:
    """Probe every tap and verify every parameter that has closed forms only.

    Raises:
        EngineError: `coupled_samples`.
    """
    N = outputs.shape[0]
    generator = torch.Generator().manual_seed(0x5EED)
    u = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
    leaves = [t for p in parameters.values() for t in p.tensors]
    edges = [edge for tap in tape.taps for edge in tap.edges]
    first = _backward(outputs, [*edges, *leaves], u)
    base, totals = first[: len(edges)], first[len(edges) :]
    scaled = [_backward(outputs, edges, cotangent) for cotangent in scaled_cotangents(u)] if edges else []
    verdicts, start = [], 0
    for tap in tape.taps:
        stop = start + len(tap.edges)
        verdict = attribute(tap, base[start:stop], [s[start:stop] for s in scaled], N)
        if not verdict.pure and not tap.static:
            raise EngineError(
                "coupled_samples",
                f"samples are coupled at aten::{tap.name} ({tap.place}): a row of its output belongs to several "
                "samples, so individual quantities are not defined there",
                param="model",
                remedy="remove operations across the batch axis (statistics over the batch, batch-wide attention)",
            )
        verdicts.append(verdict)
        start = stop
    mismatched = _mismatched(tape, parameters, base, totals)
    return Verdict(tuple(verdicts), mismatched)


def _backward(outputs: Tensor, targets: Sequence[Any], cotangent: Tensor) -> list[Tensor | None]:
    if not targets:
        return []
    gradients = torch.autograd.grad(
        outputs, list(targets), cotangent.to(outputs.dtype), retain_graph=True, allow_unused=True
    )
    return [g if g is None or not g.is_sparse else g.to_dense() for g in gradients]


def _mismatched(
    tape: Tape,
    parameters: Mapping[str, Parameter],
    base: Sequence[Tensor | None],
    totals: Sequence[Tensor | None],
) -> frozenset[str]:
    """Parameters whose summed contributions differ from what autograd says."""
    first_edge, start = [], 0
    for tap in tape.taps:
        first_edge.append(start)
        start += len(tap.edges)
    expected: dict[str, Tensor | None] = {}
    place = 0
    for name, parameter in parameters.items():
        parts = [t for t in totals[place : place + len(parameter.tensors)] if t is not None]
        place += len(parameter.tensors)
        expected[name] = torch.stack(parts).sum(0) if parts else None
    wrong = set()
    for name, parameter in parameters.items():
        uses = [(i, tap, use) for i, tap in enumerate(tape.taps) for use in tap.uses if use.watched.parameter == name]
        if any(tap.rule is None or not tap.intact for _, tap, _ in uses):
            continue
        like = parameter.tensor
        total = torch.zeros(like.shape, dtype=accumulation_dtype(like.dtype), device=like.device)
        for i, tap, use in uses:
            g = base[first_edge[i]]
            if g is not None:
                total += _summed(tap, use.role, g, total.shape, use.watched.index)
        if not _agree(total, expected[name], parameter.tensor.dtype):
            wrong.add(name)
    return frozenset(wrong)


def _summed(tap: Tap, role: str, g: Tensor, shape: torch.Size, index: Tensor | None) -> Tensor:
    """Σ over all rows of a tap: as if all belonged to one sample, a few rows at a time."""
    rule = tap.rule
    assert rule is not None
    rows = rule.canonical(g.to(accumulation_dtype(g.dtype)))
    R = max(1, rows.shape[: rule.row_axes].numel())
    whole = Attribution(1, "major", R)
    saved = [
        whole.arrange(t.to(accumulation_dtype(t.dtype)) if t.is_floating_point() else t, rule.row_axes)
        for t in rule.rows(tap.saved)
    ]
    arranged = whole.arrange(rows, rule.row_axes)
    total = None
    for first in range(0, R, _CHUNK_ROWS):
        chunk = slice(first, first + _CHUNK_ROWS)
        part = rule.per_sample(role, [s[:, chunk] for s in saved], arranged[:, chunk])
        total = part if total is None else total + part
    assert total is not None
    return pull_back(total, index, shape)[0]


def _agree(total: Tensor, expected: Tensor | None, dtype: torch.dtype) -> bool:
    if expected is None:
        return not bool(total.abs().max() > 0) if total.numel() else True
    expected = expected.to(total.dtype)
    if not bool(torch.isfinite(expected).all()) or not expected.numel():
        return True
    tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    scale = expected.abs().max()
    return bool((total - expected).abs().max() <= tolerance * scale + torch.finfo(total.dtype).tiny)
