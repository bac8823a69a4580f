"""The registry of model formats, tried in order.

A new format is one file here and one line below.
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from curvature_engine.errors import EngineError
from curvature_engine.formats.base import FrontEnd, Inputs, Use
from curvature_engine.formats.export import Export
from curvature_engine.formats.torchscript import TorchScript

FORMATS: tuple[type[FrontEnd], ...] = (Export, TorchScript)

__all__ = ["FORMATS", "FrontEnd", "Inputs", "Use", "open_model"]


def open_model(model: Any, device: torch.device, *, eval: bool) -> FrontEnd:
    """The front end of a file (its kind is read off the archive) or of an object.

    Raises:
        EngineError: `invalid_model`, `no_parameters`, `unsupported_model`.
    """
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        return _format_of_file(path).from_file(path, device, eval=eval)
    for kind in FORMATS:
        if kind.accepts(model):
            return kind.from_object(model, device, eval=eval)
    raise EngineError(
        "invalid_model",
        f"a model is a path, an ExportedProgram, a ScriptModule or an nn.Module; got {type(model).__name__}",
        param="model",
        remedy="export it with torch.export, or script or trace it with torch.jit",
    )


def _format_of_file(path: Path) -> type[FrontEnd]:
    if not path.is_file():
        raise EngineError("invalid_model", f"there is no file {path.name}", param="model", remedy="check the path")
    if not zipfile.is_zipfile(path):
        raise _not_a_model(path, f"not a complete zip archive ({path.stat().st_size} bytes)")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise _not_a_model(path, str(error)) from error
    found = next((kind for kind in FORMATS if kind.holds(entries)), None)
    if found is None:
        raise _not_a_model(path, "an archive of another kind")
    return found


def _not_a_model(path: Path, reason: str) -> EngineError:
    return EngineError(
        "invalid_model",
        f"{path.name} is no TorchScript file and no exported program: {reason}",
        param="model",
        remedy=f"save the model with {' or '.join(kind.save_with for kind in FORMATS)}",
    )
