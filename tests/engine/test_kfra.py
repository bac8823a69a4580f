"""KFRA: against dense per-sample Jacobians of every module, and what is no chain."""

import warnings
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from tests.engine.models import Case, Residual, Shared, images, sequences, targets_for, tokens, torchscript, vectors
from tests.engine.reference import Reference, _inputs_of
from torch import nn

import curvature_engine as engine
from curvature_engine import jacobians
from curvature_engine.passages import Passage

TOLERANCE = 1e-10
APPROXIMATIONS = ["expand", "reduce", "backpack"]


class Call(nn.Module):
    """A function as a layer of a chain."""

    def forward(self, x):
        return self.function(x)


class Mean(Call):
    def function(self, x):
        return x.mean((2, 3))


class Positions(Call):
    def function(self, x):
        return x.mean(1)


class Transposed(Call):
    def function(self, x):
        return x.transpose(1, 2)


class Pad(Call):
    def function(self, x):
        return F.pad(x, (1, 0, 2, 1))


class Last(Call):
    def function(self, x):
        return x[:, -1]


class Square(Call):
    def function(self, x):
        return x * x


class Swish(Call):
    """Elementwise, although its branches join."""

    def function(self, x):
        return x * torch.sigmoid(1.5 * x) + 0.1 * x**3


class InPlace(nn.Module):
    """Edits what a layer made."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return torch.relu_(self.layer(x))


class Rows(nn.Module):
    """A layer on merged rows."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 5)

    def forward(self, x):
        return self.l(x.reshape(-1, 4)).view(x.shape[0], -1, 5)


