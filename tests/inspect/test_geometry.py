"""Task vectors against loops and decompositions, and subspaces whose overlap is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import weightsmith
from weightsmith.errors import Error
from weightsmith.inspect import diff, directions, geometry, overlap, relative_change
from weightsmith.weights import Weights


def made(seed, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"h.0.q.weight": (7, 12), "h.1.q.weight": (12, 7), "h.1.q.bias": (12,), "conv.weight": (5, 2, 3)}
    return {name: (scale * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()}


def moved(base, seed):
    return {name: value + delta for (name, value), delta in zip(base.items(), made(seed, 0.1).values(), strict=True)}


def test_every_figure_by_hand():
    base = made(0)
    models = [moved(base, seed) for seed in (1, 2, 3)]
    models[0]["h.1.q.bias"] = base["h.1.q.bias"]
    found = geometry(models, base, top=3)
    for row in found.table:
        origin = base[row["tensor"]].double()
        deltas = [model[row["tensor"]].double() - origin for model in models]
        assert row["relative change"] == pytest.approx(sum(float(d.norm() / origin.norm()) for d in deltas) / 3)
        cosines, agreements, lefts, rights = [], [], [], []
        for one, other in itertools.combinations(deltas, 2):
            if one.any() and other.any():
                cosines.append(float((one * other).sum() / one.norm() / other.norm()))
            both = [(a, b) for a, b in zip(one.flatten(), other.flatten(), strict=True) if a != 0 and b != 0]
            if both:
                agreements.append(sum(float(a * b) > 0 for a, b in both) / len(both))
            if one.ndim > 1:
                (u, _, v), (x, _, y) = torch.linalg.svd(one.flatten(1)), torch.linalg.svd(other.flatten(1))
                lefts.append(float((u[:, :3].T @ x[:, :3]).square().sum()) / 3)
                rights.append(float((v[:3] @ y[:3].T).square().sum()) / 3)
        assert row["cosine"] == pytest.approx(sum(cosines) / len(cosines))
        assert row["sign agreement"] == pytest.approx(sum(agreements) / len(agreements))
        stacked = torch.stack(deltas)
        ups, downs = (stacked > 0).any(0), (stacked < 0).any(0)
        assert row["conflict"] == pytest.approx(float((ups & downs).sum() / (ups | downs).sum()))
        if lefts:
            assert row["left overlap"] == pytest.approx(sum(lefts) / 3)
            assert row["right overlap"] == pytest.approx(sum(rights) / 3)
            assert row["left chance"] == min(3, origin.shape[0]) / origin.shape[0]
            shares = [(s := torch.linalg.svdvals(d.flatten(1))) / s.sum() for d in deltas]
            ranks = [math.exp(-float((share * share.log()).sum())) for share in shares]
            assert row["effective rank"] == pytest.approx(sum(ranks) / 3)
        else:
            assert row["left overlap"] is row["effective rank"] is None


def test_the_whole_is_all_tensors_together():
    base = made(0)
    models = [moved(base, 1), moved(base, 2)]
    found = geometry(models, base, top=None)
    flat = [torch.cat([(model[name] - base[name]).flatten().double() for name in base]) for model in models]
    origin = torch.cat([value.flatten().double() for value in base.values()])
    assert found.figures["relative change of model 1"] == pytest.approx(float(flat[1].norm() / origin.norm()))
    assert found.figures["cosine"] == pytest.approx(float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm()))
    assert found.table[0]["left overlap"] is None


def test_one_model_unchanged_models_and_what_is_not_finite():
    base = made(0)
    alone = geometry([base], base)
    assert alone.figures["relative change of model 0"] == 0.0
    assert alone.figures["cosine"] is alone.table[0]["effective rank"] is None
    broken = moved(base, 1)
    broken["h.0.q.weight"][0, 0] = math.nan
    found = geometry([broken, moved(base, 2)], base)
    assert found.table[0]["left overlap"] is None
    assert math.isfinite(found.table[0]["cosine"])
    assert "1 values are not finite" in found.notes[0]
    assert str(found)


def test_models_that_do_not_fit_are_refused():
    base = made(0)
    with pytest.raises(Error, match="at least 1 model"):
        geometry([], base)
    with pytest.raises(Error, match="tensors of their base"):
        geometry([{"x": torch.ones(2)}], base)
    with pytest.raises(Error, match=r"h\.0\.q\.weight is .* in model 0"):
        geometry([{**base, "h.0.q.weight": torch.ones(2, 2)}], base)
    with pytest.raises(Error, match="no float tensor"):
        geometry([base], base, pattern="nothing")


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_directions_are_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, right, values = directions(matrix, 2)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(values, s, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close((left * values[:2]) @ right.T, (u[:, :2] * s[:2]) @ v[:2], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(left.T @ left, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-9)


def test_overlaps_that_are_known():
    eye = torch.eye(6, dtype=torch.float64)
    assert overlap(eye[:, :3], eye[:, 1:4]) == pytest.approx(2 / 3)
    assert overlap(eye[:, :3], eye[:, :1]) == 1.0
    assert overlap(eye[:, :3], eye[:, :0]) is None
    turned = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    assert overlap(eye[:, :3] @ turned, eye[:, :3]) == pytest.approx(1.0)


def test_relative_change_is_the_distance_of_diff(tmp_path):
    pytest.importorskip("matplotlib")
    base = made(0)
    after = {**moved(base, 1), "extra": torch.ones(2)}
    found = relative_change(base, after)
    exact = {t.name: t.sums.distance for t in diff(Weights.of(base), Weights.of(after)).tensors if t.sums}
    assert {row["tensor"]: row["relative change"] for row in found.table} == exact
    changes = found["relative change"] if isinstance(found["relative change"], list) else None
    assert changes is None  # the figure of all goes before the column
    column = [row["relative change"] for row in found.table]
    assert column == sorted(column, reverse=True)
    assert found.figures["not compared"] == 1
    assert found.save(tmp_path / "r.svg").exists()
    with pytest.raises(Error, match="no tensor of one name"):
        relative_change({"a": torch.ones(2)}, {"b": torch.ones(2)})


def test_packed_weights_are_decoded_before_they_are_compared():
    generator = torch.Generator().manual_seed(0)
    plain = weightsmith.open({"l.weight": torch.randn(8, 32, generator=generator), "norm": torch.ones(8)})
    packed = weightsmith.quantize.rtn(plain, bits=4, group=16)
    found = relative_change(plain, packed)
    assert (found["tensors"], found["not compared"], found.notes) == (2, 0, ())
    assert 0.01 < found["relative change"] < 0.2
    lone = relative_change(plain, {"norm": torch.ones(8), "new": torch.ones(1)})
    assert lone["not compared"] == 2
    assert "2 tensors are on one side only" in lone.notes[0]


def test_chance_is_that_of_the_directions_there_are():
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.zeros(30, 4)}
    tuned = [{"w": torch.randn(30, 4, generator=generator)} for _ in range(2)]
    (row,) = geometry(tuned, base, top=8).table  # four directions, not eight
    assert (row["left chance"], row["right chance"], row["right overlap"]) == (4 / 30, 1.0, pytest.approx(1.0))
    (alone,) = geometry(tuned[:1], base).table
    assert alone["left chance"] is None
