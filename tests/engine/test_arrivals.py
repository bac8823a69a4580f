"""Gradients at the taps are reduced as they arrive: the same numbers, with less held at a time."""

from contextlib import nullcontext

import pytest
import torch
from tests.engine.models import build, targets_for, torchscript
from tests.engine.test_chunks import EVERYTHING
from tests.engine.test_table import BY_NAME
from torch import nn

import curvature_engine as engine
from curvature_engine import columns, probe, streaming
from curvature_engine.extensions.first_order import _BatchL2
from curvature_engine.pages import PAGES
from curvature_engine.streaming import Arrivals

SUMMED_OVER_PARAMETERS = "norms"  # over="model": in another order, so rounded otherwise
KFLR = {"name": "kflr", "label": "expanded", "options": {"approximation": "expand"}}
REQUESTS = ["grad", *(r for r in EVERYTHING if r != "grad"), KFLR]


@pytest.fixture
def streamed(monkeypatch):
    """Have all jobs stream, and count the columns that do."""
    found, original = [], columns.Columns._stream

    def counted(self, *arguments, **options):
        found.append(1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(columns.Columns, "_stream", counted)
    monkeypatch.setattr(streaming, "LEAST_BYTES", 0)
    return found


def case(name):
    module, inputs = build(BY_NAME[name])
    return engine.load(torchscript(module, inputs, "scripted")), inputs, targets_for(module(*inputs), "cross_entropy")


@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "cnn", "residual_batchnorm", "tied_embedding", "shared_weight", "attention", "in_place", "lstm"),
        *("sequence_first", "two_inputs", "if_and_loop", "packed_projection", "frozen_parameter", "extra_axis"),
    ],
)
def test_the_same_bits_in_the_same_order(name, streamed, monkeypatch):
    program, inputs, targets = case(name)
    found = engine.analyze(program, inputs, targets, REQUESTS, loss="cross_entropy")
    assert streamed
    monkeypatch.setattr(streaming, "LEAST_BYTES", 2**60)
    streamed.clear()
    expected = engine.analyze(program, inputs, targets, REQUESTS, loss="cross_entropy")
    assert not streamed
    for label, group in expected.groups.items():
        assert list(found.groups[label].tensors) == list(group.tensors)
        assert found.groups[label].missing == group.missing
        for key, tensor in group.tensors.items():
            if label == SUMMED_OVER_PARAMETERS:
                torch.testing.assert_close(found.groups[label].tensors[key], tensor, rtol=1e-13, atol=1e-15)
            else:
                torch.testing.assert_close(found.groups[label].tensors[key], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["no_rule", "weight_norm"])
def test_what_needs_further_backward_passes_does_not_stream(name, streamed):
    program, inputs, targets = case(name)
    engine.analyze(program, inputs, targets, ["batch_grad"], loss="cross_entropy")
    assert not streamed


def test_what_is_verified_does_not_stream(streamed):
    program, inputs, targets = case("mlp")
    engine.analyze(program, inputs, targets, ["batch_grad"], verify=True)
    assert not streamed


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    "name", ["cnn", "residual_batchnorm", "tied_embedding", "shared_weight", "no_rule", "weight_norm"]
)
def test_what_lets_go_as_it_goes_has_the_numbers_of_all_together(name, streams, streamed, monkeypatch):
    program, inputs, targets = case(name)
    together = engine.analyze(program, inputs, targets, REQUESTS, loss="cross_entropy")
    if not streams:
        monkeypatch.setattr(streaming, "LEAST_BYTES", 2**60)
    for alone in REQUESTS:
        for requests in [[alone]] if alone == "grad" else [[alone], ["grad", alone]]:
            found = engine.analyze(program, inputs, targets, requests, loss="cross_entropy")
            for label, group in found.groups.items():
                for key, value in group.tensors.items():
                    expected = together.groups[label].tensors[key]
                    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-13, equal_nan=True)


def deep():
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return engine.load(torch.jit.script(nn.Sequential(*layers, nn.Linear(8, 3)))), torch.randn(5, 8)


