"""One random net against brute force: every extension, or a refusal that the generator expects."""

import contextlib
import random
import warnings
from dataclasses import dataclass, field

import torch
from tests.engine.random_nets import Net
from tests.engine.reference import Reference, _inputs_of, _outputs_of
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvature_engine as engine
from curvature_engine import replays

TOLERANCE = 1e-10
ROUNDING = 1e-4
"""What cancels is measured by the model's largest entry times this: 1e-10 of it are 45 roundings of the largest."""
HESSIAN_ELEMENTS = 90
APPROXIMATIONS = ["expand", "reduce", "backpack"]
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class Findings:
    """What a net showed: the worst error per extension, and why anything was refused."""

    errors: dict[str, float] = field(default_factory=dict)
    refusals: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    refused: bool = False
    replayed: int = 0
    """How many analyses were done again by a graph that was captured on another batch."""

    def note(self, extension: str, error: float) -> None:
        """Keep the larger; a NaN stays."""
        before = self.errors.get(extension, 0.0)
        self.errors[extension] = error if not error <= before else before


class Peer(Reference):
    """Brute force on a random net, of all its parameters, `asked` for or not: the others tell how large rounding is."""

    def __init__(self, net: Net, names: set[str]) -> None:
        self._names = names
        self._net = net
        super().__init__(net.module, net.inputs, net.targets, net.loss.peer, net.reduction)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.asked = {n: p for n, p in self.parameters.items() if n in self._names}

    @property
    def Z(self) -> float:
        with torch.no_grad():
            return super().Z

    def hessian_root(self, n: int) -> Tensor:
        """Without what rounding leaves of eigenvalues that are zero: its root would be 1e-8."""
        values, vectors = torch.linalg.eigh(self.hessian(n))
        return vectors * torch.where(values > 1e-14 * values.max(), values, 0.0).sqrt()

    def sampled_scores(self, columns: dict[str, Tensor]) -> tuple[list[Tensor], list[bool], float]:
        """What draws went back from the outputs: s [N][D, M] with J_nᵀ s = column, where it is settled, the misfit."""
        scores, settled, worst = [], [], 0.0
        for n in range(self.N):
            jacobian = self.jacobian(n)
            J = torch.cat([jacobian[name].flatten(1) for name in columns], 1)  # [D, P]
            c = torch.cat([c[:, n].flatten(1) for c in columns.values()], 1)  # [M, P]
            s = torch.linalg.lstsq(J.T, c.T, driver="gelsd").solution  # [D, M]
            misfit = (J.T @ s - c.T).abs().max()
            worst = max(worst, float(misfit / c.abs().max().clamp(min=1e-30)) if float(c.abs().max()) > 1e-13 else 0.0)
            values = torch.linalg.svdvals(J)
            settled.append(len(values) == len(J) and bool(values[-1] > 1e-6 * values[0]))
            scores.append(s)
        return scores, settled, worst

    def factors(self, approximation: str, roots: list[Tensor], joint_bias: bool) -> dict:
        """{parameter: (B, A or None)} of modules' parameters, from roots s [N][D, V] at the outputs."""
        uses: dict[nn.Module, list] = {}
        names = {module: name for name, module in self.module.named_modules()}

        def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
            layouts = self._net.layouts.get(names[module], ["n"])
            layout = layouts[min(len(uses.setdefault(module, [])), len(layouts) - 1)]
            if output.requires_grad:
                uses[module].append((layout, args[0].detach(), torch.autograd.graph.get_gradient_edge(output)))

        handles = [m.register_forward_hook(hook) for m in self.module.modules() if isinstance(m, LAYERS)]
        with sdpa_kernel(SDPBackend.MATH):
            outputs = self.module(*self.inputs)
        for handle in handles:
            handle.remove()
        of = {p: n for n, p in self.parameters.items()}
        found: dict = {}
        for module, calls in uses.items():
            rows_are_picked = "picked rows" in self._net.roles.get(f"{names[module]}.weight", ())
            if rows_are_picked or not calls or not {module.weight, module.bias} & of.keys():
                continue
            x = torch.cat([_inputs_of(module, arranged(a, layout, self.N)) for layout, a, _ in calls], 2)
            joint = (
                joint_bias
                and module.bias is not None
                and {of.get(module.weight), of.get(module.bias)} <= self.asked.keys()
            )
            if joint:
                x = torch.cat([x, torch.ones_like(x[..., :1])], 3)
            B: Tensor | float = 0.0
            for v in range(roots[0].shape[1]):
                cotangent = torch.stack([r[:, v] for r in roots]).view(outputs.shape)
                edges = [edge for _, _, edge in calls]
                grads = torch.autograd.grad(outputs, edges, cotangent, retain_graph=True, allow_unused=True)
                if any(g is None for g in grads):
                    break
                s = torch.cat(
                    [
                        _outputs_of(module, arranged(g, layout, self.N))
                        for g, (layout, _, _) in zip(grads, calls, strict=True)
                    ],
                    2,
                )
                s = s if approximation == "expand" else s.sum(2, keepdim=True)
                B = B + torch.einsum("gnta,gntb->gab", s, s)
            if isinstance(B, float):
                continue
            mean = x.mean(2, keepdim=True) if approximation == "reduce" else x
            positions = x.shape[2] if approximation == "expand" else 1
            A = torch.einsum("gnta,gntb->gab", mean, mean) / (self.N * positions)
            pair = (B[0], A[0]) if len(B) == 1 else (B, A)
            if module.weight in of:
                found[of[module.weight]] = pair
            if module.bias is not None and module.bias in of and not joint:
                found[of[module.bias]] = (pair[0], None)
        return found


