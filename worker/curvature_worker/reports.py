"""What jobs that compute no tensors find, plans and inspections: the child's word, checked and stored as JSON."""

from typing import Any

from pydantic import ValidationError

from curvature_protocol.base import Reply
from curvature_protocol.inspections import Inspection
from curvature_protocol.jobs import JobKind
from curvature_protocol.plans import Plan
from curvature_worker.errors import JobRefused

_FORMS: dict[JobKind, type[Reply]] = {JobKind.PLAN: Plan, JobKind.INSPECTION: Inspection}


def read_report(kind: JobKind, reply: dict[str, Any]) -> bytes:
    """The report in a child's `done`, as it is stored.

    Raises:
        JobRefused: `internal_error` if it is none.
    """
    try:
        return _FORMS[kind].model_validate(reply.get("report")).model_dump_json().encode()
    except (ValidationError, ValueError) as error:
        raise JobRefused(
            "internal_error",
            f"the model's process left a {kind} that makes no sense: {str(error).splitlines()[0][:300]}",
        ) from error
