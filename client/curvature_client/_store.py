"""The object store itself, where the server sends clients there: without the API key, and only while it is any use."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address
from threading import Lock
from typing import Any

import httpx

from curvature_client._errors import APIConnectionError, CurvatureError


class StoreUnreachable(Exception):
    """No connection: the address is perhaps one that only the server's own network knows."""


class StoreRefused(Exception):
    """An answer that is an error, e.g. because the address is no longer good."""


class Store:
    """Requests to addresses that the server has signed.

    Attributes:
        usable: whether to ask the server for such addresses. False once one led nowhere, and where
            `CURVATURE_DIRECT_TRANSFERS` is `off`.
    """

    def __init__(self, timeout: httpx.Timeout) -> None:
        self.usable = os.environ.get("CURVATURE_DIRECT_TRANSFERS", "").lower() != "off"
        self._timeout = timeout
        self._clients: dict[bool, httpx.Client] = {}
        self._lock = Lock()

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            client.close()

    @contextmanager
    def stream(
        self, method: str, url: str, *, headers: Mapping[str, str], content: Any = None
    ) -> Iterator[httpx.Response]:
        """Open one reply without reading its body.

        Raises:
            StoreUnreachable: no connection.
            StoreRefused: an answer that is an error.
            APIConnectionError: the connection broke.
        """
        try:
            with self._client(url).stream(
                method, url, headers=dict(headers), content=content, timeout=self._timeout
            ) as response:
                if not response.is_success:
                    raise StoreRefused(f"the object store answered {response.status_code}")
                yield response
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise StoreUnreachable(str(error)) from error
        except httpx.TransportError as error:
            raise APIConnectionError(
                f"the connection to the object store broke: {error or type(error).__name__}",
                code="connection_lost",
                remedy="try again; set CURVATURE_DIRECT_TRANSFERS=off to go through the server alone",
            ) from error
        except RuntimeError as error:
            if self._client(url).is_closed:
                raise CurvatureError(
                    "the client is closed",
                    code="client_closed",
                    remedy="read results before leaving its with-block, or call result.fetch_all() there",
                ) from error
            raise

    def _client(self, url: str) -> httpx.Client:
        """Clients of our own, not the user's: theirs may add headers to every request, which are the server's alone."""
        local = is_loopback(url)
        with self._lock:
            if local not in self._clients:
                self._clients[local] = httpx.Client(trust_env=not local)
            return self._clients[local]


def is_loopback(url: str) -> bool:
    """Whether the address is one of this machine's own loopback; a proxy from the environment never leads there."""
    host = httpx.URL(url).host
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
