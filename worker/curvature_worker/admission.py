"""Admission: what a file must be to be given to the engine. Torch-free; runs in its own confined process.

Loading a TorchScript file is running a program, so nothing of it is loaded here: the archive's layout, its sizes and
the names its pickles refer to are checked, and what is accepted is written again, plainly stored. Exported programs
are judged in `admission_of_exports.py`.
"""

import errno
import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any

from curvature_worker.admission_of_exports import SAVE as _EXPORT
from curvature_worker.admission_of_exports import check_export, is_export, is_kept
from curvature_worker.channel import Channel, ChannelClosed
from curvature_worker.refusal import Refusal

ADMISSION_VERSION = "2"

MEMORY_BYTES = 8 * 2**30
"""Address space of the process: the directory and one pickle at a time are all it holds."""

MAX_ENTRIES = 200_000
MAX_TOTAL_BYTES = 256 * 2**30
MAX_INFLATED_BYTES = 2**30
"""What may come out of compressed entries: TorchScript compresses code, never tensors."""
_MAX_PICKLE_BYTES = 512 * 2**20
_COPY_BYTES = 2**20

_ALLOWED_GLOBALS = ("__torch__", "torch", "torch._utils", "torch.jit._pickle", "collections")
_PICKLES = (".pkl", ".debug_pkl")
_SAVE = "save the model with torch.jit.save(torch.jit.script(model), path), or torch.export.save"
_AGAIN = "upload it again, whole"
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OTHER_FORMATS = (
    (b"\x80\x02", "a pickle, such as torch.save wrote before version 1.6"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it stands for"),
)


def serve(channel: Channel, isolation: str, options: dict[str, Any]) -> None:
    """Once told that it is there, judge the file `model` in the inbox; write what is accepted to `admitted`."""
    try:
        channel.receive()
        channel.send(_judge(Path(options["inbox"]) / "model", Path(options["outbox"]) / "admitted"))
        channel.receive()  # until the worker ends us
    except ChannelClosed:
        return


def _judge(source: Path, target: Path) -> dict[str, Any]:
    """The verdict as a message."""
    try:
        refusal = admit(source, target)
    except MemoryError:
        refusal = Refusal("the archive's directory or a pickle in it is too large to be read", _SAVE)
    except OSError as error:
        if error.errno in DISK_FULL:  # the worker's disk, not the file, is to blame
            return {"event": "failed", "message": f"the admitted model could not be written: {error.strerror}"}
        refusal = Refusal(f"the file cannot be read as an archive: {error}", _SAVE)
    except Exception as error:  # noqa: BLE001 (whatever a hostile file provokes is its refusal)
        refusal = Refusal(f"the file cannot be read as an archive: {str(error)[:200] or type(error).__name__}", _SAVE)
    if refusal is None:
        return {"event": "admitted"}
    return {"event": "refused", "message": refusal.message, "remedy": refusal.remedy}


def admit(source: Path, target: Path) -> Refusal | None:
    """Check `source` and repack it to `target`; a refusal leaves no target."""
    size = source.stat().st_size
    if not zipfile.is_zipfile(source):
        return _no_archive(source, size)
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
            refusal = _check_entries(entries, size) or _check_kind(archive)
            if refusal is None:
                _repack(archive, target)
            return refusal
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        target.unlink(missing_ok=True)
        return Refusal(f"the archive is damaged: {error}", _AGAIN)


def _no_archive(source: Path, size: int) -> Refusal:
    with source.open("rb") as file:
        start = file.read(32)
    if not start:
        return Refusal("the file is empty", _AGAIN)
    if start[:2] == b"PK":
        return Refusal(f"the archive is truncated: {size} bytes, and no directory at the end", _AGAIN)
    came = next((what for magic, what in _OTHER_FORMATS if start.startswith(magic)), None)
    shown = f"it is {came}" if came else f"it starts with {start[:8]!r}"
    return Refusal(f"the file is no TorchScript archive or exported program: {size} bytes, {shown}", _SAVE)


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> Refusal | None:
    names = [entry.filename for entry in entries]
    if len(entries) > MAX_ENTRIES:
        return Refusal(f"the archive has {len(entries)} entries; at most {MAX_ENTRIES} are accepted", _SAVE)
    if len(set(names)) != len(names):
        return Refusal("the archive names an entry twice", _SAVE)
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.split("/") or "\x00" in name or ":" in name:
            return Refusal(f"the archive has an entry with a path that leads outside: {name[:80]!r}", _SAVE)
    if any(entry.flag_bits & 1 for entry in entries):
        return Refusal("the archive is encrypted", _SAVE)
    return _check_sizes(entries, size)


def _check_sizes(entries: list[zipfile.ZipInfo], size: int) -> Refusal | None:
    """Whether the archive would unpack to more than it can honestly hold."""
    inflated = sum(entry.file_size for entry in entries if entry.compress_type != zipfile.ZIP_STORED)
    if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
        return Refusal("the archive uses a compression that TorchScript does not know", _SAVE)
    total = sum(entry.file_size for entry in entries)
    if inflated > MAX_INFLATED_BYTES or total > MAX_TOTAL_BYTES:
        return Refusal(f"the archive of {size} bytes would unpack to {total}", "store it without such compression")
    # Entries that overlap are counted more often than they are there.
    if sum(entry.compress_size for entry in entries) > size or total - inflated > size:
        return Refusal(f"the archive's entries claim more than its {size} bytes", _SAVE)
    return None


def _check_kind(archive: zipfile.ZipFile) -> Refusal | None:
    """Judge the archive as what it is: an exported program, or else TorchScript."""
    names = archive.namelist()
    roots, inner = _parts(names)
    if any(name.endswith("serialized_exported_program.json") for name in names):
        return Refusal("the file is a torch.export program in the form that torch wrote before version 2.8", _EXPORT)
    if len(roots) == 1 and is_export(inner):
        return check_export(archive, next(iter(roots)))
    return _check_layout(roots, inner) or _check_pickles(archive)


def _parts(names: list[str]) -> tuple[set[str], set[str]]:
    """The archive's folders, and the entries without them."""
    return {name.split("/", 1)[0] for name in names}, {name.split("/", 1)[1] for name in names if "/" in name}


def _check_layout(roots: set[str], inner: set[str]) -> Refusal | None:
    if len(roots) != 1:
        return Refusal("the archive is no TorchScript file: its entries are not in one folder", _SAVE)
    has_code = any(name.startswith("code/") for name in inner)
    if "data.pkl" in inner and not (has_code and "constants.pkl" in inner):
        return Refusal("the file is a checkpoint made by torch.save, not TorchScript", _SAVE)
    for wanted in ("data.pkl", "constants.pkl"):
        if wanted not in inner:
            return Refusal(f"the archive is no TorchScript file: it has no {wanted}", _SAVE)
    # torch writes it elsewhere since operators such as gelu and linspace raised the format's version.
    if not inner & {"version", ".data/version"}:
        return Refusal("the archive is no TorchScript file: it has no version", _SAVE)
    return None


def _check_pickles(archive: zipfile.ZipFile) -> Refusal | None:
    for entry in archive.infolist():
        if not entry.filename.endswith(_PICKLES):
            continue
        if entry.file_size > _MAX_PICKLE_BYTES:
            return Refusal(f"{entry.filename} has {entry.file_size} bytes; {_MAX_PICKLE_BYTES} are accepted", _SAVE)
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


def _repack(archive: zipfile.ZipFile, target: Path) -> None:
    """Write every entry again, plainly, a piece at a time; each is checked against its checksum on the way."""
    exported = is_export(_parts(archive.namelist())[1])
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, allowZip64=True) as packed:
        for entry in archive.infolist():
            if entry.is_dir() or (exported and not is_kept(entry.filename.split("/", 1)[-1])):
                continue
            fresh = zipfile.ZipInfo(entry.filename)
            with archive.open(entry) as source, packed.open(fresh, "w", force_zip64=True) as copy:
                while part := source.read(_COPY_BYTES):
                    copy.write(part)
