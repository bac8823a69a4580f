"""Run inside a confined process: ends in the way it is told to."""

import ctypes
import os
import sys
import time


def serve(channel, isolation, options):
    channel.send({"event": "ready"})
    while (order := channel.receive()) is not None:
        ENDINGS[order["ending"]](channel)


def hold_the_interpreter(channel):
    """What an operator does that never lets another thread run."""
    channel.send({"event": "holding"})
    ctypes.PyDLL(None).sleep(600)


def say_garbage(channel):
    channel._socket.sendall(b"\x00\x00\x00\x04nope")
    time.sleep(600)


def begin_a_frame(channel):
    channel._socket.sendall(b"\x00\x00\x10\x00half")
    time.sleep(600)


def give_up_for_memory(channel):
    sys.stderr.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
    sys.stderr.flush()
    os.abort()


def chatter(channel):
    for number in range(5000):
        sys.stdout.write(f"line {number} \x1b[31m\n")
    channel.send({"event": "chattered"})


ENDINGS = {
    "exit": lambda channel: os._exit(3),
    "segfault": lambda channel: ctypes.string_at(0),
    "abort": lambda channel: os.abort(),
    "bad_alloc": give_up_for_memory,
    "garbage": say_garbage,
    "half a frame": begin_a_frame,
    "hold the interpreter": hold_the_interpreter,
    "chatter": chatter,
}