def arranged(x: Tensor, layout: str, N: int) -> Tensor:
    """A layer's input or output with samples first."""
    if layout == "n":
        return x
    if layout == "tn":
        return x.transpose(0, 1)
    return x.view(N, -1, x.shape[-1]) if layout == "flat_nt" else x.view(-1, N, x.shape[-1]).transpose(0, 1)


def check(net: Net) -> Findings:
    """Compare everything; raise AssertionError where a number is wrong or a refusal was not expected."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        return _Check(net).run()


class _Check:
    def __init__(self, net: Net) -> None:
        self.net, self.rng = net, random.Random(net.seed + 1)
        self.again = net.seed % 6 == 0
        """Whether its analyses are done again by graphs, which need room and are not verified."""
        self.findings = Findings()

    def run(self) -> Findings:
        net = self.net
        self.program = engine.load(net.readable())
        self.verify = self.rng.random() < 0.15 and not self.again
        if self.rng.random() < 0.3:
            self._warm_up()
        samples = [self.rng.randrange(net.inputs[0].shape[0]) for _ in range(self.rng.randint(1, 3))]
        self.samples = samples
        first = self._analyze(self._first_order())
        if first is None:
            return self.findings
        if net.coupler is not None:
            assert not self._is_coupled(), f"coupled samples were not refused: {net.traits}"
        restore = [(p, p.requires_grad) for p in net.module.parameters()]
        if net.parameters == "all":
            net.module.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):  # which can be differentiated twice
            self.peer = Peer(net, set(first["grad"]))
        self._compare_first_order(first)
        if net.loss.second_order:
            self._second_order()
        self._hessian()
        for p, required in restore:
            p.requires_grad_(required)
        return self.findings

    def _other_inputs(self) -> tuple[Tensor, ...]:
        """Another batch's: noise, zeros or one large number, so that other rows are silent."""
        generator = torch.Generator().manual_seed(self.net.seed)
        how = self.rng.choice(["noise", "zeros", "large"])

        def other(x: Tensor) -> Tensor:
            if not x.is_floating_point():
                return x.flip(1)
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            return {"noise": noise, "zeros": torch.zeros_like(x), "large": torch.full_like(x, -3.0)}[how]

        return tuple(other(x) for x in self.net.inputs)

    def _warm_up(self) -> None:
        """Have the program keep another batch's verdict, which must not spoil this one's results."""
        net = self.net
        with contextlib.suppress(engine.EngineError):
            engine.analyze(
                self.program,
                self._other_inputs(),
                net.targets,
                self.rng.choice([["batch_grad"], ["kflr" if net.loss.second_order else "variance"]]),
                loss=net.loss.request,
                parameters=net.parameters,
            )

    def _analyze(self, requests: list) -> "engine.Analysis | None":
        net = self.net
        if self.again:
            self._capture(requests)
        try:
            return self._analysis(net.inputs, net.targets, requests, net.seed)
        except engine.EngineError as error:
            self._judge(error)
            return None

    def _analysis(self, inputs: tuple[Tensor, ...], targets: Tensor, requests: list, seed: int) -> "engine.Analysis":
        net = self.net
        return engine.analyze(
            self.program,
            inputs,
            targets,
            requests,
            loss=net.loss.request,
            reduction=net.reduction,
            parameters=net.parameters,
            budget_bytes=None if self.again else net.budget_bytes,
            seed=seed,
            verify=self.verify,
        )

    def _capture(self, requests: list) -> None:
        """Have the analysis captured on a batch of other samples, so that it is done again for the net's own."""
        net, before = self.net, replays.RUNS
        replays.RUNS = {**before, "cpu": 2}
        try:
            with contextlib.suppress(engine.EngineError):
                for k in range(1, 4):
                    inputs = tuple(x.roll(k, 0) for x in net.inputs)
                    self._analysis(inputs, net.targets.roll(k, 0), requests, net.seed + k)
        finally:
            replays.RUNS = before
        graphs = [kind.captured.graph for kind in replays.replays_of(self.program).captured()]
        self.findings.replayed += sum(not graph.on_trial for graph in graphs)

    def _judge(self, error: "engine.EngineError") -> None:
        """Note a refusal that had to be expected, and that says what to do."""
        reason = self._expected(error)
        assert reason is not None, f"refused: {error.code}: {error.message}"
        assert error.remedy, error
        assert error.param or error.code == "coupled_samples", error
        self.findings.refusals.append(reason)
        self.findings.refused = True

    def _expected(self, error: "engine.EngineError") -> str | None:
        """Why a refusal was to be expected; None where it was not."""
        net = self.net
        if error.code == "coupled_samples" and net.coupler is not None:
            return "samples are coupled"
        if error.code == "training_mode" and "F.batch_norm" in net.source:
            return "statistics of the batch"
        if error.code == "invalid_targets" and "no term is left" in error.message:
            return "every target is ignored"
        if error.code == "unsupported_model" and "cannot be differentiated twice" in error.message:
            return "fused attention has no second derivative" if "fused attention" in net.traits else None
        if error.code == "verification_failed" and not self._autograd_is_right(str(error.param)):
            return "torch's own gradient is wrong"
        if error.code == "unsupported_model" and "do not depend on any" in error.message and not self._reaches():
            return "no parameter asked for reaches the outputs"
        return None

    def _autograd_is_right(self, name: str) -> bool:
        """Whether torch's gradient of a parameter is what central differences say."""
        parameter = dict(self.net.module.named_parameters())[name]
        generator = torch.Generator().manual_seed(0)
        outputs = self.net.module(*self.net.inputs)
        u = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        direction = torch.randn(parameter.shape, generator=generator, dtype=outputs.dtype)
        (gradient,) = torch.autograd.grad(outputs, parameter, u)
        values = []
        with torch.no_grad():
            for step in (1e-6, -2e-6, 1e-6):
                parameter += step * direction
                values.append(float((self.net.module(*self.net.inputs) * u).sum()))
        slope = (values[0] - values[1]) / 2e-6
        return abs(slope - float((gradient * direction).sum())) <= 1e-5 * max(abs(slope), 1e-3)

    def _reaches(self) -> bool:
        outputs = self.net.module(*self.net.inputs)
        names = [n for n, p in self.net.module.named_parameters() if p.requires_grad]
        wanted = self.net.parameters
        if wanted != "trainable":
            prefix = wanted.rstrip("*")
            names = [n for n in names if wanted == "all" or n.startswith(prefix)]
        tensors = [dict(self.net.module.named_parameters())[n] for n in names]
        if not tensors or not outputs.requires_grad:
            return False
        return any(g is not None for g in torch.autograd.grad(outputs.sum(), tensors, allow_unused=True))

    def _is_coupled(self) -> bool:
        """Whether some element of what is mixed reaches the outputs of two samples."""
        edges: list = []
        module = self.net.module.get_submodule(self.net.coupler)
        handle = module.register_forward_hook(
            lambda m, a, o: edges.append(torch.autograd.graph.get_gradient_edge(a[0]))
        )
        outputs = self.net.module(*self.net.inputs)
        handle.remove()
        reached = 0
        for n in range(len(outputs)):
            weights = torch.randn(outputs[n].shape, generator=torch.Generator().manual_seed(n), dtype=outputs.dtype)
            (g,) = torch.autograd.grad((outputs[n] * weights).sum(), edges[:1], retain_graph=True, allow_unused=True)
            reached = reached + (0 if g is None else (g.abs() > 1e-9).int())
        return isinstance(reached, Tensor) and bool((reached > 1).any())

    def _error(self, extension: str, found: dict, expected: dict, floors: dict | None = None) -> None:
        """Errors of all parameters, each measured by its own largest entry (or the model's, where it cancels).

        `floors` are sizes below which a parameter's value is rounding.
        """
        asked = set(self.peer.asked) if expected.keys() >= self.peer.asked.keys() else set(expected)
        assert set(found) == asked, (extension, set(found), asked)
        whole = max((float(e.detach().abs().max()) for e in expected.values() if e.numel()), default=0.0)
        for parameter, actual in found.items():
            value = expected[parameter]
            assert actual.shape == value.shape, (extension, parameter, actual.shape, value.shape)
            if not value.numel():
                continue
            floor = 0.0 if floors is None else floors[parameter]
            scale = max(float(value.detach().abs().max()), ROUNDING * whole, floor, 1e-300)
            error = float((actual - value.detach()).abs().max()) / scale
            self.findings.note(extension, error)
            assert error <= TOLERANCE, f"{extension} of {parameter}: error {error:.3g}\n{actual}\n{value}"

    # First order

    def _first_order(self) -> list:
        some = {"subsampling": self.samples}
        requests: list = ["batch_loss", "outputs", "grad"]
        for name in ("batch_grad", "batch_l2", "batch_dot", "sum_grad_squared", "variance"):
            options = {"scale": self.rng.choice(["loss", "sample"])}
            requests.append({"name": name, "options": options})
            requests.append({"name": name, "label": f"{name} some", "options": options | some})
        over = {"over": "model"}
        requests += [{"name": name, "label": f"{name} model", "options": over} for name in ("batch_l2", "batch_dot")]
        self.against = None
        # A trace that picks rows has the first batch's number of them baked in.
        baked = self.net.way == "traced" and {"picked rows"} in self.net.roles.values()
        if self.net.coupler is None and not baked and self.rng.random() < 0.15:
            self.against = (self._other_inputs(), self.net.targets)
            requests.append({"name": "batch_dot", "label": "against", "options": {"against": self.against}})
        if self.rng.random() < 0.5:  # dot products keep a batch in one piece
            requests = [r for r in requests if isinstance(r, str) or r["name"] != "batch_dot"]
            self.against = None
        joint = self.rng.random() < 0.5
        return requests + [
            {
                "name": "kfac",
                "label": f"empirical {a}",
                "options": {"approximation": a, "fisher": "empirical", "joint_bias": joint},
            }
            for a in APPROXIMATIONS
        ]

    def _compare_first_order(self, result: "engine.Analysis") -> None:
        peer, samples = self.peer, self.samples
        self._error("loss", {"loss": result["loss"]}, {"loss": peer.loss_value()})
        self._error("batch_loss", {"": result["batch_loss"]}, {"": peer.contributions()})
        self._error("outputs", {"": result["outputs"]}, {"": peer.outputs})
        self._error("grad", result["grad"], peer.grad())
        batch_grad = peer.batch_grad()
        for name in ("batch_grad", "batch_l2", "batch_dot", "sum_grad_squared", "variance"):
            scale = peer.Z if name in result.groups and result.groups[name].options["scale"] == "sample" else 1.0
            scaled = {n: b * scale for n, b in batch_grad.items()}
            # Differences δ of gradients g have an error of eps·g, so δ² has one of 2·eps·g·δ, whatever δ is.
            square = max(float(b.square().mean(0).max()) for b in scaled.values() if b.numel())
            floors = dict.fromkeys(scaled, 1e-10 * square if name == "variance" else 0.0)
            if name not in result.groups:
                continue
            self._error(name, result[name], {n: peer.reduced(name, b) for n, b in scaled.items()}, floors)
            expected = {n: peer.reduced(name, b[samples]) for n, b in scaled.items()}
            self._error(f"{name} subsampling", result[f"{name} some"], expected, floors)
        flat = torch.cat([batch_grad[n].flatten(1) for n in peer.asked], 1)
        for name in [n for n in ("batch_l2", "batch_dot") if n in result.groups]:
            self._error(f"{name} over model", {"": result[f"{name} model"]}, {"": peer.reduced(name, flat)})
        if self.against is not None:
            other = Reference(self.net.module, *self.against, self.net.loss.peer, self.net.reduction).batch_grad()
            products = {n: b.flatten(1) @ other[n].flatten(1).T for n, b in batch_grad.items()}
            self._error("batch_dot against", result["against"], products)
        roots = [peer.loss_gradient(n) for n in range(peer.N)]
        for a in APPROXIMATIONS:
            self._compare_factors("kfac empirical", result, f"empirical {a}", a, roots)

    # Second order

    def _second_order(self) -> None:
        some, M = {"subsampling": self.samples}, self.rng.choice([1, 2, 3])
        names = ["diag_ggn_exact", "batch_diag_ggn_exact", "sqrt_ggn_exact"]
        requests: list = [*names, "saliency"]
        requests += [{"name": n, "label": f"{n} some", "options": some} for n in names]
        for a in APPROXIMATIONS:
            joint = self.rng.random() < 0.5
            requests.append(
                {"name": "kflr", "label": f"kflr {a}", "options": {"approximation": a, "joint_bias": joint}}
            )
            options = {"approximation": a, "joint_bias": joint, "mc_samples": M}
            requests.append({"name": "kfac", "label": f"kfac {a}", "options": options})
        sampled = ("diag_ggn_mc", "batch_diag_ggn_mc", "sqrt_ggn_mc")
        requests += [{"name": name, "options": {"mc_samples": M}} for name in sampled]
        result = self._analyze(requests)
        assert result is not None
        peer, samples = self.peer, self.samples
        blocks = peer.batch_diag_ggn()
        expected = {
            "diag_ggn_exact": {n: b.sum(0) for n, b in blocks.items()},
            "batch_diag_ggn_exact": blocks,
            "diag_ggn_exact some": {n: b[samples].sum(0) for n, b in blocks.items()},
            "batch_diag_ggn_exact some": {n: b[samples] for n, b in blocks.items()},
            "saliency": {n: peer.parameters[n] ** 2 * b.sum(0) / 2 for n, b in blocks.items()},
        }
        for label, values in expected.items():
            self._error(label.replace("some", "subsampling"), result[label], values)
        self._compare_roots(result)
        roots = [peer.hessian_root(n) for n in range(peer.N)]
        for a in APPROXIMATIONS:
            self._compare_factors("kflr", result, f"kflr {a}", a, roots)
        self._compare_sampled(result, M)

    def _compare_roots(self, result: "engine.Analysis") -> None:
        """Σ_v column columnᵀ of each sample, against Jᵀ H J over pairs of a parameter's elements."""
        peer, whole, some = self.peer, {}, {}
        grams = {name: [] for name in peer.parameters}
        for n in range(peer.N):
            H = peer.hessian(n)
            for name, J in peer.jacobian(n).items():
                flat = J.flatten(1)
                grams[name].append(flat.T @ H @ flat)
        for name, columns in result["sqrt_ggn_exact"].items():
            flat = columns.flatten(2)
            whole[name] = torch.einsum("vna,vnb->nab", flat, flat)
            some[name] = (result["sqrt_ggn_exact some"][name] - columns[:, self.samples]).abs()
        self._error("sqrt_ggn_exact", whole, {n: torch.stack(g) for n, g in grams.items()})
        assert all(bool((d == 0).all()) or float(d.max()) < 1e-12 for d in some.values())

    def _compare_sampled(self, result: "engine.Analysis", M: int) -> None:
        """Draws are of the shape that the conventions give them, and all quantities come from the same ones."""
        peer, net = self.peer, self.net
        columns = dict(result["sqrt_ggn_mc"])
        squares = {n: c.square().sum(0) for n, c in columns.items()}
        self._error("batch_diag_ggn_mc", result["batch_diag_ggn_mc"], squares)
        self._error("diag_ggn_mc", result["diag_ggn_mc"], {n: s.sum(0) for n, s in squares.items()})
        scores, settled, misfit = peer.sampled_scores(columns)
        self.findings.note("sqrt_ggn_mc", misfit)
        assert misfit <= 1e-9, f"sampled columns are no products with the Jacobian: {misfit:.3g}"
        if net.loss.name == "cross_entropy":
            self._check_labels(scores, settled, M)
        if all(settled):
            for a in APPROXIMATIONS:
                self._compare_factors("kfac", result, f"kfac {a}", a, scores, tolerance=1e-8)

    def _check_labels(self, scores: list[Tensor], settled: list[bool], M: int) -> None:
        """Each sampled column of a softmax is p − onehot, times one number per position."""
        peer = self.peer
        last = self.net.loss.options.get("class_axis") == "last"
        for n, s in enumerate(scores):
            if not settled[n]:
                continue
            f = peer.outputs[n].detach()
            axis = f.dim() - 1 if last else 0
            p = f.softmax(axis).movedim(axis, 0).reshape(f.shape[axis], -1)  # [C, T]
            for m in range(M):
                drawn = s[:, m].view(f.shape).movedim(axis, 0).reshape(p.shape)
                for t in range(p.shape[1]):
                    label = int(drawn[:, t].argmin())
                    direction = p[:, t] - torch.eye(len(p), dtype=p.dtype)[label]
                    factor = float(drawn[:, t] @ direction) / float(direction @ direction)
                    rest = (drawn[:, t] - factor * direction).abs().max()
                    assert float(rest) <= 1e-7 * max(factor, 1e-3), (n, m, t, drawn[:, t], direction)

    # Kronecker factors

    def _compare_factors(
        self,
        kind: str,
        result: "engine.Analysis",
        label: str,
        approximation: str,
        roots: list,
        tolerance: float = TOLERANCE,
    ) -> None:
        if self.net.coupler is not None:
            return  # rows may be other samples' than their places say, and the engine goes by what they reach
        group = result.groups[label]
        joint = bool(group.options["joint_bias"])
        expected = self.peer.factors(approximation, roots, joint)
        for parameter in self.peer.asked:
            roles = self.net.roles.get(parameter, set())
            if len(roles) > 1:
                assert parameter not in group.by_parameter, f"{kind} of {parameter}, tied across {roles}, was given"
            if parameter not in group.by_parameter:
                reason = group.missing[parameter]
                if parameter in expected and not roles:
                    assert self._may_miss(parameter, reason), f"{kind} {approximation} of {parameter}: {reason}"
                self.findings.missing.append(f"{reason}")
                continue
            if parameter not in expected or roles:
                continue
            found, pair = group[parameter], expected[parameter]
            for factor, a, b in (("B", found.B, pair[0]), ("A", found.A, pair[1])):
                assert (a is None) == (b is None), (kind, parameter, factor)
                if a is None or b is None:
                    continue
                assert a.shape == b.shape, (kind, parameter, factor, a.shape, b.shape)
                largest = max(
                    float(p[factor == "A"].abs().max()) for p in expected.values() if p[factor == "A"] is not None
                )
                scale = max(float(b.abs().max()), ROUNDING * largest, 1e-300)
                error = float((a - b).abs().max()) / scale
                self.findings.note(kind, error)
                assert error <= tolerance, f"{kind} {approximation} {factor} of {parameter}: {error:.3g}\n{a}\n{b}"

    def _may_miss(self, parameter: str, reason: str) -> bool:
        return (
            "some rows" in reason
            or "fallback" in reason
            or "different numbers" in reason
            or "part of that" in reason
            or "does not reach" in reason
        )

    # The Hessian

    def _hessian(self) -> None:
        net = self.net
        size = sum(p.numel() for p in self.peer.parameters.values())
        if not net.loss.second_order or size > HESSIAN_ELEMENTS or self.rng.random() < 0.3:
            return
        some = {"name": "batch_diag_hessian", "label": "some", "options": {"subsampling": self.samples}}
        result = self._analyze(["diag_hessian", "batch_diag_hessian", some])
        if result is None:
            self.findings.refused = False
            return
        expected = self.peer.batch_diag_hessian()
        self._error("batch_diag_hessian", result["batch_diag_hessian"], expected)
        self._error("diag_hessian", result["diag_hessian"], {n: e.sum(0) for n, e in expected.items()})
        self._error("batch_diag_hessian subsampling", result["some"], {n: e[self.samples] for n, e in expected.items()})
