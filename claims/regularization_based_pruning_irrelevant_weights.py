"""Can more weights be cut after decay of the weights that the loss does not feel than after decay of all?

A perceptron of 128 hidden units learns digits for 40 epochs with Adam. Decay is decoupled, of the matrices alone, and
either of all their weights or gated by the size of the gradient; six strengths each, in steps of three. Then the
smallest weights are cut, as many as lose at most half a point of accuracy on 300 validation digits against the network
trained without decay. The figure is the share that could be cut, at the strength with which it is the largest.

The lowest strength was added after the best of plain decay, on a seed that is not among these, lay at the end of the
grid.
"""

import copy

import torch
from _digits import accuracy
from _searches import parts, perceptron, train

from weightsmith.claims import Claim
from weightsmith.prune.sparse import exponential_gate, irrelevant_decay, threshold_within, weights_of

CLAIM = Claim(
    key="regularization-based-pruning-irrelevant-weights",
    statement="within half a point of accuracy more weights can be cut after gated decay than after plain weight decay",
    method="share cut, gated",
    baseline="share cut, plain",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
GATES = {"gated": exponential_gate, "plain": torch.ones_like}


def measure(seed: int) -> dict[str, float]:
    """The largest shares that can be cut, and test accuracies after it."""
    training, validation, test = parts(seed)
    start = perceptron(seed)

    def trained(strength: float, gate) -> torch.nn.Module:
        model = copy.deepcopy(start)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if strength:
            irrelevant_decay(optimizer, weights_of(model).values(), strength, gate=gate)
        return train(model, training, optimizer, 40, seed)

    def judged(model: torch.nn.Module) -> float:
        return accuracy(model, validation)

    free = trained(0.0, None)
    reference = judged(free)
    figures = {"accuracy, no decay": accuracy(free, test)}
    figures["share cut, no decay"] = threshold_within(free, judged, 0.005).sparsity
    for name, gate in GATES.items():
        models = {strength: trained(strength, gate) for strength in STRENGTHS}
        cuts = {s: threshold_within(model, judged, 0.005, reference=reference).sparsity for s, model in models.items()}
        chosen = max(cuts, key=lambda strength: cuts[strength])
        figures[f"share cut, {name}"] = cuts[chosen]
        figures[f"accuracy, {name}"] = accuracy(models[chosen], test)
        figures[f"strength, {name}"] = chosen
    return figures
