"""Backward passes that round alike, however often they are made and whatever the samples are scaled by.

The probe sends a cotangent more than once, with every sample's part scaled, and takes what comes back otherwise scaled
for coupled samples. On the CPU an element of a sample's gradient is made of that sample's numbers, in one order. On
CUDA two things come between, and are switched off for as long as somebody probes:

- kernels that add in whatever order their threads arrive: other roundings each time;
- cuDNN's convolutions, which may be made by transforms over more than one sample at once (two real signals in one
  complex one). Their rounding goes by the largest number among all of these, so one sample's leaks into another's. The
  transforms with large tiles also lose digits that the closed forms keep. Without cuDNN every sample's gradient is a
  product of matrices.

Which library makes a convolution's backward pass is decided when that runs, not when its graph was recorded. Recurrent
operators that cuDNN ran forwards stay cuDNN's backwards. The settings are the whole process's: of analyses side by side
the first to probe makes them and the last resets them.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Have sums made in one order, and each sample's from its own numbers, on a device."""
    if device.type != "cuda":
        yield
        return
    _SETTINGS.take()
    try:
        yield
    finally:
        _SETTINGS.give()


class _Settings:
    """torch's, as long as anybody holds them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._before = ExitStack()

    def take(self) -> None:
        with self._lock:
            if not self._holders:
                self._set()
            self._holders += 1

    def give(self) -> None:
        with self._lock:
            self._holders -= 1
            if not self._holders:
                self._before.close()

    def _set(self) -> None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
        # Not by `cudnn.flags`: that resets how float32 is multiplied as well.
        cudnn = torch.backends.cudnn.enabled
        with ExitStack() as before:
            before.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # of kernels that have no such form
            before.callback(torch.use_deterministic_algorithms, deterministic, warn_only=only_warned)
            torch.use_deterministic_algorithms(True, warn_only=True)
            before.callback(setattr, torch.backends.cudnn, "enabled", cudnn)
            torch.backends.cudnn.enabled = False
            self._before = before.pop_all()


_SETTINGS = _Settings()
