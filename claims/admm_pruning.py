"""Does choosing and refitting by turns leave a language model better than pruning column by column?

A small language model of the words of Python's library is trained and loses six tenths of the weights of its blocks,
once with each method, all from the same Gram matrices of 4,096 words of its training text. What is left is not trained.
The sparsity was set before any figure was seen; training was then shortened from 500 to 200 steps, for time
alone, after one seed.
"""

import copy
import functools
from typing import Any

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="admm-pruning",
    statement="at 60 % sparsity of the blocks of a small language model, ADMM loses less on held-out text than "
    "SparseGPT",
    method="ADMM",
    baseline="SparseGPT",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
BLOCKS = "blocks.*"


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 200, seed))
    words = [batch[0] for batch in batches(training, 4, seed + 1000)]
    gram = ws.stats.gram(model, words, pattern=BLOCKS)
    repair, share = ws.prune.repair, 0.6
    pick: Any = functools.partial(ws.prune.wanda, pattern=list(gram))
    masks = pick(model, share, stats=gram, action="mask")
    pruned = {
        "magnitude": ws.prune.magnitude(model, share, pattern=list(gram)),
        "Wanda": pick(model, share, stats=gram),
        "Wanda, refitted": repair.least_squares(model, masks, stats=gram),
        "SparseGPT": repair.sparsegpt(model, stats=gram, sparsity=share, pattern=list(gram)),
        "ADMM": repair.admm(model, stats=gram, sparsity=share, pattern=list(gram)),
        "ADMM, Gram matrices shrunk": repair.admm(
            model, stats=gram, sparsity=share, pattern=list(gram), damp=0.0, shrink=0.3
        ),
    }
    figures = {"whole": loss_of(model, held_out)}
    made = copy.deepcopy(model)
    for name, weights in pruned.items():
        weights.load_into(made)
        figures[name] = loss_of(made, held_out)
    return figures
