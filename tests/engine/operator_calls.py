"""Concrete calls of operators, small, with as many axes of N entries as they can have."""

import torch
from torch import Tensor

N = 2


def real(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 0.8 + 0.1


def whole(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape)


def truth(*shape: int) -> Tensor:
    return torch.rand(shape) > 0.5


CALLS: list = []
"""(operator and overload, a function that makes its arguments): "spoken" if some way to track them passes."""


def spoken(text: str, *values) -> None:
    """Calls of which some are followed; tensors are given by shapes in strings."""
    CALLS.append((text, _maker(values, "spoken")))


def silent(text: str, *values) -> None:
    """Calls of which none is."""
    CALLS.append((text, _maker(values, "silent")))


def _maker(values, name):
    def make() -> list:
        known: dict[str, Tensor] = {}
        return [_made(v, known) for v in values]

    make.__name__ = name
    return make


def _made(value, known):
    """ "r 2 2": a tensor of reals; w and b: whole numbers, truth values; "=0 2 2": the same one wherever it stands."""
    if isinstance(value, list):
        return [_made(v, known) for v in value]
    if not isinstance(value, str) or value[0] not in "rwb=" or not value[-1].isdigit():
        return value
    kind, *shape = value.split()
    sizes = [int(s) for s in shape]
    if kind[0] == "=":
        return known.setdefault(value, real(*sizes))
    return {"r": real, "w": whole, "b": truth}[kind](*sizes)


def elementwise_calls(name: str):
    """Calls of all overloads of an operator, with tensors of several shapes that broadcast."""
    packet = getattr(torch.ops.aten, name, None)
    for overload_name in packet.overloads() if packet is not None else ():
        overload = getattr(packet, overload_name)
        if "out" in overload_name or any(a.is_out for a in overload._schema.arguments):
            continue
        for shapes in (
            ["2 2 2"] * 5,
            ["2 2 2", "2 2", "2", "1", "1"],
            ["2", "2 2 2", "2 1 2", "1", "1"],
            ["2 2", "2", "1"],
        ):
            for kind in "rwb":
                arguments = _filled(overload, list(shapes), kind)
                try:
                    positional = sum(not a.kwarg_only for a in overload._schema.arguments)
                    rest = zip(overload._schema.arguments[positional:], arguments[positional:], strict=True)
                    result = overload(*arguments[:positional], **{a.name: v for a, v in rest})
                except (RuntimeError, TypeError, ValueError):
                    continue
                if isinstance(result, Tensor):
                    yield f"{name}.{overload_name}", arguments
                    break


def _filled(overload, shapes: list[str], kind: str) -> list:
    made = []
    for argument in overload._schema.arguments:
        type_ = str(argument.type)
        if type_ in ("Tensor", "Optional[Tensor]"):
            condition = argument.name in ("condition", "mask")
            made.append(_made(f"{'b' if condition else kind} {shapes.pop(0)}", {}))
        elif argument.has_default_value() and argument.default_value is not None:
            made.append(argument.default_value)
        elif "bool" in type_:
            made.append(False)
        elif "number" in type_ or "Scalar" in type_ or "float" in type_ or "int" in type_:
            made.append(None if "Optional" in type_ and argument.name in ("dtype", "max") else 1)
        else:
            made.append(None)
    return made


# Moving elements about

X, Y, Z = "r 2 2 2", "r 4 2", "r 2 4 2 2"
for _x in (X, Y, Z, "r 2", "r 4 4"):
    for _name in ("contiguous", "clone", "alias", "detach", "t", "numpy_T", "tril", "triu", "lift_fresh", "_to_copy"):
        if not (_name == "t" and len(_x) > 5) and not (_name[:3] == "tri" and _x == "r 2"):
            spoken(_name, _x)
    spoken("flatten.using_ints", _x)
    spoken("unsqueeze", _x, 1)
    spoken("squeeze", _x)
    spoken("reshape", _x, [-1])
    spoken("lift_fresh_copy", _x)
spoken("view", X, [4, 2])
spoken("view", Z, [8, 4])
spoken("view", "r 8", [2, 2, 2])
spoken("view.dtype", X, torch.int64)
spoken("_unsafe_view", X, [2, 4])
spoken("unflatten.int", Y, 0, [2, 2])
spoken("squeeze.dim", "r 2 1 2", 1)
spoken("squeeze.dims", "r 1 2 1 2", [0, 2])
spoken("to.dtype", X, torch.float32)
for _name in ("view_as", "reshape_as", "type_as", "expand_as"):
    spoken(_name, X, "r 2 2 2")
spoken("to.other", X, "w 2 2")
spoken("expand", "r 2 1 2", [2, 2, 2])
spoken("expand", "r 2", [2, 2])
spoken("expand", "r 1 2 1", [4, -1, 2])
spoken("broadcast_to", "r 2 1", [2, 2, 2])
for _name in ("transpose.int", "swapaxes", "swapdims"):
    for _pair in ((0, 1), (-1, 0), (1, -1)):
        spoken(_name, X, *_pair)
        spoken(_name, Z, *_pair)
for _name in ("mT",):
    spoken(_name, X)
    spoken(_name, Z)
for _order in ([1, 0, 2], [2, 0, 1], [-1, 0, 1], [0, 1, 2]):
    spoken("permute", X, _order)
    spoken("permute", "r 2 4 2", _order)
for _name in ("movedim", "moveaxis"):
    spoken(f"{_name}.int", Z, 1, -1)
    spoken(f"{_name}.intlist", Z, [0, 1], [2, 0])
    spoken(f"{_name}.intlist", Z, [3, 0], [0, -1])
spoken("select.int", X, 1, 0)
spoken("select.int", Z, -1, 1)
spoken("unbind.int", X, 0)
spoken("unbind.int", Z, 2)
for _dim in (0, 1, -1):
    spoken("slice.Tensor", Z, _dim, 0, 2, 1)
    spoken("slice.Tensor", Z, _dim, 0, 9223372036854775807, 1)
    spoken("slice.Tensor", "r 4 4", _dim, 0, 4, 2)
    spoken("slice.Tensor", "r 4 4", _dim, 2, 4, 1)
    spoken("narrow", Z, _dim, 0, 2)
    spoken("split.Tensor", "r 4 4", 2, _dim)
    spoken("flip", "r 4 4", [_dim])
    spoken("roll", "r 4 4 4", [1], [_dim])
    for _name in ("chunk", "tensor_split.sections", "unsafe_chunk"):
        spoken(_name, "r 4 4", 2, _dim)
    spoken("unsafe_split.Tensor", "r 4 4", 2, _dim)
    for _name in ("split_with_sizes", "unsafe_split_with_sizes"):
        spoken(_name, "r 4 4", [1, 3], _dim)
    for _name in ("cat", "concat", "concatenate"):
        spoken(_name, [Y, Y], _dim)
        spoken(_name, [X, "r 2 2 2", "r 2 2 2"], _dim)
    spoken("stack", ["r 2 2", "r 2 2"], _dim)
    spoken("index_select", "r 4 4", _dim, "w 2")
    spoken("slice_scatter", "r 4 4", "r 2 4" if _dim == 0 else "r 4 2", _dim, 0, 2, 1)
    spoken("repeat_interleave.self_int", Z, 2, _dim)
    spoken("unfold", "r 4 4", _dim, 2, 2)
silent("split.Tensor", "r 4", 2, 0)
silent("roll", "r 4 4", [1], [])
silent("flip", "r 4 4", [0, 1])
silent("slice.Tensor", "r 4", 0, 0, 2, 1)
spoken("stack", ["=0 2 2", "=0 2 2"], 1)
spoken("cat", [X, "r 0"], 1)
spoken("repeat_interleave.self_int", Y, 2, None)
silent("repeat_interleave.Tensor", "w 2")
for _repeats in ([2, 1, 2], [1, 2, 2], [2, 2, 1, 1]):
    spoken("repeat", X, _repeats)
    spoken("tile", X, _repeats)
spoken("tile", X, [2])
spoken("index.Tensor", X, [None, "w 2"])
spoken("index.Tensor", X, ["w 2"])
spoken("index.Tensor", Z, [None, "w 2 2", "w 2"])
spoken("index.Tensor", Z, ["w 2", "w 2"])
silent("index.Tensor", Z, ["w 2", None, "w 2"])
silent("index.Tensor", "r 2 2", ["w 2", "w 2"])
silent("index.Tensor", X, [None, "b 2"])
spoken("pixel_shuffle", "r 2 4 2 2", 2)
spoken("pixel_shuffle", "r 2 2 4 2 2", 2)
silent("pixel_shuffle", "r 4 2 2", 2)
spoken("pixel_unshuffle", "r 2 1 4 4", 2)
for _x in ("r 2 2 2 2", "r 2 2 2"):
    spoken("pad", _x, [1, 1, 0, 1], "constant", 0.5)
    spoken("constant_pad_nd", _x, [0, 0, 0, 2], 0.0)
    spoken("constant_pad_nd", _x, [0, 2], 0.0)
spoken("pad", "r 2 2 4 4", [1, 1, 1, 1], "circular", None)
spoken("pad", "r 2 2 4", [1, 1], "reflect", None)
spoken("pad", "r 2 4 4", [1, -1, -1, 1], "constant", 0.0)
silent("constant_pad_nd", "r 4", [0, 2], 0.0)
silent("pad", "r 4 4", [0, 0, 2, 0], "constant", 0.0)
for _space, _x in (("1", "r 2 2 4"), ("2", "r 2 2 4 4"), ("3", "r 2 2 2 2 2")):
    for _kind in ("reflection", "replication"):
        spoken(f"{_kind}_pad{_space}d", _x, [1, 1] * int(_space))
        spoken(f"{_kind}_pad{_space}d", _x[:2] + _x[4:], [1, 1] * int(_space))
spoken("copy", X, "r 2 2 2")
spoken("copy", X, "r 2")
spoken("zero", X)
spoken("fill.Scalar", X, 2.0)
spoken("fill.Tensor", X, torch.tensor(1.0, dtype=torch.float64))

# Layers

for _space in (1, 2, 3):
    _x = "r 2 2" + " 2" * _space
    _alone = "r 2" + " 2" * _space
    _w = "r 2 2" + " 2" * _space
    spoken(f"conv{_space}d", _x, _w, "r 2")
    silent(f"conv{_space}d", _alone, _w, None)
    spoken(f"conv{_space}d.padding", _x, _w, None, [1] * _space, "same", [1] * _space)
    spoken(f"conv_transpose{_space}d{'' if _space == 1 else '.input'}", _x, _w, "r 2")
    spoken("_convolution_mode", _x, _w, None, [1] * _space, "valid", [1] * _space, 1)
    for _transposed in (False, True):
        _rest = ([1] * _space, [0] * _space, [1] * _space, _transposed, [0] * _space, 1)
        spoken("convolution", _x, _w, None, *_rest)
        spoken("_convolution", _x, _w, None, *_rest, False, False, True, True)
silent("conv2d", "=0 2 2 2 2", "=0 2 2 2 2")
silent("conv2d", "=0 4 4 2 2", "=0 4 4 2 2")
for _x in ("r 2 2", "r 2 4 2", "r 4 2 2 2"):
    _c = f"r {_x.split()[2]}"
    spoken("batch_norm", _x, _c, _c, _c, _c, False, 0.1, 1e-5, False)
    spoken("native_batch_norm", _x, _c, _c, _c, _c, False, 0.1, 1e-5)
    spoken("_native_batch_norm_legit_no_training", _x, _c, _c, _c, _c, 0.1, 1e-5)
    spoken("group_norm", _x, 2, _c, _c)
spoken("native_group_norm", "r 4 4 2", None, None, 4, 4, 2, 2, 1e-5)
spoken("instance_norm", X, "r 2", None, None, None, True, 0.1, 1e-5, False)
spoken("instance_norm", Z, "r 4", None, "r 4", "r 4", False, 0.1, 1e-5, False)
spoken("_native_batch_norm_legit.no_stats", "r 1 4 2 2", None, None, True, 0.1, 1e-5)
spoken("_native_batch_norm_legit.no_stats", "r 2 4 2", "r 4", None, True, 0.1, 1e-5)
spoken("channel_shuffle", Z, 2)
spoken("im2col", Z, [2, 2], [1, 1], [0, 0], [1, 1])
silent("im2col", "r 4 2 2", [2, 2], [1, 1], [0, 0], [1, 1])
spoken("col2im", "r 2 4 2", [2, 3], [2, 2], [1, 1], [0, 0], [1, 1])
silent("col2im", "r 4 2", [2, 3], [2, 2], [1, 1], [0, 0], [1, 1])
for _x in ("r 2 2", "r 2 2 2", "r 4 2 2"):
    spoken("linear", _x, "r 2 2", "r 2")
silent("linear", "=0 2 2", "=0 2 2")
silent("linear", "=0 4 4", "=0 4 4")
silent("linear", "r 2", "r 2 2")
silent("linear", "=0 4 2", "=0 4 2", "r 4")
spoken("addmm", "r 2 2", "r 2 2", "r 2 2")
spoken("addmm", "r 2", "r 4 2", "r 2 2")
silent("addmm", "=0 2 2", "=0 2 2", "=0 2 2")
silent("addmm", "r 2", "=0 2 2", "=0 2 2")
for _a, _b in ((X, X), (X, "r 2 2"), ("r 2 2", X), (Z, "r 4 2 2"), (X, "r 2"), ("r 4 2", "r 2 4"), ("r 2 2", Z)):
    spoken("matmul", _a, _b)
silent("matmul", "r 2", "r 2 2")
silent("matmul", "=0 2 2", "=0 2 2")
spoken("matmul", "=0 2 2 2", "=0 2 2 2")
spoken("bilinear", X, X, X, "r 2")
spoken("bilinear", "r 2 2", "=0 2 2", "r 2 2 2")
spoken("mm", "r 2 2", "r 2 2")
silent("mm", "=0 2 2", "=0 2 2")
spoken("mv", "r 2 2", "r 2")
spoken("bmm", X, X)
spoken("bmm", "=0 2 2 2", "=0 2 2 2")
spoken("bmm", "r 4 2 2", "r 4 2 4")
spoken("baddbmm", X, X, X)
spoken("baddbmm", "r 2 2", X, X)
spoken("baddbmm", "r 2 1", X, X)
spoken("baddbmm", "=0 2 2 2", "=0 2 2 2", "=0 2 2 2")
for _mask in (None, "r 2 2", "r 2 2 2 2", "b 2 1 2 2"):
    spoken("scaled_dot_product_attention", "r 2 2 2 2", "r 2 2 2 2", "r 2 2 2 2", _mask)
spoken("scaled_dot_product_attention", X, X, X, None, 0.0, True)
spoken("scaled_dot_product_attention", "r 2 4 2 2", "r 2 2 2 2", "r 2 2 2 2", None, 0.0, False, scale := None, True)
spoken("scaled_dot_product_attention", "r 2 2 2 2", "r 1 2 2 2", "r 1 2 2 2", None)
for _equation, _operands in (
    ("bij,bjk->bik", [X, X]),
    ("bij , bkj -> ikb", [X, X]),
    ("bij,jk->bik", [X, "r 2 2"]),
    ("ij,kj->ik", ["r 2 2", "r 2 2"]),
    ("...f,gf->...g", [X, "r 2 2"]),
    ("i...,...i->...i", [X, "r 2 2"]),
    ("...a,...a->...", [X, "r 2 2"]),
    ("ii,ij->ij", ["r 2 2", "r 2 2"]),
    ("bhid,bhjd->bhij", ["r 2 2 2 2", "r 2 2 2 2"]),
    ("a,b->ab", ["r 2", "r 2"]),
    ("ab,cb->abc", ["r 2 1", "r 2 2"]),
):
    spoken("einsum", _equation, _operands)
silent("einsum", "ii->i", ["r 2 2"])
silent("einsum", "ij,kj->ik", ["=0 2 2", "=0 2 2"])
silent("einsum", "i,i->", ["r 2", "r 2"])
silent("einsum", "ij,jk", ["r 2 2", "r 2 2"])
for _space in (1, 2, 3):
    for _x in ("r 2 2" + " 4" * _space, "r 2" + " 4" * _space):
        for _name in ("max", "avg"):
            spoken(f"{_name}_pool{_space}d", _x, [2] * _space, [2] * _space)
            _several = "adaptive_max" if _name == "max" else "adaptive_avg"
            spoken(f"{_several}_pool{_space}d", _x, [2] * _space)
        if _space > 1 or _x == "r 2 2 4":
            spoken(f"max_pool{_space}d_with_indices", _x, [2] * _space, [2] * _space)
        if _space > 1:
            spoken(f"_adaptive_avg_pool{_space}d", _x, [2] * _space)
    _full = "r 2 2" + " 2" * _space
    spoken(f"upsample_nearest{_space}d", _full, [4] * _space)
    spoken(f"upsample_nearest{_space}d.vec", _full, None, [2.0] * _space)
spoken("max_pool2d", "r 2 4 4 4", [3, 3], [1, 1], [1, 1])
spoken("avg_pool1d", "r 2 4 4", [3], [1], [1])
spoken("upsample_bilinear2d", "r 2 2 4 4", [4, 4], True)
for _x in ("r 2 3", "r 4 3", "r 2 3 2"):
    spoken("sum.dim_IntList", _x, [1])
    spoken("softmax.int", _x, 1)
    spoken("matmul", _x, f"r {_x[-1]} 2")
    spoken("mul.Tensor", _x, _x)
    spoken("repeat", _x, [2] * len(_x.split()[1:]))
spoken("upsample_linear1d", X, [4], False)
spoken("upsample_bilinear2d", "r 2 2 2 2", [4, 4], False)
spoken("upsample_bicubic2d", "r 2 2 2 2", [4, 4], True)
spoken("upsample_trilinear3d", "r 2 2 2 2 2", [4, 4, 4], False)
for _shape in ([2], [2, 2]):
    _w = "r" + " 2" * len(_shape)
    spoken("layer_norm", X, _shape, _w, _w)
    spoken("native_layer_norm", Z, _shape, _w, _w, 1e-5)
    spoken("rms_norm", X, _shape, _w)
silent("layer_norm", "r 2 2", [2, 2])
spoken("embedding", "r 2 2", "w 2 2")
silent("embedding", "r 2 2", "w 1")
spoken("embedding", "r 2 4", "w 4")
spoken("one_hot", "w 2 2", 2)
for _name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
    spoken(_name, X, 0.5, False)

# Along and over axes

for _dim in (0, 1, -1):
    for _name in ("softmax.int", "log_softmax.int", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin"):
        spoken(_name, X, _dim)
    spoken("_softmax", X, _dim, False)
    spoken("_log_softmax", Y if _dim != 1 else X, _dim, False)
    spoken("glu", "r 4 4 2", _dim)
    spoken("sort", "r 2 4 2", _dim)
    spoken("sort.stable", "r 2 4 2", stable := True, _dim)
    spoken("topk", "r 2 2 2", 2, _dim)
    for _keep in (False, True):
        for _name in ("sum.dim_IntList", "mean.dim", "amax", "amin", "logsumexp", "nansum", "nanmean"):
            spoken(_name, X, [_dim], _keep)
        for _name in ("prod.dim_int", "max.dim", "min.dim", "argmax", "argmin", "any.dim", "all.dim", "median.dim"):
            spoken(_name, Z, _dim, _keep)
        for _name in ("var.dim", "std.dim", "var_mean.dim", "std_mean.dim"):
            spoken(_name, Z, [_dim], True, _keep)
        for _name in ("linalg_vector_norm", "norm.ScalarOpt_dim"):
            spoken(_name, Z, 2, [_dim], _keep)
spoken("sum.dim_IntList", Z, [1, 2])
spoken("mean.dim", Z, [0, -1], True)
spoken("var.correction", X, [1])
for _name in ("sum", "mean", "prod", "max", "min", "var", "std", "any", "all", "median", "argmax", "norm.Scalar"):
    silent(_name, X)
for _name in ("sum.dim_IntList", "mean.dim", "var.correction"):
    silent(_name, X, None)
silent("sum.dim_IntList", X, [])
silent("logsumexp", "r 2 2", [0, 1])
for _name in ("max.other", "min.other"):
    spoken(_name, X, X)
    spoken(_name, X, "r 2 2")
spoken("where.self", "b 2 2", X, "r 2")
spoken("where.ScalarSelf", "b 2 2", 1.0, X)
silent("where", "b 2 2")
