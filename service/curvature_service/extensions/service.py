"""The catalogue, and requests checked against it."""

import difflib
import json
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
from jsonschema.exceptions import best_match

from curvature_protocol.catalogue import Catalogue, ExtensionEntry
from curvature_protocol.requests import DataSet, ExtensionRequest, JobRequest, LossRequest
from curvature_service.errors import ApiError
from curvature_service.resources import Resources
from curvature_state.workers import published_catalogue

FRESH_SECONDS = 2.0
_SHOWN_CHARACTERS = 64
_LONGEST_DETAIL = 300

BACKPACK_NAMES = {
    "grad_batch": "batch_grad",
    "diag_h": "diag_hessian",
    "diag_ggn_exact_batch": "batch_diag_ggn_exact",
    "diag_ggn_mc_batch": "batch_diag_ggn_mc",
    "diag_h_batch": "batch_diag_hessian",
    "batchgrad": "batch_grad",
    "batchl2grad": "batch_l2",
    "sumgradsquared": "sum_grad_squared",
    "diagggnexact": "diag_ggn_exact",
    "diagggnmc": "diag_ggn_mc",
    "diagggn": "diag_ggn_exact",
    "diaghessian": "diag_hessian",
}
"""What users of BackPACK call things → our names."""


@cache
def built_in_catalogue() -> Catalogue:
    """The engine's catalogue at the time of the build, for before any worker has connected."""
    path = Path(__file__).parent.parent / "catalogue.json"
    return Catalogue.model_validate(json.loads(path.read_text(encoding="utf-8")))


class CatalogueCache:
    """What workers published, read again every few seconds."""

    def __init__(self, resources: Resources) -> None:
        self._resources = resources
        self._read_at = 0.0
        self._catalogue: Catalogue | None = None

    def current(self) -> Catalogue:
        """The catalogue in force."""
        if self._catalogue is None or time.monotonic() - self._read_at > FRESH_SECONDS:
            self._catalogue = published_catalogue(self._resources.database) or built_in_catalogue()
            self._read_at = time.monotonic()
        return self._catalogue


def check_request(catalogue: Catalogue, request: JobRequest) -> None:
    """Check names and options.

    Raises:
        ApiError: `unknown_extension`, `invalid_option`, `unknown_loss`, `whole_batch_required`.
    """
    check_extensions(catalogue, request.extensions)
    if isinstance(request.batch, DataSet):
        check_merging(catalogue, request.extensions)
    if isinstance(request.loss, LossRequest):  # what a function needs, only the engine can say
        check_loss(catalogue, request.loss)


def check_extensions(catalogue: Catalogue, extensions: Sequence[ExtensionRequest]) -> None:
    """Check extensions' names and options."""
    entries = {entry.name: entry for entry in catalogue.extensions}
    for place, extension in enumerate(extensions):
        entry = entries.get(extension.name)
        if entry is None:
            raise _unknown(extension.name, place, list(entries))
        _check_options(extension.name, extension.options, f"extensions.{place}.options", entry.options)


def check_loss(catalogue: Catalogue, loss: LossRequest) -> None:
    """Check a loss's name and options."""
    losses = {entry.name: entry for entry in catalogue.losses}
    if loss.name not in losses:
        raise ApiError(
            "unknown_loss",
            f"there is no loss {loss.name!r}",
            param="loss.name",
            remedy=f"known losses: {', '.join(losses)}",
        )
    _check_options(loss.name, loss.options, "loss.options", losses[loss.name].options)


def check_merging(catalogue: Catalogue, extensions: Sequence[ExtensionRequest]) -> None:
    """Check that extensions, known ones, can be had of a data set."""
    entries = {entry.name: entry for entry in catalogue.extensions}
    for place, extension in enumerate(extensions):
        _check_merges(entries[extension.name], extension, f"extensions.{place}")


def _check_merges(entry: ExtensionEntry, extension: ExtensionRequest, where: str) -> None:
    """Check that a quantity of a data set can be had from its parts."""
    if entry.merging == "whole batch":
        reason, param = "it takes all samples together", f"{where}.name"
    elif extension.batches or extension.options.get("subsampling") is not None:
        option = "against" if extension.batches else "subsampling"
        reason, param = f"{option} speaks of the samples of one batch", f"{where}.options.{option}"
    else:
        return
    raise ApiError(
        "whole_batch_required",
        f"{extension.key} cannot be merged from the parts of a data set: {reason}",
        param=param,
        remedy="give the data as one batch, or leave this out",
    )


def _unknown(name: str, place: int, known: list[str]) -> ApiError:
    lowered = name.lower()
    close = difflib.get_close_matches(lowered, known, 1)
    guess = BACKPACK_NAMES.get(lowered) or (close[0] if close else None)
    hint = f"; did you mean {guess!r}?" if guess in known else ""
    return ApiError(
        "unknown_extension",
        f"there is no extension {name!r}{hint}",
        param=f"extensions.{place}.name",
        remedy=f"known extensions: {', '.join(known)}",
    )


def _check_options(name: str, options: Mapping[str, Any], where: str, schema: Mapping[str, Any]) -> None:
    """Check the options of an extension or a loss against its schema."""
    known = list(schema.get("properties", {}))
    remedy = f"{name} takes these options: {', '.join(known) or 'none'}"
    if schema.get("additionalProperties") is False:
        for option in options:
            if option not in known:
                close = difflib.get_close_matches(option, known, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                detail = f"{name} has no option {option[:_SHOWN_CHARACTERS]!r}{hint}"
                raise ApiError("invalid_option", detail, param=where, remedy=remedy)
    error = best_match(jsonschema.Draft202012Validator(schema).iter_errors(options))
    if error is None:
        return
    path = "".join(f".{part}" for part in error.absolute_path)
    detail = f"{name}: {path[1:] + ': ' if path else ''}{error.message}"
    if len(detail) > _LONGEST_DETAIL:  # the message quotes the value, whatever its size
        detail = f"{detail[:_LONGEST_DETAIL]}…"
    raise ApiError("invalid_option", detail, param=where + path, remedy=remedy)
