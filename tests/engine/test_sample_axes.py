"""What the operators prove of a pass need not be asked again; what they do not prove is."""

import warnings

import pytest
import torch
from tests.engine.following_models import (
    MIXES,
    POSITION_MIXES,
    PROVED,
    SCRIPTED_MIXES,
    UNPROVABLE,
    Gated,
    GatedPositions,
    Neighbours,
    SequenceFirst,
    Turned,
)
from tests.engine.models import N, exported, torchscript
from tests.engine.random_blocks import BLOCKS, COUPLERS
from tests.engine.random_nets import random_net
from tests.engine.reference import Reference
from torch import nn

import curvature_engine as engine
from curvature_engine import methods
from curvature_engine.judgement import judge, proved_strides, random_cotangent
from curvature_engine.sample_strides import sample_numbers
from curvature_engine.tape import Tape, backward

NETS = 150


class Asked:
    """How often the program was asked for its rows."""

    def __init__(self, monkeypatch):
        self.judged = self.confirmed = 0
        judge, confirm = methods.judge, methods.confirm

        def counted_judge(*arguments):
            self.judged += 1
            return judge(*arguments)

        def counted_confirm(*arguments):
            self.confirmed += 1
            return confirm(*arguments)

        monkeypatch.setattr(methods, "judge", counted_judge)
        monkeypatch.setattr(methods, "confirm", counted_confirm)


@pytest.fixture
def asked(monkeypatch):
    return Asked(monkeypatch)


class Program:
    """One loaded program, and its eager twin as the judge."""

    def __init__(self, module, inputs, way):
        self.module = module.double().eval()
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                nn.init.normal_(buffer)
        if way == "fixed":  # exported for this number of samples
            model = torch.export.export(self.module, inputs)
        else:
            model = exported(self.module, inputs) if way == "exported" else torchscript(self.module, inputs, way)
        self.program = engine.load(model)

    def check(self, *inputs):
        targets = torch.randn(self.module(*inputs).shape, dtype=torch.float64)
        expected = Reference(self.module, inputs, targets, "mse", "mean").batch_grad()
        result = engine.analyze(self.program, inputs, targets, ["batch_grad"], loss="mse")["batch_grad"]
        assert set(result) == set(expected)
        scale = max(float(value.abs().max()) for value in expected.values())
        for parameter, value in expected.items():
            torch.testing.assert_close(result[parameter], value, rtol=1e-9, atol=1e-10 * scale)


@pytest.mark.parametrize(("name", "way"), [(name, way) for name, (*_, ways) in PROVED.items() for way in ways])
@pytest.mark.filterwarnings("ignore:The tensor attributes self")
def test_a_second_batch_is_not_asked(name, way, asked):
    torch.manual_seed(0)
    make, inputs, _ = PROVED[name]
    module, first = make(), inputs()
    module.double().eval()(*first)  # lazy layers get their shapes
    program = Program(module, first, way)
    program.check(*first)
    for _ in range(2):
        program.check(*inputs())
    assert (asked.judged, asked.confirmed) == (1, 0)


def batch(gate):
    return torch.randn(N, N, dtype=torch.float64), torch.full((N, 1), gate, dtype=torch.float64)


def check_gated(module, way, asked):
    torch.manual_seed(0)
    program = Program(module, batch(0.0), way)
    for _ in range(2):
        program.check(*batch(0.0))
    assert asked.judged + asked.confirmed > 1
    with pytest.raises(engine.EngineError, match="coupled"):
        program.check(*batch(1.0))


@pytest.mark.parametrize("way", ["traced", "fixed"])
@pytest.mark.parametrize("mix", MIXES)
def test_a_mixture_that_wakes_up_is_refused(mix, way, asked):
    check_gated(Gated(MIXES[mix]), way, asked)


@pytest.mark.parametrize("mix", POSITION_MIXES)
def test_expanded_positions_that_mix_when_woken_up_are_refused(mix, asked):
    check_gated(GatedPositions(POSITION_MIXES[mix]), "traced", asked)


@pytest.mark.parametrize("mix", [mix for mix in COUPLERS if "batch_norm" not in mix])
def test_what_mixes_random_nets_is_refused_when_it_wakes_up(mix, asked):
    names = {"torch": torch, "F": torch.nn.functional}
    check_gated(Gated(eval(f"lambda h: {mix.replace('{h}', 'h')}", names)), "traced", asked)


