"""How much memory one analysis may take, and how it is divided.

The budget covers what an analysis makes: the forward pass's graph, gradients, intermediates, and results that stay in
memory. It does not cover what is there before: the process, the model, the batch. It is configured, by default a
fixed share of the device's whole memory, never what happens to be free: the same request gets the same plan, and with
it the same bits.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch

from curvature_engine.errors import EngineError

_SHARE = 0.5
_BLOCK_BYTES = 256 * 2**20
"""Larger blocks are no faster: they leave the caches."""
_LEAST_BLOCK_BYTES = 1


@dataclass(frozen=True)
class Budget:
    """Bytes for one analysis.

    Attributes:
        total_bytes: all of it.
        block_bytes: for the individual gradients of one parameter that are written out at a time.
    """

    total_bytes: int
    block_bytes: int

    @classmethod
    def of(cls, total_bytes: int | None, device: torch.device) -> "Budget":
        """The budget that was configured, or the device's default.

        Raises:
            EngineError: `invalid_option`.
        """
        total = (
            default_budget_bytes(device) if total_bytes is None else check_whole_number("budget_bytes", total_bytes, 1)
        )
        return cls(total, max(_LEAST_BLOCK_BYTES, min(_BLOCK_BYTES, total // 16)))

    @property
    def forward_bytes(self) -> int:
        """For the graph of one chunk's forward pass: a quarter, since gradients and rearranged inputs come on top."""
        return self.total_bytes // 4

    @property
    def whole_bytes(self) -> int:
        """For the graph of the whole batch's, if the gradients at its taps fit beside it: half."""
        return self.total_bytes // 2

    @property
    def idle_bytes(self) -> int:
        """For memory of former results that waits for the next: a quarter; what the budget's plan needs comes first."""
        return self.total_bytes // 4

    def with_smaller_blocks(self) -> "Budget":
        """The same with blocks of half the size."""
        return replace(self, block_bytes=max(_LEAST_BLOCK_BYTES, self.block_bytes // 2))


def default_budget_bytes(device: torch.device) -> int:
    """A fixed share of the device's whole memory."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(_SHARE * total)


def check_whole_number(name: str, value: Any, least: int) -> int:
    """The value, if it is a whole number from `least` on that fits 64 bits.

    Raises:
        EngineError: `invalid_option`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise EngineError(
            "invalid_option",
            f"{name} must be a whole number from {least} to {2**63 - 1}; got {value!r}",
            param=name,
            remedy="pass an int",
        )
    return value
