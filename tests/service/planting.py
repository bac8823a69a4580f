"""Jobs, uploads and results put where clients and workers would have put them."""

import hashlib
import json
import struct
from datetime import UTC, datetime

from tests.state.holders import hold

from curvature_protocol.jobs import Job
from curvature_protocol.names import result_key
from curvature_protocol.results import Manifest, Provenance, ResultGroup, TensorEntry
from curvature_state import endings, jobs
from curvature_state.endings import Success

MODEL = b"the bytes of a model; the service never opens them"
BATCH = b"the bytes of a batch"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def upload(client, kind="models", data=MODEL):
    reply = client.put(f"/v1/{kind}/{sha256(data)}", content=data)
    assert reply.status_code in (200, 201), reply.text
    return sha256(data)


def request_body(client, **changes):
    """The body of a job whose model and batch are there."""
    body = {
        "model": upload(client),
        "batch": {"sha256": upload(client, "batches", BATCH)},
        "extensions": ["variance"],
        "loss": "mse",
    }
    return {**body, **changes}


def submit(client, **changes):
    reply = client.post("/v1/jobs", json=request_body(client, **changes))
    assert reply.status_code == 201, reply.text
    return Job.model_validate_json(reply.content)


def claim(server, job, lease_seconds=60.0):
    held = hold(server.resources.database, job.id, "test", lease_seconds)
    assert held is not None
    return held


def fail(server, job):
    held = claim(server, job)
    problem = jobs.problem("empty_batch", "the batch has no samples", param="batch", remedy="send some samples")
    assert endings.fail(server.resources.database, job.id, held.attempt, problem)


def succeed(server, job, label="variance", values=range(1000)):
    """Finish a job with one tensor of doubles; returns the bytes of its file."""
    held = claim(server, job)
    file, start = safetensors_file(list(values))
    objects = server.resources.objects
    objects.put_bytes(result_key(job.id, held.attempt, f"{label}.safetensors"), file)
    manifest = build_manifest(job.id, held.attempt, label, start, len(file))
    objects.put_bytes(result_key(job.id, held.attempt, "manifest.json"), manifest.model_dump_json().encode())
    success = Success(["said by the worker"], len(file))
    assert endings.succeed(server.resources.database, job.id, held.attempt, success)
    return file


def safetensors_file(values):
    data = struct.pack(f"<{len(values)}d", *values)
    header = json.dumps({"0.weight": {"dtype": "F64", "shape": [len(values)], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data, 8 + len(header)


def build_manifest(job_id, attempt, label, start, size):
    provenance = Provenance(
        method="closed form", reduction="mean", Z=1, dtype="float64", device="cpu", engine_version="1", verified=True
    )
    entry = TensorEntry(
        name="0.weight",
        parameter="0.weight",
        dtype="F64",
        shape=((size - start) // 8,),
        byte_start=start,
        byte_end=size,
        provenance=provenance,
    )
    group = ResultGroup(
        label=label, extension=label, kind="parameters", convention="c", file_bytes=size, tensors=(entry,)
    )
    return Manifest(
        job_id=job_id,
        attempt=attempt,
        created_at=datetime.now(UTC),
        engine_version="1",
        loss=0.5,
        loss_name="mse",
        reduction="mean",
        Z=1,
        seed=0,
        dtype="float64",
        device="cpu",
        isolation="none",
        groups=(group,),
    )


def expect_problem(reply, status, code, param=None):
    """The reply is a problem (RFC 9457) of this code; returns it."""
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    problem = reply.json()
    assert problem["status"] == status
    assert problem["code"] == code
    assert problem.get("param") == param
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == reply.headers["x-request-id"]
    assert "Traceback" not in reply.text
    return problem
