"""Do the examples whose losses swing most pull the weights in opposite directions, more than other outliers do?

A network learns clothes with full batches and a step so large that its loss oscillates. At the step of most
oscillation the one percent of examples whose loss rose most and the one percent whose loss fell most are compared
with other outliers: the two percent of highest loss, halved at random.
"""

import copy

import torch
from _digits import one_thread
from _fashion import split
from torch import nn
from torch.nn import functional

from weightsmith.claims import Claim
from weightsmith.inspect import training

CLAIM = Claim(
    key="outliers-opposing-signals-have",
    statement="the mean gradients of the two groups whose losses change most in opposite directions have a cosine at "
    "least 0.3 below that of the halves of the examples of highest loss",
    method="cosine of the opposing groups",
    baseline="cosine of the highest losses, halved",
    higher_is_better=False,
    margin=0.3,
)
EXAMPLES, STEPS, RATE, SHARE = 2000, 150, 0.3, 0.01


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Cosines, shares and curvatures at the step of most oscillation, and means over the last half of the run."""
    images, labels = split(seed, [EXAMPLES])[0]
    data = (images.flatten(1) - images.mean(), labels)
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    watch, states = training.OpposingSignals(share=SHARE), []
    for _ in range(STEPS):
        watch.step(training.example_losses(model, [data]))
        states.append(copy.deepcopy(model.state_dict()))
        optimizer.zero_grad()
        functional.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
    found = watch.report()
    step = found["step of most oscillation"]
    before, after = watch.losses[step - 1], watch.losses[step]
    model.load_state_dict(states[step])
    told = training.opposing_signals(model, data, before, after, share=SHARE, seed=seed)
    highest = before.argsort(descending=True)[: 2 * round(SHARE * EXAMPLES)]
    halves = highest[torch.randperm(len(highest), generator=torch.Generator().manual_seed(seed))].chunk(2)
    slopes = [slope(model, data[0][half], data[1][half]) for half in halves]
    return {
        "cosine of the opposing groups": told["gradient cosine"],
        "cosine of the highest losses, halved": float(functional.cosine_similarity(*slopes, dim=0)),
        "cosine of random groups": told["gradient cosine of random groups"],
        "share of the change": told["share of change"],
        "share of the change, mean over the run": found["mean share of change"],
        "alternation, mean over the run": found["mean alternation"],
        "curvature": told["curvature"],
        "curvature along a random direction": told["curvature along a random direction"],
        "cosine of the groups' mean inputs": told["input cosine"],
        "step": step,
    }


def network(seed: int) -> nn.Module:
    """Two hidden layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def slope(model: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean gradient as one vector."""
    found = torch.autograd.grad(functional.cross_entropy(model(inputs), labels), list(model.parameters()))
    return torch.cat([part.flatten() for part in found])
