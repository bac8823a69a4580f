"""One try to send a message, to real receivers on loopback."""

import asyncio
import base64
import hashlib
import hmac
import re
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from pathlib import Path

import pytest
import trustme
from tests.service.receiver import Receiver, answer

from curvature_service.webhooks.addresses import AddressPolicy, read_policy
from curvature_service.webhooks.messages import headers_of
from curvature_service.webhooks.sender import Outcome, Sender
from curvature_state.webhooks import Delivery

BODY = b'{"type":"job.succeeded"}'
LOOPBACK = read_policy(False, "127.0.0.0/8")
SECRET = "the-secret-of-the-request"


def delivery(url, secret=SECRET):
    return Delivery("message-1", "default", "job", "0" * 32, url, 1, secret)


def send(url, *, policy=LOOPBACK, secret=SECRET, server_secret=None, timeout_seconds=20.0, **options):
    sender = Sender(policy, server_secret, timeout_seconds=timeout_seconds, **options)
    return asyncio.run(sender.send(delivery(url, secret), BODY))


def resolving(*found):
    """A resolver whose answers come from a list, one list of addresses for each question."""
    left = list(found)

    async def resolve(_host, _port):
        return [ip_address(address) for address in left.pop(0)]

    return resolve


# What is sent


def sign(key, headers, body):
    """As the specification of Standard Webhooks says, in the plainest way."""
    told = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.{body.decode()}"
    return "v1," + base64.b64encode(hmac.digest(key, told.encode(), hashlib.sha256)).decode()


def test_the_message_arrives_signed():
    with Receiver() as receiver:
        assert send(receiver.url + "?a=b%20c") == Outcome()
        path, headers, body = receiver.next()
    assert (path, body) == ("/hook?a=b%20c", BODY)
    assert headers["content-type"] == "application/json"
    assert headers["user-agent"].startswith("Curvature/")
    assert headers["host"] == f"127.0.0.1:{receiver.port}"
    assert headers["webhook-id"] == "message-1"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert headers["webhook-signature"] == sign(SECRET.encode(), headers, body)


@pytest.mark.parametrize(
    ("own", "servers", "key"),
    [
        (None, "the-secret-of-the-server", b"the-secret-of-the-server"),
        (SECRET, "the-secret-of-the-server", SECRET.encode()),
        ("whsec_" + base64.b64encode(bytes(range(24))).decode(), None, bytes(range(24))),
    ],
)
def test_the_requests_own_secret_comes_before_the_servers(own, servers, key):
    with Receiver() as receiver:
        send(receiver.url, secret=own, server_secret=servers)
        _, headers, body = receiver.next()
    assert headers["webhook-signature"] == sign(key, headers, body)


@pytest.mark.parametrize("servers", [None, ""])
def test_without_a_secret_there_is_no_signature(servers):
    with Receiver() as receiver:
        assert send(receiver.url, secret=None, server_secret=servers) == Outcome()
        _, headers, _ = receiver.next()
    assert "webhook-signature" not in headers
    assert headers["webhook-id"] == "message-1"


def test_the_signature_is_that_of_the_specifications_example():
    moment = datetime.fromtimestamp(1614265330, UTC)
    headers = headers_of(
        "msg_p5jXN8AQM9LWM0D4loKWxJek", moment, b'{"test": 2432232314}', "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    )
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_documents_way_to_verify_is_right():
    page = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {}
    exec(code, names)
    with Receiver() as receiver:
        send(receiver.url)
        _, headers, body = receiver.next()
    names["verify"](SECRET, headers, body)
    with pytest.raises(ValueError, match="signature is wrong"):
        names["verify"](SECRET, headers, body + b" ")
    with pytest.raises(ValueError, match="too old"):
        names["verify"](SECRET, {**headers, "webhook-timestamp": "1614265330"}, body)


# What the answer means


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_any_success_is_delivery(status):
    with Receiver(answer(status)) as receiver:
        assert send(receiver.url) == Outcome()


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
def test_any_other_answer_is_a_failed_try(status):
    with Receiver(answer(status)) as receiver:
        assert send(receiver.url) == Outcome(f"it answered {status}")


def test_gone_means_that_no_other_try_is_wanted():
    with Receiver(answer(410)) as receiver:
        assert send(receiver.url).gone


def test_a_redirect_is_not_followed():
    with Receiver() as elsewhere:
        with Receiver(answer(302, location=elsewhere.url), answer(307, location=elsewhere.url)) as receiver:
            for status in (302, 307):
                assert send(receiver.url) == Outcome(f"it answered {status}; redirects are not followed")
        assert elsewhere.received.empty()


@pytest.mark.parametrize("form", ["in seconds", "as a date"])
def test_a_receiver_may_ask_to_be_left_alone(form):
    date = format_datetime(datetime.now(UTC) + timedelta(minutes=10), usegmt=True)
    asked = "120" if form == "in seconds" else date
    with Receiver(answer(429, retry_after=asked)) as receiver:
        assert 100 < send(receiver.url).pause_seconds <= 600


@pytest.mark.parametrize("asked", ["soon", "-5", "Thu, 01 Jan 1970 00:00:00 GMT", "Thu, 99 Foo", "²"])
def test_a_pause_that_makes_no_sense_is_none(asked):
    with Receiver(lambda handler: answer(503, retry_after=asked)(handler)) as receiver:
        assert send(receiver.url).pause_seconds == 0


# Receivers that misbehave


def test_an_answer_without_end_is_not_read():
    closed = []

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        try:
            while True:
                handler.wfile.write(b"x" * 2**16)
        except OSError as error:
            closed.append(error)

    with Receiver(endless) as receiver:
        assert send(receiver.url) == Outcome()
    assert closed


def test_a_receiver_that_says_nothing_is_left():
    with Receiver(lambda handler: receiver.released.wait()) as receiver:
        assert send(receiver.url, timeout_seconds=0.2).problem == "no answer within 0.2 s"


def test_a_receiver_that_speaks_too_slowly_is_left():
    def drip(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        try:
            while not receiver.released.wait(0.05):
                handler.wfile.write(b"x-more: of this\r\n")
        except OSError:
            pass

    with Receiver(drip) as receiver:
        assert send(receiver.url, timeout_seconds=0.4).problem == "no answer within 0.4 s"


def test_headers_without_end_are_not_read():
    def write(handler):
        try:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nx-long: ")
            while True:
                handler.wfile.write(b"x" * 2**16)
        except OSError:
            pass

    with Receiver(write) as receiver:
        assert "RemoteProtocolError" in send(receiver.url).problem


def test_what_is_no_http_is_a_failed_try():
    with Receiver(lambda handler: handler.wfile.write(b"220 mail.example ESMTP\r\n")) as receiver:
        assert "RemoteProtocolError" in send(receiver.url).problem


def test_nobody_there_is_a_failed_try():
    with Receiver() as receiver:
        pass
    assert "ConnectError" in send(receiver.url).problem


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 64 + ".example"])
def test_a_name_without_an_address_is_a_failed_try(host):
    assert "cannot be resolved" in send(f"http://{host}/").problem


