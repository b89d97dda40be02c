"""Do nodes that average their weights with their neighbours learn faster if the average keeps its variance?

Ten nodes in a ring, each with a random start of its own and 60 digits of its own, take turns: an epoch of training,
then every node becomes the average of itself and its two neighbours. Accuracy on test digits is averaged over the
nodes and over the first twenty rounds, so that who learns sooner has more.
"""

import torch
from _digits import Data, accuracy, mlp, split, train
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="vanishing-variance-problem-fully",
    statement="gossiping nodes with unrelated starts learn faster when averages are given back the variance of what "
    "was averaged",
    method="variance kept",
    baseline="plain average",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109),
    needs=("sklearn",),
)
NODES, ROUNDS = 10, 20


def measure(seed: int) -> dict[str, float]:
    """Mean accuracy over rounds and nodes, and in the last round; the same with one start for all nodes."""
    figures: dict[str, float] = {}
    for arm, kept, related in (
        ("plain average", False, False),
        ("variance kept", True, False),
        ("plain average, one start", False, True),
        ("variance kept, one start", True, True),
    ):
        scores = gossip(seed, kept, related)
        figures[arm] = sum(scores) / len(scores)
        figures[f"{arm}, last round"] = scores[-1]
    return figures


def gossip(seed: int, kept: bool, related: bool) -> list[float]:
    """Accuracy after every round, averaged over the nodes."""
    *parts, test = split(seed, [60] * NODES)
    nodes: list[nn.Module] = [mlp(seed if related else 100 * seed + number) for number in range(NODES)]
    scores = []
    for turn in range(ROUNDS):
        for number, (node, part) in enumerate(zip(nodes, parts, strict=True)):
            step(node, part, seed=1000 * seed + 10 * turn + number)
        before = [ws.Weights.of({name: value.clone() for name, value in n.state_dict().items()}) for n in nodes]
        for number, node in enumerate(nodes):
            around = [before[number], before[number - 1], before[(number + 1) % NODES]]
            average = ws.merge.mean(around)
            (ws.merge.match_moments(average, around) if kept else average).load_into(node)
        scores.append(sum(accuracy(node, test) for node in nodes) / NODES)
    return scores


def step(node: nn.Module, data: Data, seed: int) -> None:
    """One epoch on a node's own digits."""
    train(node, data, torch.optim.SGD(node.parameters(), lr=0.1), epochs=1, seed=seed, batch=16)
