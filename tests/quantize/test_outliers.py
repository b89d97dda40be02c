"""Which magnitudes are outliers, by a slow loop, and what becomes of them."""

from __future__ import annotations

import numpy
import pytest
import torch
from torch import Tensor

from weightsmith.errors import Error
from weightsmith.quantize import output_error, rtn, without_outliers
from weightsmith.quantize._outliers import drawn_in, outlier_limit
from weightsmith.weights import Weights


def by_hand(magnitudes: Tensor, reach: float, spread: float) -> float | None:
    """The formula, one cut after the other."""
    values = sorted(magnitudes.double().tolist())
    first, third = numpy.quantile(values, [0.25, 0.75])
    usual = [value for value in values if value <= third + reach * (third - first)]
    unusual = [value for value in values if value > third + reach * (third - first)]
    best, limit = 0.0, None
    for cut in range(len(unusual)):
        stay = [usual[-1], *unusual[:cut]]
        gain = (unusual[cut] - stay[-1]) ** 2 - spread * numpy.var(stay)
        if gain > best:
            best, limit = gain, stay[-1]
    return limit


@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_by_hand(spread: float):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        magnitudes = torch.randn(200, generator=generator).abs() ** 3
        assert outlier_limit(magnitudes, spread=spread) == by_hand(magnitudes, 1.5, spread)
        assert outlier_limit(magnitudes, reach=4, spread=spread) == by_hand(magnitudes, 4, spread)


def test_only_outliers_are_drawn_in():
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    weight[3, 4], weight[9, 2] = 30.0, -28.0
    found = drawn_in(weight)
    moved = found != weight
    assert moved.nonzero().tolist() == [[3, 4], [9, 2]]
    rest = weight.abs().masked_fill(moved, 0).max()
    assert found[3, 4] == rest
    assert found[9, 2] == -rest
    gram = torch.eye(16)
    gram[4, 4] = gram[2, 2] = 1e-4  # the inputs of these two say little
    error = [output_error(weight, rtn(one, bits=3).values(), gram) for one in (weight, found)]
    assert error[1] < 0.5 * error[0]


def test_weights_and_edges():
    weights = Weights.of({"a.weight": torch.randn(8, 8, dtype=torch.bfloat16), "a.bias": torch.full((8,), 100.0)})
    weights["a.weight"][0, 0] = 99
    found = without_outliers(weights)
    assert torch.equal(found["a.bias"], weights["a.bias"])
    assert found["a.weight"].dtype == torch.bfloat16
    assert without_outliers(weights, reach={"a.*": 1e6})["a.weight"].equal(weights["a.weight"])
    for plain in (torch.zeros(3, 3), torch.ones(2, 2), torch.zeros(0, 4), torch.ones(1, 1)):
        assert drawn_in(plain) is plain
    with pytest.raises(Error, match="0 or more"):
        without_outliers(weights, reach=-1.0)
    with pytest.raises(Error, match=r"a\.weight has values that are not finite"):
        without_outliers({"a.weight": torch.tensor([[1.0, torch.nan]])})["a.weight"]
    with pytest.raises(Error, match="no matrix"):
        without_outliers(weights, pattern="b.*")
