"""A real HTTP server that answers range requests and misbehaves on request."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer:
    """Serves a folder on localhost. A context manager; its attributes may be changed while it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ranges = True
        """False: every answer is the whole file, as of a server that knows no ranges."""
        self.status: dict[str, int] = {}
        """Names of files answered with an error status."""
        self.failures: Counter[str] = Counter()
        """How often each file still answers 503 before it comes."""
        self.delay: dict[str, float] = {}
        """Seconds before a file comes."""
        self.cut_short: Counter[str] = Counter()
        """How often the connection still breaks in the middle of a file."""
        self.damaged: set[str] = set()
        """Files that come with a wrong byte."""
        self.whole: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        self.troubled = 0
        """Requests that had to wait, or got an error, by `delay` and `status`."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}/photos"

    def __enter__(self) -> RangeServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                name = self.path.removeprefix("/photos/")
                server.requests[name] += 1
                server.troubled += name in server.delay or name in server.status
                time.sleep(server.delay.get(name, 0))
                path = server.folder / name
                if server.failures[name] > 0:
                    server.failures[name] -= 1
                    return self.answer(503)
                if name in server.status:
                    return self.answer(server.status[name])
                if not path.is_file():
                    return self.answer(404)
                data = bytearray(path.read_bytes())
                if name in server.damaged:
                    data[len(data) // 2] ^= 1
                asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
                if asked and server.ranges:
                    return self.answer(206, data[int(asked[1]) : int(asked[2]) + 1], name)
                server.whole[name] += 1
                return self.answer(200, data, name)

            def answer(self, status: int, data: bytes = b"", name: str = "") -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if server.cut_short[name] > 0:
                    server.cut_short[name] -= 1
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(data)

            def handle(self) -> None:
                with suppress(ConnectionError, TimeoutError):  # the client went away
                    super().handle()

            def log_message(self, *_arguments) -> None:
                pass

        return Handler
