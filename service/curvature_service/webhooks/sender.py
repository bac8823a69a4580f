"""One try to send a message: one request, bounded in time and in what is read of the answer."""

import asyncio
import email.utils
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from curvature_service.webhooks.addresses import (
    Address,
    AddressPolicy,
    AddressRefused,
    Resolver,
    canonical_host,
    literal_address,
    resolve_host,
)
from curvature_service.webhooks.messages import headers_of
from curvature_state.webhooks import Delivery

_PORTS = {"http": 80, "https": 443}
_CONNECT_SECONDS = 5.0
_MOST_ADDRESSES = 4
_GONE = 410


@dataclass(frozen=True)
class Outcome:
    """What came of a try. Without a `problem` the message is delivered.

    Attributes:
        gone: whether the receiver wants no more tries.
        pause_seconds: how long it wants to be left alone.
    """

    problem: str | None = None
    gone: bool = False
    pause_seconds: float = 0.0


class Sender:
    """Sends messages to where the policy permits.

    Every try has a connection of its own, made to an address that was judged for this try. A pool would hand a
    connection made for one name to another name of the same address.
    """

    def __init__(
        self,
        policy: AddressPolicy,
        secret: str | None,
        *,
        timeout_seconds: float,
        resolve: Resolver = resolve_host,
    ) -> None:
        self._policy, self._secret, self._resolve = policy, secret, resolve
        self._timeout_seconds = timeout_seconds
        self._tls = httpx.create_ssl_context()  # trusts what SSL_CERT_FILE names, else the usual authorities

    async def send(self, delivery: Delivery, body: bytes) -> Outcome:
        """Try once; whatever goes wrong is the outcome's `problem`."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return _read(await self._post(httpx.URL(delivery.url), delivery, body))
        except TimeoutError:
            return Outcome(f"no answer within {self._timeout_seconds:g} s")
        except AddressRefused as refusal:
            return Outcome(str(refusal))
        except httpx.HTTPError as error:
            return Outcome(f"{type(error).__name__}: {error}")
        except (OSError, UnicodeError) as error:
            return Outcome(f"the host's name cannot be resolved: {error}")

    async def _post(self, url: httpx.URL, delivery: Delivery, body: bytes) -> httpx.Response:
        host = url.raw_host.decode("ascii")
        addresses = await self._policy.find(host, url.port or _PORTS[url.scheme], self._resolve)
        headers = headers_of(delivery.id, datetime.now(UTC), body, delivery.secret or self._secret)
        unreachable: Exception = OSError("it has no address")
        for address in addresses[:_MOST_ADDRESSES]:
            try:
                return await self._post_to(address, url, headers, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                unreachable = error
        raise unreachable

    async def _post_to(self, address: Address, url: httpx.URL, headers: dict[str, str], body: bytes) -> httpx.Response:
        """The answer's head. Its status is all we want to know: the rest is not read, however long it is."""
        host = url.raw_host.decode("ascii")
        timeout = httpx.Timeout(self._timeout_seconds, connect=_CONNECT_SECONDS)
        client = httpx.AsyncClient(verify=self._tls, timeout=timeout, trust_env=False, follow_redirects=False)
        answer = client.stream(
            "POST",
            url.copy_with(host=str(address)),
            headers={**headers, "host": url.netloc.decode("ascii"), "connection": "close"},
            content=body,
            # The certificate must be that of the name, not of the address.
            extensions={} if literal_address(host) else {"sni_hostname": canonical_host(host)},
        )
        async with client, answer as response:
            return response


def _read(response: httpx.Response) -> Outcome:
    if response.is_success:
        return Outcome()
    moved = "; redirects are not followed" if response.is_redirect else ""
    return Outcome(
        f"it answered {response.status_code}{moved}",
        gone=response.status_code == _GONE,
        pause_seconds=_pause(response.headers.get("retry-after")),
    )


def _pause(retry_after: str | None) -> float:
    """Seconds that a Retry-After asks for, as a number or a date; 0 where it says neither."""
    if retry_after is None:
        return 0.0
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:10])
    try:
        moment = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, OverflowError):
        return 0.0
