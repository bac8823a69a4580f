"""Precision of products and layout of images: what they change, that it is told, and that nothing stays changed."""

import threading

import pytest
import torch
from tests.engine import checking
from tests.engine.reference import Reference
from tests.engine.test_layouts import RESTS
from tests.engine.test_layouts import Net as Rest
from torch import nn

import curvature_engine as engine
from curvature_engine import precision as state
from curvature_engine import products
from curvature_engine.products import Multiplying, exactly
from curvature_engine.rounded_products import RoundedProducts

CPU = torch.device("cpu")
ROUNDS = products._cpu_rounds()
needs_bf16 = pytest.mark.skipif(not ROUNDS, reason="needs a CPU with bf16 products")
REQUESTS = ["grad", "batch_grad", "batch_l2", "variance", "diag_ggn_exact", "kflr", "diag_hessian", "batch_loss"]
SETTINGS = [
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
]


def settings():
    return [backend.fp32_precision for backend in SETTINGS]


@pytest.fixture(autouse=True)
def _nothing_stays_changed():
    before = settings()
    yield
    assert settings() == before
    assert state.current() == "float32"
    assert products._TURNS._holders == []


def batch(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(6, 3, 12, 12).to(dtype), torch.tensor([0, 3, 1, 2, 4, 1])


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.Sigmoid())
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(400, 5)).to(dtype)
    return module.eval()


def relative(found, expected):
    return float((found - expected).double().norm() / expected.double().norm())


def tensors(group):
    return {name: getattr(value, "B", value) for name, value in group.items()}


def compare(result, reference, tolerance):
    for label in REQUESTS[:-1]:
        for name, value in tensors(reference[label]).items():
            assert relative(tensors(result[label])[name], value) <= tolerance, (label, name)


@needs_bf16
def test_bf16_rounds_products_and_says_by_how_much():
    program, (x, y) = engine.load(torch.jit.script(net())), batch()
    exact = engine.analyze(program, x, y, REQUESTS)
    rounded = engine.analyze(program, x, y, REQUESTS, precision="bf16")
    error = rounded.precision_error
    assert error.samples == 6
    gradients = exact["grad"], rounded["grad"]
    for name in exact["grad"]:
        told = error.parameters[name]
        assert told == pytest.approx(relative(gradients[1][name], gradients[0][name]), rel=1e-3), name
        assert rounded.groups["grad"].provenance[name]["precision_error"] == told
        assert rounded.groups["variance"].provenance[name]["precision"] == "bf16"
    assert 1e-4 < error.gradient < 0.1
    assert rounded.groups["batch_loss"].provenance["batch_loss"]["precision_error"] == error.gradient
    assert (rounded.info["precision"], rounded.info["precision_error"]["gradient"]) == ("bf16", error.gradient)
    compare(rounded, exact, 0.2)
    assert relative(rounded["variance"]["3.weight"], exact["variance"]["3.weight"]) > 1e-5


def test_by_default_there_is_no_error_to_tell():
    result = engine.analyze(net(), *batch(), ["grad"])
    assert result.precision_error is None
    assert "precision_error" not in result.info
    assert result.groups["grad"].provenance["0.weight"]["precision"] == "float32"


@needs_bf16
def test_an_analysis_in_float32_is_so_whatever_the_process_was_set_to():
    program, (x, y) = engine.load(torch.jit.script(net())), batch()
    expected = engine.analyze(program, x, y, ["variance"])["variance"]
    before = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        found = engine.analyze(program, x, y, ["variance"])["variance"]
        assert torch.backends.mkldnn.conv.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision, torch.backends.mkldnn.conv.fp32_precision = before
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@needs_bf16
@pytest.mark.parametrize("options", [{"verify": True}, {"budget_bytes": 120_000}, {"part": engine.DataSetPart(0)}])
def test_run_time_checks_hold_in_bf16(options):
    x, y = batch()
    requests = ["variance", "diag_ggn_exact"]
    result = engine.analyze(torch.jit.script(net()), x, y, requests, precision="bf16", **options)
    assert all(entry["verified"] for entry in result.groups["variance"].provenance.values())
    if "budget_bytes" in options:
        assert result.plan.chunks > 1
        assert result.precision_error.samples == result.plan.samples_per_chunk < 6


@needs_bf16
@pytest.mark.parametrize("name", ["kfra", "kfac", "sqrt_ggn_exact", "saliency", "batch_diag_hessian", "batch_dot"])
def test_every_kind_of_extension_takes_bf16(name):
    torch.manual_seed(0)
    chain = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)).eval()
    inputs, y = torch.randn(6, 20), torch.tensor([0, 3, 1, 2, 4, 1])
    exact, rounded = (engine.analyze(chain, inputs, y, [name], precision=p)[name] for p in ("float32", "bf16"))
    if isinstance(exact, torch.Tensor):
        exact, rounded = {name: exact}, {name: rounded}
    for key, value in tensors(exact).items():
        assert relative(tensors(rounded)[key], value) < 0.1


