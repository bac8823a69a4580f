"""Jobs as the child takes them: what matters to the numbers, and nothing else."""

from collections.abc import Mapping
from typing import Any

from curvature_protocol.jobs import JobKind
from curvature_protocol.requests import referenced_batch
from curvature_state.turns import ClaimedJob
from curvature_worker.inbox import loss_name


def order_of(job: ClaimedJob, labels: list[str], most_bytes: int | None) -> dict[str, Any]:
    """The order for some labels of a job.

    Args:
        job: an analysis, a shard, a plan or an inspection.
        labels: those to be computed.
        most_bytes: the memory beyond which the job is for a larger worker; None: it is for this one.
    """
    request = job.request
    if job.kind == JobKind.INSPECTION:
        return {"kind": job.kind, "model": request["model"], "request": {"eval": True}}
    wanted = {name: request[name] for name in ("loss", "reduction", "seed", "parameters", "eval")}
    if (loss := loss_function(request)) is not None:
        wanted["loss"] = {"file": loss_name(loss), "output": request["loss"]["output"]}
    # Jobs queued before there were these fields have none.
    wanted["verify"] = request.get("verify", False)
    wanted["precision"] = request.get("precision", "float32")
    wanted["channels_last"] = request.get("channels_last", False)
    extensions = [e for e in labelled(request["extensions"]) if e["label"] in labels]
    return {
        "kind": job.kind,
        "model": request["model"],
        "batch": request["batch"]["sha256"],
        "most_bytes": most_bytes,
        "part": request.get("part"),
        "request": {**wanted, "extensions": extensions},
    }


def labelled(extensions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The extensions asked for, every one with its label."""
    return [{"name": e["name"], "label": e["label"] or e["name"], "options": e["options"]} for e in extensions]


def labels_of(request: Mapping[str, Any]) -> list[str]:
    """The labels asked for, in their order."""
    return [e["label"] or e["name"] for e in request["extensions"]]


def batches_of(request: Mapping[str, Any]) -> dict[str, None]:
    """The hashes of all batches that a request refers to, its own first, each once."""
    found = [request["batch"]["sha256"]]
    found += [referenced_batch(value) for e in request["extensions"] for value in e["options"].values()]
    return dict.fromkeys(sha256 for sha256 in found if sha256 is not None)


def loss_function(request: Mapping[str, Any]) -> str | None:
    """The hash of the loss function, where the loss is one."""
    return (request["loss"] or {}).get("sha256")
