"""The page of a recipe: well formed, safe with any words, and true."""

from __future__ import annotations

import html.parser
from collections.abc import Callable
from pathlib import Path

import pytest

import weightsmith as ws
from weightsmith import recipe as recipes
from weightsmith.errors import OutputError
from weightsmith.page import written
from weightsmith.recipe._graph import levels_of, parents_of
from weightsmith.recipe._report import series
from weightsmith.recipe._run import Row

VOID = {"meta", "link", "br", "hr", "img", "input", "col"}
HOSTILE = "<script>alert('1')</script>&\"`|"


class Reader(html.parser.HTMLParser):
    """Fails on what is not closed; keeps tags, ids, attributes and the text of cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for key, value in attrs if key == "id" and value]
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.cells[-1] += data


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def test_hostile_words(recipe: Callable[[str], Path], models: Path):
    (models / "s.py").write_text("def f(w):\n    return -float(w['head.weight'].square().sum())\n")
    text = f"""
    title: '{HOSTILE.replace("'", "''")}'
    inputs: {{a: a, base: base}}
    steps: {{x: {{method: merge.wise_ft, models: [a], base: base}}}}
    sweep:
      x.amount: [0, 0.5, 1]
      x.rest: [error, first]
    evaluate: {{'{HOSTILE.replace("'", "''")}': "s.py:f", 'a$b_{{c}}$': "s.py:f"}}
    save: {{"o/<i>best": x}}
    report: r.html
    """
    ran = recipes.run(recipes.read(recipe(text)))
    page = Path("r.html").read_text(encoding="utf-8")
    found = read(page)
    assert page.startswith("<!DOCTYPE html>")
    assert "script" not in found.tags
    assert "i" not in found.tags
    assert not any(key.startswith("on") or (value or "").startswith("javascript") for key, value in found.attributes)
    assert len(found.ids) == len(set(found.ids))
    assert HOSTILE in found.cells
    assert "o/<i>best" in found.cells
    # What is made of what, two sweeps, their times, and what changed by layer; all are of one size.
    assert found.tags.count("figure") == 1 + 2 + 2 + 1
    assert "Distance from base" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    for row in ran.rows:
        assert any(f"{row.figures[HOSTILE]:.5g}" in cell for cell in found.cells)
    best = max(ran.rows, key=lambda row: row.figures[HOSTILE])
    assert ran.best == best.values
    assert sum("kept" in cell for cell in found.cells) == 1


def test_without_figures_there_is_no_table_of_them(recipe: Callable[[str], Path]):
    recipes.run(recipes.read(recipe("inputs: {a: a}\nsave: {o: a}\nreport: deep/er/r.html")))
    found = read(Path("deep/er/r.html").read_text())
    assert {"measured", "changed"} & set(found.ids) == set()
    assert found.tags.count("figure") == 1
    assert "o" in found.cells


def test_what_changed_is_that_of_the_output(recipe: Callable[[str], Path]):
    text = "inputs: {a: a, base: base}\nsteps: {x: {method: merge.wise_ft, models: [a], base: base, amount: 0.25}}"
    recipes.run(recipes.read(recipe(text + "\nsave: {o: x}\nreport: r.html")))
    found = read(Path("r.html").read_text())
    before, after = ws.open("base"), ws.open("o")
    name = "layers.1.w.weight"
    distance = float((after[name] - before[name]).norm() / before[name].norm())
    row = found.cells.index("layers.1")
    assert found.cells[row + 1] == f"{distance:.4g}"


def test_columns_follow_what_is_used(recipe: Callable[[str], Path]):
    text = """
    inputs: {base: base, a: a, b: b}
    steps:
      x: {method: merge.mean, models: [a, b]}
      y: {method: merge.wise_ft, models: [x], base: base}
    save: {o: y, p: x}
    """
    parents = parents_of(recipes.read(recipe(text)))
    assert parents == {"base": [], "a": [], "b": [], "x": ["a", "b"], "y": ["x", "base"], "o": ["y"], "p": ["x"]}
    assert levels_of(parents) == {"base": 0, "a": 0, "b": 0, "x": 1, "y": 2, "o": 3, "p": 2}


def row(amount: float, figure: float, weights: str = "x", **others: object) -> Row:
    return Row(weights, {"x.amount": amount, **others}, {"q": figure}, 0.1)


def test_lines_are_drawn_in_order_one_for_each_other_choice():
    rows = [row(1, 3.0, k="u"), row(0, 2.0, k="u"), row(0, 1.0, k="v"), row(0.5, float("-inf"), k="u")]
    assert series(rows, "x.amount", "q") == {"x, k=u": [(0.0, 2.0), (1.0, 3.0)], "x, k=v": [(0.0, 1.0)]}
    assert series(rows, "x.amount", "other") == {}
    assert len(series([row(0, 1.0, weights=str(n)) for n in range(30)], "x.amount", "q")) == 12


def test_a_page_is_there_whole_or_not_at_all(tmp_path: Path):
    (tmp_path / "r.html").write_text("old")
    written(str(tmp_path / "r.html"), "new")
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]
    assert (tmp_path / "r.html").read_text() == "new"
    with pytest.raises(OutputError, match=r"r\.html"):
        written(str(tmp_path / "r.html" / "x.html"), "new")
