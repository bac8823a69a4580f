"""Captured analyses: a replay gives what the ordinary way gives, or the ordinary way is taken.

With CPU graphs, and with a stand-in for a CUDA graph that does the captured run once more (`test_gpu` has real ones).
What it shows is all that the host does: keys, places, seeds, answers, copies.
"""

import gc
import threading
import weakref
from collections import UserDict

import pytest
import torch
from torch import nn

import curvature_engine as engine
import curvature_engine.program as programs
from curvature_engine import replays, speculation
from curvature_engine.cpu_graphs import CpuGraph
from curvature_engine.cuda_graphs import Unread

RUNS = 2

EXTENSIONS = [
    "grad",
    "batch_grad",
    "batch_l2",
    "sum_grad_squared",
    "variance",
    "batch_loss",
    "outputs",
    "diag_ggn_exact",
    {"name": "diag_ggn_mc", "options": {"mc_samples": 3}},
    "batch_diag_ggn_mc",
    "kfac",
    "kflr",
    "diag_hessian",
]


class Counted:
    """How often a graph was captured and replayed."""

    captures = 0
    replays = 0


class Again:
    """A stand-in for a CUDA graph: runs what was captured again, and writes where that wrote."""

    lends = True
    on_trial = False

    def __init__(self, device):
        self._run = self._found = None
        self._given = ()

    def capture(self, run, given, results):
        Counted.captures += 1
        run()
        self._run, self._given, self._results, self._found = run, given, results, run()
        return self._found

    def replay(self, given):
        Counted.replays += 1
        with torch.no_grad():
            for place, tensor in zip(self._given, given, strict=True):
                place.copy_(tensor.detach())
        with torch.enable_grad():  # which a graph does not need
            found, other = self._results(self._found), self._results(self._run())
        with torch.no_grad():
            for place, tensor in zip(found, other, strict=True):
                place.copy_(tensor)
        return found


class OnCpu(CpuGraph):
    """A CPU's, which is believed at once."""

    def __init__(self, device):
        super().__init__(device)
        self.on_trial = False

    def capture(self, run, given, results):
        found = super().capture(run, given, results)
        Counted.captures += 1
        return found

    def replay(self, given):
        Counted.replays += 1
        return super().replay(given)


KEEPS_MEMORY = pytest.mark.parametrize("kind_of_graph", [Again], indirect=True)


@pytest.fixture(params=[Again, OnCpu])
def kind_of_graph(request):
    return request.param


@pytest.fixture
def graphs(monkeypatch, kind_of_graph):
    monkeypatch.setattr(replays, "RUNS", {"cpu": RUNS})
    monkeypatch.setattr(replays, "_graph", kind_of_graph)
    monkeypatch.setattr(Counted, "captures", 0)
    monkeypatch.setattr(Counted, "replays", 0)
    yield Counted
    replays.drop()


@pytest.fixture
def ordinarily(monkeypatch):
    """An analysis in the ordinary way, whatever there is."""

    def analyze(*args, **options):
        with monkeypatch.context() as patch:
            patch.setenv("CURVATURE_GRAPHS", "off")
            return engine.analyze(*args, **options)

    return analyze


def net():
    torch.manual_seed(0)
    convolutions = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5)).double().eval()


