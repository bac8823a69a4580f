"""Brute force for one model of the zoo: every extension's value by plain autograd on the eager module.

Kronecker factors come from a recorder of the calls that eager PyTorch makes. Monte-Carlo quantities are compared
exactly, given the draws: the engine's own columns of the outputs' space, asked for on a model that only adds a constant
to the outputs, go back through the eager module's Jacobian.
"""

from functools import cached_property, partial
from math import prod

import torch
import torch.nn.functional as F
from tests.engine.models import targets_for
from tests.engine.reference import Reference
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvature_engine as engine

MC_SAMPLES = 2
SEED = 5


class Picked:
    """A module whose outputs are one entry of what it returns."""

    def __init__(self, module, output):
        self.module, self.output = module, output
        self.named_parameters = module.named_parameters

    def __call__(self, *inputs):
        returned = self.module(*inputs)
        return returned if self.output is None else returned[self.output]


class Shift(nn.Module):
    """Its Jacobian in `b` is the identity."""

    def __init__(self, outputs):
        super().__init__()
        self.b = nn.Parameter(torch.zeros_like(outputs[0]))

    def forward(self, x):
        return x + self.b


def classes_last(f, t, reduction):
    return F.cross_entropy(f.movedim(-1, 1), t, reduction=reduction)


class Truth:
    """What the extensions of one entry should be.

    Attributes:
        loss: the request for the engine.
    """

    def __init__(self, entry):
        self.entry = entry
        self.module, self.inputs = entry.build()
        picked = Picked(self.module, entry.output)
        with torch.no_grad():
            outputs = picked(*self.inputs)
        options = {} if entry.output is None else {"output": entry.output}
        loss = entry.loss
        if entry.class_axis == -1:
            options["class_axis"], loss = "last", classes_last
            self.targets = targets_for(outputs.movedim(-1, 1), entry.loss)
        else:
            self.targets = targets_for(outputs, entry.loss)
        self.loss = {"name": entry.loss, "options": options}
        with sdpa_kernel(SDPBackend.MATH):  # the fast kernels have no second derivative
            self.reference = Reference(picked, self.inputs, self.targets, loss, "mean")
        self.names = list(self.reference.parameters)

    @cached_property
    def batch_grad(self):
        return self.reference.batch_grad()

    @cached_property
    def jacobians(self):
        return [self.reference.jacobian(n) for n in range(self.reference.N)]

    @cached_property
    def hessians(self):
        return [self.reference.hessian(n) for n in range(self.reference.N)]

    @cached_property
    def batch_diag_ggn(self):
        return self._each(lambda J, n: torch.einsum("i...,ij,j...->...", J, self.hessians[n], J))

    @cached_property
    def batch_diag_hessian(self):
        return self.reference.batch_diag_hessian() if self.entry.hessian else dict.fromkeys(self.names)

    @cached_property
    def draws(self):
        """The engine's columns in the space of outputs, [M, N, D]."""
        outputs = self.reference.outputs.detach()
        loss = {"name": self.loss["name"], "options": {k: v for k, v in self.loss["options"].items() if k != "output"}}
        request = {"name": "sqrt_ggn_mc", "options": {"mc_samples": MC_SAMPLES}}
        script = torch.jit.script(Shift(outputs))
        result = engine.analyze(script, outputs, self.targets, [request], loss=loss, seed=SEED)
        return result["sqrt_ggn_mc"]["b"].flatten(2)

    @cached_property
    def sqrt_ggn_mc(self):
        rows = self._each(lambda J, n: torch.einsum("i...,vi->v...", J, self.draws[:, n]))
        return {name: value.transpose(0, 1) for name, value in rows.items()}

    def ggn_products(self, r):
        """Each sample's J_nᵀ H_n J_n r, {parameter: [N, *p]}."""
        return self._each_named(
            lambda name, J, n: torch.einsum(
                "i...,ij,j->...", J, self.hessians[n], J.reshape(len(J), -1) @ r[name].flatten()
            )
        )

    def _each(self, function):
        return self._each_named(lambda name, J, n: function(J, n))

    def _each_named(self, function):
        return {
            name: torch.stack([function(name, J[name], n) for n, J in enumerate(self.jacobians)]) for name in self.names
        }

    # Kronecker factors, expanded over positions

    @cached_property
    def recorder(self):
        with Recorder({id(p): n for n, p in self.reference.parameters.items()}) as recorder:
            outputs = self.reference.module(*self.inputs)
        return recorder, outputs

    def factors(self, columns):
        """{parameter: (B, A or None)} for cotangents `columns`, [N, *outputs] each, of what the recorder saw."""
        recorder, outputs = self.recorder
        calls = [c for c in recorder.calls if c.output.requires_grad]
        edges = [c.edge for c in calls]
        total: dict = {}
        for column in columns:
            found = torch.autograd.grad(
                outputs, edges, column.view(outputs.shape), retain_graph=True, allow_unused=True
            )
            for call, g in zip(calls, found, strict=True):
                s = call.output_rows(torch.zeros_like(call.output) if g is None else g)
                for name in filter(None, (call.weight, call.bias)):
                    B = torch.einsum("gra,grb->gab", s, s)
                    total[name] = total.get(name, 0) + B
        result = {}
        for name, B in total.items():
            inputs = [c.input_rows() for c in calls if c.weight == name]
            A = torch.cat(inputs, 1) if inputs else None
            A = None if A is None else torch.einsum("gra,grb->gab", A, A) / A.shape[1]
            result[name] = (B, A) if len(B) > 1 else (B[0], None if A is None else A[0])
        return result

    @cached_property
    def kflr(self):
        roots = [self.reference.hessian_root(n) for n in range(self.reference.N)]
        return self.factors([torch.stack([r[:, v] for r in roots]) for v in range(roots[0].shape[1])])

    @cached_property
    def kfac(self):
        return self.factors(list(self.draws))

    @cached_property
    def kfra(self):
        from tests.engine.test_kfra import averaged, expected

        if not self.entry.chain:
            return {}
        matrices = averaged(self.module, self.inputs, self.targets, self.entry.loss, "mean")
        return expected(self.module, matrices, "expand", False)