def test_a_gradient_is_let_go_before_the_next_but_one(streamed, monkeypatch):
    held, receive = [], Arrivals.receive

    def watched(self, number, gradient):
        receive(self, number, gradient)
        held.append(len(self._gradients))

    monkeypatch.setattr(Arrivals, "receive", watched)
    program, x = deep()
    engine.analyze(program, x, torch.randint(0, 3, (5,)), ["variance", "diag_ggn_mc"])
    assert held == [0] * 14


@pytest.mark.parametrize(("extensions", "kept"), [(["variance"], 0), (["diag_ggn_exact"], 4)])
def test_inputs_stay_arranged_for_further_columns_alone(extensions, kept, streamed, monkeypatch):
    held = []

    class Watched(engine.passes.BackwardPasses):
        def compute(self):
            super().compute()
            uses = {id(u.arranged): u.arranged for each in self._methods.uses.values() for u in each}
            held.append(sum(a._saved is not None for a in uses.values()))

    monkeypatch.setattr(engine.preparation, "BackwardPasses", Watched)
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(5, 4, 3), nn.Flatten(), nn.Linear(24, 3))
    engine.analyze(torch.jit.script(module), torch.randn(6, 5, 8), torch.randint(0, 3, (6,)), extensions)
    assert held == [kept]


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("extensions", "goes"),
    [
        (["grad"], True),
        (["variance"], True),
        (["grad", "variance"], True),
        (["grad", "diag_ggn_mc"], True),
        (["variance", "diag_ggn_mc"], False),
        (["grad", "variance", "diag_ggn_mc"], False),
    ],
)
def test_the_graph_and_what_was_saved_go_with_the_last_column(extensions, goes, streams, streamed, monkeypatch):
    seen = []

    class Watched(engine.passes.BackwardPasses):
        def compute(self):
            super().compute()
            kept = nullcontext() if not goes else pytest.raises(RuntimeError, match="second time")
            leaves = [t for p in self._selected.values() for t in p.tensors]
            with kept:
                torch.autograd.grad(self._part.outputs.sum(), leaves)
            taps = self._part.forward.tape.taps
            assert all(not tap.saved for tap in taps) if goes else all(tap.saved for tap in taps)
            seen.append(len(taps))

    monkeypatch.setattr(engine.preparation, "BackwardPasses", Watched)
    if not streams:
        monkeypatch.setattr(streaming, "LEAST_BYTES", 2**60)
    program, x = deep()
    engine.analyze(program, x, torch.randint(0, 3, (5,)), extensions)
    assert seen == [7]
    assert bool(streamed) == (streams and extensions != ["grad"])


def test_one_column_that_second_derivatives_follow_keeps_its_graph(streamed):
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    x, targets = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 1, dtype=torch.float64)
    program = engine.load(torch.jit.script(module))
    found = engine.analyze(program, x, targets, ["diag_hessian"], loss="mse")
    assert found.plan.columns["exact"] == 1
    names, parameters = zip(*module.named_parameters(), strict=True)

    def loss(*values):
        return nn.functional.mse_loss(
            torch.func.functional_call(module, dict(zip(names, values, strict=True)), x), targets
        )

    hessian = torch.autograd.functional.hessian(loss, parameters)
    for i, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        n = parameter.numel()
        expected = hessian[i][i].reshape(n, n).diagonal().view_as(parameter)
        torch.testing.assert_close(found["diag_hessian"][name], expected, rtol=1e-10, atol=1e-13)


def test_a_plan_counts_what_is_held(streamed, monkeypatch):
    program, x = deep()
    targets = torch.randint(0, 3, (5,))
    batch = x.repeat(1000, 1), targets.repeat(1000)
    engine.analyze(program, *batch, ["variance"])
    with_stream = engine.plan(program, *batch, ["variance"])
    work = []

    class Watched(engine.passes.BackwardPasses):
        def enter(self, part):
            super().enter(part)
            work.append((self.tap_bytes(), self.waiting_bytes()))

    monkeypatch.setattr(engine.preparation, "BackwardPasses", Watched)
    assert engine.plan(program, *batch, ["variance"]) == with_stream
    ((all_taps, waiting),) = work
    assert waiting == 2 * 5000 * 8 * 4  # one that passes, and the first layer's, where the way ends
    assert all_taps == (6 * 8 + 3) * 5000 * 4


