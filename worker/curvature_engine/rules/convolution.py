"""Convolutions of one to three spatial axes and their transposes, with stride, padding, dilation and groups.

A convolution is a linear layer on patches: with the input unfolded to [in·k, positions], everything that holds for
shared linear layers holds here (Grosse & Martens 2016, section 3).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature_engine import pages
from curvature_engine.rules import patch_norms
from curvature_engine.rules.base import Match, Rule, gives
from curvature_engine.rules.patch_moments import choose_form, patch_moment, patch_sums

_CACHING = {"cpu"}
"""Devices where windows are unfolded with their channels last."""
_LEAST_WIDTH = 64
"""Numbers in a window's row from which, on other devices, products with them are worth a call of their own."""
_LEAST_RUN = 16
"""Numbers in a row from which copying windows channels last is cheaper than along the input's own last axis."""


@dataclass(frozen=True)
class Geometry:
    """Stride, padding (before and after), dilation, groups, kernel."""

    stride: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    kernel: tuple[int, ...]

    def patches(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Unfold x [u, c, *space] at `positions` windows per axis: [u, c·k, Π positions]."""
        pads = [p for pair in zip(reversed(self.before), reversed(self.after), strict=True) for p in pair]
        x = F.pad(x, pads) if any(pads) else x
        if prod(self.kernel) == 1:
            return self._points(x, positions).flatten(2)
        x = x.contiguous()
        u, c, *_ = x.shape
        step = x.stride()
        windows = x.as_strided(
            (u, c, *self.kernel, *positions),
            (
                *step[:2],
                *(s * d for s, d in zip(step[2:], self.dilation, strict=True)),
                *(s * d for s, d in zip(step[2:], self.stride, strict=True)),
            ),
        )
        return windows.reshape(u, c * prod(self.kernel), prod(positions))

    def _points(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Windows of single places [u, c, *positions]; they lie as x does."""
        if tuple(positions) == x.shape[2:]:
            return x
        # Of a transposed convolution with output padding, some places are in no window.
        steps = tuple(slice(0, s * (p - 1) + 1, s) for s, p in zip(self.stride, positions, strict=True))
        return x[:, :, *steps].clone()

    def wide(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Unfold x [u, c, *space] along all axes but the first: [u, padded space₀, Π positions₁…, k₁…·c].

        Channels come last, so that runs are long.
        """
        space = [b + s + a for b, s, a in zip(self.before, x.shape[2:], self.after, strict=True)]
        last = x.new_zeros if any((*self.before, *self.after)) else x.new_empty
        padded = last((len(x), *space, x.shape[1]))
        inner = tuple(slice(b, b + s) for b, s in zip(self.before, x.shape[2:], strict=True))
        padded[(slice(None), *inner)] = x.movedim(1, -1)
        step = padded.stride()
        windows = padded.as_strided(
            (len(x), space[0], *positions[1:], *self.kernel[1:], x.shape[1]),
            (
                *step[:2],
                *(s * d for s, d in zip(step[2:-1], self.stride[1:], strict=True)),
                *(s * d for s, d in zip(step[2:-1], self.dilation[1:], strict=True)),
                1,
            ),
        )
        # Written out: as a view of overlapping windows it would be copied for every place in the first axis.
        return windows.reshape(len(x), space[0], prod(positions[1:]), prod(self.kernel[1:]) * x.shape[1]).contiguous()

    def sliding(self, wide: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        """Per place in the kernel's first axis, the windows at all positions: [u, Π positions, k₁…·c].

        With stride 1 these are slices of `wide`: without a copy, in a part of the memory that `patches` takes.
        """
        for place in range(self.kernel[0]):
            first = place * self.dilation[0]
            rows = wide[:, first : first + self.stride[0] * (positions[0] - 1) + 1 : self.stride[0]]
            yield rows.reshape(len(wide), prod(positions), wide.shape[3])

    def rows(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Unfold x [u, c, *space] along all axes but the first: [u, c, k₁…, s₀, padded space₀/s₀, positions₁…].

        Rows of the first axis lie by their remainders of its stride s₀, so that windows along it are slices. Numbers
        are read and written in the order in which they lie, as accelerators want it.
        """
        step = self.stride[0]
        whole = -(-(self.before[0] + x.shape[2] + self.after[0]) // step) * step
        pads = [p for pair in zip(reversed(self.before), reversed(self.after), strict=True) for p in pair]
        pads[-1] = whole - self.before[0] - x.shape[2]
        x = F.pad(x, pads).contiguous()
        own = x.stride()
        windows = x.as_strided(
            (*x.shape[:2], *self.kernel[1:], step, whole // step, *positions[1:]),
            (
                *own[:2],
                *(s * d for s, d in zip(own[3:], self.dilation[1:], strict=True)),
                *(own[2], own[2] * step),
                *(s * d for s, d in zip(own[3:], self.stride[1:], strict=True)),
            ),
        )
        return windows.contiguous()

    def sliding_rows(self, rows: Tensor, positions: Sequence[int]) -> Iterator[Tensor]:
        """Per place in the kernel's first axis, the windows at all positions, not copied: [u, c·k₁…, Π positions]."""
        space = len(self.kernel) - 1
        for place in range(self.kernel[0]):
            first, remainder = divmod(place * self.dilation[0], self.stride[0])
            part = rows.select(2 + space, remainder).narrow(2 + space, first, positions[0])
            yield part.view(len(rows), rows.shape[1] * prod(self.kernel[1:]), prod(positions))


class ConvolutionRule(Rule):
    """Closed forms of one convolution; the weight is [out, in/groups, *k], or [in, out/groups, *k] if transposed."""

    row_axes = 1
    channel_axis = 1

    def __init__(self, geometry: Geometry, positions: Sequence[int], *, transposed: bool) -> None:
        self._geometry = geometry
        self._positions = tuple(positions)
        self.inputs_first = transposed

    def per_sample(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor:
        T = g.shape[1]
        if role == "bias":
            return g.flatten(3).sum((1, 3))
        here, patches = self._sides(saved[0].flatten(0, 1), g.flatten(0, 1))
        return self._products(here, patches, T)

    def sum_squared(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        return self.per_sample(role, saved, g).square().sum(0) if role == "bias" else None

    def squared_norms(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        return self.per_sample(role, saved, g).square().sum(1) if role == "bias" else None

    def is_reduced(self, reduction: str, role: str, saved: Sequence[Tensor], g: Tensor) -> bool:
        return role == "bias"

    def _sides(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What a gradient is the product of: a tensor [u, a, *space] and patches [u, b·k, L]."""
        # The transposed convolution is the adjoint: input and output gradient change places.
        here, unfolded = (x, g) if self.inputs_first else (g, x)
        return here, self._geometry.patches(unfolded, here.shape[2:])

    def _products(self, here: Tensor, patches: Tensor, T: int) -> Tensor:
        """Gradients [n, a, b/groups, *k] of n samples with T images each."""
        left, right = self._by_group(here.flatten(2)), self._by_group(patches)
        product = torch.bmm(left, right.transpose(1, 2))
        width = right.shape[1] // prod(self._geometry.kernel)
        product = product.view(-1, T, here.shape[1], width, *self._geometry.kernel)
        return product[:, 0] if T == 1 else product.sum(1)

    def _by_group(self, x: Tensor) -> Tensor:
        """[u, c, L] → [u·groups, c/groups, L]."""
        groups = self._geometry.groups
        return x.reshape(x.shape[0] * groups, x.shape[1] // groups, x.shape[2])

    def per_sample_into(self, role: str, saved: Sequence[Tensor], g: Tensor, out: Tensor) -> bool:
        if role == "bias" or g.shape[1] != 1:
            return False
        here, patches = self._sides(saved[0].flatten(0, 1), g.flatten(0, 1))
        left, right = self._by_group(here.flatten(2)), self._by_group(patches)
        torch.bmm(left, right.transpose(1, 2), out=out.view(left.shape[0], left.shape[1], right.shape[1]))
        return True

    def into_elements(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        if role == "bias":
            return g.numel()
        here, unfolded = (saved[0], g) if self.inputs_first else (g, saved[0])
        return prod(unfolded.shape[:3]) * prod(self._geometry.kernel) * prod(here.shape[3:])

    def multiply_adds(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        if role == "bias":
            return g.numel()
        x, groups, taps = saved[0], self._geometry.groups, prod(self._geometry.kernel)
        here, unfolded = (x, g) if self.inputs_first else (g, x)
        return here.numel() * unfolded.shape[2] // groups * taps

    def working_elements(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        if role == "bias":
            return g.numel()
        return max(saved[0].numel(), g.numel()) * prod(self._geometry.kernel)

    def factor_outputs(self, role: str, g: Tensor) -> Tensor | None:
        n, T, out = g.shape[:3]
        groups = self._geometry.groups
        return g.reshape(n, T, groups, out // groups, -1).permute(2, 0, 1, 4, 3).flatten(2, 3)

    def input_positions(self, saved: Sequence[Tensor]) -> int:
        return prod(self._positions)

    def output_sums(self, role: str, g: Tensor) -> Tensor | None:
        groups = self._geometry.groups
        return g.flatten(3).sum((1, 3)).view(len(g), groups, -1).transpose(0, 1)

    def output_moment(self, role: str, left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor | None:
        groups = self._geometry.groups
        out, length = left.shape[2] // groups, prod(left.shape[3:])
        if length < out // 2:  # one product for all samples is worth the copy
            return super().output_moment(role, left, right, total)
        s, other = (g.reshape(-1, groups, out, length) for g in (left, right))
        if groups > 1:
            found = torch.matmul(s, other.mT).sum(0)
            return found if total is None else total.add_(found)
        total = left.new_zeros(1, out, out) if total is None else total
        total[0].addbmm_(s[:, 0], other[:, 0].mT)
        return total

    def _grouped(self, patches: Tensor, n: int) -> Tensor:
        """[n·T, in·k, L] → [groups, n, T·L, in/groups·k]."""
        groups = self._geometry.groups
        width, positions = patches.shape[1] // groups, patches.shape[2]
        return patches.reshape(n, -1, groups, width, positions).permute(2, 0, 1, 4, 3).flatten(2, 3)


class DirectConvolutionRule(ConvolutionRule):
    """The ordinary convolution."""

    def __init__(self, geometry: Geometry, positions: Sequence[int]) -> None:
        super().__init__(geometry, positions, transposed=False)

    def unfold(self, role: str, saved: Sequence[Tensor]) -> Tensor | None:
        if role == "bias":
            return None
        x, geometry = saved[0].flatten(0, 1), self._geometry
        sliding = geometry.wide if x.device.type in _CACHING else geometry.rows
        return (sliding if self._slides(saved[0]) else geometry.patches)(x, self._positions)

    def pieces(self, role: str, saved: Sequence[Tensor], g: Tensor, unfolded: Tensor | None) -> Iterator[Tensor]:
        if role == "bias" or unfolded is None:
            yield self.per_sample(role, saved, g)
            return
        n, T = g.shape[:2]
        pairs = self.products(role, saved, g, unfolded) if unfolded.device.type in _CACHING else None
        if pairs is not None:
            for left, right in pairs:  # by columns: MKL takes up to a third less for that
                yield torch.bmm(right.mT, left).mT
            return
        if not self._slides(saved[0]):
            yield self._products(g.flatten(0, 1), unfolded, T)
            return
        left = g.flatten(0, 1).flatten(2)  # [n·T, out, L]
        for windows in self._sliding(unfolded):
            product = torch.bmm(left, windows)
            yield product if T == 1 else product.view(n, T, *product.shape[1:]).sum(1)

    def is_product(self, role: str, g: Tensor) -> bool:
        return role != "bias" and g.shape[1] == 1 and self._geometry.groups == 1

    def squared_norms(self, role: str, saved: Sequence[Tensor], g: Tensor) -> Tensor | None:
        if role == "bias" or not self.is_reduced("squared_norms", role, saved, g):
            return super().squared_norms(role, saved, g)
        return patch_norms.squared_norms(saved[0][:, 0], g[:, 0], self._geometry)

    def is_reduced(self, reduction: str, role: str, saved: Sequence[Tensor], g: Tensor) -> bool:
        if role == "bias" or reduction != "squared_norms" or not self.is_product(role, g):
            return super().is_reduced(reduction, role, saved, g)
        return patch_norms.pay(saved[0][:, 0], g[:, 0], prod(self._geometry.kernel))

    def norms_multiply_adds(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        if role == "bias":
            return g.numel()
        x, taps = saved[0], prod(self._geometry.kernel)
        return len(x) * patch_norms.multiply_adds((x.shape[2], g.shape[2]), x.shape[3:], g.shape[3:], taps)

    def products(
        self, role: str, saved: Sequence[Tensor], g: Tensor, unfolded: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]] | None:
        if unfolded is None or not self.is_product(role, g):
            return None
        left = self._left(g)
        if not self._slides(saved[0]):
            return iter([(left, unfolded.mT)])
        return ((left, windows) for windows in self._sliding(unfolded))

    def _sliding(self, unfolded: Tensor) -> Iterator[Tensor]:
        """Per place in the kernel's first axis, the windows [n, L, k₁…·c], or their channels first."""
        if unfolded.device.type in _CACHING:
            return self._geometry.sliding(unfolded, self._positions)
        return (windows.mT for windows in self._geometry.sliding_rows(unfolded, self._positions))

    def by_position(self, role: str, g: Tensor) -> Tensor | None:
        return self._left(g) if self.is_product(role, g) else None

    def inputs_by_position(self, role: str, saved: Sequence[Tensor]) -> Tensor | None:
        return None if role == "bias" else self._geometry.patches(saved[0].flatten(0, 1), self._positions).mT

    def windows_elements(self, role: str, saved: Sequence[Tensor]) -> int:
        if role == "bias":
            return 0
        return prod(saved[0].shape[:3]) * prod(self._geometry.kernel) * prod(self._positions)

    @staticmethod
    def _left(g: Tensor) -> Tensor:
        """The gradient by position, [n, L, out]."""
        return g[:, 0].flatten(2).mT

    def assemble(self, role: str, pieces: list[Tensor]) -> Tensor:
        kernel = self._geometry.kernel
        if len(pieces) == 1:
            return pieces[0] if role == "bias" else pieces[0].reshape(len(pieces[0]), -1, *kernel).contiguous()
        if pieces[0].device.type not in _CACHING:
            whole = torch.stack(pieces, 1)  # [out, k₀, c·k₁…]
            return whole.view(len(whole), kernel[0], -1, *kernel[1:]).transpose(1, 2).contiguous()
        out, channels = len(pieces[0]), pieces[0].shape[1] // prod(kernel[1:])
        result = pages.blank((out, channels, *kernel), pieces[0])
        for place, piece in enumerate(pieces):  # [out, k₁…·c]
            result[:, :, place].copy_(piece.view(out, *kernel[1:], channels).movedim(-1, 1))
        return result

    def working_elements(self, role: str, saved: Sequence[Tensor], g: Tensor) -> int:
        return max(g.numel(), self.unfolded_elements(role, saved))

    def unfolded_elements(self, role: str, saved: Sequence[Tensor]) -> int:
        if role == "bias":
            return 0
        x, geometry = saved[0], self._geometry
        channels = x.shape[0] * x.shape[1] * x.shape[2]
        if not self._slides(x):
            return channels * prod(geometry.kernel) * prod(self._positions)
        rows = geometry.before[0] + x.shape[3] + geometry.after[0] + geometry.stride[0] - 1
        return channels * rows * prod(geometry.kernel[1:]) * prod(self._positions[1:])

    def _slides(self, x: Tensor) -> bool:
        """Whether windows along the first axis as slices of one unfolded tensor are cheaper than all unfolded."""
        kernel, channels = self._geometry.kernel, x.shape[2]
        if x.device.type in _CACHING:
            run, least = kernel[-1] * channels if len(kernel) > 1 else channels, _LEAST_RUN
        else:
            run, least = prod(kernel[1:]) * channels, _LEAST_WIDTH
        return self._geometry.groups == 1 and kernel[0] > 1 and run >= least

    def factor_inputs(self, saved: Sequence[Tensor]) -> Tensor | None:
        if not saved:
            return None
        x = saved[0]
        return self._grouped(self._geometry.patches(x.flatten(0, 1), self._positions), x.shape[0])

    def input_moment(self, saved: Sequence[Tensor], budget_bytes: int) -> Tensor | None:
        return patch_moment(saved[0].flatten(0, 1), self._geometry, self._positions, budget_bytes) if saved else None

    def input_moment_cost(self, saved: Sequence[Tensor], budget_bytes: int) -> tuple[int, int]:
        form = choose_form(saved[0].flatten(0, 1), self._geometry, self._positions, budget_bytes)
        return form.multiply_adds, form.working_bytes

    def input_sums(self, saved: Sequence[Tensor], budget_bytes: int) -> Tensor | None:
        if not saved:
            return None
        x = saved[0].sum(1)
        sums = patch_sums(x, self._geometry, self._positions)
        return sums.view(len(x), self._geometry.groups, -1).transpose(0, 1)


class TransposedConvolutionRule(ConvolutionRule):
    """The transposed convolution; its patches are what each output position receives from the input."""

    def __init__(self, geometry: Geometry, positions: Sequence[int], output_padding: Sequence[int]) -> None:
        super().__init__(geometry, positions, transposed=True)
        self._output_padding = tuple(output_padding)

    def factor_inputs(self, saved: Sequence[Tensor]) -> Tensor | None:
        if not saved:
            return None
        x, geometry = saved[0], self._geometry
        channels, taps = x.shape[2], prod(geometry.kernel)
        one_hot = torch.eye(taps, dtype=x.dtype, device=x.device).view(1, taps, *geometry.kernel)
        transpose = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(geometry.kernel) - 1]
        patches = transpose(
            x.flatten(0, 1),
            one_hot.repeat(channels, *[1] * (one_hot.dim() - 1)),
            None,
            geometry.stride,
            geometry.before,
            self._output_padding,
            channels,
            geometry.dilation,
        )
        return self._grouped(patches.flatten(2), x.shape[0])


@gives(ConvolutionRule)
def match_convolution(name: str, arguments: Sequence[Any], watched: Mapping[int, Any], output: Tensor) -> Match | None:
    """`conv1d` … `conv3d`, their transposes, and the general `convolution`."""
    x, weight = arguments[:2]
    space = weight.dim() - 2
    if not watched.keys() <= {1, 2} or x.dim() != weight.dim():
        return None
    output_padding: Any = 0
    if name in ("convolution", "_convolution"):
        stride, padding, dilation, transposed, output_padding, groups = arguments[3:9]
    elif name.startswith("conv_transpose"):
        stride, padding, output_padding, groups, dilation = arguments[3:8]
        transposed = True
    else:
        stride, padding, dilation, groups = arguments[3:7]
        transposed = False
    kernel, dilation = tuple(weight.shape[2:]), _spread(dilation, space)
    before, after = _padding(padding, kernel, dilation)
    geometry = Geometry(_spread(stride, space), before, after, dilation, groups, kernel)
    rule: Rule
    if transposed:
        rule = TransposedConvolutionRule(geometry, output.shape[2:], _spread(output_padding, space))
    else:
        rule = DirectConvolutionRule(geometry, output.shape[2:])
    roles = {p: "weight" if p == 1 else "bias" for p in watched}
    return Match(rule, roles, (x,) if 1 in watched else ())


def _spread(value: Any, axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


def _padding(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
    even = (0,) * len(kernel) if padding == "valid" else _spread(padding, len(kernel))
    return even, even
