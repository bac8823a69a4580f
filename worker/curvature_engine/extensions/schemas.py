"""Options that several extensions take, as JSON schemas."""

MC_SAMPLES = {
    "type": "integer",
    "minimum": 1,
    "maximum": 100_000,
    "default": 1,
    "description": "number of draws M from the model's likelihood",
}
