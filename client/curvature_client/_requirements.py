"""Where a job may run, and whom it tells when it is over."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from curvature_client._errors import refusal
from curvature_protocol.requests import Requirements, Webhook


def read_requirements(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a worker must have, in the form that the server reads.

    Raises:
        UnprocessableError: something else was given.
    """
    remedy = 'e.g. requires={"gpu": True, "tag": "a100", "memory_bytes": 8 * 2**30}'
    return _read(Requirements, {} if given is None else given, "requires", remedy)


def read_webhook(given: str | Mapping[str, Any] | None) -> dict[str, Any] | None:
    """An address, or an address and a secret, in the form that the server reads.

    Raises:
        UnprocessableError: something else was given.
    """
    if given is None:
        return None
    remedy = 'e.g. webhook="https://example.org/done", or {"url": …, "secret": at least 16 characters}'
    return _read(Webhook, {"url": given} if isinstance(given, str) else given, "webhook", remedy)


def _read(kind: type[BaseModel], given: Any, param: str, remedy: str) -> dict[str, Any]:
    try:
        return kind.model_validate(dict(given) if isinstance(given, Mapping) else given).model_dump()
    except ValidationError as error:
        first = error.errors(include_input=False)[0]  # a secret is not for messages
        place = ".".join([param, *map(str, first["loc"])])
        raise refusal("invalid_request", f"{place}: {first['msg']}", param=place, remedy=remedy) from None
