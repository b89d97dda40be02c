"""All combinations, in order, each with its place."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from weightsmith.errors import Error
from weightsmith.recipe import _sweep
from weightsmith.recipe._schema import Output, Recipe, read
from weightsmith.recipe._sweep import Variant, variants
from weightsmith.recipe._yaml import Node, load, plain

TEXT = """
inputs: {base: base, a: a}
steps:
  x: {method: merge.wise_ft, models: [a], base: base}
  y: {method: prune.magnitude}
sweep:
  x.amount: [0, 0.5, 1]
  a: [run/a, ../b/]
  y.sparsity: ["2:4", 0.5]
save: {"o/{a}-{y.sparsity}/{x.amount}": y}
"""


def of(text: str) -> Recipe:
    return read(load(text, "r.yaml")[0])


def test_every_combination_the_last_varying_fastest():
    made = variants(of(TEXT))
    expected = itertools.product([0, 0.5, 1], ["run/a", "../b/"], ["2:4", 0.5])
    assert [tuple(one.values.values()) for one in made] == list(expected)
    assert list(made[0].values) == ["x.amount", "a", "y.sparsity"]
    for one in made:
        assert one.recipe.steps["x"].arguments["amount"].value == one.values["x.amount"]
        assert one.recipe.steps["y"].arguments["sparsity"].value == one.values["y.sparsity"]
        assert one.recipe.inputs["a"].path.value == one.values["a"]
        assert {key: [plain(v) for v in values] for key, values in one.recipe.sweep.items()} == {
            key: [value] for key, value in one.values.items()
        }


def test_one_without_a_sweep():
    recipe = of("inputs: {a: a}\nsave: {o: a}")
    [one] = variants(recipe)
    assert (one.values, one.recipe, one.label) == ({}, recipe, "")


def test_places_hold_the_values_and_lead_nowhere_else():
    recipe = of(TEXT)
    made = variants(recipe)
    paths = [one.path(recipe.outputs[0]) for one in made]
    assert paths[:4] == ["o/run-a-2:4/0", "o/run-a-0.5/0", "o/..-b-2:4/0", "o/..-b-0.5/0"]
    assert len(set(paths)) == len(paths)
    hostile = Variant({"a": "../../etc/x\\y"}, recipe)
    assert hostile.path(Output("o/{a}", "y", {}, Node(None))) == "o/..-..-etc-x-y"
    assert hostile.path(Output("o/{b}", "y", {}, Node(None))) == "o/{b}"
    assert made[1].label == "x.amount=0, a=run/a, y.sparsity=0.5"


def test_too_many():
    many = ", ".join(map(str, range(101)))
    with pytest.raises(Error, match=r"r\.yaml:5:1: the sweep has 10,201 combinations, more than 10,000"):
        variants(
            of(
                "inputs: {a: a, b: b}\nsteps:\n  x: {method: merge.wise_ft, models: [a], base: b}\n"
                "  y: {method: merge.wise_ft, models: [x], base: b}\n"
                f"sweep: {{x.amount: [{many}], y.amount: [{many}]}}\n"
                "save: {'{x.amount}{y.amount}': y}"
            )
        )
    assert _sweep.MOST == 10_000


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = of("inputs: {a: a}\nsave: {~/o: a}")
    assert variants(recipe)[0].path(recipe.outputs[0]) == str(tmp_path / "o")
