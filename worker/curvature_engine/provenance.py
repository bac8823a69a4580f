"""What is known of a data set's result, from what is known of its parts'."""

from collections.abc import Mapping, Sequence
from typing import Any

from curvature_engine.errors import EngineError
from curvature_engine.verification import least

_ALIKE = (
    *("loss_name", "loss_options", "loss_output", "reduction", "seed", "dtype", "format", "aliases"),
    *("precision", "channels_last"),
)


def of_data_set(infos: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """(info, warnings) of a whole data set from its parts' info; `Z_under_mean` is in it, too.

    Raises:
        EngineError: `internal_error` where parts are not of one request, or do not follow one another.
    """
    first = infos[0]
    for place, info in enumerate(infos):
        for name in _ALIKE:
            if info[name] != first[name]:
                raise misfit(f"part {place} has {name} {info[name]!r}, part 0 {first[name]!r}")
    samples = 0
    for place, part in enumerate(info["part"] for info in infos):
        if part["first_sample"] != samples:
            raise misfit(f"part {place} begins with sample {part['first_sample']}, not {samples}")
        samples += part["samples"]
    Z = float(sum(info["part"]["mean_Z"] for info in infos))
    together = {name: _all_of(info[name] for info in infos) for name in ("device", "engine_version")}
    errors = [error for info in infos if (error := info.get("precision_error")) is not None]
    found = {
        **{name: first[name] for name in _ALIKE},
        "Z": Z if first["reduction"] == "mean" else 1.0,
        **together,
        "samples": samples,
        "parts": len(infos),
        "Z_under_mean": Z,
    }
    if errors:  # that of the part where the gradient's is greatest
        found["precision_error"] = max(errors, key=lambda error: error["gradient"] or 0.0)
    return found, _warnings([info["part"] for info in infos], together["engine_version"])


def of_all(entries: Sequence[Mapping[str, Any]], info: Mapping[str, Any]) -> dict[str, Any]:
    """One tensor's provenance from those of what it was made of, in all parts."""
    methods = {entry["method"] for entry in entries}
    return {
        **entries[0],
        "method": "fallback" if "fallback" in methods else entries[0]["method"],
        "reduction": info["reduction"],
        "Z": info["Z"],
        "device": _all_of(entry["device"] for entry in entries),
        "engine_version": _all_of(entry["engine_version"] for entry in entries),
        "samples_per_chunk": max(entry["samples_per_chunk"] for entry in entries),
        "halvings": max(entry["halvings"] for entry in entries),
        "verified": all(entry["verified"] for entry in entries),
        "verification": least(entry["verification"] for entry in entries),
        "precision_error": max((e for entry in entries if (e := entry["precision_error"]) is not None), default=None),
    }


def _warnings(parts: Sequence[Mapping[str, Any]], versions: str) -> list[str]:
    found = []
    if unlike := sum(part["path"] != parts[0]["path"] for part in parts):
        found.append(
            f"{unlike} of {len(parts)} parts took another path through the model than the first: where it decides by "
            "the batch as a whole, one batch of all samples would have taken one path"
        )
    if not any(part["probed"] for part in parts):
        found.append(
            "every part is one sample, and the model takes no more at a time: that samples are not coupled could not "
            "be checked"
        )
    if ", " in versions:
        found.append(f"the parts were computed by different versions of the engine: {versions}")
    return found


def _all_of(names: Any) -> str:
    """Different names, each once."""
    return ", ".join(dict.fromkeys(str(name) for name in names))


def misfit(reason: str) -> EngineError:
    """Parts are not of one data set."""
    return EngineError(
        "internal_error", f"the parts of the data set do not fit together: {reason}", remedy="compute the parts anew"
    )
