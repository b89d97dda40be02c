"""The server lets in who has the token and comes from its own page, and nobody else."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPConnection

import pytest

from weightsmith.errors import Error
from weightsmith.look import Server, _server


@pytest.fixture
def server(first, second):
    with Server([("one", first), ("two", second)]) as made:
        yield made


def say(server, method, path, body=None, token=True, **headers):
    """Status, headers and body of one request."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if token:
        sent["Authorization"] = f"Bearer {server.token}"
    connection.request(method, path, body, sent)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, answer.headers, content


def raw(server, data, seconds=5.0):
    """What comes back for these bytes, until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as one:
        one.sendall(data)
        found = b""
        while part := one.recv(65536):
            found += part
        return found


def test_the_page_and_its_parts(server):
    for path, kind, word in (("/", "text/html", b"<!DOCTYPE html>"), ("/page.js", "text/javascript", b'"use strict"')):
        status, headers, content = say(server, "GET", path)
        assert (status, headers.get_content_type()) == (200, kind)
        assert word in content
    style = say(server, "GET", "/page.css")[2]
    assert b"--paper" in style
    assert b"prefers-color-scheme: dark" in style


def test_every_answer_is_guarded(server):
    for method, path, token in (("GET", "/", True), ("GET", "/", False), ("GET", "/api/tensors?of=0", True)):
        headers = say(server, method, path, token=token)[1]
        policy = headers["Content-Security-Policy"]
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "default-src 'none'" in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not any(name.lower().startswith("access-control") for name in headers)


def test_no_script_or_style_stands_in_the_page(server):
    page = say(server, "GET", "/")[2].decode()
    assert page.count("<script") == 1
    assert "<style" not in page
    assert " style=" not in page
    script = say(server, "GET", "/page.js")[2].decode()
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert word not in script


ROUTES = ["checkpoints", "tensors?of=0", "tensor?of=0&tensor=0&kind=figures", "survey?of=0", "lineage?of=0"]


@pytest.mark.parametrize("path", [f"/api/{route}" for route in (*ROUTES, "file?of=0&file=0", "nothing")] + ["/nothing"])
def test_without_the_token_nothing_is_told(server, path):
    assert say(server, "GET", path, token=False)[0] == 403
    assert say(server, "GET", path, token=False, Authorization="Bearer wrong")[0] == 403
    assert say(server, "GET", path, token=False, Authorization="Bearer \xe9")[0] == 403
    assert say(server, "GET", path, token=False, Authorization=f"Basic {server.token}")[0] == 403
    assert say(server, "GET", path, token=False, Cookie=f"weightsmith-{server.port}={server.token}")[0] == 403
    assert say(server, "GET", f"{path}{'&' if '?' in path else '?'}token={server.token}", token=False)[0] == 403
    assert say(server, "POST", "/api/cancel", '{"job": 1}', token=False)[0] == 403


def test_the_page_is_the_same_for_everybody(server):
    for path in ("/", f"/?token={server.token}", "/?token=wrong", "/page.js", "/page.css"):
        status, headers, content = say(server, "GET", path, token=False)
        assert (status, content) == (200, say(server, "GET", path.partition("?")[0])[2])
        assert server.token.encode() not in content
        assert server.token not in str(headers)
        assert "Set-Cookie" not in headers  # it would be sent to every port of this machine


def test_who_has_the_address_is_given_the_token(server):
    for _ in range(2):
        status, headers, content = say(server, "POST", "/api/enter", server.token, token=False)
        assert (status, json.loads(content), "Set-Cookie" in headers) == (200, {"token": server.token}, False)
    for word in ("", "wrong", server.token[:-1], server.token + "x", "\xff", '"' + server.token + '"'):
        status, _, content = say(server, "POST", "/api/enter", word, token=False)
        assert (status, server.token.encode() in content) == (403, False)
    assert say(server, "POST", "/api/enter", server.token, token=False, Origin="http://evil.example")[0] == 403


def test_a_ticket_is_good_once(server, monkeypatch):
    def ticket():
        return server.ticket_url().partition("token=")[2]

    one = ticket()
    assert one != server.token
    assert say(server, "GET", "/api/checkpoints", token=False, Authorization=f"Bearer {one}")[0] == 403
    assert json.loads(say(server, "POST", "/api/enter", one, token=False)[2]) == {"token": server.token}
    assert say(server, "POST", "/api/enter", one, token=False)[0] == 403
    monkeypatch.setattr(_server, "TICKET_SECONDS", -1)
    assert say(server, "POST", "/api/enter", ticket(), token=False)[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost", ""])
def test_other_hosts_are_refused(server, host):
    assert say(server, "GET", "/", Host=host.format(port=server.port))[0] == 403


def test_own_hosts(server):
    for name in ("127.0.0.1", "localhost"):
        assert say(server, "GET", "/", Host=f"{name}:{server.port}")[0] == 200


def test_no_host_or_two(server):
    token = f"Authorization: Bearer {server.token}\r\n"
    own = f"Host: 127.0.0.1:{server.port}\r\n"
    for hosts in ("", own + own, own + "Host: evil\r\n"):
        assert b" 403 " in raw(server, f"GET / HTTP/1.1\r\n{hosts}{token}\r\n".encode())


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
def test_other_origins_are_refused(server, origin):
    for method, path, body in (("GET", "/api/checkpoints", None), ("POST", "/api/cancel", '{"job": 1}')):
        assert say(server, method, path, body, Origin=origin.format(port=server.port))[0] == 403


def test_cross_site_requests_are_refused(server):
    for site in ("cross-site", "same-site", "strange"):
        assert say(server, "GET", "/api/checkpoints", Sec_Fetch_Site=site)[0] == 403
        assert say(server, "POST", "/api/enter", server.token, token=False, Sec_Fetch_Site=site)[0] == 403
    own = f"http://127.0.0.1:{server.port}"
    for site in ("same-origin", "none"):
        assert say(server, "GET", "/api/checkpoints", Sec_Fetch_Site=site, Origin=own)[0] == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "CONNECT", "STRANGE"])
def test_other_methods_are_refused(server, method):
    status, headers, _ = say(server, method, "/")
    assert status == 405
    assert "Access-Control-Allow-Origin" not in headers


PATHS = ["/../pyproject.toml", "/page.py", "/static/page.js", "/%2e%2e/x", "/api/../page.js", "/api/", "/etc/passwd"]


@pytest.mark.parametrize("path", PATHS)
def test_no_path_is_opened(server, path):
    assert say(server, "GET", path)[0] == 404


def test_addresses_that_are_none(server):
    head = f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.token}\r\n\r\n"
    assert b" 400 " in raw(server, f"GET http://evil.example/ HTTP/1.1\r\n{head}".encode())
    assert b" 414 " in raw(server, f"GET /{'x' * 3000} HTTP/1.1\r\n{head}".encode())
    assert b" 414 " in raw(server, b"GET /" + b"x" * 70000)
    assert b" 431 " in raw(server, b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n")
    assert b" 400 " in raw(server, b"\x16\x03\x01 what is this\r\n\r\n")
    many = "&".join(f"a{i}=1" for i in range(50))
    assert say(server, "GET", f"/api/tensors?of=0&{many}")[0] == 404


def test_bodies(server):
    assert say(server, "GET", "/", "body")[0] == 400
    assert say(server, "POST", "/api/cancel", "x" * 5000)[0] == 413
    assert say(server, "POST", "/api/cancel", "[" * 4000)[0] == 400
    for body in ("", "{}", "[1]", '{"job": "x"}', '{"job": null}', "null", '{"job": Infinity}', "\xff"):
        assert say(server, "POST", "/api/cancel", body)[0] == 400
    assert json.loads(say(server, "POST", "/api/cancel", '{"job": 77}')[2]) == {"cancelled": False}
    assert say(server, "POST", "/api/tensors?of=0", "{}")[0] == 404
    head = f"Host: 127.0.0.1:{server.port}\r\nAuthorization: Bearer {server.token}\r\n"
    chunked = f"POST /api/cancel HTTP/1.1\r\n{head}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert b" 411 " in raw(server, chunked.encode())
    both = chunked.replace("chunked\r\n", "chunked\r\nContent-Length: 5\r\n")
    assert b" 411 " in raw(server, both.encode())
    twice = f"POST /api/cancel HTTP/1.1\r\n{head}Content-Length: 1\r\nContent-Length: 2\r\n\r\nxx"
    assert b" 411 " in raw(server, twice.encode())
    # A body that the headers hide would be taken for the next request.
    hidden = (
        f"GET / HTTP/1.1\r\n{head}Content-Length: 0\r\nContent-Length: 30\r\n\r\nGET /page.js HTTP/1.1\r\n{head}\r\n"
    )
    found = raw(server, hidden.encode())
    assert (found.count(b"HTTP/1.1 "), b" 400 " in found) == (1, True)


def test_requests_in_one_go(server):
    head = f"Host: 127.0.0.1:{server.port}\r\n"
    first = f"GET /api/checkpoints HTTP/1.1\r\n{head}Authorization: Bearer {server.token}\r\n\r\n"
    found = raw(server, (first + f"GET /api/checkpoints HTTP/1.1\r\n{head}Connection: close\r\n\r\n").encode())
    assert re.findall(rb"HTTP/1\.1 (\d+)", found) == [b"200", b"403"]


@pytest.mark.parametrize(
    "line",
    [
        b"GET /api/checkpoints",
        b"GET /api/checkpoints HTTP/0.9",
        b"GET /api/\x00 HTTP/1.1",
        b"GET  HTTP/1.1",
        b"GET /[ HTTP/1.1",
        b"GET ?of=0 HTTP/1.1",
        b"GET \xff HTTP/1.1",
        b"GET * HTTP/1.1",
        b"GET //[/page.js HTTP/1.1",
        b"\x00",
        b"GET / HTTP/9",
    ],
)
def test_words_that_are_no_request(server, capsys, line):
    found = raw(server, line + f"\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n".encode())
    assert not found.startswith(b"HTTP/1.1 2")
    assert b'checkpoints":' not in found
    assert capsys.readouterr().err == ""


def test_who_reads_slowly_is_served(server, monkeypatch):
    monkeypatch.setattr(_server._Handler, "timeout", 0.4)
    content = b"x" * 2**24
    server.files["/large"] = (content, "text/plain")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        one.sendall(f"GET /large HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nConnection: close\r\n\r\n".encode())
        found = 0
        while part := one.recv(2**18):
            found += len(part)
            time.sleep(0.02)  # 64 pieces: longer than one time limit
    assert found > len(content)


def hung_up(connection, seconds=5.0):
    """Whether the other side closes the connection, even if a letter is sent now and then."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            connection.sendall(b"A")
            connection.settimeout(0.1)
            try:
                if connection.recv(1) == b"":
                    return True
            except TimeoutError:
                continue
    except OSError:
        return True
    return False


