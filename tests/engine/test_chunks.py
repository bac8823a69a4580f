"""A batch divided into chunks gives the whole batch's results, or is not divided and says why."""

import pytest
import torch
from tests.engine.models import build, targets_for, torchscript
from tests.engine.test_table import BY_NAME, REQUESTS, error
from torch import nn

import curvature_engine as engine
from curvature_engine.division import split

DRAWN = ["diag_ggn_mc", "batch_diag_ggn_mc", "sqrt_ggn_mc", "kfac"]
SOME = [
    {"name": name, "label": f"some {name}", "options": {"subsampling": [3, 0, 3]}}
    for name in ("batch_grad", "variance", "diag_ggn_exact", "sqrt_ggn_exact", "batch_l2")
]
HESSIAN = ["diag_hessian", "batch_diag_hessian", {**SOME[0], "name": "batch_diag_hessian", "label": "some summands"}]
EVERYTHING = [
    *(r for r in REQUESTS if r != "batch_dot"),
    *({"name": name, "options": {"mc_samples": 3}} for name in DRAWN),
    {"name": "batch_l2", "label": "norms", "options": {"over": "model", "scale": "sample"}},
    *SOME,
]
MODELS = [
    *("cnn", "residual_batchnorm", "attention", "sequence_first", "tied_embedding", "two_inputs", "lstm"),
    *("extra_axis", "weight_norm"),
]


def both(program, inputs, targets, extensions=EVERYTHING, **options):
    program = engine.load(program)
    whole = engine.analyze(program, inputs, targets, extensions, **options)
    chunked = engine.analyze(program, inputs, targets, extensions, budget_bytes=1, **options)
    return whole, chunked


