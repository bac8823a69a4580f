"""Every loss × options × shape × reduction against brute force with torch's own losses."""

import pytest
import torch
import torch.nn.functional as F
from tests.engine.losses import LOSS_CASES
from tests.engine.models import CASES, build
from tests.engine.reference import Reference
from tests.engine.test_monte_carlo import BATCHES, DRAWS, check_mean, mc
from tests.engine.test_table import TOLERANCE, error
from torch import nn

import curvature_engine as engine
from curvature_engine import draws
from curvature_engine.losses import LOSSES, LossSpec, cross_entropy

FIRST_ORDER = ["grad", "batch_grad", "variance"]
CASE = pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.id)


def check(result, reference, second_order=True):
    torch.testing.assert_close(result.loss, reference.loss_value().detach(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result["batch_loss"], reference.contributions().detach(), rtol=1e-11, atol=1e-14)
    for extension in [*FIRST_ORDER, *["diag_ggn_exact"] * second_order]:
        for parameter, expected in reference.expected(extension).items():
            assert error(result[extension][parameter], expected) <= TOLERANCE, (extension, parameter)
    if not second_order:
        return
    for parameter, (B, _) in reference.kflr("expand").items():
        assert error(result["kflr"][parameter].B, B) <= TOLERANCE, parameter


def test_the_table_holds_every_loss():
    assert {case.name for case in LOSS_CASES} == set(LOSSES)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@CASE
def test_equals_brute_force(case, reduction):
    module, inputs, targets = case.build()
    asked = ["batch_loss", *FIRST_ORDER, *["diag_ggn_exact", "kflr"] * case.second_order]
    result = engine.analyze(torch.jit.script(module), inputs, targets, asked, loss=case.request, reduction=reduction)
    check(result, Reference(module, inputs, targets, case.peer, reduction), case.second_order)


SAMPLED = {case.id: case for case in LOSS_CASES if case.second_order and case.shape in ("[N,C]", "positive [N,C]")}


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_columns_are_unbiased_within_four_standard_errors(name):
    module, inputs, targets = SAMPLED[name].build()
    program = engine.load(torch.jit.script(module))
    loss, M = SAMPLED[name].request, DRAWS // BATCHES
    exact = engine.analyze(program, inputs, targets, ["diag_ggn_exact"], loss=loss)["diag_ggn_exact"]
    runs = [
        engine.analyze(program, inputs, targets, [mc("diag_ggn_mc", M)], loss=loss, seed=seed)["diag_ggn_mc"]
        for seed in range(BATCHES)
    ]
    for parameter, expected in exact.items():
        check_mean(torch.stack([run[parameter] for run in runs]), expected)


@pytest.mark.parametrize("case", [c for c in LOSS_CASES if c.second_order], ids=lambda case: case.id)
def test_draws_are_a_function_of_the_seed(case):
    module, inputs, targets = case.build()
    program = engine.load(torch.jit.script(module))
    alone, beside, other = (
        engine.analyze(program, inputs, targets, asked, loss=case.request, seed=seed)["diag_ggn_mc"]
        for asked, seed in (
            ([mc("diag_ggn_mc", 2)], 3),
            ([mc("diag_ggn_mc", 2), "kflr"], 3),
            ([mc("diag_ggn_mc", 2)], 4),
        )
    )
    assert all(torch.equal(alone[p], beside[p]) for p in alone)
    assert not all(torch.equal(alone[p], other[p]) for p in alone)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.CrossEntropyLoss(weight=torch.tensor([0.1, 2.0, 0.5]), label_smoothing=0.1, reduction="sum"), "indices"),
        (nn.NLLLoss(weight=torch.tensor([0.1, 2.0, 0.5])), "indices"),
        (nn.BCEWithLogitsLoss(weight=torch.rand(3), pos_weight=torch.rand(3)), "unit"),
        (nn.PoissonNLLLoss(full=True, reduction="sum"), "unit"),
        (nn.HuberLoss(delta=0.3), "unit"),
        (nn.SmoothL1Loss(beta=0.3), "unit"),
        (nn.L1Loss(), "unit"),
        (nn.MSELoss(), "unit"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_torchs_loss_modules_are_read_with_their_options(module, name):
    torch.manual_seed(0)
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    targets = torch.rand(5, 3) if name == "unit" else torch.randint(0, 3, (5,))
    value = module(net(x), targets)
    result = engine.analyze(net, x, targets, ["grad"], loss=module)
    torch.testing.assert_close(result.loss, value.detach())
    torch.testing.assert_close(result["grad"]["weight"], torch.autograd.grad(value, net.weight)[0])


def test_the_losses_options_stand_in_the_provenance_complete():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.l(x)}

    net, x = Named(), torch.randn(5, 4)
    loss = {"name": "cross_entropy", "options": {"label_smoothing": 0.1, "output": "logits"}}
    info = engine.analyze(net, x, torch.tensor([0, 1, 2, 0, 1]), ["grad"], loss=loss).info
    options = {"weight": None, "label_smoothing": 0.1, "ignore_index": -100, "class_axis": None}
    assert (info["loss_options"], info["loss_output"]) == (options, "logits")


