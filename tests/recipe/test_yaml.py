"""YAML as a tree that knows its places."""

from __future__ import annotations

import math
from typing import Any

import pytest

from weightsmith.errors import Error, FormatError
from weightsmith.recipe._yaml import Node, load, plain

TEXT = """\
# a comment
models:
  - model: a/b@rev   # another
    parameters: {weight: 1e-5, density: [1, .7, 0x10]}
  - model: "c"
flags: {yes: no, on: true, nothing: ~, time: 12:30, old: 010, day: 2024-01-02}
"""


def test_values_and_places():
    (document,) = load(TEXT, "f.yaml")
    assert plain(document) == {
        "models": [{"model": "a/b@rev", "parameters": {"weight": 1e-5, "density": [1, 0.7, 16]}}, {"model": "c"}],
        "flags": {"yes": "no", "on": True, "nothing": None, "time": "12:30", "old": 10, "day": "2024-01-02"},
    }
    models = document.value["models"].value
    weight = models[0].value["parameters"].value["weight"]
    assert (weight.line, weight.column, weight.file) == (4, 26, "f.yaml")
    key = models[0].value["parameters"].at("density")
    assert (key.value, key.line, key.column) == ("density", 4, 32)
    assert str(models[1].value["model"].error("wrong")) == "f.yaml:5:12: wrong"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("-3", -3),
        ("1.", 1.0),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("-2.5E-1", -0.25),
        ("0o17", 15),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("null", None),
        ("", None),
        ("False", False),
        ("1_000", "1_000"),
        ("1e", "1e"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("!!str 5", "5"),
        ("! 5", "5"),
        ("|-\n  a\n  b", "a\nb"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any):
    found = plain(load(text + "\n")[0]) if text else plain(load("---\n")[0])
    assert found == value
    assert type(found) is type(value)


def test_not_a_number():
    assert math.isnan(plain(load(".nan")[0]))


def test_documents():
    assert [plain(one) for one in load("a: 1\n---\nb: 2\n---\n")] == [{"a": 1}, {"b": 2}, None]
    assert load("") == []
    assert load("# nothing\n") == []


def test_anchors_and_merge_keys():
    (document,) = load("a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: {<<: [*x, {r: 5, p: 9}]}\nd: *x\n'<<': 4\n")
    assert plain(document) == {
        "a": {"p": 1, "q": 2},
        "b": {"p": 1, "q": 3},
        "c": {"p": 1, "q": 2, "r": 5},
        "d": {"p": 1, "q": 2},
        "<<": 4,
    }
    assert document.value["b"].at("p").line == 1


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: 1\nb: 2\na: 3", "3:1", "'a' is there already, at 1:1"),
        ("a: {b: 1, b: 1}", "1:11", "'b'"),
        ("a: !!python/object/apply:os.system [x]", "1:4", "tag"),
        ("a: !!int 5", "1:4", "tag"),
        ("a: !thing 5", "1:4", "tag"),
        ("a: *there", "1:4", "no anchor &there"),
        ("a: &x [1, *x]", "1:11", "inside of what it names"),
        ("[a]: 1\n", "1:1", "plain value"),
        ("a:\n  - [1", "2:7", "flow sequence"),
        ("a: 1\n\tb: 2", "2:1", "indent with spaces"),
        ("a: {<<: 5}", "1:9", "<< needs a mapping"),
        ("[" * 200 + "]" * 200, "1:102", "nested"),
    ],
)
def test_errors_say_where(text: str, place: str, words: str):
    with pytest.raises(Error) as found:
        load(text, "f.yaml")
    assert str(found.value).startswith(f"f.yaml:{place}: ")
    assert words in str(found.value)


def test_what_is_no_text():
    with pytest.raises(FormatError, match=r"f.yaml:1:4: "):
        load("a: \x00", "f.yaml")


def test_aliases_cannot_grow_without_end():
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    with pytest.raises(Error, match="more than"):
        load("\n".join(lines))


def test_keys_of_a_changed_node():
    node = Node({"a": Node(1, 3, 4, "f")}, 1, 1, "f")
    assert (node.at("a").value, node.at("a").line) == ("a", 3)
    assert (node.at("b").value, node.at("b").line) == ("b", 1)
