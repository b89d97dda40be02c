"""The same arcs and picks as mergekit, and where we depart from it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws

mergekit = pytest.importorskip(
    "mergekit.merge_methods", reason='needs mergekit: pip install "weightsmith[peers]"', exc_type=ImportError
)

SHAPES = [(5,), (6, 7), (2, 3, 3)]
WEIGHTS = [[1.0, 1.0], [0.2, 1.5], [0.7, -0.3], [0.0, 1.0]]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def tensors(count: int, shape: tuple[int, ...], change: float = 1.0) -> list[Tensor]:
    """A base and fine-tunes of it."""
    generator = torch.Generator().manual_seed(len(shape))
    base = torch.randn(shape, generator=generator)
    return [base, *(base + change * torch.randn(count, *shape, generator=generator))]


def theirs(method: str, models: list[Tensor], base_index: int | None = None, **options: Any) -> Tensor:
    return mergekit.merge_tensors(models, method, base_index=base_index, parameters=options)


def ours(method: str, models: list[Tensor], base: Tensor | None = None, **options: Any) -> Tensor:
    origin = None if base is None else {"w": base}
    return getattr(ws.merge, method)([{"w": model} for model in models], origin, **options)["w"]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@shapes
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("change", [0.001, 0.1, 1.0, 5.0])  # the first is above the threshold
def test_slerp(change: float, t: float, shape: tuple[int, ...]):
    models = tensors(1, shape, change)
    close(ours("slerp", models, t=t), theirs("slerp", models, base_index=0, t=t))


@shapes
@pytest.mark.parametrize("weight", WEIGHTS)
def test_nuslerp(weight: list[float], shape: tuple[int, ...]):
    models = tensors(1, shape)
    close(ours("nuslerp", models, weight=weight), theirs("nuslerp", models, weight=weight))


@shapes
@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("with_base", [True, False])
def test_nuslerp_of_parts(with_base: bool, row_wise: bool, flatten: bool, shape: tuple[int, ...]):
    base, *models = tensors(2, shape)
    inputs = [base, *models] if with_base else models
    options: dict[str, Any] = {"nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    expected = theirs("nuslerp", inputs, base_index=0 if with_base else None, weight=[0.2, 1.5], **options)
    origin = base if with_base else None
    found = ours("nuslerp", models, origin, weight=[0.2, 1.5], flatten=flatten, row_wise=row_wise)
    # Vectors of two elements are nearly opposed now and then, and theirs computes the angle in float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@shapes
def test_multislerp_around_a_base(shape: tuple[int, ...]):
    base, *models = tensors(3, shape)
    weight = [0.2, 1.5, 0.7]
    close(ours("multislerp", models, base, weight=weight), theirs("multislerp", [base, *models], 0, weight=weight))


@shapes
@pytest.mark.parametrize("scale", [None, 1.0, 0.3, -2.0])
def test_passthrough(scale: float | None, shape: tuple[int, ...]):
    (model,) = tensors(0, shape)
    close(ours("passthrough", [model], scale=scale), theirs("passthrough", [model], scale=[scale]))


@shapes
@pytest.mark.parametrize("options", [{}, {"r": 0.5, "alpha": 3.0}, {"r": 2.0, "alpha": 0.4, "epsilon": 0.5}], ids=str)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ramplus_tl(count: int, options: dict[str, Any], shape: tuple[int, ...]):
    base, *models = tensors(count, shape)
    generator = torch.Generator().manual_seed(0)
    models = [torch.where(torch.rand(shape, generator=generator) > 0.4, model, base) for model in models]
    close(ours("ramplus_tl", models, base, **options), theirs("ramplus_tl", [base, *models], 0, **options))


@shapes
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.2, 1.5, 0.7]])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(normalize: bool, weight: list[float], shape: tuple[int, ...]):
    models = tensors(2, shape)
    expected = theirs("multislerp", models, weight=weight, normalize_weights=normalize)
    close(ours("multislerp", models, weight=weight, normalize=normalize), expected)


@shapes
@pytest.mark.parametrize("count", [2, 3, 5])
def test_karcher(count: int, shape: tuple[int, ...]):
    models = tensors(count - 1, shape)
    expected = theirs("karcher", models, max_iter=30, tol=1e-6)
    close(ours("karcher", models, max_iter=30, tol=1e-6), expected)


@shapes
@pytest.mark.parametrize("t", [1e-4, 0.3, 2.0])
def test_nearswap(t: float, shape: tuple[int, ...]):
    base, model = tensors(1, shape)
    close(ours("nearswap", [model], base, t=t), theirs("nearswap", [base, model], base_index=0, t=t))


@shapes
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_sce(count: int, share: float, shape: tuple[int, ...]):
    base, *models = tensors(count, shape)
    expected = theirs("sce", [base, *models], base_index=0, select_topk=share)
    close(ours("sce", models, base, select_topk=share), expected)


@shapes
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ram(count: int, epsilon: float, shape: tuple[int, ...]):
    base, *models = tensors(count, shape)
    close(ours("ram", models, base, epsilon=epsilon), theirs("ram", [base, *models], base_index=0, epsilon=epsilon))


@pytest.mark.parametrize("shape", [(200,), (6, 7), (40, 30), (2, 3, 30)], ids=str)
def test_arcee_fusion(shape: tuple[int, ...]):
    base, model = tensors(1, shape)
    found = ours("arcee_fusion", [model], base)
    close(found, theirs("arcee_fusion", [base, model], base_index=0))
    assert 0 < (found != base).float().mean() < 0.5


# Where we depart


def test_a_tensor_of_zeros_is_met_on_the_line():
    a = torch.tensor([3.0, 4.0])
    assert torch.equal(ours("slerp", [0 * a, a]), a / 2)
    close(theirs("slerp", [0 * a, a], base_index=0, t=0.5), a * math.sin(math.pi / 4))


def test_short_tensors_have_a_direction_too():
    models = [torch.tensor([1e-9, 0.0]), torch.tensor([0.0, 1e-9])]
    for method in ("slerp", "nuslerp", "karcher"):
        close(1e9 * ours(method, models), torch.tensor([0.5**0.5, 0.5**0.5]))
    assert theirs("karcher", models).norm() == 0


def test_weights_that_sum_to_zero_are_refused():
    models = tensors(1, (5,))
    close(theirs("nuslerp", models, weight=[1.0, -1.0]), theirs("nuslerp", models, weight=[1.0, 1.0]))
    with pytest.raises(ws.Error, match="sum to zero"):
        ours("nuslerp", models, weight=[1.0, -1.0])


def test_a_layer_that_is_zero_in_all_models_is_no_reason_to_stop():
    zeros = [torch.zeros(4)] * 3
    assert torch.equal(ours("multislerp", zeros), zeros[0])
    with pytest.raises(ValueError, match="zero"):
        theirs("multislerp", zeros, weight=[1.0, 1.0, 1.0])


def test_sce_tells_models_apart_by_small_changes():
    base, *models = tensors(2, (50,), 1e-4)
    base, models = 0 * base, [models[0] - base, 3 * (models[1] - base)]
    scaled = [1e4 * model for model in models]
    close(1e4 * ours("sce", models, base), theirs("sce", [base, *scaled], base_index=0))
    assert not torch.allclose(1e4 * theirs("sce", [base, *models], base_index=0), 1e4 * ours("sce", models, base))
