"""Fields of a sweep's rows, checked and brought into their stored form: each distinct value once, not once per row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue, ValidationError

from curvature_protocol.catalogue import Catalogue
from curvature_protocol.requests import DataSet, DataSetPart, InlineBatch, JobRequest, LossRequest
from curvature_service.artefacts.service import get_artefact
from curvature_service.errors import ApiError, invalid_form
from curvature_service.extensions.service import check_extensions, check_loss, check_merging
from curvature_service.jobs.submission import references_in
from curvature_service.resources import Resources
from curvature_service.sweeps.expansion import ExpandedRow
from curvature_state.artefacts import Reference

_SOME_HASH = "0" * 64
_AROUND: dict[str, Any] = {"model": _SOME_HASH, "batch": {"sha256": _SOME_HASH}, "extensions": ["grad"]}
"""What a value is put into to be read as its field."""
DEFAULTS: dict[str, Any] = JobRequest.model_validate(_AROUND).model_dump(mode="json")
"""Fields that a row does not have, as they are stored."""


@dataclass(frozen=True)
class CheckedField:
    """A field's value as read, as stored, how long it is in JSON, and the uploads that it refers to."""

    value: Any
    stored: Any
    size: int
    artefacts: frozenset[Reference]

    @property
    def parts(self) -> tuple[DataSetPart, ...]:
        """Of a batch that is a data set."""
        return self.value.parts if isinstance(self.value, DataSet) else ()


class FieldChecker:
    """Checks fields of one sweep's rows. It knows values by identity, so the request must live as long as it does."""

    def __init__(self, resources: Resources, catalogue: Catalogue) -> None:
        self._resources, self._catalogue = resources, catalogue
        self._known: dict[tuple[str, int], CheckedField] = {}
        self._equal: dict[tuple[str, str], CheckedField] = {}
        self._mergeable: set[int] = set()
        self._stored: set[Reference] = set()

    def check(self, row: ExpandedRow) -> dict[str, CheckedField]:
        """A row's fields.

        Raises:
            ApiError: whatever a field lacks; `param` says where in the sweep's request it stands.
        """
        fields = {name: self._field(name, value, row.origins[name]) for name, value in row.fields.items()}
        if fields["batch"].parts:
            self._check_merging(fields["extensions"], row.origins["extensions"])
        return fields

    def _field(self, name: str, value: JsonValue, origin: str) -> CheckedField:
        found = self._known.get((name, id(value)))
        if found is None:
            text = json.dumps(value, sort_keys=True)
            found = self._equal.get((name, text))
            if found is None:
                found = self._equal[name, text] = self._read(name, value, origin)
            self._known[name, id(value)] = found
        return found

    def _read(self, name: str, value: JsonValue, origin: str) -> CheckedField:
        body = {**_AROUND, name: value}
        try:
            request = JobRequest.model_validate(body)
        except ValidationError as error:
            raise invalid_form(error.errors(include_url=False, include_context=False), body, origin) from error
        if isinstance(request.batch, InlineBatch):
            raise ApiError(
                "invalid_request",
                f"{origin}: a sweep refers to its batches by their hash; this one is inside the request",
                param=origin,
                remedy="PUT it to /v1/batches/{sha256}",
            )
        try:
            if name == "extensions":
                check_extensions(self._catalogue, request.extensions)
            elif isinstance(request.loss, LossRequest):
                check_loss(self._catalogue, request.loss)
        except ApiError as error:
            raise _placed(error, name, origin) from error
        places = {reference: param for reference, param in references_in(request) if param.split(".")[0] == name}
        for reference, param in places.items():
            self._check_upload(reference, origin + param.removeprefix(name))
        stored = request.model_dump(mode="json", include={name})[name]
        return CheckedField(getattr(request, name), stored, len(json.dumps(stored)), frozenset(places))

    def _check_upload(self, reference: Reference, param: str) -> None:
        if reference not in self._stored:
            get_artefact(self._resources, *reference, param=param)
            self._stored.add(reference)

    def _check_merging(self, extensions: CheckedField, origin: str) -> None:
        if id(extensions) in self._mergeable:
            return
        try:
            check_merging(self._catalogue, extensions.value)
        except ApiError as error:
            raise _placed(error, "extensions", origin) from error
        self._mergeable.add(id(extensions))


def stored_request(fields: Mapping[str, CheckedField]) -> dict[str, Any]:
    """A row's request as its job's row has it."""
    return {**DEFAULTS, **{name: field.stored for name, field in fields.items()}}


def _placed(error: ApiError, name: str, origin: str) -> ApiError:
    """A refusal of a field whose value stands elsewhere."""
    param = origin + (error.param or name).removeprefix(name)
    return ApiError(error.code, error.detail, param=param, remedy=error.remedy)
