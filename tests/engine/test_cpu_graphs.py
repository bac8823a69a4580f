"""What is done again of a function is what the function does, or it is not done again."""

import subprocess
import sys

import pytest
import torch
from tests.engine.models import CASES, build, targets_for, torchscript
from torch import nn

import curvature_engine as engine
from curvature_engine import pages, replays
from curvature_engine.cpu_graphs import CpuGraph
from curvature_engine.speculation import Unspeculative

REQUESTS = [
    "grad",
    "batch_grad",
    "batch_l2",
    "sum_grad_squared",
    "variance",
    "batch_dot",
    "outputs",
    {"name": "diag_ggn_mc", "options": {"mc_samples": 2}},
    {"name": "kfac", "options": {"mc_samples": 2}},
    "diag_ggn_exact",
    "kflr",
]
RUNS = 2
NEVER = {"embedding", "if_and_loop", "in_place", "masked_rows", "no_rule", "packed_projection"}
"""Those that read numbers, edit what they are given, or go sample by sample."""


@pytest.fixture
def soon(monkeypatch):
    """Captured after two analyses and tried in the third; how the ordinary way goes; what was captured."""
    monkeypatch.setattr(replays, "RUNS", {"cpu": RUNS})

    def ordinarily(*given, **options):
        with monkeypatch.context() as patch:
            patch.setenv("CURVATURE_GRAPHS", "off")
            return engine.analyze(*given, **options)

    return ordinarily


def graphs_of(program):
    return [kind.captured.graph for kind in replays.replays_of(program).captured()]


def same(found, expected):
    pairs = list(zip(replays._tensors_of(found), replays._tensors_of(expected), strict=True))
    assert found.warnings == expected.warnings
    assert found.info == expected.info
    for label, group in expected.groups.items():
        assert found.groups[label].provenance == group.provenance
    return bool(pairs) and all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_replayed_analysis_is_an_ordinary_one(case, soon):
    """Bit for bit, on other batches than it was captured on, with other seeds."""
    (module, inputs), dtype = (
        build(case),
        torch.float32,
    )  # in which images lie channels last; random nets are in float64
    targets = targets_for(module(*inputs), "mse").to(dtype)
    module, inputs = module.to(dtype), [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    program = engine.load(torchscript(module, tuple(inputs), case.ways[0]))
    soon(program, tuple(inputs), targets, REQUESTS, loss="mse")  # which leaves a verdict
    for k in range(RUNS + 3):
        given = tuple(x.roll(k, 0) for x in inputs), targets.roll(k, 0)
        found = engine.analyze(program, *given, REQUESTS, loss="mse", seed=k)
        assert same(found, soon(program, *given, REQUESTS, loss="mse", seed=k))
    assert bool(graphs_of(program)) == (case.name not in NEVER)


@pytest.mark.parametrize("name", [e["name"] for e in engine.catalogue()["extensions"]])
def test_every_extension_is_done_again(name, soon):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)
    if name == "kfra":  # which asks where an operator's elements come from, but for linear layers
        layers = nn.Flatten(), nn.Linear(36, 8), nn.Sigmoid(), nn.Linear(8, 4)
    program = engine.load(torch.jit.script(nn.Sequential(*layers).eval()))
    for k in range(-1, 5):
        given = torch.randn(5, 1, 6, 6), torch.randint(0, 4, (5,)), [name]
        if k < 0:
            soon(program, *given)  # which leaves a verdict
            continue
        found = engine.analyze(program, *given, seed=k)
        assert same(found, soon(program, *given, seed=k))
    (graph,) = graphs_of(program)
    assert not graph.on_trial


def capture(function, *given):
    """A graph of a function of tensors that returns a list of them."""
    graph = CpuGraph(torch.device("cpu"))
    graph.capture(lambda: function(*given), given, lambda found: found)
    return graph


def views(x):
    y = x * 2
    y[1:, ::2].mul_(3.0)
    y.T[0].add_(x[:, 0])
    first, *_ = y.unbind(1)
    return [y, first, y.reshape(-1)[3:], torch.stack([first, first])]


def gone(x):
    """Another view of memory whose first tensor is gone."""
    y = x + 1
    z = y.T
    del y
    return [z, z.T.detach(), z.data.sum(0)]


def lists(x):
    parts = x.split([1, 2], 0)
    found = torch._foreach_mul(list(parts), 2.0)
    return [torch.cat([*found, x]), *torch.var_mean(x, 0)]


def autograd(x):
    w = x.clone().requires_grad_()
    y = (w.tanh() @ w.T).square().sum()
    return list(torch.autograd.grad(y, (w,)))


def into(x):
    out = torch.empty(3, 3)
    torch.mm(x, x.T, out=out)
    return [out, torch.add(x, x, out=torch.zeros_like(x))]


def reshaped(x):
    y = x + 1
    y.t_().unsqueeze_(0)
    return [y * 2, y.squeeze_(0).as_strided_((2, 3), (3, 1))]


def numbers(x):
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scale.add_(x[0])
    return [x * scale, torch.tensor(5.0) + x, torch.arange(3), torch.full((2,), float("-inf"))]


@pytest.mark.parametrize("function", [views, gone, lists, autograd, into, reshaped, numbers], ids=lambda f: f.__name__)
def test_other_numbers_go_the_same_way(function):
    graph = capture(function, torch.randn(3, 4))
    for _ in range(3):
        x = torch.randn(3, 4)
        before, expected = x.clone(), function(x)
        for found, wanted in zip(graph.replay([x]), expected, strict=True):
            assert torch.equal(found, wanted)
            assert found.stride() == wanted.stride()
        assert torch.equal(x, before)


