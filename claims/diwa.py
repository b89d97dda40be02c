"""Do independent runs make a better average under shift than as many moments of one run?

A small network is trained on clothes and fine-tuned on others, slightly noisy, six times: with learning rates drawn
at random and in an order of its own each time. One more run, with the middle learning rate, is as long and is kept at
six moments of its second half. Test pictures are turned by 25 degrees, which no training picture is. Both averages
re-estimate nothing: batch-norm statistics are averaged like the weights.
"""

import copy
import random

import torch
from _fashion import accuracy, cnn, held_out, noisy, split, train, turned

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="diwa",
    statement="the average of six independent fine-tunes is at least as accurate under shift as that of six moments "
    "of one fine-tune",
    method="six runs",
    baseline="six moments of a run",
    seeds=(0, 1, 2, 3, 4, 5),
)
MEMBERS, EPOCHS = 6, 6


def measure(seed: int) -> dict[str, float]:
    """Accuracies on turned test pictures, and how the members differ there."""
    first, second = split(seed, [5000, 2000])
    plain = held_out(seed)
    test = (turned(plain[0], 25), plain[1])
    base = cnn(seed)
    train(base, first, 2, seed)
    runs = [fine_tuned(base, second, random.Random(100 * seed + number)) for number in range(MEMBERS)]
    moments: list[torch.nn.Module] = []
    run = copy.deepcopy(base)

    def keep(epoch: int) -> None:
        if epoch >= EPOCHS:
            moments.append(copy.deepcopy(run))

    train(run, second, 2 * EPOCHS, seed, rate=1e-3, augment=noise, after_epoch=keep)
    scratch = copy.deepcopy(base)
    figures = {"one run": sum(accuracy(run, test) for run in runs) / MEMBERS, "before": accuracy(base, test)}
    for name, members in (("six runs", runs), ("six moments of a run", moments)):
        ws.merge.mean(members).load_into(scratch)
        figures[name] = accuracy(scratch, test)
        predictions = torch.stack([said(member, test[0]) for member in members])
        figures[f"ratio error, {name}"] = ws.inspect.diversity(predictions, test[1]).ratio_error
        figures[f"spread, {name}"] = ws.inspect.locality(members).spread
    return figures


def noise(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Training pictures with a little noise."""
    return noisy(images, generator, 0.1)


def fine_tuned(base: torch.nn.Module, data, chance: random.Random) -> torch.nn.Module:
    """One run, of its own learning rate and order."""
    model = copy.deepcopy(base)
    train(model, data, EPOCHS, chance.randrange(2**31), rate=10 ** chance.uniform(-3.3, -2.7), augment=noise)
    return model


@torch.no_grad()
def said(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Scores ``[n, c]``."""
    return model.eval()(images)
