"""Do codebooks of groups of rows, learnt together with the indices, keep a language model better than one codebook?

A small language model of the words of Python's library is trained, and every matrix of its blocks becomes indices of
two bits into codebooks, from Gram matrices of 4,096 words of its training text. The baseline has one codebook a matrix
and learns it and the indices in the same way; the other figures take one thing away at a time, and beside them stand
evenly spaced grids of two bits with a scale for each row. Bits, groups and steps were set before any figure of this
claim was seen; the rate of the moves was chosen on two matrices of another model, a text encoder.
"""

import copy
from typing import Any

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="network-memory-footprint-compression",
    statement="at two bits a weight a small language model loses less on held-out text with eight codebooks a matrix, "
    "learnt together with the indices on data, than with one codebook learnt so",
    method="eight codebooks",
    baseline="one codebook",
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
    share: Any = ws.share.grouped_codebooks
    chosen: dict[str, Any] = {"stats": gram, "bits": 2, "pattern": list(gram)}
    coded = {
        "eight codebooks": share(model, **chosen, groups=8),
        "one codebook": share(model, **chosen, groups=1),
        "eight codebooks, indices as they were": share(model, **chosen, groups=8, steps=0, sweeps=0),
        "eight codebooks, proximal moves alone": share(model, **chosen, groups=8, sweeps=0),
        "eight codebooks, no data": share(model, bits=2, pattern=list(gram), groups=8),
    }
    figures = {"whole": loss_of(model, held_out)}
    made = copy.deepcopy(model)
    for name, weights in coded.items():
        ws.share.decode(weights).load_into(made)
        figures[name] = loss_of(made, held_out)
    ws.quantize.dequantize(ws.quantize.rtn(model, bits=2, pattern=list(gram))).load_into(made)
    figures["a scale a row, rounded to nearest"] = loss_of(made, held_out)
    return figures
