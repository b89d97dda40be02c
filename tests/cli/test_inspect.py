"""``weightsmith inspect`` says what the functions say, in every kind of file, and nothing is overwritten."""

from __future__ import annotations

import csv
import json

import pytest

import weightsmith
from weightsmith.cli._inspect import methods

NAMES = [method.name for method in methods()]


def test_the_functions_that_need_only_checkpoints_are_there(run):
    expected = {"spectra", "sparsity_knees", "quantization_error", "geometry", "relative_change", "overlaps"}
    assert expected <= set(NAMES)
    assert not {"degeneracy", "interactions", "superposition"} & set(NAMES)
    status, out, _ = run("inspect", "--help")
    assert status == 0
    assert all(name in out for name in expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help(run, name):
    method = next(method for method in methods() if method.name == name)
    status, out, _ = run(*method.room.split("."), name, "--help")
    assert status == 0
    assert "--output" in out
    assert "Examples:" in out


def test_text_is_the_report(run, model):
    status, out, err = run("inspect", "spectra", model, "--pattern", "h.0.*", "--threads", 1)
    assert (status, err) == (0, "")
    assert out == f"{weightsmith.inspect.spectra(model, pattern=['h.0.*'])}\n"


def test_json_is_one_document(run, model):
    _, out, _ = run("inspect", "quantization_error", model, "--bits", "2,4", "--group", "4", "--json")
    expected = weightsmith.inspect.quantization_error(model, bits=[2, 4], group=4).to_json()
    assert json.loads(out) == json.loads(json.dumps(expected))


def test_several_models_and_a_base(run, model, tuned):
    status, _, err = run("inspect", "geometry", tuned, tuned)
    assert (status, "--base" in err) == (2, True)
    status, out, _ = run("inspect", "geometry", tuned, tuned, "--base", model, "--top", "none", "--json")
    found = json.loads(out)["figures"]
    assert (status, found["models"], found["cosine"]) == (0, 2, pytest.approx(1.0))


def test_two_places(run, model, tuned):
    status, out, _ = run("inspect", "relative_change", model, tuned, "--json")
    assert status == 0
    assert json.loads(out)["table"][0]["relative change"] == pytest.approx(0.5)
    assert run("inspect", "relative_change", model)[0] == 2


def test_a_switch(run, model):
    _, out, _ = run("inspect", "overlaps", model, "--center", "--json")
    assert json.loads(out)["table"] == weightsmith.inspect.overlaps(model, center=True).to_json()["table"]


@pytest.mark.parametrize("kind", [".html", ".svg", ".png", ".json", ".csv", ".txt"])
def test_files_of_every_kind(run, model, tmp_path, kind):
    pytest.importorskip("matplotlib")
    place = tmp_path / f"report{kind}"
    status, out, _ = run("inspect", "sparsity_knees", model, "-o", place)
    assert (status, out) == (0, f"{place}: Sparsity of weights\n")
    assert place.stat().st_size > 100


def test_nothing_is_overwritten_unasked_and_nothing_is_computed_for_nothing(run, model, tmp_path):
    place = tmp_path / "r.csv"
    place.write_text("mine")
    status, _, err = run("inspect", "spectra", model, "-o", place)
    assert (status, "--overwrite" in err, place.read_text()) == (2, True, "mine")
    assert run("inspect", "spectra", model, "-o", place, "--overwrite")[0] == 0
    assert len(list(csv.DictReader(place.open()))) == 4
    for wrong, word in ((tmp_path / "r.pdf", "one of .html"), (tmp_path / "no" / "r.txt", "no folder")):
        status, _, err = run("inspect", "spectra", "/nowhere", "-o", wrong)
        assert (status, word in err) == (2, True)


def test_what_is_wrong_is_said(run, model):
    assert "did you mean 'spectra'" in run("inspect", "spectrum", model)[2]
    assert run("inspect", "spectra", "/nowhere")[0] == 2
    assert "no float matrix" in run("inspect", "spectra", model, "--pattern", "x")[2]


@pytest.mark.parametrize("command", ["show", "diff"])
def test_show_and_diff_write_reports_too(run, model, tuned, tmp_path, command):
    pytest.importorskip("matplotlib")
    places = [model] if command == "show" else [model, tuned]
    place = tmp_path / "r.html"
    plain = run(command, *places)
    status, out, _ = run(command, *places, "-o", place)
    assert (status, out) == plain[:2]
    assert "wte.weight" in place.read_text()
    assert "--overwrite" in run(command, *places, "-o", place)[2]


def test_a_table_of_show_has_every_tensor(run, model, tmp_path):
    run("show", model, "--stats", "--spectra", "-o", tmp_path / "r.csv")
    rows = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert [row["name"] for row in rows] == list(weightsmith.open(model))
    assert float(rows[0]["norm"]) == pytest.approx(float(weightsmith.open(model)["wte.weight"].norm()))


def test_options_have_the_words_of_their_function(run):
    out = " ".join(run("inspect", "sparsity_knees", "--help")[1].split())
    assert "a single threshold over all matrices removes" in out
    assert "0.001, 0.01,0.1]" in out or "0.001,0.01,0.1]" in out
    assert "Repeatable." in out
    assert "Share to remove, from 0 to 1" in " ".join(run("prune", "magnitude", "--help")[1].split())
