"""A first batch is judged by its first few samples, or as a whole, and never by guessing."""

import subprocess
import sys

import pytest
import torch
from tests.engine.following_models import PROVED
from tests.engine.models import exported, torchscript
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine import differentiation, few, methods
from curvature_engine.few import FEW, LEAST
from curvature_engine.followers import FOLLOWERS, elementwise
from curvature_engine.rules.linear import LinearRule

N = 8
EXTENSIONS = ["batch_grad", "batch_l2", "variance", "diag_ggn_exact", "kflr"]


class Judged:
    """How many samples the outputs had, each time they were judged."""

    def __init__(self, monkeypatch):
        self.few, self.whole = [], []
        for module, noted in ((few, self.few), (methods, self.whole)):
            monkeypatch.setattr(module, "judge", self._noting(module.judge, noted))

    @staticmethod
    def _noting(judge, noted):
        def judge_and_note(outputs, *others):
            noted.append(len(outputs))
            return judge(outputs, *others)

        return judge_and_note


@pytest.fixture
def judged(monkeypatch):
    torch.manual_seed(0)
    return Judged(monkeypatch)


@pytest.fixture
def never_few(monkeypatch):
    """Turns the few samples off."""
    return lambda: monkeypatch.setattr(few, "LEAST", 10**9)


def check(program, module, inputs, **options):
    """Hold a first job to brute force."""
    outputs = module(*inputs)
    targets = torch.randn(outputs.shape, dtype=outputs.dtype)
    expected = Reference(module, inputs, targets, "mse", "mean").batch_grad()
    result = engine.analyze(program, inputs, targets, ["batch_grad"], loss="mse", **options)
    scale = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(result["batch_grad"][name], value, rtol=1e-9, atol=1e-10 * scale)
    return result


def enlarged(inputs):
    """Twice as many samples, by the first axis."""
    return tuple(torch.cat([x, x.flip(0)]) for x in inputs)


# Judged by few


SQUARE = ("positioned", "one-hot positions")  # as many positions as samples
FOLLOWED = [(name, way) for name, (*_, ways) in PROVED.items() for way in ways if name not in SQUARE]


@pytest.mark.parametrize(("name", "way"), FOLLOWED)
@pytest.mark.filterwarnings("ignore:The tensor attributes self")
def test_the_few_tell_what_all_would(name, way, never_few, judged):
    make, given, _ = PROVED[name]
    module, inputs = make().double().eval(), enlarged(given())
    module(*inputs)
    model = exported(module, inputs) if way == "exported" else torchscript(module, inputs, way)
    targets = torch.randn(module(*inputs).shape, dtype=torch.float64)

    def job():
        program = engine.load(model)
        result = engine.analyze(program, inputs, targets, EXTENSIONS, loss="mse")
        (verdict,) = program.verdicts._kept.values()
        return result, verdict

    by_few, few_verdict = job()
    settled = not judged.whole
    never_few()
    by_all, verdict = job()
    assert settled == (few_verdict.probed == FEW)
    assert few_verdict.strides == verdict.strides
    assert judged.whole[-1] == N
    for one, other in zip(few_verdict.taps, verdict.taps, strict=True):
        assert (one.pure, one.reached) == (other.pure, other.reached)
        assert (one.attribution is None) == (other.attribution is None)
        if one.attribution is not None:
            assert (one.attribution.N, one.attribution.order, one.attribution.R) == (
                other.attribution.N,
                other.attribution.order,
                other.attribution.R,
            )
    for label in EXTENSIONS:
        found, expected = by_few.groups[label], by_all.groups[label]
        assert found.missing == expected.missing
        for key, tensor in expected.tensors.items():
            assert torch.equal(found.tensors[key], tensor), (label, key)


USUAL = ["resnet", "encoder", "patches", "windows", "generative", "lstm", "einsum"]


@pytest.mark.parametrize("name", USUAL)
def test_usual_models_need_no_more(name, judged):
    make, given, _ = PROVED[name]
    module, inputs = make().double().eval(), enlarged(given())
    check(engine.load(torchscript(module, inputs, "traced")), module, inputs)
    assert (judged.few, judged.whole) == ([FEW], [])


def test_the_whole_batch_goes_back_as_often_in_a_first_job_as_later(monkeypatch):
    run, passes = differentiation._run, []

    def noting(outputs, *arguments, **options):
        passes.append(outputs[0].shape[0] if isinstance(outputs[0], torch.Tensor) else None)
        return run(outputs, *arguments, **options)

    monkeypatch.setattr(differentiation, "_run", noting)
    program, y = engine.load(torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))), None
    found = []
    for _ in range(2):
        passes.clear()
        x, y = torch.randn(N, 4), torch.arange(N) % 3
        engine.analyze(program, x, y, ["batch_l2"])
        found.append([n for n in passes if n != FEW])
    assert found[0] == found[1] == [N]


