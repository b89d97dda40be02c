"""The stable embedding against an embedding and a layer norm."""

from __future__ import annotations

import copy

import torch
from torch import nn

from weightsmith.optim import StableEmbedding, embeddings


def test_it_is_an_embedding_and_a_layer_norm():
    layer = StableEmbedding(12, 8)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 2)
        layer.norm.bias.uniform_(-1, 1)
    words = torch.tensor([[0, 3], [11, 3]])
    plain = nn.Embedding(12, 8, _weight=layer.weight.detach())
    norm = nn.LayerNorm(8)
    norm.load_state_dict(layer.norm.state_dict())
    torch.testing.assert_close(layer(words), norm(plain(words)))
    layer(words).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[[1, 2]].abs().max() == 0
    assert float(layer.weight.grad[3].abs().max()) > 0


def test_hooks_of_the_norm_are_called():
    layer, seen = StableEmbedding(4, 6), []
    layer.norm.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    layer(torch.tensor([[1, 2]]))
    assert seen == [(1, 2, 6)]


def test_it_starts_uniform_with_xaviers_bound():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = StableEmbedding(500, 100, padding_idx=3)
    bound = (6 / 600) ** 0.5
    others = layer.weight.detach()[torch.arange(500) != 3]
    assert 0.99 * bound < float(others.abs().max()) <= bound
    assert abs(float(others.var()) / (bound**2 / 3) - 1) < 0.03
    assert float(layer.weight[3].detach().abs().max()) == 0
    assert torch.equal(layer(torch.tensor([3])), layer.norm.bias[None])


def test_options_copies_and_devices():
    layer = StableEmbedding(4, 6, dtype=torch.bfloat16)
    assert layer(torch.tensor([1])).dtype == torch.bfloat16
    assert layer.norm.weight.dtype == torch.bfloat16
    other = copy.deepcopy(layer)
    assert torch.equal(other(torch.tensor([2])), layer(torch.tensor([2])))
    assert list(StableEmbedding(4, 6, device="meta").state_dict()) == ["weight", "norm.weight", "norm.bias"]


def test_embeddings_are_found_once_each():
    words = nn.Embedding(5, 3)
    model = nn.ModuleList([words, nn.Linear(3, 5), StableEmbedding(4, 3), nn.EmbeddingBag(6, 3), words])
    model[1].weight = words.weight
    assert [len(weight) for weight in embeddings(model)] == [5, 4, 6]
    assert embeddings(nn.Linear(2, 2)) == []
