"""``weightsmith eval``: tables for people, JSON for programs, reports; wrong calls found at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import weightsmith as ws
from weightsmith.cli import Root

NET = "import torch\ndef build():\n    return torch.nn.Linear(2, 2, bias=False)\n"


@pytest.fixture
def points(tmp_path: Path) -> Path:
    """Two checkpoints, their module, and points that the first gets right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 2, generator=generator)
    np.savez(tmp_path / "points.npz", x=x.numpy(), y=(x[:, 1] > x[:, 0]).long().numpy())
    (tmp_path / "net.py").write_text(NET)
    ws.Weights.of({"weight": torch.eye(2)}).save(tmp_path / "good.safetensors")
    ws.Weights.of({"weight": -torch.eye(2)}).save(tmp_path / "bad.safetensors")
    return tmp_path


def call(run, points: Path, *words: object):
    return run(
        "eval",
        points / "good.safetensors", points / "bad.safetensors", "--classify", points / "points.npz",
        "--module", f"{points / 'net.py'}:build", *words,
    )  # fmt: skip


def test_a_table_and_a_page(run, points: Path):
    status, out, err = call(run, points, "-o", points / "out.html")
    assert status == 0, err
    assert "2 classifiers on" in out
    assert "1 [1, 1]" in out
    assert "-1 [-1, -1]" in out
    page = (points / "out.html").read_text()
    assert "<script" not in page
    assert "calibration error" in page


def test_json(run, points: Path):
    _, out, _ = call(run, points, "--json")
    (report,) = json.loads(out)
    assert [row["accuracy"] for row in report["table"]] == [1.0, 0.0]
    assert report["table"][1]["lost"] == 1.0


def test_results_of_lm_eval_that_lie_beside_models(run, tmp_path: Path):
    for name, value in (("a", 0.5), ("b", 0.6)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results_1.json").write_text(json.dumps({"results": {"piqa": {"acc,none": value}}}))
    status, out, err = run("eval", tmp_path / "a", tmp_path / "b")
    assert status == 0, err
    assert "piqa" in out
    assert "0.6" in out
    _, out, _ = run("eval", tmp_path / "a", "--lm-eval", tmp_path / "b" / "results_1.json", "--json")
    assert json.loads(out)[0]["table"][0]["value"] == 0.6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to measure on"),
        (("--module", "n.py:build"), "--module is for --classify"),
        (("--limit", "3"), "--limit is for --classify"),
        (("--cache", "c"), "--cache keeps what a --reference says"),
        (("--lm-eval", "a", "--lm-eval", "b"), "needs a file for each of the 1 models, got 2"),
        (("--text", "t", "-o", "x.pdf"), "is written as one of"),
        (("--classify", "points.npz"), "--module FILE.PY:FUNCTION"),
    ],
)
def test_wrong_calls(run, points: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str):
    monkeypatch.chdir(points)
    before = sorted(points.iterdir())
    status, _, err = run("eval", "good.safetensors", *words)
    assert status != 0
    assert message in err
    assert sorted(points.iterdir()) == before


def test_it_is_a_command_of_the_program(run):
    assert "eval" in Root(name="weightsmith").sections()["Look"]
    assert "--reference" in run("eval", "--help")[1]


def test_a_report_that_cannot_be_written_is_found_before_anything_is_measured(run, points: Path):
    place = points / "out.html"
    place.write_text("mine")
    for words, message in (
        (("-o", place), "--overwrite"),
        (("-o", points / "no" / "out.html"), "no folder"),
        (("-o", points / "out.csv", "--text", points / "nowhere.txt"), "2 tables fit into an .html page only"),
    ):
        status, _, err = call(run, points, *words)
        assert (status, message in err) == (2, True), err
    assert place.read_text() == "mine"
    assert call(run, points, "-o", place, "--overwrite")[0] == 0
    assert "calibration error" in place.read_text()
