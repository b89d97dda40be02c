"""Model Stock, against a loop written from the formula, and at the ends of its ratio."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge._model_stock import model_stock, shell_ratio


def by_hand(models: Tensor, base: Tensor) -> Tensor:
    k = len(models)
    deltas = [[float(x) for x in (model - base).flatten()] for model in models.double()]
    cosines = []
    for i in range(k):
        for j in range(i + 1, k):
            lengths = math.sqrt(sum(x * x for x in deltas[i])) * math.sqrt(sum(x * x for x in deltas[j]))
            product = sum(x * y for x, y in zip(deltas[i], deltas[j], strict=True))
            cosines.append(product / lengths if lengths else 0.0)
    c = max(sum(cosines) / len(cosines), 0.0)
    t = k * c / (1 + (k - 1) * c)
    return t * models.double().mean(0) + (1 - t) * base.double()


def fine_tunes(k: int, *shape: int, agree: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base, common = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    return base + agree * common + torch.randn(k, *shape, generator=generator), base


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("agree", [-0.3, 0.2, 1, 5])
@pytest.mark.parametrize("shape", [(40,), (6, 7)])
def test_the_formula(shape: tuple[int, ...], agree: float, k: int):
    models, base = fine_tunes(k, *shape, agree=agree)
    torch.testing.assert_close(model_stock(models, base), by_hand(models, base).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("cosine", [0.0, 0.25, 0.5, 1.0])
def test_the_ratio_of_vectors_at_one_angle(cosine: float, k: int):
    gram = torch.full((k, k), cosine, dtype=torch.float64).fill_diagonal_(1)
    assert float(shell_ratio(gram)) == pytest.approx(k * cosine / (1 + (k - 1) * cosine))
    assert float(shell_ratio(9 * gram)) == pytest.approx(float(shell_ratio(gram)))


def test_it_lies_nearer_to_the_centre_of_a_shell_than_the_mean():
    """What the ratio is for: fine-tunes on a shell around a centre that nobody has seen."""
    generator = torch.Generator().manual_seed(0)
    base = torch.zeros(5000)
    centre = torch.randn(5000, generator=generator)
    models = centre + 2 * torch.randn(3, 5000, generator=generator)
    stock = (model_stock(models, base) - centre).norm()
    assert stock < 0.95 * (models.mean(0) - centre).norm()
    for ratio in (0.2, 0.5, 0.8, 1.0):
        assert stock <= (ratio * models.mean(0) - centre).norm() * 1.01


def test_opposed_task_vectors_give_the_base():
    base = torch.tensor([1.0, -2.0])
    delta = torch.tensor([0.5, 0.25])
    assert torch.equal(model_stock(torch.stack([base + delta, base - delta]), base), base)


def test_models_that_are_the_base_give_the_base():
    base = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    assert torch.equal(model_stock(torch.stack([base, base, base]), base), base)


def test_one_model_that_did_not_move_counts_as_a_right_angle():
    base = torch.zeros(2)
    models = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    c = 1 / 3
    assert model_stock(models, base)[0].item() == pytest.approx(3 * c / (1 + 2 * c) * 2)


def test_one_direction_gives_the_mean_exactly():
    base = torch.tensor([0.0, 4.0])
    models = torch.tensor([[1.0, 4.0], [3.0, 4.0], [8.0, 4.0]])
    assert torch.equal(model_stock(models, base), torch.tensor([4.0, 4.0]))


def test_every_tensor_has_a_ratio_of_its_own():
    base = {"together": torch.zeros(2), "apart": torch.zeros(2)}
    first = {"together": torch.tensor([1.0, 0.0]), "apart": torch.tensor([1.0, 0.0])}
    second = {"together": torch.tensor([3.0, 0.0]), "apart": torch.tensor([0.0, 1.0])}
    found = ws.merge.model_stock([first, second], base)
    assert found["together"].tolist() == [2, 0]
    assert found["apart"].tolist() == [0, 0]


@pytest.mark.usefixtures("small_pieces")
def test_the_ratio_is_that_of_the_whole_tensor_not_of_its_chunks():
    """One half agrees and the other opposes: by halves the ratios would be 1 and 0."""
    models = torch.ones(2, 400)
    models[1, 200:] = -1
    found = ws.merge.model_stock([{"w": models[0]}, {"w": models[1]}], {"w": torch.zeros(400)})["w"]
    assert torch.equal(found, torch.zeros(400))
    models[1, 300:] = 1  # cosine 1/2, ratio 2/3
    found = ws.merge.model_stock([{"w": models[0]}, {"w": models[1]}], {"w": torch.zeros(400)})["w"]
    torch.testing.assert_close(found[:200], torch.full((200,), 2 / 3))


def test_what_was_solved_is_used():
    models, base = fine_tunes(2, 5, agree=1)
    assert torch.equal(model_stock(models, base, solved=torch.tensor(0.0)), base)
    assert torch.equal(model_stock(models, base, solved=torch.tensor(1.0)), models.mean(0))


def test_the_result_has_the_dtype_of_the_models():
    models, base = fine_tunes(2, 5, agree=1)
    assert model_stock(models.bfloat16(), base).dtype == torch.bfloat16
    assert model_stock(models, base.bfloat16()).dtype == torch.float32
    assert model_stock(models.double(), base).dtype == torch.float64
    lazy = ws.merge.model_stock([{"w": model.bfloat16()} for model in models], {"w": base})
    assert lazy.spec("w").dtype == torch.bfloat16
    assert torch.equal(lazy["w"], model_stock(models.bfloat16(), base))


def test_one_model_is_refused():
    with pytest.raises(Error, match="model_stock needs at least 2 models, got 1"):
        model_stock(torch.ones(1, 2), torch.ones(2))
    with pytest.raises(Error, match="model_stock needs at least 2 models, got 1"):
        ws.merge.model_stock([{"w": torch.ones(2)}], {"w": torch.ones(2)})


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", [(6, 7), (5, 3, 4), (9,), ()])
def test_filter_wise_is_the_stock_of_every_output(shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(shape, generator=generator)
    models = base + torch.randn(shape, generator=generator) + torch.randn(3, *shape, generator=generator)
    if len(shape) > 1:
        expected = torch.stack([model_stock(models[:, i], base[i]) for i in range(len(base))])
        assert not torch.allclose(expected, model_stock(models, base), atol=1e-3)
    else:
        expected = model_stock(models, base)
    torch.testing.assert_close(model_stock(models, base, filter_wise=True), expected)
    found = ws.merge.model_stock([{"w": model} for model in models], {"w": base}, filter_wise=True)["w"]
    torch.testing.assert_close(found, expected)
