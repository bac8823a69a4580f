"""Examples of the API document: one job's way, from the upload to the manifest. Tests hold them to the schemas."""

from typing import Any

from curvature_protocol.artefacts import ArtefactKind
from curvature_protocol.errors import status_of

MODEL_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
BATCH_SHA256 = "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"
LOSS_SHA256 = "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9"
JOB_ID = "3f2a9c0d5be84f6f9a3f2f4d1c7e8b90"
SWEEP_ID = "b1946ac92492d2347c6235b4d2611184"

ARTEFACT: dict[ArtefactKind, dict[str, Any]] = {
    "models": {
        "sha256": MODEL_SHA256,
        "kind": "models",
        "size_bytes": 4871362,
        "created_at": "2026-01-15T09:30:00.120000Z",
    },
    "batches": {
        "sha256": BATCH_SHA256,
        "kind": "batches",
        "size_bytes": 402896,
        "created_at": "2026-01-15T09:30:00.480000Z",
    },
    "losses": {
        "sha256": LOSS_SHA256,
        "kind": "losses",
        "size_bytes": 2917,
        "created_at": "2026-01-15T09:30:00.510000Z",
    },
}

_REQUEST: dict[str, Any] = {
    "model": MODEL_SHA256,
    "batch": {"sha256": BATCH_SHA256},
    "extensions": ["variance", {"name": "kfac", "label": "kfac4", "options": {"mc_samples": 4}}],
    "loss": "cross_entropy",
    "reduction": "mean",
    "seed": 0,
}
JOB_REQUESTS: dict[str, dict[str, Any]] = {
    "uploaded batch": {"summary": "A model and a batch uploaded before, two extensions", "value": _REQUEST},
    "batch inside": {
        "summary": "A small batch riding inside the request (with ?wait=30: one round trip)",
        "value": {
            "model": MODEL_SHA256,
            "batch": {"data": "CAAAAAAAAAB7fSAgICAgIA=="},
            "extensions": ["diag_ggn_mc"],
        },
    },
    "loss function": {
        "summary": "A loss function uploaded before, and dot products with the gradients of another batch",
        "value": {
            "model": MODEL_SHA256,
            "batch": {"sha256": BATCH_SHA256},
            "extensions": [{"name": "batch_dot", "options": {"against": {"sha256": BATCH_SHA256}, "over": "model"}}],
            "loss": {"sha256": LOSS_SHA256},
        },
    },
}

UPLOAD_ID = "b1946ac92492d2347c6235b4d2611184"
UPLOAD_REQUEST: dict[str, Any] = {
    "large model": {
        "summary": "A model of 100 MB",
        "value": {"kind": "models", "sha256": MODEL_SHA256, "size_bytes": 104857600},
    }
}
UPLOAD_PART: dict[str, Any] = {"number": 1, "size_bytes": 16777216, "sha256": BATCH_SHA256}
UPLOAD: dict[str, Any] = {
    "id": UPLOAD_ID,
    "kind": "models",
    "sha256": MODEL_SHA256,
    "size_bytes": 104857600,
    "part_bytes": 16777216,
    "direct": False,
    "parts": [UPLOAD_PART],
    "assembling": False,
    "expires_at": "2026-01-16T09:30:00Z",
    "artefact": None,
}
FINISHED_UPLOAD: dict[str, Any] = {**UPLOAD, "parts": [], "artefact": {**ARTEFACT["models"], "size_bytes": 104857600}}
KNOWN_UPLOAD: dict[str, Any] = {**FINISHED_UPLOAD, "id": None, "expires_at": None}
ASSEMBLING_UPLOAD: dict[str, Any] = {**UPLOAD, "assembling": True}
PART_ADDRESS: dict[str, Any] = {
    "number": 1,
    "url": f"https://bucket.s3.eu-central-1.amazonaws.com/curvature/uploads/{UPLOAD_ID}?partNumber=1&uploadId=…",
    "headers": {"Content-Length": "16777216", "x-amz-checksum-sha256": "YDA64iuYhhvM47KPM+7BvnWKIXyGycBr4bB9uJ8ZFHU="},
    "expires_at": "2026-01-15T09:45:00Z",
}

