"""What was computed before: found by what it depends on, within one tenant.

A quantity depends on the model (its program and parameters, not its file's bytes: two traces of one module differ in
these), the batch, the loss, the extension with its options, the parameters asked for, the seed where it draws, the
precision and layout asked for, the kind of device, and the engine's version, with the packages that bring rules.
Numbers' formats are those of model and batch.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy import bindparam, select

from curvature_protocol.catalogue import Catalogue, ExtensionEntry
from curvature_protocol.jobs import JobStatus
from curvature_state.database import Database, insert_new
from curvature_state.tables import CachedResultRow, JobRow, ModelDigestRow


@dataclass(frozen=True)
class Cached:
    """A label of a job's stored result."""

    job_id: str
    attempt: int
    label: str


@dataclass(frozen=True)
class LoadedModel:
    """A model file as a version of the engine loads it, in eval mode or in the mode that it was saved in."""

    sha256: str
    eval: bool
    engine_version: str


def find_digest(database: Database, model: LoadedModel) -> str | None:
    """The canonical digest of a model, if a worker has computed it."""
    with database.read() as session:
        row = session.get(ModelDigestRow, (model.sha256, model.eval, model.engine_version))
        return None if row is None else row.digest


def record_digest(database: Database, model: LoadedModel, digest: str) -> None:
    """Note the canonical digest of a model."""
    with database.write() as session:
        insert_new(session, ModelDigestRow, [{**asdict(model), "digest": digest}])


def cache_keys(request: Mapping[str, Any], catalogue: Catalogue, digest: str, device: str) -> dict[str, str]:
    """Label → key of what a stored request asks for.

    Args:
        request: as it stands in a job's row.
        catalogue: of the workers.
        digest: the model's.
        device: the kind that computes: "cpu" or "cuda".
    """
    entries = {entry.name: entry for entry in catalogue.extensions}
    common = {
        "model": digest,
        "batch": request["batch"],
        "loss": _complete_loss(request["loss"], catalogue),
        "reduction": request["reduction"],
        "parameters": request["parameters"],
        "eval": request["eval"],
        **_arithmetic(request),
        "device": device,
        "engine": [catalogue.engine_version, *catalogue.rules],
    }
    keys = {}
    for extension in request["extensions"]:
        entry = entries.get(extension["name"])
        if entry is None:
            continue
        options = _complete(extension["options"], entry.options)
        # A random dropout mask is drawn from the seed, too.
        draws = not request["eval"] or _draws(entry, options)
        label = extension["label"] or extension["name"]
        depends = {
            **common,
            "extension": [entry.name, entry.package],
            "options": options,
            "seed": request["seed"] if draws else None,
            "part": _part(request.get("part"), label, draws=draws),
        }
        text = json.dumps(depends, sort_keys=True, separators=(",", ":"))
        keys[label] = hashlib.sha256(text.encode()).hexdigest()
    return keys


def _arithmetic(request: Mapping[str, Any]) -> dict[str, Any]:
    """How the numbers are made, where that is not the default: keys made before there was a choice hold on."""
    asked = {"precision": request.get("precision", "float32"), "channels_last": request.get("channels_last", False)}
    return {} if asked == {"precision": "float32", "channels_last": False} else asked


def _part(part: Mapping[str, Any] | None, label: str, *, draws: bool) -> Any:
    """What tells a shard's state, which is merged under its label, from a result; draws depend on its place."""
    return None if part is None else [label, part["first_sample"] if draws else None]


def _draws(entry: ExtensionEntry, options: Mapping[str, Any]) -> bool:
    if entry.draws_when is None:
        return False
    return all(options.get(option) in values for option, values in entry.draws_when.items())


def _complete(options: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Options with the defaults of those that were left out."""
    properties: Mapping[str, Any] = schema.get("properties", {})
    defaults = {name: of_option["default"] for name, of_option in properties.items() if "default" in of_option}
    return {**defaults, **options}


def _complete_loss(loss: Mapping[str, Any] | None, catalogue: Catalogue) -> Any:
    if loss is None or "name" not in loss:
        return loss
    entry = next((entry for entry in catalogue.losses if entry.name == loss["name"]), None)
    if entry is None:
        return loss
    return [entry.name, entry.package, _complete(loss.get("options") or {}, entry.options)]


def find_cached(database: Database, tenant: str, keys: Iterable[str]) -> dict[str, Cached]:
    """Key → where it is stored, for those that are."""
    with database.read() as session:
        rows = session.connection().execute(_STORED, {"tenant": tenant, "wanted": list(keys)}).all()
    return {row.key: Cached(row.job_id, row.attempt, row.label) for row in rows}


_STORED = (
    select(CachedResultRow.key, CachedResultRow.job_id, CachedResultRow.attempt, CachedResultRow.label)
    .join(JobRow, JobRow.id == CachedResultRow.job_id)
    .where(
        CachedResultRow.tenant == bindparam("tenant"),
        CachedResultRow.key.in_(bindparam("wanted", expanding=True)),
        JobRow.status == JobStatus.SUCCEEDED,
        JobRow.result_bytes.is_not(None),
    )
)
"""Made once: a statement takes longer to make than to run."""
