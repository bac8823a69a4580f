import socket
import struct
import threading

import pytest

from curvature_worker.channel import MAX_FRAME_BYTES, Channel, ChannelClosed


@pytest.fixture
def ends():
    left, right = socket.socketpair()
    yield Channel(left), right
    left.close()
    right.close()


def frame(data):
    return struct.pack(">I", len(data)) + data


def test_a_message_arrives_as_it_was_sent(ends):
    channel, other = ends
    Channel(other).send({"event": "done", "text": "β"})
    assert channel.receive(1) == {"event": "done", "text": "β"}


def test_messages_sent_together_arrive_one_by_one(ends):
    channel, other = ends
    other.sendall(frame(b'{"a": 1}') + frame(b'{"b": 2}'))
    assert channel.receive(1) == {"a": 1}
    assert channel.receive(1) == {"b": 2}


def test_a_large_message_arrives_whole(ends):
    channel, other = ends
    message = {"text": "x" * 3_000_000}
    sender = threading.Thread(target=Channel(other).send, args=(message,))
    sender.start()
    assert channel.receive(10) == message
    sender.join()


def test_silence_is_no_message(ends):
    channel, _ = ends
    assert channel.receive(0.01) is None


def test_a_frame_that_never_ends_keeps_nobody_waiting(ends):
    channel, other = ends
    other.sendall(frame(b'{"event": "done"}')[:-1])
    assert channel.receive(0.05) is None
    other.sendall(b"}")
    assert channel.receive(1) == {"event": "done"}


def test_a_listener_that_does_not_listen_keeps_nobody_waiting(ends):
    channel, _ = ends
    with pytest.raises(ChannelClosed):
        channel.send({"text": "x" * 10_000_000}, timeout_seconds=0.05)


@pytest.mark.parametrize(
    "data",
    [
        frame(b"no JSON"),
        frame(b"[1, 2]"),
        frame(b"\xff\xfe"),
        frame(b"[" * 1_000_000),
        struct.pack(">I", MAX_FRAME_BYTES + 1),
    ],
    ids=["text", "list", "bytes", "nested", "too long"],
)
def test_what_no_honest_side_sends_closes_the_channel(ends, data):
    channel, other = ends
    threading.Thread(target=other.sendall, args=(data,), daemon=True).start()
    with pytest.raises(ChannelClosed):
        channel.receive(10)


def test_a_side_that_is_gone_closes_the_channel(ends):
    channel, other = ends
    other.close()
    with pytest.raises(ChannelClosed):
        channel.receive(1)
    with pytest.raises(ChannelClosed):
        channel.send({})
