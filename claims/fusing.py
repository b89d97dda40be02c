"""Is the mean of siblings that learned other tasks a better start than the network they come from?

A small network learns to tell five kinds of clothes apart. Four siblings of it are fine-tuned, each with a head of
its own, on other tasks over all ten kinds: four ways to pair the kinds into five classes. Their trunks are averaged.
From that start, and from the trunk of the first network, a new head and all weights are fine-tuned on 300 pictures of
a fifth task: all ten kinds.
"""

import copy

import torch
from _fashion import accuracy, cnn, held_out, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="fusing",
    statement="fine-tuned on few labels of a new task, the mean of four siblings is at least as accurate as their "
    "start",
    method="fused",
    baseline="start",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
)
SIBLINGS, FEW = 4, 300


def measure(seed: int) -> dict[str, float]:
    """Test accuracies after fine-tuning on the new task, by start."""
    first, *others, few = split(seed, [4000, *[1500] * SIBLINGS, FEW])
    test = held_out(seed)
    start = cnn(seed, classes=5)
    known = first[1] < 5
    train(start, (first[0][known], first[1][known]), 2, seed)
    siblings = []
    for number, (images, labels) in enumerate(others):
        pairs = torch.randperm(10, generator=torch.Generator().manual_seed(100 * seed + number)) // 2
        sibling = with_trunk(cnn(1000 * seed + number, classes=5), trunk(start))
        train(sibling, (images, pairs[labels]), 2, seed + number, rate=1e-3)
        siblings.append(sibling)
    fused = ws.merge.mean([trunk(sibling) for sibling in siblings])
    singles = [tuned(trunk(sibling), few, test, seed) for sibling in siblings]
    return {
        "fused": tuned(fused, few, test, seed),
        "start": tuned(trunk(start), few, test, seed),
        "a sibling": sum(singles) / len(singles),
        "best sibling": max(singles),
        "worst sibling": min(singles),
    }


def trunk(model: torch.nn.Module) -> ws.Weights:
    """All but the head."""
    return ws.open(copy.deepcopy(model)).drop("11.*")


def with_trunk(model: torch.nn.Module, weights: ws.Weights) -> torch.nn.Module:
    """A network with a head of its own over given weights."""
    weights.load_into(model, strict=False)
    return model


def tuned(weights: ws.Weights, few, test, seed: int) -> float:
    """Test accuracy after fine-tuning a new head and all weights on a few pictures."""
    model = with_trunk(cnn(7000 + seed), weights)
    train(model, few, 15, seed, rate=1e-3, batch=32)
    return accuracy(model, test)
