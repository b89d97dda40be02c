"""Is the average of fine-tunes of a convolutional network as good as the best of them, and as their ensemble?

A small network with batch norm is trained on clothes and fine-tuned eight times on others, with learning rate, length,
label smoothing and noise drawn at random. The best single fine-tune is the one with the highest accuracy on validation
pictures. The ensemble adds up the scores of all eight and costs eight times as much. Test pictures are plain, turned
by 25 degrees, or noisy. The sweep was made shorter, for time, after a first one had been seen.
"""

import copy
import random

import torch
from _fashion import Data, accuracy, cnn, held_out, noisy, split, train, turned

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="model-soups",
    variant="clothes",
    statement="the uniform soup of eight fine-tunes is at least as accurate on test pictures as the fine-tune that is "
    "best on validation pictures",
    method="uniform soup",
    baseline="best single",
    seeds=(0, 1, 2, 3, 4, 5),
)
FINE_TUNES = 8


def measure(seed: int) -> dict[str, float]:
    """Accuracies on plain, turned and noisy test pictures."""
    first, second, validation = split(seed, [4000, 2000, 1000])
    plain = held_out(seed, 1000)
    tests = {
        "": plain,
        ", turned": (turned(plain[0], 25), plain[1]),
        ", noisy": (noisy(plain[0], torch.Generator().manual_seed(seed)), plain[1]),
    }
    base = cnn(seed)
    train(base, first, 2, seed)
    runs = [fine_tuned(base, second, random.Random(100 * seed + number)) for number in range(FINE_TUNES)]
    scratch = copy.deepcopy(base)

    def loaded(weights: ws.Weights) -> torch.nn.Module:
        weights.load_into(scratch)
        return scratch

    soup = ws.merge.mean(runs)
    found = soup | ws.stats.batch_norm(scratch, second[0].split(500), weights=soup)
    greedy = ws.merge.greedy_soup(runs, lambda weights: accuracy(loaded(weights), validation))
    best = max(runs, key=lambda run: accuracy(run, validation))
    figures = {}
    for where, test in tests.items():
        figures[f"uniform soup{where}"] = accuracy(loaded(soup), test)
        figures[f"uniform soup, batch norm found anew{where}"] = accuracy(loaded(found), test)
        figures[f"greedy soup{where}"] = accuracy(loaded(greedy), test)
        figures[f"best single{where}"] = accuracy(best, test)
        figures[f"ensemble{where}"], figures[f"mean single{where}"] = together(runs, test)
    return figures


def fine_tuned(base: torch.nn.Module, data: Data, chance: random.Random) -> torch.nn.Module:
    """One run of the sweep."""
    model = copy.deepcopy(base)
    size, smoothing = chance.choice([0.0, 0.1]), chance.choice([0.0, 0.1])
    train(
        model,
        data,
        epochs=chance.randint(2, 4),
        seed=chance.randrange(2**31),
        rate=10 ** chance.uniform(-3.3, -2.5),
        augment=lambda images, generator: noisy(images, generator, size),
        smoothing=smoothing,
    )
    return model


@torch.no_grad()
def together(runs: list[torch.nn.Module], test: Data) -> tuple[float, float]:
    """The accuracy of the sum of all scores, and the mean accuracy of one."""
    images, labels = test
    scores = torch.stack([run(images) for run in runs])
    summed, alone = scores.sum(dim=0).argmax(dim=1), scores.argmax(dim=2)
    return float((summed == labels).float().mean()), float((alone == labels).float().mean())
