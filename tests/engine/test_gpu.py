"""The same numbers on a CUDA device as on the CPU, in float64."""

import warnings

import pytest
import torch
from tests.engine.losses import LOSS_CASES
from tests.engine.models import CASES, build, targets_for, torchscript
from tests.engine.test_host_reads import NAMES, three_convolutions
from tests.engine.test_kfra import CASES as CHAINS
from tests.engine.test_table import PER_PARAMETER, REQUESTS, TOLERANCE, error
from torch import nn

import curvature_engine as engine
from curvature_engine import replays
from curvature_engine.kernels import choice

AMPERE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MOVABLE = [case for case in CASES if case.name != "hand_written_rnn"]
"""That one makes its first state on the CPU, as it names no device: it cannot run elsewhere, in plain torch either."""
MONTE_CARLO = [{"name": "diag_ggn_mc", "options": {"mc_samples": 3}}, {"name": "kfac", "options": {"mc_samples": 2}}]


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("case", MOVABLE, ids=lambda case: case.name)
def test_a_gpu_computes_what_the_cpu_does(case, loss):
    module, inputs = build(case)
    targets = targets_for(module(*inputs), loss)
    script = torchscript(module, inputs, case.ways[0])
    requests = [*REQUESTS, *MONTE_CARLO]
    there = engine.analyze(script, inputs, targets, requests, loss=loss, device="cuda")
    here = engine.analyze(script, inputs, targets, requests, loss=loss)
    assert error(there.loss.cpu(), here.loss) <= TOLERANCE
    for extension in [*PER_PARAMETER, "diag_ggn_mc"]:
        for parameter, value in here[extension].items():
            assert there[extension][parameter].device.type == "cuda"
            assert error(there[extension][parameter].cpu(), value) <= TOLERANCE, (extension, parameter)
    for parameter, pair in here["kfac"].items():
        assert error(there["kfac"][parameter].B.cpu(), pair.B) <= TOLERANCE, parameter


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.name)
def test_a_gpu_averages_as_the_cpu_does(case):
    module, inputs = build(case)
    targets = targets_for(module(*inputs), "mse")
    script = torch.jit.script(module)
    here, there = (
        engine.analyze(script, inputs, targets, ["kfra"], loss="mse", device=device)["kfra"]
        for device in ("cpu", "cuda")
    )
    for parameter, pair in here.items():
        assert error(there[parameter].B.cpu(), pair.B) <= TOLERANCE, parameter


@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.id)
def test_a_gpu_computes_the_losses_that_the_cpu_does(case):
    module, inputs, targets = case.build()
    requests = ["batch_grad", *["diag_ggn_exact", MONTE_CARLO[0]] * case.second_order]
    here, there = (
        engine.analyze(torch.jit.script(module), inputs, targets, requests, loss=case.request, device=device)
        for device in ("cpu", "cuda")
    )
    assert error(there.loss.cpu(), here.loss) <= TOLERANCE
    for extension, group in here.groups.items():
        for parameter, value in group.by_parameter.items():
            assert error(there[extension][parameter].cpu(), value) <= TOLERANCE, (extension, parameter)


@pytest.fixture
def image_batch():
    torch.manual_seed(0)
    return torch.randn(64, 3, 32, 32, device="cuda"), torch.randint(0, 10, (64,), device="cuda")


@pytest.mark.parametrize("name", NAMES)
def test_a_warm_analysis_waits_for_the_device_where_it_must(name, image_batch, monkeypatch):
    monkeypatch.setenv("CURVATURE_GRAPHS", "off")
    program = engine.load(torch.jit.script(three_convolutions()), device="cuda")
    engine.analyze(program, *image_batch, [name])
    found = waits(lambda: engine.analyze(program, *image_batch, [name]))
    # The targets; whether loss and outputs are finite; for Hessians, where they bend.
    most = 3 + (name in ("diag_hessian", "batch_diag_hessian"))
    assert len(found) <= most, found


@pytest.mark.parametrize("name", NAMES)
def test_a_replayed_analysis_waits_once(name, image_batch):
    program = engine.load(torch.jit.script(three_convolutions()), device="cuda")
    for _ in range(replays.RUNS["cuda"]):
        engine.analyze(program, *image_batch, [name])
    (kind,) = replays.replays_of(program)._kinds.values()
    assert kind.captured is not None
    assert len(waits(lambda: engine.analyze(program, *image_batch, [name]))) <= 1