def test_functional_names_are_aliases():
    net, x = nn.Linear(4, 3), torch.randn(5, 4)
    result = engine.analyze(net, x, torch.randn(5, 3), ["grad"], loss="mse_loss")
    assert result.info["loss_name"] == "mse"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_language_model_with_tied_embeddings_and_ignored_tokens(reduction):
    module = LanguageModel().double().eval()
    tokens = torch.randint(0, 7, (4, 5))
    targets = torch.roll(tokens, -1, 1)
    targets[:, -1] = 0
    targets[2] = 0  # a sample without any term
    options = {"ignore_index": 0, "class_axis": "last", "label_smoothing": 0.1}

    def peer(f, t, reduction):
        return F.cross_entropy(f.transpose(1, 2), t, ignore_index=0, label_smoothing=0.1, reduction=reduction)

    loss = {"name": "cross_entropy", "options": options}
    asked = ["batch_loss", *FIRST_ORDER, "diag_ggn_exact"]
    result = engine.analyze(torch.jit.script(module), tokens, targets, asked, loss=loss, reduction=reduction)
    reference = Reference(module, (tokens,), targets, peer, reduction)
    for extension in [*FIRST_ORDER, "diag_ggn_exact"]:
        for parameter, expected in reference.expected(extension).items():
            assert error(result[extension][parameter], expected) <= TOLERANCE, (extension, parameter)
    assert result["batch_loss"][2] == 0
    assert torch.all(result["batch_grad"]["embedding.weight"][2] == 0)


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.hidden(self.embedding(tokens))))


def test_cross_entropy_on_log_probabilities_has_the_ggn_of_the_logits():
    module, inputs = build({c.name: c for c in CASES}["mlp"])
    logs = nn.Sequential(*module, nn.LogSoftmax(1))
    targets = torch.tensor([0, 1, 2, 1])
    asked = ["grad", "diag_ggn_exact"]
    of_logits, of_logs = (engine.analyze(m, inputs, targets, asked, loss="cross_entropy") for m in (module, logs))
    by_nll = engine.analyze(logs, inputs, targets, ["grad"], loss="nll")
    for parameter, value in of_logits["diag_ggn_exact"].items():
        assert error(of_logs["diag_ggn_exact"][parameter], value) <= TOLERANCE
        assert error(by_nll["grad"][parameter], of_logits["grad"][parameter]) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@CASE
def test_lower_precision_is_near_float64(case, dtype):
    module, inputs, targets = case.build()
    exact = engine.analyze(module, inputs, targets, ["grad"], loss=case.request)
    floats = targets.to(dtype) if targets.is_floating_point() else targets
    low = engine.analyze(module.to(dtype), (inputs[0].to(dtype),), floats, ["grad"], loss=case.request)
    bound = 1e-3 if dtype == torch.float32 else 0.2
    assert low.loss.dtype == torch.float32
    assert abs(float(low.loss) - float(exact.loss)) <= bound * max(1.0, abs(float(exact.loss)))


