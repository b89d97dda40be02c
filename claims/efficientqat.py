"""Does training weights, steps and zeros by block, then steps through the whole, beat learned rounding at 2 bits?

A small language model of the words of Python's library is trained, and the matrices of its blocks are quantized to 2
bits in groups of 32. The first phase learns by block on 4,096 words of the training text, the second trains the steps
alone on the language-model loss of the same words. Signed rounding (AutoRound) gets as many steps by block as both
phases together. Measured is the loss on held-out text. All was set before any figure was seen but the rates of the
first phase, which were set on blocks of another model.
"""

from typing import Any

import torch
from _digits import one_thread
from _learned_rounding import MATRICES, prepared
from _small_language import loss_of, next_word

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="efficientqat",
    statement="at 2 bits a small language model loses less on held-out text with both phases of EfficientQAT than "
    "with signed rounding",
    method="EfficientQAT",
    baseline="signed rounding",
    higher_is_better=False,
    seeds=(0, 1, 2),
)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    import copy

    model, words, held_out = prepared(seed)
    grid: Any = {"bits": 2, "group": 32, "symmetric": False, "pattern": MATRICES}
    learned: Any = {"blocks": "blocks", "seed": seed, **grid}
    quantize = ws.quantize
    first = quantize.reconstruct(model, words, "weights and steps", steps=100, **learned)
    texts: list[tuple[torch.Tensor, torch.Tensor]] = [(piece[:, :-1], piece[:, 1:]) for piece in words]
    made = {
        "nearest": quantize.rtn(model, **grid),
        "GPTQ": quantize.sequential(model, words, "gptq", blocks="blocks", **grid),
        "signed rounding": quantize.reconstruct(model, words, "signed rounding", steps=200, **learned),
        "first phase alone": first,
        "EfficientQAT": quantize.end_to_end(first, texts, model, steps=100, loss=next_word, seed=seed),
    }
    figures = {"whole": loss_of(model, held_out)}
    other = copy.deepcopy(model)
    for name, weights in made.items():
        quantize.dequantize(weights).load_into(other)
        figures[name] = loss_of(other, held_out)
    return figures
