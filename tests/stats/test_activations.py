"""Sizes of inputs and outputs: the formulas by loops, and the root of the Gram matrix's diagonal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import Activations, Gram, activations, collect, combine, features


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


FORMULAS = {
    "norm": lambda column: math.sqrt(sum(x * x for x in column)),
    "mean": lambda column: sum(column) / len(column),
    "mean_absolute": lambda column: sum(abs(x) for x in column) / len(column),
    "maximum": lambda column: max(abs(x) for x in column),
    "second_moment": lambda column: sum(x * x for x in column) / len(column),
}

LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear over positions": (nn.Linear(5, 3), (2, 4, 5)),
    "convolution": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 2, 6, 5)),
    "along one axis": (nn.Conv1d(2, 3, 3, padding=1), (4, 2, 9)),
    "one example alone": (nn.Conv2d(2, 3, 2), (2, 5, 5)),
}


def columns(rows: Tensor) -> list[list[float]]:
    return [[float(x) for x in column] for column in rows.unbind(dim=1)]


@pytest.mark.parametrize("what", FORMULAS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_formula_of_inputs(what: str, kind: str):
    layer, shape = LAYERS[kind]
    data = [random(*shape), random(*shape, seed=1) + 1]
    found = activations(layer, data, what=what)["weight"]
    rows = torch.cat([features(layer, batch) for batch in data])
    expected = torch.tensor([FORMULAS[what](column) for column in columns(rows)])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", FORMULAS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_formula_of_outputs(what: str, kind: str):
    layer, shape = LAYERS[kind]
    data = [random(*shape), random(*shape, seed=1) + 1]
    found = activations(layer, data, what=what, of="outputs")["weight"]
    made = []
    for batch in data:
        output = layer(batch).detach()
        if isinstance(layer, nn.Linear):
            made += output.reshape(-1, 3).tolist()
        else:
            output = output if output.dim() == len(layer.weight.shape) else output[None]
            made += [list(values) for one in output for values in zip(*one.flatten(1).tolist(), strict=True)]
    expected = torch.tensor([FORMULAS[what](column) for column in columns(torch.tensor(made))])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_norm_is_the_root_of_the_gram_matrix_and_moments_give_the_variance():
    layer, data = nn.Conv2d(2, 3, 2), [random(3, 2, 4, 4) + 2, random(2, 2, 4, 4)]
    asked = {"gram": Gram(), "norm": Activations(), "mean": Activations("mean"), "square": Activations("second_moment")}
    found = collect(layer, data, asked)
    torch.testing.assert_close(found["norm"]["weight"], found["gram"]["weight"].diagonal().sqrt())
    variance = (found["square"] - found["mean"] * found["mean"])["weight"]
    rows = torch.cat([features(layer, batch) for batch in data])
    torch.testing.assert_close(variance, rows.var(dim=0, correction=0), rtol=1e-4, atol=1e-5)


def test_padded_tokens_do_not_count():
    layer, tokens = nn.Linear(2, 3), random(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens[mask == 0] = torch.nan
    batch = {"x": tokens, "attention_mask": mask}
    for of, rows in (("inputs", tokens[mask.bool()]), ("outputs", layer(tokens[mask.bool()]).detach())):
        found = activations(layer, [batch], what="mean", of=of, forward=lambda model, batch: model(batch["x"]))
        torch.testing.assert_close(found["weight"], rows.mean(dim=0))


@pytest.mark.parametrize("of", ["inputs", "outputs"])
@pytest.mark.parametrize("what", FORMULAS)
def test_shards_of_uneven_size_come_to_what_one_pass_finds(what: str, of: str, tmp_path):
    """Means are weighted by rows, not by examples: the second shard has long examples."""
    layer, data = nn.Linear(3, 2), [random(2, 1, 3), random(1, 9, 3, seed=1) + 3, random(4, 2, 3, seed=2)]
    whole = activations(layer, data, what=what, of=of)
    shards = [activations(layer, [batch], what=what, of=of) for batch in data]
    shards[0].save(tmp_path / "shard.safetensors")
    found = combine(combine(ws.open(tmp_path / "shard.safetensors"), shards[1]), shards[2])
    torch.testing.assert_close(found["weight"], whole["weight"], rtol=1e-6, atol=1e-6)
    assert found.metadata == whole.metadata


def test_narrow_floats_and_many_batches_are_summed_wide():
    layer = nn.Linear(1, 1).bfloat16()
    found = activations(layer, [torch.full((7, 1), 1.0078125, dtype=torch.bfloat16)] * 300, what="mean")["weight"]
    assert float(found) == 1.0078125


@pytest.mark.parametrize("what", FORMULAS)
def test_what_is_not_finite_is_an_error(what: str):
    data = [random(2, 3), torch.tensor([[0.0, torch.nan, 0.0]])]
    with pytest.raises(Error, match=r"weight: its inputs in batch 2 are not finite"):
        activations(nn.Linear(3, 2), data, what=what)
    with pytest.raises(Error, match=r"weight: its outputs in batch 2 are not finite"):
        activations(nn.Linear(3, 2), data, what=what, of="outputs")


def test_options_that_do_not_exist_are_refused():
    with pytest.raises(Error, match="what is one of norm, mean, mean_absolute, maximum, second_moment; got 'max'"):
        Activations("max")  # type: ignore[arg-type]
    with pytest.raises(Error, match="of is one of inputs, outputs; got 'weights'"):
        Activations(of="weights")  # type: ignore[arg-type]


def test_layers_that_share_an_input_share_a_row_of_numbers():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

    assert activations(Both(), [random(2, 3)]).ties == {"second.weight": "first.weight"}
    assert not activations(Both(), [random(2, 3)], of="outputs").ties
