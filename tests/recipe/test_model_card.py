"""Cards of outputs: what the Hub reads, and hostile words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

import weightsmith as ws
from weightsmith import recipe as recipes
from weightsmith.recipe._model_card import card, written
from weightsmith.recipe._yaml import load, plain

WEIGHTS = ws.Weights.of({"w": torch.ones(2, 3), "v": torch.ones(4, dtype=torch.bfloat16)})
HOSTILE = "<script>alert(1)</script> | `x` ``` [a](javascript:b)\n# Another\n---\n<!-- *_~\\"


def front(text: str) -> dict[str, object]:
    start, middle, _ = text.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(middle)


def test_front_matter_heading_and_figures():
    weights = WEIGHTS.with_files({"config.json": b"{}"})
    text = card("My soup", "a: b\n", weights, ["meta/x-1", "./here", "meta/x-1", "/abs/y"], [("x", {"q": 1 / 3})])
    assert front(text) == {
        "library_name": "transformers",
        "base_model": ["meta/x-1"],
        "tags": ["merge", "weightsmith"],
    }
    lines = text.splitlines()
    assert "# My soup" in lines
    assert "2 tensors, 10 parameters, bfloat16, float32." in text
    assert lines[lines.index("## Measured") + 2 :][:3] == ["| checkpoint | q |", "|---|---:|", "| x | 0.33333 |"]
    assert "```yaml\na: b\n```" in text
    assert "library_name" not in front(card("t", "a: b", WEIGHTS))


def test_a_folder_that_is_here_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("meta/x-1").mkdir(parents=True)
    assert "base_model" not in front(card("t", "a: b", WEIGHTS, ["meta/x-1"]))


def test_hostile_words_stay_words():
    figures = [(HOSTILE, {HOSTILE: 1.0, "q": float("-inf")}), ("y", {"q": 2.0})]
    text = card(HOSTILE, "a: |\n  ```\n  # no heading\n  ````\n", WEIGHTS, ["a/b\n- evil"], figures)
    assert front(text) == {"tags": ["merge", "weightsmith"]}
    body = text.split("---\n", 2)[2]
    outside, fence = [], None
    for line in body.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if fence is None and len(ticks) >= 3:
            fence = ticks
        elif fence is not None and line == fence:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    headings = [line for line in outside if line.startswith("#")]
    assert len(headings) == 4
    assert headings[1:] == ["## Measured", "## How it was made", "## Recipe"]
    assert not any("<" in line.replace("\\<", "") for line in outside)
    assert not any("](javascript" in line.replace("\\]", "") for line in outside)
    table = [line for line in outside if line.startswith("|")]
    assert len(table) == 4  # head, rule, and a row for each checkpoint
    assert {line.replace("\\|", "").count("|") for line in table} == {4}
    assert "| -inf |" in table[2]


def test_a_recipe_is_written_as_yaml_that_says_the_same():
    text = "title: 'a: b # c'\nsteps:\n  x: {n: '1e-5', m: 1e-5, on: 'yes', t: ~, l: [1, 'true', '2:4', .inf, 0x10]}\n"
    document = load(text)[0]
    again = load(written(document))[0]
    assert plain(again) == plain(document)
    assert list(plain(again)["steps"]["x"]) == ["n", "m", "on", "t", "l"]
    anchored = load("a: &x {b: [1, 2]}\nc: *x\n")[0]
    assert "&" not in written(anchored)
    assert plain(load(written(anchored))[0]) == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}


def test_rows_of_a_card_are_those_of_its_values(recipe: Callable[[str], Path], models: Path):
    (models / "s.py").write_text("def f(w):\n    return -float(w['head.weight'].square().sum())\n")
    text = """
    inputs: {a: a, base: base}
    steps: {x: {method: merge.wise_ft, models: [a], base: base}}
    sweep: {x.amount: [0, 1]}
    evaluate: {q: {with: "s.py:f", on: [x, a]}}
    save: {"o{x.amount}": x}
    """
    ran = recipes.run(recipes.read(recipe(text)))
    for value in (0, 1):
        found = Path(f"o{value}/README.md").read_text()
        rows = [line for line in found.splitlines() if line.startswith(("| x |", "| a |"))]
        assert len(rows) == 2
        figure = next(row.figures["q"] for row in ran.rows if row.weights == "x" and row.values["x.amount"] == value)
        assert f"| x | {figure:.5g} |" in rows
        assert recipes.read(f"o{value}/recipe.yaml").steps["x"].arguments["amount"].value == value  # type: ignore[union-attr]
