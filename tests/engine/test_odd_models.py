"""Models that treat their parameters, inputs and buffers in unusual ways: exactly right, or refused with the reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine

EXTENSIONS = ["grad", "batch_grad", "batch_l2", "sum_grad_squared", "variance", "diag_ggn_exact"]


class Odd(nn.Module):
    """Five features in, some parameters of every shape, a linear head [5 → 3]."""

    def __init__(self):
        super().__init__()
        self.l, self.head = nn.Linear(5, 5), nn.Linear(5, 3)
        self.W, self.p, self.q = (nn.Parameter(torch.randn(s)) for s in ((5, 5), (5,), (1, 5)))
        self.register_buffer("buffer", torch.ones(5))


class ScaledInPlace(Odd):
    def forward(self, x):
        h = torch.tanh(self.l(x))
        h = h.clone()
        h.mul_(self.p)
        return self.head(h)


class AddedToASlice(Odd):
    def forward(self, x):
        h = self.l(x)
        part = h[:, :5]
        part.add_(self.p)
        h *= 2.0
        return self.head(torch.tanh(h)) + part.sum(1, keepdim=True)


class GatherEdited(Odd):
    def forward(self, x):
        w = self.W.clone()
        w[0] = 0.0
        v = self.p.clone()
        v.mul_(2.0)
        return self.head(torch.tanh(F.linear(x, w) + v))


class WrittenIntoZeros(Odd):
    def forward(self, x):
        y = torch.zeros_like(x)
        y[:] = self.p
        y[0] = self.q[0] * 2.0
        return self.head(x * y)


class Rearranged(Odd):
    def forward(self, x):
        h = x @ self.W.T.contiguous() + self.q.expand(x.size(0), 5) + self.p.repeat(x.size(0), 1)
        return self.head(torch.tanh(h @ self.W.clone()))


class EveryWay(Odd):
    def forward(self, x):
        h = F.linear(torch.tanh(F.linear(x, self.W, self.W[0]) + self.W[1]), self.W.t(), self.W[:, 2])
        return self.head(h * self.W[3] + self.W.diagonal()) * self.W.sum()


class ParameterFirst(Odd):
    def forward(self, x):
        return self.head((self.W @ x.t()).t() * self.p - torch.add(self.p, x, alpha=2) + torch.sub(x, self.q, alpha=3))


class AsTensor(Odd):
    def forward(self, x):
        return self.head(torch.as_tensor(torch.tanh(self.l(x))) @ torch.as_tensor(self.W))


class CutOff(Odd):
    def forward(self, x):
        with torch.no_grad():
            w = self.W.t()
            mask = self.l(x)
        return self.head(torch.tanh(self.l(x)) * mask + (x @ w).detach() + F.linear(x, self.W))


class InputEdited(Odd):
    def forward(self, x):
        x.add_(1.0)
        return self.head(self.l(x))


class BufferEdited(Odd):
    def forward(self, x):
        self.buffer.mul_(2.0)
        h = self.l(x) * self.buffer
        self.buffer = self.buffer + 1.0
        return self.head(h + self.buffer)


class Remembering(Odd):
    seen: list[torch.Tensor]

    def __init__(self):
        super().__init__()
        self.seen = [torch.ones(5, dtype=torch.float64)]
        self.loose = torch.ones(5, dtype=torch.float64)

    def forward(self, x):
        self.seen.append(self.l(x))
        self.loose.add_(1.0)
        return self.head(self.seen[1] * self.loose * float(len(self.seen)))


class ViewsInPlace(Odd):
    """A linear layer on sequences returns a view; an in-place operator takes its node out of the graph."""

    def forward(self, x):
        h = self.l(x.unsqueeze(1).expand(-1, 2, -1))
        twice = h * 2.0
        h.relu_()
        h = self.l(torch.tanh(h) + twice)
        return self.head(torch.relu_(h).sum(1))


class ComplexInside(Odd):
    def forward(self, x):
        return self.head(torch.abs(torch.tanh(self.l(x)) * (self.p * (1 + 2j))))


class Samplewise(Odd):
    """N = C: a parameter that could be one of the samples'."""

    def forward(self, x):
        return self.head(x * self.W + self.W[:, :1] * self.q)


MODELS = {
    model.__name__: model
    for model in (
        ScaledInPlace,
        AddedToASlice,
        GatherEdited,
        WrittenIntoZeros,
        Rearranged,
        EveryWay,
        ParameterFirst,
        AsTensor,
        CutOff,
        InputEdited,
        BufferEdited,
        Remembering,
        ViewsInPlace,
        ComplexInside,
        Samplewise,
    )
}
# A trace records neither no_grad nor attributes that are no buffers.
SCRIPTED_ONLY = {"CutOff", "Remembering", "BufferEdited"}
CLOSED_FORMS = {
    "Rearranged": {"l.weight", "l.bias", "W", "head.weight", "head.bias"},
    "ViewsInPlace": {"l.weight", "l.bias", "head.weight", "head.bias"},
    "ParameterFirst": {"W", "p", "q", "head.weight", "head.bias"},
}


