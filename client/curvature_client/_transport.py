"""Requests to the server: address, key, retries with backoff, and errors as exceptions.

A request is tried again after connection loss and after 429, 502, 503 and 504. Every request of this package may be
repeated without harm: uploads are known by their hash, and `POST /v1/jobs` carries an idempotency key.
"""

import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from threading import Event
from typing import Any, TypeVar

import httpx
import tenacity
from pydantic import BaseModel, ValidationError

from curvature_client._errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    CurvatureError,
    refusal,
    status_error,
)
from curvature_client._store import Store, is_loopback
from curvature_protocol.errors import Problem

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
RETRIED_STATUS = frozenset({429, 502, 503, 504})
FIRST_PAUSE_SECONDS = 0.4
LONGEST_PAUSE_SECONDS = 30.0

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)


class Transport:
    """One server as seen over one `httpx.Client`.

    Args:
        base_url: the server's address; else `CURVATURE_URL`, else the loopback default.
        api_key: else `CURVATURE_API_KEY`.
        timeout: of one request, in seconds or as `httpx.Timeout`.
        max_retries: further attempts after the first.
        http_client: used as it is and left open; else one of our own.
    """

    def __init__(
        self,
        base_url: str | None,
        api_key: str | None,
        timeout: float | httpx.Timeout | None,
        max_retries: int,
        http_client: httpx.Client | None,
    ) -> None:
        own = str(http_client.base_url) if http_client is not None else ""
        self.base_url = (base_url or own or os.environ.get("CURVATURE_URL") or DEFAULT_URL).rstrip("/")
        _check_url(self.base_url)
        self.timeout = httpx.Timeout(timeout) if not isinstance(timeout, httpx.Timeout) else timeout
        self.max_retries = max_retries
        self._owns_client = http_client is None
        self._client = http_client or httpx.Client(trust_env=not is_loopback(self.base_url))
        self.store = Store(self.timeout)
        api_key = api_key or os.environ.get("CURVATURE_API_KEY")
        self._headers = {"User-Agent": f"curvature-client/{_version()}"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def close(self) -> None:
        """Close the connections, if they are our own."""
        self.store.close()
        if self._owns_client:
            self._client.close()

    def get(self, path: str, kind: type[M], **arguments: Any) -> M:
        """GET and parse."""
        return self.parse(self.request("GET", path, **arguments), kind)

    def once(self, method: str, path: str, kind: type[M], **arguments: Any) -> M:
        """One attempt, read whole and parsed."""
        with self.stream(method, path, **arguments) as response:
            response.read()
        return self.parse(response, kind)

    def timeout_beyond(self, wait_seconds: float) -> httpx.Timeout:
        """The timeout of a request whose reply may take `wait_seconds` by design."""
        usual = self.timeout
        read = None if usual.read is None else usual.read + wait_seconds
        return httpx.Timeout(connect=usual.connect, read=read, write=usual.write, pool=usual.pool)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Callable[[], Any] | None = None,
        patience: int = 1,
        **arguments: Any,
    ) -> httpx.Response:
        """Send one request, again where that may help.

        Args:
            method: the verb.
            path: below the server's address.
            body: makes the body for each attempt (a stream can be read only once).
            patience: as in `retrying`.
            arguments: `params`, `json`, `content`, `headers`, `timeout` as in httpx.

        Raises:
            APIConnectionError: no answer.
            APIStatusError: an answer that is an error, as the class of its family.
        """

        def attempt() -> httpx.Response:
            content = {"content": body()} if body is not None else {}
            with self.stream(method, path, **content, **arguments) as response:
                response.read()
                return response

        return self.retrying(attempt, patience)

    @contextmanager
    def stream(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **arguments: Any
    ) -> Iterator[httpx.Response]:
        """Open one reply without reading its body; one attempt, errors as exceptions."""
        arguments.setdefault("timeout", self.timeout)
        with (
            self._translated(),
            self._client.stream(
                method, self.base_url + path, headers={**self._headers, **(headers or {})}, **arguments
            ) as response,
        ):
            if response.status_code >= 400:
                response.read()
                raise _error_of(response)
            yield response

    def retrying(self, attempt: Callable[[], T], patience: int = 1, stopped: Event | None = None) -> T:
        """Call until it succeeds, with growing, jittered pauses, `max_retries` times more, or `patience` times that.

        Pauses end early when `stopped` is set.
        """
        return tenacity.Retrying(
            sleep=tenacity.sleep if stopped is None else tenacity.sleep_using_event(stopped),
            stop=tenacity.stop_after_attempt(self.max_retries * patience + 1),
            wait=_pause,
            retry=tenacity.retry_if_exception(may_pass),
            reraise=True,
        )(attempt)

    def parse(self, response: httpx.Response, kind: type[M]) -> M:
        """Read a JSON reply."""
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            raise APIConnectionError(
                f"{response.url} answered, but not as a Curvature server does ({kind.__name__} expected)",
                code="invalid_reply",
                remedy="check the address, and that server and client are of one version",
            ) from error

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise self._absent(str(error)) from None  # the reason is in the message
        except httpx.TimeoutException as error:
            raise APITimeoutError(
                f"{self.base_url} did not answer in time ({type(error).__name__})",
                code="timeout",
                remedy="try again, or pass a longer timeout to Client",
            ) from error
        except httpx.TransportError as error:
            raise APIConnectionError(
                f"the connection to {self.base_url} broke: {error or type(error).__name__}",
                code="connection_lost",
                remedy="try again; a job already submitted goes on and can be found with client.jobs.list()",
            ) from error
        except RuntimeError as error:
            if self._client.is_closed:
                raise CurvatureError(
                    "the client is closed",
                    code="client_closed",
                    remedy="read results before leaving its with-block, or call result.fetch_all() there",
                ) from error
            raise

    def _absent(self, reason: str) -> APIConnectionError:
        return APIConnectionError(
            f"no server answers at {self.base_url} ({reason})",
            code="server_absent",
            remedy="start one with `curvature serve`, or name another with base_url= or CURVATURE_URL",
        )


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a moment later."""
    if isinstance(error, APIConnectionError):
        return error.code != "invalid_reply"
    return isinstance(error, APIStatusError) and error.status_code in RETRIED_STATUS


def backoff(attempt: int, error: BaseException | None = None) -> float:
    """Seconds before attempt number `attempt` + 1: what the server asked for, else up to 0.4, 0.8, …."""
    asked = getattr(error, "retry_after_seconds", None)
    if asked is not None:
        return min(float(asked), LONGEST_PAUSE_SECONDS)
    pause: float = random.uniform(0.5, 1.0) * min(FIRST_PAUSE_SECONDS * 2.0 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
    return pause


def _pause(state: tenacity.RetryCallState) -> float:
    return backoff(state.attempt_number, state.outcome.exception() if state.outcome else None)


def _error_of(response: httpx.Response) -> APIStatusError:
    try:
        problem = Problem.model_validate_json(response.content)
    except ValidationError:
        problem = None
    error = status_error(response.status_code, problem, response.headers.get("x-request-id"))
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isdecimal():
        error.retry_after_seconds = float(retry_after)
    return error


def _check_url(url: str) -> None:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise refusal(
            "invalid_request",
            f"the server's address must be like {DEFAULT_URL}; got {url!r}",
            param="base_url",
            remedy="pass base_url=, or set CURVATURE_URL",
        )


def _version() -> str:
    try:
        return metadata.version("curvature")
    except metadata.PackageNotFoundError:
        return "unknown"
