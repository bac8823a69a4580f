"""Backward passes that round alike, however often they are made and whatever the samples are scaled by.

The probe sends a cotangent more than once, with every sample's part scaled, and takes what comes back otherwise scaled
for coupled samples. On the CPU an element of a sample's gradient is made of that sample's numbers, in one order. On
CUDA there are kernels that add in whatever order their threads arrive, with other roundings each time: they are
switched off for as long as somebody probes.

What the closed forms are compared with is made without cuDNN, whose reproducible ways to a convolution's weight
gradient include transforms of large tiles that lose digits: 4e-3 of the largest entry was seen, where the closed form
had 2e-7. Which library makes a convolution's backward pass is decided when that runs, not when its graph was recorded.
Recurrent operators that cuDNN ran forwards stay cuDNN's backwards.

The settings are the whole process's: of analyses side by side the first makes them and the last resets them.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Have sums made in one order on a device."""
    with _held(_ONE_ORDER, device):
        yield


@contextmanager
def without_cudnn(device: torch.device) -> Iterator[None]:
    """Have convolutions' gradients made as products of matrices on a device."""
    with _held(_NO_CUDNN, device):
        yield


@contextmanager
def _held(settings: "_Settings", device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    settings.take()
    try:
        yield
    finally:
        settings.give()


class _Settings:
    """torch's, as long as anybody holds them.

    Args:
        make: makes them, and has a stack reset them.
    """

    def __init__(self, make: Callable[[ExitStack], None]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._holders = 0
        self._before = ExitStack()

    def take(self) -> None:
        with self._lock:
            if not self._holders:
                with ExitStack() as before:
                    self._make(before)
                    self._before = before.pop_all()
            self._holders += 1

    def give(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._before.close()


def _add_in_one_order(before: ExitStack) -> None:
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    before.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")  # of kernels that have no such form
    before.callback(torch.use_deterministic_algorithms, deterministic, warn_only=only_warned)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _leave_cudnn_out(before: ExitStack) -> None:
    # Not by `cudnn.flags`: that resets how float32 is multiplied as well.
    before.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
    torch.backends.cudnn.enabled = False


_ONE_ORDER, _NO_CUDNN = _Settings(_add_in_one_order), _Settings(_leave_cudnn_out)
