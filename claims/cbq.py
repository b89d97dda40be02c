"""Do blocks that learn together, window after window, beat blocks that learn one by one?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to 2
bits in groups of 32, with thin sliders and steps that learn, on 4,096 words of its training text. Windows of two blocks
that overlap by one learn each block twice; blocks alone therefore get twice the steps. The windows learn on both
inputs, as the paper says; blocks alone on those of quantized blocks. Measured is the divergence from the whole model on
held-out text. All was set before any figure was seen but the rates, which were set on blocks of another model.
"""

from typing import Any

from _digits import one_thread
from _learned_rounding import MATRICES, figures_of, prepared

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="cbq",
    statement="at 2 bits a small language model says more nearly what it said if overlapping windows of two blocks "
    "learn their rounding together than if each block learns alone",
    method="windows of two",
    baseline="blocks alone",
    higher_is_better=False,
    seeds=(0, 1, 2),
)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Nats a word from the whole model, on held-out text."""
    model, words, held_out = prepared(seed)
    grid: Any = {"bits": 2, "group": 32, "symmetric": False, "pattern": MATRICES, "action": "values"}
    thin: Any = {"train": "low-rank rounding", "blocks": "blocks", "seed": seed, **grid}
    two: Any = {"window": 2, "overlap": 1, "steps": 100}
    quantize = ws.quantize
    made = {
        "nearest": quantize.rtn(model, **grid),
        "GPTQ": quantize.sequential(model, words, "gptq", blocks="blocks", **grid),
        "blocks alone": quantize.reconstruct(model, words, steps=200, **thin),
        "windows of two, inputs of quantized blocks": quantize.reconstruct(model, words, **two, **thin),
        "windows of two": quantize.reconstruct(model, words, propagate="both", **two, **thin),
    }
    return figures_of(model, made, held_out)
