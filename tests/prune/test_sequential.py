"""Block by block: with nothing passed on it is the plain method, and with it each block is pruned for what it gets."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.prune import sequential


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))


def data(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(9, 8, generator=generator) @ torch.randn(8, 8, generator=generator) for _ in range(3)]


def same(found: Any, expected: Any) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def llama(folder: Path) -> tuple[Any, Any, list[dict[str, Tensor]]]:
    transformers = pytest.importorskip("transformers", reason="builds the model of a config")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=1,
        num_hidden_layers=3, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    files = {"config.json": json.dumps(config.to_dict() | {"architectures": ["LlamaForCausalLM"]}).encode()}
    ws.open(model).with_files(files).save(folder / "model")
    generator = torch.Generator().manual_seed(1)
    batches = [{"input_ids": torch.randint(50, (1, 9), generator=generator)} for _ in range(4)]
    return ws.open(folder / "model"), model, batches


# The same as the plain method


@pytest.mark.parametrize("sparsity", [0.5, "2:4", {"0.*": 0.25, "*": 0.75}])
def test_dense_inputs_give_wanda(sparsity: Any) -> None:
    model, batches = net(), data()
    grams = ws.stats.gram(model, batches, form="diagonal")
    same(sequential(model, batches, sparsity, propagate="dense"), ws.prune.wanda(model, sparsity, stats=grams))


def test_dense_inputs_give_wanda_of_a_language_model(tmp_path: Path) -> None:
    weights, model, batches = llama(tmp_path)
    grams = ws.stats.gram(model, batches, form="diagonal")
    expected = ws.prune.wanda(weights, 0.5, stats=grams, scope="tensor")
    found = sequential(weights, batches, 0.5, scope="tensor", propagate="dense")
    same(found, expected)
    assert found.ties == weights.ties
    assert "config.json" in found.files
    assert "prune.sequential" in str(found.lineage)
    assert "wanda" in str(found.lineage)


def test_scores_without_data_structures_and_kernels() -> None:
    model, batches = net(), data()
    same(sequential(model, batches, 0.5, score="magnitude"), ws.prune.magnitude(model, 0.5))
    same(
        sequential(model, batches, 0.5, score="magnitude", scope="row", structure={"4.*": "element", "*": "2x2"}),
        ws.prune.magnitude(model, 0.5, scope="row", structure={"4.*": "element", "*": "2x2"}),
    )

    def loud(weight: Tensor, gram: Tensor, *, power: float = 0.5) -> Tensor:
        return weight.abs() * gram.diagonal() ** power  # of full matrices: a diagonal is refused by torch

    found = sequential(model, batches, 0.5, score=loud, scope="row", propagate="dense")
    same(found, ws.prune.wanda(model, 0.5, stats=ws.stats.gram(model, batches)))
    assert (sequential(model, batches, 0.5, score=loud, power=0.0)["2.weight"] != found["2.weight"]).any()
    same(sequential(model, batches, 0.5, score=ws.prune.wanda.kernel, scope="row"), sequential(model, batches, 0.5))


def test_only_diagonals_are_gathered_where_they_will_do() -> None:
    seen: set[int] = set()

    def score(weight: Tensor, gram: Tensor) -> Tensor:
        if len(weight) > 2:  # smaller ones are for trying
            seen.add(gram.dim())
        return ws.prune.wanda.kernel(weight, gram)

    sequential(net(), data(), 0.5, score=score)
    assert seen == {1}
    sequential(net(), data(), 0.5, score=score, repair=refit, damping=0.1)
    assert seen == {1, 2}


# What pruned blocks give


def test_each_block_is_pruned_for_what_the_pruned_ones_give() -> None:
    """By hand: prune a layer, run the data through, prune the next."""
    model, batches = net(), data()
    found = sequential(model, batches, 0.5)
    expected = copy.deepcopy(model)
    hidden = torch.cat(batches)
    with torch.no_grad():
        for layer in expected:
            if isinstance(layer, nn.Linear):
                score = layer.weight.abs() * hidden.norm(dim=0)
                threshold = score.sort(dim=1).values[:, score.shape[1] // 2 - 1 : score.shape[1] // 2]
                layer.weight[score <= threshold] = 0
            hidden = layer(hidden)
    same(found, ws.open(expected))
    assert not torch.equal(found["4.weight"], sequential(model, batches, 0.5, propagate="dense")["4.weight"])


# Repairs


def refit(weight: Tensor, gram: Tensor, mask: Tensor | None = None, *, damping: float = 0.0) -> Tensor:
    """Least squares for each row on what its mask keeps."""
    assert mask is not None
    new = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        own = gram[kept][:, kept].double() + damping * torch.eye(int(kept.sum()))
        new[row, kept] = torch.linalg.solve(own, (gram[kept].double() @ weight[row].double())).float()
    return new


def chosen(weight: Tensor, gram: Tensor, mask: Tensor | None = None, *, sparsity: Any = None) -> Tensor:
    """Chooses for itself: the columns of least energy go."""
    assert mask is None
    keep = gram.diagonal().argsort(descending=True)[: round((1 - sparsity) * weight.shape[1])]
    return torch.zeros_like(weight).index_copy(1, keep, weight[:, keep])


def test_a_repair_makes_up_for_the_blocks_before() -> None:
    model, batches = net(), data()
    found = sequential(model, batches, 0.5, repair=refit, damping=1e-4)
    hidden, dense = torch.cat(batches), copy.deepcopy(model)
    expected = copy.deepcopy(model)
    with torch.no_grad():
        for index, layer in enumerate(expected):
            if isinstance(layer, nn.Linear):
                gram = hidden.T @ hidden
                mask = ws.prune.wanda.kernel(layer.weight, gram)
                mask = mask > mask.sort(dim=1).values[:, mask.shape[1] // 2 - 1 : mask.shape[1] // 2]
                layer.weight.copy_(refit(dense[index].weight, gram, mask, damping=1e-4))
                assert torch.equal(found[f"{index}.weight"] != 0, mask)
                torch.testing.assert_close(found[f"{index}.weight"], layer.weight.detach(), rtol=1e-3, atol=1e-3)
                layer.weight.copy_(found[f"{index}.weight"])
            hidden = layer(hidden)

    def error(weights: Any) -> float:
        weights.load_into(expected)
        with torch.no_grad():
            return float((expected(torch.cat(batches)) - model(torch.cat(batches))).square().mean())

    assert error(found) < 0.7 * error(sequential(model, batches, 0.5))


def test_a_repair_may_choose() -> None:
    model, batches = net(), data()
    found = sequential(model, batches, {"0.*": 0.25, "*": 0.5}, score=None, repair=chosen)
    assert [int((found[f"{i}.weight"] == 0).all(dim=0).sum()) for i in (0, 2, 4)] == [2, 6, 8]
    with pytest.raises(Error, match="does not choose what to remove: it needs a score="):
        sequential(model, batches, 0.5, score=None, repair=refit)
    with pytest.raises(Error, match="of scores"):
        sequential(model, batches, 0.5, score=None, repair=chosen, scope="row")


# Continuing


def test_it_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, _, batches = llama(tmp_path)
    expected = sequential(weights, batches, 0.5)
    from weightsmith.prune import _sequential

    visit, visited = _sequential._Plan.visit, []

    def stopping(self: Any, block: Any) -> Any:
        visited.append(block.index)
        if len(visited) == 2:
            raise KeyboardInterrupt
        return visit(self, block)

    monkeypatch.setattr(_sequential._Plan, "visit", stopping)
    with pytest.raises(KeyboardInterrupt):
        sequential(weights, batches, 0.5, store=tmp_path / "s")
    with pytest.raises(Error, match="settings differ"):
        sequential(weights, batches, 0.6, store=tmp_path / "s", resume=True)
    found = sequential(weights, batches, 0.5, store=tmp_path / "s", resume=True)
    same(found, expected)
    assert visited == [0, 1, 1, 2]
    found.save(tmp_path / "out")
    same(ws.open(tmp_path / "out"), expected)


# What cannot be had


class Experts(nn.Module):
    """The second expert is never asked."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts[0](x)


