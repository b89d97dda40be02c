"""How differently models err and how near they lie: against loops written from the definitions."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.inspect import diversity, flips, locality, rescued


def test_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (200,), generator=generator)
    scores = torch.randn(3, 200, 4, generator=generator)
    scores[:, torch.arange(200), labels] += 1
    found = diversity(scores, labels)
    said = scores.argmax(2)
    for pair, (i, j) in zip(found.pairs, itertools.combinations(range(3), 2), strict=True):
        one = both = differ = 0
        for n in range(200):
            wrong = [int(said[m, n]) != int(labels[n]) for m in (i, j)]
            both += all(wrong)
            one += wrong[0] != wrong[1]
            differ += int(said[i, n]) != int(said[j, n])
        assert (pair.first, pair.second) == (i, j)
        assert pair.ratio_error == pytest.approx(one / both)
        assert pair.both_wrong == pytest.approx(both / 200)
        assert pair.disagreement == pytest.approx(differ / 200)
    assert found.accuracies == pytest.approx([(said[m] == labels).double().mean().item() for m in range(3)])
    assert found.ensemble == pytest.approx((scores.mean(0).argmax(1) == labels).double().mean().item())
    assert found.any_right == pytest.approx((said == labels).any(0).double().mean().item())
    assert found.ratio_error == pytest.approx(sum(pair.ratio_error for pair in found.pairs) / 3)
    assert diversity(said, labels).pairs == found.pairs
    assert diversity(said, labels).ensemble is None
    assert json.loads(json.dumps(found.to_json()))["pairs"][0]["second"] == 1
    assert len(found.rows()) == 3


def test_models_that_never_err_together():
    labels = torch.zeros(4, dtype=torch.long)
    found = diversity(torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]), labels)
    assert [pair.ratio_error for pair in found.pairs] == [math.inf] * 3
    perfect = diversity(torch.zeros(2, 4, dtype=torch.long), labels)
    assert perfect.ratio_error == 0
    json.dumps(found.to_json(), allow_nan=False)


def test_flips_and_rescues():
    labels = torch.tensor([0, 0, 0, 0, 1])
    first, second = torch.tensor([0, 0, 1, 1, 0]), torch.tensor([0, 1, 0, 1, 0])
    assert (flips(first, second, labels).negative, flips(first, second, labels).positive) == (0.2, 0.2)
    assert rescued(first, second, torch.tensor([1, 1, 1, 0, 1]), labels) == pytest.approx(0.4)
    onehot = torch.nn.functional.one_hot(second, 2).float()
    assert flips(first, onehot, labels) == flips(first, second, labels)


@pytest.mark.parametrize("of_base", [True, False])
@pytest.mark.usefixtures("small_pieces")
def test_locality_against_flat_vectors(of_base: bool):
    generator = torch.Generator().manual_seed(1)
    models = [
        {"a": torch.randn(7, 9, generator=generator), "b": torch.randn(5, generator=generator), "n": torch.tensor(3)}
        for _ in range(3)
    ]
    base = {"a": torch.randn(7, 9, generator=generator), "b": torch.zeros(5), "n": torch.tensor(1)}
    found = locality(models, base if of_base else None)
    flat = torch.stack([torch.cat([m["a"].flatten(), m["b"]]) for m in models]).double()
    around = flat - flat.mean(0)
    deltas = flat - torch.cat([base["a"].flatten(), base["b"]]) if of_base else around
    assert found.distances == pytest.approx(around.norm(dim=1).tolist())
    assert found.lengths == pytest.approx(deltas.norm(dim=1).tolist())
    expected = torch.nn.functional.cosine_similarity(deltas[:, None], deltas[None], dim=2)
    torch.testing.assert_close(torch.tensor(found.cosines, dtype=torch.float64), expected)
    assert found.spread == pytest.approx(float(around.square().sum(1).max()))
    assert len(found.rows()) == 3
    json.dumps(found.to_json(), allow_nan=False)


def test_locality_of_equal_models_and_of_tied_ones():
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(2))
    same = locality([{"a": weight}, {"a": weight.clone()}])
    assert same.distances == (0.0, 0.0)
    assert same.cosines == ((0.0, 0.0), (0.0, 0.0))  # what has no length has no direction
    tied = [{"a": value, "b": value} for value in (weight, 2 * weight)]
    single = [{"a": value} for value in (weight, 2 * weight)]
    assert locality(tied).distances == pytest.approx(locality(single).distances)  # one tensor, counted once


def test_refusals():
    labels = torch.zeros(3, dtype=torch.long)
    with pytest.raises(Error, match="2 models"):
        diversity(torch.zeros(1, 3), labels)
    with pytest.raises(Error, match="do not fit"):
        diversity(torch.zeros(2, 4), labels)
    with pytest.raises(Error, match="do not fit"):
        flips(torch.zeros(4), torch.zeros(3), labels)
    with pytest.raises(Error, match="at least 2"):
        locality([{"a": torch.zeros(2)}])
    with pytest.raises(Error, match="same tensors"):
        locality([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
    with pytest.raises(Error, match=r"tensor a: .*shapes"):
        locality([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}])


def test_it_reads_lazy_weights():
    found = locality([ws.open({"a": torch.ones(4)}) * 2, ws.open({"a": torch.ones(4)})])
    assert found.distances == pytest.approx((1.0, 1.0))


def test_reports_say_the_same(tmp_path):
    pytest.importorskip("matplotlib")
    labels = torch.tensor([0, 0, 0, 0])
    found = diversity(torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]]), labels)
    report = found.report()
    assert report.figures["any right"] == found.any_right
    assert report.table[0]["disagreement"] == report.plots[1].surface.z[0][1] == report.plots[1].surface.z[1][0] == 0.5
    assert report.save(tmp_path / "d.html").exists()
    near = locality([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}], {"w": torch.zeros(2)})
    assert near.report().figures["mean cosine"] == pytest.approx(0.0)
    assert list(near.report().plots[0].lines[1].y) == [1.0, 1.0]
    assert near.report().save(tmp_path / "l.html").exists()
