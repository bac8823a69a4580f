"""Options that several extensions take, as JSON schemas, and what they change."""

from collections.abc import Mapping
from typing import Any

MC_SAMPLES = {
    "type": "integer",
    "minimum": 1,
    "maximum": 100_000,
    "default": 1,
    "description": "number of draws M",
}
SCALE = {
    "type": "string",
    "enum": ["loss", "sample"],
    "default": "loss",
    "description": 'of g_n: "loss" as it enters L, "sample" without the division by Z',
}
OVER = {
    "type": "string",
    "enum": ["parameter", "model"],
    "default": "parameter",
    "description": '"model": one tensor, under the label, over all parameters together',
}
SUBSAMPLING = {
    "type": ["array", "null"],
    "items": {"type": "integer", "minimum": 0},
    "minItems": 1,
    "default": None,
    "description": "indices of the samples to take, in this order, duplicates allowed; Z stays that of the full batch",
}

AGAINST = {
    "type": ["object", "null"],
    "properties": {"sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"}},
    "required": ["sha256"],
    "additionalProperties": False,
    "default": None,
    "description": "another batch, uploaded before: inner products with its gradients, [N, N′]; each has its own Z",
}
"""Over the wire a batch goes by its hash; the engine itself is given (inputs, targets)."""


def adapt_to_over(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `over` changes: one tensor in place of one per parameter."""
    return {"kind": "tensor"} if options["over"] == "model" else {}


def adapt_to_scale(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `scale` changes: without the division by Z there is no power of it."""
    return {"degree": 0.0} if options["scale"] == "sample" else {}


def adapt_to_over_and_scale(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """What both change."""
    return {**adapt_to_over(options), **adapt_to_scale(options)}
