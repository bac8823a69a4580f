"""Σ x xᵀ and Σ x of a convolution's patches x, without writing all patches out.

Patches are those of Grosse & Martens 2016, section 3: [in·k], the kernel's places last. Their second moment comes
either from the patches of a few samples at a time, or from shifts (`shift_moments`), whichever costs less.
"""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvature_engine import pages
from curvature_engine.kernels import choice
from curvature_engine.rules.gram import Gram, gram_multiply_adds
from curvature_engine.rules.shift_moments import Shifts, shift_moment

if TYPE_CHECKING:
    from curvature_engine.rules.convolution import Geometry

_BLOCK_BYTES = 2 * 2**20
"""Of patches: they stay in a core's cache."""
_BLOCK_ROWS = 1024
_WEIGHT_GRADIENT_SPEED = {torch.float32: 1}
"""Of large images, beside a product of matrices; of other dtypes 0.3."""
_EDGE = 4
"""Positions along an axis that cost a weight gradient as much again: it is slow where images are small."""
_CALLS_OF_PATCHES = 8
_LARGE_BYTES = 16 * 2**20
_LANES = 16
_OVERHEAD, _UNEVEN_OVERHEAD = 8, 45
"""In columns: MKL takes 8 % of the rate of wide matrices for 9 columns, 17 for 15, 65 for 16, 36 for 27, 62 for 75."""
_TILE = 64
_KERNEL_SLOWNESS = 3
"""Of a product in the kernel beside a library's: 1.9 to 3.1 in float32 on an H200, 1.5 to 5.1 in TF32. So it serves
where patches take too much memory to be written, and hardly elsewhere."""


@dataclass(frozen=True)
class Costs:
    """What else takes time, in multiplications and additions.

    Attributes:
        number: to be written and read again.
        result_number: of sums and results, which do not stay in a core's cache.
        large_result_number: of those that stay in no cache.
        call: of an operator.
    """

    number: int
    result_number: int
    large_result_number: int
    call: int

    @classmethod
    def on(cls, device: torch.device) -> "Costs":
        return _COSTS.get(device.type, _COSTS["cuda"])

    def of_result(self, numbers: int, nbytes: int) -> int:
        """Of so many numbers, of sums that take `nbytes` each."""
        return numbers * (self.result_number if nbytes < _LARGE_BYTES else self.large_result_number)


_COSTS = {"cpu": Costs(4, 32, 64, 2**21), "cuda": Costs(32, 96, 240, 2**28)}


@dataclass(frozen=True)
class Form:
    """How a second moment is formed: by shifts, or (None) from patches, written out or read in place by a kernel.

    Attributes:
        weight: what decides: multiplications and additions, with memory traffic and calls counted as such.
        working_bytes: beside the result.
    """

    shifts: Shifts | None
    multiply_adds: int
    weight: int
    working_bytes: int
    fused: bool = False


def patch_moment(x: Tensor, geometry: "Geometry", positions: tuple[int, ...], budget_bytes: int) -> Tensor:
    """Σ over samples and positions, x [u, c, *space] → [groups, c/groups·k, c/groups·k]."""
    form = choose_form(x, geometry, positions, budget_bytes)
    if form.fused:
        found = choice.guarded(partial(from_places, x, geometry, positions))
        if found is not None:
            return found
        form = choose_form(x, geometry, positions, budget_bytes)
    if form.shifts is None:
        return from_patches(x, geometry, positions, budget_bytes)
    return from_shifts(x, geometry, form.shifts, budget_bytes)


def patch_sums(x: Tensor, geometry: "Geometry", positions: tuple[int, ...]) -> Tensor:
    """Σ over positions, x [u, c, *space] → [u, c·k]: along one axis after the other, sums over windows."""
    for axis in range(len(positions)):
        size = x.shape[2]
        place = torch.arange(size, device=x.device)[:, None] + geometry.before[axis]
        offset = place - torch.arange(geometry.kernel[axis], device=x.device) * geometry.dilation[axis]
        step = geometry.stride[axis]
        seen = (offset >= 0) & (offset % step == 0) & (offset < positions[axis] * step)  # [size, k]
        x = torch.tensordot(x, seen.to(x.dtype), ([2], [0]))
    return x.flatten(1)


