"""Admission: what a file must be to be given to the engine. Torch-free; runs in its own confined process.

Loading a TorchScript file is running a program, so nothing of it is loaded here: the archive's layout, its sizes and
the names its pickles refer to are checked, and what is accepted is written again, plainly stored.
"""

import pickletools
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from curvature_worker.channel import Channel, ChannelClosed

ADMISSION_VERSION = "1"

MAX_ENTRIES = 200_000
MAX_TOTAL_BYTES = 256 * 2**30
MAX_RATIO = 200
_MAX_PICKLE_BYTES = 512 * 2**20
_COPY_BYTES = 2**20

_ALLOWED_GLOBALS = ("__torch__", "torch", "torch._utils", "torch.jit._pickle", "collections")
_SAVE = "save the model with torch.jit.save(torch.jit.script(model), path)"


class Refusal(NamedTuple):
    """Why a file is not admitted."""

    message: str
    remedy: str


def serve(channel: Channel, isolation: str, options: dict[str, Any]) -> None:
    """Judge the one file `model` in the inbox; write what is accepted to `admitted` in the outbox."""
    try:
        refusal = admit(Path(options["inbox"]) / "model", Path(options["outbox"]) / "admitted")
    except Exception as error:  # noqa: BLE001 (whatever a hostile file provokes is its refusal)
        refusal = Refusal(f"the file cannot be read as an archive: {type(error).__name__}", _SAVE)
    try:
        if refusal is None:
            channel.send({"event": "admitted", "isolation": isolation})
        else:
            channel.send({"event": "refused", "message": refusal.message, "remedy": refusal.remedy})
        channel.receive()  # until the worker ends us
    except ChannelClosed:
        return


def admit(source: Path, target: Path) -> Refusal | None:
    """Check `source` and repack it to `target`; a refusal leaves no target."""
    size = source.stat().st_size
    if not zipfile.is_zipfile(source):
        return _no_archive(source, size)
    with zipfile.ZipFile(source) as archive:
        entries = archive.infolist()
        refusal = _check_entries(entries, size) or _check_layout([e.filename for e in entries])
        refusal = refusal or _check_pickles(archive)
        if refusal is None:
            refusal = _repack(archive, target)
    return refusal


def _no_archive(source: Path, size: int) -> Refusal:
    with source.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK":
        return Refusal(f"the archive is truncated: {size} bytes, and no directory at the end", "upload it again, whole")
    return Refusal(f"the file is no zip archive: {size} bytes, starting with {start!r}", _SAVE)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> Refusal | None:
    names = [entry.filename for entry in entries]
    if len(entries) > MAX_ENTRIES:
        return Refusal(f"the archive has {len(entries)} entries; at most {MAX_ENTRIES} are accepted", _SAVE)
    if len(set(names)) != len(names):
        return Refusal("the archive names an entry twice", _SAVE)
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.split("/") or "\x00" in name or ":" in name:
            return Refusal(f"the archive has an entry with a path that leads outside: {name[:80]!r}", _SAVE)
    total = sum(entry.file_size for entry in entries)
    if total > MAX_TOTAL_BYTES or total > MAX_RATIO * max(size, 2**20):
        return Refusal(f"the archive of {size} bytes would unpack to {total}", "store it without such compression")
    if any(entry.flag_bits & 1 for entry in entries):
        return Refusal("the archive is encrypted", _SAVE)
    return None


def _check_layout(names: list[str]) -> Refusal | None:
    roots = {name.split("/", 1)[0] for name in names}
    inner = {name.split("/", 1)[1] for name in names if "/" in name}
    if any(name.endswith("serialized_exported_program.json") or "/models/" in name for name in names) or (
        "archive_format" in inner
    ):
        return Refusal("the file is a torch.export program, which is not supported yet", "script or trace the model")
    if len(roots) != 1:
        return Refusal("the archive is no TorchScript file: its entries are not in one folder", _SAVE)
    has_code = any(name.startswith("code/") for name in inner)
    if "data.pkl" in inner and not (has_code and "constants.pkl" in inner):
        return Refusal("the file is a checkpoint made by torch.save, not TorchScript", _SAVE)
    for wanted in ("data.pkl", "constants.pkl", "version"):
        if wanted not in inner:
            return Refusal(f"the archive is no TorchScript file: it has no {wanted}", _SAVE)
    return None


def _check_pickles(archive: zipfile.ZipFile) -> Refusal | None:
    for entry in archive.infolist():
        if not entry.filename.endswith(".pkl"):
            continue
        if entry.file_size > _MAX_PICKLE_BYTES:
            return Refusal(f"{entry.filename} has {entry.file_size} bytes", _SAVE)
        for name in _globals(archive.read(entry)):
            module = name.partition(" ")[0]
            if module not in _ALLOWED_GLOBALS and not module.startswith("__torch__."):
                return Refusal(f"{entry.filename} refers to {name[:80]!r}, which no TorchScript file does", _SAVE)
    return None


def _globals(data: bytes) -> list[str]:
    """Every `module name` that a pickle would import; "?" where it would take one off the stack."""
    found = []
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("GLOBAL", "INST"):
            found.append(str(argument))
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            found.append("?")
    return found


def _repack(archive: zipfile.ZipFile, target: Path) -> Refusal | None:
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as packed:
            for entry in archive.infolist():
                fresh = zipfile.ZipInfo(entry.filename)
                with archive.open(entry) as source, packed.open(fresh, "w", force_zip64=True) as copy:
                    while part := source.read(_COPY_BYTES):
                        copy.write(part)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        target.unlink(missing_ok=True)
        return Refusal(f"the archive is damaged: {error}", "upload it again, whole")
    return None
