"""Recipes run: what they make is what the same calls make by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weightsmith as ws
from weightsmith import recipe as recipes
from weightsmith.errors import Error
from weightsmith.recipe import Settings

MANY = """
inputs:
  base: base
  a: {path: a, dtype: float32}
  b: b
steps:
  merged:
    method: merge.ties
    models: [a, b]
    base: base
    density: {"layers.*": 0.5, "*": 0.9}
    weight: [1.0, 0.5]
  pruned: {method: prune.magnitude, sparsity: 0.25}
  small:
    method: quantize.rtn
    weights: pruned
    bits: 4
    group: 4
    pattern: layers.*
save:
  out/merged: merged
  out/small: small
  out/one.safetensors: {weights: pruned, dtype: bfloat16}
"""


def by_hand() -> dict[str, ws.Weights]:
    density = {"layers.*": 0.5, "*": 0.9}
    merged = ws.merge.ties(["a", "b"], base="base", density=density, weight=[1.0, 0.5])
    pruned = ws.prune.magnitude(merged, sparsity=0.25)
    small = ws.quantize.rtn(pruned, bits=4, group=4, pattern="layers.*")
    return {"out/merged": merged, "out/small": small, "out/one.safetensors": pruned.cast("bfloat16")}


def test_the_same_as_the_calls_by_hand(recipe: Callable[[str], Path]):
    ran = recipes.run(recipes.read(recipe(MANY)))
    assert [saved.path for saved in ran.saved] == list(by_hand())
    for path, expected in by_hand().items():
        found = ws.open(path)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected), path


def test_folders_carry_a_card_and_the_recipe(recipe: Callable[[str], Path]):
    path = recipe(MANY)
    recipes.run(recipes.read(path, ["merged.weight=[1, 1]"]))
    card = Path("out/merged/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\ntags:\n- merge\n- weightsmith\n---\n\n# merged\n")
    assert "merge.ties(" in card
    again = recipes.read("out/merged/recipe.yaml")
    assert again.steps["merged"].arguments["weight"].value[1].value == 1  # as it was run, not as it was written
    assert json.loads(Path("out/merged/config.json").read_text())["model_type"] == "tiny"
    first = Path("out/small/README.md").read_bytes()
    recipes.run(recipes.read(path, ["merged.weight=[1, 1]"]), Settings(overwrite=True))
    assert Path("out/small/README.md").read_bytes() == first


def test_a_recipe_that_was_written_beside_an_output_makes_it_again(recipe: Callable[[str], Path]):
    recipes.run(recipes.read(recipe(MANY)))
    before = Path("out/small/model.safetensors").read_bytes()
    recipes.run(recipes.read("out/small/recipe.yaml"), Settings(overwrite=True))
    assert Path("out/small/model.safetensors").read_bytes() == before


def test_arithmetic(recipe: Callable[[str], Path]):
    text = """
    inputs: {base: base, tuned: a}
    steps:
      moved: {expression: base + 0.5 * (tuned - base)}
      here: {method: select, weights: moved, pattern: "layers.*"}
      over: {method: overlay, weights: base, patch: here}
      named: {method: rename, weights: over, names: {head.weight: lm_head.weight}}
    save: {out: named}
    """
    recipes.run(recipes.read(recipe(text)))
    base, tuned, found = ws.open("base"), ws.open("a"), ws.open("out")
    assert list(found) == ["embed.weight", "layers.0.w.weight", "layers.1.w.weight", "lm_head.weight"]
    assert torch.equal(found["embed.weight"], base["embed.weight"])
    name = "layers.1.w.weight"
    torch.testing.assert_close(found[name], (base[name] + tuned[name]) / 2)


def test_by_depth_and_paths_without_names(recipe: Callable[[str], Path]):
    text = """
    inputs: {base: base}
    steps:
      merged: {method: merge.task_arithmetic, models: [a/, ./b], base: base, amount: {by_depth: [0, 1]}}
    save: {out: merged}
    """
    recipes.run(recipes.read(recipe(text)))
    found, base, a, b = (ws.open(name) for name in ("out", "base", "a", "b"))
    assert torch.equal(found["embed.weight"], base["embed.weight"])
    name = "head.weight"
    torch.testing.assert_close(found[name], a[name] + b[name] - base[name])


SCORE = """
import torch