def batch(seed, N=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(N, 2, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 5, (N,), generator=generator)


def tensors(analysis):
    return replays._tensors_of(analysis)


def same(found, expected):
    assert list(found) == list(expected)
    assert found.info == expected.info
    assert found.warnings == expected.warnings
    for label, group in expected.groups.items():
        assert found.groups[label].provenance == group.provenance
        assert list(found.groups[label].tensors) == list(group.tensors)
        assert list(found.groups[label].by_parameter) == list(group.by_parameter)
    return all(torch.equal(a, b) for a, b in zip(tensors(found), tensors(expected), strict=True))


def warmed(program, requests, times=RUNS, **options):
    for k in range(times):
        engine.analyze(program, *batch(k), requests, **options)


@pytest.mark.parametrize("loss", [None, "mse"])
def test_replays_give_what_the_ordinary_way_gives(loss, graphs, ordinarily):
    program = engine.load(torch.jit.script(net()))

    def of(k):
        x, y = batch(k)
        return (x, y) if loss is None else (x, torch.nn.functional.one_hot(y, 5).double())

    for k in range(RUNS):
        engine.analyze(program, *of(k), EXTENSIONS, loss=loss)
    assert (graphs.captures, graphs.replays) == (1, 0)
    for k, seed in ((10, 0), (11, 5), (12, -(2**40)), (10, 0)):
        found = engine.analyze(program, *of(k), EXTENSIONS, loss=loss, seed=seed)
        assert same(found, ordinarily(program, *of(k), EXTENSIONS, loss=loss, seed=seed))
    assert (graphs.captures, graphs.replays) == (1, 4)


def test_the_first_jobs_are_ordinary(graphs):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"], times=RUNS - 1)
    assert graphs.captures == 0


def test_results_are_the_callers_own(graphs):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["batch_grad", "kfac"])
    first = engine.analyze(program, *batch(7), ["batch_grad", "kfac"])
    kept = [t.clone() for t in tensors(first)]
    second = engine.analyze(program, *batch(8), ["batch_grad", "kfac"])
    assert graphs.replays == 2
    assert all(torch.equal(a, b) for a, b in zip(tensors(first), kept, strict=True))
    places = [t.untyped_storage().data_ptr() for t in (*tensors(first), *tensors(second))]
    assert len(set(places)) == len({id(t) for t in (*tensors(first), *tensors(second))})
    first.groups["batch_grad"].provenance.clear()
    second.warnings.append("mine")
    third = engine.analyze(program, *batch(8), ["batch_grad", "kfac"])
    assert third.groups["batch_grad"].provenance
    assert not third.warnings


def test_parameters_may_change_in_place(graphs, ordinarily):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"])
    with torch.no_grad():
        for parameter in program.parameters.values():
            parameter.tensor.mul_(1.5)
    assert same(engine.analyze(program, *batch(3), ["grad"]), ordinarily(program, *batch(3), ["grad"]))
    assert graphs.replays == 1


def test_a_class_that_does_not_exist_is_refused_as_ever(graphs):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"])
    x, y = batch(3)
    with pytest.raises(engine.EngineError, match="class indices must lie in 0 … 4"):
        engine.analyze(program, x, y + 2, ["grad"])
    assert graphs.replays == 1
    assert engine.analyze(program, x, y, ["grad"]).warnings == []


def test_what_is_not_finite_is_told_as_ever(graphs, ordinarily):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["variance"])
    x, y = batch(3)
    x[2] = float("nan")
    found, expected = engine.analyze(program, x, y, ["variance"]), ordinarily(program, x, y, ["variance"])
    assert found.warnings == expected.warnings != []
    assert graphs.replays == 1
    provenance = found.groups["variance"].provenance
    assert provenance == expected.groups["variance"].provenance


def test_another_kind_is_another_matter(graphs, ordinarily):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"])
    for given, options in (
        ((*batch(3, N=5), ["grad"]), {}),
        ((*batch(3), ["grad", "batch_l2"]), {}),
        ((*batch(3), ["grad"]), {"reduction": "sum"}),
        ((*batch(3), ["grad"]), {"loss": {"name": "cross_entropy", "options": {"label_smoothing": 0.5}}}),
        ((*batch(3), ["grad"]), {"parameters": "0.*"}),
        ((*batch(3), [{"name": "grad", "label": "other"}]), {}),
    ):
        ordinarily(program, *given, **options)  # where a verdict is kept
        assert same(engine.analyze(program, *given, **options), ordinarily(program, *given, **options))
    assert graphs.replays == 0


@pytest.mark.parametrize(
    "options", [{"verify": True}, {"part": engine.DataSetPart(0)}, {"channels_last": True}], ids=str
)
def test_what_is_never_captured(options, graphs):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"], times=4, **options)
    assert graphs.captures == 0


