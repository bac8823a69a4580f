"""`python -m curvature_service`: the API process."""

import argparse
import logging
import socket
import sys

import uvicorn
from obstore.exceptions import BaseError as StoreError
from sqlalchemy.exc import SQLAlchemyError

from curvature_service.app import create_app
from curvature_service.settings import ServiceSettings
from curvature_state import ObjectStore, migrate
from curvature_state.broker import BrokerUnfit, check_broker


def main() -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="curvature_service", description="The curvature API process.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--fd", type=int, help="serve on this already listening socket instead")
    parser.add_argument("--migrate", action="store_true", help="bring the database's tables up to date first")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it would log the URLs of webhooks, which may hold secrets
    settings = ServiceSettings()
    _check(settings)
    if arguments.migrate:
        _migrate(settings.database_url)
    config = uvicorn.Config(
        create_app(settings),
        host=arguments.host,
        port=arguments.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
    )
    # Not uvicorn's own `fd`, which takes any socket for a Unix one: TCP connections would lose their options by it.
    sockets = None if arguments.fd is None else [socket.socket(fileno=arguments.fd)]
    uvicorn.Server(config).run(sockets)


def _check(settings: ServiceSettings) -> None:
    """Refuse settings with which the API cannot work, or could lose something."""
    try:
        check_broker(settings.redis_url)
        ObjectStore(settings.storage_url, settings.storage_public_endpoint)
    except BrokerUnfit as error:
        sys.exit(f"curvature_service: {error}")
    except (ValueError, RuntimeError, OSError, StoreError) as error:
        sys.exit(f"curvature_service: the settings do not fit: {error}; check CURVATURE_STORAGE_URL")


def _migrate(url: str) -> None:
    try:
        migrate(url)
    except SQLAlchemyError as error:
        sys.exit(f"curvature_service: the database's tables cannot be brought up to date: {error}")


if __name__ == "__main__":
    main()
