"""Files of lm-eval, as that program writes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weightsmith.errors import Error
from weightsmith.inspect._harness import beside, harness_results

FIRST = {
    "results": {
        "piqa": {"alias": "piqa", "acc,none": 0.7, "acc_stderr,none": 0.01, "acc_norm,none": 0.72},
        "gsm8k": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": "N/A"},
    },
    "config": {"model": "hf"},
}


def put(place: Path, data: object) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(data))
    return place


def test_figures_side_by_side(tmp_path: Path):
    second = {"results": {"piqa": {"acc,none": 0.8}}}
    files = {"a": put(tmp_path / "a.json", FIRST), "b": put(tmp_path / "b.json", second)}
    found = harness_results(files)
    assert [(row["task"], row["metric"], row["model"], row["value"]) for row in found.table] == [
        ("piqa", "acc", "a", 0.7),
        ("piqa", "acc", "b", 0.8),
        ("piqa", "acc_norm", "a", 0.72),
        ("gsm8k", "exact_match (strict-match)", "a", 0.1),
    ]
    assert found.table[0]["value low"] == pytest.approx(0.7 - 0.0196)
    assert found.table[0]["value high"] == pytest.approx(0.7 + 0.0196)
    assert found.table[3]["value low"] is None
    assert [plot.title for plot in found.plots] == ["acc", "acc_norm", "exact_match (strict-match)"]
    assert found.draw()


def test_the_latest_in_a_folder_is_taken(tmp_path: Path):
    put(tmp_path / "m" / "results_2025-01-01.json", FIRST)
    late = put(tmp_path / "m" / "lm_eval" / "name" / "results_2026-01-01.json", FIRST)
    put(tmp_path / "m" / "results_2027-01-01.json", {"something": "else"})
    put(tmp_path / "n" / "config.json", {})
    assert beside([tmp_path / "m", tmp_path / "n", tmp_path / "none"]) == {str(tmp_path / "m"): late}


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[]", "has no results"), ('{"results": {"t": 3}}', "the results of t are no figures")],
)
def test_other_files(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(Error, match=message):
        harness_results({"a": tmp_path / "r.json"})
    with pytest.raises(Error, match=r"none\.json: No such file"):
        harness_results({"a": tmp_path / "none.json"})
