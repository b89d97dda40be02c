"""The pickle interpreter: the same data as Python's own for plain values, and nothing else happens."""

from __future__ import annotations

import argparse
import collections
import datetime
import os
import pathlib
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.errors import FormatError
from weightsmith.weights import _pickle
from weightsmith.weights._pickle import Name, Opaque


class Memory:
    """Bytes in memory, as a file."""

    def __init__(self, content: bytes, name: str = "memory.pkl"):
        self.content, self.name, self.size = content, name, len(content)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    def view(self, offset: int, nbytes: int) -> Any:
        raise NotImplementedError

    def identity(self) -> object:
        return None


def load(content: bytes, **options: Any) -> Any:
    return _pickle.load(Memory(content), 0, len(content), **options).value


def refused(content: bytes, match: str) -> None:
    with pytest.raises(FormatError, match=match) as caught:
        load(content)
    assert str(caught.value).startswith("memory.pkl: ")


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


numbers = st.booleans() | st.integers(-(2**200), 2**200) | st.floats(allow_nan=False)
scalars = st.none() | numbers | st.text() | st.binary()
keys = st.text() | st.integers(-(2**63), 2**63 - 1)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(trees, st.integers(2, 5))
def test_plain_data_is_what_python_says(tree: Any, protocol: int) -> None:
    content = pickle.dumps(tree, protocol=protocol)
    assert load(content) == pickle.loads(content)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_containers_become_plain_ones(protocol: int) -> None:
    tree = {
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, x=[1]),
        "set": {7},
        "frozen": frozenset([8]),
        "bytes": b"\x00\xff",
        "array": bytearray(b"ab"),
        "complex": 1 + 2j,
    }
    found = load(pickle.dumps(tree, protocol=protocol))
    assert found == {
        "ordered": {"b": 1, "a": 2},
        "default": {"x": [1]},
        "set": [7],
        "frozen": [8],
        "bytes": b"\x00\xff",
        "array": b"ab",
        "complex": 1 + 2j,
    }
    assert list(found["ordered"]) == ["b", "a"]


def test_it_tells_where_a_pickle_ends() -> None:
    content = pickle.dumps([1, 2], protocol=2)
    loaded = _pickle.load(Memory(b"??" + content + b"rest"), 2, 100)
    assert (loaded.value, loaded.end) == ([1, 2], 2 + len(content))


def test_long_values_cross_the_runs_in_which_a_file_is_read() -> None:
    tree = ["x" * 300_000, b"y" * 700_000, list(range(100_000))]
    assert load(pickle.dumps(tree, protocol=4)) == tree


class Payload:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nothing_is_ever_run(tmp_path: Path, protocol: int) -> None:
    content = pickle.dumps([1, Payload(tmp_path / "ran")], protocol=protocol)
    found = load(content)
    assert not (tmp_path / "ran").exists()
    assert isinstance(found[1], Opaque)
    assert found[1].name == Name(os.system.__module__, "system")
    assert found[1].arguments == (f"touch {tmp_path / 'ran'}",)
    pickle.loads(content)
    assert (tmp_path / "ran").exists()  # so that the payload was a real one


def test_objects_become_their_class_and_state() -> None:
    found = load(pickle.dumps([argparse.Namespace(lr=0.1), datetime.date(2020, 1, 2), pathlib.PurePosixPath("a/b")]))
    assert [str(item.name) for item in found] == ["argparse.Namespace", "datetime.date", "pathlib.PurePosixPath"]
    assert found[0].state == {"lr": 0.1}


def test_a_subclass_of_dict_keeps_its_entries() -> None:
    found = load(pickle.dumps(collections.Counter("aab"), protocol=2))
    assert found.name == Name("collections", "Counter")
    assert found.arguments == ({"a": 2, "b": 1},)


def test_a_call_of_what_a_call_returned_is_not_made() -> None:
    content = b"\x80\x02cbuiltins\ngetattr\n(" + text("a") + text("b") + b"tR" + b"(" + text("c") + b"tR."
    found = load(content)
    assert (str(found.name), found.arguments) == ("builtins.getattr", ("c",))