def test_channels_last_gives_the_same_numbers():
    model, (x, y) = torch.jit.script(net(torch.float64)), batch(torch.float64)
    program = engine.load(model)
    usual = engine.analyze(program, x, y, REQUESTS)
    other = engine.analyze(program, x, y, REQUESTS, channels_last=True)
    compare(other, usual, 1e-12)
    reference = Reference(net(torch.float64), (x,), y, "cross_entropy", "mean")
    for name, value in reference.expected("diag_ggn_exact").items():
        assert relative(other["diag_ggn_exact"][name], value) <= 1e-12
    assert 0 <= other.precision_error.gradient < 1e-12
    assert other.info["channels_last"]
    again = engine.analyze(program, x, y, REQUESTS)
    for label in REQUESTS[:-1]:
        assert all(torch.equal(t, tensors(again[label])[n]) for n, t in tensors(usual[label]).items()), label


def test_channels_last_is_how_the_operators_find_their_tensors():
    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                seen.append([t.is_contiguous(memory_format=torch.channels_last) for t in args[:2]])
            return func(*args, **(kwargs or {}))

    seen = []
    # In float32, a CPU gets its images so without being asked.
    program, (x, y) = engine.load(torch.jit.script(net(torch.float64))), batch(torch.float64)
    engine.analyze(program, x, y, ["variance"])  # a first job takes its few first samples through by themselves
    with Spy():
        engine.analyze(program, x, y, ["variance"])
        usual, seen[:] = list(seen), []
        engine.analyze(program, x, y, ["variance"], channels_last=True)
    measured = 2 * len(usual)  # the error takes one pass in each layout
    assert usual == [[False, False]] * len(usual)
    assert seen == [[True, True]] * (measured) + [[False, False]] * len(usual)
    assert all(p.tensor.is_contiguous() for p in program.parameters.values())


@pytest.mark.parametrize("rest", RESTS)
def test_channels_last_gives_the_same_numbers_or_is_refused(rest):
    module, inputs = checking.build(lambda: Rest(RESTS[rest]), (5, 2, 8, 8))
    model = torch.jit.script(module) if rest == "strides" else checking.traced(module, inputs)
    y = torch.arange(5) % 3
    usual = engine.analyze(model, inputs, y, ["variance", "batch_grad"])
    if rest in ("strides", "edited-copy", "edited-image", "edited-contiguous"):
        with pytest.raises(engine.EngineError, match="might compute something else") as refused:
            engine.analyze(model, inputs, y, ["variance"], channels_last=True)
        assert refused.value.param == "channels_last"
        return
    found = engine.analyze(model, inputs, y, ["variance", "batch_grad"], channels_last=True)
    for label, group in usual.groups.items():
        for name, value in group.items():
            assert relative(found[label][name], value) <= 1e-12, (label, name)


def test_volumes_lie_channels_last_too():
    torch.manual_seed(0)
    layers = nn.Conv3d(2, 3, 2), nn.Tanh(), nn.MaxPool3d(2), nn.Flatten(), nn.Linear(24, 3)
    model = torch.jit.script(nn.Sequential(*layers).double().eval())
    batch = torch.randn(4, 2, 5, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 1])
    usual, found = (engine.analyze(model, *batch, ["variance"], channels_last=c)["variance"] for c in (False, True))
    for name, value in usual.items():
        assert relative(found[name], value) <= 1e-12, name


def test_a_model_that_edits_its_parameters_is_refused_in_every_layout():
    class Editor(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x):
            self.weight.detach().mul_(2.0)
            return torch.conv2d(x, self.weight).flatten(1)

    x, y = batch()
    for layout in (False, True):
        with pytest.raises(engine.EngineError) as refused:
            engine.analyze(torch.jit.script(Editor()), x, y, ["grad"], channels_last=layout)
        assert refused.value.code == "unsupported_model"


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"precision": "tf32"}, torch.float32, "do not exist on the device cpu"),
        ({"precision": "fp8"}, torch.float32, "float32, tf32, bf16"),
        ({"precision": None}, torch.float32, "float32, tf32, bf16"),
        ({"precision": "bf16"}, torch.float64, "parameters are float64"),
    ],
)
def test_a_precision_that_cannot_be_is_refused(options, dtype, message):
    for call in (engine.analyze, engine.plan):
        with pytest.raises(engine.EngineError, match=message) as refused:
            call(net(dtype), *batch(dtype), ["grad"], **options)
        assert (refused.value.code, refused.value.param) == ("invalid_option", "precision")


def test_a_cpu_without_such_products_refuses_them(monkeypatch):
    monkeypatch.setattr(products, "_cpu_rounds", lambda: False)
    with pytest.raises(engine.EngineError, match="this CPU has no bf16"):
        engine.analyze(net(), *batch(), ["grad"], precision="bf16")


