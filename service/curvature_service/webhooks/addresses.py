"""Which addresses a message may be sent to.

A receiver is named by whoever submits a job, and the server stands where they do not: its network has metadata
services, databases and neighbours that trust it. So only public addresses are connected to, unless the operator says
otherwise; and what is connected to is the very address that was judged: a moment later, a name may have another.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Resolver = Callable[[str, int], Awaitable[list[Address]]]
"""(host, port) → the addresses that it has; raises OSError where it has none."""

_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NOWHERE = tuple(
    ipaddress.ip_network(network)
    for network in (
        "168.63.129.16/32",  # looks public, but is the platform's own service inside Azure's networks
        "192.0.0.0/24",  # for protocols (Oracle's metadata); the standard library calls some of it public, by version
        "192.88.99.0/24",  # relays of 6to4
        "2001::/32",  # Teredo and 6to4: an IPv4 address inside decides where packets go
        "2002::/16",
        "3fff::/20",  # for documentation; younger than some standard libraries
    )
)

_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?", re.IGNORECASE)
_NUMERIC = re.compile(r"[0-9][0-9a-fx.]*", re.IGNORECASE)


class AddressRefused(Exception):
    """A host that nothing is sent to; the text says why."""


@dataclass(frozen=True)
class AddressPolicy:
    """What the operator allows beside public addresses: all, or some hosts and networks."""

    allow_private: bool = False
    hosts: frozenset[str] = frozenset()
    networks: tuple[Network, ...] = ()

    def permits(self, host: str, address: Address) -> bool:
        """Whether `host` may be sent to at `address`."""
        reached = reached_address(address)
        listed = any(reached in network or address in network for network in self.networks)
        return self.allow_private or listed or canonical_host(host) in self.hosts or is_public(address)

    async def find(self, host: str, port: int, resolve: Resolver) -> list[Address]:
        """The host's addresses, to be connected to as they are.

        Raises:
            AddressRefused: one of them is not permitted: then none is, lest the order of answers decide.
            OSError: the host has no address.
        """
        literal = literal_address(host)
        addresses = await resolve(host, port) if literal is None else [literal]
        if not all(self.permits(host, address) for address in addresses):
            raise AddressRefused(f"{host} has an address that is not public")
        return addresses


def read_policy(allow_private: bool, allowed: str) -> AddressPolicy:
    """The policy of the settings; `allowed` is a list like `internal.example, 10.1.0.0/16`.

    Raises:
        ValueError: an entry is neither a host nor a network.
    """
    hosts, networks = set(), []
    for entry in filter(None, (part.strip() for part in allowed.split(","))):
        try:
            networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
        except ValueError:
            if not is_host_name(entry):
                raise ValueError(f"{entry!r} is neither a host name nor an address nor a network") from None
            hosts.add(canonical_host(entry))
    return AddressPolicy(allow_private, frozenset(hosts), tuple(networks))


async def resolve_host(host: str, port: int) -> list[Address]:
    """All addresses of a name, as the system knows them, in its order."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(place[0]) for *_, place in dict.fromkeys(found)]


def canonical_host(host: str) -> str:
    """The one spelling under which hosts are compared."""
    return host.lower().rstrip(".")


def is_host_name(host: str) -> bool:
    """Whether it has the form of a name in the DNS."""
    return _HOST.fullmatch(host) is not None


def literal_address(host: str) -> Address | None:
    """The address that a URL's host is, if it is no name; also in the forms that resolvers take for one, `127.1`."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host)) if _NUMERIC.fullmatch(host) else None
    except OSError:
        return None


def reached_address(address: Address) -> Address:
    """Where packets to this address end: an IPv4 address written as an IPv6 one, mapped or behind NAT64, is meant."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def is_public(address: Address) -> bool:
    """Whether anybody on the internet could send there, too."""
    reached = reached_address(address)
    if any(reached in network for network in _NOWHERE) or reached.is_multicast:
        return False
    unicast = isinstance(reached, ipaddress.IPv4Address) or reached in _GLOBAL_UNICAST
    return unicast and reached.is_global
