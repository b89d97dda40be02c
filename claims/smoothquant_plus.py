"""Is rounding after smoothing with the alpha that is found better than rounding alone?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to
nearest at 3 bits in groups of 32. The alpha is chosen by what the rounded model gives for 4,096 words of its training
text. The figure with the fixed alpha of a half is beside it. (The paper rounds to 4 bits in groups of 128; a model this
small loses next to nothing there.) Bits and groups were set before any figure was seen.
"""

from typing import Any

from _rescaled import BLOCKS, gains, graph_of, losses, trained

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize import transforms

CLAIM = Claim(
    key="smoothquant-plus",
    statement="at 3 bits in groups of 32 the blocks of a small language model, smoothed with the alpha that is found, "
    "lose less on held-out text when they are rounded to nearest",
    method="SmoothQuant+",
    baseline="nearest",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    model, words, held_out = trained(seed)
    options: dict[str, Any] = {"bits": 3, "group": 32, "symmetric": False, "pattern": BLOCKS}
    places: dict[str, Any] = {"graph": graph_of(model, words[0]), "gains": gains()}
    smooth = transforms.smoothquant_plus(model, words, steps=10, **places, **options)
    half = transforms.smoothquant(model, words, alpha=0.5, **places)
    every = {"nearest": model, "SmoothQuant+": smooth, "alpha 0.5": half}
    rounded = {name: ws.quantize.rtn(weights, action="values", **options) for name, weights in every.items()}
    return losses(model, rounded, held_out)