class Conv1D(nn.Module):
    """A linear layer as language models write it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, 4), self.weight).view(x.shape[0], -1, 3)


def batchnorm(channels):
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.normal_(norm.weight)
    return norm


def sequential(*modules):
    return lambda: nn.Sequential(*(m() for m in modules))


CASES = [
    Case(
        "mlp",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Sigmoid(), nn.Linear(4, 3)),
        vectors,
    ),
    Case(
        "activations",
        lambda: nn.Sequential(
            *(nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 4), nn.SiLU(), nn.ELU(), nn.Linear(4, 4), Square()),
            *(nn.Linear(4, 4), nn.LeakyReLU(), nn.Softplus(), Swish(), nn.Linear(4, 3), nn.Softsign()),
            nn.LogSoftmax(-1),
        ),
        vectors,
        losses=("mse",),
    ),
    Case(
        "cnn",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2), nn.Sigmoid()),
            *(nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 3)),
        ),
        images,
    ),
    Case(
        "pooling",
        lambda: nn.Sequential(
            *(nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(2, 2, 3, stride=2, bias=False), batchnorm(2)),
            *(nn.ReLU(inplace=True), nn.MaxPool2d(3, 1, padding=1), nn.Conv2d(2, 3, 2), Pad()),
            *(nn.AvgPool2d(2), Mean(), nn.Linear(3, 3)),
        ),
        images,
    ),
    Case(
        "convolutions",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh()),
            *(nn.ConvTranspose2d(4, 2, 3, stride=2, groups=2), nn.Tanh(), nn.Conv2d(2, 3, 2, dilation=2)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),
        ),
        images,
    ),
    Case(
        "one_axis",
        lambda: nn.Sequential(
            *(nn.Conv1d(4, 3, 2), nn.ReLU(), nn.MaxPool1d(2, 1), nn.ConvTranspose1d(3, 2, 2), nn.AvgPool1d(2)),
            *(nn.Flatten(), nn.Linear(4, 3)),
        ),
        lambda: (torch.randn(4, 4, 5, dtype=torch.float64),),
    ),
    Case(
        "three_axes",
        lambda: nn.Sequential(
            *(nn.Conv3d(1, 2, 2, padding=1), nn.Tanh(), nn.AdaptiveMaxPool3d(2), nn.ConvTranspose3d(2, 1, 2)),
            *(nn.AvgPool3d(2), nn.Flatten(), nn.Linear(1, 3)),
        ),
        lambda: (torch.randn(4, 1, 2, 3, 2, dtype=torch.float64),),
    ),
    Case(
        "positions",
        lambda: nn.Sequential(
            *(InPlace(nn.Linear(4, 5)), nn.Linear(5, 4), Rows(), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 4)),
            *(nn.Softmax(2), Conv1D(), nn.Tanh(), nn.Linear(3, 4), Positions(), nn.Linear(4, 3)),
        ),
        sequences,
    ),
    Case(
        "places",
        lambda: nn.Sequential(
            *(nn.Linear(4, 5), Transposed(), nn.Conv1d(5, 4, 2), nn.Tanh(), Transposed(), nn.Linear(4, 3)),
            *(Transposed(), nn.Flatten(), nn.Linear(6, 6), nn.Unflatten(1, (2, 3)), nn.Tanh(), Transposed()),
            *(Last(), nn.Linear(2, 3)),
        ),
        sequences,
    ),
    Case("extra_axis", lambda: nn.Sequential(nn.Conv1d(4, 4, 2), nn.Tanh(), nn.Conv1d(4, 3, 1)), lambda: (
        torch.randn(4, 4, 3, dtype=torch.float64),
    )),
]  # fmt: skip
BY_NAME = {case.name: case for case in CASES}
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
COMBINATIONS = [
    pytest.param(case.name, loss, reduction, way, id=f"{case.name}-{loss}-{reduction}-{way}")
    for case in CASES
    for loss in case.losses
    for reduction in ("mean", "sum")
    for way in case.ways
]


def build(case):
    torch.manual_seed(0)
    module, inputs = case.make().double().eval(), case.inputs()
    return module, inputs


def stages(module):
    """The modules of a chain, those of one layer taken apart."""
    if isinstance(module, nn.Sequential):
        return [s for m in module for s in stages(m)]
    if isinstance(module, InPlace):
        return [module.layer, nn.ReLU()]
    return [module]


def averaged(module, inputs, targets, loss, reduction):
    """(layer, its input, its output, averaged matrix in its output), by the recursion as written."""
    chain, values = stages(module), [inputs[0]]
    for stage in chain:
        values.append(stage(values[-1].clone()).detach())
    reference = Reference(module, inputs, targets, loss, reduction)
    N = reference.N
    M = sum(reference.hessian(n) for n in range(N))
    found = []
    for stage, x, y in reversed(list(zip(chain, values[:-1], values[1:], strict=True))):
        found.append((stage, x, y, M))
        jacobians = [dense_jacobian(stage, x[n : n + 1]) for n in range(N)]
        M = sum(J.T @ M @ J for J in jacobians) / N
    return found


def expected(module, matrices, approximation, joint):
    """{parameter: (B, A or None)} from the averaged matrices."""
    names = {p: n for n, p in module.named_parameters()}
    result = {}
    for stage, x, y, M in matrices:
        weight, bias, factors = layer_factors(stage, x, y, M, approximation, joint)
        if factors is not None:
            result[names[weight]] = factors
            if bias is not None and not joint:
                result[names[bias]] = (factors[0], None)
    return result


def dense_jacobian(stage, x):
    """Of one sample: [elements out, elements in]."""
    found = torch.autograd.functional.jacobian(lambda z: stage(z.clone()), x)
    return found.reshape(-1, x.numel())


def layer_factors(stage, x, y, M, approximation, joint):
    if isinstance(stage, Rows):
        stage = stage.l
    if not isinstance(stage, (*LAYERS, Conv1D)):
        return None, None, None
    groups = getattr(stage, "groups", 1)
    if isinstance(stage, (nn.Linear, Conv1D)):
        T, C = y[0].numel() // y.shape[-1], y.shape[-1]
        blocks = M.reshape(T, 1, C, T, 1, C)
        inputs = x.reshape(len(x), T, -1)[None]
    else:
        C, T = y.shape[1] // groups, y[0, 0].numel()
        blocks = M.reshape(groups, C, T, groups, C, T).permute(2, 0, 1, 5, 3, 4)
        inputs = _inputs_of(stage, x)
    if joint and stage.bias is not None:
        inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], 3)
    pattern = "tgatgb->gab" if approximation == "expand" else "tgaugb->gab"
    B = torch.einsum(pattern, blocks)
    second = torch.einsum("gnta,gntb->gab", inputs, inputs) / len(x)
    A = {
        "expand": lambda: second / T,
        "backpack": lambda: second,
        "reduce": lambda: torch.einsum("gna,gnb->gab", inputs.mean(2), inputs.mean(2)) / len(x),
    }[approximation]()
    return stage.weight, stage.bias, ((B, A) if groups > 1 else (B[0], A[0]))


KFRA = [
    {"name": "kfra", "label": f"{a}{joint}", "options": {"approximation": a, "joint_bias": joint}}
    for a in APPROXIMATIONS
    for joint in (False, True)
]


@cache
def averaged_of(name, loss, reduction):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), loss)
    return module, inputs, targets, averaged(module, inputs, targets, loss, reduction)


def check(group, factors):
    assert set(group) == set(factors)
    for parameter, (B, A) in factors.items():
        assert error(group[parameter].B, B) <= TOLERANCE, parameter
        assert (group[parameter].A is None) == (A is None)
        if A is not None:
            assert error(group[parameter].A, A) <= TOLERANCE, parameter


def error(actual, expected):
    assert actual.shape == expected.shape
    return float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


@pytest.mark.parametrize(("name", "loss", "reduction", "way"), COMBINATIONS)
def test_equals_the_recursion_by_dense_jacobians(name, loss, reduction, way):
    module, inputs, targets, matrices = averaged_of(name, loss, reduction)
    script = torchscript(module, inputs, way)
    result = engine.analyze(script, inputs, targets, KFRA, loss=loss, reduction=reduction)
    for request in KFRA:
        group = result[request["label"]]
        check(group, expected(module, matrices, *request["options"].values()))
        assert set(group) | set(group.missing) == {n for n, _ in module.named_parameters()}


def kfra(module, inputs, loss="mse", way="scripted", requests=("kfra",), **options):
    module = module.double().eval()
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    targets = targets_for(module(*inputs), loss)
    return engine.analyze(torchscript(module, inputs, way), inputs, targets, list(requests), loss=loss, **options)


@pytest.mark.parametrize("name", ["mlp", "cnn", "positions"])
def test_one_sample_gives_kflr(name):
    module, inputs = build(BY_NAME[name])
    requests = [{"name": k, "options": {"approximation": "reduce"}} for k in ("kfra", "kflr")]
    result = kfra(module, inputs[0][:1], "cross_entropy", requests=requests)
    check(result["kfra"], result["kflr"])


class Scaled(nn.Module):
    """Products and sums with factors: of a bias whose weight has a form, and of one alone."""

    def __init__(self):
        super().__init__()
        self.a, self.w, self.v = nn.Linear(5, 4), nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 3))
        self.b, self.c = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = torch.addmm(self.b, torch.tanh(self.a(x)), self.w, beta=3.0, alpha=0.5)
        return torch.add(torch.matmul(torch.sigmoid(h), self.v), self.c, alpha=2.0)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("parameters", ["*", "b", "a.bias", "c"])
def test_factors_of_products_and_sums(parameters, approximation):
    torch.manual_seed(0)
    requests = [{"name": k, "options": {"approximation": approximation}} for k in ("kfra", "kflr")]
    result = kfra(Scaled(), vectors()[0][:1], requests=requests, parameters=parameters)
    assert len(result["kfra"]) == (6 if parameters == "*" else 1)
    check(result["kfra"], result["kflr"])


def test_results_share_no_memory():
    module, inputs = build(BY_NAME["mlp"])
    requests = [{"name": "kfra", "label": a, "options": {"approximation": a}} for a in APPROXIMATIONS]
    result = kfra(module, inputs, requests=requests)
    tensors = [t for a in APPROXIMATIONS for pair in result[a].values() for t in pair if t is not None]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)


@pytest.mark.parametrize(
    ("layer", "activation", "passes"),
    [
        # One for an activation's diagonal, save ReLU's; a second where it is not known to be one; none for products.
        (lambda: nn.Linear(6, 6), nn.ReLU, 0),
        (lambda: nn.Linear(6, 6, bias=False), nn.Tanh, 2),
        (lambda: nn.Linear(6, 6), nn.Softsign, 4),
        (lambda: InPlace(nn.Linear(6, 6)), nn.Identity, 0),
    ],
)
def test_known_operators_are_not_asked(layer, activation, passes, monkeypatch):
    asked = []
    call = Passage.__call__
    monkeypatch.setattr(Passage, "__call__", lambda self, vectors: asked.append(self) or call(self, vectors))
    module = nn.Sequential(layer(), activation(), layer(), activation(), nn.Linear(6, 2))
    kfra(module, (torch.randn(4, 6, dtype=torch.float64),))
    assert len(asked) == passes


def test_a_wrong_claim_about_a_jacobian_fails(monkeypatch):
    """Checked where a single known node of the graph does not say it."""
    monkeypatch.setitem(jacobians._FORMS, "softmax", jacobians._diagonal)
    module = nn.Sequential(nn.Linear(5, 4), nn.Softmax(-1), nn.Linear(4, 3))
    with pytest.raises(engine.EngineError, match=r"aten::softmax .* does not act as kfra takes it to") as caught:
        kfra(module, vectors())
    assert caught.value.code == "verification_failed"


def test_chunks_of_samples_do_not_change_results():
    module, inputs = build(BY_NAME["positions"])
    whole, small = kfra(module, inputs), kfra(module, inputs, budget_bytes=60_000)  # blocks of a 16th: 2 samples
    for parameter, (B, _) in whole["kfra"].items():
        assert error(small["kfra"][parameter].B, B) <= 1e-12


def test_a_kept_verdict_serves_the_next_batch():
    module, inputs = build(BY_NAME["cnn"])
    program = engine.load(torch.jit.script(module))
    targets = targets_for(module(*inputs), "mse")
    first, second = (engine.analyze(program, inputs, targets, ["kfra"], loss="mse") for _ in range(2))
    assert torch.equal(first["kfra"]["0.weight"].B, second["kfra"]["0.weight"].B)


class Scaling(nn.Module):
    """A product with its rows' own bias, scaled by numbers that the caller may change."""

    def __init__(self, alpha: float, beta: float):
        super().__init__()
        self.W, self.b, self.last = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4)), nn.Linear(4, 3)
        self.alpha, self.beta = alpha, beta

    def forward(self, x):
        return self.last(torch.relu(torch.addmm(self.b, x, self.W, alpha=self.alpha, beta=self.beta)))


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), lambda: Scaling(2.0, 0.5)]
)
def test_what_is_kept_serves_batches_of_its_kind_only(make):
    """What a warm program gives is what a new one gives, whatever came before."""
    torch.manual_seed(0)
    module = make().double()
    warm = engine.load(torch.jit.script(module))
    for N, approximation, chosen in [(4, "expand", "*"), (4, "reduce", "*"), (7, "expand", "*"), (4, "expand", "*b*")]:
        x, y = torch.randn(N, 6, dtype=torch.float64), torch.randint(0, 3, (N,))
        request = [{"name": "kfra", "options": {"approximation": approximation}}]
        found = engine.analyze(warm, x, y, request, parameters=chosen)["kfra"]
        new = engine.analyze(torch.jit.script(module), x, y, request, parameters=chosen)["kfra"]
        assert found.keys() == new.keys()
        for name, (B, A) in new.items():
            assert torch.equal(found[name].B, B)
            assert A is None or torch.equal(found[name].A, A)