def choose_form(x: Tensor, geometry: "Geometry", positions: tuple[int, ...], budget_bytes: int) -> Form:
    """The form that costs least, by counting; x is asked for its shape, dtype and device only."""
    forms = [_patch_form(x, geometry, positions, budget_bytes)]
    result_bytes = geometry.groups * (x.shape[1] // geometry.groups * prod(geometry.kernel)) ** 2 * x.element_size()
    for shifts in candidates(x, geometry, positions):
        form = _shift_form(x, shifts, budget_bytes)
        if form.working_bytes <= max(budget_bytes, result_bytes):
            forms.append(form)
    rows, width = len(x) * prod(positions), x.shape[1] // geometry.groups * prod(geometry.kernel)
    if choice.pays_for_patches(x, rows, width, geometry.groups):
        forms.append(_fused_form(x, geometry, rows, width))
    return min(forms, key=lambda form: form.weight)


def candidates(x: Tensor, geometry: "Geometry", positions: tuple[int, ...]) -> list[Shifts]:
    """The ways by shifts that there are."""
    kernel, axes = geometry.kernel, range(len(positions))
    if any(s != 1 for s in geometry.stride) or any(
        d != 1 for d, k in zip(geometry.dilation, kernel, strict=True) if k > 1
    ):
        return []
    main = max((a for a in axes if 1 < kernel[a] <= positions[a]), key=lambda a: (kernel[a], a), default=None)
    if main is None:
        return []
    space = tuple(x.shape[2:])
    found = [Shifts(kernel, geometry.before, space, positions, x.shape[1], geometry.groups, main, whole=False)]
    # On other devices the weight gradient may be less exact than a product (TF32), or add up in any order.
    if len(kernel) == 2 and x.device.type == "cpu" and all(k <= p for k, p in zip(kernel, positions, strict=True)):
        found.append(Shifts(kernel, geometry.before, space, positions, x.shape[1], geometry.groups, main, whole=True))
    return found


def _shift_form(x: Tensor, shifts: Shifts, budget_bytes: int) -> Form:
    n, element, costs = len(x), x.element_size(), Costs.on(x.device)
    block = min(n, shifts.block(element, budget_bytes))
    channels = shifts.channels // shifts.groups
    if shifts.whole:
        speed = _WEIGHT_GRADIENT_SPEED.get(x.dtype, 0.3) * _filled(channels) * shifts.P / (shifts.P + _EDGE)
    else:
        speed = _speed(shifts.width)
    result = shifts.groups * (channels * prod(shifts.kernel)) ** 2
    blocks = -(-n // block)
    traffic = n * shifts.per_sample + 2 * blocks * shifts.written
    products = n * shifts.multiply_adds
    weight = (
        int(products / speed) + costs.number * traffic + costs.of_result(shifts.written + 2 * result, result * element)
    )
    calls = blocks * shifts.calls + shifts.k**2
    return Form(
        shifts,
        products,
        weight + calls * costs.call,
        (block * shifts.per_sample + shifts.written + result) * element,
    )


def _patch_form(x: Tensor, geometry: "Geometry", positions: tuple[int, ...], budget_bytes: int) -> Form:
    n, element, groups, costs = len(x), x.element_size(), geometry.groups, Costs.on(x.device)
    width = x.shape[1] // groups * prod(geometry.kernel)
    rows = n * prod(positions)
    block = _patch_block(x, geometry, positions, budget_bytes)
    products = gram_multiply_adds(groups, width, rows, x.device)
    blocks = -(-n // block)
    result = groups * width * width
    results = 1 + _is_channels_last(rows, width)
    traffic = rows * groups * width + 2 * blocks * result
    weight = (
        int(products / _speed(width)) + costs.number * traffic + costs.of_result(results * result, result * element)
    )
    working = block * prod(positions) * groups * width + (results - 1) * result
    return Form(None, products, weight + blocks * _CALLS_OF_PATCHES * costs.call, working * element)


def _fused_form(x: Tensor, geometry: "Geometry", rows: int, width: int) -> Form:
    tiles = -(-width // _TILE)
    products = geometry.groups * rows * tiles * (tiles + 1) // 2 * _TILE**2
    working = max(geometry.groups * width**2, 2**25) * x.element_size()
    return Form(None, products, _KERNEL_SLOWNESS * products + 2 * Costs.on(x.device).call, working, fused=True)


def from_places(x: Tensor, geometry: "Geometry", positions: tuple[int, ...]) -> Tensor:
    """Σ x xᵀ by the kernel that reads patches where they lie."""
    from curvature_engine.kernels.patches import patch_moment as fused  # Triton is imported when it is first wanted

    return fused(x, geometry, positions)


def from_patches(x: Tensor, geometry: "Geometry", positions: tuple[int, ...], budget_bytes: int) -> Tensor:
    """Σ x xᵀ from the patches of some samples at a time.

    Patches are written fastest with the channels last in them: then the result is rearranged, if there are fewer
    numbers in that.
    """
    groups = geometry.groups
    width, rows = x.shape[1] // groups * prod(geometry.kernel), prod(positions)
    channels_last = _is_channels_last(len(x) * rows, width)
    total = Gram(groups, width, len(x) * rows, x)
    size = _patch_block(x, geometry, positions, budget_bytes)
    for first in range(0, len(x), size):
        part = x[first : first + size]
        patches = _patches(part, geometry, positions)
        patches = patches if channels_last else patches.movedim(-1, 2 + len(positions))
        total.add(patches.reshape(groups, len(part) * rows, width))
    found = total.finish()
    return _channels_first(found, geometry, x.shape[1]) if channels_last else found


def from_shifts(x: Tensor, geometry: "Geometry", shifts: Shifts, budget_bytes: int) -> Tensor:
    """Σ x xᵀ by shifts, as `shift_moments` describes it."""
    return _channels_first(shift_moment(x, shifts, budget_bytes), geometry, x.shape[1])


def _channels_first(total: Tensor, geometry: "Geometry", channels: int) -> Tensor:
    groups, taps = geometry.groups, prod(geometry.kernel)
    total = total.view(groups, taps, channels // groups, taps, channels // groups)
    whole = total.permute(0, 2, 1, 4, 3)
    width = channels // groups * taps
    return (pages.copied(whole) if taps > 1 else whole).reshape(groups, width, width)


def _is_channels_last(rows: int, width: int) -> bool:
    return rows > width


def _patches(x: Tensor, geometry: "Geometry", positions: tuple[int, ...]) -> Tensor:
    """Windows of x [u, c, *space] with channels last, [groups, u, *positions, *k, c/groups]: a view where it can be."""
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    x = x.movedim(1, -1)
    sides = list(zip(geometry.before, geometry.after, strict=True))
    if any(any(pair) for pair in sides):
        padded = x.new_zeros(len(x), *(s + b + a for s, (b, a) in zip(x.shape[1:-1], sides, strict=True)), x.shape[-1])
        padded[(slice(None), *(slice(b, b + s) for s, (b, _) in zip(x.shape[1:-1], sides, strict=True)))] = x
        x = padded
    x = x.contiguous()
    step = x.stride()
    return x.as_strided(
        (groups, len(x), *positions, *geometry.kernel, channels),
        (
            channels,
            step[0],
            *(s * t for s, t in zip(step[1:-1], geometry.stride, strict=True)),
            *(s * d for s, d in zip(step[1:-1], geometry.dilation, strict=True)),
            1,
        ),
        x.storage_offset(),
    )


def _patch_block(x: Tensor, geometry: "Geometry", positions: tuple[int, ...], budget_bytes: int) -> int:
    """How many samples' patches are written out at a time: as few as make long products."""
    row_bytes = max(1, x.shape[1] * prod(geometry.kernel) * x.element_size())
    most = max(_BLOCK_BYTES, _BLOCK_ROWS * row_bytes) if x.device.type == "cpu" else budget_bytes
    return max(1, min(most, budget_bytes) // (row_bytes * max(1, prod(positions))))


def _speed(width: int) -> float:
    """Of a product [width, rows] x [rows, width], beside one of wide matrices."""
    return width / (width + (_OVERHEAD if width % _LANES == 0 else _UNEVEN_OVERHEAD))


def _filled(channels: int) -> float:
    """What share of a weight gradient's lanes is of use."""
    return channels / (-(-channels // _LANES) * _LANES)
