"""Is a network of 2-bit weights more accurate with steps from means and late freezing than with learned steps?

A convolutional network for clothes is trained in floats on 6,000 images and then for two epochs with all its weights,
first and last layer too, on 2 bits. The last third of the steps freezes what is sure of its code, with the authors'
margin of 0.005 steps. Flips are the share of weights that turn back at a step, over the last third. Epochs and rate
were set before any figure was seen.
"""

from _quantized_training import like, score, setting, trained

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize.training import Oscillations, calm, fake, statistical

CLAIM = Claim(
    key="oscillation-free-quantization",
    statement="at 2 bits a convolutional network is more accurate with steps from means and late freezing than with "
    "learned steps",
    method="means, frozen late",
    baseline="learned steps",
    seeds=(0, 1, 2, 3, 4),
)
LATE = 2 / 3


def measure(seed: int) -> dict[str, float]:
    """Accuracies on test images, and turns a thousand weights and steps."""
    network, training, test = setting(seed)
    figures = {
        "floats": score(network, test),
        "rounded, no training": _rounded(network, test),
    }
    ways = {"learned steps": (False, False), "learned steps, frozen late": (False, True), "means": (True, False),
            "means, frozen late": (True, True)}  # fmt: skip
    for way, (means, freeze) in ways.items():
        model = like(network)
        if means:
            statistical(model, bits=2, pattern="*.weight")
        else:
            fake(model, bits=2, step="learned", pattern="*.weight")
        counter, rates = Oscillations(model), []

        def watch(progress: float, model=model, freeze=freeze, counter=counter, rates=rates) -> None:
            if freeze and progress >= LATE:
                calm(model)
            turned = counter.update()
            if progress > LATE + 0.05:
                rates.append(sum(turned.values()) / len(turned))

        trained(model, training, 2, seed, after_step=watch)
        figures[way] = score(model, test)
        figures[f"turns, {way}"] = 1000 * sum(rates) / len(rates)
    return figures


def _rounded(network, test) -> float:
    model = like(network)
    ws.quantize.rtn(model, bits=2, clip=16, pattern="*.weight", action="values").load_into(model)
    return score(model, test)