class Call:
    """One product with a weight: [out, in] on rows, or a convolution."""

    def __init__(self, weight, bias, x, output, arguments=None, transposed=False):
        self.weight, self.bias = weight, bias
        self.x, self.output, self.edge = x.detach(), output, get_gradient_edge(output)
        self.arguments, self.transposed = arguments, transposed

    def output_rows(self, g):
        """[groups, rows, out]."""
        if self.arguments is None:
            return g.reshape(1, -1, g.shape[-1])
        G = self.arguments["groups"]
        return g.reshape(g.shape[0], G, g.shape[1] // G, -1).permute(1, 0, 3, 2).flatten(1, 2)

    def input_rows(self):
        """[groups, rows, in]; a convolution's patches come from a depthwise one with one-hot kernels."""
        x = self.x
        if self.arguments is None:
            return x.reshape(1, -1, x.shape[-1])
        options = dict(self.arguments)
        kernel, C, G = options.pop("kernel"), x.shape[1], options.pop("groups")
        K, d = prod(kernel), len(kernel)
        one_hot = torch.eye(K, dtype=x.dtype)
        one_hot = one_hot.view(1, K, *kernel) if self.transposed else one_hot.view(K, 1, *kernel)
        conv = getattr(F, f"conv_transpose{d}d" if self.transposed else f"conv{d}d")
        patches = conv(x, one_hot.repeat(C, *[1] * (d + 1)), groups=C, **options)
        return patches.reshape(x.shape[0], G, C // G * K, -1).permute(1, 0, 3, 2).flatten(1, 2)


class Recorder:
    """Watches eager PyTorch for products with parameters, while it is entered.

    Args:
        names: of parameters, by id.
    """

    def __init__(self, names):
        self.names, self.calls = names, []
        self._kept = []

    def __enter__(self):
        convolutions = [(f"conv{d}d", False) for d in (1, 2, 3)] + [(f"conv_transpose{d}d", True) for d in (1, 2, 3)]
        self._watch(F, "linear", self._linear)
        self._watch(torch, "addmm", self._addmm)
        for name, transposed in convolutions:
            self._watch(F, name, partial(self._convolution, transposed=transposed))
        return self

    def __exit__(self, *_):
        for owner, name, function in self._kept:
            setattr(owner, name, function)

    def _watch(self, owner, name, handler):
        function = getattr(owner, name)
        self._kept.append((owner, name, function))

        def watched(*arguments, **options):
            result = function(*arguments, **options)
            if result.requires_grad:
                handler(result, *arguments, **options)
            return result

        setattr(owner, name, watched)

    def _name(self, tensor):
        return self.names.get(id(tensor))

    def _add(self, weight, bias, x, output, *rest, **options):
        if self._name(weight) or self._name(bias):
            self.calls.append(Call(self._name(weight), self._name(bias), x, output, *rest, **options))

    def _linear(self, output, x, weight, bias=None):
        self._add(weight, bias, x, output)

    def _addmm(self, output, bias, x, weight):
        self._add(weight, bias, x, output)

    def _convolution(self, output, x, weight, bias=None, stride=1, padding=0, *rest, transposed=False, **options):
        names = ("output_padding", "groups", "dilation") if transposed else ("dilation", "groups")
        options = {"dilation": 1, "groups": 1, **dict(zip(names, rest, strict=False)), **options}
        arguments = {"stride": stride, "padding": padding, "kernel": tuple(weight.shape[2:]), **options}
        self._add(weight, bias, x, output, arguments, transposed=transposed)
