"""A receiver of webhooks: a real HTTP server on loopback that answers as told."""

import queue
import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

Answer = Callable[[BaseHTTPRequestHandler], None]
WAIT_SECONDS = 30


def answer(status: int, **headers: str) -> Answer:
    """A short answer; `retry_after` becomes `retry-after`."""

    def write(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", "0")
        handler.end_headers()

    return write


class Receiver:
    """Takes requests in while its `with` lasts; `received` has (path, headers, body) of each, in order.

    Answers come from `answers`, one for each request, and are 204 after the last.
    """

    def __init__(self, *answers: Answer, tls: ssl.SSLContext | None = None) -> None:
        self.received: queue.Queue[tuple[str, dict[str, str], bytes]] = queue.Queue()
        self.released = threading.Event()
        """Set at the end: what an answer waits for that is not to come."""
        answers_left = list(answers)
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                write = answers_left.pop(0) if answers_left else answer(204)
                received.put((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
                write(self)

            def do_GET(self) -> None:  # a redirect that is followed, wrongly, may come as this
                received.put((self.path, {}, b""))
                answer(204)(self)

            def log_message(self, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # several servers send at once

            def get_request(self) -> Any:
                connection, address = super().get_request()
                if tls is None:
                    return connection, address
                try:
                    return tls.wrap_socket(connection, server_side=True), address
                except OSError:  # the sender did not like our certificate
                    connection.close()
                    raise

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a sender that goes away is what some tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook"

    def next(self) -> tuple[str, dict[str, str], bytes]:
        return self.received.get(timeout=WAIT_SECONDS)

    def __enter__(self) -> "Receiver":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