JOB: dict[str, Any] = {
    "id": JOB_ID,
    "kind": "analysis",
    "status": "running",
    "created_at": "2026-01-15T09:30:01Z",
    "started_at": "2026-01-15T09:30:01.030000Z",
    "finished_at": None,
    "attempt": 1,
    "priority": 5,
    "progress": {"phase": "computing", "done": 3, "total": 10},
    "error": None,
    "warnings": [],
    "metadata": {"run": "baseline"},
    "request": {
        **_REQUEST,
        "extensions": [
            {"name": "variance", "label": None, "options": {}},
            {"name": "kfac", "label": "kfac4", "options": {"mc_samples": 4}},
        ],
        "loss": {"name": "cross_entropy", "options": {}},
        "parameters": "trainable",
        "eval": True,
        "verify": False,
        "precision": "float32",
        "channels_last": False,
        "priority": 5,
        "timeout_seconds": None,
        "metadata": {"run": "baseline"},
        "warnings": [],
    },
    "result": None,
}
CANCELLING_JOB: dict[str, Any] = {**JOB, "status": "cancelling"}
JOB_PAGE: dict[str, Any] = {"items": [JOB], "next_cursor": "WyIyMDI2LTAxLTE1VDA5OjMwOjAxKzAwOjAwIiwgIjNmMmE5YzBkIl0="}

_VARIANCE_PLAN: dict[str, Any] = {
    "label": "variance",
    "extension": "variance",
    "columns": "gradient",
    "column_count": 1,
    "merging": "welford",
    "streamed": False,
    "multiply_adds": 2560000,
    "result_bytes": 40000,
    "parameters": [
        {
            "parameter": "0.weight",
            "shape": [10, 1000],
            "method": "closed form",
            "form": "materialised",
            "multiply_adds": 2560000,
            "peak_bytes": 5120000,
            "samples_per_block": 128,
            "result_bytes": 40000,
            "reason": None,
        }
    ],
}
PLAN_JOB: dict[str, Any] = {
    **JOB,
    "kind": "plan",
    "status": "succeeded",
    "finished_at": "2026-01-15T09:30:01.090000Z",
    "progress": None,
    "plan": {
        "N": 128,
        "dtype": "float32",
        "device": "cpu",
        "engine_version": "0.1.0",
        "budget_bytes": 8589934592,
        "block_bytes": 268435456,
        "samples_per_chunk": 128,
        "chunks": 1,
        "whole_reason": None,
        "columns": {"gradient": 1, "exact": 0, "sampled": 0},
        "forward_bytes": 517120,
        "peak_bytes": 6297600,
        "result_bytes": 40000,
        "backward_passes": 1,
        "multiply_adds": 5120000,
        "gradients": 2.0,
        "requests": [_VARIANCE_PLAN],
    },
}

INSPECTED_MODEL: dict[str, Any] = {
    **ARTEFACT["models"],
    "inspection_status": "succeeded",
    "inspection_job": JOB_ID,
    "error": None,
    "inspection": {
        "engine_version": "0.1.0",
        "format": "torchscript",
        "training": False,
        "fixed_samples": None,
        "inputs": [{"name": "input", "required": True}],
        "parameters": [
            {
                "name": "0.weight",
                "shape": [10],
                "dtype": "float32",
                "trainable": True,
                "aliases": [],
                "uses": [{"operator": "layer_norm", "place": "net.py, line 7: return F.layer_norm(x, …)"}],
                "closed_form": ["grad", "batch_grad", "diag_ggn_exact"],
                "fallback": [],
                "none": {"kfac": "no Kronecker form for layer_norm"},
                "note": None,
            }
        ],
        "buffers": [],
        "operators": [{"name": "layer_norm", "count": 1}],
        "unsupported": [],
        "notes": [],
    },
}

EVENT_STREAM = (
    "id: 1768469401031-0\nevent: state\n"
    f'data: {{"event":"state","job_id":"{JOB_ID}","status":"running","at":"2026-01-15T09:30:01.031Z","attempt":1}}\n\n'
    "id: 1768469401630-0\nevent: progress\n"
    f'data: {{"event":"progress","job_id":"{JOB_ID}","status":"running","at":"2026-01-15T09:30:01.630Z",'
    '"attempt":1,"progress":{"phase":"computing","done":3,"total":10}}\n\n'
)

