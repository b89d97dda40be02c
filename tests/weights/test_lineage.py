"""Lineage: recorded, readable, bounded, and never believed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from weightsmith.weights import Step, Weights, open
from weightsmith.weights._files import LocalFile
from weightsmith.weights._lineage import KEY, LONGEST, digest, lines, parsed, written


def test_an_output_says_what_made_it(tmp_path: Path) -> None:
    Weights.of({"a": torch.ones(3)}).save(tmp_path / "in.safetensors")
    ((open(tmp_path / "in.safetensors") * 0.5).cast("bf16")).save(tmp_path / "one.safetensors")
    one = open(tmp_path / "one.safetensors")
    (one + one).save(tmp_path / "two.safetensors")
    tree = parsed(open(tmp_path / "two.safetensors").metadata)
    assert tree
    assert tree["method"] == "add"
    opened = tree["inputs"][0]
    assert opened["method"] == "open"
    assert opened["options"]["path"].endswith("one.safetensors")
    assert opened["digest"] == {"one.safetensors": digest(LocalFile(tmp_path / "one.safetensors"))}
    made = opened["made"]
    assert (made["method"], made["options"], made["inputs"][0]["method"]) == ("cast", {"dtype": "bf16"}, "mul")
    text = str(open(tmp_path / "two.safetensors").lineage)
    assert [line.strip().split("(")[0] for line in text.splitlines()] == [
        "open", "add", "open", "cast", "mul", "open", "memory", "open", "cast", "mul", "open", "memory",
    ]  # fmt: skip


def test_two_saves_of_one_thing_are_one_thing(tmp_path: Path) -> None:
    Weights.of({"a": torch.ones(3)}).save(tmp_path / "in.safetensors")
    for name in ("x", "y"):
        (open(tmp_path / "in.safetensors") * 2).save(tmp_path / f"{name}.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_digest_tells_siblings_apart(tmp_path: Path) -> None:
    seen = set()
    for content in (b"", b"a", b"b", b"ab", bytes(10**6), bytes(10**6 - 1) + b"a", b"a" + bytes(10**6 - 1)):
        (tmp_path / "f").write_bytes(content)
        seen.add(digest(LocalFile(tmp_path / "f")))
    assert len(seen) >= 6


HOSTILE = [
    '{"method": "x", "options": [1], "inputs": 5, "made": 7}',
    '{"method": "x", "options": "a", "inputs": {"a": 1}, "made": [[]]}',
    '{"method": "x", "options": {"a": {"b": [1, 2]}}, "inputs": [1, null, {"inputs": null}]}',
    '{"method": ' * 5 + '"x"' + "}" * 5, '{"inputs": []}', "[]", "nonsense", "[" * 100_000,
    '{"method":"x","inputs":[' * 450 + "]}" * 450, '{"method":"x","made":' * 900 + "{}" + "}" * 900,
    '{"method": "x", "options": {"a": ' + "[" * 900 + "]" * 900 + "}}",
    json.dumps({"method": "x", "words": "y" * 3_000_000}),
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_lineage_is_carried_or_dropped(text: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "in.safetensors", {KEY: text})
    weights = open(tmp_path / "in.safetensors")
    assert str(weights.lineage).startswith("open(")
    (weights + weights).save(tmp_path / "out.safetensors")
    out = open(tmp_path / "out.safetensors")
    assert parsed(out.metadata)
    assert len(out.metadata[KEY]) <= LONGEST
    assert str(out.lineage).startswith("open(")


def test_a_long_history_stays_short() -> None:
    step = Step("open", {"path": "a"})
    for number in range(3000):
        step = Step("mul", {"number": number}, (step, step))
    words = written(step)
    assert len(words[KEY]) <= LONGEST
    tree = parsed(words)
    assert tree
    assert lines(tree)[0] == "mul(number=2999)"
    assert len(repr(step)) < 100
    assert len(str(step)) < LONGEST


def test_generations_do_not_grow_without_end(tmp_path: Path) -> None:
    Weights.of({"a": torch.ones(2)}).save(tmp_path / "0.safetensors")
    for generation in range(18):
        last = open(tmp_path / f"{generation}.safetensors")
        again = open(tmp_path / f"{generation}.safetensors")
        (last * 0.5 + again * 0.5).save(tmp_path / f"{generation + 1}.safetensors")
    assert os.stat(tmp_path / "18.safetensors").st_size < 2 * LONGEST


def test_options_of_any_kind_can_be_told() -> None:
    options = {"f": len, "dtype": torch.bfloat16, "t": (1, [2.5, None]), "m": {"*": torch.float32}, "x": object()}
    assert parsed(written(Step("x", options)))
    recorded = Step("x", options).record()["options"]
    assert (recorded["f"], recorded["dtype"], recorded["t"], recorded["m"]) == (
        "len",
        "bfloat16",
        [1, [2.5, None]],
        {"*": "float32"},
    )