def test_layers_that_no_token_reached_are_pruned_by_magnitude() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(Experts(), Experts())
    batches = [torch.randn(5, 6)]
    with pytest.warns(UserWarning, match=r"no token reached [01].experts.1.weight"):
        found = sequential(model, batches, 0.5, repair=refit, damping=0.1)
    expected = ws.prune.magnitude(model, 0.5, scope="row")
    magnitude = ws.prune.magnitude(model, 0.5)
    assert torch.equal(found["0.experts.1.weight"], magnitude["0.experts.1.weight"])
    assert not torch.equal(found["0.experts.0.weight"], expected["0.experts.0.weight"])


def test_refusals() -> None:
    model, batches = net(), data()
    with pytest.raises(Error, match="did you mean 'wanda'"):
        sequential(model, batches, score="wandb")
    with pytest.raises(Error, match="there is no repair 'nothing'"):
        sequential(model, batches, repair="nothing")
    with pytest.raises(Error, match="needs score="):
        sequential(model, batches, score=None)
    with pytest.raises(Error, match='scope="global" cannot be had'):
        sequential(model, batches, scope="global")
    with pytest.raises(Error, match=r"has an option 'dampin'.*did you mean 'damping'"):
        sequential(model, batches, repair=refit, dampin=1.0)
    with pytest.raises(Error, match="must lie between 0 and 1"):
        sequential(model, batches, 1.5)
    with pytest.raises(Error, match="cannot be cut into groups of 3"):
        sequential(model, batches, "2:3")
    with pytest.raises(Error, match="no float tensor fits"):
        sequential(model, batches, pattern="nothing")
    with pytest.raises(Error, match=r"pass through all of the model|needs the whole model"):
        sequential(model, batches, score="taylor")
    model[0].weight = nn.Parameter(torch.ones(12, 8))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(Error, match="several names"):
        sequential(tied, [torch.ones(2, 4)])


def test_layers_whose_weights_lie_the_other_way_are_refused() -> None:
    pytest.importorskip("transformers", reason="has such layers")
    from transformers.pytorch_utils import Conv1D

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Conv1D(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model = nn.Sequential(Turned(), Turned())
    with pytest.raises(Error, match=r"0.first.weight is not the weight of a linear layer"):
        sequential(model, [torch.ones(2, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequential(model, [torch.ones(2, 4)], pattern="*second.weight")


def test_what_stands_in_no_block() -> None:
    class Headed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack, self.top = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.top(self.stack(x))

    model, batches = Headed(), [torch.randn(3, 4)]
    found = sequential(model, batches)
    assert torch.equal(found["top.weight"], model.top.weight)
    assert (found["stack.0.weight"] == 0).any()
    with pytest.warns(UserWarning, match=r"leaves top.weight as they are"):
        sequential(model, batches, pattern="*.weight")
    with pytest.raises(Error, match=r"none of top.weight, top.bias is"):
        sequential(model, batches, pattern="top.*")
