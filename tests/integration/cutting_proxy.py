"""TCP proxies: one that counts what goes to the server and cuts all connections when enough has; one that damages."""

import socket
import threading
from contextlib import suppress


class CuttingProxy:
    """Stands before a server on loopback while its `with` lasts.

    Attributes:
        sent_bytes: how many bytes went to the server.
        cuts: at how many sent bytes, in rising order, all connections are cut.
    """

    def __init__(self, address, cuts=()):
        self._address = address
        self.cuts = list(cuts)
        self.sent_bytes = 0
        self._lock = threading.Lock()
        self._open = set()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._cut()
        for thread in self._threads:
            thread.join(10)

    def _accept(self):
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            server = socket.create_connection(self._address)
            with self._lock:
                self._open |= {client, server}
            for source, target in ((client, server), (server, client)):
                thread = threading.Thread(target=self._pass_on, args=(source, target, target is server), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, source, target, to_server):
        try:
            while data := source.recv(2**16):
                target.sendall(self._changed(data) if to_server else data)
                if to_server and self._is_enough(len(data)):
                    self._cut()
        except OSError:
            pass
        finally:
            for end in (source, target):
                self._close(end)

    def _changed(self, data):
        return data

    def _is_enough(self, count):
        with self._lock:
            self.sent_bytes += count
            if self.cuts and self.sent_bytes >= self.cuts[0]:
                self.cuts.pop(0)
                return True
        return False

    def _cut(self):
        with self._lock:
            ends = list(self._open)
        for end in ends:
            self._close(end)

    def _close(self, end):
        with self._lock:
            self._open.discard(end)
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


class DamagingProxy(CuttingProxy):
    """Changes a bit in every large piece that goes to the server, as long as `damages` is set.

    A server that compares checksums refuses such pieces.
    """

    damages = True

    def _changed(self, data):
        if not self.damages or len(data) < 2**15:
            return data
        return data[:-1] + bytes([data[-1] ^ 1])