def test_the_pickles_of_python_2() -> None:
    assert load(b"\x80\x02(U\x03abcT\x02\x00\x00\x00\xff\xfet.") == ("abc", b"\xff\xfe")
    assert load(b"\x80\x02c__builtin__\nset\n]K\x05a\x85R.") == [5]


def test_persistent_ids_are_handed_over() -> None:
    assert load(b"\x80\x02" + text("key") + b"Q.", persistent=lambda identity: [identity]) == ["key"]
    refused(b"\x80\x02" + text("key") + b"Q.", "kept elsewhere")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "truncated"),
        (b"\x80\x02", "truncated"),
        (b"\x80\x02]", "truncated"),
        (b"\x80\x02X\xff\xff\xff\xffabc.", "truncated"),
        (b"\x80\x02\x8d" + b"\xff" * 8 + b".", "truncated"),
        (b"\x80\x05\x8e" + b"\xff" * 8 + b".", "truncated"),
        (b"\x80\x01.", "protocol 1"),
        (b"\x80\x06N.", "protocol 6"),
        (b"\x80\x02.", "takes what is not there"),
        (b"\x80\x02a.", "takes what is not there"),
        (b"\x80\x02(a.", "takes what is not there"),
        (b"\x80\x02t.", "takes what is not there"),
        (b"\x80\x02]Nq\x010h\x02.", "takes what is not there"),
        (b"\x80\x02N(\x85.", "takes what is not there"),
        (b"\x80\x02I1\n.", "the opcode b'I'"),
        (b"\x80\x02\x82\x01.", r"the opcode b'\\x82'"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"\x80\x02c" + b"x" * 2000 + b"\nq\n.", "a name of more than 1024"),
        (b"\x80\x04NN\x93.", "without a readable name"),
        (b"\x80\x02\x8b\x00\x10\x00\x00" + b"\x01" * 4096 + b".", "an integer of 4096 bytes"),
        (b"\x80\x02" + b"(" * 2000 + b".", "more than 1000 levels"),
        (b"\x80\x02NNs.", "takes what is not there"),
        (b"\x80\x02NNNs.", "entries for what is no dictionary"),
        (b"\x80\x02}(Nu.", "entries for what is no dictionary"),
        (b"\x80\x02}Na.", "elements for what is no list"),
        (b"\x80\x02K\x01}b.", "a state for a builtins.int"),
        (b"\x80\x02c_codecs\nencode\n)R.", "a call of _codecs.encode that cannot be"),
        (b"\x80\x02cbuiltins\nset\nK\x01\x85R.", "a call of builtins.set that cannot be"),
        (b"\x80\x02ccollections\nOrderedDict\n]K\x01a\x85R.", "a call of collections.OrderedDict that cannot be"),
    ],
)
def test_broken_pickles_are_refused(content: bytes, match: str) -> None:
    refused(content, match)


def test_too_many_opcodes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pickle, "MOST_OPCODES", 1000)
    assert load(b"\x80\x02" + b"N0" * 400 + b"N.") is None
    refused(b"\x80\x02" + b"N0" * 600 + b"N.", "more than 1000 opcodes")


def test_copying_the_same_value_again_and_again_is_refused() -> None:
    copies = b"cbuiltins\nset\nq\x01](" + b"N" * 200_000 + b"eq\x00" + b"h\x01h\x00\x85R0" * 50_000
    tracemalloc.start()
    try:
        refused(b"\x80\x02" + copies + b".", "copy the same values")
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


def test_keys_that_take_for_ever_to_hash_are_not_hashed() -> None:
    laughs = b")" + b"2\x86" * 60  # a pair of the pair of the pair ...
    begun = time.perf_counter()
    found = load(b"\x80\x02}" + laughs + b"K\x01s.")
    assert time.perf_counter() - begun < 1
    assert [type(key) for key in found] == [Opaque]
    assert found[next(iter(found))] == 1


def test_deep_values_do_not_break_the_interpreter() -> None:
    lists, tuples = b"]" * 100_000 + b"a" * 99_999, b")" + b"\x85" * 100_000
    objects = b"ca\nb\n" * 30_000 + b")" + b"R\x85" * 30_000
    assert type(load(b"\x80\x02" + lists + b".")) is list
    assert type(load(b"\x80\x02" + tuples + b".")) is tuple
    assert type(load(b"\x80\x02" + objects + b".")[0]) is Opaque