def test_half_precision_is_near_double():
    module, inputs = build(BY_NAME["cnn"])
    exact = kfra(module, inputs)
    half = build(BY_NAME["cnn"])[0].bfloat16()
    targets = targets_for(module(*inputs), "mse")
    rounded = engine.analyze(torch.jit.script(half), inputs[0].bfloat16(), targets.bfloat16(), ["kfra"], loss="mse")
    for parameter, (B, _) in exact["kfra"].items():
        assert rounded["kfra"][parameter].B.dtype == torch.float32
        assert error(rounded["kfra"][parameter].B.double(), B) <= 0.1


class Rounded(nn.Module):
    """Computes a part in single precision."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x).float()).double())


@pytest.mark.parametrize("way", ["scripted", "traced"])
def test_casts_are_layers_like_others(way):
    torch.manual_seed(0)
    module, (x,) = Rounded(), vectors()
    plain = nn.Sequential(module.a, nn.Tanh(), module.b)
    rounded, exact = kfra(module, x, way=way)["kfra"], kfra(plain, x)["kfra"]
    for mine, exactly in (("a.weight", "0.weight"), ("b.weight", "2.weight")):
        assert error(rounded[mine].B, exact[exactly].B) <= 1e-5


@pytest.mark.parametrize("name", ["cnn", "positions", "places"])
def test_exported_programs(name, tmp_path):
    module, inputs, targets, matrices = averaged_of(name, "mse", "mean")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("N", min=2)},)
        torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), tmp_path / "model.pt2")
    result = engine.analyze(tmp_path / "model.pt2", inputs, targets, KFRA, loss="mse")
    for request in KFRA:
        check(result[request["label"]], expected(module, matrices, *request["options"].values()))


# What is no chain


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.gate = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        h = self.l(x)
        return h * torch.sigmoid(self.gate(h))


class Graph(nn.Module):
    """Each sample brings its own matrix."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x, neighbours):
        return self.b(torch.matmul(neighbours, torch.relu(self.a(x))))