def test_what_was_there_is_read_anew_and_never_handed_out():
    there = torch.ones(3)
    graph = capture(lambda x: [x * there, there, x, x[1:], there.view(3, 1)], torch.randn(3))
    there.fill_(7.0)
    x = torch.randn(3)
    product, *aliases = graph.replay([x])
    assert torch.equal(product, 7 * x)
    for alias in aliases:
        alias.zero_()
    assert bool((there == 7).all())
    assert x.count_nonzero() == 3


def test_a_batch_within_a_larger_tensor():
    graph = capture(lambda x: [x.as_strided((2, 2), (2, 1), 0) + 1], torch.randn(2, 3))
    wide = torch.randn(5, 3)
    assert torch.equal(graph.replay([wide[2:4]])[0], wide[2:4].clone().as_strided((2, 2), (2, 1), 0) + 1)


def reads_a_list(x):
    return [x * x.sum(0).tolist()[0]]


def reads_an_array(x):
    return [x * float(x.numpy()[0, 0])]


def reads_elements(x):
    return [torch.tensor([x[0, 0], x[1, 1]])]


def draws(x):
    return [torch.rand_like(x)]


def edits_what_is_given(x):
    return [x.mul_(2)]


THERE = torch.ones(4)


@pytest.mark.parametrize(
    "function",
    [
        reads_a_list,
        reads_an_array,
        reads_elements,
        draws,
        edits_what_is_given,
        lambda x: [x * 2] if bool(x.sum() > 0) else [x],
        lambda x: [x[x > 0]],
        lambda x: [x.nonzero()],
        lambda x: [x.unique()],
        lambda x: [x if torch.equal(x, x) else x + 1],
        lambda x: [x.repeat_interleave(torch.tensor([1, 2, 0]), 0)],
        lambda x: [THERE.add_(1)],
        lambda x: [torch.add(x[0], 1, out=THERE)],
        lambda x: [THERE.view(2, 2).T.copy_(x[:2, :2])],
        lambda x: [torch.empty(0).set_(x.untyped_storage())],
        lambda x: [(x + 1).resize_(2, 2)],
        lambda x: (lambda y: [y.detach(), y.t_()])(x + 1),
        lambda x: [x.t_()],
        lambda x: [(x + 1).to_sparse().coalesce().to_dense()],
        lambda x: [torch.normal(x, 1.0)],
    ],
)
def test_what_cannot_be_done_again_is_refused(function):
    with pytest.raises(Unspeculative):
        capture(function, torch.randn(3, 4))
    assert bool((THERE == 1).all())


def test_an_operator_that_fails_is_for_the_ordinary_way_to_explain():
    graph = capture(lambda i: [torch.arange(3.0)[i]], torch.tensor([0, 1]))
    assert graph.replay([torch.tensor([2, 2])])[0].tolist() == [2, 2]
    with pytest.raises(Unspeculative, match=r"out of (range|bounds)"):
        graph.replay([torch.tensor([0, 3])])


def test_memory_goes_after_its_last_use(monkeypatch):
    """A large intermediate tensor comes from what waits, and is there again for the next."""
    monkeypatch.setattr(pages.PAGES, "limit_bytes", 2**26)

    def function(x):
        a = pages.blank((2**23,), x).fill_(1.0)
        total = a.sum()
        del a
        b = pages.zeros((2**23,), x)
        return [total + b[0] + x]

    pages.drop()
    graph = capture(function, torch.zeros(1))
    for k in range(3):
        (found,) = graph.replay([torch.full((1,), float(k))])
        assert found.item() == 2**23 + k
    assert pages.PAGES.idle_bytes == 2**25
    pages.drop()


class Lying(CpuGraph):
    def replay(self, given):
        holds, first, *rest = super().replay(given)
        return [holds, first + 1, *rest]


def test_what_differs_is_not_believed(soon, monkeypatch):
    monkeypatch.setattr(replays, "_graph", Lying)
    program = engine.load(torch.jit.script(nn.Linear(4, 3)))
    for _ in range(RUNS + 3):
        given = torch.randn(5, 4), torch.randint(0, 3, (5,)), ["grad", "batch_l2"]
        soon(program, *given)
        assert same(engine.analyze(program, *given), soon(program, *given))
    assert not graphs_of(program)


class Places(nn.Module):
    """Splits where a tensor says."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        first = torch.tensor_split(x, places, 1)[0]
        return self.layer(x) * first.sum(1, keepdim=True)


def test_operators_that_read_unseen_are_refused(soon):
    program = engine.load(torch.jit.script(Places().double().eval()))
    for k in range(RUNS + 3):
        x = torch.randn(3, 4, dtype=torch.float64), torch.tensor([1, 2, 3]) - k % 2
        given = x, torch.tensor([0, 1, 2]), ["grad"]
        assert same(engine.analyze(program, *given), soon(program, *given))
    assert not graphs_of(program)


def test_a_capture_imports_no_compiler():
    """Which torch does for a mode of its dispatcher that is not told otherwise, and takes seconds for."""
    code = """
import sys, torch
import curvature_engine as engine
from curvature_engine import replays
replays.RUNS = {"cpu": 2}
program = engine.load(torch.jit.script(torch.nn.Linear(4, 3)))
for _ in range(4):
    engine.analyze(program, torch.randn(5, 4), torch.randint(0, 3, (5,)), ["grad", "diag_ggn_mc"])
(kind,) = replays.replays_of(program).captured()
assert not kind.captured.graph.on_trial
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.stdout, found.stderr) == ("[]\n", "")