@pytest.mark.parametrize("error", [RuntimeError("something else"), ValueError("odd"), KeyboardInterrupt()])
def test_an_error_while_gradients_arrive_stays_what_it_is(error, streamed, monkeypatch):
    program, x = deep()
    targets, reduce = torch.randint(0, 3, (5,)), _BatchL2.reduce
    expected = engine.analyze(program, x, targets, ["batch_l2"])

    def fail(*arguments):
        raise error

    monkeypatch.setattr(_BatchL2, "reduce", fail)
    with pytest.raises(type(error)) as raised:
        engine.analyze(program, x, targets, ["batch_l2"])
    assert raised.value is error
    monkeypatch.setattr(_BatchL2, "reduce", reduce)
    found = engine.analyze(program, x, targets, ["batch_l2"])
    for name, norms in expected["batch_l2"].items():
        assert torch.equal(found["batch_l2"][name], norms)


def test_memory_that_runs_out_while_gradients_arrive(streamed, monkeypatch):
    program, x = deep()
    calls, reduce = [], _BatchL2.reduce

    def fails_once(self, contribution):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return reduce(self, contribution)

    monkeypatch.setattr(_BatchL2, "reduce", fails_once)
    PAGES.drop()  # what waits from other analyses would go first, and all be tried again as it was
    found = engine.analyze(program, x, torch.randint(0, 3, (5,)), ["batch_l2"])
    assert found.plan.chunks == 2
    assert any("began again" in warning for warning in found.warnings)


def test_a_layer_that_the_backward_pass_leaves_out_is_no_zero(streamed, monkeypatch):
    program, x = deep()
    hooked = streaming._hooked
    monkeypatch.setattr(streaming, "_hooked", lambda hooks: hooked(dict(list(hooks.items())[1:])))
    with pytest.raises(engine.EngineError, match="did not come by the layers of") as refused:
        engine.analyze(program, x, torch.randint(0, 3, (5,)), ["batch_l2"])
    assert refused.value.code == "verification_failed"


@pytest.mark.parametrize("name", ["cnn", "attention", "lstm", "sequence_first", "tied_embedding"])
def test_the_probe_finds_the_same_a_piece_at_a_time(name, monkeypatch):
    program, inputs, targets = case(name)
    engine.analyze(program, inputs, targets, ["batch_grad"], loss="cross_entropy")
    (whole,) = program.verdicts._kept.values()
    program, inputs, targets = case(name)
    monkeypatch.setattr(probe, "_PIECE_ELEMENTS", 3)
    engine.analyze(program, inputs, targets, ["batch_grad"], loss="cross_entropy")
    (found,) = program.verdicts._kept.values()
    assert (found.mismatched, found.strides) == (whole.mismatched, whole.strides)
    for one, other in zip(found.taps, whole.taps, strict=True):
        assert (one.pure, one.reached) == (other.pure, other.reached)
        assert (one.attribution is None) == (other.attribution is None)
        if one.attribution is not None:
            assert (one.attribution.order, one.attribution.R) == (other.attribution.order, other.attribution.R)


def test_digits_tell_samples_apart():
    code = probe.Code(130, 64)  # two digits
    sample = torch.tensor([0, 1, 63, 64, 129])
    base = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0])
    others = [base * factors[sample].float() for factors in code.factors(torch.device("cpu"))]
    base = torch.cat([base, torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0])])
    first = torch.cat([others[0], torch.tensor([0.0, 3.0, float("inf"), 1e30, 2.0**60])])
    second = torch.cat([others[1], torch.tensor([0.0, 1.0, 1.0, 0.0, 8.0])])
    digits = [probe.digits_of_elements([base], [other], code)[0] for other in (first, second)]
    found = probe.samples_of_elements(digits, code).tolist()
    assert found[:5] == sample.tolist()
    # Silence; two samples' sum; what overflowed; what is silent in one and loud in the other; a number beyond N.
    assert found[5:] == [probe.UNKNOWN, probe.MIXED, probe.UNREADABLE, probe.MIXED, probe.MIXED]
