"""True labels leave a solution more room than random ones: the prior mass around networks fitted to digits.

The same network is fitted to 200 digits with their labels, and with half of the labels shuffled, until the training
loss is below 0.05 both times. The room is the log prior mass within 0.1 nats of the loss reached, by 40 random rays;
the prior's spread is that of the initialisation, tensor by tensor. How much of it is merely that the weights lie
further out is told beside.
"""

import contextlib

import torch
from _digits import Data, accuracy, loss, mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="the-universality-lens",
    statement="at an equal training loss, true labels leave a network more room than shuffled ones",
    method="log volume, true labels",
    baseline="log volume, shuffled labels",
    needs=("sklearn",),
)
ENOUGH, EPS, RAYS = 0.05, 0.1, 40


class Enough(Exception):
    """The loss aimed at is reached."""


def fitted(data: Data, seed: int) -> torch.nn.Sequential:
    """Trained until the loss is below `ENOUGH`."""
    model = mlp(seed, width=32)

    def check(epoch: int) -> None:
        if loss(model, data) < ENOUGH:
            raise Enough

    with contextlib.suppress(Enough):
        train(model, data, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=1000, seed=seed, after_epoch=check)
    return model


def measure(seed: int) -> dict[str, float]:
    """Log volumes in nats, the losses reached and the accuracies."""
    (images, labels), test = split(seed, [200])
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(200, generator=generator)[:100]
    shuffled = labels.clone()
    shuffled[some] = labels[some[torch.randperm(100, generator=generator)]]
    start = mlp(seed, width=32)
    prior = {name: float(value.detach().std()) for name, value in start.named_parameters()}
    figures = {}
    for name, given in (("true", labels), ("shuffled", shuffled)):
        model = fitted((images, given), seed)
        found = ws.inspect.landscape.local_log_volume(
            model, None, [(images, given)], eps=EPS, prior=prior, rays=RAYS, seed=seed
        )
        figures |= {
            f"log volume, {name} labels": found["log volume"],
            f"effective rays, {name} labels": found["effective rays"],
            f"mean of the rays' logarithms, {name} labels": found["mean of the rays' logarithms"],
            f"nats by the distance from 0, {name} labels": found["nats by the distance from 0"],
            f"training loss, {name} labels": loss(model, (images, given)),
            f"accuracy, {name} labels": accuracy(model, test),
        }
    return figures
