"""Admission of `torch.export` archives: only the program's description and plain tensors pass.

The engine reads both as data. Whatever could be unpickled, imported or loaded as a library is refused or left out.
"""

import json
import re
import zipfile
from collections.abc import Collection
from typing import Any

from curvature_worker.refusal import Refusal

SAVE = "save it with torch.export.save(torch.export.export(model, …), path)"

_PROGRAM = "models/model.json"
_CONFIGS = {"weights": r"weight_\d+", "constants": r"tensor_\d+"}
_KEPT = re.compile(
    r"archive_format|archive_version|byteorder|models/model\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
)
_DROPPED = re.compile(r"data/sample_inputs/.*|\.data/.*|extra/.*")
"""Example inputs are pickled; the engine needs neither them nor the rest."""
_MAX_JSON_BYTES = 512 * 2**20


def is_export(entries: Collection[str]) -> bool:
    """Whether an archive with these entries (without their common folder) is an exported program."""
    return "archive_format" in entries or any(entry.startswith("models/") for entry in entries)


def is_kept(entry: str) -> bool:
    """Whether an entry goes into the admitted archive."""
    return _KEPT.fullmatch(entry) is not None


def check_export(archive: zipfile.ZipFile, root: str) -> Refusal | None:
    """Judge an exported program's entries, all in the folder `root`."""
    entries = {e.filename.removeprefix(f"{root}/"): e for e in archive.infolist() if not e.is_dir()}
    for wanted in ("archive_format", _PROGRAM, *(_config(kind) for kind in _CONFIGS)):
        if wanted not in entries:
            return Refusal(f"the exported program has no {wanted}: it holds {', '.join(sorted(entries))[:200]}", SAVE)
    strange = next((e for e in entries if not _KEPT.fullmatch(e) and not _DROPPED.fullmatch(e)), None)
    if strange is not None:
        return Refusal(
            f"the exported program has an entry {strange[:80]!r}, which torch.export.save does not write", SAVE
        )
    large = next((e for e in entries if e.endswith(".json") and entries[e].file_size > _MAX_JSON_BYTES), None)
    if large is not None:
        return Refusal(f"{large} has {entries[large].file_size} bytes; {_MAX_JSON_BYTES} are accepted", SAVE)
    if entries["archive_format"].file_size > 16 or archive.read(entries["archive_format"]).strip() != b"pt2":
        return Refusal("the archive's format is not pt2", SAVE)
    try:
        return _check_documents(archive, entries)
    except (ValueError, RecursionError) as error:
        return Refusal(f"a description in the exported program cannot be read: {str(error)[:200]}", SAVE)


def _check_documents(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]) -> Refusal | None:
    if not isinstance(_object(archive, entries[_PROGRAM]).get("graph_module"), dict):
        return Refusal(f"{_PROGRAM} describes no program", SAVE)
    for kind, pattern in _CONFIGS.items():
        config = _object(archive, entries[_config(kind)]).get("config")
        if not isinstance(config, dict):
            return Refusal(f"{_config(kind)} lists no tensors", SAVE)
        for name, entry in config.items():
            refusal = _check_tensor(name, entry, pattern, {e.rpartition("/")[2] for e in entries if f"/{kind}/" in e})
            if refusal is not None:
                return refusal
    return None


def _check_tensor(name: str, entry: Any, pattern: str, files: Collection[str]) -> Refusal | None:
    path = entry.get("path_name") if isinstance(entry, dict) else None
    if not isinstance(path, str) or entry.get("use_pickle") is not False or not re.fullmatch(pattern, path):
        return Refusal(
            f"{name[:80]!r} is no plain tensor, but pickled or an object",
            "keep tensor subclasses and custom objects out of the model",
        )
    if path not in files:
        return Refusal(f"{name[:80]!r} lies in {path}, which is not in the archive", SAVE)
    return None


def _object(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> dict[str, Any]:
    found = json.loads(archive.read(entry))
    if not isinstance(found, dict):
        raise ValueError(f"{entry.filename} holds no object")
    return found


def _config(kind: str) -> str:
    return f"data/{kind}/model_{kind}_config.json"
