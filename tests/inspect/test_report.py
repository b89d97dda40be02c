"""A report says the same thing as text, data, drawing and page, and refuses what does not fit together."""

from __future__ import annotations

import csv
import json
import math
import xml.etree.ElementTree as ET

import pytest

from weightsmith.errors import Error
from weightsmith.inspect import Line, Plot, Report, Surface, page_of

LINE = Line("loss", (0, 1, 2), (3.0, 1.0, 2.0), low=(2.5, 0.5, 1.5), high=(3.5, 1.5, 2.5))
BARS = Line("norm", ("a", "b"), (1.0, 2.0), style="bars")
GRID = Surface((0.0, 0.5, 1.0), (0.0, 1.0), ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))
REPORT = Report(
    "A <test> of $reports",
    figures={"barrier": 0.25, "models": 2, "found": True, "nothing": None},
    table=[{"layer": "a.0<", "norm": 1.0, "rank": math.inf}, {"layer": "b", "norm": 20_000.5, "rank": 3.0}],
    plots=[
        Plot("Path", "share", "loss, nats", [LINE]),
        Plot("Norms", "layer", "norm", [BARS]),
        Plot("Plane", "x", "y", surface=GRID),
    ],
    notes=["One seed only."],
)


def test_text_holds_figures_table_and_notes():
    text = str(REPORT)
    assert "barrier  0.25" in text
    assert "found    yes" in text
    assert "nothing  -" in text
    assert "a.0<" in text
    assert "2e+04" in text
    assert text.endswith("One seed only.")


def test_a_name_gives_a_figure_or_a_column():
    assert REPORT["barrier"] == 0.25
    assert REPORT["layer"] == ["a.0<", "b"]
    with pytest.raises(Error, match="no 'bariers'"):
        REPORT["bariers"]


def test_json_is_strict_and_whole(tmp_path):
    data = json.loads(REPORT.save(tmp_path / "r.json").read_text())
    assert data["figures"]["barrier"] == 0.25
    assert data["table"][0] == {"layer": "a.0<", "norm": 1.0, "rank": None}
    assert data["plots"][0]["lines"][0]["y"] == [3.0, 1.0, 2.0]
    assert data["plots"][2]["surface"]["z"] == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]


def test_csv_is_the_table(tmp_path):
    with REPORT.save(tmp_path / "r.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"layer": "a.0<", "norm": "1.0", "rank": ""}, {"layer": "b", "norm": "20000.5", "rank": "3.0"}]


@pytest.mark.parametrize("kind", [".svg", ".png", ".txt", ".html"])
def test_every_kind_of_file_appears_whole(tmp_path, kind):
    place = REPORT.save(tmp_path / f"r{kind}")
    assert place.stat().st_size > 100
    assert [file.name for file in tmp_path.iterdir()] == [place.name]


def test_the_drawing_is_well_formed_and_has_its_words(tmp_path):
    text = REPORT.save(tmp_path / "r.svg").read_text()
    assert ET.fromstring(text).tag.endswith("svg")
    assert "loss, nats" in text
    assert "#00f0" not in text


def test_the_page_escapes_and_describes(tmp_path):
    text = REPORT.save(tmp_path / "r.html").read_text()
    assert "A &lt;test&gt; of $reports" in text
    assert "a.0&lt;" in text
    assert "<script" not in text
    assert "loss: from 3 to 2, least 1 at 1, most 3 at 0" in text
    assert "a grid of 2 by 3 values from 1 to 6" in text
    both = page_of([REPORT, REPORT], "Two")
    ids = [part.split('"')[0] for part in both.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_bad_kinds_and_missing_parts(tmp_path):
    with pytest.raises(Error, match="is written as one of"):
        REPORT.save(tmp_path / "r.pdf")
    with pytest.raises(Error, match="has no table"):
        Report("empty").save(tmp_path / "r.csv")
    with pytest.raises(Error, match="has no plots"):
        Report("empty").save(tmp_path / "r.svg")
    assert not list(tmp_path.iterdir())


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(Error, match="different lengths"):
        Line("l", (1, 2), (1.0,))
    with pytest.raises(Error, match="different lengths"):
        Line("l", (1,), (1.0,), low=(0.5,))
    with pytest.raises(Error, match="as many rows"):
        Surface((0, 1), (0,), ((1.0,),))
    with pytest.raises(Error, match="different columns"):
        Report("t", table=[{"a": 1}, {"b": 1}])


def test_without_finite_values_it_still_says_so():
    plot = Plot("p", "x", "y", [Line("l", (0,), (math.nan,))], Surface((0,), (0,), ((math.inf,),)))
    assert plot.said() == "p: y over x; a grid of 1 by 1 values nowhere finite; l: no finite value."
    assert Report("r", plots=[plot]).draw()


def test_many_and_long_words_are_drawn(tmp_path):
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]
    grid = Surface(names, names, [[float(i * j + 1) for i in range(12)] for j in range(12)], log=True)
    plots = [Plot("p", "x", "y", [Line("l", names, list(range(12)), style="bars")]), Plot("g", "x", "y", surface=grid)]
    assert Report("r", plots=plots).save(tmp_path / "r.png").stat().st_size > 1000


def test_intervals_stand_beside_their_figures():
    row = {
        "model": "a",
        "loss": 1.5,
        "loss low": 1.0,
        "loss high": 2.0,
        "ratio": None,
        "ratio low": None,
        "ratio high": None,
    }
    report = Report("r", table=[row], plots=[])
    head, line = str(report).splitlines()[2:]
    assert head.split() == ["model", "loss", "ratio"]
    assert line.split() == ["a", "1.5", "[1,", "2]", "-"]
    assert "<small>[1, 2]</small>" in report.body()
    assert "loss low" not in report.body()
    alone = Report("r", table=[{"model": "a", "low": 1.0, "flow high": 2.0}])
    assert str(alone).splitlines()[2].split() == ["model", "low", "flow", "high"]


def test_a_page_of_one_report_has_no_contents_and_words_stand_under_their_heading():
    pytest.importorskip("matplotlib")
    table = [{"name": "model.layers.0.self_attn.o_proj.weight", "kind": "o_proj", "value": 1.0}]
    text = page_of([Report("one", table=table)])
    assert "<nav" not in text
    assert "<nav" in page_of([Report("one", table=table), Report("two")])
    assert '<th scope="col" class="words">kind</th><th scope="col">value</th>' in text
    assert "model.<wbr>layers.<wbr>0.<wbr>self_<wbr>attn" in text


def test_words_under_an_axis_are_escaped_once():
    pytest.importorskip("matplotlib")
    surface = Surface(["$a", "b"], ["$c"], [[1.0, 2.0]])
    axes = Report("r", plots=[Plot("p", "x", "y", surface=surface)]).draw().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == [r"\$a", "b"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"\$c"]
