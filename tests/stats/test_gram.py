"""Gram matrices, against the layers' own outputs: what they are for is to say how outputs change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import gram


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change_of_outputs(layer: nn.Module, inputs: Tensor, change: Tensor) -> float:
    """The squared change of the outputs under a change of the weight, by running the layer twice."""
    before = layer(inputs).double()
    with torch.no_grad():
        layer.weight += change
    after = layer(inputs).double()
    with torch.no_grad():
        layer.weight -= change
    return (after - before).square().sum().item()


LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear over positions": (nn.Linear(5, 3), (2, 4, 5)),
    "convolution": (nn.Conv2d(2, 3, 3), (2, 2, 6, 5)),
    "strides and padding": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 2, 7, 6)),
    "padding of the same size": (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 2, 5, 5)),
    "one example alone": (nn.Conv2d(2, 3, 2), (2, 5, 5)),
    "along one axis": (nn.Conv1d(2, 3, 3, padding=1, stride=2), (4, 2, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_it_says_how_much_outputs_change(kind: str):
    layer, shape = LAYERS[kind]
    inputs = random(*shape)
    matrix = gram(layer, [inputs])["weight"].double()
    change = 0.5 * random(*layer.weight.shape, seed=1)
    flat = change.flatten(1).double()
    assert float((flat @ matrix @ flat.T).trace()) == pytest.approx(change_of_outputs(layer, inputs, change), rel=1e-4)


def test_batches_add_up():
    layer, inputs = nn.Linear(4, 2), random(9, 4)
    whole = gram(layer, [inputs])["weight"]
    torch.testing.assert_close(gram(layer, inputs.split([2, 3, 4]))["weight"], whole)
    torch.testing.assert_close(whole, inputs.T @ inputs)


def test_the_sum_over_batches_is_float64():
    layer = nn.Linear(1, 1)
    batches = [torch.tensor([[4096.0]])] + [torch.ones(1, 1)] * 8  # 2^24 + 1 is not a float32
    assert float(gram(layer, batches)["weight"]) == 2**24 + 8


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.query(x) * self.key(x) + self.value(x))


def test_layers_with_one_input_share_one_matrix():
    found = gram(Attention(), random(6, 4).split(2))
    assert found.ties == {"key.weight": "query.weight", "value.weight": "query.weight"}
    torch.testing.assert_close(found["key.weight"], random(6, 4).T @ random(6, 4))


class Changing(nn.Module):
    """Layers that share their input on some batches only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) > 0:
            return self.first(x) + self.second(x)
        return self.second(self.first(x) * 0 + 2)


@pytest.mark.parametrize("order", [(1, -1, 1), (-1, 1, 1), (1, 1, -1)])
def test_a_matrix_that_is_shared_on_some_batches_only_is_taken_apart(order: tuple[int, ...]):
    batches = [torch.full((2, 3), float(sign * (number + 1))) for number, sign in enumerate(order)]
    found = gram(Changing(), batches)
    ones = torch.ones(3, 3)
    torch.testing.assert_close(found["first.weight"], sum(2 * (i + 1) ** 2 for i in range(3)) * ones)
    second = sum(2 * ((i + 1) ** 2 if sign > 0 else 4) for i, sign in enumerate(order))
    torch.testing.assert_close(found["second.weight"], second * ones)
    assert not found.ties


def test_an_input_that_is_overwritten_is_not_the_same_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            return self.first(x) + self.second(x.mul_(3))

    found = gram(InPlace(), [torch.ones(1, 2)])
    assert found["second.weight"].tolist() == [[9, 9], [9, 9]]
    assert found["first.weight"].tolist() == [[1, 1], [1, 1]]


def test_a_layer_that_is_called_twice_counts_twice():
    layer = nn.Linear(2, 2)
    found = gram(nn.ModuleList([layer]), [torch.ones(1, 2)], forward=lambda model, x: layer(x) + layer(x))
    assert found["0.weight"].tolist() == [[2, 2], [2, 2]]


def test_padded_tokens_do_not_count():
    layer = nn.Linear(2, 2)
    tokens, mask = random(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": tokens, "attention_mask": mask}
    found = gram(layer, [batch], forward=lambda model, batch: model(batch["x"]))["weight"]
    kept = tokens[mask.bool()]
    torch.testing.assert_close(found, kept.T @ kept)


def test_weights_whose_inputs_do_not_say_all_have_none():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.grouped = nn.Conv1d(4, 4, 1, groups=2)
            self.idle, self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(self.grouped(self.embed(x).mT).mT))

    assert set(gram(Tied(), [torch.tensor([[1, 2]])])) == {"hidden.weight"}


def test_narrow_floats_are_multiplied_in_float32():
    layer = nn.Linear(1, 1).bfloat16()
    found = gram(layer, [torch.full((300, 1), 1.0078125, dtype=torch.bfloat16)])["weight"]
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(300 * 1.0078125**2, rel=1e-5)


def test_a_pattern_chooses_and_one_that_fits_nothing_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert set(gram(model, [torch.ones(1, 2)], pattern="1.*")) == {"1.weight"}
    with pytest.raises(Error, match=r"no weight .* fits 'nothing'"):
        gram(model, [torch.ones(1, 2)], pattern="nothing")


def test_it_is_saved_and_opened_with_its_count(tmp_path):
    gram(Attention(), random(6, 4).split(2)).save(tmp_path / "gram.safetensors")
    found = ws.open(tmp_path / "gram.safetensors")
    again = ws.stats.combine(found, gram(Attention(), [random(2, 4, seed=9)]))
    assert again.metadata["weightsmith.examples"] == "8"
