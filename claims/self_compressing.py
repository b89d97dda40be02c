"""Is a network that learned the bits of its channels more accurate than one of 2 bits throughout, and no larger?

A convolutional network for clothes, trained in floats on 6,000 images, learns for four epochs with the penalty on its
size; so long does the other one with learned steps of 2 bits. Sizes are bits over the number of weights at first, each
channel's bits rounded up, with inputs from dead channels left out; steps and norms are not counted on either side.

On one seed, channels that began with 8 bits still had 6 after four epochs in batches of 128 with a rate of 0.03 (and
an accuracy of 0.78, where 2 bits had 0.84). They then began with 4 bits, in batches of 64 for both networks, with a
rate of 0.02; and since a penalty of 0.5 left 2.2 bits, it became 1. Between these tries the bits of the scored network
stopped being rounded up; they are rounded up for the size alone. Accuracy stayed far below that of 2 bits all along: as
bits go, the range halves, and the exponent follows it slowly.
"""

import copy

import torch
from _quantized_training import labels_alone, like, score, setting, trained

from weightsmith.claims import Claim
from weightsmith.graph import trace
from weightsmith.quantize.training import dead_units, fake, self_compressing, size, without_dead
from weightsmith.quantize.training._self_compressing import compressing

CLAIM = Claim(
    key="self-compressing",
    statement="a convolutional network that learned the bits of its channels, under 2 bits a weight on average, is at "
    "least as accurate as one trained with learned steps of 2 bits",
    method="self-compressed",
    baseline="learned steps, 2 bits",
    seeds=(0, 1, 2, 3, 4),
)
GAMMA, EPOCHS, BATCH = 1.0, 4, 64


def measure(seed: int) -> dict[str, float]:
    """Accuracies on test images, and sizes."""
    network, training, test = setting(seed)
    figures = {"floats": score(network, test)}
    model = like(network)
    fake(model, bits=2, step="learned", pattern="*.weight")
    figures["learned steps, 2 bits"] = score(trained(model, training, EPOCHS, seed, batch=BATCH), test)
    model = like(network).eval()
    graph = trace(model, training[0][:2])
    self_compressing(model, bits=4, graph=graph, pattern="*.weight")
    trained(
        model,
        training,
        EPOCHS,
        seed,
        lambda m, batch: labels_alone(m, batch) + GAMMA * size(m, graph),
        groups=_groups,
        batch=BATCH,
    )
    figures["self-compressed"] = score(model, test)
    kept = dead_units(model, graph)
    figures["channels left"] = sum(len(kept.get(name, range(n))) for name, n in graph.sizes.items()) / sum(
        graph.sizes.values()
    )
    whole = copy.deepcopy(model)
    with torch.no_grad():  # codes have whole bits; the points of 1.6 bits are among those of 2
        for one in compressing(whole).values():
            one.bits.copy_(one.width().ceil())
        figures["bits a weight"] = float(size(whole, graph))
    without_dead(model, graph, training[0][:50])
    figures["self-compressed, cut"] = score(model, test)
    return figures


def _groups(model):
    own = [p for one in compressing(model).values() for p in (one.bits, one.exponent)]
    there = {id(p) for p in own}
    return [{"params": own, "lr": 0.02}, {"params": [p for p in model.parameters() if id(p) not in there]}]
