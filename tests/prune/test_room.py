"""Pruning whole checkpoints: score, allocate, select, act."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.prune import apply_mask, lift, mask_of, prunable, sparsity_of
from weightsmith.weights import Spec, Weights


class Unread:
    """A node with a spec and no values."""

    grain = 1

    def __init__(self, *shape: int):
        self.spec = Spec(shape, torch.float32)

    def read(self, start: int, stop: int, scratch: object) -> Tensor:
        raise AssertionError("was read")

    def inputs(self) -> tuple[()]:
        return ()

    def identity(self) -> object:
        return "unread"


def unread(**shapes: tuple[int, ...]) -> Weights:
    return Weights({name: Unread(*shape) for name, shape in shapes.items()})


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeros(weights: Any) -> dict[str, int]:
    return {name: int((weights[name] == 0).sum()) for name in weights}


# Which tensors


def test_matrices_and_convolutions_are_pruned_unless_they_are_embeddings_or_the_head():
    names = {
        "model.embed_tokens.weight": (8, 4),
        "transformer.wte.weight": (8, 4),
        "transformer.wpe.weight": (8, 4),
        "tok_embeddings.weight": (8, 4),
        "shared.weight": (8, 4),
        "layers.0.mlp.weight": (4, 4),
        "layers.0.norm.weight": (4,),
        "layers.0.conv.weight": (2, 3, 3, 3),
        "layers.0.attention.output.weight": (4, 4),
        "shared_expert.weight": (4, 4),
        "scale": (),
        "output.weight": (8, 4),
        "lm_head.weight": (8, 4),
    }
    weights = Weights.of(
        {name: torch.zeros(shape) for name, shape in names.items()} | {"n.count": torch.ones(2, 2).int()}
    )
    assert prunable(weights) == [
        "layers.0.mlp.weight",
        "layers.0.conv.weight",
        "layers.0.attention.output.weight",
        "shared_expert.weight",
    ]
    assert [
        n for n, count in zeros(ws.prune.magnitude({n: normal(*s) for n, s in names.items()})).items() if count
    ] == (prunable(weights))


def test_a_pattern_says_which():
    weights = {"a.weight": normal(10), "b.weight": normal(2, 5), "n": torch.ones(4).int()}
    assert zeros(ws.prune.magnitude(weights, 0.5, pattern="a.*")) == {"a.weight": 5, "b.weight": 0, "n": 0}
    assert zeros(ws.prune.magnitude(weights, 0.5, pattern=["a.*", "re:^b"])) == {"a.weight": 5, "b.weight": 5, "n": 0}
    assert zeros(ws.prune.magnitude(weights, 0.5, pattern=lambda name: name == "b.weight"))["a.weight"] == 0


def test_no_tensor_to_prune():
    with pytest.raises(Error, match="no matrix to prune among bias; say which with pattern="):
        ws.prune.magnitude({"bias": torch.ones(3)})
    with pytest.raises(Error, match=r"no float tensor fits pattern='c\*'; there are a, n"):
        ws.prune.magnitude({"a": torch.ones(2, 2), "n": torch.ones(2, 2).int()}, pattern="c*")
    with pytest.raises(Error, match="no float tensor fits pattern='n'"):
        ws.prune.magnitude({"a": torch.ones(2, 2), "n": torch.ones(2, 2).int()}, pattern="n")


def test_tied_tensors_are_pruned_once_under_either_name():
    shared = normal(4, 5)
    weights = Weights.of({"first.weight": shared, "second.weight": shared})
    assert prunable(weights) == ["first.weight"]
    for pattern in (None, "*", "first*", "second*"):
        pruned = ws.prune.magnitude(weights, 0.5, pattern=pattern)
        assert pruned.ties == {"second.weight": "first.weight"}
        assert zeros(pruned) == {"first.weight": 10, "second.weight": 10}


# How much


@pytest.mark.parametrize("size", [1, 2, 7, 10, 33])
def test_the_count_is_exact_for_any_share(size: int):
    for sparsity in (0, 0.1, 0.25, 1 / 3, 0.5, 0.77, 1):
        found = ws.prune.magnitude({"w": normal(1, size)}, sparsity)["w"]
        assert int((found == 0).sum()) == round(sparsity * size)


def test_equal_weights_go_from_the_last():
    found = ws.prune.magnitude({"w": torch.tensor([[1.0, -1.0, 1.0, -1.0, 1.0]])}, 0.4)["w"]
    assert found.tolist() == [[1, -1, 1, 0, 0]]


def test_sparsity_by_tensor():
    weights = {f"layers.{i}.w": normal(10, 10, seed=i) for i in range(3)}
    assert list(zeros(ws.prune.magnitude(weights, ws.by_depth([0.2, 0.6]))).values()) == [20, 40, 60]
    assert list(zeros(ws.prune.magnitude(weights, {"layers.1.*": 0.9, "*": 0.1})).values()) == [10, 90, 10]
    found = ws.prune.magnitude({"layers.0.w": normal(4, 8), "layers.1.w": normal(4, 8)}, {"*.0.*": "2:4", "*": 0.25})
    assert list(zeros(found).values()) == [16, 8]


def test_one_budget_for_all():
    weights = {"small": 0.01 * normal(10, 10), "large": normal(10, 10, seed=1)}
    found = ws.prune.magnitude(weights, 0.5, scope="global")
    assert sum(zeros(found).values()) == 100
    assert zeros(found)["small"] > 95
    joined = torch.cat([weight.flatten() for weight in weights.values()]).abs()
    expected = joined >= joined.sort(descending=True).values[99]
    assert torch.equal(torch.cat([(found[name] != 0).flatten() for name in found]), expected)


def test_one_budget_among_equals_goes_to_the_first_tensor():
    weights = {"a": torch.ones(2, 4), "b": torch.ones(2, 4)}
    assert zeros(ws.prune.magnitude(weights, 0.25, scope="global")) == {"a": 0, "b": 4}


@pytest.mark.parametrize(("pattern", "keep", "group"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("0:2", 0, 2)])
def test_n_of_m(pattern: str, keep: int, group: int):
    weight = normal(6, 2, 4, 4)
    found = ws.prune.magnitude({"conv": weight}, pattern)["conv"]
    runs, given = found.reshape(-1, group), weight.reshape(-1, group)
    assert ((runs != 0).sum(1) == keep).all()
    for run, before in zip(runs, given, strict=True):
        assert sorted(run[run != 0].abs().tolist()) == sorted(before.abs().sort().values[group - keep :].tolist())


@pytest.mark.usefixtures("small_pieces")
def test_n_of_m_in_pieces_is_that_of_the_whole(tmp_path: Path):
    weights = {"w": normal(40, 12).bfloat16()}
    pruned = ws.prune.magnitude(weights, "2:4")
    pruned.save(tmp_path / "w.safetensors", threads=3)
    assert torch.equal(ws.open(tmp_path / "w.safetensors")["w"], pruned["w"])
    assert ((pruned["w"].reshape(-1, 4) != 0).sum(1) == 2).all()


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (1.5, {}, "sparsity of w must lie between 0 and 1, got 1.5"),
        (-0.1, {}, "sparsity of w must lie between 0 and 1, got -0.1"),
        (float("nan"), {}, "must lie between 0 and 1, got nan"),
        (None, {}, "must lie between 0 and 1, got None"),
        ("half", {}, "sparsity of w: 'half' is no pattern"),
        ("2:4", {}, r"w: its 6 inputs a row cannot be cut into groups of 4"),
        ({"v": 0.5}, {}, "sparsity says nothing for the tensor w"),
        ("3:6", {"scope": "global"}, "sparsity must be one number"),
        ({"w": 0.5, "*": 0.25}, {"scope": "global"}, "sparsity must be one number"),
        (0.5, {"scope": "globl"}, "scope must be one of tensor, row, global; got 'globl'"),
        (0.5, {"action": "drop"}, "action must be 'zero' or 'mask', got 'drop'"),
        (0.5, {"power": 2}, "magnitude has no option 'power'; it has none"),
    ],
)
def test_a_bad_option_is_found_before_anything_is_read(sparsity: Any, options: dict, message: str):
    with pytest.raises(Error, match=message):
        ws.prune.magnitude(unread(w=(4, 6), x=(4, 6)), sparsity, **options)


def test_a_single_number_is_no_row_of_inputs():
    assert ws.prune.magnitude({"s": torch.tensor(2.0)}, 1.0, pattern="s")["s"] == 0
    with pytest.raises(Error, match="s: its 1 inputs a row cannot be cut into groups of 4"):
        ws.prune.magnitude({"s": torch.tensor(2.0)}, "2:4", pattern="s")


def test_empty_tensors():
    weights = {"none": torch.zeros(0, 4), "wide": torch.zeros(3, 0), "w": normal(2, 4)}
    for sparsity in (0.5, "2:4"):
        found = ws.prune.magnitude(weights, sparsity)
        assert {name: tuple(found[name].shape) for name in found} == {"none": (0, 4), "wide": (3, 0), "w": (2, 4)}
        assert zeros(found)["w"] == 4
    assert zeros(ws.prune.magnitude(weights, 0.5, scope="global"))["w"] == 4


# What is done with it


def test_the_rest_is_untouched_bit_for_bit():
    weights = {"w": normal(8, 8).bfloat16(), "bias": normal(8), "n": torch.tensor(3)}
    found = ws.prune.magnitude(weights, 0.5)
    assert torch.equal(found["bias"], weights["bias"])
    assert found["n"] == 3
    assert found["w"].dtype == torch.bfloat16
    alive = found["w"] != 0
    assert torch.equal(found["w"][alive], weights["w"][alive])


def test_masks_are_boolean_and_say_what_is_kept():
    weights = {"w": normal(6, 5), "bias": normal(5)}
    masks = ws.prune.magnitude(weights, 0.5, action="mask")
    assert list(masks) == ["w"]
    assert masks.spec("w") == Spec((6, 5), torch.bool)
    pruned = ws.prune.magnitude(weights, 0.5)
    assert torch.equal(masks["w"], pruned["w"] != 0)
    again = apply_mask(weights, masks)
    assert all(torch.equal(again[name], pruned[name]) for name in pruned)


def test_a_mask_can_be_saved_and_read_back(tmp_path: Path):
    weights = {"w": normal(6, 5)}
    ws.prune.magnitude(weights, 0.5, action="mask").save(tmp_path / "mask.safetensors")
    pruned = apply_mask(weights, ws.open(tmp_path / "mask.safetensors"))
    assert torch.equal(pruned["w"], ws.prune.magnitude(weights, 0.5)["w"])


def test_a_mask_zeroes_what_is_not_finite():
    found = apply_mask({"w": torch.tensor([torch.nan, torch.inf, 1.0])}, Weights.of({"w": torch.tensor([False] * 3)}))
    assert found["w"].tolist() == [0, 0, 0]


def test_masks_that_do_not_fit():
    weights = {"w": torch.ones(2, 2)}
    with pytest.raises(Error, match=r"the mask of v fits no tensor of that name and shape \[2\]"):
        apply_mask(weights, Weights.of({"v": torch.ones(2).bool()}))
    with pytest.raises(Error, match=r"the mask of w fits no tensor of that name and shape \[4\]"):
        apply_mask(weights, Weights.of({"w": torch.ones(4).bool()}))
    with pytest.raises(Error, match=r"the mask of w is float32\[2, 2\]; a mask is boolean"):
        apply_mask(weights, Weights.of({"w": torch.ones(2, 2)}))


def test_a_mask_under_an_alias_counts_for_the_tied_tensor():
    shared = torch.ones(3)
    weights = Weights.of({"a": shared, "b": shared})
    mask = torch.tensor([True, False, True])
    for masks in ({"a": mask}, {"b": mask}, {"a": mask, "b": mask}):
        found = apply_mask(weights, Weights.of(masks))
        assert found["a"].tolist() == found["b"].tolist() == [1, 0, 1]
    with pytest.raises(Error, match="b and a are one tensor, but have two masks"):
        apply_mask(weights, Weights.of({"a": mask, "b": ~mask}))


def test_the_mask_that_weights_carry():
    weights = {"w": torch.tensor([[0.0, 1.0, -0.0, torch.nan]]), "bias": torch.zeros(2)}
    assert list(mask_of(weights)) == ["w"]
    assert mask_of(weights)["w"].tolist() == [[False, True, False, True]]
    assert mask_of(weights, "bias")["bias"].tolist() == [False, False]
    assert mask_of(weights).spec("w").dtype == torch.bool
    assert sparsity_of(weights) == 0.5
    assert sparsity_of(weights, "*") == pytest.approx(4 / 6)
    assert sparsity_of(ws.prune.magnitude({"w": normal(10, 10)}, 0.37)) == pytest.approx(0.37)


def test_it_composes_with_other_steps(tmp_path: Path):
    """Merge, then prune, in one pass."""
    one, two = {"w": normal(20, 20)}, {"w": normal(20, 20, seed=1)}
    pruned = ws.prune.magnitude(ws.merge.mean([one, two]), 0.5)
    pruned.save(tmp_path / "p.safetensors")
    expected = ws.prune.magnitude({"w": (one["w"] + two["w"]) / 2}, 0.5)["w"]
    torch.testing.assert_close(ws.open(tmp_path / "p.safetensors")["w"], expected)
    assert "prune.magnitude(sparsity=0.5" in str(ws.open(tmp_path / "p.safetensors").lineage)


def test_modules_and_files(tmp_path: Path):
    module = nn.Linear(6, 4)
    before = module.weight.detach().clone()
    pruned = ws.prune.magnitude(module, 0.5)
    assert zeros(pruned)["weight"] == 12
    assert torch.equal(module.weight, before)
    ws.open(module).save(tmp_path / "m.safetensors")
    assert torch.equal(ws.prune.magnitude(tmp_path / "m.safetensors", 0.5)["weight"], pruned["weight"])


def test_a_score_of_ones_own():
    @card(paper="p", unit="row")
    def by_row(weight: Tensor, *, power: float = 1.0) -> Tensor:
        return (weight.float().abs() ** power) / weight.float().abs().amax(1, keepdim=True) ** power

    prune = lift(by_row)
    weight = torch.tensor([[1.0, 2.0], [100.0, 300.0]])
    assert prune({"w": weight}, 0.5)["w"].tolist() == [[0, 2], [0, 300]]
    with pytest.raises(Error, match=r"by_row has no option 'powr' \(did you mean 'power'\?\)"):
        prune({"w": weight}, 0.5, powr=2)
    assert prune(weight, power=2)[0, 0] == 0.25  # type: ignore[call-arg]


def test_what_a_user_sees():
    parameters = inspect.signature(ws.prune.magnitude).parameters
    assert list(parameters) == ["weights", "sparsity", "scope", "structure", "pattern", "action"]
    assert ws.prune.magnitude.__module__ == "weightsmith.prune"
    assert "absolute value" in (ws.prune.magnitude.__doc__ or "")


# Rows, columns, blocks; scores that are there


def test_each_row_loses_its_share():
    weight = normal(6, 9)
    kept = ws.prune.magnitude({"w": weight}, 1 / 3, scope="row", action="mask", pattern="*")["w"]
    for row, mask in zip(weight.abs(), kept, strict=True):
        assert mask.sum() == 6
        assert row[mask].min() >= row[~mask].max()


@pytest.mark.parametrize(
    ("structure", "shape"), [("row", (1, 8)), ("column", (6, 1)), ("3x2", (3, 2)), ("6x8", (6, 8))]
)
def test_what_goes_as_one_goes_by_its_mean_score(structure: str, shape: tuple[int, int]):
    weight = normal(6, 8)
    height, width = shape
    kept = ws.prune.magnitude({"w": weight}, 0.5, structure=structure, action="mask", pattern="*")["w"]
    blocks = {}
    for i in range(0, 6, height):
        for j in range(0, 8, width):
            mask = kept[i : i + height, j : j + width]
            assert mask.all() or not mask.any()
            blocks[i, j] = (float(weight[i : i + height, j : j + width].abs().mean()), bool(mask.all()))
    count = len(blocks)
    assert sum(keep for _, keep in blocks.values()) == count - round(count / 2)
    lost = [score for score, keep in blocks.values() if not keep]
    assert all(score >= max(lost, default=0) for score, keep in blocks.values() if keep)


def test_blocks_of_a_convolution_are_of_its_flattened_rows():
    weight = normal(4, 2, 2, 1)
    kept = ws.prune.magnitude({"w": weight}, 0.5, structure="2x2", action="mask")["w"].reshape(4, 4)
    assert {tuple(kept[i : i + 2, j : j + 2].unique().tolist()) for i in (0, 2) for j in (0, 2)} == {(True,), (False,)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "4x4"}, "its 6 rows of 8 inputs cannot be cut into blocks of 4x4"),
        ({"structure": "rows"}, "structure is element, row, column or a block"),
        ({"structure": "2x2", "sparsity": "2:4"}, "an N:M pattern is of elements"),
    ],
)
def test_a_structure_that_cannot_be_had(options: dict[str, Any], words: str):
    with pytest.raises(Error, match=words):
        ws.prune.magnitude(unread(w=(6, 8)), **options)


@pytest.mark.parametrize("sparsity", [0, 0.0, 1, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "row"}, {"scope": "global"}, {"structure": "row"}, {"scope": "row", "structure": "2x2"}],
    ids=str,
)
def test_nothing_and_everything(sparsity: float, options: dict[str, Any]):
    weights = {"w": torch.tensor([[1.0, 0.0, torch.nan, 2.0]] * 4), "v": normal(2, 2, 2)}
    masks = ws.prune.magnitude(weights, sparsity, action="mask", **options)
    assert all(bool((masks[name] == (sparsity == 0)).all()) for name in weights)


def test_each_row_of_a_convolution_each_row_of_blocks_and_a_single_axis():
    weight = normal(4, 2, 3, 2)
    kept = ws.prune.magnitude({"w": weight}, 0.25, scope="row", action="mask")["w"]
    assert kept.flatten(1).sum(1).tolist() == [9] * 4
    flat, mask = weight.abs().flatten(1), kept.flatten(1)
    assert all(row[here].min() > row[~here].max() for row, here in zip(flat, mask, strict=True))
    blocks = ws.prune.magnitude({"w": weight}, 0.5, scope="row", structure="2x3", action="mask")["w"].flatten(1)
    means = weight.abs().flatten(1).reshape(2, 2, 4, 3).mean((1, 3))
    expected = means >= means.sort(1, descending=True).values[:, 1:2]
    assert torch.equal(blocks, expected.repeat_interleave(2, 0).repeat_interleave(3, 1))
    bias = torch.tensor([3.0, -1.0, 2.0, 0.5])
    assert ws.prune.magnitude({"b": bias}, 0.5, scope="row", pattern="*")["b"].tolist() == [3, 0, 2, 0]


def test_rows_that_go_whole_cannot_lose_a_share_each():
    for structure in ("row", "2x8"):
        with pytest.raises(Error, match=f"w: structure='{structure}' takes whole rows.*write scope='tensor'"):
            ws.prune.magnitude(unread(w=(6, 8)), 0.5, scope="row", structure=structure)
    with pytest.raises(Error, match="write scope='tensor'"):  # the scope it has by itself
        ws.prune.wanda(unread(w=(6, 8)), 0.5, structure={"w": "row"}, stats=unread(w=(8,)))
    assert zeros(ws.prune.magnitude({"w": normal(4, 1)}, 1.0, scope="row"))["w"] == 4


def test_blocks_of_all_tensors_share_a_budget_of_blocks():
    """Whatever their size: three of the four blocks, of 8, 8, 2 and 2 weights."""
    weights = {"a": torch.tensor([[1.0] * 8, [4.0] * 8]), "b": torch.tensor([[2.0, 2.0], [3.0, 3.0]])}
    pruned = ws.prune.magnitude(weights, 0.75, scope="global", structure="row")
    assert {name: pruned[name][:, 0].tolist() for name in weights} == {"a": [0, 4], "b": [0, 0]}


def test_called_with_a_tensor_it_is_the_score_and_takes_no_sparsity():
    weight = normal(2, 3)
    assert torch.equal(ws.prune.magnitude(weight), weight.abs())
    torch.testing.assert_close(ws.prune.wanda(weight, torch.ones(3)), weight.abs())
    with pytest.raises(TypeError):
        ws.prune.magnitude(weight, 0.7)


def test_statistics_of_a_tied_weight_under_any_name():
    shared, energy = normal(3, 4), torch.tensor([1.0, 100.0, 1.0, 100.0])
    weights = Weights.of({"a": shared, "b": shared})
    for name in ("a", "b"):
        pruned = ws.prune.wanda(weights, 0.5, stats={name: energy})
        assert torch.equal(pruned["a"], ws.prune.wanda({"a": shared}, 0.5, stats={"a": energy})["a"])
        assert pruned.ties == {"b": "a"}


def test_two_scores_of_one_tensor():
    shared = normal(2, 2)
    weights, score = Weights.of({"a": shared, "b": shared}), normal(2, 2, seed=1)
    assert zeros(ws.prune.by_score(weights, {"b": score}, 0.5)) == {"a": 2, "b": 2}
    assert zeros(ws.prune.by_score(weights, {"a": score, "b": score}, 0.5)) == {"a": 2, "b": 2}
    with pytest.raises(Error, match="b and a are one tensor, but have two scores"):
        ws.prune.by_score(weights, {"a": score, "b": -score}, 0.5)
    with pytest.raises(Error, match="at least 1 tensor"):
        ws.prune.by_score(weights, {})


def test_what_was_done_is_told():
    line = str(ws.prune.by_score({"w": normal(4, 4)}, {"w": normal(4, 4)}, 0.5, structure="2x2").lineage)
    assert 'structure="2x2"' in line


def test_scores_that_are_there_are_used_as_they_are():
    weights = {"a": normal(3, 4), "b": normal(2, 2), "c": normal(4)}
    scores = {"a": normal(3, 4, seed=1), "b": normal(2, 2, seed=2)}
    pruned = ws.prune.by_score(weights, scores, 0.5, scope="global")
    line = torch.cat([s.flatten() for s in scores.values()])
    threshold = line.sort(descending=True).values[7]
    for name, score in scores.items():
        assert torch.equal(pruned[name], torch.where(score >= threshold, weights[name], 0.0))
    assert torch.equal(pruned["c"], weights["c"])
    with pytest.raises(Error, match="the score of z fits no tensor"):
        ws.prune.by_score(weights, {"z": normal(3)})
