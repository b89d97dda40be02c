"""Figures of all tensors, slice by slice."""

from __future__ import annotations

import math

import pytest
import torch

from weightsmith.inspect import diff
from weightsmith.look import _survey
from weightsmith.look._survey import changes, norms
from weightsmith.weights import Weights


def run(survey):
    return sum(1 for _ in survey.work())


def test_norms(first):
    survey = norms(first)
    run(survey)
    assert survey.whole
    names = list(first)
    assert [row[0] for row in survey.rows] == list(range(len(names)))
    by_name = {names[index]: (norm, broken) for index, norm, broken in survey.rows}
    assert by_name["model.embed.weight"][0] == pytest.approx(float(first["model.embed.weight"].norm()))
    assert by_name["broken"] == (1.0, 2)
    assert survey.read == survey.total == sum(first.spec(name).nbytes for name in first)


def test_changes_are_those_of_diff(first, second):
    survey = changes(first, second)
    run(survey)
    names = list(first)
    expected = {tensor.name: tensor for tensor in diff(first, second).tensors}
    assert len(survey.rows) == sum(name in second for name in names)
    for index, status, aa, bb, ab, dd, largest, changed, count in survey.rows:
        tensor = expected[names[index]]
        assert status == tensor.status
        if tensor.sums is not None:
            s = tensor.sums
            sums = (s.aa, s.bb, s.ab, s.dd, s.largest, s.changed, s.count)
            assert (aa, bb, ab, dd, largest, changed, count) == pytest.approx(sums)


def test_slices_are_bounded_and_it_goes_on_where_it_stopped(monkeypatch):
    monkeypatch.setattr(_survey, "SLICE", 100)
    weights = Weights.of({f"w{i}": torch.full((10,), float(i)) for i in range(9)})  # 40 bytes each
    survey = norms(weights)
    work = survey.work()
    next(work)
    next(work)
    work.close()
    assert [len(survey.rows), survey.read, survey.whole] == [4, 160, False]
    assert run(survey) == 3
    assert [row[0] for row in survey.rows] == list(range(9))
    assert survey.rows[4][1] == pytest.approx(4 * math.sqrt(10))


def test_nothing_to_do():
    assert norms(Weights.of({})).whole
