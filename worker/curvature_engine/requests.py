"""What is asked for: extensions with labels and options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curvature_engine.errors import EngineError
from curvature_engine.extensions import EXTENSIONS, Extension
from curvature_engine.options import complete_options
from curvature_engine.plugins import load_plugins


@dataclass(frozen=True)
class Request:
    """One extension asked for, its options complete, and the extension as they make it."""

    extension: Extension
    label: str
    options: dict[str, Any]

    @property
    def convention(self) -> str:
        """What the numbers mean."""
        text = f"{self.extension.shape}: {self.extension.formula}"
        approximation = self.options.get("approximation")
        if approximation == "backpack":
            text += "; approximation backpack overestimates a convolution's block by about its number of positions"
        elif approximation is not None:
            text += f"; approximation {approximation}"
        if self.options.get("joint_bias"):
            text += "; where a layer adds a bias, x ends with a one and the block is that of [weight, bias]"
        if self.options.get("over") == "model":
            text += "; over all parameters together"
        if self.options.get("subsampling") is not None:
            text += "; of the samples that subsampling names, with the full batch's Z"
        if self.options.get("against") is not None:
            text += "; rows are samples of this batch, columns of the other"
        if self.options.get("scale") == "sample":
            text += "; scale sample: g_n without the division by Z"
        return text


def parse_requests(given: Any) -> list[Request]:
    """Read extensions given as names or mappings.

    Raises:
        EngineError: `unknown_extension`, `invalid_option`, `invalid_request`.
    """
    load_plugins()
    if isinstance(given, str | Mapping):
        given = [given]
    if not isinstance(given, Sequence):
        raise EngineError(
            "invalid_request",
            f"extensions are a list of names or mappings; got {type(given).__name__}",
            param="extensions",
            remedy='e.g. ["diag_ggn_mc"]',
        )
    requests = [_parse(item) for item in given]
    labels = [r.label for r in requests]
    for label in labels:
        if labels.count(label) > 1:
            raise EngineError(
                "invalid_request",
                f"two results are labelled {label!r}",
                param="extensions",
                remedy="give each request of one extension its own label",
            )
    return requests


def _parse(item: Any) -> Request:
    if isinstance(item, str):
        item = {"name": item}
    if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
        raise EngineError(
            "invalid_request",
            f"an extension is a name or a mapping with a name; got {item!r}",
            param="extensions",
            remedy='e.g. "kfac" or {"name": "kfac", "options": {"mc_samples": 4}}',
        )
    extension = EXTENSIONS.get(item["name"])
    if extension is None:
        raise EngineError(
            "unknown_extension",
            f"there is no extension {item['name']!r}",
            param="extensions",
            remedy=f"known extensions: {', '.join(EXTENSIONS)}",
        )
    options = item.get("options") or {}
    if not isinstance(options, Mapping):
        raise EngineError(
            "invalid_option",
            f"{extension.name}'s options are a mapping; got {options!r}",
            param=f"{extension.name}.options",
            remedy=f"it takes: {', '.join(extension.options) or 'none'}",
        )
    complete = complete_options(extension.name, extension.options, options, extension.name)
    return Request(extension.under(complete), item.get("label") or extension.name, complete)