def setting(name, samples=5):
    torch.manual_seed(0)
    module = MODELS[name]().double().eval()
    return module, torch.randn(samples, 5, dtype=torch.float64), torch.randn(samples, 3, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "way"),
    [(n, w) for n in MODELS for w in ("scripted", "traced") if w == "scripted" or n not in SCRIPTED_ONLY],
)
def test_equals_brute_force(name, way):
    module, x, y = setting(name)
    reference = Reference(copy.deepcopy(module), (x.clone(),), y, "mse", "mean")
    script = torch.jit.script(module) if way == "scripted" else torch.jit.trace(module, x.clone(), check_trace=False)
    program = engine.load(script)
    given = x.clone()
    for _ in range(2):  # whatever the model edits, the next job finds it as it was
        result = engine.analyze(program, given, y, ["outputs", *EXTENSIONS], loss="mse")
        assert torch.equal(given, x)
        torch.testing.assert_close(result["outputs"], reference.outputs.detach(), rtol=1e-13, atol=1e-13)
        for extension in EXTENSIONS:
            for parameter, expected in reference.expected(extension).items():
                torch.testing.assert_close(result[extension][parameter], expected, rtol=1e-10, atol=1e-12)
    methods = {p: entry["method"] for p, entry in result.groups["variance"].provenance.items()}
    for parameter in CLOSED_FORMS.get(name, ()):
        assert methods[parameter] == "closed form", parameter


class EditsParameter(Odd):
    def forward(self, x):
        with torch.no_grad():
            self.W[0].mul_(0.5)
        return self.head(F.linear(x, self.W))


def test_editing_a_parameter_is_refused_and_leaves_it_as_it_was():
    module = EditsParameter().double()
    program = engine.load(torch.jit.script(module))
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    with pytest.raises(engine.EngineError, match="edits its own parameters") as caught:
        engine.analyze(program, x, y, ["variance"], loss="mse")
    assert caught.value.code == "unsupported_model"
    assert torch.equal(program.parameters["W"].tensor, module.W)


class SpoilsItsOwnBackward(Odd):
    def forward(self, x):
        h = torch.exp(self.l(x))
        y = torch.sin(h)
        h.add_(1.0)
        return self.head(y + h)


def test_a_model_that_autograd_refuses_is_refused_by_name():
    x, y = torch.randn(4, 5), torch.randn(4, 3)
    for extensions in (["grad"], ["batch_grad"], ["kflr"]):
        with pytest.raises(engine.EngineError, match="cannot be differentiated") as caught:
            engine.analyze(torch.jit.script(SpoilsItsOwnBackward()), x, y, extensions, loss="mse")
        assert caught.value.code == "unsupported_model"


class ComplexParameter(Odd):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.randn(5, dtype=torch.complex64))

    def forward(self, x):
        return self.head(torch.abs(x * self.c))


def test_a_complex_parameter_is_refused_not_left_out():
    with pytest.raises(engine.EngineError, match="parameter c is complex"):
        engine.analyze(torch.jit.script(ComplexParameter()), torch.randn(4, 5), torch.randn(4, 3), ["grad"], loss="mse")


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_embedding_bags_scaled_by_frequency_are_refused(mode):
    bag = nn.Sequential(nn.EmbeddingBag(6, 4, mode=mode, scale_grad_by_freq=True), nn.Linear(4, 3))
    with pytest.raises(engine.EngineError, match="scale_grad_by_freq"):
        engine.analyze(torch.jit.script(bag), torch.randint(0, 6, (4, 3)), torch.randn(4, 3), ["grad"], loss="mse")


class Autocast(Odd):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = F.linear(x, self.W) + self.p
        return self.head(torch.tanh(h.to(x.dtype)))


def test_under_autocast_gradients_are_autograds_own():
    torch.manual_seed(0)
    module, x, y = Autocast(), torch.randn(4, 5), torch.randn(4, 3)
    expected = Reference(module, (x,), y, "mse", "mean").batch_grad()
    result = engine.analyze(torch.jit.script(module), x, y, ["batch_grad"], loss="mse")
    for parameter, value in expected.items():
        torch.testing.assert_close(result["batch_grad"][parameter], value, rtol=1e-2, atol=1e-4)
    assert result.groups["batch_grad"].provenance["W"]["method"] == "fallback"


