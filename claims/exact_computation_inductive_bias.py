"""Convolutions bring knowledge of images along: how rare good models are among random ones, on shifted digits.

A hypothesis is a random network of one hidden layer whose output weights fit 200 training digits (ridge regression on
one-hot labels); its loss is the mean squared error on 600 others. Digits are shifted by up to two pixels each way,
on a canvas of 12 by 12. The hidden layer has 256 random units: dense ones of all pixels, or 64 filters of 5 by 5 whose
responses are pooled to 2 by 2 (as many features). The nats that a mean squared error of 0.02 takes are compared, an
error that neither space reaches. Each side has the ridge that is best for it, of eight, over twenty networks: a first
run with one small ridge for both made the dense rival worse than a constant.
"""

import torch
from _digits import Data, one_thread, split
from torch.nn import functional

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="exact-computation-inductive-bias",
    statement="on shifted digits random convolutions need less further inductive bias than random dense layers",
    method="nats, convolutions",
    baseline="nats, dense",
    higher_is_better=False,
    needs=("sklearn",),
)
EPS, SAMPLES, RIDGES = 0.02, 300, tuple(10 ** (-power / 2) for power in range(8))


def shifted(data: Data, seed: int) -> Data:
    """Each digit somewhere on a canvas of 12 by 12."""
    images, labels = data
    canvas = torch.zeros(len(labels), 12, 12)
    places = torch.randint(0, 5, (len(labels), 2), generator=torch.Generator().manual_seed(seed))
    for image, where, (row, column) in zip(images.view(-1, 8, 8), canvas, places.tolist(), strict=True):
        where[row : row + 8, column : column + 8] = image
    return canvas, labels


def dense(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """256 features of all pixels."""
    weight = torch.randn(144, 256, generator=generator) / 12
    return (images.flatten(1) @ weight).relu()


def convolutions(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """64 filters, each at four places."""
    weight = torch.randn(64, 1, 5, 5, generator=generator) / 5
    return functional.adaptive_avg_pool2d(functional.conv2d(images[:, None], weight).relu(), 2).flatten(1)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Nats and the losses that they rest on."""
    training, test, _ = (shifted(part, seed + i) for i, part in enumerate(split(seed, [200, 600])))
    images = torch.cat([training[0], test[0]])
    targets = functional.one_hot(training[1], 10).double()
    figures = {}
    for name, features in (("convolutions", convolutions), ("dense", dense)):

        def loss(number: int, ridge: float, features=features) -> float:
            found = features(images, torch.Generator().manual_seed(number)).double()
            found = torch.cat([found, torch.ones(len(found), 1)], dim=1)
            fit, held = found[:200], found[200:]
            scale = ridge * fit.square().sum() / len(fit)
            inside = fit @ fit.T + scale * torch.eye(200)
            guess = held @ fit.T @ torch.linalg.solve(inside, targets)
            return float((guess - functional.one_hot(test[1], 10)).square().mean())

        best = min(RIDGES, key=lambda ridge, loss=loss: sum(loss(10**6 + i, ridge) for i in range(20)))
        losses = [loss(seed * SAMPLES + i, best) for i in range(SAMPLES)]
        report = ws.inspect.landscape.inductive_bias(losses, eps=EPS, bootstrap=40, seed=seed)
        figures |= {
            f"nats, {name}": report["nats"],
            f"low, {name}": report["low"],
            f"high, {name}": report["high"],
            f"misfit, {name}": report["misfit"],
            f"mean loss, {name}": sum(losses) / SAMPLES,
            f"ridge, {name}": best,
        }
    return figures
