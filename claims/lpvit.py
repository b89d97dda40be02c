"""Half of the 8 x 8 blocks of a small vision transformer: by second-order cost and with shares by layer, or by size?

A transformer of two blocks (16 tokens of 2 x 2 pixels, width 64) learns digits. Half of the weights of its attention
and perceptrons go, in blocks of 8 x 8, at once and without training. `lpvit` finds costs and shares on 400 training
images; the baseline removes the blocks of the smallest mean magnitude, half of them in every layer. Beside them stand
one threshold of magnitudes for all layers, the costs of `lpvit` with equal shares or one threshold, and `lpvit` with
power or the first-order term counted.

The first-order term of the paper's formula was tried first, on perceptrons, and ruined them; it is left out by default,
as in the authors' code. That was found on other networks than those here. After one look at seed 0 the training was
made longer, from 15 epochs to 25, since the dense transformer had learnt little (0.91); 0.84 stood against 0.18.
"""

import copy
from typing import Any

import torch
from _digits import accuracy, one_thread, split, train
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="lpvit",
    statement="with half of the 8 x 8 blocks gone, second-order costs and shares by layer keep at least the "
    "accuracy of the smallest blocks of every layer gone",
    method="lpvit",
    baseline="magnitude, equal shares",
    seeds=(1, 2, 3, 4, 5),
    needs=("sklearn",),
)
BLOCKS = "8x8"
LAYERS = ("*.turn.weight", "*.out.weight", "*.up.weight", "*.down.weight")


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Test accuracies, and what the power of the blocks left is to that of all."""
    training, test = split(seed, [1200])
    model = transformer(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    train(model, training, optimizer, epochs=25, seed=seed, batch=64, rate=lambda done: 1 - done)
    images, labels = training[0][:400], training[1][:400]
    data: list[Any] = [(images, labels)]
    chosen: dict[str, Any] = {"structure": BLOCKS, "pattern": LAYERS}
    costs = ws.prune.block_taylor(model, data, **chosen)
    pruned = {
        "lpvit": ws.prune.lpvit(model, data, 0.5, **chosen),
        "lpvit, power counted": ws.prune.lpvit(model, data, 0.5, power=1.0, **chosen),
        "lpvit, first order counted": ws.prune.lpvit(model, data, 0.5, slope=True, **chosen),
        "its costs, equal shares": ws.prune.by_score(model, costs, 0.5, structure=BLOCKS),
        "its costs, one threshold": ws.prune.by_score(model, costs, 0.5, structure=BLOCKS, scope="global"),
        "magnitude, equal shares": ws.prune.magnitude(model, 0.5, **chosen),
        "magnitude, one threshold": ws.prune.magnitude(model, 0.5, scope="global", **chosen),
    }
    figures = {"dense": accuracy(model, test)}
    for name, weights in pruned.items():
        made = copy.deepcopy(model)
        weights.load_into(made)
        figures[name] = accuracy(made, test)
        figures[f"{name}: sparsity"] = ws.prune.sparsity_of(weights, LAYERS)
        figures[f"{name}: power"] = power(weights)
    return figures


def power(weights: ws.Weights) -> float:
    """Blocks left times the inputs of their layer, over the same of all blocks."""
    masks = ws.prune.mask_of(weights, LAYERS)
    left = sum(float(masks[name].sum()) * masks[name].shape[1] for name in masks)
    return left / sum(masks[name].numel() * masks[name].shape[1] for name in masks)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.turn, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, tokens, width]`` to the same."""
        query, key, value = self.turn(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1) @ value
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class Transformer(nn.Module):
    """Digits ``[n, 64]`` as 16 tokens."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2):
        super().__init__()
        self.patches, self.places = nn.Linear(4, width), nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.classes = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[n, 10]``."""
        tokens = x.unflatten(1, (4, 2, 4, 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        return self.classes(self.norm(self.blocks(self.patches(tokens) + self.places).mean(dim=1)))


def transformer(seed: int) -> Transformer:
    """With weights that depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformer()