class KeyBias(nn.Module):
    """Softmax takes no notice of the keys' bias: its gradient is zero but for rounding."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).transpose(1, 2)).softmax(-1)
        return (weights @ self.value(x)).sum(1)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_a_gradient_that_cancels_to_rounding_is_no_mismatch(dtype, tolerance):
    torch.manual_seed(0)
    module, x, y = KeyBias().to(dtype), torch.randn(5, 30, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    expected = Reference(module, (x,), y, "mse", "mean").batch_grad()
    result = engine.analyze(torch.jit.script(module), x, y, ["batch_grad", "kflr"], loss="mse")
    for parameter, value in expected.items():
        torch.testing.assert_close(result["batch_grad"][parameter], value, rtol=1e-4, atol=tolerance)
    assert result.groups["batch_grad"].provenance["key.bias"]["method"] == "closed form"


class MaskedShift(Odd):
    """Softmax takes no notice of a shift, here by a parameter times a boolean mask."""

    def forward(self, x):
        return self.head((self.l(x) + self.q[:, :1] * (x < 100)).softmax(1))


def test_a_cancelling_product_with_a_mask():
    torch.manual_seed(0)
    module, x = MaskedShift().double(), torch.randn(6, 5, dtype=torch.float64)
    y = torch.randn(6, 3, dtype=torch.float64)
    expected = Reference(module, (x,), y, "mse", "mean").batch_grad()
    result = engine.analyze(torch.jit.script(module), x, y, ["batch_grad"], loss="mse")
    for parameter, value in expected.items():
        torch.testing.assert_close(result["batch_grad"][parameter], value, rtol=1e-10, atol=1e-14)


class KeepsSomeRows(Odd):
    def forward(self, x):
        keep = x[:, 0] > 0
        h = torch.zeros_like(x)
        h[keep] = torch.tanh(self.l(x[keep]))
        return self.head(h)


@pytest.mark.parametrize("first", [1.0, -1.0])
def test_a_layer_that_sees_no_row_at_all(first):
    torch.manual_seed(0)
    module, y = KeepsSomeRows().double(), torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(4, 5, dtype=torch.float64)
    x[:, 0] = torch.tensor([first, -1.0, -1.0, -1.0])
    expected = Reference(module, (x,), y, "mse", "mean").batch_grad()
    result = engine.analyze(torch.jit.script(module), x, y, ["batch_grad"], loss="mse")
    for parameter, value in expected.items():
        torch.testing.assert_close(result["batch_grad"][parameter], value, rtol=1e-10, atol=1e-14)


class AsksForIdentity(Odd):
    def forward(self, x):
        h = self.l(x)
        same = h
        return self.head(h * 2.0 if h is x else (h * 3.0 if h is same else h))


@pytest.mark.parametrize("samples", [1, 4])
def test_is_on_tensors_asks_for_identity(samples):
    module, x = AsksForIdentity().double(), torch.zeros(samples, 5, dtype=torch.float64)
    result = engine.analyze(torch.jit.script(module), x, x[:, :3], ["outputs"], loss="mse")
    assert torch.equal(result["outputs"], torch.jit.script(module)(x))


def test_a_norm_of_single_elements_leaves_only_rounding_to_verify():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv1d(2, 2, 1), nn.GroupNorm(2, 2, eps=0.01), nn.Flatten(), nn.Linear(2, 3)).double()
    x, y = torch.randn(3, 2, 1, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    expected = Reference(module, (x,), y, "mse", "mean").batch_grad()
    result = engine.analyze(torch.jit.script(module), x, y, ["batch_grad"], loss="mse")
    for parameter, value in expected.items():
        torch.testing.assert_close(result["batch_grad"][parameter], value, rtol=1e-10, atol=1e-14)


class OfEverySample(nn.Module):
    """A parameter with a row for each sample, added to the outputs: its gradient is the cotangent itself."""

    def __init__(self):
        super().__init__()
        self.l, self.q = nn.Linear(5, 3), nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return self.l(x) + self.q


@pytest.mark.parametrize("budget_bytes", [1, None])
def test_a_parameter_whose_gradient_is_the_cotangent(budget_bytes):
    torch.manual_seed(0)
    module, x = OfEverySample().double(), torch.randn(4, 5, dtype=torch.float64)
    y = torch.randn(4, 3, dtype=torch.float64)
    reference = Reference(module, (x,), y, "mse", "mean")
    requests = ["batch_grad", "diag_ggn_exact"]
    result = engine.analyze(torch.jit.script(module), x, y, requests, loss="mse", budget_bytes=budget_bytes)
    for request in requests:
        for parameter, value in reference.expected(request).items():
            torch.testing.assert_close(result[request][parameter], value, rtol=1e-10, atol=1e-14)


class EditedAndMixed(nn.Module):
    """Edits a tensor of its own, and mixes samples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.a(x)
        x.tanh_()
        return self.b(x + 0.1 * x.mean(0, keepdim=True))


def test_parameters_that_were_moved_are_still_parameters():
    torch.manual_seed(0)
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    program = engine.load(torch.jit.script(EditedAndMixed().double().eval()))
    for parameter in program.parameters.values():
        parameter.tensor.data = parameter.tensor.data.clone()
    with pytest.raises(engine.EngineError) as error:
        engine.analyze(program, x, y, ["batch_grad"])
    assert error.value.code == "coupled_samples"