@pytest.mark.parametrize("samples", [1, 2, FEW, LEAST - 1])
def test_a_small_batch_is_judged_itself(samples, judged):
    module = nn.Linear(4, 3).double()
    check(engine.load(torch.jit.script(module)), module, (torch.randn(samples, 4, dtype=torch.float64),))
    assert (judged.few, judged.whole) == ([], [samples])


def test_chunks_of_two_sizes_share_what_the_few_told(judged):
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs = (torch.randn(11, 4, dtype=torch.float64),)
    result = check(engine.load(torch.jit.script(module)), module, inputs, budget_bytes=1200)
    assert result.plan.chunks > 1
    assert 11 % result.plan.chunks
    assert (judged.few, judged.whole) == ([FEW], [])


def test_a_first_job_says_that_it_verified_and_the_next_that_it_kept():
    program, y = engine.load(torch.jit.script(nn.Linear(4, 3))), torch.arange(N) % 3
    found = []
    for _ in range(2):
        entry = engine.analyze(program, torch.randn(N, 4), y, ["batch_grad"]).groups["batch_grad"].provenance["weight"]
        found.append((entry["verified"], entry["verification"]))
    assert found == [(True, "this job"), (True, "kept verdict")]


def test_verify_judges_all_samples(judged):
    module, inputs = nn.Linear(4, 3).double(), (torch.randn(N, 4, dtype=torch.float64),)
    check(engine.load(torch.jit.script(module)), module, inputs, verify=True)
    assert judged.whole == [N]


def test_what_was_verified_before_does_not_change_later_plans():
    x, y = torch.randn(N, 4), torch.arange(N) % 3
    plans = []
    for before in (False, True):
        program = engine.load(torch.jit.script(nn.Linear(4, 3)))
        for verify in [True] * before + [False]:
            result = engine.analyze(program, x, y, ["batch_grad"], verify=verify)
        plans.append(result.plan)
    assert plans[0] == plans[1]


def test_a_budget_that_holds_the_few_s_probe_leaves_the_batch_whole(never_few):
    module = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)), nn.Linear(40, 3))
    x, y = torch.randn(600, 40), torch.arange(600) % 3

    def chunks():
        return engine.plan(torch.jit.script(module), x, y, ["batch_l2"], budget_bytes=1_650_000)

    by_few = chunks()
    never_few()
    by_all = chunks()
    assert (by_few.chunks, by_all.chunks) == (1, 2)
    assert by_few.peak_bytes <= 1_650_000


def test_another_number_of_samples_costs_no_more(judged):
    module = nn.Linear(4, 3).double()
    program = engine.load(torch.jit.script(module))
    for samples in (8, 9, 8):
        check(program, module, (torch.randn(samples, 4, dtype=torch.float64),))
    assert (judged.few, judged.whole) == ([FEW, FEW], [])


# Not judged by few


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(4, 4), nn.Linear(4, 3)


class BranchesByCount(Two):
    def forward(self, x):
        h = self.l(x)
        if x.shape[0] > 4:
            h = torch.tanh(h)
        return self.o(h)


class BranchesBySum(Two):
    def forward(self, x):
        h = self.l(x)
        if bool(x.abs().sum() > 20.0):
            h = torch.tanh(h)
        return self.o(h)


class OneByOne(Two):
    def forward(self, x):
        rows = []
        for n in range(x.shape[0]):
            rows.append(self.l(x[n]))  # noqa: PERF401 - the loop is what is scripted
        return self.o(torch.tanh(torch.stack(rows)))


class Endless(Two):
    """A loop that three samples would never leave."""

    def forward(self, x):
        scale = 1
        while scale * x.shape[0] != 8:
            scale = scale + scale
        return self.o(torch.tanh(self.l(x))) * scale


class BakedIn(Two):
    def forward(self, x):
        return self.o(torch.tanh(self.l(x)).reshape(8, 4))


class LateParameter(Two):
    """The second layer sees nothing of the first samples."""

    def forward(self, x):
        h = torch.tanh(self.l(x))
        return torch.cat([h[:4, :3], self.o(h[4:])])


class RoutedByNumbers(Two):
    def forward(self, x):
        scores: list[float] = x[:, 0].tolist()
        return self.o(torch.tanh(self.l(x))[torch.tensor(scores).argsort()])