def test_who_is_slow_is_hung_up_on(server, monkeypatch):
    monkeypatch.setattr(_server, "SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as one:
        one.sendall(b"GET / HT")
        assert hung_up(one)


def test_no_more_connections_than_agreed(server, monkeypatch):
    monkeypatch.setattr(_server, "CONNECTIONS", 3)
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(3)]
    time.sleep(0.2)
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as one:
        assert hung_up(one, 2)
    assert not hung_up(held[0], 0.5)
    for one in held:
        one.close()
    end = time.monotonic() + 5
    while len(server._http._open):
        assert time.monotonic() < end, "closed connections are still counted"
        time.sleep(0.02)
    assert say(server, "GET", "/")[0] == 200


def test_only_this_machine(server):
    assert server._http.server_address[0] == "127.0.0.1"
    assert server.url.startswith(f"http://127.0.0.1:{server.port}/?token=")


def test_computations_over_http(server):
    for _ in range(500):
        status, _, content = say(server, "GET", "/api/tensor?of=0&tensor=1&kind=figures")
        if status == 200:
            break
        assert status == 202
        time.sleep(0.01)
    assert json.loads(content)["statistics"]["norm"] > 0


def test_errors_have_words(server, monkeypatch, capsys):
    status, _, content = say(server, "GET", "/api/tensor?of=7&tensor=0&kind=figures")
    assert (status, json.loads(content)["error"]) == (404, "of must be a whole number below 2")

    def broken(*_):
        raise RuntimeError("a path such as /home/me, and \x1b[2J")

    monkeypatch.setattr(server.answers, "answer", broken)
    status, _, content = say(server, "GET", "/api/checkpoints")
    assert status == 500
    assert b"/home/me" not in content
    told = capsys.readouterr().err
    assert "RuntimeError" in told
    assert "\x1b" not in told
    assert "\\x1b[2J" in told


def test_a_connection_is_used_again(server):
    connection = HTTPConnection("127.0.0.1", server.port, timeout=20)
    for _ in range(3):
        connection.request("GET", "/api/tensors?of=0", headers={"Authorization": f"Bearer {server.token}"})
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (200, True)
    connection.close()


def test_a_port_that_is_taken(server, first):
    with pytest.raises(Error, match="--port 0"):
        Server([("one", first)], server.port)


def test_closed_is_closed(first):
    with Server([("one", first)]) as server:
        assert say(server, "GET", "/")[0] == 200
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url, timeout=5)
