"""Where the host waits for a device: operators that read numbers back, or copy small tensors there, seen on any device.

On a GPU each of these lets the queue of kernels run dry. `torch.cuda.set_sync_debug_mode` sees them there; this sees
what would be one, on the CPU.
"""

import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import curvature_engine

ENGINE = Path(curvature_engine.__file__).parent
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}


class HostReads:
    """Collects, as long as it lasts, `file:function` of the engine → how often the host read or sent numbers there."""

    def __init__(self):
        self.found = Counter()
        self._modes = (_Operators(self._note), _Calls(self._note))

    def _note(self, what):
        frames = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ENGINE)]
        frames = [f for f in frames if Path(f.filename).name != "speculation.py"]  # who asks counts, not how
        where = f"{Path(frames[-1].filename).relative_to(ENGINE)}:{frames[-1].name}" if frames else "outside"
        self.found[f"{where} ({what})"] += 1

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self.found

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, note):
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS or self._reads_a_mask(func, args):
            self._note(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _reads_a_mask(func, args):
        """Indexing with booleans counts them first."""
        if func not in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            return False
        return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])


class _Calls(TorchFunctionMode):
    def __init__(self, note):
        super().__init__()
        self._note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.tensor, torch.as_tensor):
            self._note(name)
        return func(*args, **(kwargs or {}))
