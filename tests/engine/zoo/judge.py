"""One model of the zoo in one way, every extension of the registry held to brute force."""

import warnings
from dataclasses import dataclass, field

import torch
from tests.engine.models import targets_for
from tests.engine.zoo.truth import MC_SAMPLES, SEED

import curvature_engine as engine
from curvature_engine.errors import EngineError
from curvature_engine.extensions import EXTENSIONS

TOLERANCE = 1e-10
NEGLIGIBLE = 1e-5
"""Parameters whose true value is below this part of the model's largest are measured by that: some are zero."""


@dataclass
class Cell:
    """What became of one extension.

    Attributes:
        methods: how many parameters by which method.
        error: the largest relative one over what was compared; None where nothing was.
        unchecked: parameters with a result that brute force does not cover.
        refusal: the error's code and message.
    """

    methods: dict[str, int] = field(default_factory=dict)
    error: float | None = None
    unchecked: list[str] = field(default_factory=list)
    refusal: str = ""

    @property
    def wrong(self):
        return self.error is not None and not self.error <= TOLERANCE


def model_file(module, inputs, way):
    """The model as a user would hand it over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the exporters announce
        if way == "scripted":
            return torch.jit.script(module)
        if way == "exported":
            return torch.export.export(module, tuple(inputs))
        if way == "fast path":
            with torch.no_grad():
                return torch.jit.trace(module, inputs, check_trace=False)
        return torch.jit.trace(module, inputs, check_trace=False, strict=False)


def ways_of(entry):
    """The entry's ways that the engine has a format for."""
    from curvature_engine import formats

    return [w for w in entry.ways if w != "exported" or hasattr(formats, "Export")]


def judge(truth, way, extensions=tuple(EXTENSIONS)):
    """{extension: Cell}, each asked for alone where together they are refused."""
    program = engine.load(model_file(truth.module, truth.inputs, way), eval=not truth.entry.train)
    cells = {}
    try:
        together = _analyze(truth, program, [e for e in extensions if e != "kfra"])
    except EngineError:
        together = None
    for name in extensions:
        try:
            result = together if together is not None and name != "kfra" else _analyze(truth, program, [name])
        except EngineError as error:
            cells[name] = Cell(refusal=f"{error.code}: {error.message}")
            continue
        cells[name] = _compare(truth, name, result)
    return cells


def refusal(entry, way):
    """The error that an entry ends in, or None."""
    module, inputs = entry.build()
    with torch.no_grad():
        targets = targets_for(module(*inputs), entry.loss)
    module, inputs = entry.build()
    try:
        program = engine.load(model_file(module, inputs, way), eval=not entry.train)
        engine.analyze(program, inputs, targets, ["batch_grad"], loss=entry.loss)
    except EngineError as error:
        return error
    return None


def request(name):
    sampled = "mc_samples" in EXTENSIONS[name].options and name != "saliency"
    return {"name": name, "options": {"mc_samples": MC_SAMPLES} if sampled else {}}


def _analyze(truth, program, names):
    return engine.analyze(program, truth.inputs, truth.targets, [request(n) for n in names], loss=truth.loss, seed=SEED)


def _compare(truth, name, result):
    group, cell = result.groups[name], Cell()
    for entry in group.provenance.values():
        method = entry.get("method") or "computed"
        cell.methods[method] = cell.methods.get(method, 0) + 1
    if group.missing:
        cell.methods["none"] = len(group.missing)
    check = CHECKS.get(name)
    if check is None:
        cell.unchecked = list(group.provenance)
        return cell
    pairs = check(truth, result)
    scale = max((float(e.abs().max()) for _, _, e in pairs if e is not None and e.numel()), default=0.0)
    for parameter, actual, expected in pairs:
        if expected is None:
            cell.unchecked.append(parameter)
            continue
        cell.error = max(cell.error or 0.0, _error(actual, expected, scale))
    return cell


def _error(actual, expected, scale):
    if actual is None or actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    own = float(expected.abs().max()) if expected.numel() else 0.0
    worst = float((actual - expected).abs().max()) if expected.numel() else 0.0
    return worst / max(own, NEGLIGIBLE * scale, 1e-300)


# What to compare with: (parameter, engine's, brute force's or None) of each extension


