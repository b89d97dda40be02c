"""Does a language model lose less where tokens count as much as attention they receive?

A small language model of the words of Python's library is trained, and its blocks are rounded one after another with
GPTQ to 3 bits in groups of 32, from the same 256 pieces of its training text: once with all tokens alike, once with
weights between 0.01 and 1 by the attention that each receives in the block. The figures are nats a word on held-out
text. Nothing is rotated in either. Also told: weights between 0.2 and 1, and the first half of each text alone.
"""

import copy

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="rsq",
    statement="with 3 bits in groups of 32 a small language model loses less where tokens count by the attention that "
    "they receive than where all count alike",
    method="by attention",
    baseline="all alike",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 200, seed))
    words = [words for words, _ in batches(training, 8, seed + 1000)]
    common = {"blocks": "blocks", "bits": 3, "group": 32, "symmetric": False, "action": "values"}
    made = {
        "nearest": ws.quantize.sequential(model, words, "rtn", **common),
        "all alike": ws.quantize.sequential(model, words, "gptq", **common),
        "by attention": ws.quantize.rsq(model, words, "gptq", **common),
        "by attention, at least 0.2": ws.quantize.rsq(model, words, "gptq", low=0.2, **common),
        "first half": ws.quantize.sequential(model, words, "gptq", gram=ws.stats.Gram(tokens=_first_half), **common),
    }
    figures = {"whole": loss_of(model, held_out)}
    copied = copy.deepcopy(model)
    for name, weights in made.items():
        weights.load_into(copied)
        figures[name] = loss_of(copied, held_out)
    return figures


def _first_half(batch):
    """Weights that look at positions alone: what comes first is what most tokens attend to."""
    count, length = batch["hidden"].shape[:2]
    weights = batch["hidden"].new_zeros(count, length)
    weights[:, : length // 2] = 1
    return weights
