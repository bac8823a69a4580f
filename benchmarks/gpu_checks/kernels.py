"""Fused kernels beside the plain forms: equality, seconds, and what the predicate says.

Every shape is compiled for every precision, so there are few: on both sides of what the predicate takes.
"""

from typing import Any

import torch
from benchmarks.bench.cases import Place
from benchmarks.gpu_checks.clock import once, seconds
from benchmarks.gpu_checks.correctness import relative
from torch import Tensor

from curvature_engine.kernels import choice
from curvature_engine.products import Multiplying
from curvature_engine.reductions import add_squares
from curvature_engine.rules.convolution import Geometry
from curvature_engine.rules.patch_moments import from_patches

MOST = {"float32": 1e-5, "tf32": 1e-2, "bf16": 5e-2}
BUDGET_BYTES = 2**30
# samples, rows, a, b
SQUARES = [
    (128, 16, 256, 1024),
    (128, 64, 192, 576),
    (128, 128, 256, 1024),
    (128, 1024, 96, 288),
]
# samples, channels, space, kernel, stride
PATCHES = [
    (128, 3, 32, 5, 1),
    (128, 96, 32, 3, 1),
    (128, 96, 32, 3, 2),
    (128, 512, 4, 3, 1),
]


def kernels(place: Place, quick: bool) -> dict[str, Any]:
    if reason := choice.why_off():
        return {"none": reason}
    if place.device.type != "cuda":
        return {"none": "kernels are for CUDA devices"}
    tables: dict[str, list[dict[str, Any]]] = {"squares": [], "patches": []}
    for precision in ("float32", "tf32", "bf16"):
        with Multiplying(precision, place.device):
            for table, measure, shapes in (("squares", _squares, SQUARES), ("patches", _patches, PATCHES)):
                for shape in shapes[: 1 if quick else None]:
                    tables[table].append(measure(shape, precision, place))
                    print(tables[table][-1], flush=True)
    rows = [row for table in tables.values() for row in table]
    return {**tables, "wrong": [row for row in rows if not row["error"] <= MOST[row["precision"]]]}


def _squares(shape: tuple[int, ...], precision: str, place: Place) -> dict[str, Any]:
    from curvature_engine.kernels.squares import sum_of_squares

    n, rows, a, b = shape
    left = torch.randn(n, rows, a, device=place.device)
    right = torch.randn(n, rows, b, device=place.device)

    def plain() -> Tensor:
        total = left.new_zeros(a, b)
        size = max(1, 2**26 // (a * b))
        for first in range(0, n, size):
            part = slice(first, first + size)
            add_squares(total, torch.bmm(left[part].mT, right[part]))
        return total

    exact = torch.zeros(a, b, device=place.device, dtype=torch.float64)
    for x, y in zip(left.double(), right.double(), strict=True):
        exact += (x.T @ y).square()
    first = once(lambda: sum_of_squares(left, right), place)
    return {
        "samples, rows, a, b": shape,
        "precision": precision,
        "error": relative(sum_of_squares(left, right), exact),
        "error of the plain form": relative(plain(), exact),
        "first": first,
        "kernel": seconds(lambda: sum_of_squares(left, right), place),
        "plain": seconds(plain, place),
        "chosen": choice.pays_for_squares(left, right),
    }


def _patches(shape: tuple[int, ...], precision: str, place: Place) -> dict[str, Any]:
    from curvature_engine.kernels.patches import patch_moment

    n, channels, space, kernel, stride = shape
    side = kernel // 2
    geometry = Geometry((stride,) * 2, (side,) * 2, (side,) * 2, (1, 1), 1, (kernel,) * 2)
    positions = ((space + 2 * side - kernel) // stride + 1,) * 2
    x = torch.randn(n, channels, space, space, device=place.device)
    last = x.contiguous(memory_format=torch.channels_last)
    exact = from_patches(x[:8].double(), geometry, positions, BUDGET_BYTES)
    width, rows = channels * kernel**2, n * positions[0] ** 2
    first = once(lambda: patch_moment(x, geometry, positions), place)
    return {
        "samples, channels, space, kernel, stride": shape,
        "precision": precision,
        "error": relative(patch_moment(x[:8], geometry, positions), exact),
        "error of the plain form": relative(from_patches(x[:8], geometry, positions, BUDGET_BYTES), exact),
        "first": first,
        "kernel": seconds(lambda: patch_moment(x, geometry, positions), place),
        "channels last": seconds(lambda: patch_moment(last, geometry, positions), place),
        "plain": seconds(lambda: from_patches(x, geometry, positions, BUDGET_BYTES), place),
        "offered": choice.pays_for_patches(x, rows, width, 1),
    }
