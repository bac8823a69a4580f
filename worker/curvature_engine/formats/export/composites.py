"""Core operators that decompositions leave behind, told as the composites they came from.

A composite computes the same numbers by the same kernels, and is what rules, guards and openings know.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from curvature_engine.formats.export.schema import Graph, Node, Ref

_ATEN = "torch.ops.aten."


def recompose(graph: Graph, parameters: frozenset[str]) -> Graph:
    """`graph` with composites where they are known; `parameters` are values that hold a parameter."""
    used = _used(graph)
    matrices = Matrices(graph, parameters)
    nodes = []
    for node in graph.nodes:
        name = node.target.removeprefix(_ATEN).partition(".")[0]
        if name in _COMPOSITES and not _needs_more_than_the_first(node, used):
            node = _rewritten(node, *_COMPOSITES[name](node.named))
        elif name == "copy":
            node = _copy(node, graph)
        else:
            matrices.see(node)
            node = matrices.product(node)
        nodes.append(node)
    return replace(graph, nodes=tuple(nodes))


def _used(graph: Graph) -> frozenset[str]:
    """The names of all values that some node or the graph's end reads."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, Ref):
            found.add(value.name)
        elif isinstance(value, list | tuple):
            for inner in value:
                collect(inner)

    collect([node.values for node in graph.nodes])
    collect(graph.outputs)
    return frozenset(found)


def _needs_more_than_the_first(node: Node, used: frozenset[str]) -> bool:
    return any(isinstance(output, Ref) and output.name in used for output in node.outputs[1:])


def _rewritten(node: Node, target: str, arguments: Mapping[str, Any]) -> Node:
    return replace(
        node, target=_ATEN + target, named=arguments, values=tuple(arguments.values()), outputs=node.outputs[:1]
    )


def _layer_norm(a: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    shape = {"input": a["input"], "normalized_shape": a["normalized_shape"]}
    return "layer_norm.default", {**shape, "weight": a.get("weight"), "bias": a.get("bias"), "eps": a["eps"]}


def _group_norm(a: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    affine = {"weight": a.get("weight"), "bias": a.get("bias")}
    return "group_norm.default", {"input": a["input"], "num_groups": a["group"], **affine, "eps": a["eps"]}


def _batch_norm(a: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kept = {name: a[name] for name in ("input", "weight", "bias", "running_mean", "running_var")}
    rest = {"momentum": a["momentum"], "eps": a["eps"], "cudnn_enabled": True}
    return "batch_norm.default", {**kept, "training": False, **rest}


def _attention(a: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kept = {name: a[name] for name in ("query", "key", "value")}
    mask = a.get("attn_mask", a.get("attn_bias"))
    rest = {"dropout_p": a.get("dropout_p", 0.0), "is_causal": a.get("is_causal", False), "scale": a.get("scale")}
    return "scaled_dot_product_attention.default", {**kept, "attn_mask": mask, **rest}


def _dropout(a: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return "dropout.default", {"input": a["input"], "p": a["p"], "train": a["train"] is not False}


def _weight_norm(a: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return "_weight_norm.default", {"v": a["v"], "g": a["g"], "dim": a.get("dim", 0)}


_COMPOSITES: dict[str, Callable[[Mapping[str, Any]], tuple[str, dict[str, Any]]]] = {
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "native_dropout": _dropout,
    "_weight_norm_interface": _weight_norm,
    **dict.fromkeys(
        (
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
}


def _copy(node: Node, graph: Graph) -> Node:
    """`copy(a, b)`, which has no derivative, is b in a's shape, where their dtypes agree."""
    a, b = node.named["self"], node.named["src"]
    known = graph.dtypes.get(a.name)
    if known is None or graph.dtypes.get(b.name) != known:
        return node
    return _rewritten(node, "expand_as.default", {"self": b, "other": a})


class Matrices:
    """Parameters that are matrices, through transposition and repetition, up to the product that consumes them.

    `addmm(b, x, Wᵀ)`, `mm(x, Wᵀ)` and `bmm(x, [Wᵀ, Wᵀ, …])` are linear layers: only as such they have their rules.
    """

    def __init__(self, graph: Graph, parameters: frozenset[str]) -> None:
        self._sizes = graph.sizes
        self._parameters = parameters
        self._transposed: dict[str, str] = {}
        self._repeated: dict[str, tuple[str, bool]] = {}

    def see(self, node: Node) -> None:
        """Note a node that transposes a parameter or repeats it along a new first axis."""
        source = node.named.get("self")
        if len(node.outputs) != 1 or not isinstance(node.outputs[0], Ref) or not isinstance(source, Ref):
            return
        out, sizes = node.outputs[0].name, self._sizes.get(node.outputs[0].name, ())
        if source.name in self._parameters and len(sizes) == 2 and _transposes(node):
            self._transposed[out] = source.name
        elif node.target == f"{_ATEN}expand.default" and sizes[1:] == self._sizes.get(source.name):
            if source.name in self._transposed:
                self._repeated[out] = self._transposed[source.name], True
            elif source.name in self._parameters and len(sizes) == 3:
                self._repeated[out] = source.name, False
        elif source.name in self._repeated and sizes == self._sizes[source.name] and "view" in node.target:
            self._repeated[out] = self._repeated[source.name]

    def product(self, node: Node) -> Node:
        """A product with such a matrix as the composite that it is; any other node as it is."""
        weight = node.named.get("mat2")
        if not isinstance(weight, Ref):
            return node
        if node.target == f"{_ATEN}bmm.default" and weight.name in self._repeated:
            name, transposed = self._repeated[weight.name]
            if transposed:
                return _rewritten(node, "linear.default", {"input": node.named["self"], "weight": Ref(name)})
            return _rewritten(node, "matmul.default", {"self": node.named["self"], "other": Ref(name)})
        if weight.name not in self._transposed:
            return node
        source = Ref(self._transposed[weight.name])
        if node.target == f"{_ATEN}mm.default":
            return _rewritten(node, "linear.default", {"input": node.named["self"], "weight": source})
        if node.target == f"{_ATEN}addmm.default" and self._plain(node, source):
            arguments = {"input": node.named["mat1"], "weight": source, "bias": node.named["self"]}
            return _rewritten(node, "linear.default", arguments)
        return node

    def _plain(self, node: Node, weight: Ref) -> bool:
        """Whether an addmm adds one bias per output, without factors."""
        unscaled = node.named.get("beta", 1) == 1 and node.named.get("alpha", 1) == 1
        return unscaled and self._sizes.get(node.named["self"].name) == self._sizes[weight.name][:1]


def _transposes(node: Node) -> bool:
    """Whether a node swaps the axes of a matrix."""
    if node.target == f"{_ATEN}permute.default":
        return node.named.get("dims") in ([1, 0], [-1, -2])
    if node.target == f"{_ATEN}transpose.int":
        return [node.named.get("dim0"), node.named.get("dim1")] in ([0, 1], [1, 0], [-1, -2], [-2, -1])
    return node.target == f"{_ATEN}t.default"
