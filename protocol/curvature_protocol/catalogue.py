"""The list of extensions, as workers publish it."""

from typing import Any, Literal

from pydantic import Field

from curvature_protocol.base import Reply
from curvature_protocol.results import GroupKind

Merging = Literal["sum", "append", "welford", "whole batch"]

_PACKAGE = "the installed package that brings it, with its version; null for the engine's own"


class ExtensionEntry(Reply):
    """One extension: what it is, what it takes, what it returns."""

    name: str
    summary: str
    kind: GroupKind
    shape: str = Field(description='e.g. "[N, *p]"')
    formula: str
    source: str = Field(description="paper and equation, or the definition's place")
    options: dict[str, Any] = Field(description="JSON schema of the options (an object)")
    package: str | None = Field(default=None, description=_PACKAGE)
    merging: Merging = Field(default="whole batch", description="how results of a data set's parts become one")
    draws_when: dict[str, tuple[Any, ...]] | None = Field(
        default=None,
        description="option → values under which the seed enters ({}: always); null: it never does",
    )


class LossEntry(Reply):
    """One loss."""

    name: str
    summary: str
    options: dict[str, Any] = Field(description="JSON schema of the options (an object)")
    package: str | None = Field(default=None, description=_PACKAGE)


class Catalogue(Reply):
    """`GET /v1/extensions`."""

    engine_version: str
    rules: tuple[str, ...] = Field(default=(), description="installed packages that bring rules, with their versions")
    extensions: tuple[ExtensionEntry, ...]
    losses: tuple[LossEntry, ...]
