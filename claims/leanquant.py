"""Does a grid that is fitted where errors cost most leave a language model better than one fitted to all alike?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded column by
column to tables of 4 levels a row, from the same Gram matrices of its training text: once with tables of plain k-means,
once of k-means weighted with the fourth power of what errors cost. The figures are nats a word on held-out text. Also
told: other powers (2 became the default of the library after a first look at seed 0), and evenly spaced grids.
"""

import copy

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="leanquant",
    statement="with 4 levels a row, rounded column by column, a small language model loses less where tables are "
    "fitted to the cost of errors than where all weights count alike",
    method="cost of errors",
    baseline="k-means",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
BLOCKS = "blocks.*"


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 200, seed))
    gram = ws.stats.gram(model, [words for words, _ in batches(training, 8, seed + 1000)], pattern=BLOCKS)
    quantize = ws.quantize
    common = {"pattern": list(gram), "stats": gram, "bits": 2, "action": "values"}
    tables = {**common, "grid": "levels"}
    made = {
        "k-means": quantize.gptq(model, **tables),
        "cost of errors": quantize.leanquant(model, power=4.0, **tables),
        "cost of errors, power 1": quantize.leanquant(model, power=1.0, **tables),
        "cost of errors, power 2": quantize.leanquant(model, power=2.0, **tables),
        "even spacing": quantize.gptq(model, symmetric=False, clip=0, **common),
        "even spacing, clipped by output error": quantize.gptq(model, symmetric=False, clip=16, **common),
        "even spacing, cost of errors": quantize.leanquant(model, symmetric=False, power=4.0, **common),
        "even spacing, cost of errors, power 1": quantize.leanquant(model, symmetric=False, power=1.0, **common),
    }
    figures = {"whole": loss_of(model, held_out)}
    copied = copy.deepcopy(model)
    for name, weights in made.items():
        weights.load_into(copied)
        figures[name] = loss_of(copied, held_out)
    return figures
