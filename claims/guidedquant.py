"""Do Gram matrices that know the loss of the network leave it better than plain ones, with the same rounding?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to tables
of 8 levels a row, by the same method and from the same 256 pieces of its training text: once with plain Gram matrices,
once with those whose rows count as much as the loss depends on the outputs that they make, for 4 runs of outputs. The
figures are nats a word on held-out text. Also told: column by column on the same tables, and even spacing. Three bits
and four runs were set before any figure was seen.
"""

import copy

from _small_language import batches, data, language, loss_of, next_word, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="guidedquant",
    statement="with 8 levels a row a small language model loses less where Gram matrices are weighted with the loss's "
    "gradients than with plain ones",
    method="guided",
    baseline="plain",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
BLOCKS = "blocks.*"


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 200, seed))
    pieces = batches(training, 8, seed + 1000)
    gram = ws.stats.gram(model, [words for words, _ in pieces], pattern=BLOCKS)
    names, quantize = list(gram), ws.quantize
    guided = ws.stats.guided_gram(model, pieces, groups=4, pattern=names, loss=next_word)
    common = {"pattern": names, "bits": 3, "action": "values"}
    made = {
        "nearest": quantize.rtn(model, grid="levels", **common),
        "GPTQ, even spacing": quantize.gptq(model, stats=gram, symmetric=False, **common),
        "GPTQ, even spacing, guided": quantize.gptq(model, stats=guided, symmetric=False, **common),
        "GPTQ": quantize.gptq(model, stats=gram, grid="levels", **common),
        "plain": quantize.lnq(model, stats=gram, **common),
        "guided": quantize.lnq(model, stats=guided, **common),
    }
    figures = {"whole": loss_of(model, held_out)}
    copied = copy.deepcopy(model)
    for name, weights in made.items():
        weights.load_into(copied)
        figures[name] = loss_of(copied, held_out)
    return figures