class Dead(Two):
    """No gradient reaches the first layer from the first samples."""

    def forward(self, x):
        return self.o(torch.relu(self.l(x)))


class Shared(nn.Module):
    """An input that all samples share."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 3)

    def forward(self, x, mask):
        return self.l(x @ mask)


def normal():
    return (torch.randn(N, 4, dtype=torch.float64),)


def first_zero():
    x = torch.randn(N, 4, dtype=torch.float64)
    x[:FEW] = 0
    return (x,)


OTHERWISE = {
    "a branch by the number of samples": (BranchesByCount, normal),
    "a branch by a sum": (BranchesBySum, lambda: (torch.ones(N, 4, dtype=torch.float64),)),
    "a loop over samples": (OneByOne, normal),
    "a loop without end": (Endless, normal),
    "a number of samples that is baked in": (BakedIn, normal),
    "a parameter of later samples": (LateParameter, normal),
    "numbers that route rows": (RoutedByNumbers, normal),
    "first samples of zeros": (lambda: nn.Linear(4, 3, bias=False), first_zero),
    "an input that all share": (Shared, lambda: (*normal(), torch.randn(4, 4, dtype=torch.float64))),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_the_few_do_not_tell_all_are_asked(name, judged):
    make, inputs = OTHERWISE[name]
    module, given = make().double().eval(), inputs()
    check(engine.load(torch.jit.script(module)), module, given)
    assert judged.whole == [N]


def test_samples_without_gradient_settle_nothing(judged):
    module = Dead().double()
    nn.init.ones_(module.l.weight)
    x = torch.ones(N, 4, dtype=torch.float64)
    x[1] = -9.0
    check(engine.load(torch.jit.script(module)), module, (x,))
    assert (judged.few, judged.whole) == ([FEW], [N])


@pytest.mark.parametrize("least", [None, 4])
def test_exports_for_a_number_of_samples_or_for_more_than_the_few_are_judged_whole(least, judged):
    module, inputs = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double(), normal()
    dynamic = None if least is None else ({0: torch.export.Dim("samples", min=least, max=64)},)
    check(engine.load(torch.export.export(module, inputs, dynamic_shapes=dynamic)), module, inputs)
    assert (judged.few, judged.whole) == ([], [N])


def test_dropout_is_drawn_for_all(judged):
    script = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)).train())
    program = engine.load(script, eval=False)
    engine.analyze(program, torch.randn(N, 4), torch.arange(N) % 3, ["batch_grad"])
    assert (judged.few, judged.whole) == ([], [N])


def test_a_proof_that_the_few_contradict_is_not_believed(judged, monkeypatch):
    monkeypatch.setitem(FOLLOWERS, "flip", elementwise)  # as if samples stayed where they are

    class Flipped(Two):
        def forward(self, x):
            return self.o(torch.tanh(self.l(x)).flip(0))

    module, inputs = Flipped().double(), normal()
    check(engine.load(torch.jit.trace(module, inputs)), module, inputs)
    assert (judged.few, judged.whole) == ([FEW], [N])


def test_closed_forms_that_do_not_add_up_are_refused_as_ever(judged, monkeypatch):
    right = LinearRule.per_sample
    monkeypatch.setattr(LinearRule, "per_sample", lambda *args: 1.01 * right(*args))
    program = engine.load(torch.jit.script(nn.Linear(4, 3)))
    with pytest.raises(engine.EngineError, match="the closed form of parameter weight disagrees"):
        engine.analyze(program, torch.randn(N, 4), torch.arange(N) % 3, ["batch_grad"])
    assert (judged.few, judged.whole) == ([FEW], [N])


def test_a_closed_form_that_is_wrong_for_many_samples_only_is_found_on_request(monkeypatch):
    right = LinearRule.per_sample

    def wrong(self, role, saved, g):
        return right(self, role, saved, g) * (1.0 if g.shape[0] * g.shape[1] <= FEW else 1.01)

    monkeypatch.setattr(LinearRule, "per_sample", wrong)
    program, y = engine.load(torch.jit.script(nn.Linear(4, 3))), torch.arange(N) % 3
    with pytest.raises(engine.EngineError, match=r"the closed form of parameter weight disagrees"):
        engine.analyze(program, torch.randn(N, 4), y, ["batch_grad"], verify=True)


@pytest.mark.parametrize("error", [engine.EngineError("out_of_memory", "no more", remedy="none"), MemoryError()])
def test_a_pass_of_few_that_memory_is_lacking_for_is_done_without(error, judged, monkeypatch):
    def refuse(*_):
        raise error

    monkeypatch.setattr(few, "judge", refuse)
    module = nn.Linear(4, 3).double().eval()
    result = check(engine.load(torch.jit.script(module)), module, normal())
    assert judged.whole == [N]
    assert not result.warnings


def test_outputs_that_are_not_finite_are_judged_whole(judged):
    x, y = torch.randn(N, 4), torch.arange(N) % 3
    x[N - 1] = torch.inf
    result = engine.analyze(torch.jit.script(nn.Linear(4, 3)), x, y, ["batch_grad"])
    assert judged.whole == [N]
    assert sum("not finite: results below it" in warning for warning in result.warnings) == 1


# Coupled samples


class Late(nn.Module):
    """Couples samples in a way that the first few do not show."""

    def __init__(self, couple):
        super().__init__()
        self.l, self.o, self.couple = nn.Linear(4, 4), nn.Linear(4, 3), couple

    def forward(self, x):
        return self.o(self.couple(torch.tanh(self.l(x))))


class CoupledFromFive(Two):
    def forward(self, x):
        h = torch.tanh(self.l(x))
        if x.shape[0] > 4:
            h = h - h.mean(0)
        return self.o(h)


def added(h):
    h = h.clone()
    h[5] += h[6]
    return h


def written(h):
    h = h.clone()
    h[5:7] = h[6:8] * 2
    return h


COUPLINGS = {
    "one sample by another": added,
    "written over": written,
    "the later ones' mean": lambda h: torch.cat([h[:4], h[4:] + h[4:].mean(0)]),
    "four samples on": lambda h: (
        h + 0.1 * torch.cat([torch.zeros_like(h[:4]), h[:-4]]) if h.shape[0] > 4 else h + 0.1 * h
    ),
    "by a matrix": lambda h: h + torch.diag(torch.ones(4, dtype=h.dtype), 4)[: h.shape[0], : h.shape[0]] @ h,
}


def refusal(model, inputs):
    with pytest.raises(engine.EngineError, match="coupled") as caught:
        engine.analyze(model, inputs, torch.arange(N) % 3, ["batch_grad"])
    return caught.value.code, caught.value.message, caught.value.param, caught.value.remedy


@pytest.mark.parametrize("name", COUPLINGS)
def test_couplings_of_later_samples_are_refused_in_the_same_words(name, never_few):
    torch.manual_seed(0)
    module, inputs = Late(COUPLINGS[name]).double(), normal()
    script = torch.jit.trace(module, inputs, check_trace=False)
    by_few = refusal(script, inputs)
    never_few()
    assert refusal(script, inputs) == by_few


def test_a_coupling_that_begins_with_five_samples_is_refused():
    refusal(torch.jit.script(CoupledFromFive().double()), normal())


class Gate(nn.Module):
    """A mixture that an input opens for later samples alone."""

    def __init__(self):
        super().__init__()
        self.l, self.o = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x, gate):
        h = torch.tanh(self.l(x))
        return self.o(h + gate * h.sum(0))


def test_a_mixture_that_only_later_samples_take_is_refused():
    gate = torch.zeros(N, 1, dtype=torch.float64)
    gate[6:] = 1.0
    refusal(torch.jit.script(Gate().double()), (*normal(), gate))


def test_coupled_samples_that_the_few_show_are_refused(judged):
    refusal(torch.jit.trace(Late(lambda h: h - h.mean(0)).double(), normal()), normal())
    assert judged.whole == [N]


# What is compared


def graph_of(make):
    w = torch.ones(3, requires_grad=True)
    return few._graph(make(w), [], {id(w): 0})


def test_graphs_are_alike_where_their_operators_are():
    first = graph_of(lambda w: (w * 2).sum())
    assert first == graph_of(lambda w: (w * 5).sum())
    assert first != graph_of(lambda w: (w + 2).sum())
    assert first != graph_of(lambda w: (w * 2 * w).sum())
    assert first != graph_of(lambda w: (w.detach().requires_grad_() * 2).sum())


def test_a_first_job_imports_no_computer_algebra(tmp_path):
    torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))).save(tmp_path / "model.pt")
    text = f"""
import sys, torch, curvature_engine
before = "sympy" in sys.modules
curvature_engine.analyze({str(tmp_path / "model.pt")!r}, torch.randn(8, 4), torch.arange(8) % 3, {EXTENSIONS})
print(before, "sympy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_a_cotangent_of_another_shape_is_an_error():
    w = torch.ones(3, requires_grad=True)
    for outputs in (w * 2, torch.autograd.graph.get_gradient_edge(w * 2)):
        with pytest.raises(RuntimeError, match="the cotangent has shape"):
            differentiation.gradients(outputs, [w], torch.ones(4, 3))