@pytest.mark.parametrize("module", SCRIPTED_MIXES)
def test_a_mixture_out_of_the_operators_sight_is_refused_when_it_wakes_up(module, asked):
    check_gated(module(), "scripted", asked)


@pytest.mark.parametrize("turn", UNPROVABLE)
def test_what_is_not_proved_is_asked_every_time(turn, asked):
    torch.manual_seed(0)
    x = torch.randn(N, 3, dtype=torch.float64)
    program = Program(Turned(UNPROVABLE[turn]), (x,), "traced")
    for scale in (1.0, 2.0, -1.0):
        program.check(scale * x)
    assert asked.judged + asked.confirmed >= 3


def test_inputs_with_the_sequence_first_are_asked_every_time(asked):
    torch.manual_seed(0)
    x = torch.randn(N, N, 4, dtype=torch.float64)
    program = Program(SequenceFirst(), (x,), "scripted")
    for scale in (1.0, 2.0):
        program.check(scale * x)
    assert asked.judged + asked.confirmed >= 2


def test_a_matrix_of_neighbours_is_asked_every_time(asked):
    torch.manual_seed(0)
    x, own = torch.randn(N, 3, dtype=torch.float64), torch.eye(N, dtype=torch.float64)
    program = Program(Neighbours(), (x, own), "scripted")
    program.check(x, own)
    program.check(x, own.roll(1, 0))
    assert asked.judged + asked.confirmed >= 2
    with pytest.raises(engine.EngineError, match="coupled"):
        program.check(x, own + own.roll(1, 0))


def passed(program, inputs):
    tape = Tape()
    for parameter in program.parameters.values():
        for tensor in parameter.tensors:
            tensor.requires_grad_()
        tape.watch(parameter.name, parameter.tensors)
    return program.run(inputs, tape)


def check_taps(forward):
    """Of every tap whose samples are proved: a sample's outputs reach nothing but its own elements."""
    u = random_cotangent(forward.outputs)
    taps = [tap for tap in forward.tape.taps if tap.stride is not None]
    for sample in range(len(u)):
        alone = torch.zeros_like(u)
        alone[sample] = u[sample]
        arrived = backward(forward.outputs, [tap.edges[0] for tap in taps], alone)
        for tap, gradient in zip(taps, arrived, strict=True) if arrived else ():
            if gradient is not None:
                numbers = sample_numbers(tap.shapes[0], tap.stride, len(u), gradient.device)
                assert not gradient.reshape(tap.shapes[0])[numbers != sample].any(), tap


def is_proved(net):
    """Whether a net's second batch would not be asked; what is proved of it is checked."""
    program = engine.load(net.readable())
    others = tuple(torch.randn_like(x) if x.is_floating_point() else x.flip(0) for x in net.inputs)
    first = passed(program, others)
    if not first.samples.keeps_rows(first.outputs):
        return False
    verdict = judge(first.outputs, first.tape, program.parameters)  # which refuses nothing that is proved
    strides = proved_strides(verdict, first.outputs, first.tape, first.samples)
    second = passed(program, net.inputs)
    if strides is None or not second.samples.keeps_rows(second.outputs):
        return False
    if strides != tuple(tap.stride for tap in second.tape.taps):
        return False
    judge(second.outputs, second.tape, program.parameters)
    cotangent = random_cotangent(second.outputs)
    known = [i for i, tap in enumerate(verdict.taps) if tap.attribution is not None]
    arrived = backward(second.outputs, [second.tape.taps[i].edges[0] for i in known], cotangent)
    gradients = {i: second.tape.taps[i].shaped([g])[0] for i, g in zip(known, arrived, strict=True)} if known else {}
    assert methods.confirm(verdict, second.outputs, second.tape, cotangent, gradients)
    check_taps(second)
    return True


def test_what_is_proved_of_random_nets_is_what_the_probe_finds():
    proved = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(NETS):
            net = random_net(seed, BLOCKS, COUPLERS)
            if "F.batch_norm" in net.source:  # refused for its training mode
                continue
            try:
                proved += is_proved(net)
            except Exception as error:
                error.add_note(str(net))
                raise
    assert proved > NETS // 2, proved
