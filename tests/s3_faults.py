"""A server between a run and the real one that speaks S3: it counts what is asked, and fails where a test wants it to."""

import http.client
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

#: no message, log or file may hold it
SECRET = "canary/of+a-secret-key"
#: method and path -> status and body of an answer; None asks the real server
Answer = Callable[[str, str], tuple[int, bytes] | None]


def error(code: str, more: str = "") -> bytes:
    """The body of an error as S3 gives it."""
    return f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>".encode()


class Between:
    """The server; ``asked`` has method and path of every request, ``answer`` may be set at any time."""

    def __init__(self, address: str, real: str) -> None:
        self.address, self.real = address, urlsplit(real)
        self.asked: list[tuple[str, str]] = []
        self.answer: Answer = lambda method, path: None

    def puts(self, part: str) -> list[str]:
        """Paths that were written and hold a word."""
        return [path for method, path in self.asked if method == "PUT" and part in path]


@contextmanager
def between(real: str) -> Iterator[Between]:
    """Have a server between this process and the real one."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.asked.append((self.command, self.path))
            planned = state.answer(self.command, self.path)
            headers: list[tuple[str, str]] = []
            if planned is None:
                there = http.client.HTTPConnection(state.real.hostname, state.real.port, timeout=30)
                there.request(self.command, self.path, content, dict(self.headers))
                answer = there.getresponse()
                status, body, headers = answer.status, answer.read(), answer.getheaders()
                there.close()
            else:
                status, body = planned
            self.send_response_only(status)
            dropped = {"transfer-encoding", "connection"} | ({"content-length"} if self.command != "HEAD" else set())  # fmt: skip
            for name, value in headers:
                if name.lower() not in dropped:
                    self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = forward

        def log_message(self, *words: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *words: None  # type: ignore[method-assign]  # who asked may be gone
    state = Between(f"http://127.0.0.1:{server.server_address[1]}", real)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
