"""The registry as JSON: what workers publish. `python -m curvature_engine` prints it."""

from typing import Any

from curvature_engine.extensions import EXTENSIONS
from curvature_engine.losses import LOSSES
from curvature_engine.version import __version__


def catalogue() -> dict[str, Any]:
    """Every extension with its option schema, and the losses by name."""
    return {
        "engine_version": __version__,
        "extensions": [
            {
                "name": extension.name,
                "summary": extension.summary,
                "kind": extension.kind,
                "shape": extension.shape,
                "formula": extension.formula,
                "source": extension.source,
                "options": extension.schema(),
            }
            for extension in EXTENSIONS.values()
        ],
        "losses": list(LOSSES),
    }
