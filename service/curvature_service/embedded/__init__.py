"""`curvature serve`: the whole service on one machine, from pip packages alone.

The same code as the cluster, other settings: SQLite, a folder, and a real Redis-protocol server on a private socket.
"""

from curvature_service.embedded.errors import ServeError
from curvature_service.embedded.server import EmbeddedServer, Options

__all__ = ["EmbeddedServer", "Options", "ServeError"]
