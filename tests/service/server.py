"""The API in this process: the real application behind a real uvicorn on a real port."""

import socket
import threading
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import httpx
import uvicorn
from sqlalchemy import delete

from curvature_service import ServiceSettings, create_app
from curvature_service.authentication import KnownKeys
from curvature_service.extensions.service import CatalogueCache
from curvature_service.resources import Resources
from curvature_state.tables import Base


def settings_in(folder, redis_server, sqlite_template, **changes):
    """Settings of a server with its own records and bytes in a folder."""
    (folder / "curvature.db").write_bytes(sqlite_template)
    settings = {
        "database_url": f"sqlite:///{folder / 'curvature.db'}",
        "storage_url": (folder / "objects").as_uri(),
        "redis_url": redis_server.url,
        # Rounds of the reconciler are called for by the tests that are about them.
        "reconcile_seconds": 3600,
    }
    return ServiceSettings(**{**settings, **changes})


class LiveServer:
    """Serves while its `with` lasts."""

    def __init__(self, settings: ServiceSettings) -> None:
        self.app = create_app(settings)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.address = self._socket.getsockname()
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_config=None, timeout_graceful_shutdown=2))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self.client = httpx.Client(base_url=self.url, trust_env=False, timeout=30)

    @property
    def resources(self) -> Resources:
        resources = self.app.state.resources
        assert isinstance(resources, Resources)
        return resources

    def reset(self) -> None:
        """Forget all records, bytes and events, as if just made."""
        resources = self.resources
        with resources.database.write() as session:
            for table in Base.metadata.sorted_tables:
                session.execute(delete(table))
        for key in self.stored():
            resources.objects.delete(key)
        resources.redis.flushall()
        self.app.state.catalogue = CatalogueCache(resources)
        self.app.state.keys = KnownKeys(resources.database)

    @property
    def folder(self) -> Path:
        """The folder of the object store."""
        return Path(urlsplit(self.resources.settings.storage_url).path)

    def stored(self) -> list[str]:
        """Names of all files in the object store."""
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())

    def __enter__(self) -> "LiveServer":
        self._thread.start()
        self.client.get("/v1/health")  # waits in the listening socket until the application serves
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
