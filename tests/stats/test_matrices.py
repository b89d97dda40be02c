"""Figures of matrices against a decomposition of each."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import matrices
from weightsmith.stats._matrices import KNOWN


def some() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(12, 5, generator=generator),
        "conv.weight": torch.randn(6, 3, 2, 2, generator=generator),
        "half.weight": torch.randn(7, 9, generator=generator).to(torch.bfloat16),
        "a.bias": torch.randn(12, generator=generator),
        "count": torch.zeros(2, 2, dtype=torch.long),
    }


def by_hand(tensor: Tensor) -> dict[str, float]:
    values = torch.linalg.svdvals(tensor.double().reshape(len(tensor), -1))
    shares = values / values.sum()
    return {
        "norm": float(values.square().sum().sqrt()),
        "spectral": float(values[0]),
        "stable_rank": float(values.square().sum() / values[0] ** 2),
        "effective_rank": math.exp(-float((shares * shares.log()).sum())),
        "rank": float(len(values)),
        "nuclear": float(values.sum()),
    }


@pytest.mark.parametrize("what", [KNOWN, ("norm",), ("spectral", "norm"), ("rank",), ("stable_rank", "vector")])
def test_figures_are_those_of_a_decomposition(what):
    weights = some()
    found = matrices(weights, what)
    assert list(found) == list(what)
    for word, values in found.items():
        assert list(values) == ["a.weight", "conv.weight", "half.weight"]
        for name in values:
            if word == "vector":
                matrix = weights[name].double().reshape(len(weights[name]), -1)
                assert float((matrix @ values[name].double()).norm()) == pytest.approx(
                    by_hand(matrix)["spectral"], rel=1e-5
                )
            else:
                assert values[name].shape == ()
                assert float(values[name]) == pytest.approx(by_hand(weights[name])[word], rel=1e-5)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)])
def test_a_rank_below_the_full_one(shape):
    """What float32 leaves of the other directions does not count."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(shape[0], 3, generator=generator) @ torch.randn(3, shape[1], generator=generator)
    found = matrices({"w": low}, ("rank", "effective_rank", "stable_rank"))
    assert float(found["rank"]["w"]) == 3
    assert 1 < float(found["stable_rank"]["w"]) < float(found["effective_rank"]["w"]) < 3.01


def test_chunks_and_threads_change_nothing(small_pieces):
    weights = some()
    one, several = (matrices(weights, KNOWN, threads=threads) for threads in (1, 3))
    for word in KNOWN:
        for name in one[word]:
            assert torch.equal(one[word][name], several[word][name])
    assert float(matrices(weights, "norm")["norm"]["a.weight"]) == pytest.approx(by_hand(weights["a.weight"])["norm"])


def test_vectors_of_an_earlier_result_are_where_it_starts():
    weights = some()
    earlier = matrices(weights, ("vector",))["vector"]
    later = {name: value + 1e-3 if value.is_floating_point() else value for name, value in weights.items()}
    warm = matrices(later, ("spectral", "vector"), start=earlier.drop("conv*"))
    cold = matrices(later, ("spectral",))
    for name in warm["spectral"]:
        assert float(warm["spectral"][name]) == pytest.approx(float(cold["spectral"][name]), rel=1e-5)
    assert float(warm["vector"]["a.weight"] @ earlier["a.weight"]) > 0.99  # and not the other sign


def test_results_are_saved_and_start_again(tmp_path):
    weights = some()
    matrices(weights, ("vector",))["vector"].save(tmp_path / "v.safetensors")
    found = matrices(weights, ("spectral",), start=tmp_path / "v.safetensors")["spectral"]
    assert float(found["a.weight"]) == pytest.approx(by_hand(weights["a.weight"])["spectral"], rel=1e-5)


def test_zeros_and_what_is_not_finite():
    zeros = matrices({"w": torch.zeros(2, 3)}, KNOWN)
    assert [float(zeros[word]["w"]) for word in KNOWN if word != "vector"] == [0.0] * 6
    assert torch.equal(zeros["vector"]["w"], torch.zeros(3))
    bad = matrices({"w": torch.tensor([[1.0, math.nan]])}, KNOWN)
    assert all(bad[word]["w"].isnan().all() for word in KNOWN)


def test_tied_and_empty_tensors():
    shared = torch.ones(2, 2)
    found = matrices({"a": shared, "b": shared, "none": torch.zeros(0, 3)}, ("norm",))
    assert list(found["norm"]) == ["a"]


def test_refusals():
    with pytest.raises(Error, match=r"spectrl.*spectral"):
        matrices(some(), ("spectrl",))
    with pytest.raises(Error, match="nothing"):
        matrices(some(), ())
    with pytest.raises(Error, match="no float matrix"):
        matrices(some(), pattern="*.bias")
    with pytest.raises(Error, match="start= has"):
        matrices(some(), start=ws.Weights.of({"a.weight": torch.ones(4)}))
