"""Whether training that balances classes helps depends on the average of F1 that is asked.

Digits with a long tail: digit 0 has 200 examples and every further one about two thirds of the one before. Two
networks see the same examples, one with losses weighted by 1 / n_c; the test set has the same tail.
"""

import torch
from _digits import mlp, one_thread, split
from torch.nn import functional

from weightsmith.claims import Claim
from weightsmith.inspect.evaluation import weighted_f1

CLAIM = Claim(
    key="why-only-micro-f1",
    statement="the gain of class-balanced training by macro-F1 is above its gain by micro-F1 by a point at least",
    method="gain, macro",
    baseline="gain, micro",
    margin=0.01,
    seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """F1 of the balanced network minus that of the plain one, by average."""
    training, test = (tailed(part) for part in split(seed, [1000]))
    said = []
    for balanced in (False, True):
        model = mlp(seed)
        counts = torch.bincount(training[1], minlength=10).float()
        weight = counts.sum() / (10 * counts) if balanced else None
        fit(model, training, weight, seed)
        with torch.no_grad():
            said.append(model(test[0]).argmax(1))
    gains = {}
    for scheme in ("macro", "dodrans", "entropy", "weighted", "micro"):
        plain, other = (float(weighted_f1(one, test[1], scheme)) for one in said)
        gains |= {f"gain, {scheme}": other - plain, f"F1 of the plain one, {scheme}": plain}
    return gains


def tailed(data):
    """The first so many of every class."""
    images, labels = data
    most = int((labels == 0).sum())
    kept = torch.cat([torch.where(labels == c)[0][: max(int(most * 0.65**c), 2)] for c in range(10)])
    return images[kept], labels[kept]


@one_thread()
def fit(model, data, weight, seed: int) -> None:
    """Plain training under class weights."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(60):
        for part in torch.randperm(len(labels), generator=generator).split(32):
            loss = functional.cross_entropy(model(images[part]), labels[part], weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
