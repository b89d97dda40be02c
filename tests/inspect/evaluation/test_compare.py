"""Comparisons: rows against the functions they are made of, and what pairing sees."""

from __future__ import annotations

import json

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import adjusted, compare, mcnemar, paired_interval, permutation, wilcoxon


def scores() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hard = torch.randn(80, generator=generator)
    return {name: hard + shift + 0.2 * torch.randn(80, generator=generator) for name, shift in
            (("a", 0.0), ("b", 0.15), ("c", 0.02))}  # fmt: skip


def test_rows_are_made_of_the_parts():
    given = scores()
    found = compare(given, samples=200, seed=1)
    pairs = [("a", "b"), ("a", "c"), ("b", "c")]
    assert list(zip(found["first"], found["second"], strict=True)) == pairs
    for row, (i, j) in zip(found.table, pairs, strict=True):
        interval = paired_interval(given[i], given[j], samples=200, seed=1)
        assert (row["difference"], row["low"], row["high"]) == (interval.estimate, interval.low, interval.high)
        assert row["p"] == permutation(given[i], given[j], seed=1).p_value
    assert found["adjusted p"] == adjusted(found["p"])
    assert found["better"] == ["b", None, "b"]
    assert compare(given, higher_is_better=False, samples=200)["better"] == ["a", None, "c"]
    assert found["mean of a"] == pytest.approx(float(given["a"].mean()))
    json.dumps(found.to_json(), allow_nan=False)
    assert "Paired over 80 examples" in str(found)


def test_bad_words_are_found_at_once():
    given = scores()
    with pytest.raises(Error, match="did you mean 'holm'"):
        compare(given, adjust="hol")
    for options in ({"weight": [1.0] * 80}, {"groups": [0, 1] * 40}):
        with pytest.raises(Error, match="independent and equal"):
            compare({name: row > 0 for name, row in given.items()}, test="mcnemar", **options)
    with pytest.raises(Error, match="different lengths"):
        compare([torch.ones(3), torch.ones(2)])
    with pytest.raises(Error, match="different names"):
        compare(list(given.values()), names=["a", "b"])


def test_baseline_tests_and_groups():
    given = scores()
    found = compare(given, baseline="c", test="wilcoxon", adjust="none", samples=50)
    assert found["first"] == ["a", "b"]
    assert found["p"][0] == wilcoxon(given["a"], given["c"]).p_value
    weight = torch.linspace(0, 3, 80)
    heavy = compare(given, baseline="c", weight=weight, samples=50)
    assert heavy["p"][0] == permutation(given["a"].double() * weight, given["c"].double() * weight).p_value
    assert heavy["difference"][0] == paired_interval(given["a"], given["c"], weight=weight, samples=50).estimate
    right = torch.stack([given["a"] > 0, given["b"] > 0])
    assert compare(right, names=["x", "y"], test="mcnemar", samples=50)["p"] == [mcnemar(*right).p_value]
    grouped = compare(given, groups=torch.arange(80) // 8, test="t", samples=50)
    assert "10 groups" in grouped.notes[0]
    weight = torch.ones(80)
    assert compare(given, weight=weight, samples=50)["p"] == compare(given, samples=50)["p"]


def test_refusals():
    for bad in ({"a": [1.0]}, {"a": [1.0], "b": [1.0, 2.0]}, {}):
        with pytest.raises(Error):
            compare(bad)
    with pytest.raises(Error, match="did you mean 'small'"):
        compare({"small": [1.0, 2.0], "large": [2.0, 1.0]}, baseline="smal")
    with pytest.raises(Error, match="permutation"):
        compare({"a": [1.0, 2.0], "b": [2.0, 1.0]}, test="permutations")
    with pytest.raises(Error, match="independent"):
        compare({"a": [1.0, 0.0], "b": [0.0, 1.0]}, test="mcnemar", groups=[0, 1])
    with pytest.raises(Error, match="names"):
        compare(torch.zeros(2, 3), names=["a"])
