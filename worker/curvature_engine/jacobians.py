"""What the Jacobian of one operator looks like, sample by sample, for the operators that KFRA goes back through.

Each operator treats its leading axes (its *rows*) alike and separately, so a sample is a set of whole rows. What is
claimed here is checked in `averaging.py` on every operator of every batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from curvature_engine.chain import Link, Socket
from curvature_engine.operators import ELEMENTWISE, MOVERS

Kind = Literal["moved", "diagonal", "constant", "selected", "varying"]


@dataclass(frozen=True)
class Form:
    """The form of an operator's Jacobians.

    Attributes:
        kind: "moved" (elements change places, each goes to one place), "diagonal" (elementwise), "constant" (the same
            for every sample), "selected" (each output element is one input element, the data say which), "varying".
        row_axes: how many leading axes of input and output are rows.
    """

    kind: Kind
    row_axes: int


def form_of(link: Link, source: Socket) -> Form | None:
    """The form of the Jacobian in one of a link's inputs; None where the operator is not known."""
    find = _FORMS.get(link.name)
    form = None if find is None else find(link, source)
    if form is None or form.kind in ("moved", "diagonal"):
        return form
    rows = form.row_axes
    if rows < 0 or source.shape[:rows] != link.output.shape[:rows]:
        return None
    # Another argument of the batch makes the Jacobian another one for every sample, along axes that are not known.
    return form if link.entry.tensors == 1 else None


Finder = Callable[[Link, Socket], Form | None]


def _moved(link: Link, source: Socket) -> Form | None:
    return Form("moved", 0) if source.position == 0 else None


def _diagonal(link: Link, source: Socket) -> Form | None:
    return Form("diagonal", len(source.shape)) if source.shape == link.output.shape else None


def _trailing(kind: Kind, axes: int, position: int = 0) -> Finder:
    """All but the last `axes` axes are rows."""
    return lambda _, source: Form(kind, len(source.shape) - axes) if source.position == position else None


def _along(kind: Kind, argument: int) -> Finder:
    """Rows end before the first of the axes that an argument names."""

    def find(link: Link, source: Socket) -> Form | None:
        named: Any = link.arguments[argument] if len(link.arguments) > argument else None
        axes = [named] if isinstance(named, int) else named
        if source.position != 0 or not isinstance(axes, list | tuple) or not all(type(a) is int for a in axes):
            return None
        return Form(kind, min((a % len(source.shape) for a in axes), default=0))

    return find


def _padded(link: Link, source: Socket) -> Form | None:
    """`pad(x, [left, right, …])`, from the last axis on."""
    widths = link.arguments[1]
    return Form("constant", len(source.shape) - len(widths) // 2) if source.position == 0 else None


def _normalised(link: Link, source: Socket) -> Form | None:
    """`layer_norm(x, shape, …)`."""
    return Form("varying", len(source.shape) - len(link.arguments[1])) if source.position == 0 else None


def _convolved(link: Link, source: Socket) -> Form | None:
    kernel = link.arguments[1]
    return Form("constant", len(source.shape) - (kernel.dim() - 1)) if source.position == 0 else None


def _multiplied(link: Link, source: Socket) -> Form | None:
    """`matmul(x, W)` and `matmul(W, x)` with a matrix W."""
    other = link.arguments[1 - source.position]
    if other.dim() != 2 or len(source.shape) < 2:
        return None
    return Form("constant", len(source.shape) - (1 if source.position == 0 else 2))


def _cut(link: Link, source: Socket) -> Form | None:
    """`slice(x, axis, …)`, which may take all (`x[:, 0]` begins with that)."""
    whole = source.shape == link.output.shape
    return _moved(link, source) if whole else _along("constant", 1)(link, source)


def _first(link: Link, source: Socket) -> Form | None:
    return Form("varying", 1) if source.position == 0 else None


_SPATIAL = (1, 2, 3)

_FORMS: dict[str, Finder] = {
    **dict.fromkeys(MOVERS, _moved),
    **dict.fromkeys(ELEMENTWISE, _diagonal),
    **dict.fromkeys(("batch_norm", "cast", "to", "type_as"), _diagonal),
    "linear": _trailing("constant", 1),
    "addmm": _trailing("constant", 1, position=1),
    **dict.fromkeys(("matmul", "mm"), _multiplied),
    **{f"conv{d}d": _convolved for d in _SPATIAL},
    **{f"conv_transpose{d}d": _convolved for d in _SPATIAL},
    **dict.fromkeys(("convolution", "_convolution", "_convolution_mode"), _convolved),
    **{f"avg_pool{d}d": _trailing("constant", d) for d in _SPATIAL},
    **{f"adaptive_avg_pool{d}d": _trailing("constant", d) for d in _SPATIAL},
    **{f"max_pool{d}d": _trailing("selected", d) for d in _SPATIAL},
    **{f"max_pool{d}d_with_indices": _trailing("varying", d) for d in _SPATIAL},
    **{f"adaptive_max_pool{d}d": _trailing("varying", d) for d in _SPATIAL},
    **{f"reflection_pad{d}d": _trailing("constant", d) for d in _SPATIAL},
    **{f"replication_pad{d}d": _trailing("constant", d) for d in _SPATIAL},
    **{f"upsample_nearest{d}d": _trailing("constant", d) for d in _SPATIAL},
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _trailing("constant", 3)),
    **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(("mean", "sum", "select"), _along("constant", 1)),
    **dict.fromkeys(("slice", "narrow"), _cut),
    "cumsum": _along("constant", 1),
    **dict.fromkeys(("softmax", "log_softmax", "glu", "logsumexp", "amax", "amin"), _along("varying", 1)),
    **dict.fromkeys(("layer_norm", "rms_norm"), _normalised),
    "group_norm": _first,
    "instance_norm": _first,
}
