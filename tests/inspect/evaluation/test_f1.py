"""Averages of F1: against scikit-learn, by hand, and where two classifiers change places."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.metrics import f1_score

from weightsmith.errors import Error
from weightsmith.inspect.evaluation import class_weights, f1_family, weighted_f1


def labels(seed: int, count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([0.6, 0.25, 0.1, 0.05])
    true = torch.multinomial(shares, count, replacement=True, generator=generator)
    noise = torch.multinomial(shares, count, replacement=True, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.7, true, noise), true


@pytest.mark.parametrize("ignore", [(), (0,), (1, 3)])
def test_ends_of_the_family_are_those_of_scikit_learn(ignore: tuple[int, ...]):
    for seed in range(5):
        said, true = labels(seed)
        kept = [c for c in range(4) if c not in ignore]
        for scheme in ("macro", "weighted", "micro"):
            expected = f1_score(true, said, average=scheme, labels=kept)
            assert float(weighted_f1(said, true, scheme, ignore=ignore)) == pytest.approx(expected)


def test_the_middle_by_hand():
    said, true = labels(0)
    by_class = f1_score(true, said, average=None)
    counts = torch.bincount(true).tolist()
    dodrans = [n**0.75 for n in counts]
    entropy = [-n * math.log(n / 300) for n in counts]
    for scheme, weights in (("dodrans", dodrans), ("entropy", entropy)):
        expected = sum(w * f for w, f in zip(weights, by_class, strict=True)) / sum(weights)
        assert float(weighted_f1(said, true, scheme)) == pytest.approx(expected)
        torch.testing.assert_close(
            class_weights(counts, scheme), torch.tensor(weights, dtype=torch.float64) / sum(weights)
        )
    assert float(weighted_f1(said, true, lambda n: n**0)) == pytest.approx(float(weighted_f1(said, true, "macro")))


def test_resamples_without_a_class_that_counts_are_left_out():
    true = torch.tensor([0] * 9 + [1])
    found = f1_family(true, true, ignore=(0,), groups=list(range(10)), samples=60)  # one resample at a time
    assert found["macro"] == 1
    both = weighted_f1(torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 0, 0], [0, 1, 1]]), "macro", ignore=(0,))
    assert math.isnan(float(both[0]))
    assert float(both[1]) == 0
    assert float(weighted_f1(true, true, ignore=(-1, 7))) == 1
    for make in (weighted_f1, f1_family):
        with pytest.raises(Error, match="not ignored"):
            make(true, true, ignore=(0, 1))


def test_a_class_that_is_only_predicted_counts_as_in_scikit_learn():
    said, true = torch.tensor([0, 5, 1, 1]), torch.tensor([0, 0, 1, 0])
    for scheme in ("macro", "weighted", "micro"):
        assert float(weighted_f1(said, true, scheme)) == pytest.approx(f1_score(true, said, average=scheme))


def test_dodrans_lies_between_where_f1_grows_with_size():
    true = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    said = torch.tensor([0] * 78 + [1, 2] + [1] * 11 + [0] * 4 + [2] * 2 + [0] * 3)
    family = [float(weighted_f1(said, true, scheme)) for scheme in ("macro", "dodrans", "weighted")]
    assert family == sorted(family)
    assert family[0] < family[1] < family[2]


def test_batches_are_rows():
    pairs = [labels(seed) for seed in range(4)]
    said, true = (torch.stack(part) for part in zip(*pairs, strict=True))
    for scheme in ("macro", "dodrans", "entropy", "weighted", "micro"):
        rows = weighted_f1(said, true, scheme, classes=4)
        assert rows.tolist() == pytest.approx([float(weighted_f1(s, t, scheme)) for s, t in pairs])


def test_family_report():
    said, true = labels(1)
    found = f1_family(said, true, samples=100)
    assert found["F1"] == pytest.approx([float(weighted_f1(said, true, name)) for name in found["average"]])
    assert all(row["low"] < row["F1"] < row["high"] for row in found.table)
    assert f1_family(said, true, ignore=(0,), samples=10).title.endswith("3 classes")
    # One classifier for the frequent class, one for the rare: which is better depends on the average.
    true = torch.tensor([0] * 90 + [1] * 10)
    frequent = torch.tensor([0] * 90 + [0] * 8 + [1] * 2)
    rare = torch.tensor([0] * 74 + [1] * 16 + [1] * 10)
    order = [float(weighted_f1(frequent, true, s) - weighted_f1(rare, true, s)) > 0 for s in ("macro", "weighted")]
    assert order == [False, True]


def test_edges():
    assert class_weights([5, 0], "entropy").tolist() == [1.0, 0.0]
    assert float(weighted_f1([1, 1], [1, 1], "entropy")) == 1.0
    resample = weighted_f1(torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 0], [0, 1]]), "dodrans", ignore=(0,))
    assert math.isnan(float(resample[0]))
    assert float(resample[1]) == 1
    for said, true in (([], []), ([0.5], [1]), ([0, 1], [0]), ([-1], [0])):
        with pytest.raises(Error):
            weighted_f1(torch.tensor(said), torch.tensor(true))
    with pytest.raises(Error, match="not ignored"):
        weighted_f1([0, 0], [0, 0], ignore=(0,))
    with pytest.raises(Error, match="did you mean 'dodrans'"):
        class_weights([1, 2], "dodran")
    with pytest.raises(Error, match="not all 0"):
        class_weights([0, 0])