def check_equal(whole, chunked, tolerance=1e-12):
    for label, group in whole.groups.items():
        assert chunked.groups[label].missing == group.missing
        assert list(chunked.groups[label].tensors) == list(group.tensors)
        for key, tensor in group.tensors.items():
            found = chunked.groups[label].tensors[key]
            if not bool(torch.isfinite(tensor).all()):
                torch.testing.assert_close(found, tensor, equal_nan=True)
                continue
            assert error(found, tensor) <= tolerance or bool((found - tensor).abs().max() <= 1e-14), (label, key)
    torch.testing.assert_close(chunked.loss, whole.loss, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_chunks_give_the_whole_batch_s_results(name):
    module, inputs = build(BY_NAME[name])
    targets = targets_for(module(*inputs), "cross_entropy")
    script = torchscript(module, inputs, "scripted")
    requests = EVERYTHING if name in ("cnn", "residual_batchnorm") else [*EVERYTHING, *HESSIAN]
    whole, chunked = both(script, inputs, targets, requests, loss="cross_entropy")
    assert (whole.plan.chunks, chunked.plan.chunks) == (1, 2)
    assert chunked.plan.samples_per_chunk == 2
    for result, samples in ((whole, len(targets)), (chunked, 2)):
        entries = [entry for group in result.groups.values() for entry in group.provenance.values()]
        assert {(entry["samples_per_chunk"], entry["halvings"]) for entry in entries} == {(samples, 0)}
    check_equal(whole, chunked)


class Masked(nn.Module):
    """Sequence-first attention with a mask that all samples share."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x, mask):
        q, k, v = self.qkv(x.transpose(0, 1)).chunk(3, -1)
        weights = (q @ k.transpose(-1, -2) + mask).softmax(-1)
        return self.out(weights @ v).sum(1)


@pytest.mark.parametrize("N", [5, 7])
def test_samples_along_the_second_axis_and_inputs_that_all_share(N):
    T = 5  # with N = T, shapes do not say which axis is which
    x, mask = torch.randn(T, N, 4, dtype=torch.float64), torch.randn(T, T, dtype=torch.float64)
    targets = torch.randint(0, 3, (N,))
    requests = [
        "batch_grad",
        "variance",
        "diag_ggn_exact",
        "kflr",
        {"name": "diag_ggn_mc", "options": {"mc_samples": 2}},
    ]
    whole, chunked = both(torch.jit.script(Masked().double()), (x, mask), targets, requests)
    assert chunked.plan.chunks == N // 2
    check_equal(whole, chunked)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(5, 3)

    def forward(self, x):
        return self.l(x) / x.shape[0]


class BatchWideIf(Scaled):
    def forward(self, x):
        return self.l(x) if bool(x.sum() > 0) else torch.tanh(self.l(x))


class BatchWideNumber(Scaled):
    def forward(self, x):
        return self.l(x) * float(x.max())


class Baked(Scaled):
    def forward(self, x):
        return self.l(x.view(6, 5))


def trace(module):
    return torch.jit.trace(module, torch.randn(6, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.jit.script(Scaled().double()), "other outputs"),
        (lambda: trace(Scaled().double()), "other outputs"),
        (lambda: torch.jit.script(BatchWideIf().double()), "decides otherwise"),
        (lambda: torch.jit.script(BatchWideNumber().double()), "other numbers"),
        (lambda: trace(Baked().double()), "does not run"),
    ],
    ids=["shape", "traced shape", "if", "number", "baked"],
)
def test_what_cannot_be_divided_stays_whole_and_says_why(make, reason):
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64)
    x[:2] = x[:2].abs() + 10  # the first chunk and the whole batch have a positive sum
    x[4:] -= 3
    targets = torch.randint(0, 3, (6,))
    whole, small = both(make(), x, targets, ["batch_grad", "diag_ggn_exact"])
    assert small.plan.chunks == 1
    assert reason in small.plan.whole_reason
    assert any(reason in warning for warning in small.warnings)
    check_equal(whole, small)


class Centred(Scaled):
    def forward(self, x):
        h = self.l(x)
        return h - h.mean(0)


def test_coupled_samples_are_refused_whatever_the_budget():
    x, targets = torch.randn(6, 5, dtype=torch.float64), torch.randint(0, 3, (6,))
    with pytest.raises(engine.EngineError, match="coupled"):
        engine.analyze(torch.jit.script(Centred().double()), x, targets, ["batch_grad"], budget_bytes=1)


def test_dot_products_keep_the_batch_whole():
    module, inputs = build(BY_NAME["mlp"])
    targets = targets_for(module(*inputs), "cross_entropy")
    plan = engine.plan(torch.jit.script(module), inputs, targets, ["batch_dot", "batch_l2"], budget_bytes=1)
    assert plan.chunks == 1
    assert "batch_dot" in plan.whole_reason


def test_same_plan_same_bits():
    module, inputs = build(BY_NAME["cnn"])
    targets = targets_for(module(*inputs), "cross_entropy")
    program = engine.load(torch.jit.script(module))
    requests = ["batch_grad", "variance", "kflr", "diag_ggn_mc"]
    first, second = (engine.analyze(program, inputs, targets, requests, budget_bytes=30_000) for _ in range(2))
    assert first.plan == second.plan
    for label, group in first.groups.items():
        for key, tensor in group.tensors.items():
            assert torch.equal(second.groups[label].tensors[key], tensor) or not bool(torch.isfinite(tensor).all())


def test_chunks_are_as_equal_as_can_be():
    assert split(7, 3, 2) == (0, 3, 5, 7)
    assert split(7, 1, 2) == (0, 3, 5, 7)
    assert split(3, 1, 2) == (0, 3)
    assert split(3, 1, 1) == (0, 1, 2, 3)
    assert split(8, 100, 2) == (0, 8)


class Silent(nn.Module):
    """Layers behind which every batch gives the same outputs, and a batch's mean before them."""

    def __init__(self, of_inputs):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.of_inputs = of_inputs
        nn.init.zeros_(self.out.weight)

    def forward(self, x):
        if self.of_inputs:
            return self.out(torch.tanh(self.a(x - x.mean(0))))
        h = torch.tanh(self.a(x))
        return self.out(h - h.mean(0))


@pytest.mark.parametrize("of_inputs", [True, False])
def test_values_inside_are_compared_too(of_inputs):
    torch.manual_seed(0)
    module, x, targets = Silent(of_inputs).double(), torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 3, (6,))
    requests = ["batch_grad", "diag_ggn_exact", "kflr"]
    whole, chunked = both(torch.jit.script(module), x, targets, requests)
    assert chunked.plan.chunks == 1
    assert any("chunks compute other values inside the model: aten::" in w for w in chunked.warnings)
    check_equal(whole, chunked)
