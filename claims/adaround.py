"""Does learning which way each weight goes beat the nearest point with the best range?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to 3
bits, one step a row as in the paper, all from the same Gram matrices of 4,096 words of its training text. Both sides
search the range of each row by the error of its outputs. GPTQ, which may move weights further than to a neighbour,
stands beside them. Measured is the divergence from the whole model on held-out text. All was set before any figure was
seen but the rate, the pull and the steps of AdaRound, which were set on layers of another model.
"""

from typing import Any

from _learned_rounding import MATRICES, figures_of, prepared

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="adaround",
    statement="at 3 bits a small language model says more nearly what it said with AdaRound than rounded to nearest",
    method="AdaRound",
    baseline="nearest, ranges by outputs",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Nats a word from the whole model, on held-out text."""
    model, words, held_out = prepared(seed)
    gram = ws.stats.gram(model, words, pattern=MATRICES)
    grid: Any = {"bits": 3, "symmetric": False, "pattern": MATRICES, "action": "values"}
    quantize = ws.quantize
    made = {
        "nearest": quantize.rtn(model, **grid),
        "nearest, ranges by outputs": quantize.rtn(model, stats=gram, clip=16, **grid),
        "GPTQ": quantize.gptq(model, stats=gram, clip=16, **grid),
        "AdaRound": quantize.adaround(model, stats=gram, clip=16, **grid),
    }
    return figures_of(model, made, held_out)
