"""Does averaging networks that saw only k inputs come to the right permutation of all 2^k - 1?

k is 6: 600 networks of width 512 are trained on the six inputs with a single one, and asked for the other 57. Measured
is the share of wrong bits of the average of all of them and of single networks. Beside it stand the correlation with
the closed form's mean, and how fast the number of networks needed grows with k from 16 to 64 in the limit of infinite
width (the paper: nearly linearly for one input, quadratically for all).
"""

import torch

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="exact-learning-permutations-nonzero",
    statement="the average of 600 networks has at most a tenth of a single network's wrong bits",
    method="wrong bits, 600 networks",
    baseline="a tenth of wrong bits, one network",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
LENGTH = 6


def measure(seed: int) -> dict[str, float]:
    """Shares of wrong bits over the inputs that were not trained on."""
    theory = ws.inspect.theory
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(seed)).tolist()
    outputs = theory.permutation_ensemble(order, models=600, width=512, steps=100, seed=seed)
    numbers = torch.arange(1, 2**LENGTH)
    inputs = (numbers[:, None] >> torch.arange(LENGTH - 1, -1, -1) & 1).float()
    unseen, target = inputs.sum(dim=1) > 1, torch.eye(LENGTH)[order]
    right = (inputs @ target)[unseen] > 0
    answers = outputs[:, unseen]

    def wrong(models: int) -> float:
        groups = answers[: len(answers) // models * models].unflatten(0, (-1, models)).mean(dim=1)
        return float(((groups > 0) != right).double().mean())

    mean, _ = theory.trained_outputs(torch.eye(LENGTH), target, inputs[unseen])
    growth = theory.ensemble_complexity([16, 32, 64])
    return {
        "wrong bits, 600 networks": wrong(600),
        "a tenth of wrong bits, one network": wrong(1) / 10,
        "wrong bits, one network": wrong(1),
        "wrong bits, 10 networks": wrong(10),
        "wrong bits, 100 networks": wrong(100),
        "correlation with the closed form": float(
            torch.corrcoef(torch.stack([answers.mean(dim=0).double().flatten(), mean.flatten()]))[0, 1]
        ),
        "growth for one input": growth["growth for one input"],
        "growth for all inputs": growth["growth for all inputs"],
    }
