"""Do two fine-tunes and their start make a better model under shift than the mean of the two?

The start is trained on digits that are moved by a pixel and noisy, so it knows the shifted world; two
runs with small batches then fine-tune it on a few clean digits, each in an order of its own. The test
digits are moved and noisy again. (Runs with large batches end so close together that there is no
shell: soup and stock are then the same.)
"""

import copy

import torch
from _digits import accuracy, mlp, split, train
from torch import Tensor

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="model-stock",
    statement="the stock of two fine-tunes is at least as accurate under shift as their uniform soup",
    method="stock of two",
    baseline="soup of two",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112, 113, 114, 115, 116, 117, 118, 119),
    needs=("sklearn",),
)
NOISE = 0.2


def measure(seed: int) -> dict[str, float]:
    """Accuracies on shifted test digits, and two on clean ones."""
    first, second, clean = split(seed, [700, 150])
    base = mlp(seed)
    train(base, first, torch.optim.Adam(base.parameters(), lr=1e-3), epochs=40, seed=seed, augment=shifted)
    test = (shifted(clean[0], torch.Generator().manual_seed(1000 + seed)), clean[1])
    runs = []
    for number in range(2):
        run = copy.deepcopy(base)
        train(run, second, torch.optim.Adam(run.parameters(), lr=3e-3), epochs=20, seed=2 * seed + number, batch=4)
        runs.append(run)
    scratch = copy.deepcopy(base)
    figures = {"start": accuracy(base, test), "one fine-tune": accuracy(runs[0], test)}
    ws.merge.mean(runs).load_into(scratch)
    figures |= {"soup of two": accuracy(scratch, test), "soup, clean": accuracy(scratch, clean)}
    ws.merge.model_stock(runs, base=base).load_into(scratch)
    return figures | {"stock of two": accuracy(scratch, test), "stock, clean": accuracy(scratch, clean)}


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Every image moved by up to one pixel along each axis, with noise."""
    grid = torch.nn.functional.pad(images.reshape(-1, 8, 8), (1, 1, 1, 1))
    corner = torch.randint(0, 3, (len(images), 2, 1), generator=generator) + torch.arange(8)
    rows, columns = corner[:, 0, :, None], corner[:, 1, None, :]
    moved = grid[torch.arange(len(images))[:, None, None], rows, columns].reshape(len(images), 64)
    return moved + NOISE * torch.randn(moved.shape, generator=generator)
