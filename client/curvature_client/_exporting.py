"""An nn.Module as a torch.export program whose batch axis is dynamic, checked against the module itself.

torch.export may change what a model means without a word: a custom autograd function's backward, for one, is lost. So
outputs are compared on the whole batch, and gradients on two samples, before an export is trusted.
"""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Inputs = tuple[Any, ...] | dict[str, Any]

_SAMPLES = 2
"""torch.export takes sizes 0 and 1 for fixed. As always the same number is exported with, equal models have equal
files whatever the batch, but for a batch of one sample: see `_general`."""

_TOLERANCES = {"torch.float64": 1e-9, "torch.float32": 1e-4}
_HALF_TOLERANCE = 5e-2


def export(module: Any, inputs: Inputs, folder: Path, further: Sequence[Inputs] = ()) -> Path:
    """Export, check and save a module that computes like the one it was copied from.

    Args:
        module: on the CPU; left as it is.
        inputs: of one batch.
        folder: holds the file.
        further: inputs of other batches that the program must take, too.

    Raises:
        Exception: whatever torch raises where it cannot, and RuntimeError where the export computes something else.
    """
    import torch

    if any(part.training for part in module.modules()):
        raise RuntimeError("a module that is kept in training mode draws random numbers")
    N = _samples(inputs)
    sizes = {N, *map(_samples, further)}
    small = _mapped(inputs, lambda t: _two(t) if t.dim() and t.shape[0] == N else t)
    positional, keyword = ((), small) if isinstance(small, dict) else (small, {})
    batched = {0: torch.export.Dim.DYNAMIC}
    axes = _mapped(inputs, lambda t: batched if t.dim() and t.shape[0] == N else None)
    with quiet(), torch.random.fork_rng(devices=[]):
        with _general(1 in sizes):
            program = torch.export.export(module, _cloned(positional), _cloned(keyword), dynamic_shapes=axes)
        if 1 in sizes and _takes_several(program):
            if len(sizes) > 1:
                raise RuntimeError("it treats one sample differently from several, and batches of both kinds came")
            small = inputs
            positional, keyword = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
            program = torch.export.export(module, _cloned(positional), _cloned(keyword))
        program.example_inputs = None  # the user's data are no part of the model
        path = save_export(program, folder)
        exported = program.module()
        for each in (inputs, *further):
            check_outputs(module, exported, each, "exported program")
        _check_gradients(module, exported, small)
    return path


@contextmanager
def _general(one: bool) -> Iterator[None]:
    """Export for sizes from 0 on where a batch has one sample.

    By default torch derives what the program does from sizes of at least 2, writes that down as the range of the batch
    axis, and one sample is refused. Told not to, it says "from 2 on" only where the module itself asks.
    """
    import torch.fx.experimental._config as config

    if not one:
        yield
        return
    with config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


def _takes_several(program: Any) -> bool:
    """Whether the program's ranges or guards leave one sample out: the module, or a layer, treats it differently."""
    return bool(program._guards_code) or any(bounds.lower > 1 for bounds in program.range_constraints.values())


def save_export(program: Any, folder: Path) -> Path:
    """Write an exported program; equal ones give equal bytes."""
    import torch

    path = folder / "model.pt2"
    with quiet():
        torch.export.save(program, path)
    return path


def _samples(inputs: Inputs) -> int:
    sizes = [int(t.shape[0]) for t in _flat(inputs) if t.dim()]
    if not sizes:
        raise RuntimeError("no input has a batch axis")
    return max(sizes, key=sizes.count)


def _two(tensor: Any) -> Any:
    import torch

    return tensor[:_SAMPLES] if tensor.shape[0] >= _SAMPLES else torch.cat([tensor] * _SAMPLES)


def check_outputs(module: Any, converted: Any, inputs: Inputs, name: str) -> None:
    """Hold what a module became against itself.

    Raises:
        Exception: whatever either raises, and RuntimeError where they differ.
    """
    import torch

    found = []
    for each in (module, converted):
        with torch.no_grad(), _restored(each):
            found.append([output.clone() for output in _outputs(each, inputs)])
    ours, theirs = found
    if len(ours) != len(theirs) or not all(_close(a, b) for a, b in zip(ours, theirs, strict=True)):
        raise RuntimeError(f"the {name}'s outputs are not the module's")


def _check_gradients(module: Any, exported: Any, inputs: Inputs) -> None:
    found = []
    for each in (module, exported):
        with _restored(each):
            found.append(_gradients(each, inputs))
    ours, theirs = found
    for name, gradient in ours.items():
        other = theirs.get(name)
        if (gradient is None) != (other is None) or (gradient is not None and not _close(gradient, other)):
            raise RuntimeError(f"the exported program's gradient of {name} is not the module's")


def _outputs(module: Any, inputs: Inputs) -> list[Any]:
    """The floating-point outputs, flat."""
    import torch
    from torch.utils._pytree import tree_leaves

    given = _cloned(inputs)
    returned = module(**given) if isinstance(given, dict) else module(*given)
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _gradients(module: Any, inputs: Inputs) -> dict[str, Any]:
    """Of the outputs' product with the same random numbers each time."""
    import torch

    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    outputs = [output for output in _outputs(module, inputs) if output.requires_grad]
    if not outputs or not parameters:
        return dict.fromkeys(parameters)
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(outputs, list(parameters.values()), cotangents, allow_unused=True)
    return dict(zip(parameters, found, strict=True))


@contextmanager
def _restored(module: Any) -> Iterator[None]:
    """Put the buffers that forward edits back afterwards."""
    import torch

    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                if not torch.equal(buffer, before[name]):
                    buffer.copy_(before[name])


def _close(ours: Any, theirs: Any) -> bool:
    import torch

    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if torch.equal(ours, theirs):
        return True
    scale = float(ours.abs().max())
    tolerance = _TOLERANCES.get(str(ours.dtype), _HALF_TOLERANCE) * scale
    return bool(torch.allclose(ours.double(), theirs.double(), rtol=0, atol=tolerance, equal_nan=True))


def _mapped(inputs: Inputs, function: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(function(tensor) for tensor in inputs)


def _cloned(inputs: Any) -> Any:
    return _mapped(inputs, lambda tensor: tensor.clone())


def _flat(inputs: Inputs) -> list[Any]:
    return list(inputs.values() if isinstance(inputs, dict) else inputs)


@contextmanager
def quiet() -> Iterator[list[warnings.WarningMessage]]:
    """Keep what torch's compilers warn about and log from the user, and from `-W error`."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield caught
    finally:
        logging.disable(before)
