"""Is a weight that may move over several points, on a grid that learns too, better than one that goes up or down?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to 3
bits, one step a row, all from the same Gram matrices of 4,096 words of its training text. Both learn with as many
steps, from ranges that were searched by the error of outputs. Measured is the divergence from the whole model on
held-out text. All was set before any figure was seen but the rates, which were set on layers of another model.
"""

from typing import Any

from _learned_rounding import MATRICES, figures_of, prepared

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="flexround",
    statement="at 3 bits a small language model says more nearly what it said with FlexRound than with AdaRound",
    method="FlexRound",
    baseline="AdaRound",
    higher_is_better=False,
    seeds=(0, 1, 2, 3),
)


def measure(seed: int) -> dict[str, float]:
    """Nats a word from the whole model, on held-out text."""
    model, words, held_out = prepared(seed)
    gram = ws.stats.gram(model, words, pattern=MATRICES)
    grid: Any = {"bits": 3, "symmetric": False, "pattern": MATRICES, "action": "values", "clip": 16, "stats": gram}
    quantize = ws.quantize
    made = {
        "nearest, ranges by outputs": quantize.rtn(model, **grid),
        "GPTQ": quantize.gptq(model, **grid),
        "AdaRound": quantize.adaround(model, steps=300, **grid),
        "FlexRound": quantize.flexround(model, steps=300, **grid),
    }
    return figures_of(model, made, held_out)
