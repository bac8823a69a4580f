"""What the OpenAPI document says beyond what FastAPI finds out by itself."""

from typing import Annotated, Any

from fastapi import FastAPI, Path
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from curvature_protocol.errors import Problem, status_of
from curvature_protocol.events import JobEvent
from curvature_protocol.requests import JobRequest
from curvature_protocol.sweeps import SweepRequest
from curvature_protocol.uploads import UploadRequest
from curvature_service import examples
from curvature_service.errors import MEDIA_TYPE

BYTES: dict[str, Any] = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}

RANGE_HEADER: dict[str, Any] = {
    "parameters": [
        {
            "name": "Range",
            "in": "header",
            "required": False,
            "description": "one range of bytes; `If-Range` with the ETag is honoured",
            "schema": {"type": "string"},
            "example": "bytes=0-1023",
        }
    ]
}

REDIRECT: dict[int | str, dict[str, Any]] = {
    307: {
        "description": "With `direct`, where the store can sign addresses: the bytes are at `Location`, for a while, "
        "to be fetched with the same `Range` and without the API key"
    }
}

JobIdPath = Annotated[str, Path(description="The job's id", examples=[examples.JOB_ID])]
SweepIdPath = Annotated[str, Path(description="The sweep's id", examples=[examples.SWEEP_ID])]

_TAGS = [
    {"name": "models", "description": "Uploaded model files, known by the SHA-256 of their bytes."},
    {"name": "batches", "description": "Uploaded batches: safetensors files with `inputs` and `targets`."},
    {
        "name": "losses",
        "description": "Uploaded loss functions: TorchScript of (outputs, targets), returning each sample's loss [N].",
    },
    {"name": "uploads", "description": "Large uploads, part by part: they go on after a broken connection."},
    {"name": "jobs", "description": "Submit, watch, list and cancel."},
    {"name": "sweeps", "description": "Many jobs at once: as a grid, or row by row."},
    {"name": "plans", "description": "What a job would do, what it costs and how much memory it takes."},
    {"name": "results", "description": "What a succeeded job computed."},
    {"name": "extensions", "description": "What can be computed."},
    {"name": "health", "description": "Whether the server and its parts answer. No key needed."},
]
_EVERYWHERE = ("unauthenticated", "invalid_request", "internal_error", "unavailable")


class DocumentedApp(FastAPI):
    """FastAPI whose document also has the schemas of bodies that we parse, and of errors and events."""

    def openapi(self) -> dict[str, Any]:
        """The OpenAPI document."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["tags"] = _TAGS
            modes = [
                *((kind, "validation") for kind in (JobRequest, SweepRequest, UploadRequest)),
                *((kind, "serialization") for kind in (Problem, JobEvent)),
            ]
            _, found = models_json_schema(modes, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
            _admit_bare_names(found["$defs"][JobRequest.__name__]["properties"])
            document["components"]["schemas"] = {**found["$defs"], **document["components"]["schemas"]}
        assert self.openapi_schema is not None
        return self.openapi_schema


def _admit_bare_names(properties: dict[str, Any]) -> None:
    """Say that a name alone stands for an extension or a loss: pydantic's schema does not know of validators."""
    name = {"type": "string", "description": "the name alone, without label and options"}
    properties["extensions"]["items"] = {"anyOf": [name, properties["extensions"]["items"]]}
    properties["loss"]["anyOf"].insert(0, name)


def answer(
    status: int, description: str, example: dict[str, Any], model: type[BaseModel] | None = None
) -> dict[int | str, dict[str, Any]]:
    """A JSON answer with its example; `model` only where it is not the endpoint's own."""
    found: dict[str, Any] = {"description": description, "content": {"application/json": {"example": example}}}
    return {status: found if model is None else {"model": model, **found}}


def json_body(model: type[BaseModel], cases: dict[str, Any]) -> dict[str, Any]:
    """A JSON request body that the endpoint parses itself."""
    content = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}, "examples": cases}
    return {"requestBody": {"required": True, "content": {"application/json": content}}}


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Error responses of an endpoint by code, each with its example, and those that every endpoint may give."""
    chosen: dict[int, str] = {}
    for code in (*codes, *_EVERYWHERE):
        chosen.setdefault(416 if code == "range_not_satisfiable" else status_of(code), code)
    schema = {"$ref": f"#/components/schemas/{Problem.__name__}"}
    return {
        status: {
            "description": examples.PROBLEMS[code]["title"],
            "content": {MEDIA_TYPE: {"schema": schema, "example": examples.PROBLEMS[code]}},
        }
        for status, code in sorted(chosen.items())
    }
