"""Sparse soups: the mean, its zeros, and the comparison of masks before anything is averaged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge import mean, sparse_soup
from weightsmith.weights import Weights


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parent() -> Weights:
    whole = {"0.weight": normal(6, 5, seed=0), "0.bias": normal(6, seed=1), "2.weight": normal(3, 6, seed=2)}
    return ws.prune.magnitude(whole, sparsity=0.6)


def retrained(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Children of one pruned parent, each moved where it is not zero; biases are not pruned."""
    whole = parent()
    return [
        {
            name: torch.where(value != 0, value + 0.1 * normal(*value.shape, seed=10 * i + j), 0).to(dtype)
            for j, (name, value) in enumerate(whole.items())
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_mean_with_exactly_the_mask(count: int):
    models, mask = retrained(count), ws.prune.mask_of(parent())
    soup = sparse_soup(models)
    for name in models[0]:
        expected = sum(model[name].double() for model in models) / count
        torch.testing.assert_close(soup[name], expected.float())
        if name in mask:
            assert torch.equal(soup[name] != 0, mask[name])
    assert ws.prune.sparsity_of(soup) == ws.prune.sparsity_of(parent())


def test_the_mean_of_models_that_were_pruned_each_by_itself_is_less_sparse():
    """What the check is for."""
    models = [ws.prune.magnitude({"0.weight": normal(8, 8, seed=i)}, sparsity=0.5) for i in range(3)]
    assert ws.prune.sparsity_of(mean(models)) < 0.3
    with pytest.raises(Error, match=r"not zero in the same places: 0\.weight \(\d+ of 64 elements\); retrain"):
        sparse_soup(models)


def test_the_error_names_every_tensor_and_how_much_of_it():
    one, two, three = retrained(3)
    two["0.weight"] = two["0.weight"].clone()
    kept = two["0.weight"].flatten().nonzero()[:3, 0]
    two["0.weight"].view(-1)[kept] = 0
    three["2.weight"] = three["2.weight"].clone()
    three["2.weight"].view(-1)[three["2.weight"].flatten().eq(0).nonzero()[0]] = 1.0
    with pytest.raises(Error, match=r"0\.weight \(3 of 30 elements\), 2\.weight \(1 of 18 elements\); retrain"):
        sparse_soup([one, two, three])


@pytest.mark.usefixtures("small_pieces")
def test_differences_are_counted_over_all_pieces():
    one = {"w.weight": torch.ones(10, 20)}
    two = {"w.weight": torch.ones(10, 20)}
    two["w.weight"][::3, 3] = 0
    with pytest.raises(Error, match=r"w\.weight \(4 of 200 elements\)"):
        sparse_soup([one, two])


def test_union_and_intersection():
    one = {"w": torch.tensor([[1.0, 0.0, 3.0, 0.0]])}
    two = {"w": torch.tensor([[3.0, 2.0, 0.0, 0.0]])}
    assert sparse_soup([one, two], mask="union")["w"].tolist() == [[2, 1, 1.5, 0]]
    assert sparse_soup([one, two], mask="intersection")["w"].tolist() == [[2, 0, 0, 0]]
    for mask in ("same", "union", "intersection"):
        assert sparse_soup([one, one], mask=mask)["w"].tolist() == [[1, 0, 3, 0]]


def test_a_weight_that_became_zero_is_no_matter_where_the_mask_is_given():
    models, mask = retrained(2), ws.prune.mask_of(parent())
    place = int(models[0]["0.weight"].flatten().nonzero()[0])
    models[0]["0.weight"].view(-1)[place] = 0
    with pytest.raises(Error, match="give it with mask="):
        sparse_soup(models)
    soup = sparse_soup(models, mask=mask)
    assert torch.equal(soup["0.weight"] != 0, mask["0.weight"])
    assert float(soup["0.weight"].view(-1)[place]) == pytest.approx(float(models[1]["0.weight"].view(-1)[place]) / 2)


def test_a_model_that_left_the_mask_is_refused():
    models, mask = retrained(2), ws.prune.mask_of(parent())
    models[1]["2.weight"] = models[1]["2.weight"] + 1.0
    outside = int((~mask["2.weight"]).sum())
    with pytest.raises(Error, match=rf"not zero where the mask is: 2\.weight \({outside} of 18 elements\); apply_mask"):
        sparse_soup(models, mask=mask)
    fixed = [ws.prune.apply_mask(model, mask) for model in models]
    assert torch.equal(sparse_soup(fixed, mask=mask)["2.weight"] != 0, mask["2.weight"])


def test_biases_are_not_compared_unless_they_are_named():
    models = retrained(2)
    models[1]["0.bias"] = torch.zeros(6)
    torch.testing.assert_close(sparse_soup(models)["0.bias"], models[0]["0.bias"] / 2)
    with pytest.raises(Error, match=r"0\.bias \(6 of 6 elements\)"):
        sparse_soup(models, pattern="*")
    assert sparse_soup(models, pattern="*", mask="intersection")["0.bias"].tolist() == [0] * 6


def test_weights_of_the_models():
    models = retrained(2)
    soup = sparse_soup(models, weight=[3, 1])
    torch.testing.assert_close(soup["0.weight"], 0.75 * models[0]["0.weight"] + 0.25 * models[1]["0.weight"])
    soup = sparse_soup(models, weight={"0.*": [1, 0], "*": [0, 1]})
    assert torch.equal(soup["0.weight"], models[0]["0.weight"])
    assert torch.equal(soup["2.weight"], models[1]["2.weight"])


def test_a_greedy_soup_of_children_is_as_sparse():
    models = retrained(3)
    soup = ws.merge.greedy_soup(models, lambda weights: 1.0)
    assert ws.prune.sparsity_of(soup) == ws.prune.sparsity_of(parent())


def test_zeros_of_either_sign_and_what_is_not_finite():
    one = {"w": torch.tensor([[0.0, 1.0, float("nan"), 2.0]])}
    two = {"w": torch.tensor([[-0.0, 1.0, 1.0, float("inf")]])}
    with pytest.raises(Error, match="because model 1 holds no number there"):
        sparse_soup([one, two])["w"]
    soup = sparse_soup([one, two], nonfinite="allow")["w"][0]
    assert soup[0].item() == 0
    assert soup[2].isnan()
    assert soup[3].isinf()


def test_bfloat16_and_a_file(tmp_path: Path):
    models = retrained(3, torch.bfloat16)
    for i, model in enumerate(models):
        Weights.of(model).save(tmp_path / f"{i}.safetensors")
    soup = sparse_soup([tmp_path / f"{i}.safetensors" for i in range(3)])
    soup.save(tmp_path / "soup.safetensors")
    written = ws.open(tmp_path / "soup.safetensors")
    assert 'merge.sparse_soup(mask="same"' in str(written.lineage)
    mask = ws.prune.mask_of(parent())
    for name in written:
        expected = (sum(model[name].float() for model in models) / 3).bfloat16()
        torch.testing.assert_close(written[name], expected, rtol=2**-8, atol=0)
        if name in mask:
            assert torch.equal(written[name] != 0, mask[name])


def test_empty_tensors_agree():
    assert sparse_soup([{"w": torch.zeros(0, 3)}, {"w": torch.ones(0, 3)}])["w"].shape == (0, 3)


def test_refusals():
    models = retrained(2)
    with pytest.raises(Error, match="sparse_soup needs at least 1 model, got 0"):
        sparse_soup([])
    with pytest.raises(Error, match="mask is one of same, union, intersection or a boolean mask; got 'both'"):
        sparse_soup(models, mask="both")  # type: ignore[arg-type]
    with pytest.raises(Error, match="model 1 and model 2 differ in shape"):
        sparse_soup([models[0], models[1] | {"0.bias": torch.ones(2)}])
    with pytest.raises(Error, match=r"the mask of 0\.weight fits no tensor"):
        sparse_soup(models, mask={"0.weight": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(Error, match="a mask is boolean"):
        sparse_soup(models, mask={"0.weight": torch.ones(6, 5)})
    with pytest.raises(Error, match="no tensor fits pattern='nothing'"):
        sparse_soup(models, pattern="nothing")
    with pytest.raises(Error, match="sum to zero"):
        sparse_soup(models, weight=[1, -1])
