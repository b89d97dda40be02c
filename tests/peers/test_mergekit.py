"""The same merges as mergekit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws

mergekit = pytest.importorskip(
    "mergekit.merge_methods", reason='needs mergekit: pip install "weightsmith[peers]"', exc_type=ImportError
)

SHAPES = [(5,), (6, 7), (2, 3, 3)]


def tensors(count: int, shape: tuple[int, ...], agree: float = 0.0) -> list[Tensor]:
    """A base and fine-tunes of it."""
    generator = torch.Generator().manual_seed(len(shape))
    base, common = torch.randn(2, *shape, generator=generator)
    return [base, *(base + agree * common + torch.randn(count, *shape, generator=generator))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [[1.0, 1.0, 1.0], [0.2, 1.5, 0.7], [1.0, -0.3, 0.0]])
def test_linear(weight: list[float], normalize: bool, shape: tuple[int, ...]):
    models = tensors(2, shape)
    options: dict[str, Any] = {"weight": weight, "normalize": normalize}
    theirs = mergekit.merge_tensors(models, "linear", parameters=options)
    ours = ws.merge.mean([{"w": model} for model in models], **options)["w"]
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("agree", [0.7, 1.5, 4.0])
def test_model_stock(agree: float, count: int, shape: tuple[int, ...]):
    base, *models = tensors(count, shape, agree)
    deltas = torch.stack(models).flatten(1) - base.flatten()
    cosines = torch.nn.functional.cosine_similarity(deltas[:, None], deltas[None], dim=-1)
    mean = (cosines.sum() - count) / (count * (count - 1))
    theirs = mergekit.merge_tensors([base, *models], "model_stock", base_index=0)
    ours = ws.merge.model_stock([{"w": model} for model in models], {"w": base})["w"]
    if mean >= 0:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    else:  # ours holds the ratio in [0, 1]; theirs goes beyond the base
        torch.testing.assert_close(ours, base)
        assert (theirs - base).norm() > 0.01


NAMES = {"linear": "mean"}
"""Their name -> ours, where they differ."""

OPTIONS = {
    "lambda": "amount",
    "normalize_weights": "normalize",
    "nuslerp_flatten": "flatten",
    "nuslerp_row_wise": "row_wise",
}

LEFT_OUT = {"int8_mask"}
"""What changes no result, and what task arithmetic takes without using it."""


def test_every_method_of_theirs_is_here_with_all_its_parameters():
    from mergekit.merge_methods.registry import registered_methods

    assert len(registered_methods()) == 20
    for method in registered_methods():
        ours = ws.merge.METHODS[NAMES.get(method.spec.name, method.spec.name)]
        taken = set(inspect.signature(ours).parameters)
        wanted = {OPTIONS.get(p.name, p.name) for p in method.spec.parameters if p.name not in LEFT_OUT}
        wanted -= {"density", "rescale"} if method.spec.name == "task_arithmetic" else set()
        assert wanted <= taken, method.spec.name


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
@pytest.mark.parametrize("agree", [1.5, 4.0])
def test_model_stock_filter_wise(agree: float, shape: tuple[int, ...]):
    base, *models = tensors(3, shape, agree)
    theirs = mergekit.merge_tensors([base, *models], "model_stock", base_index=0, parameters={"filter_wise": True})
    ours = ws.merge.model_stock([{"w": model} for model in models], {"w": base}, filter_wise=True)["w"]
    cosines = [float(cosine) for cosine in mean_cosines(base, models)]
    kept = torch.tensor([cosine >= 0 for cosine in cosines])
    rows = ours.reshape(len(kept), -1), theirs.reshape(len(kept), -1)
    assert kept.any()
    torch.testing.assert_close(rows[0][kept], rows[1][kept], rtol=1e-4, atol=1e-5)


def mean_cosines(base: Tensor, models: list[Tensor]) -> Tensor:
    """By row the mean cosine between task vectors; a vector is one row."""
    deltas = torch.stack(models) - base
    rows = deltas.reshape(len(models), -1, deltas.shape[-1])
    first, second = torch.triu_indices(len(models), len(models), offset=1)
    return torch.nn.functional.cosine_similarity(rows[first], rows[second], dim=-1).mean(0)


def test_opposed_task_vectors_are_where_we_depart():
    base = torch.zeros(2)
    models = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.5])]
    theirs = mergekit.merge_tensors([base, *models], "model_stock", base_index=0)
    ours = ws.merge.model_stock([{"w": model} for model in models], {"w": base})["w"]
    assert torch.equal(ours, base)
    assert float(theirs @ torch.stack(models).mean(0)) < 0  # beyond the base, away from the models