def _by_parameter(name, expected_of):
    def check(truth, result):
        group, expected = result[name], expected_of(truth)
        return [(p, group.get(p), expected[p]) for p in truth.names]

    return check


def _reduced(name):
    return _by_parameter(name, lambda t: {p: t.reference.reduced(name, b) for p, b in t.batch_grad.items()})


def _whole(name, expected_of):
    return lambda truth, result: [(name, result[name], expected_of(truth))]


def _sum(values):
    return {p: None if v is None else v.sum(0) for p, v in values.items()}


def _saliency(truth):
    return {p: truth.reference.parameters[p].detach() ** 2 * d.sum(0) / 2 for p, d in truth.batch_diag_ggn.items()}


def _square_root(truth, result):
    """A square root is one of many: compare what it makes of a random vector, S Sᵀ r."""
    generator = torch.Generator().manual_seed(2)
    r = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in truth.reference.parameters.items()}
    expected = truth.ggn_products(r)
    pairs = []
    for p in truth.names:
        S = result["sqrt_ggn_exact"][p]
        inner = (S.reshape(*S.shape[:2], -1) * r[p].flatten()).sum(2)
        pairs.append((p, torch.einsum("vn...,vn->n...", S, inner), expected[p]))
    return pairs


def _noise_scale(truth, result):
    layers = {}
    for p in truth.names:
        layers.setdefault(p.rpartition(".")[0] or p, []).append(p)
    pairs = []
    rows = {p: truth.reference.N * b.reshape(truth.reference.N, -1) for p, b in truth.batch_grad.items()}
    for key, names in {**layers, "*": truth.names}.items():
        h = torch.cat([rows[p] for p in names], 1)
        trace = h.var(0, unbiased=True).sum()
        expected = trace / (h.mean(0).square().sum() - trace / len(h))
        # A quotient whose denominator may cancel: compare it where it does not.
        steady = bool(h.abs().max() > 1e-8) and (h.mean(0).square().sum() - trace / len(h)).abs() > 1e-3 * trace
        pairs.append((key, result["gradient_noise_scale"][key], expected if steady else None))
    return pairs


def _factors(name):
    def check(truth, result):
        expected, group, pairs = getattr(truth, name), result[name], []
        for p in group:
            B, A = expected.get(p, (None, None))
            pairs.append((f"{p}, B", group[p].B, B))
            if group[p].A is not None:
                pairs.append((f"{p}, A", group[p].A, A))
        return pairs

    return check


CHECKS = {
    "batch_loss": _whole("batch_loss", lambda t: t.reference.contributions().detach()),
    "outputs": _whole("outputs", lambda t: t.reference.outputs.detach()),
    "grad": _by_parameter("grad", lambda t: t.reference.grad()),
    **{n: _reduced(n) for n in ("batch_grad", "batch_l2", "batch_dot", "sum_grad_squared", "variance")},
    "gradient_noise_scale": _noise_scale,
    "diag_ggn_exact": _by_parameter("diag_ggn_exact", lambda t: _sum(t.batch_diag_ggn)),
    "batch_diag_ggn_exact": _by_parameter("batch_diag_ggn_exact", lambda t: t.batch_diag_ggn),
    "sqrt_ggn_exact": _square_root,
    "saliency": _by_parameter("saliency", _saliency),
    "sqrt_ggn_mc": _by_parameter("sqrt_ggn_mc", lambda t: t.sqrt_ggn_mc),
    "diag_ggn_mc": _by_parameter(
        "diag_ggn_mc", lambda t: {p: s.square().sum((0, 1)) for p, s in t.sqrt_ggn_mc.items()}
    ),
    "batch_diag_ggn_mc": _by_parameter(
        "batch_diag_ggn_mc", lambda t: {p: s.square().sum(0) for p, s in t.sqrt_ggn_mc.items()}
    ),
    "diag_hessian": _by_parameter("diag_hessian", lambda t: _sum(t.batch_diag_hessian)),
    "batch_diag_hessian": _by_parameter("batch_diag_hessian", lambda t: t.batch_diag_hessian),
    "kflr": _factors("kflr"),
    "kfac": _factors("kfac"),
    "kfra": _factors("kfra"),
}
"""Of an extension that is not here, nothing is compared, and the table says so."""
