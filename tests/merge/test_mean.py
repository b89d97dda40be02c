"""The weighted mean, against a loop written from the formula."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.merge._mean import mean


def by_hand(models: torch.Tensor, weight: list[float]) -> torch.Tensor:
    result = torch.zeros(models[0].numel(), dtype=torch.float64)
    for place in range(models[0].numel()):
        above = sum(a * float(model.flatten()[place]) for a, model in zip(weight, models, strict=True))
        result[place] = above / sum(weight)
    return result.reshape(models.shape[1:])


@pytest.mark.parametrize("weight", [[1, 1, 1], [3, 1, 0], [0.2, 0.5, 0.3], [2, -0.5, 1]])
@pytest.mark.parametrize("shape", [(), (1,), (4, 3), (2, 3, 2)])
def test_the_formula(shape: tuple[int, ...], weight: list[float]):
    models = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean(models, weight=weight), by_hand(models, weight).float())


def test_all_equal_by_default_and_whatever_the_number():
    models = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    expected = by_hand(models, [1, 1, 1, 1]).float()
    torch.testing.assert_close(mean(models), expected)
    torch.testing.assert_close(mean(models, weight=7), expected)


def test_without_normalizing_it_is_the_weighted_sum():
    models = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    assert torch.equal(mean(models, weight=[1, -0.5], normalize=False), torch.tensor([-4.0, -8.0]))
    assert torch.equal(mean(models, weight=0.5, normalize=False), torch.tensor([5.5, 11.0]))
    assert torch.equal(mean(models, weight=[1, -1], normalize=False), torch.tensor([-9.0, -18.0]))


def test_one_model_is_returned_bit_for_bit():
    model = torch.randn(1, 100, generator=torch.Generator().manual_seed(2))
    assert torch.equal(mean(model), model[0])
    assert torch.equal(mean(model.bfloat16(), weight=3), model[0].bfloat16())


def test_all_the_weight_on_one_model_gives_that_model():
    models = torch.randn(3, 50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(mean(models, weight=[0, 5, 0]), models[1])


def test_it_lies_between_the_models():
    models = torch.randn(5, 200, generator=torch.Generator().manual_seed(4))
    found = mean(models, weight=[1, 2, 3, 4, 5])
    assert (found >= models.amin(0) - 1e-6).all()
    assert (found <= models.amax(0) + 1e-6).all()


def test_bfloat16_is_added_in_float32_and_rounded_once():
    # In bfloat16 256 + 1 is 256: a sum in that dtype would lose every one of the ones.
    models = torch.tensor([[256.0], [1.0], [1.0], [2.0]]).bfloat16()
    assert mean(models, normalize=False, weight=1).item() == 260
    assert mean(models).dtype == torch.bfloat16


def test_float16_does_not_overflow_on_the_way():
    models = torch.full((4, 1), 60000.0, dtype=torch.float16)
    assert mean(models).item() == 60000


def test_float64_keeps_its_precision():
    models = torch.tensor([[1.0], [1.0 + 2**-40]], dtype=torch.float64)
    assert mean(models).item() == 1 + 2**-41


def test_values_that_are_not_finite_stay_visible():
    models = torch.tensor([[1.0, torch.inf, torch.nan], [1.0, 0.0, 0.0]])
    found = mean(models)
    assert found[0] == 1
    assert found[1] == torch.inf
    assert found[2].isnan()


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1, 2], r"weight needs one number for each of the 3 models, got 2"),
        ([], r"one number for each of the 3 models, got 0"),
        ([1, -1, 0], r"sum to zero.*normalize=False"),
        ([0.1 + 0.2, -0.3, 0.0], r"sum to zero"),
        (0, r"sum to zero"),
        ([1, float("nan"), 1], r"not all finite"),
        ([1, float("inf"), 1], r"not all finite"),
    ],
)
def test_refusals(weight: object, message: str):
    with pytest.raises(Error, match=message):
        mean(torch.ones(3, 2), weight=weight)  # type: ignore[arg-type]


def test_no_model_is_refused():
    with pytest.raises(Error, match="mean needs at least 1 model, got 0"):
        mean(torch.ones(0, 2))
