"""The HTTP API: uploads, jobs, events, results. It never opens a model and imports no torch."""

from curvature_service.app import create_app
from curvature_service.settings import ServiceSettings

__all__ = ["ServiceSettings", "create_app"]