def test_threads_lay_one_program_out_one_after_another():
    program, (x, y) = engine.load(torch.jit.script(net(torch.float64))), batch(torch.float64)
    expected, found = engine.analyze(program, x, y, ["variance"], channels_last=True)["variance"], []

    def analyze():
        found.extend(engine.analyze(program, x, y, ["variance"], channels_last=True)["variance"] for _ in range(3))

    threads = [threading.Thread(target=analyze) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 12
    assert all(torch.equal(each[name], expected[name]) for each in found for name in expected)
    assert all(p.tensor.is_contiguous() for p in program.parameters.values())


def test_channels_last_without_images_is_refused():
    with pytest.raises(engine.EngineError, match="there is none") as refused:
        engine.analyze(nn.Linear(3, 2), torch.ones(2, 3), torch.tensor([0, 1]), ["grad"], channels_last=True)
    assert refused.value.param == "channels_last"


def test_the_plan_says_what_was_asked_for():
    plan = engine.plan(net(), *batch(), ["grad"], channels_last=True)
    assert (plan.precision, plan.channels_last) == ("float32", True)
    assert plan.to_dict()["channels_last"]


@needs_bf16
def test_one_precision_at_a_time_in_a_process():
    order, begun, go_on = [], threading.Event(), threading.Event()

    def coarse():
        with Multiplying("bf16", CPU):
            begun.set()
            go_on.wait(30)
            order.append(("bf16", torch.backends.mkldnn.matmul.fp32_precision))

    def fine():
        with Multiplying("float32", CPU):
            order.append(("float32", torch.backends.mkldnn.matmul.fp32_precision))

    first = threading.Thread(target=coarse)
    first.start()
    begun.wait(30)
    second = threading.Thread(target=fine)
    second.start()
    go_on.set()
    first.join(30)
    second.join(30)
    assert order[0] == ("bf16", "bf16")
    assert order[1][1] in ("ieee", "none")


@needs_bf16
def test_within_an_analysis_none_in_another_precision_begins():
    def nested(done, total):
        engine.analyze(net(), *batch(), ["grad"])

    with pytest.raises(engine.EngineError, match="is in progress"):
        engine.analyze(net(), *batch(), ["variance"], precision="bf16", progress=nested)
    assert engine.analyze(net(), *batch(), ["variance"], progress=nested).loss > 0


class TestRoundedProducts:
    """What stands in for a setting on CUDA, on the CPU: factors are rounded, sums are not."""

    def rounded(self, t):
        return t.bfloat16().float()

    @pytest.fixture(autouse=True)
    def _in_bf16(self):
        state.begin("bf16")
        yield
        state.end()

    def test_products(self):
        a, b, c = torch.randn(5, 7), torch.randn(7, 6), torch.randn(5, 6)
        batches = torch.randn(3, 5, 7), torch.randn(3, 7, 6)
        product, batched = self.rounded(a) @ self.rounded(b), self.rounded(batches[0]) @ self.rounded(batches[1])
        with RoundedProducts():
            found = [
                (a @ b, product),
                (torch.bmm(*batches), batched),
                (a @ b[:, 0], product[:, 0]),
                (torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * c + 2 * product),
                (c.clone().addmm_(a, b, beta=2), 2 * c + product),
                (torch.full((5, 6), torch.nan).addmm_(a, b, beta=0), product),
                (torch.zeros(3, 5, 6).baddbmm_(*batches), batched),
                (torch.baddbmm(torch.ones(3, 5, 6), *batches), 1 + batched),
                (torch.zeros(5, 6).addbmm_(*batches), batched.sum(0)),
                (torch.bmm(*batches, out=torch.empty(3, 5, 6)), batched),
                (torch.mm(a, b, out=torch.empty(5, 6)), product),
                (torch.einsum("nij,njk->nik", *batches), batched),
            ]
        for result, expected in found:
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)

    def test_convolutions_and_their_gradients(self):
        x, w, b = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        exact = [self.rounded(t).requires_grad_() for t in (x, w)] + [b.clone().requires_grad_()]
        with RoundedProducts():
            y = torch.conv2d(*leaves)
            g = torch.randn_like(y)
            found = torch.autograd.grad(y, leaves, g)
        expected_y = torch.conv2d(*exact)
        torch.testing.assert_close(y, expected_y, rtol=1e-2, atol=1e-2)
        expected = torch.autograd.grad(expected_y, exact, self.rounded(g))
        for left, right in zip(found[:2], expected[:2], strict=True):
            torch.testing.assert_close(left, right, rtol=1e-2, atol=5e-2)
        torch.testing.assert_close(found[2], g.sum((0, 2, 3)))

    def test_other_formats_and_moments_in_float32_stay_as_they_are(self):
        a, b = torch.randn(5, 5), torch.randn(5, 5)
        with RoundedProducts():
            assert torch.equal(a.double() @ b.double(), torch.mm(a.double(), b.double()))
            with exactly(CPU):
                within = a @ b
        assert torch.equal(within, a @ b)

    def test_a_whole_analysis(self):
        program, (x, y) = engine.load(torch.jit.script(net())), batch()
        exact = engine.analyze(program, x, y, REQUESTS)
        state.begin("bf16")
        with RoundedProducts():
            rounded = engine.analyze(program, x, y, REQUESTS)
        state.end()
        compare(rounded, exact, 0.2)
        assert relative(rounded["variance"]["3.weight"], exact["variance"]["3.weight"]) > 1e-5