def waits(run):
    """Where the host waits for the device, as torch sees it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    # Not torch's notice that it does not see all of them.
    return [(w.filename, w.lineno) for w in seen if "called a synchronizing CUDA operation" in str(w.message)]


def test_products_are_float32s_by_default_whatever_torch_was_set_to(image_batch):
    x, y = image_batch
    exact, single = three_convolutions().double(), three_convolutions()
    single.load_state_dict(exact.state_dict())
    expected = engine.analyze(torch.jit.script(exact), x.double(), y, ["grad"], device="cuda")["grad"]
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # as it is by default
    found = engine.analyze(torch.jit.script(single), x, y, ["grad"], device="cuda")["grad"]
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"
    for name, value in expected.items():
        assert relative(found[name], value) < 1e-5, name


@pytest.mark.skipif(not AMPERE, reason="needs a GPU with tensor cores for float32 (Ampere and later)")
@pytest.mark.parametrize("options", [{"precision": "tf32"}, {"precision": "bf16"}, {"channels_last": True}], ids=str)
def test_another_precision_or_layout_says_what_it_changed(options, image_batch):
    program = engine.load(torch.jit.script(three_convolutions()), device="cuda")
    requests = ["grad", "variance", "diag_ggn_mc", "kfac"]
    exact = engine.analyze(program, *image_batch, requests)
    found = engine.analyze(program, *image_batch, requests, **options, verify=True)
    for name, value in exact["grad"].items():
        assert found.precision_error.parameters[name] == pytest.approx(
            relative(found["grad"][name], value), rel=0.1, abs=1e-6
        )
    largest = 1e-5 if "channels_last" in options else 0.1
    assert found.precision_error.gradient < largest
    for name, value in exact["variance"].items():
        assert relative(found["variance"][name], value) < 3 * largest, name


@pytest.mark.parametrize("N", [2, 3, 64])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_how_cudnn_convolves_is_nothing_to_the_probe(kernel, N):
    """Of some shapes it mixes samples' roundings, or loses digits: neither is the model's."""
    torch.manual_seed(0)
    convolutions = (
        (nn.Conv2d(before, after, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2))
        for before, after in ((3, 32), (32, 64), (64, 64))
    )
    model = nn.Sequential(*(m for each in convolutions for m in each), nn.Flatten(), nn.Linear(64 * 4 * 4, 10)).eval()
    batch = torch.randn(N, 3, 32, 32, device="cuda"), torch.randint(0, 10, (N,), device="cuda")
    found = engine.analyze(torch.jit.script(model), *batch, ["batch_grad"], device="cuda", verify=True)
    provenance = found.groups["batch_grad"].provenance
    assert {entry["method"] for entry in provenance.values()} == {"closed form"}
    assert {entry["verification"] for entry in provenance.values()} == {"this job, every column"}


@pytest.mark.parametrize("layout", [False, True], ids=["usual layout", "channels last"])
def test_the_kernels_and_the_plain_forms_agree(layout, monkeypatch):
    """The second convolution is large enough for one by the predicate itself; `test_kernels` has the shapes."""
    torch.manual_seed(0)
    layers = nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()
    model = torch.jit.script(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)).eval())
    program = engine.load(model, device="cuda")
    batch = torch.randn(256, 16, 32, 32, device="cuda"), torch.randint(0, 10, (256,), device="cuda")
    requests = ["sum_grad_squared", "diag_ggn_mc", "kfac"]
    ran = []
    monkeypatch.setattr(choice, "guarded", lambda kernel: ran.append(kernel.func.__name__) or kernel())
    found = engine.analyze(program, *batch, requests, channels_last=layout)
    assert ran.count("_sum_of_squares") >= 6  # three pieces each of the gradients and of one column
    monkeypatch.setattr(choice, "is_for_kernels", lambda x: False)
    plain = engine.analyze(program, *batch, requests, channels_last=layout)
    for label in requests:
        for name, value in plain[label].items():
            pairs = [(found[label][name], value)] if label != "kfac" else [*zip(found[label][name], value, strict=True)]
            for left, right in pairs:
                assert left is right is None or relative(left, right) < 1e-5, (label, name)


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("case", MOVABLE, ids=lambda case: case.name)
def test_a_replayed_analysis_is_an_ordinary_one(case, monkeypatch):
    """On other batches than it was captured on, with other seeds."""
    module, inputs = build(case)
    targets = targets_for(module(*inputs), "mse")
    program = engine.load(torchscript(module, inputs, case.ways[0]), device="cuda")
    requests = ["grad", "batch_l2", "variance", *MONTE_CARLO]
    for seed in range(5):
        given = [x.roll(seed, 0) for x in inputs], targets.roll(seed, 0)
        found = engine.analyze(program, tuple(given[0]), given[1], requests, loss="mse", seed=seed)
        with monkeypatch.context() as patch:
            patch.setenv("CURVATURE_GRAPHS", "off")
            expected = engine.analyze(program, tuple(given[0]), given[1], requests, loss="mse", seed=seed)
        for one, other in zip(replays._tensors_of(found), replays._tensors_of(expected), strict=True):
            assert error(one, other) <= TOLERANCE
