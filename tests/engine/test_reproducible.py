"""What torch is set to while somebody probes on CUDA, and that nothing of it stays."""

import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import curvature_engine as engine
from curvature_engine import judgement, methods
from curvature_engine.reproducible import reproducible, without_cudnn

CUDA = torch.device("cuda")  # which need not be there


@contextmanager
def probing(device=CUDA):
    with reproducible(device), without_cudnn(device):
        yield


def settings():
    conv, rnn = torch.backends.cudnn.conv.fp32_precision, torch.backends.cudnn.rnn.fp32_precision
    return (
        torch.backends.cudnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        (conv, rnn, torch.backends.cuda.matmul.fp32_precision),
        list(warnings.filters),
    )


@pytest.fixture(autouse=True)
def _nothing_stays_changed():
    before = settings()
    yield
    assert settings() == before


@pytest.fixture(params=["ieee", "tf32"])
def _multiplying(request):
    """Settings that torch refuses to read by their older names, as they differ."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, request.param
    yield
    conv.fp32_precision = before


@pytest.mark.usefixtures("_multiplying")
def test_sums_are_made_in_one_order_and_without_cudnn():
    precision = settings()[3]
    with probing():
        assert settings()[:4] == (False, True, True, precision)
    assert torch.backends.cudnn.enabled


def test_after_an_error_all_is_as_before():
    with pytest.raises(ZeroDivisionError), probing():
        _ = 1 / torch.backends.cudnn.enabled  # which is off


def test_what_was_set_before_is_what_is_restored():
    torch.backends.cudnn.enabled = False
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        before = settings()
        with probing():
            assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert settings() == before
    finally:
        torch.backends.cudnn.enabled = True
        torch.use_deterministic_algorithms(False)


def test_within_each_other_the_outermost_counts():
    with probing():
        with probing():
            pass
        assert settings()[:3] == (False, True, True)


def test_of_two_threads_the_last_resets():
    entered, left, done = threading.Event(), threading.Event(), []

    def other():
        with probing():
            entered.set()
            left.wait(10)
            done.append(settings()[:3])

    thread = threading.Thread(target=other)
    with probing():
        thread.start()
        assert entered.wait(10)
    assert settings()[:3] == (False, True, True)
    left.set()
    thread.join()
    assert done == [(False, True, True)]


def test_on_a_cpu_nothing_is_changed():
    before = settings()
    with probing(torch.device("cpu")):
        assert settings() == before


def test_judging_and_confirming_happen_within(monkeypatch):
    """As on CUDA: every backward pass that attributes rows, or that a kept verdict is confirmed with."""
    seen = []
    send = judgement.backward

    def run(*arguments):
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.enabled))
        return send(*arguments)

    monkeypatch.setattr(judgement, "backward", run)
    monkeypatch.setattr(judgement, "reproducible", lambda device: reproducible(CUDA))
    monkeypatch.setattr(judgement, "without_cudnn", lambda device: without_cudnn(CUDA))
    monkeypatch.setattr(methods, "reproducible", lambda device: reproducible(CUDA))
    model = torch.jit.script(nn.Sequential(nn.Conv1d(2, 3, 2), Mirrored(), nn.Flatten(), nn.Linear(9, 2)).eval())
    program = engine.load(model)
    batch = torch.randn(3, 2, 4), torch.tensor([0, 1, 1])
    first = engine.analyze(program, *batch, ["batch_grad"])
    judged = len(seen)
    second = engine.analyze(program, *batch, ["batch_grad"])
    verification = [r.groups["batch_grad"].provenance["0.weight"]["verification"] for r in (first, second)]
    assert verification == ["this job", "kept verdict"]
    assert judged >= 2
    assert set(seen[:judged]) == {(True, False)}
    assert set(seen[judged:]) == {(True, True)}


class Mirrored(nn.Module):
    """Keeps samples apart in a way that no operator proves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(x.size(0) - 1, -1, -1)].flip(0)