# Where it is sent


def test_a_private_address_is_refused_before_anything_is_sent():
    with Receiver() as receiver:
        for url in (receiver.url, receiver.url.replace("127.0.0.1", "localhost")):
            assert "is not public" in send(url, policy=AddressPolicy()).problem
        assert receiver.received.empty()


def test_a_name_that_resolves_to_loopback_is_refused():
    with Receiver() as receiver:
        url = f"http://harmless.example:{receiver.port}/"
        outcome = send(url, policy=AddressPolicy(), resolve=resolving(["127.0.0.1"]))
        assert outcome == Outcome("harmless.example has an address that is not public")
        assert receiver.received.empty()


def test_a_name_is_resolved_once_and_what_was_judged_is_connected_to():
    """Rebinding: a second resolution would lead elsewhere."""
    with Receiver() as receiver:
        url = f"http://rebinding.example:{receiver.port}/"
        once = resolving(["127.0.0.1"])  # a second question would raise IndexError
        assert send(url, resolve=once) == Outcome()
        _, headers, _ = receiver.next()
    assert headers["host"] == f"rebinding.example:{receiver.port}"


def test_every_try_judges_anew():
    with Receiver() as receiver:
        sender = Sender(
            read_policy(False, "127.0.0.2"),
            None,
            timeout_seconds=20,
            resolve=resolving(["127.0.0.2"], ["127.0.0.1"]),
        )
        message = delivery(f"http://rebinding.example:{receiver.port}/")
        first = asyncio.run(sender.send(message, BODY))
        second = asyncio.run(sender.send(message, BODY))
        assert "ConnectError" in first.problem  # nobody listens there, but it was permitted
        assert "is not public" in second.problem
        assert receiver.received.empty()


def test_an_allowed_name_may_have_a_private_address():
    with Receiver() as receiver:
        url = f"http://hooks.internal:{receiver.port}/"
        policy = read_policy(False, "hooks.internal")
        assert send(url, policy=policy, resolve=resolving(["127.0.0.1"])) == Outcome()


def test_the_next_address_is_tried_where_one_does_not_answer():
    with Receiver() as receiver:
        url = f"http://two.example:{receiver.port}/"
        assert send(url, resolve=resolving(["127.0.0.9", "127.0.0.1"])) == Outcome()


def test_a_proxy_of_the_environment_is_not_used(monkeypatch):
    with Receiver() as proxy, Receiver() as receiver:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        assert send(receiver.url) == Outcome()
        assert proxy.received.empty()


# TLS: the certificate is that of the name, though an address is connected to


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))


def serving_as(authority, *names):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def test_a_certificate_of_the_name_is_accepted(authority, trusted):
    asked = []
    tls = serving_as(authority, "hooks.example")
    tls.sni_callback = lambda _socket, name, _context: asked.append(name)
    with Receiver(tls=tls) as receiver:
        url = f"https://hooks.example:{receiver.port}/"
        assert send(url, resolve=resolving(["127.0.0.1"])) == Outcome()
        receiver.next()
    assert asked == ["hooks.example"]


def test_a_certificate_of_an_address_is_accepted_where_the_url_names_it(authority, trusted):
    with Receiver(tls=serving_as(authority, "127.0.0.1")) as receiver:
        assert send(receiver.url.replace("http:", "https:")) == Outcome()


@pytest.mark.parametrize("name", ["other.example", "127.0.0.1"])
def test_a_certificate_of_another_name_is_not(authority, trusted, name):
    with Receiver(tls=serving_as(authority, name)) as receiver:
        problem = send(f"https://hooks.example:{receiver.port}/", resolve=resolving(["127.0.0.1"])).problem
        assert "certificate verify failed" in problem
        assert receiver.received.empty()


def test_a_certificate_of_an_unknown_authority_is_not(authority):
    with Receiver(tls=serving_as(authority, "hooks.example")) as receiver:
        problem = send(f"https://hooks.example:{receiver.port}/", resolve=resolving(["127.0.0.1"])).problem
        assert "certificate verify failed" in problem
        assert receiver.received.empty()
