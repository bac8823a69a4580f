"""A CUDA graph of whatever a function asks of one device."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from curvature_engine.dispatch_modes import DispatchMode
from curvature_engine.speculation import Unspeculative

T = TypeVar("T")
aten = torch.ops.aten
_READING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
_BY_MASKS = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Unread(DispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what would have the host wait for a device, or send it something, as CUDA does in a capture.

    There a refusal spoils the capture, and memory may be lost with it: better that a run before it fails.

    Raises:
        Unspeculative: at such an operator.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in _BY_MASKS and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if func in _READING or masks:
            raise Unspeculative(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        if func in (aten._to_copy.default, aten.copy_.default) and len(_devices([result, *args])) > 1:
            raise Unspeculative(f"{func} copies from one device to another")
        return result


class CudaGraph:
    """A graph on one device.

    Attributes:
        lends: whether what a replay returns is written again by the next one.
        on_trial: whether a replay is to be compared with the function first.
    """

    lends = True
    on_trial = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph = torch.cuda.CUDAGraph()
        self._given: Sequence[Tensor] = ()
        self._results: Sequence[Tensor] = ()

    def capture(self, run: Callable[[], T], given: Sequence[Tensor], results: Callable[[T], Sequence[Tensor]]) -> T:
        """Take notice of what `run` asks of the device.

        It runs once before, as libraries load kernels and take memory when they are first called.

        Args:
            run: what is captured.
            given: tensors on the device to which others' numbers are copied for a replay.
            results: the tensors in what `run` returns that a replay makes.

        Raises:
            Unspeculative: it would wait for the device.
        """
        found = self._captured(run)
        self._given, self._results = given, results(found)
        return found

    def replay(self, given: Sequence[Tensor]) -> Sequence[Tensor]:
        """Do it once more with other numbers given; the results may not be there yet."""
        for place, tensor in zip(self._given, given, strict=True):
            place.copy_(tensor.detach(), non_blocking=True)
        self._graph.replay()
        return self._results

    def _captured(self, run: Callable[[], T]) -> T:
        current, stream = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream), Unread():  # type: ignore[no-untyped-call]
                run()
            stream.synchronize()
            # Other threads may go on meanwhile, with what would spoil a capture of the whole process.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                return run()
        finally:
            torch.cuda.set_stream(current)  # which torch leaves as it is where the end of a capture fails


def _devices(values: Sequence[Any]) -> set[str]:
    return {value.device.type for value in values if isinstance(value, Tensor)}