SWEEP_REQUESTS: dict[str, dict[str, Any]] = {
    "grid": {
        "summary": "Two losses and three seeds: six rows, the seed fastest",
        "value": {
            "base": {"model": MODEL_SHA256, "batch": {"sha256": BATCH_SHA256}, "extensions": ["diag_ggn_mc"]},
            "grid": {
                "loss": [{"value": "cross_entropy"}, {"value": {"sha256": LOSS_SHA256}, "name": "my loss"}],
                "seed": [{"value": 0}, {"value": 1}, {"value": 2}],
            },
            "metadata": {"run": "baseline"},
        },
    },
    "rows": {
        "summary": "Two rows that differ in what they compute",
        "value": {
            "base": {"model": MODEL_SHA256, "batch": {"sha256": BATCH_SHA256}},
            "rows": [
                {"fields": {"extensions": ["variance"]}, "coordinates": {"what": "variance"}},
                {"fields": {"extensions": ["kfac"], "priority": 9}, "coordinates": {"what": "factors"}},
            ],
        },
    },
}
SWEEP: dict[str, Any] = {
    "id": SWEEP_ID,
    "created_at": "2026-01-15T09:30:01Z",
    "total": 6,
    "counts": {"queued": 2, "running": 1, "succeeded": 2, "failed": 1},
    "done": False,
    "axes": ["loss", "seed"],
    "metadata": {"run": "baseline"},
}
SWEEP_PAGE: dict[str, Any] = {"items": [SWEEP], "next_cursor": None}
SWEEP_ROWS: dict[str, Any] = {
    "items": [
        {
            "row": 0,
            "job_id": JOB_ID,
            "coordinates": {"loss": "cross_entropy", "seed": 0},
            "status": "succeeded",
            "error": None,
            "created_at": "2026-01-15T09:30:01Z",
            "started_at": "2026-01-15T09:30:01.030000Z",
            "finished_at": "2026-01-15T09:30:02.200000Z",
            "result": {"loss": 0.3127, "timings_ms": {"queue": 30.0, "fetch": 2.1, "child": 1140.5, "store": 1.7}},
        }
    ],
    "next_row": 1,
}
SWEEP_STATES: dict[str, Any] = {"states": "sfsrqq"}
SWEEP_EVENT_STREAM = (
    f'event: counts\ndata: {{"id":"{SWEEP_ID}","created_at":"2026-01-15T09:30:01Z","total":6,"counts":{{"queued":6}},'
    '"done":false,"axes":["loss","seed"],"metadata":{}}\n\n'
    "id: 1768469401031-0\nevent: state\n"
    f'data: {{"event":"state","job_id":"{JOB_ID}","status":"running","at":"2026-01-15T09:30:01.031Z","attempt":1,'
    f'"sweep":"{SWEEP_ID}"}}\n\n'
)

MANIFEST: dict[str, Any] = {
    "job_id": JOB_ID,
    "attempt": 1,
    "created_at": "2026-01-15T09:30:02.200000Z",
    "engine_version": "0.1.0",
    "format": "torchscript",
    "loss": 0.3127,
    "loss_name": "cross_entropy",
    "loss_options": {"weight": None, "label_smoothing": 0.0, "ignore_index": -100, "class_axis": None},
    "loss_output": None,
    "reduction": "mean",
    "Z": 128.0,
    "seed": 0,
    "dtype": "float32",
    "device": "cpu",
    "precision": "float32",
    "channels_last": False,
    "precision_error": None,
    "isolation": "landlock+seccomp",
    "aliases": {},
    "groups": [
        {
            "label": "variance",
            "extension": "variance",
            "options": {},
            "kind": "parameters",
            "convention": "the biased variance over samples of their contributions to L (each with its 1/N under mean)",
            "file_bytes": 40096,
            "missing": {},
            "tensors": [
                {
                    "name": "0.weight",
                    "parameter": "0.weight",
                    "factor": None,
                    "dtype": "F32",
                    "shape": [10, 1000],
                    "byte_start": 96,
                    "byte_end": 40096,
                    "provenance": {
                        "method": "closed form",
                        "reduction": "mean",
                        "Z": 128.0,
                        "scale": "loss",
                        "approximation": None,
                        "seed": None,
                        "mc_samples": None,
                        "dtype": "float32",
                        "device": "cpu",
                        "engine_version": "0.1.0",
                        "samples_per_chunk": 128,
                        "halvings": 0,
                        "verified": True,
                        "verification": "this job",
                        "precision": "float32",
                        "channels_last": False,
                        "precision_error": None,
                    },
                }
            ],
        }
    ],
    "warnings": [],
    "timings_ms": {"queue": 30.0, "fetch": 2.1, "child": 1140.5, "store": 1.7},
}

CATALOGUE: dict[str, Any] = {
    "engine_version": "0.1.0",
    "extensions": [
        {
            "name": "diag_ggn_mc",
            "summary": "diagonal of the generalised Gauss–Newton matrix, sampled",
            "kind": "parameters",
            "shape": "[*p]",
            "formula": "1/M Σ_m Σ_n (J_nᵀ s_nm)²",
            "source": "Dangel, Kunstner & Hennig 2020, table 1",
            "options": {
                "type": "object",
                "properties": {"mc_samples": {"type": "integer", "minimum": 1, "default": 1}},
                "additionalProperties": False,
            },
        }
    ],
    "losses": [
        {
            "name": "mse",
            "summary": "squared error of outputs and targets of one shape [N, …]",
            "options": {"type": "object", "properties": {}, "additionalProperties": False},
        }
    ],
}

