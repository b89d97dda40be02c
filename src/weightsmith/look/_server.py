"""The server of the page: it listens to this machine only, and answers who has the address.

Any page that a browser shows, and any user of the machine, can try to talk to a server on it. So:

- it is bound to 127.0.0.1, and the ``Host`` of a request must say so (a name that resolves to this
  machine is refused);
- a question needs the token of the address, in the header ``Authorization: Bearer ...``. The page
  itself (its text, style and script: nothing of a checkpoint) is given to anybody. Its script takes the
  token from the address and keeps it where the browser keeps the data of one port: a cookie would be
  sent to whoever listens on another port of this machine. The browser is started with a ticket instead,
  which is exchanged for the token once, since other users can see the words that a program is started
  with (one who is faster than the browser gets in, and the page then says that its address is used up);
- what a browser says comes from elsewhere (``Origin``, ``Sec-Fetch-Site``) is refused;
- nothing of a request is ever a path: checkpoints, tensors and files have numbers;
- the page may load only its own script and style, and cannot put text in as markup (its Content
  Security Policy demands Trusted Types and allows none).
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import secrets
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from weightsmith.errors import Error
from weightsmith.look._answers import Answers, Unknown, encoded
from weightsmith.look._jobs import Busy, Stopped
from weightsmith.text import clean
from weightsmith.weights import Weights

HOST = "127.0.0.1"

LONGEST = 2048
"""Characters of an address."""

LARGEST = 4096
"""Bytes of a body."""

CONNECTIONS = 48
"""Open at a time; more are closed at once."""

SECONDS = 15.0
"""For a request to arrive. An idle connection is closed after as long."""

TICKET_SECONDS = 120.0

PIECE = 2**20
"""Bytes of an answer that are sent at once."""

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}

_STATIC = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}


class Server:
    """Serves a page on some checkpoints until it is closed.

    Args:
        checkpoints: what to call each, and its weights.
        port: to listen on; 0 takes one that is free.

    Raises:
        Error: nothing to show, or the port is taken.

    >>> import torch, urllib.request
    >>> from weightsmith.weights import Weights
    >>> with Server([("mine", Weights.of({"w": torch.ones(2)}))]) as server:
    ...     address = f"http://127.0.0.1:{server.port}/api/tensors?of=0"
    ...     asked = urllib.request.Request(address, headers={"Authorization": f"Bearer {server.token}"})
    ...     json.load(urllib.request.urlopen(asked))["rows"]
    [['w', 0, [2], -1]]
    """

    def __init__(self, checkpoints: Sequence[tuple[str, Weights]], port: int = 0):
        self.token = secrets.token_urlsafe(32)
        self.answers = Answers(checkpoints)
        try:
            self._http = _Http((HOST, port), self)
        except (OSError, OverflowError) as error:
            self.answers.jobs.stop()
            reason = getattr(error, "strerror", None) or error
            raise Error(f"cannot listen on port {port} of {HOST}: {reason}; --port 0 takes a free one") from None
        self.port: int = self._http.server_address[1]
        self.files = {path: (_static(name), kind) for path, (name, kind) in _STATIC.items()}
        self._tickets: dict[str, float] = {}
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The address that lets its owner in, as often as wanted."""
        return f"http://{HOST}:{self.port}/?token={self.token}"

    def ticket_url(self) -> str:
        """An address that lets in once, within two minutes."""
        ticket = secrets.token_urlsafe(32)
        with self._lock:
            self._tickets[ticket] = time.monotonic() + TICKET_SECONDS
        return f"http://{HOST}:{self.port}/?token={ticket}"

    def lets_in(self, token: str) -> bool:
        """Whether this is the token, or a ticket that is still good (and now is not)."""
        if is_same(token, self.token):
            return True
        with self._lock:
            found = next((ticket for ticket in self._tickets if is_same(token, ticket)), None)
            return found is not None and self._tickets.pop(found) > time.monotonic()

    def serve(self) -> None:
        """Answer until another thread calls `close`, or an exception (Ctrl-C) ends it."""
        try:
            self._http.serve_forever(poll_interval=0.25)
        finally:
            self.answers.jobs.stop()
            self._http.server_close()

    def close(self) -> None:
        """Stop answering, call computations off, and free the port."""
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self.answers.jobs.stop()
        self._http.server_close()

    def __enter__(self) -> Server:
        self._thread = threading.Thread(target=self.serve, name="look", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def is_same(one: str, other: str) -> bool:
    """Compared in a time that does not tell how much of it is right."""
    return hmac.compare_digest(one.encode("utf-8", "surrogateescape"), other.encode())


def _report(error: BaseException) -> None:
    """Print a mistake of ours; what it quotes of a file must not command the terminal."""
    lines = "".join(traceback.format_exception(error)).split("\n")
    print("\n".join(map(clean, lines)), end="", file=sys.stderr)


def _static(name: str) -> bytes:
    content = (resources.files("weightsmith.look") / "static" / name).read_bytes()
    if name.endswith(".css"):
        from weightsmith.page import colours

        return colours().encode() + b"\n" + content
    return content


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = os.name == "posix"  # elsewhere it lets another program take the port as well
    allow_reuse_port = False
    request_queue_size = 32

    def __init__(self, address: tuple[str, int], owner: Server):
        self.owner = owner
        self._open: dict[Any, float] = {}  # connection -> since when it reads
        self._guard = threading.Lock()
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # without asking a name server who we are
        self.server_name, self.server_port = HOST, self.server_address[1]

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self._guard:
            if len(self._open) >= CONNECTIONS:
                return False
            self._open[request] = time.monotonic()
            return True

    def reads(self, connection: Any, now: bool) -> None:
        """A connection waits for a request, or works on one."""
        with self._guard:
            if connection in self._open:
                self._open[connection] = time.monotonic() if now else float("inf")

    def shutdown_request(self, request: Any) -> None:
        with self._guard:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        late = time.monotonic() - SECONDS
        with self._guard:
            slow = [connection for connection, since in self._open.items() if since < late]
        for connection in slow:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.owner.answers.jobs.sweep()

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            _report(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http  # type: ignore[assignment]
    timeout = SECONDS

    # A request

    def handle_one_request(self) -> None:
        self.server.reads(self.connection, True)
        try:
            super().handle_one_request()
        except (TimeoutError, ConnectionError):
            self.close_connection = True

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        self.server.reads(self.connection, False)
        return True

    def do_GET(self) -> None:
        if self._refused() or not self._empty():
            return
        parts = urlsplit(self.path)
        if parts.path in self.server.owner.files:
            content, kind = self.server.owner.files[parts.path]
            self._send(200, content, kind)
        elif not self._allowed():
            self._say(403, "Open the address that weightsmith look has printed: it ends with a token.")
        elif parts.path.startswith("/api/"):
            route, asked = parts.path.removeprefix("/api/"), self._asked(parts.query)
            self._answer(lambda: self.server.owner.answers.answer(route, asked))
        else:
            self._say(404, "There is no such page.")

    def do_POST(self) -> None:
        if self._refused():
            return
        body = self._body()
        if body is None:
            return
        path = urlsplit(self.path).path
        if path == "/api/enter":
            self._enter(body)
        elif not self._allowed():
            self._say(403, "Not allowed.")
        elif path != "/api/cancel":
            self._say(404, "There is nothing to be sent to here.")
        else:
            try:
                number = int(json.loads(body)["job"])
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
                self._say(400, 'A body such as {"job": 3} is needed.')
                return
            self._answer(lambda: self.server.owner.answers.cancel(number))

    # Who asks

    def _refused(self) -> bool:
        """Refuse what was not meant for this server or does not come from its page."""
        port = self.server.owner.port
        hosts = {f"{name}:{port}" for name in (HOST, "localhost")} | ({HOST, "localhost"} if port == 80 else set())
        named = self.headers.get_all("Host") or []
        if len(named) != 1 or named[0] not in hosts:
            return self._stop(403, "This server answers to its own address only.")
        origins = self.headers.get_all("Origin") or []
        if any(origin != f"http://{named[0]}" for origin in origins):
            return self._stop(403, "Requests from other pages are refused.")
        if any(site not in ("same-origin", "none") for site in self.headers.get_all("Sec-Fetch-Site") or []):
            return self._stop(403, "Requests from other pages are refused; paste the address into a new window.")
        if len(self.path) > LONGEST:
            return self._stop(414, "The address is too long.")
        if not self.path.startswith("/") or self.path.startswith("//"):
            return self._stop(400, "Not an address of this server.")
        return False

    def _allowed(self) -> bool:
        scheme, _, word = self.headers.get("Authorization", "").partition(" ")
        return scheme.lower() == "bearer" and is_same(word.strip(), self.server.owner.token)

    def _enter(self, word: bytes) -> None:
        """Give the token for itself, or for a ticket that is still good."""
        owner = self.server.owner
        if owner.lets_in(word.decode("utf-8", "replace")):
            self._send(200, encoded({"token": owner.token}), "application/json")
        else:
            self._say(403, "This address is not, or no longer, good.")

    # What is asked

    def _asked(self, query: str) -> dict[str, str]:
        try:
            return dict(parse_qsl(query, max_num_fields=8, keep_blank_values=True))
        except ValueError:
            return {}

    def _empty(self) -> bool:
        """Whether there is no body; what has one here is up to something."""
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or any(length != "0" for length in lengths):
            return not self._stop(400, "A GET has no body.")
        return True

    def _body(self) -> bytes | None:
        lengths = self.headers.get_all("Content-Length") or []
        if "Transfer-Encoding" in self.headers or len(lengths) != 1 or not lengths[0].isascii():
            self._stop(411, "The length of the body is needed.")
        elif not lengths[0].isdigit() or len(lengths[0]) > 9 or int(lengths[0]) > LARGEST:
            self._stop(413, "The body is too large.")
        else:
            self.server.reads(self.connection, True)
            body = self.rfile.read(int(lengths[0]))
            self.server.reads(self.connection, False)
            if len(body) == int(lengths[0]):
                return body
            self.close_connection = True
        return None

    def _answer(self, ask: Any) -> None:
        try:
            status, content = ask()
        except Unknown as error:
            status, content = 404, encoded({"error": str(error)})
        except Busy as error:
            status, content = 503, encoded({"error": str(error)})
        except Stopped:
            status, content = 409, encoded({"error": "called off"})
        except (Error, OSError) as error:
            status, content = 422, encoded({"error": str(error)})
        except MemoryError:
            status, content = 422, encoded({"error": "there is not enough memory for this"})
        except Exception as error:
            _report(error)
            status, content = 500, encoded({"error": f"{type(error).__name__}; the terminal says more"})
        self._send(status, content, "application/json")

    # What is said

    def _stop(self, status: int, text: str) -> bool:
        """Say it and close the connection, as what follows cannot be trusted to be a request."""
        self.close_connection = True
        self._say(status, text)
        return True

    def _say(self, status: int, text: str) -> None:
        self._send(status, text.encode() + b"\n", "text/plain; charset=utf-8")

    def _send(self, status: int, content: bytes, kind: str, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | dict(more or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            for start in range(0, len(content), PIECE):  # who reads slowly has `SECONDS` for each
                self.wfile.write(content[start : start + PIECE])

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library refuses (a wrong request line, a method that is not there), in our words."""
        self.close_connection = True
        if not hasattr(self, "headers"):
            self.request_version = "HTTP/1.1"
        try:
            phrase = HTTPStatus(code).phrase
        except ValueError:
            phrase = "refused"
        self._say(405 if code == HTTPStatus.NOT_IMPLEMENTED else code, f"{phrase}.")

    def version_string(self) -> str:
        return "weightsmith"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written: addresses hold tokens."""
