"""The error body (RFC 9457 problem details) and the one list of error codes.

Every code belongs to a family; a family has one HTTP status and one class in the client. A job that fails in the
worker carries the same `code`, `param` and `remedy` as a request refused by the API, so the client raises alike.
"""

from enum import StrEnum

from pydantic import Field

from curvature_protocol.base import Reply


class ErrorFamily(StrEnum):
    """One class of status."""

    BAD_REQUEST = "bad_request"  # 400
    AUTHENTICATION = "authentication"  # 401
    PERMISSION = "permission"  # 403
    NOT_FOUND = "not_found"  # 404
    CONFLICT = "conflict"  # 409
    TOO_LARGE = "too_large"  # 413
    UNPROCESSABLE = "unprocessable"  # 422
    RATE_LIMIT = "rate_limit"  # 429
    INTERNAL = "internal"  # 500
    UNAVAILABLE = "unavailable"  # 503


STATUS: dict[ErrorFamily, int] = {
    ErrorFamily.BAD_REQUEST: 400,
    ErrorFamily.AUTHENTICATION: 401,
    ErrorFamily.PERMISSION: 403,
    ErrorFamily.NOT_FOUND: 404,
    ErrorFamily.CONFLICT: 409,
    ErrorFamily.TOO_LARGE: 413,
    ErrorFamily.UNPROCESSABLE: 422,
    ErrorFamily.RATE_LIMIT: 429,
    ErrorFamily.INTERNAL: 500,
    ErrorFamily.UNAVAILABLE: 503,
}

_B, _U, _N, _C, _I = (
    ErrorFamily.BAD_REQUEST,
    ErrorFamily.UNPROCESSABLE,
    ErrorFamily.NOT_FOUND,
    ErrorFamily.CONFLICT,
    ErrorFamily.INTERNAL,
)

FAMILIES: dict[str, ErrorFamily] = {
    # Requests
    "invalid_request": _U,  # the body or a query parameter has the wrong form
    "unknown_extension": _U,
    "invalid_option": _U,
    "unknown_loss": _U,
    "hash_mismatch": _B,  # uploaded bytes are not those of the hash in the URL
    "payload_too_large": ErrorFamily.TOO_LARGE,
    "range_not_satisfiable": _B,  # sent with status 416
    "unauthenticated": ErrorFamily.AUTHENTICATION,
    "forbidden": ErrorFamily.PERMISSION,
    "rate_limited": ErrorFamily.RATE_LIMIT,
    "queue_full": ErrorFamily.RATE_LIMIT,  # the tenant has as many queued jobs as it may
    "not_found": _N,  # no such path
    "job_not_found": _N,
    "model_not_found": _N,  # the hash was never uploaded
    "batch_not_found": _N,
    "loss_not_found": _N,
    "result_not_found": _N,  # no such label in this job's result
    "sweep_not_found": _N,
    "upload_not_found": _N,  # given up, or never begun
    "result_not_ready": _C,  # the job has not succeeded (yet)
    "job_finished": _C,  # too late to cancel
    "job_not_finished": _C,  # it is to be retried or deleted while it runs
    "in_use": _C,  # a job needs what is to be deleted
    "upload_incomplete": _C,  # parts are missing
    "idempotency_conflict": _C,  # the key was used with another body
    # The model
    "invalid_model": _U,  # no model file, truncated, of an unknown format
    "no_parameters": _U,  # frozen file, nothing trainable, or none of that name
    "unsupported_operator": _U,
    "training_mode": _U,  # batch normalisation or dropout in training mode baked into a trace
    "coupled_samples": _U,  # a sample's output depends on other samples
    "unsupported_model": _U,
    # The batch and the loss
    "invalid_batch": _U,  # no safetensors file, no inputs or targets in it
    "empty_batch": _U,
    "invalid_inputs": _U,  # the model rejects them (shape, dtype, number)
    "invalid_targets": _U,  # they do not fit the loss, or are out of range
    "unsupported_outputs": _U,  # not one tensor with samples along the first axis
    "whole_batch_required": _U,  # the quantity cannot be merged from parts of a data set
    "unsupported_loss": _U,  # it cannot give what was asked for, or its function cannot be run
    "loss_required": _U,  # no default applies
    # The run
    "verification_failed": _I,  # the engine's own checks disagree: never a wrong number
    "out_of_memory": _I,
    "worker_crashed": _I,  # the child process died
    "no_fitting_worker": _I,  # no worker has the memory that the job needs
    "attempts_exhausted": _I,  # the worker died too often while running this job
    "job_timeout": _I,
    "cancelled": _C,
    "internal_error": _I,
    "unavailable": ErrorFamily.UNAVAILABLE,  # database, storage or broker does not answer
}


def family_of(code: str) -> ErrorFamily:
    """The family of a code; codes of a newer server count as internal."""
    return FAMILIES.get(code, ErrorFamily.INTERNAL)


def status_of(code: str) -> int:
    """The HTTP status of a code."""
    return STATUS[family_of(code)]


class Problem(Reply):
    """RFC 9457 problem details, with our members `code`, `param`, `remedy`, `request_id`."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str = Field(description="what was expected, what came")
    code: str
    param: str | None = Field(default=None, description="the field, file or parameter at fault")
    remedy: str | None = Field(default=None, description="what to do about it")
    request_id: str | None = None