calls = []

def norm(weights):
    calls.append(1)
    return -float(sum(weights[name].double().square().sum() for name in weights))

def kind(weights):
    return float(len(weights))
"""

SWEPT = """
inputs: {base: base, a: a, b: b}
steps:
  delta: {expression: a - base}
  merged: {method: merge.ties, models: [a, b], base: base, density: 0.5}
  pruned: {method: prune.magnitude, sparsity: 0.5}
sweep:
  merged.density: [0.2, 0.9]
  pruned.sparsity: [0.25, 0.5, 0.75]
evaluate:
  smallness: {with: "score.py:norm", on: [pruned, merged, a]}
  count: {with: "score.py:kind", on: pruned}
save: {out/best: pruned}
report: out/report.html
"""


def test_a_sweep_measures_every_combination_once_and_keeps_the_best(recipe: Callable[[str], Path], models: Path):
    (models / "score.py").write_text(SCORE)
    told: list[recipes.Row] = []
    ran = recipes.run(recipes.read(recipe(SWEPT)), on_row=told.append)
    assert list(ran.rows) == told
    assert sorted(row.weights for row in told) == ["a"] + 2 * ["merged"] + 6 * ["pruned"]
    for row in told:
        keys = {"a": set(), "merged": {"merged.density"}, "pruned": {"merged.density", "pruned.sparsity"}}
        assert set(row.values) == keys[row.weights]
        assert set(row.figures) == ({"smallness", "count"} if row.weights == "pruned" else {"smallness"})
        if row.weights == "pruned":
            merged = ws.merge.ties(["a", "b"], base="base", density=row.values["merged.density"])
            pruned = ws.prune.magnitude(merged, sparsity=row.values["pruned.sparsity"])
            size = -sum(float(pruned[name].double().square().sum()) for name in pruned)
            assert row.figures["smallness"] == pytest.approx(size)
    best = max((row for row in told if row.weights == "pruned"), key=lambda row: row.figures["smallness"])
    assert ran.best == best.values
    merged = ws.merge.ties(["a", "b"], base="base", density=ran.best["merged.density"])
    expected = ws.prune.magnitude(merged, sparsity=ran.best["pruned.sparsity"])
    found = ws.open("out/best")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "0.75" in Path("out/best/recipe.yaml").read_text()
    page = Path("out/report.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    for drawn in ("Inputs, steps and places", "Distance from base", "smallness"):
        assert drawn in page


def test_a_sweep_with_a_place_for_each(recipe: Callable[[str], Path]):
    text = """
    inputs: {base: base, a: a}
    steps: {moved: {method: merge.wise_ft, models: [a], base: base}}
    sweep: {moved.amount: [0, 0.5, 1]}
    save: {"out/{moved.amount}": moved}
    """
    ran = recipes.run(recipes.read(recipe(text)))
    assert [saved.path for saved in ran.saved] == ["out/0", "out/0.5", "out/1"]
    assert ran.best == {}
    assert torch.equal(ws.open("out/1")["head.weight"], ws.open("a")["head.weight"])
    assert torch.equal(ws.open("out/0")["head.weight"], ws.open("base")["head.weight"])


def test_statistics_are_gathered_once_in_a_sweep(recipe: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    from weightsmith.recipe import _plan
    from weightsmith.weights._lazy import Reduction

    text = """
    inputs: {base: base, a: a, b: b}
    steps:
      stock: {method: merge.model_stock, models: [a, b], base: base}
      merged: {method: merge.ties, models: [stock, b], base: base}
    sweep: {merged.density: [0.25, 0.5, 0.75]}
    save: {"out/{merged.density}": merged}
    """
    read: list[str] = []
    total = Reduction.total

    def counted(self: Reduction, function, unit, scratch):
        read.append(getattr(function, "func", function).__name__)
        return total(self, function, unit, scratch)

    monkeypatch.setattr(Reduction, "total", counted)
    monkeypatch.setattr(_plan, "estimate", lambda *arguments: 0.0)
    recipes.run(recipes.read(recipe(text)))
    tensors = len(ws.open("a"))
    assert read.count("delta_gram") == tensors  # the step that is not swept is solved once
    first = next(name for name in read if name != "delta_gram")
    assert read.count(first) == tensors  # the swept one asks for the same histogram every time
    for density in (0.25, 0.5, 0.75):
        stock = ws.merge.model_stock(["a", "b"], base="base")
        expected = ws.merge.ties([stock, "b"], base="base", density=density)
        assert all(torch.equal(ws.open(f"out/{density}")[name], expected[name]) for name in expected)


def test_eager_methods_run_once_they_are_reached(recipe: Callable[[str], Path], models: Path):
    (models / "score.py").write_text(SCORE)
    text = """
    inputs: {a: a, b: b, base: base}
    steps:
      soup: {method: merge.greedy_soup, models: [a, b, base], evaluate: "score.py:norm"}
      pruned: {method: prune.magnitude, sparsity: 0.5}
    save: {out: pruned}
    """
    document = recipes.read(recipe(text))
    [planned] = recipes.plan(document)
    assert not Path("out").exists()
    assert planned.tensors == 4
    recipes.run(document)
    import sys

    sys.path.insert(0, str(models))
    try:
        import score
    finally:
        sys.path.pop(0)
    expected = ws.prune.magnitude(ws.merge.greedy_soup(["a", "b", "base"], score.norm), sparsity=0.5)
    assert all(torch.equal(ws.open("out")[name], expected[name]) for name in expected)


def test_what_is_saved_is_measured_as_it_was_saved(recipe: Callable[[str], Path], models: Path):
    (models / "score.py").write_text(SCORE)
    text = """
    inputs: {a: a, b: b}
    steps: {soup: {method: merge.mean, models: [a, b]}}
    evaluate: {size: "score.py:norm"}
    save: {out: soup}
    """
    [row] = recipes.run(recipes.read(recipe(text))).rows
    soup = ws.merge.mean(["a", "b"])
    assert row.figures["size"] == pytest.approx(-sum(float(soup[name].double().square().sum()) for name in soup))


# Plans and explanations


def test_a_plan_reads_nothing_but_headers_and_writes_nothing(recipe: Callable[[str], Path]):
    plans = recipes.plan(recipes.read(recipe(MANY)))
    assert [one.path for one in plans] == list(by_hand())
    assert not Path("out").exists()
    merged = plans[0]
    size = sum(spec.nbytes for spec in ws.open("a").specs.values())
    assert merged.writes >= size
    assert merged.reads >= 3 * size
    assert merged.passes >= 2
    assert merged.seconds > 0
    assert merged.memory > 0


def test_explain_says_the_options_of_every_tensor(recipe: Callable[[str], Path]):
    from weightsmith.recipe._build import build

    document = recipes.read(recipe(MANY))
    lines = {line.tensor: line for line in recipes.explain(build(document, {})["pruned"])}
    steps = lines["layers.0.w.weight"].steps
    assert steps[0].startswith("ties(")
    assert "density=0.5" in steps[0]
    assert "density=0.9" in lines["head.weight"].steps[0]
    assert any("magnitude" in step for step in steps[1:])
    assert len(lines["head.weight"].files) == 3


# What is wrong


A, SAVE = "inputs: {a: a, c: small}\n", "\nsave: {o: x}"
PRUNED = A + "steps: {x: {method: prune.magnitude, sparsity: 0.5}}\n"

WRONG = [
    (A + "steps: {x: {method: merge.tise, models: [a]}}" + SAVE, "2:21", "merge.ties"),
    (A + "steps: {x: {method: ties, models: [a]}}" + SAVE, "2:21", "merge.ties"),
    (A + "steps:\n  x:\n    method: merge.mean\n    models: [a]\n    wieght: 2" + SAVE, "6:5", "weight"),
    (A + "steps: {x: {method: merge.mean, models: [d]}}" + SAVE, "2:42", "'d'"),
    (A + "steps: {x: {method: merge.ties, models: [a]}}" + SAVE, "2:12", "base"),
    ("inputs: {a: nowhere}\nsave: {o: a}", "1:13", "nowhere"),
    (A + "steps: {x: {method: merge.mean, models: [a, a], weight: [1, 2, 3]}}" + SAVE, "2:", "3"),
    (A + "step: {}\nsave: {o: a}", "2:1", "steps"),
    (A + "save: {o: b}", "2:11", "'b'"),
    (A, "1:1", "neither save"),
    (A + "steps: {a: {method: merge.mean, models: [a]}}\nsave: {o: a}", "2:", "already"),
    (A + "steps: {x: {expression: a + d}}" + SAVE, "2:25", "'d'"),
    (A + "steps: {x: {expression: 'a.__class__'}}" + SAVE, "2:", "not understood"),
    (A + "steps: {x: {method: prune.magnitude, weights: a, sparsity: 2}}" + SAVE, "2:60", "sparsity"),
    (PRUNED + "sweep: {y.z: [1]}" + SAVE, "3:", "'y'"),
    (PRUNED + "sweep: {x.sparsity: [0.1, 0.2]}" + SAVE, "4:", "evaluate"),
    (PRUNED + "sweep: {x.sparsity: 0.1}" + SAVE, "3:", "list"),
    (A + "steps: {x: {method: average.swa}}" + SAVE, "2:", "not weights"),
    (A + "steps: {x: {method: merge.mean, models: [a, c]}}" + SAVE, "2:", "small.weight"),
    (A + "save: {a: a}", "2:", "input"),
    (A + "save: {base: a}", "2:", "exists"),
    (A + "save: {o: a}\nevaluate: {x: {with: s.py:f, of: a}}", "3:", "of"),
    (A + "steps: {x: {method: merge.mean, models: {a: 1}}}" + SAVE, "2:", "list of models"),
]


@pytest.mark.parametrize(("text", "place", "said"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_said_with_its_place_before_anything_is_written(
    text: str, place: str, said: str, recipe: Callable[[str], Path], models: Path
):
    ws.open({"small.weight": torch.ones(2)}).save(models / "small")
    path = recipe(text)
    before = sorted(str(file) for file in models.rglob("*"))
    with pytest.raises(Error) as caught:
        recipes.run(recipes.read(path))
    message = str(caught.value)
    assert message.startswith(f"{path}:{place}"), message
    assert said in message, message
    assert sorted(str(file) for file in models.rglob("*")) == before


def test_settings(recipe: Callable[[str], Path]):
    path = recipe(MANY)
    document = recipes.read(path, ["pruned.sparsity=2:4", "a.dtype=bfloat16", "title=A title"])
    assert document.steps["pruned"].arguments["sparsity"].value == "2:4"
    assert document.inputs["a"].options == {"dtype": "bfloat16"}
    assert document.title == "A title"
    with pytest.raises(Error, match="did you mean 'pruned'"):
        recipes.read(path, ["prned.sparsity=2:4"])
    with pytest.raises(Error, match=r"step\.option=value"):
        recipes.read(path, ["pruned.sparsity"])
    with pytest.raises(Error, match=r"--set pruned\.sparsity:1:1: .*sparsity"):
        recipes.plan(recipes.read(path, ["pruned.sparsity=7"]))


def test_a_value_from_a_file_of_ones_own(recipe: Callable[[str], Path], models: Path):
    (models / "mine.py").write_text("def shares():\n    return [3.0, 1.0]\n")
    text = """
    inputs: {a: a, b: b}
    steps: {soup: {method: merge.mean, models: [a, b], weight: {python: "mine.py:shares"}}}
    save: {out: soup}
    """
    recipes.run(recipes.read(recipe(text)))
    expected = ws.merge.mean(["a", "b"], weight=[3, 1])
    assert all(torch.equal(ws.open("out")[name], expected[name]) for name in expected)
    with pytest.raises(Error, match=r"recipe\.yaml:3:\d+: .*has no 'share'"):
        recipes.plan(recipes.read(recipe(text.replace("shares", "share").replace("out", "out2"))))
