"""What the OpenAPI document says of errors."""

from typing import Any

from curvature_protocol.errors import Problem
from curvature_service.errors import MEDIA_TYPE

_WHEN = {
    400: "The bytes are not those of the hash in the URL",
    401: "No API key, or a wrong one",
    404: "There is no such thing",
    409: "Not in this state",
    413: "Too large",
    416: "The range lies outside the object",
    422: "The request does not fit: the message says what was expected",
    503: "The database or the broker does not answer",
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Error responses of an endpoint, all with the one body."""
    example = Problem(
        title="Unknown extension",
        status=422,
        detail="there is no extension 'batch_gard'",
        code="unknown_extension",
        param="extensions.0.name",
        remedy="known extensions: batch_grad, batch_l2, variance, …",
        request_id="4f6c1f0e",
    ).model_dump()
    return {
        status: {"model": Problem, "description": _WHEN[status], "content": {MEDIA_TYPE: {"example": example}}}
        for status in (*statuses, 401, 422)
    }