class Branches(nn.Module):
    """What it computes depends on numbers of the batch."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool(x.sum() > 0):
            return self.layer(x)
        return self.layer(2.0 * x)


class Refusing(Again):
    """As CUDA's: nothing may be read in the run that comes first."""

    def capture(self, run, given, results):
        with Unread():
            run()
        return super().capture(run, given, results)


def test_who_reads_the_batch_is_not_captured(graphs, monkeypatch, ordinarily):
    monkeypatch.setattr(replays, "_graph", Refusing)
    program = engine.load(torch.jit.script(Branches().double()))
    for k in range(6):
        x = torch.randn(3 + k // 3, 4, dtype=torch.float64) + k - 2
        given = x, torch.randn(len(x), 3, dtype=torch.float64), ["grad", "batch_l2"]
        ordinarily(program, *given, loss="mse")
        assert same(engine.analyze(program, *given, loss="mse"), ordinarily(program, *given, loss="mse"))
    assert (graphs.captures, graphs.replays) == (0, 0)
    assert len(replays.replays_of(program)._refused) == 1  # of whatever shapes


def test_who_reads_nothing_is(graphs, monkeypatch, ordinarily):
    monkeypatch.setattr(replays, "_graph", Refusing)
    program = engine.load(torch.jit.script(net()))
    given = [(batch(k)[0], torch.randn(6, 5, dtype=torch.float64)) for k in range(3)]
    for pair in given[:2]:
        engine.analyze(program, *pair, ["grad"], loss="mse")
    assert graphs.captures == 1
    found = engine.analyze(program, *given[2], ["grad"], loss="mse")
    assert same(found, ordinarily(program, *given[2], ["grad"], loss="mse"))
    assert graphs.replays == 1


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.sum().item(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: torch.equal(t, t),
        lambda t: t.to("meta"),
        lambda t: torch.empty(3, device="meta").copy_(t),
    ],
)
def test_reading_is_refused_before_a_capture(read):
    with pytest.raises(speculation.Unspeculative), Unread():
        read(torch.randn(3))


def test_another_answer_counts_for_nothing():
    seeds = torch.zeros(speculation.MOST_SEEDS, dtype=torch.int64)
    with speculation.recording() as answers:
        assert speculation.answer(torch.tensor(True))
        assert speculation.answers([torch.tensor(False)]) == [False]
    with speculation.speculating(answers, seeds) as run:
        assert speculation.answer(torch.tensor(True))
        assert speculation.answers([torch.tensor(False)]) == [False]
    assert bool(run.holds())
    with speculation.speculating(answers, seeds) as run:
        assert speculation.answer(torch.tensor(True))
        assert not speculation.answer(torch.tensor(True))
    assert not bool(run.holds())
    with speculation.speculating(answers, seeds) as run:
        speculation.answer(torch.tensor(True))
    with pytest.raises(speculation.Unspeculative):
        run.holds()
    with speculation.speculating([], seeds), pytest.raises(speculation.Unspeculative):
        speculation.answer(torch.tensor(True))


def test_progress_comes_to_its_end(graphs):
    program, told = engine.load(torch.jit.script(net())), []
    for k in range(RUNS + 1):
        ordinary = told[-1][1] if told else None
        told.clear()
        engine.analyze(program, *batch(k), ["diag_hessian"], progress=lambda done, total: told.append((done, total)))
    assert graphs.replays == 1
    assert told == [(ordinary, ordinary)]


@KEEPS_MEMORY
def test_graphs_go_where_memory_runs_out(graphs, ordinarily):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"])
    assert replays.drop() >= 1
    assert same(engine.analyze(program, *batch(3), ["grad"]), ordinarily(program, *batch(3), ["grad"]))
    assert graphs.replays == 0


