"""Where messages may go: addresses, the operator's exceptions, and URLs as they are submitted."""

import asyncio
from ipaddress import ip_address

import pytest
from pydantic import ValidationError

from curvature_service import ServiceSettings
from curvature_service.errors import ApiError
from curvature_service.webhooks.addresses import (
    AddressPolicy,
    AddressRefused,
    is_public,
    literal_address,
    read_policy,
    resolve_host,
)
from curvature_service.webhooks.urls import check_url

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"]
NOT_PUBLIC = [
    *("127.0.0.1", "127.255.0.9", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1"),
    *("169.254.169.254", "169.254.0.1", "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "168.63.129.16"),
    *("192.0.2.1", "203.0.113.9", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "fe80::1", "fe80::1%2", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"),
    *(
        "64:ff9b:1::a00:1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "2002:808:808::1",
        "2001:0:808:808::1",
        "100::1",
        "3fff::1",
    ),
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_permitted(address):
    assert is_public(ip_address(address))


@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_other_addresses_are_not(address):
    assert not is_public(ip_address(address))
    assert not AddressPolicy().permits("host.example", ip_address(address))
    assert AddressPolicy(allow_private=True).permits("host.example", ip_address(address))


@pytest.mark.parametrize(
    ("allowed", "host", "address", "permitted"),
    [
        ("10.1.0.0/16", "a.example", "10.1.2.3", True),
        ("10.1.0.0/16", "a.example", "10.2.2.3", False),
        ("10.1.0.0/16", "a.example", "::ffff:10.1.2.3", True),
        ("10.1.2.3", "10.1.2.3", "10.1.2.3", True),
        ("fd00:1::/32, [fd00:2::1]", "a.example", "fd00:2::1", True),
        ("fd00:1::/32", "a.example", "fd00:2::1", False),
        ("Hooks.Internal", "hooks.internal.", "10.0.0.1", True),
        ("hooks.internal", "a.hooks.internal", "10.0.0.1", False),
        (" , ", "hooks.internal", "10.0.0.1", False),
    ],
)
def test_hosts_and_networks_can_be_allowed(allowed, host, address, permitted):
    assert read_policy(False, allowed).permits(host, ip_address(address)) is permitted


@pytest.mark.parametrize("entry", ["10.0.0.0/99", "http://a.example", "a..b", "*.example"])
def test_an_entry_that_allows_nothing_is_told_at_the_start(entry):
    with pytest.raises(ValidationError, match="neither a host name nor an address nor a network"):
        ServiceSettings(webhook_allowed_hosts=f"a.example, {entry}")


def find(policy, host, *found):
    async def resolve(_host, _port):
        return [ip_address(address) for address in found]

    return asyncio.run(policy.find(host, 443, resolve))


def test_one_private_address_among_others_refuses_the_host():
    with pytest.raises(AddressRefused, match=r"a\.example has an address that is not public"):
        find(AddressPolicy(), "a.example", "8.8.8.8", "10.0.0.1")
    assert find(AddressPolicy(), "a.example", "8.8.8.8", "8.8.4.4") == [ip_address("8.8.8.8"), ip_address("8.8.4.4")]


def test_localhost_is_resolved_and_refused():
    assert ip_address("127.0.0.1") in asyncio.run(resolve_host("localhost", 80))
    with pytest.raises(AddressRefused):
        asyncio.run(AddressPolicy().find("localhost", 80, resolve_host))


@pytest.mark.parametrize(
    ("host", "meant"), [("127.1", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("0x7f.0.0.1", "127.0.0.1"), ("a.b", None)]
)
def test_every_spelling_of_an_address_is_one(host, meant):
    assert literal_address(host) == (None if meant is None else ip_address(meant))


# URLs, when they are submitted


def refusal(url, **settings):
    with pytest.raises(ApiError) as caught:
        check_url(ServiceSettings(**settings), url)
    error = caught.value
    assert (error.code, error.param, error.status) == ("invalid_request", "webhook.url", 422)
    assert error.remedy
    return error.detail


@pytest.mark.parametrize(
    "url",
    [
        *("https://hooks.example/a?b=c", "http://hooks.example:8080/", "https://8.8.8.8/x", "https://exämple.com/"),
        *("http://[2606:2800:220:1::1]:81/", "http://localhost/resolved-later"),
    ],
)
def test_a_good_url_passes(url):
    check_url(ServiceSettings(), url)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "10.0.0.1:8080",
        "[::1]",
        "[::ffff:10.0.0.1]",
        "169.254.169.254",
        "127.1",
        "0x7f000001",
        "[fe80::1%25eth0]",
    ],
)
def test_an_address_that_is_not_public_is_refused_at_once(host):
    assert "is not public" in refusal(f"https://{host}/hook")
    check_url(ServiceSettings(webhook_allow_private=True), f"https://{host}/hook")


def test_an_allowed_address_passes():
    check_url(ServiceSettings(webhook_allowed_hosts="10.0.0.0/8"), "http://10.3.4.5/")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("ftp://a.example/", "http or https, not 'ftp'"),
        ("https://user:word@a.example/", "user or password"),
        ("https://user@a.example/", "user or password"),
        ("https://a.example\\@10.0.0.1/", "user or password"),
        ("https://a.example:99999/", "1 to 65535"),
        ("https://a.example:0/", "1 to 65535"),
        ("https:///path", "names no host"),
        ("https://a..b/", "names no host"),
        ("https://%31.com/", "names no host"),
        ("https://a.example/\x00", "is no URL"),
    ],
)
def test_a_url_that_cannot_be_sent_to_is_refused(url, told):
    assert told in refusal(url)
