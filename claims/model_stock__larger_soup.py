"""Do two fine-tunes and their start make as good a model under shift as six fine-tunes do?

The start, a convolutional network with batch norm, is trained on clothes that are turned at random and noisy, so it
knows the shifted world; six runs fine-tune it on a few plain pictures, each in an order of its own. The test pictures
are turned and noisy again.
"""

import copy

import torch
from _fashion import accuracy, cnn, held_out, noisy, split, train, turned
from torch import Tensor

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="model-stock",
    variant="larger soup",
    statement="the stock of two fine-tunes is at least as accurate under shift as the uniform soup of six",
    method="stock of two",
    baseline="soup of six",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
)
MEMBERS = 6


def measure(seed: int) -> dict[str, float]:
    """Accuracies on turned and noisy test pictures, and on plain ones."""
    first, second = split(seed, [5000, 800])
    base = cnn(seed)
    train(base, first, 3, seed, augment=shifted)
    runs = []
    for number in range(MEMBERS):
        run = copy.deepcopy(base)
        train(run, second, 4, 100 * seed + number, rate=2e-3, batch=32)
        runs.append(run)
    plain = held_out(seed, 1500)
    test = (shifted(plain[0], torch.Generator().manual_seed(seed)), plain[1])
    scratch = copy.deepcopy(base)
    figures = {"start": accuracy(base, test), "one fine-tune": sum(accuracy(run, test) for run in runs) / MEMBERS}
    figures |= {"start, plain": accuracy(base, plain)}
    merged = {
        "stock of two": ws.merge.model_stock(runs[:2], base=base),
        "stock of six": ws.merge.model_stock(runs, base=base),
        "soup of two": ws.merge.mean(runs[:2]),
        "halfway from the soup of two to the start": ws.merge.mean([ws.merge.mean(runs[:2]), base]),
        "soup of six": ws.merge.mean(runs),
    }
    for name, weights in merged.items():
        weights.load_into(scratch)
        figures |= {name: accuracy(scratch, test), f"{name}, plain": accuracy(scratch, plain)}
    return figures


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures turned by up to 30 degrees, with noise; 50 at a time are turned alike."""
    angles = 60 * torch.rand(len(images), generator=generator) - 30
    parts = [turned(part, float(angles[50 * place])) for place, part in enumerate(images.split(50))]
    return noisy(torch.cat(parts), generator, 0.2)