class Two(nn.Module):
    """Takes two inputs, and edits the first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, y: torch.Tensor, factor: float) -> torch.Tensor:
        x.mul_(2.0)
        return self.layer(x + y) * torch.copysign(torch.ones_like(x[:, :1]), factor)


def pair(k):
    generator = torch.Generator().manual_seed(k)
    return [torch.randn(3, 4, dtype=torch.float64, generator=generator) for _ in range(2)]


def sharing():
    x = pair(9)[0]
    return x, x, 1.0


def views():
    wide = torch.cat(pair(9), 1)
    return wide[:, ::2], wide[:, 1::2], 1.0


ODD = {
    "inputs that share memory": sharing,
    "views": views,
    "minus zero": lambda: (*pair(9), -0.0),
    "a mapping that is no dict": lambda: UserDict(x=pair(9)[0], y=pair(9)[1], factor=1.0),
}


@pytest.mark.parametrize("kind_of_graph", [Again], indirect=True)  # a CPU's writes nothing of the caller's
@pytest.mark.parametrize("odd", ODD)
def test_batches_that_a_copy_would_change_are_not_replayed(odd, graphs, ordinarily):
    """Made anew for each analysis: whatever the program does to its inputs, it does to these."""
    program = engine.load(torch.jit.script(Two().double()))
    y, factor = torch.tensor([0, 1, 2]), 0.0 if odd == "minus zero" else 1.0
    for k in range(3):
        engine.analyze(program, (*pair(k), factor), y, ["grad"])
    assert graphs.replays == 1
    ordinarily(program, ODD[odd](), y, ["grad"])
    found = engine.analyze(program, ODD[odd](), y, ["grad"])
    assert same(found, ordinarily(program, ODD[odd](), y, ["grad"]))
    assert graphs.replays == 1


def test_another_batch_among_the_options_is_not_replayed(graphs, ordinarily):
    program = engine.load(torch.jit.script(net()))
    for k in range(4):
        request = [{"name": "batch_dot", "options": {"against": batch(k + 100)}}]
        ordinarily(program, *batch(k), request)
        assert same(engine.analyze(program, *batch(k), request), ordinarily(program, *batch(k), request))
    assert graphs.captures == 0


def test_parameters_that_lie_otherwise_are_another_matter(graphs, ordinarily):
    program = engine.load(torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double().eval()))
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    for _ in range(RUNS):
        engine.analyze(program, x, y, ["grad"])
    weight = program.parameters["0.weight"].tensor
    weight.data = weight.data.t()
    ordinarily(program, x, y, ["grad"])
    assert same(engine.analyze(program, x, y, ["grad"]), ordinarily(program, x, y, ["grad"]))
    assert graphs.replays == 0


def test_memory_that_runs_out_in_a_replay_lets_go_of_graphs(graphs, kind_of_graph, monkeypatch, ordinarily):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"])

    def lacking(self, given):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(kind_of_graph, "replay", lacking)
    assert same(engine.analyze(program, *batch(3), ["grad"]), ordinarily(program, *batch(3), ["grad"]))
    assert not replays.replays_of(program).captured()


@KEEPS_MEMORY
def test_planning_and_loading_let_go_of_graphs_where_memory_runs_out(graphs, monkeypatch):
    program = engine.load(torch.jit.script(net()))
    for make in (lambda: engine.plan(program, *batch(3), ["grad"]), lambda: engine.load(torch.jit.script(net()))):
        warmed(program, ["grad"])
        assert replays.replays_of(program).captured()
        failures = [torch.OutOfMemoryError("CUDA out of memory.")]

        def once(real, failures=failures):
            def run(*args, **options):
                if failures:
                    raise failures.pop()
                return real(*args, **options)

            return run

        with monkeypatch.context() as patch:
            patch.setattr(programs, "open_model", once(programs.open_model))
            patch.setattr(engine.Program, "run", once(engine.Program.run))
            make()
        assert not failures
        assert not replays.replays_of(program).captured()


def test_inputs_that_require_gradients_leave_nothing_behind(graphs):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"])
    (kind,) = replays.replays_of(program).captured()
    x, y = batch(3)
    x = (x.requires_grad_() * 2).clone()
    found = engine.analyze(program, x, y, ["grad"])
    assert graphs.replays == 1
    places = [*tensors(found), *getattr(kind.captured.graph, "_given", ())]
    assert not any(place.requires_grad or place.grad_fn is not None for place in places)


def test_plain_data_is_the_callers_own(graphs, monkeypatch):
    monkeypatch.setattr(replays, "_graph", Forgetting)
    program = engine.load(torch.jit.script(net()))
    request = [{"name": "kfac", "options": {"mc_samples": 2}}]
    first = [engine.analyze(program, *batch(k), request) for k in range(3)]
    for analysis in first:
        analysis.info["loss_options"]["label_smoothing"] = "mine"
        analysis.groups["kfac"].options["mc_samples"] = "mine"
        analysis.groups["kfac"].provenance.clear()
    found = engine.analyze(program, *batch(3), request)
    assert graphs.replays == 2
    assert found.info["loss_options"]["label_smoothing"] == 0
    assert found.groups["kfac"].options["mc_samples"] == 2
    assert found.groups["kfac"].provenance


def test_what_was_not_used_for_longest_goes_first(graphs, monkeypatch):
    monkeypatch.setattr(replays, "MOST_GRAPHS", 3)
    program = engine.load(torch.jit.script(net()))
    replays.drop()
    for N in (3, 4, 5):
        for k in range(RUNS):
            engine.analyze(program, *batch(k, N=N), ["grad"])
    engine.analyze(program, *batch(9, N=3), ["grad"])
    assert (len(replays.replays_of(program).captured()), graphs.replays) == (3, 1)
    for k in range(RUNS):
        engine.analyze(program, *batch(k, N=6), ["grad"])
    assert len(replays.replays_of(program).captured()) == 3
    engine.analyze(program, *batch(9, N=3), ["grad"])
    assert graphs.replays == 2
    engine.analyze(program, *batch(9, N=4), ["grad"])
    assert graphs.replays == 2


def test_selections_that_cannot_be_told_are_refused_as_ever(graphs):
    program = engine.load(torch.jit.script(net()))
    with pytest.raises(engine.EngineError):
        engine.analyze(program, *batch(0), ["grad"], parameters=[["0.*"]])


def test_dropping_while_another_thread_analyzes(graphs):
    program, failures = engine.load(torch.jit.script(net())), []

    def analyze():
        try:
            for k in range(30):
                engine.analyze(program, *batch(k, N=3 + k % 3), ["grad"])
        except BaseException as error:  # noqa: BLE001 - shown by the test
            failures.append(error)

    threads = [threading.Thread(target=analyze) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        replays.drop()
    assert not failures


@KEEPS_MEMORY
def test_a_graph_holds_on_to_what_the_program_may_drop(graphs):
    """It reads tensors of verdicts where these lie."""
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["batch_l2"])
    verdicts = [weakref.ref(verdict) for verdict in program.verdicts._kept.values()]
    program.verdicts._kept.clear()
    program.derived.clear()
    gc.collect()
    assert verdicts
    assert all(verdict() is not None for verdict in verdicts)
    replays.drop()
    gc.collect()
    assert not any(verdict() is not None for verdict in verdicts)


class Forgetting(Again):
    """As CUDA's, it keeps nothing of Python's."""

    def capture(self, run, given, results):
        found = run()
        self._results = results(found)
        return found

    def replay(self, given):
        Counted.replays += 1
        return self._results


def test_graphs_go_with_their_program(graphs, monkeypatch):
    monkeypatch.setattr(replays, "_graph", Forgetting)
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["batch_l2", "diag_ggn_mc"])
    gone = weakref.ref(program)
    del program
    gc.collect()
    assert gone() is None


def test_another_default_dtype_is_another_matter(graphs):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["grad"])
    torch.set_default_dtype(torch.float64)
    try:
        engine.analyze(program, *batch(3), ["grad"])
    finally:
        torch.set_default_dtype(torch.float32)
    assert graphs.replays == 0


def test_a_graph_needs_a_share_of_the_budget(graphs):
    program = engine.load(torch.jit.script(net()))
    warmed(program, ["batch_grad"], times=4, budget_bytes=200_000)
    assert graphs.captures == 0