class SamplesSecond(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1))).mean(0))


class PartEdited(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = self.a(x)
        torch.relu_(h[:, :2])
        return self.b(h)


@pytest.mark.parametrize("way", ["scripted", "traced"])
@pytest.mark.parametrize(
    ("make", "inputs", "message"),
    [
        (Residual, images, r"aten::add_? \(.*joins 2 branches"),
        (Shared, vectors, r"l.weight is shared by 2 layers, aten::linear"),
        (Gated, vectors, r"aten::mul \(.*joins 2 branches"),
        (
            Graph,
            lambda: (*sequences(), torch.rand(4, 3, 3, dtype=torch.float64)),
            r"does not know the Jacobian of aten::matmul",
        ),
        (SamplesSecond, sequences, r"aten::mean.*from \[3, 4, 3\] to \[4, 3\]"),
        (PartEdited, vectors, r"aten::linear|CopySlices|aten::relu_"),
    ],
)
def test_no_chain_is_refused_with_operator_and_remedy(make, inputs, message, way):
    torch.manual_seed(0)
    with pytest.raises(engine.EngineError, match=message) as caught:
        kfra(make(), inputs(), way=way)
    assert caught.value.code == "unsupported_model"
    assert "kflr" in caught.value.remedy


def test_a_plan_refuses_as_the_analysis_does():
    module, inputs = Residual().double().eval(), images()
    with pytest.raises(engine.EngineError, match="joins 2 branches"):
        engine.plan(torch.jit.script(module), inputs, targets_for(module(*inputs), "mse"), ["kfra"], loss="mse")


def test_layers_behind_the_last_branch_can_be_had_alone():
    torch.manual_seed(0)
    module, inputs = Residual(), images()
    requests = [{"name": k, "options": {"approximation": "backpack"}} for k in ("kfra", "kflr")]
    result = kfra(module, inputs, "cross_entropy", requests=requests, parameters="head.*")
    check(result["kfra"], result["kflr"])


def test_layers_without_a_form_are_left_out_or_refused():
    module = nn.Sequential(nn.Conv2d(2, 3, 3), batchnorm(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    found = kfra(module, images()).groups["kfra"]
    assert set(found.missing) == {"1.weight", "1.bias"}
    with pytest.raises(engine.EngineError, match=r"strict: 1.weight has no Kronecker factors"):
        kfra(module, images(), requests=[{"name": "kfra", "options": {"strict": True}}])


def test_the_chain_may_begin_at_an_embedding():
    module = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(15, 2))
    found = kfra(module, tokens()).groups["kfra"]
    assert set(found.by_parameter) == {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert found.missing["0.weight"] == "no Kronecker form for embedding"


def test_a_normed_weight_is_left_out_and_its_bias_is_not():
    module = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3))
    found = kfra(module, vectors(), way="traced").groups["kfra"]
    assert set(found.by_parameter) == {"0.bias", "2.weight", "2.bias"}


def test_a_layer_that_reaches_no_output_is_left_out():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    found = kfra(Idle(), vectors(), way="traced").groups["kfra"]
    assert set(found.by_parameter) == {"used.weight", "used.bias"}
    assert found.missing["idle.weight"] == "does not reach the outputs"


def test_matrices_beyond_the_budget_are_refused_before_they_are_made():
    module = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2))
    with pytest.raises(engine.EngineError, match=r"288 and 2(88)? at aten::.*half the budget is 0.0954 MiB") as caught:
        kfra(module, images(), budget_bytes=200_000)
    assert caught.value.code == "unsupported_model"
    alone = kfra(module, images(), budget_bytes=200_000, parameters="3.*")
    assert set(alone["kfra"]) == {"3.weight", "3.bias"}
