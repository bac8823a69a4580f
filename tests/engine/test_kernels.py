"""The fused kernels beside the plain forms and brute force: on a GPU, or in Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton", reason="needs triton (Linux on x86-64)")

from tests.engine.reference import Reference  # noqa: E402
from tests.engine.test_patch_moments import GEOMETRIES, build, expected  # noqa: E402

import curvature_engine as engine  # noqa: E402
from curvature_engine.kernels import choice, patches, spread, squares  # noqa: E402
from curvature_engine.rules import patch_moments  # noqa: E402

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [torch.float64])]
"""The interpreter has no bfloat16, and the compiler's products no float64 that pays."""

# V, N, rows, a, b
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 3, 5, 7, 9),
    (2, 4, 40, 70, 65),
    (3, 17, 1, 20, 130),
    (1, 150, 3, 5, 4),
    (2, 5, 33, 64, 64),
]


def close(found, reference, dtype):
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert found.shape == reference.shape
    assert float((found.cpu() - reference).abs().max()) <= tolerance * float(reference.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_squares_are_those_of_the_products(shape, dtype):
    V, N, rows, a, b = shape
    left = torch.randn(V, N, rows, a, device=DEVICE).to(dtype)
    right = torch.randn(N, rows, b, device=DEVICE).to(dtype)
    reference = torch.einsum("vnra,nrb->vnab", left.cpu().double(), right.cpu().double()).square().sum((0, 1))
    close(squares.sum_of_squares(left, right), reference, dtype)
    close(squares.sum_of_squares(left[0], right), squares_of(left[0], right), dtype)


def squares_of(left, right):
    return torch.bmm(left.cpu().double().mT, right.cpu().double()).square().sum(0)


@pytest.mark.parametrize("step", [1, 2])
def test_squares_take_any_strides(step):
    left = torch.randn(6, 30, 2 * 11, device=DEVICE)[::2, :, ::step].mT.contiguous().mT
    whole = torch.randn(3, 30, 50, device=DEVICE)
    right = whole.as_strided((3, 30, 20), (1500, 50, 1), 7)  # overlapping windows are read as they lie
    close(squares.sum_of_squares(left, right), squares_of(left, right), torch.float32)
    expanded = right[:1].expand(3, 30, 20)
    close(squares.sum_of_squares(left, expanded), squares_of(left, expanded), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_patch_moments_are_those_of_the_patches(name, dtype):
    x, geometry, positions = build(name)
    x = x.to(dtype)
    reference = expected(x.double(), geometry, positions)
    close(patches.patch_moment(x.to(DEVICE), geometry, positions), reference, dtype)


def test_patch_moments_take_channels_last_and_many_tiles():
    from curvature_engine.rules.convolution import Geometry

    x = torch.randn(5, 32, 6, 7)
    geometry = Geometry((1, 1), (1, 1), (1, 1), (1, 1), 1, (3, 3))
    reference = expected(x.double(), geometry, (6, 7))
    for memory in (torch.contiguous_format, torch.channels_last):
        close(patches.patch_moment(x.to(DEVICE, memory_format=memory), geometry, (6, 7)), reference, torch.float32)
    found = patches.patch_moment(x.to(DEVICE), geometry, (6, 7))
    assert torch.equal(found, found.mT)  # also within the tiles on the diagonal


def test_what_is_not_finite_stays_in_its_place():
    left, right = torch.randn(3, 4, 5, device=DEVICE), torch.randn(3, 4, 6, device=DEVICE)
    left[1, 2, 3] = torch.nan
    found = squares.sum_of_squares(left, right)
    assert found[3].isnan().all()
    assert found[[0, 1, 2, 4]].isfinite().all()


class Net(torch.nn.Module):
    """Linear layers on rows, and convolutions whose windows slide or not."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Linear(5, 8)
        self.other = torch.nn.Parameter(torch.randn(8, 6) / 3)
        self.first = torch.nn.Conv1d(6, 5, 2)  # 2·6 < 16 numbers in a run: all windows are unfolded
        self.second = torch.nn.Conv1d(5, 20, 1)
        self.third = torch.nn.Conv1d(20, 4, 3, stride=2, padding=1)
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.rows(x)) @ self.other
        x = torch.tanh(self.second(torch.tanh(self.first(x.transpose(1, 2)))))
        return self.last(torch.tanh(self.third(x)).mean(2))


@pytest.fixture
def counted(monkeypatch):
    """Kernels for everything, however small; the names of those that ran."""
    ran = []

    def noting(module, name):
        kernel = getattr(module, name)

        def run(*arguments):
            ran.append(name)
            return kernel(*arguments)

        monkeypatch.setattr(module, name, run)

    noting(squares, "sum_of_squares")
    noting(patches, "patch_moment")
    monkeypatch.setattr(choice, "is_for_kernels", lambda x: True)
    monkeypatch.setattr(choice, "pays_for_squares", lambda *a: True)
    monkeypatch.setattr(choice, "pays_for_patches", lambda *a: True)
    monkeypatch.setattr(patch_moments, "_KERNEL_SLOWNESS", 0)
    return ran


def test_the_engine_takes_the_kernels_and_brute_force_agrees(counted):
    torch.manual_seed(0)
    dtype, tolerance = (torch.float32, 2e-5) if DEVICE == "cuda" else (torch.float64, 1e-11)
    module = Net().double()
    x, targets = torch.randn(4, 7, 5, dtype=torch.float64), torch.tensor([0, 2, 1, 1])
    reference = Reference(module, (x,), targets, "cross_entropy", "mean")
    model = torch.jit.trace(Net().to(dtype), (x.to(dtype),))
    model.load_state_dict(module.state_dict())
    kfac = {"name": "kflr", "options": {"approximation": "expand"}}
    requests = ["sum_grad_squared", "diag_ggn_exact", kfac]
    result = engine.analyze(model, x.to(dtype), targets, requests, device=DEVICE)
    for extension in ("sum_grad_squared", "diag_ggn_exact"):
        for parameter, value in reference.expected(extension).items():
            error = (result[extension][parameter].cpu() - value).abs().max() / value.abs().max()
            assert error <= tolerance, (extension, parameter)
    # `rows`, `other` and three convolutions, for the gradient and each of the columns; `third` slides: three pieces.
    assert counted.count("sum_of_squares") % 7 == 0
    assert counted.count("sum_of_squares") >= 14
    assert counted.count("patch_moment") == 3
    choice_of_none = plain(model, x.to(dtype), targets, kfac)
    for parameter, factors in choice_of_none.items():
        if factors.A is not None:
            error = (result["kflr"][parameter].A - factors.A).abs().max() / factors.A.abs().max()
            assert error <= tolerance, parameter


def plain(model, x, targets, request):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(choice, "pays_for_patches", lambda *a: False)
        return engine.analyze(model, x, targets, [request], device=DEVICE)["kflr"]


def test_the_predicate_is_asked_about_the_whole_parameter(counted, monkeypatch):
    """Of a convolution whose windows slide, a piece for each place in the kernel's first axis, too."""
    asked = []
    monkeypatch.setattr(choice, "pays_for_squares", lambda left, right, numbers: bool(asked.append(numbers)))
    model = torch.jit.trace(Net(), (torch.randn(4, 7, 5),))
    engine.analyze(model, torch.randn(4, 7, 5), torch.tensor([0, 2, 1, 1]), ["sum_grad_squared"], device=DEVICE)
    assert {240, 48, 60, 100} <= set(asked)  # `third` slides over 3 places; `other`, `first`, `second` have one piece
    assert counted == []


def test_beside_gradients_that_are_written_the_squares_are_taken_from_those(counted):
    model = torch.jit.trace(Net(), (torch.randn(4, 7, 5),))
    batch = torch.randn(4, 7, 5), torch.tensor([0, 2, 1, 1])
    together = engine.analyze(model, *batch, ["batch_grad", "sum_grad_squared"], device=DEVICE)
    assert counted == []
    alone = engine.analyze(model, *batch, ["sum_grad_squared"], device=DEVICE)
    assert counted
    for parameter, value in together["sum_grad_squared"].items():
        torch.testing.assert_close(alone["sum_grad_squared"][parameter], value, rtol=1e-4, atol=1e-7)


def test_a_kernel_that_fails_leaves_the_work_to_the_plain_form(counted, monkeypatch):
    model = torch.jit.trace(Net(), (torch.randn(4, 7, 5),))
    batch = torch.randn(4, 7, 5), torch.tensor([0, 2, 1, 1])
    expected = engine.analyze(model, *batch, ["sum_grad_squared", "kflr"], device=DEVICE)
    monkeypatch.setattr(choice, "_off", [])
    for module, name in ((squares, "sum_of_squares"), (patches, "patch_moment")):
        monkeypatch.setattr(module, name, lambda *a: (_ for _ in ()).throw(OSError("no compiler")))
    monkeypatch.setattr(choice, "pays_for_patches", lambda *a: choice.why_off() is None)
    found = engine.analyze(model, *batch, ["sum_grad_squared", "kflr"], device=DEVICE)
    assert choice.why_off() == "a kernel failed: OSError: no compiler"
    for parameter, value in expected["sum_grad_squared"].items():
        torch.testing.assert_close(found["sum_grad_squared"][parameter], value, rtol=1e-4, atol=1e-7)


def test_memory_that_ran_out_is_no_failure_of_the_kernel(monkeypatch):
    monkeypatch.setattr(choice, "_off", [])
    with pytest.raises(torch.OutOfMemoryError):
        choice.guarded(lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    assert choice._off == []


def test_kernels_are_launched_where_their_tensors_are(monkeypatch):
    """Triton goes by the current device, which need not be theirs."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", entered.append)
    choice.on_device_of(OnCuda(1))
    choice.on_device_of(torch.zeros(1))
    assert entered == [torch.device("cuda")]


def test_small_work_and_other_devices_and_formats_get_no_kernel():
    meta = torch.empty(1024, 64, 256, device="meta")
    assert not choice.pays_for_squares(meta, meta)  # no CUDA device
    script = "import sys, curvature_engine as e, torch; e.analyze(torch.nn.Linear(3, 2), torch.ones(2, 3), \
torch.tensor([0, 1]), ['kfac', 'sum_grad_squared']); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=False).returncode == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 3), (2, 1), (5, 1024), (37, 33, 70), (128, 2, 3, 5)], ids=str)
def test_mean_and_spread_are_those_of_the_samples(shape, dtype):
    x = (torch.randn(shape, device=DEVICE) + torch.linspace(-20, 20, shape[-1], device=DEVICE)).to(dtype)
    exact = x.cpu().double()
    mean, found = spread.mean_and_spread(x)
    close(mean, exact.mean(0), dtype)
    reference = (exact - exact.mean(0)).square().sum(0)
    # Of a mean so far from zero, float32 keeps what rounding leaves of a sample.
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    assert float((found.cpu() - reference).abs().max()) <= tolerance * max(1.0, float(reference.max()))


def test_mean_and_spread_of_samples_apart_in_memory():
    x = torch.randn(6, 2, 3, 700, device=DEVICE)[:, 1]
    mean, found = spread.mean_and_spread(x)
    close(mean, x.cpu().double().mean(0), torch.float32)
    close(found, x.cpu().double().var(0, correction=0) * 6, torch.float32)


class OnCuda:
    """A tensor's looks: what `choice` reads of one."""

    def __init__(self, *shape, dtype=torch.float32):
        self._like = torch.empty(shape, dtype=dtype, device="meta")
        self.device = torch.device("cuda")

    def __getattr__(self, name):
        return getattr(self._like, name)

    def __getitem__(self, index):
        return self._like[index]


def test_the_predicate_weighs_what_is_not_written():
    assert choice.pays_for_squares(OnCuda(128, 64, 256), OnCuda(128, 64, 1024))
    assert not choice.pays_for_squares(OnCuda(2, 64, 256), OnCuda(2, 64, 1024))  # small
    assert choice.pays_for_squares(OnCuda(2, 64, 256), OnCuda(2, 64, 1024), 33 * 256 * 1024)  # one of many pieces
    assert not choice.pays_for_squares(OnCuda(128, 4096, 256), OnCuda(128, 4096, 1024))  # bound by multiplying
    assert not choice.pays_for_squares(*[OnCuda(128, 64, 1024, dtype=torch.float64)] * 2)
    assert choice.pays_for_spread(OnCuda(28, 512, 4608))
    assert not choice.pays_for_spread(OnCuda(128, 64, 576))  # too few to go round
    assert not choice.pays_for_spread(OnCuda(28, 512, 4608, dtype=torch.float64))
    assert choice.pays_for_patches(OnCuda(128, 64, 32, 32), 128 * 1024, 576, 1)
    assert not choice.pays_for_patches(OnCuda(1, 8, 32, 32), 1024, 72, 1)
    assert not choice.pays_for_patches(OnCuda(128, 64, 32, 32, dtype=torch.float64), 128 * 1024, 576, 1)


ONES = {
    "of any size": "",
    "one column, contiguous": "columns left_a right_b x_2",
    "one share": "share shares channels samples K0 P0 S0 step0 step1 step2 wide0 wide1 wide2 x_c A B",
}
"""The compiler takes arguments that are 1 as constants."""
COMPILED = """
import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from curvature_engine.kernels import patches, spread, squares


def compile(kernel, size, ones):
    names = kernel.arg_names
    fixed = dict(TILE=size, DEPTH=32, TOTAL=tl.float32, PRECISION="tf32" if precision == "tf32" else "ieee")
    fixed |= {"NARROWED": precision == "bf16", **{name: 1 for name in names if name in ones}}

    def kind(name):
        if name in fixed:
            return "constexpr"
        return "*fp32" if name in ("x", "left", "right", "partial") else "i64" if name in ("left_v", "x_u") else "i32"

    places = {(names.index(name),): value for name, value in fixed.items()}
    source = triton.compiler.ASTSource(kernel, {name: kind(name) for name in names}, places)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]


precision, architecture = sys.argv[1], int(sys.argv[2])
for ones in json.loads(sys.argv[3]):
    for kernel, size in ((squares._squares, squares._TILE), (patches._moments, patches._TILE)):
        tensor_cores = "mma" in compile(kernel, size, set(ones.split()))
        assert tensor_cores == (precision != "float32"), (kernel, ones)
    kernel = spread._spread
    kinds = {name: "i32" for name in kernel.arg_names} | {name: "*fp32" for name in ("x", "means", "spreads")}
    kinds |= {"step": "i64", "BLOCK": "constexpr", "TOTAL": "constexpr"}
    fixed = {(kernel.arg_names.index("BLOCK"),): spread._BLOCK, (kernel.arg_names.index("TOTAL"),): tl.float32}
    source = triton.compiler.ASTSource(kernel, kinds, fixed)
    assert "ld.global" in triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
"""


@pytest.mark.parametrize(("precision", "architecture"), [("float32", 75), ("tf32", 80), ("bf16", 90)])
def test_the_kernels_compile_for_gpus_that_are_not_here(precision, architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [COMPILED, precision, str(architecture), json.dumps([*ONES.values()])]
    command = [sys.executable, "-W", "ignore", "-c", *script]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