OPTIONS = [{}, {"label_smoothing": 0.1, "weight": [0.5, 1.0, 2.0, 1.0, 0.2], "ignore_index": 1}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("numbers", [1, 40, 10**9])
def test_classes_may_stand_last_and_few_samples_be_summed_at_a_time(numbers, options, monkeypatch):
    """The same labels and columns in either order of axes, however many probabilities are summed up at a time."""
    monkeypatch.setattr(cross_entropy, "_SUMMED_NUMBERS", numbers)
    generator = torch.Generator().manual_seed(0)
    outputs = 3 * torch.randn(7, 5, 2, 3, dtype=torch.float64, generator=generator)
    targets = torch.randint(5, (7, 2, 3), generator=generator)
    second = LossSpec.parse({"name": "cross_entropy", "options": options}, None).bind(outputs, targets)
    given = {"name": "cross_entropy", "options": {**options, "class_axis": "last"}}
    last = LossSpec.parse(given, None).bind(outputs.movedim(1, -1).contiguous(), targets)
    torch.testing.assert_close(last.contributions(), second.contributions(), rtol=1e-13, atol=1e-15)
    for make in (lambda b: b.gradient(), lambda b: b.exact_column(4), lambda b: b.sampled_column(5, 1)):
        torch.testing.assert_close(make(last).movedim(-1, 1), make(second), rtol=1e-13, atol=1e-15)
    # The label drawn is the first whose summed probability exceeds the number drawn.
    p = outputs.flatten(2).softmax(1)
    u = draws.uniform(5, torch.arange(7), torch.arange(6), 1)
    labels = (p.cumsum(1) <= u[:, None]).sum(1)
    found = second.sampled_column(5, 1).flatten(2)
    counted = second.mass > 0
    assert torch.equal(found.argmin(1)[counted], labels[counted])
    assert labels.unique().numel() > 2


def mixed(z: int) -> int:
    """SplitMix64's finaliser, in whole numbers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, -(2**63), -7])
@pytest.mark.parametrize("draw", [0, 63])
def test_draws_are_what_they_have_always_been(seed, draw):
    """A result is known by its seed: another release must not draw otherwise."""
    gamma, samples = 0x9E3779B97F4A7C15, [0, 1, 12345, 2**40]
    start = mixed((mixed((seed + gamma) % 2**64) + 2 * draw) * gamma % 2**64 + gamma & 2**64 - 1)
    expected = [
        [(mixed((mixed((start + n * gamma) % 2**64) + (t + 1) * gamma) % 2**64) >> 11) * 2.0**-53 for t in range(3)]
        for n in samples
    ]
    assert draws.uniform(seed, torch.tensor(samples), torch.arange(3), draw).tolist() == expected


@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 0.0, 2.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("labels", "ignore_index"),
    [([0, 1, 3, 3], -100), ([0, 1, 3, 3], 2), ([0, 2, 3, 2], 2), ([0, -100, 3, 1], -100), ([0, 7, 3, 1], 7)],
)
def test_targets_that_all_count_and_others(labels, ignore_index, smoothing, weight):
    outputs = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    targets, options = torch.tensor(labels), {"label_smoothing": smoothing, "ignore_index": ignore_index}
    given = {"name": "cross_entropy", "options": {**options, "weight": weight}}
    weights = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    for reduction in ("mean", "sum"):
        expected = F.cross_entropy(outputs, targets, weights, reduction=reduction, **options)
        loss = LossSpec.parse(given, reduction).bind(outputs, targets)
        torch.testing.assert_close(loss.contributions().sum(), expected.detach(), rtol=1e-13, atol=1e-15)
        (gradient,) = torch.autograd.grad(expected, outputs)
        torch.testing.assert_close(loss.gradient(), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("label", [-1, 4, -100])
def test_a_class_that_is_none_is_refused(label):
    outputs, targets = torch.randn(3, 4), torch.tensor([0, label, 3])
    given = {"name": "cross_entropy", "options": {"ignore_index": -7}}
    with pytest.raises(engine.EngineError, match=f"got {label}") as caught:
        LossSpec.parse(given, "mean").bind(outputs, targets)
    assert caught.value.code == "invalid_targets"
