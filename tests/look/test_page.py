"""The page in a browser: no complaints, the tree, the search, the drawings, the keyboard."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from weightsmith import progress
from weightsmith.look import Server, _values
from weightsmith.weights import Weights

ROWS = "[...document.querySelectorAll('.row')]"
NAMES = f"{ROWS}.map((row) => row.title)"


@pytest.fixture
def server(first, second):
    with Server([("one", first), ("two", second)]) as made:
        yield made


@pytest.fixture
def alone(first):
    with Server([("one", first)]) as made:
        yield made


def open_page(browser, server, words=""):
    browser.open(server.url)
    browser.wait("document.querySelectorAll('.row').length > 0")
    if words:
        browser.run(f"location.hash = {words!r}")


def text(browser):
    return browser.run("document.getElementById('content').textContent")


def test_a_tensor(browser, alone):
    open_page(browser, alone)
    assert "token" not in browser.run("location.href")
    assert browser.run("document.cookie") == ""
    assert {"model", "head.weight", "broken"} <= set(browser.run(NAMES))
    browser.run("location.hash = '#of=0&at=%3Dmodel.layers.1.up.weight'")
    browser.wait("document.querySelectorAll('#content svg').length == 2")
    browser.wait("document.querySelector('#content canvas') !== null")
    assert "[16, 8]" in text(browser)
    bars = browser.run("document.querySelectorAll('#content svg rect').length")
    assert bars > 20
    browser.run("document.querySelector('input[value=magnitudes]').click()")
    assert browser.run("document.querySelectorAll('#content svg rect.violet').length") > 2
    assert browser.run("document.querySelector('#content svg').getAttribute('aria-label')").startswith("Histogram")
    assert browser.complaints == []


def test_names_are_text(browser, server):
    open_page(browser, server, "#of=0&at=%3D%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E.steps")
    browser.wait("document.getElementById('content').textContent.includes('onerror=alert(1)>.steps')")
    assert browser.run("document.querySelectorAll('img').length") == 0
    browser.run("location.hash = '#of=0'")
    browser.wait("document.getElementById('content').textContent.includes('config.json')")
    browser.run("[...document.querySelectorAll('button')].find((b) => b.textContent === 'config.json').click()")
    browser.wait("[...document.querySelectorAll('pre')].some((p) => p.textContent.includes('<script>alert(1)'))")
    # Nothing can be put in as markup, by whatever mistake.
    assert (
        browser.run("try { document.body.innerHTML = '<b>x</b>'; 'put in' } catch (error) { error.name }")
        == "TypeError"
    )
    browser.complaints = [one for one in browser.complaints if "TrustedHTML" not in one]
    assert browser.complaints == []


def test_search(browser, alone):
    open_page(browser, alone)
    for words, found in (
        ("up", {"model.layers.0.up.weight", "model.layers.1.up.weight"}),
        ("*norm*", {"model.layers.0.norm.weight", "model.layers.1.norm.weight"}),
        ("re:s\\.1.*up", {"model.layers.1.up.weight"}),
        ("LAYERS 0", {"model.layers.0.up.weight", "model.layers.0.norm.weight"}),
        ("nowhere", set()),
    ):
        browser.run("document.getElementById('search').value = ''; document.getElementById('search').focus()")
        browser.type(words)
        leaves = f"{ROWS}.filter((row) => !row.hasAttribute('aria-expanded')).map((row) => row.title)"
        assert set(browser.run(leaves)) == found
        assert f"{len(found)} of 9" in browser.run("document.getElementById('status').textContent")
    browser.run("document.getElementById('search').value = ''")
    browser.type("re:(")
    assert "No expression" in browser.run("document.getElementById('status').textContent")
    assert browser.complaints == []


def test_compare(browser, server):
    open_page(browser, server)
    assert browser.run("document.getElementById('against').value") == "1"
    browser.run("document.getElementById('survey').click()")
    browser.wait("document.getElementById('survey').disabled")
    browser.run("""
        for (const [id, value] of [['shape', 'list'], ['sort', 'change']]) {
          document.getElementById(id).value = value;
          document.getElementById(id).dispatchEvent(new Event('change'));
        }""")
    rows = browser.run(f"{ROWS}.map((row) => [row.title, row.querySelector('.figure').textContent])")
    assert dict(rows[:3]) == {
        "broken": "other shape",
        "new": "2nd only",
        "<img src=x onerror=alert(1)>.steps": "1st only",
    }
    assert rows[3][0] == "model.layers.1.up.weight"
    assert float(rows[3][1]) == pytest.approx(0.5, abs=0.01)
    assert {figure for _, figure in rows[4:]} <= {"same"}
    browser.run(f"{ROWS}[3].click()")
    browser.wait("document.getElementById('content').textContent.includes('signs flipped')")
    browser.wait(
        "document.querySelectorAll('#content svg').length == 2 && document.querySelector('#content canvas') !== null"
    )
    assert "0.5" in text(browser)
    assert browser.complaints == []


def test_keyboard(browser, alone):
    open_page(browser, alone)
    browser.run("document.getElementById('tree').focus()")
    active = "document.getElementById(document.getElementById('tree').getAttribute('aria-activedescendant'))"
    assert browser.run(f"{active}.title") == "model"
    assert browser.run(f"{active}.getAttribute('aria-expanded')") == "true"
    for key, name in (
        ("ArrowDown", "model.embed.weight"),
        ("ArrowDown", "model.layers"),
        ("ArrowRight", "model.layers"),
        ("ArrowRight", "model.layers.0"),
        ("ArrowRight", "model.layers.0"),
        ("ArrowRight", "model.layers.0.up.weight"),
        ("ArrowLeft", "model.layers.0"),
        ("ArrowLeft", "model.layers.0"),
        ("ArrowLeft", "model.layers"),
        ("End", "empty"),
        ("Home", "model"),
        ("ArrowUp", "model"),
    ):
        browser.press(key)
        assert browser.run(f"{active}.title") == name, key
    browser.press("ArrowDown")
    browser.press("Enter")
    browser.wait("document.querySelector('#content h2').textContent === 'model.embed.weight'")
    assert browser.run("document.activeElement.id") == "details"
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    roles = browser.run(
        f"{ROWS}.every((row) => row.getAttribute('role') === 'treeitem' && row.ariaLevel && row.ariaSetSize)"
    )
    assert roles
    assert browser.complaints == []


def test_a_link_opens_the_tree(browser, alone):
    open_page(browser, alone, "#of=0&at=%3Dmodel.layers.1.norm.weight")
    browser.wait(f"{ROWS}.some((row) => row.ariaSelected === 'true' && row.title === 'model.layers.1.norm.weight')")
    browser.run("history.back()")
    browser.wait("document.querySelector('#content h2').textContent === 'one'")
    assert browser.complaints == []


def test_a_computation_can_be_stopped(browser, alone, monkeypatch):
    steps = []

    def slow(node):
        with progress.task("a long picture", 10_000) as advance:
            for step in range(10_000):
                steps.append(step)
                time.sleep(0.01)
                advance(1)

    monkeypatch.setattr(_values, "picture", slow)
    open_page(browser, alone, "#of=0&at=%3Dmodel.layers.1.up.weight")
    browser.wait("document.getElementById('content').textContent.includes('a long picture')")
    browser.run("[...document.querySelectorAll('button')].find((one) => one.textContent === 'Stop').click()")
    browser.wait("document.getElementById('content').textContent.includes('Stopped.')")
    end = time.monotonic() + 10
    while alone.answers.jobs._active:
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.05)
    # What is left is called off as well.
    before = len(steps)
    browser.run("document.querySelector('[aria-label=\"Compute: Picture\"]').click()")
    browser.wait("document.getElementById('content').textContent.includes('a long picture')")
    browser.run("location.hash = '#of=0'")
    while alone.answers.jobs._active:
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.05)
    assert before < len(steps) < 5000
    assert browser.complaints == []


def test_everything_has_a_label(browser, server):
    open_page(browser, server, "#of=0&against=1&at=%3Dmodel.layers.1.up.weight")
    browser.wait("document.querySelectorAll('#content svg').length == 2")
    unnamed = browser.run("""
        [...document.querySelectorAll('input, select, button, progress, [role=img]')].filter((one) =>
          !(one.labels && one.labels.length) && !one.getAttribute('aria-label') && !one.textContent.trim()
        ).map((one) => one.outerHTML.slice(0, 200))""")
    assert unnamed == []


def test_phone(browser, server):
    browser.shape(390, 844)
    open_page(browser, server)
    assert browser.run("getComputedStyle(document.getElementById('details')).display") == "none"
    browser.run("location.hash = '#of=0&against=1&at=%3Dmodel.layers.1.up.weight'")
    browser.wait("document.querySelector('#content canvas') !== null")
    assert browser.run("getComputedStyle(document.getElementById('browser')).display") == "none"
    assert browser.run("document.documentElement.scrollWidth") <= 390
    browser.run("document.getElementById('back').click()")
    browser.wait("getComputedStyle(document.getElementById('browser')).display !== 'none'")
    assert browser.complaints == []


def test_many_tensors_are_few_elements(browser):
    one = torch.ones(2)
    weights = Weights.of({f"layers.{i // 10}.w{i % 10}": one[:] for i in range(20_000)})
    with Server([("many", weights)]) as server:
        open_page(browser, server)
        browser.run("""
            document.getElementById('shape').value = 'list';
            document.getElementById('shape').dispatchEvent(new Event('change'))""")
        assert browser.run("document.querySelectorAll('.row').length") < 100
        browser.run("document.getElementById('tree').scrollTop = 1e9")
        browser.wait(f"{NAMES}.includes('layers.1999.w9')")
        assert browser.run("document.querySelectorAll('.row').length") < 100
        state = browser.run("JSON.stringify([tree.rows.length, tree.fits])")
        assert json.loads(state) == [20_000, 20_000]
    assert browser.complaints == []


def test_another_port_of_this_machine_is_told_nothing(browser, alone):
    told = []

    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            told.append(f"{self.path} {self.headers}")
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        open_page(browser, alone)
        browser.open(f"http://127.0.0.1:{other.server_address[1]}/")
        browser.wait("document.readyState === 'complete' && location.port !== '' && document.images !== undefined")
        assert browser.run("localStorage.length") == 0
        other.shutdown()
    assert told
    assert alone.token not in "".join(told)


def test_the_browser_keeps_the_token(browser, alone):
    browser.open(alone.ticket_url())
    browser.wait("document.querySelectorAll('.row').length > 0")
    assert browser.run("location.href") == f"http://127.0.0.1:{alone.port}/"
    for _ in range(2):
        browser.open("about:blank")
        browser.wait("location.href === 'about:blank'")
        browser.open(f"http://127.0.0.1:{alone.port}/#of=0&at=.model")
        browser.wait("document.querySelector('#content h2')?.textContent === 'model'")
    assert browser.complaints == []


def test_a_wrong_address_says_so(browser, alone):
    browser.open(f"http://127.0.0.1:{alone.port}/?token=wrong")
    browser.wait("document.getElementById('banner')?.textContent")
    assert "not good" in browser.run("document.getElementById('banner').textContent")
    assert browser.run("document.querySelectorAll('.row').length") == 0
    assert "wrong" not in browser.run("location.href")


def test_the_skip_link_keeps_the_place(browser, server):
    open_page(browser, server, "#of=1&against=0&at=.model")
    browser.wait("document.querySelector('#content h2').textContent === 'model'")
    browser.run("document.querySelector('.skip').click()")
    assert browser.run("document.activeElement.id") == "details"
    assert browser.run("location.hash") == "#of=1&against=0&at=.model"


KINDS = [
    "float16",
    "bfloat16",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e8m0fnu",
    "int8",
    "uint16",
    "int64",
    "bool",
    "complex64",
]


def test_every_kind_of_tensor(browser):
    """Each is opened alone and against itself; nothing is complained of, and no panel is in words of trouble."""
    tensors = {name: torch.arange(1, 25).reshape(4, 6).to(getattr(torch, name)) for name in KINDS}
    tensors["packed"] = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    tensors |= {"scalar": torch.tensor(2.5), "zero": torch.zeros(3, 0), "one": torch.ones(1, 1)}
    tensors |= {"nan": torch.full((3, 4), float("nan")), "inf": torch.tensor([[float("inf"), -float("inf")]])}
    tensors["largest"] = torch.tensor([[-1.7e308, 1.7e308], [0, 1]], dtype=torch.float64)
    tensors["least"] = torch.tensor([[5e-324, 0], [0, 0]], dtype=torch.float64)
    tensors["close"] = torch.tensor([[1.0, 1 + 2**-52]], dtype=torch.float64)
    weights = Weights.of(tensors)
    with Server([("one", weights), ("two", weights)]) as server:
        for against in ("", "&against=1"):
            open_page(browser, server)
            for name in tensors:
                browser.run(f"location.hash = '#of=0{against}&at=%3D{name}'")
                browser.wait(
                    f"document.querySelector('#content h2').textContent === '{name}' && "
                    "!document.querySelector('#content .work progress') && "
                    "[...document.querySelectorAll('#content section > div')].every((d) => d.textContent !== '')"
                )
                assert not browser.run("document.querySelectorAll('#content .work').length"), name
                assert "NaN%" not in text(browser)
                assert browser.complaints == [], name


def test_an_empty_checkpoint(browser):
    with Server([("nothing", Weights.of({}))]) as server:
        browser.open(server.url)
        browser.wait("document.getElementById('status')?.textContent === '0 tensors'")
        browser.wait("document.querySelector('#content h2').textContent === 'nothing'")
        browser.run("document.getElementById('tree').focus()")
        for key in ("ArrowDown", "Enter", "ArrowLeft", "End"):
            browser.press(key)
    assert browser.complaints == []


def test_names_that_are_made_to_confuse(browser):
    names = ["", ".", "..", "a", "a.", "\0a.b", "\x1b[31m\u202egnp", "x" * 100_000, ".".join("ab" * 5000), "=a", "a.b"]
    with Server([("odd", Weights.of({name: torch.ones(1)[:] for name in names}))]) as server:
        open_page(browser, server)
        browser.run("""
            document.getElementById('shape').value = 'list';
            document.getElementById('shape').dispatchEvent(new Event('change'))""")
        shown = browser.run(NAMES)
        assert browser.run("state.root.kids.every((kid) => !(kid.tensor && kid.kids.length))")
        assert len(shown) == len(names)
        assert len(set(shown)) == len(names)
        assert all(len(name) < 500 for name in shown)
        assert not any(character in "".join(shown) for character in "\0\x1b\u202e")
        for index in range(len(names)):
            browser.run(f"{ROWS}[{index}].click()")
            browser.wait(f"{ROWS}[{index}].ariaSelected === 'true'")
            browser.wait(f"document.querySelector('#content h2').textContent === {ROWS}[{index}].title")
        assert browser.run("document.documentElement.scrollWidth") <= 1280
    assert browser.complaints == []


def test_what_is_not_finite_is_seen_in_the_tree(browser, alone):
    open_page(browser, alone)
    browser.run("document.getElementById('survey').click()")
    browser.wait("document.getElementById('survey').disabled")
    marked = browser.run(f"{ROWS}.filter((row) => row.querySelector('.figure .wrong')).map((row) => row.title)")
    assert marked == ["broken"]
