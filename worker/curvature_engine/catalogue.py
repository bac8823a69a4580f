"""The registry as JSON: what workers publish. `python -m curvature_engine` prints it."""

from typing import Any

from curvature_engine.extensions import EXTENSIONS
from curvature_engine.losses import LOSSES
from curvature_engine.options import options_schema
from curvature_engine.parts import obstacle
from curvature_engine.plugins import EXTENSION_GROUP, LOSS_GROUP, load_plugins, rule_packages
from curvature_engine.version import __version__


def catalogue() -> dict[str, Any]:
    """Every extension with its option schema, and every loss with its own; those of plug-ins with their package.

    Raises:
        EngineError: `internal_error`, naming a plug-in that is broken.
    """
    packages = load_plugins()

    def origin(group: str, name: str) -> dict[str, str]:
        return {"package": packages[group, name]} if (group, name) in packages else {}

    return {
        "engine_version": __version__,
        "rules": rule_packages(),
        "extensions": [
            {
                "name": extension.name,
                "summary": extension.summary,
                "kind": extension.kind,
                "shape": extension.shape,
                "formula": extension.formula,
                "source": extension.source,
                "options": options_schema(extension.options),
                "merging": extension.merging if obstacle(extension, "sum") is None else "whole batch",
                "draws_when": extension.draws_when(),
                **origin(EXTENSION_GROUP, extension.name),
            }
            for extension in EXTENSIONS.values()
        ],
        "losses": [
            {
                "name": name,
                "summary": loss.summary,
                "options": options_schema(loss.options),
                **origin(LOSS_GROUP, name),
            }
            for name, loss in LOSSES.items()
        ],
    }
