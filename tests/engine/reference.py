"""Brute force by plain autograd on eager modules: the judge of every number. Shares no code with the engine.

One batched forward, then one backward per sample (and per output for Jacobians). Kronecker factors from hooks on
modules, with patches made by a convolution with one-hot kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class Reference:
    module: nn.Module
    inputs: tuple
    targets: torch.Tensor
    loss: str | Callable
    """A name, or torch's function of (outputs, targets, reduction)."""
    reduction: str

    def __post_init__(self):
        self.parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.outputs = self.module(*self.inputs)
        self.N = len(self.outputs)

    # Losses

    @property
    def Z(self):
        """What torch divides by."""
        if self.reduction == "sum":
            return 1
        if callable(self.loss):
            outputs = self.outputs.detach()
            return float(self.loss(outputs, self.targets, "sum") / self.loss(outputs, self.targets, "mean"))
        return self.outputs.numel() if self.loss == "mse" else int((self.targets != -100).sum())

    def contributions(self):
        if callable(self.loss):
            rows = zip(self.outputs.split(1), self.targets.split(1), strict=True)
            return torch.stack([self.loss(f, t, "sum") for f, t in rows]) / self.Z
        if self.loss == "mse":
            terms = (self.outputs - self.targets) ** 2
        else:
            terms = F.cross_entropy(self.outputs, self.targets, reduction="none")
        return terms.reshape(self.N, -1).sum(1) / self.Z

    def loss_value(self):
        if callable(self.loss):
            return self.loss(self.outputs, self.targets, self.reduction)
        loss = F.mse_loss if self.loss == "mse" else F.cross_entropy
        return loss(self.outputs, self.targets, reduction=self.reduction)

    def hessian(self, n):
        """Autodiff Hessian of sample n's contribution in its outputs, [D, D]."""
        f, Z = self.outputs[n].detach(), self.Z

        def contribution(flat):
            row = flat.view(f.shape)[None]
            if callable(self.loss):
                return self.loss(row, self.targets[n : n + 1], "sum") / Z
            if self.loss == "mse":
                return ((row - self.targets[n : n + 1]) ** 2).sum() / Z
            return F.cross_entropy(row, self.targets[n : n + 1], reduction="sum") / Z

        return torch.autograd.functional.hessian(contribution, f.reshape(-1))

    def hessian_root(self, n):
        values, vectors = torch.linalg.eigh(self.hessian(n))
        return vectors * values.clamp(min=0).sqrt()

    # Derivatives

    def _gradients(self, scalar):
        found = torch.autograd.grad(scalar, list(self.parameters.values()), retain_graph=True, allow_unused=True)
        return {
            n: torch.zeros_like(p) if g is None else (g.to_dense() if g.is_sparse else g)
            for (n, p), g in zip(self.parameters.items(), found, strict=True)
        }

    def batch_grad(self):
        rows = [self._gradients(c) for c in self.contributions()]
        return {n: torch.stack([r[n] for r in rows]) for n in self.parameters}

    def grad(self):
        return self._gradients(self.loss_value())

    def jacobian(self, n):
        """{parameter: ∂f_n/∂θ, [D, *p]}."""
        f = self.outputs[n].reshape(-1)
        rows = [self._gradients(f[i]) for i in range(len(f))]
        return {name: torch.stack([r[name] for r in rows]) for name in self.parameters}

    def columns(self, n):
        """The square root of sample n's Hessian as the conventions write it, [D, V]; column index c·T + t."""
        f = self.outputs[n].detach()
        D = f.numel()
        if self.loss == "mse":
            return torch.eye(D, dtype=f.dtype) * (2 / self.Z) ** 0.5
        C, T = f.shape[0], D // f.shape[0]
        p = f.softmax(0).reshape(C, T)
        counts = (self.targets[n] != -100).reshape(T)
        S = torch.zeros(C, T, C, T, dtype=f.dtype)
        for t in range(T):
            S[:, t, :, t] = (
                counts[t] * (torch.diag(p[:, t].sqrt()) - torch.outer(p[:, t], p[:, t].sqrt())) / self.Z**0.5
            )
        return S.reshape(D, D)

    def batch_diag_ggn(self):
        found = {name: [] for name in self.parameters}
        for n in range(self.N):
            H = self.hessian(n)
            for name, J in self.jacobian(n).items():
                found[name].append(torch.einsum("i...,ij,j...->...", J, H, J))
        return {name: torch.stack(rows) for name, rows in found.items()}

    def batch_diag_hessian(self):
        """By differentiating every element of every sample's gradient once more."""
        found = {name: [] for name in self.parameters}
        for contribution in self.contributions():
            tensors = list(self.parameters.values())
            gradients = torch.autograd.grad(contribution, tensors, create_graph=True, allow_unused=True)
            for (name, p), g in zip(self.parameters.items(), gradients, strict=True):
                diagonal = torch.zeros(p.numel(), dtype=p.dtype)
                for i in range(p.numel()) if g is not None and g.requires_grad else ():
                    (h,) = torch.autograd.grad(g.reshape(-1)[i], p, retain_graph=True, allow_unused=True)
                    diagonal[i] = 0 if h is None else h.reshape(-1)[i]
                found[name].append(diagonal.view(p.shape))
        return {name: torch.stack(rows) for name, rows in found.items()}

    def sqrt_ggn(self):
        found = {name: [] for name in self.parameters}
        for n in range(self.N):
            S = self.columns(n)
            for name, J in self.jacobian(n).items():
                found[name].append(torch.einsum("i...,iv->v...", J, S))
        return {name: torch.stack(rows, 1) for name, rows in found.items()}

    def expected(self, extension):
        if extension == "grad":
            return self.grad()
        if extension == "batch_diag_ggn_exact":
            return self.batch_diag_ggn()
        if extension == "diag_ggn_exact":
            return {n: b.sum(0) for n, b in self.batch_diag_ggn().items()}
        if extension == "saliency":
            return {n: self.parameters[n].detach() ** 2 * b.sum(0) / 2 for n, b in self.batch_diag_ggn().items()}
        if extension == "sqrt_ggn_exact":
            return self.sqrt_ggn()
        return {n: self.reduced(extension, b) for n, b in self.batch_grad().items()}

    @staticmethod
    def reduced(extension, b):
        """A first-order quantity of individual gradients [n, *p]."""
        n = len(b)
        return {
            "batch_grad": lambda: b,
            "batch_l2": lambda: b.reshape(n, -1).square().sum(1),
            "batch_dot": lambda: b.reshape(n, -1) @ b.reshape(n, -1).T,
            "sum_grad_squared": lambda: b.square().sum(0),
            "variance": lambda: ((b - b.mean(0)) ** 2).sum(0) / n,
        }[extension]()

    def noise_scale(self, names):
        """B of some parameters together, from single samples' gradients (their mean is the batch's)."""
        batch_grad = self.batch_grad()
        h = self.N * torch.cat([batch_grad[name].reshape(self.N, -1) for name in names], 1)
        trace = h.var(0, unbiased=True).sum()
        return trace / (h.mean(0).square().sum() - trace / self.N)

    # Kronecker factors

    def loss_gradient(self, n):
        """The gradient of sample n's contribution in its outputs, with 1/√Z in place of 1/Z, [D, 1]."""
        (found,) = torch.autograd.grad(self.contributions()[n], self.outputs, retain_graph=True)
        return found[n].reshape(-1, 1) * self.Z**0.5

    def kflr(self, approximation, fisher="type2", joint_bias=False):
        """{parameter: (B, A or None)} for parameters of linear and convolution modules, used once or more."""
        uses = {}

        def hook(module, args, output):
            if output.requires_grad:
                uses.setdefault(module, []).append((args[0].detach(), torch.autograd.graph.get_gradient_edge(output)))

        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        handles = [m.register_forward_hook(hook) for m in self.module.modules() if isinstance(m, kinds)]
        outputs = self.module(*self.inputs)
        for handle in handles:
            handle.remove()
        roots = [self.hessian_root(n) if fisher == "type2" else self.loss_gradient(n) for n in range(self.N)]
        names = {p: n for n, p in self.parameters.items()}
        result = {}
        for module, calls in uses.items():
            x = torch.cat([_inputs_of(module, a) for a, _ in calls], 2)  # [G, N, T, in]
            joint = joint_bias and module.bias is not None and {module.weight, module.bias} <= names.keys()
            if joint:
                x = torch.cat([x, torch.ones_like(x[..., :1])], 3)
            B = 0
            for v in range(roots[0].shape[1]):
                cotangent = torch.stack([r[:, v] for r in roots]).view(outputs.shape)
                grads = torch.autograd.grad(
                    outputs, [o for _, o in calls], cotangent, retain_graph=True, allow_unused=True
                )
                s = torch.cat([_outputs_of(module, g) for g in grads], 2)
                s = s if approximation == "expand" else s.sum(2, keepdim=True)
                B = B + torch.einsum("gnta,gntb->gab", s, s)
            A = {
                "expand": lambda x: torch.einsum("gnta,gntb->gab", x, x) / (self.N * x.shape[2]),
                "reduce": lambda x: torch.einsum("gna,gnb->gab", x.mean(2), x.mean(2)) / self.N,
                "backpack": lambda x: torch.einsum("gnta,gntb->gab", x, x) / self.N,
            }[approximation](x)
            if len(B) == 1:
                B, A = B[0], A[0]
            if module.weight in names:
                result[names[module.weight]] = (B, A)
            if module.bias is not None and module.bias in names and not joint:
                result[names[module.bias]] = (B, None)
        return result


def _outputs_of(module, g):
    if isinstance(module, nn.Linear):
        return g.reshape(len(g), -1, g.shape[-1])[None]
    G = module.groups
    return g.reshape(len(g), G, g.shape[1] // G, -1).permute(1, 0, 3, 2)


def _inputs_of(module, x):
    if isinstance(module, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1])[None]
    N, C, G = x.shape[0], x.shape[1], module.groups
    kernel = module.kernel_size
    K = torch.Size(kernel).numel()
    d = len(kernel)
    one_hot = torch.eye(K, dtype=x.dtype).view(K, 1, *kernel).repeat(C, 1, *[1] * d)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        one_hot = torch.eye(K, dtype=x.dtype).view(1, K, *kernel).repeat(C, 1, *[1] * d)
        conv = getattr(F, f"conv_transpose{d}d")
        patches = conv(x, one_hot, None, module.stride, module.padding, module.output_padding, C, module.dilation)
    else:
        conv = getattr(F, f"conv{d}d")
        patches = conv(x, one_hot, None, module.stride, module.padding, module.dilation, C)
    return patches.reshape(N, G, C // G * K, -1).permute(1, 0, 3, 2)