HEALTH: dict[str, Any] = {
    "status": "ok",
    "version": "0.1.0",
    "workers": [
        {
            "id": "host-4242-a1b2c3",
            "device": "cpu",
            "engine_version": "0.1.0",
            "isolation": "landlock+seccomp",
            "seen_at": "2026-01-15T09:30:00Z",
            "name": "lab-1",
            "memory_bytes": 25769803776,
            "tags": ["large"],
            "job": JOB_ID,
            "draining": False,
        }
    ],
    "limits": {
        "upload_bytes": 68719476736,
        "inline_batch_bytes": 4194304,
        "inline_result_bytes": 1048576,
        "wait_seconds": 60.0,
    },
}
READY: dict[str, Any] = {
    "ready": True,
    "checks": {"database": "ok", "storage": "ok", "broker": "ok", "worker": "ok"},
}
NOT_READY: dict[str, Any] = {
    "ready": False,
    "checks": {
        "database": "ok",
        "storage": "ok",
        "broker": "Error 111 connecting to 127.0.0.1:6379. Connection refused.",
        "worker": "ok",
    },
}


def _problem(code: str, detail: str, param: str | None = None, remedy: str | None = None) -> dict[str, Any]:
    return {
        "type": "about:blank",
        "title": code.replace("_", " ").capitalize(),
        "status": 416 if code == "range_not_satisfiable" else status_of(code),
        "detail": detail,
        "code": code,
        **({} if param is None else {"param": param}),
        **({} if remedy is None else {"remedy": remedy}),
        "request_id": "4f6c1f0e",
    }


_UPLOAD = "PUT its bytes to /v1/{kind}/{sha256}"
PROBLEMS: dict[str, dict[str, Any]] = {
    problem["code"]: problem
    for problem in (
        _problem("unauthenticated", "this server needs an API key; none came", None, "set CURVATURE_API_KEY"),
        _problem(
            "job_not_finished",
            "job 8f14e45fceea4b0e9c1d2a3b4c5d6e7f is running; only a failed or cancelled job is retried",
            "job_id",
            "wait for its end, or cancel it",
        ),
        _problem(
            "queue_full",
            "tenant default may have 1000 queued jobs; 1000 are queued and 1 came",
            None,
            "wait until some are done, or ask the operator for a higher limit",
        ),
        _problem("invalid_request", "seed: Input should be a valid integer; got 'x'", "seed", "see /docs"),
        _problem(
            "internal_error",
            "the server failed; the operator finds the cause in its log by the request id",
            None,
            "try again; if it persists, tell the operator",
        ),
        _problem("unavailable", "the server's database does not answer", None, "try again in a moment"),
        _problem(
            "hash_mismatch", f"the 7 bytes that came have the SHA-256 {BATCH_SHA256}, not {MODEL_SHA256}", "sha256"
        ),
        _problem("payload_too_large", "uploads may have 68719476736 bytes; more came", None, "send fewer samples"),
        _problem("model_not_found", f"no model with the SHA-256 {MODEL_SHA256} is stored", "model", _UPLOAD),
        _problem("batch_not_found", f"no batch with the SHA-256 {BATCH_SHA256} is stored", "batch", _UPLOAD),
        _problem("loss_not_found", f"no loss with the SHA-256 {LOSS_SHA256} is stored", "loss", _UPLOAD),
        _problem("range_not_satisfiable", "the range bytes=9- lies outside the object's 7 bytes", "Range"),
        _problem("job_not_found", f"there is no job {JOB_ID!r}", "job_id", "GET /v1/jobs lists the jobs"),
        _problem("sweep_not_found", f"there is no sweep {SWEEP_ID!r}", "sweep_id", "GET /v1/sweeps lists the sweeps"),
        _problem(
            "in_use",
            f"the model {MODEL_SHA256} stays: job {JOB_ID}, which is queued, needs it",
            "model",
            "wait for the job's end, or cancel it",
        ),
        _problem("job_finished", f"job {JOB_ID} has succeeded already", "job_id"),
        _problem("result_not_ready", f"there is no result: job {JOB_ID} is running", "job_id", "wait for it"),
        _problem("result_not_found", f"job {JOB_ID} has no result labelled 'kfac'", "label", "its labels: variance"),
        _problem(
            "idempotency_conflict",
            "the idempotency key 'k1' was used with another body",
            "Idempotency-Key",
            "use a new key for a new request",
        ),
        _problem(
            "upload_not_found",
            f"there is no upload '{UPLOAD_ID}' (any more)",
            "upload_id",
            "begin it again: POST /v1/uploads",
        ),
        _problem(
            "upload_incomplete",
            "2 of the 7 parts are missing: 3, 7",
            "upload_id",
            f"send them; GET /v1/uploads/{UPLOAD_ID} lists those that have arrived",
        ),
        _problem(
            "unknown_extension",
            "there is no extension 'batch_gard'; did you mean 'batch_grad'?",
            "extensions.0.name",
            "known extensions: batch_grad, batch_l2, variance",
        ),
    )
}
