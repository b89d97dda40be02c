"""Does binarizing salient columns twice and splitting the rest beat one bit column by column?

The blocks of a language model of width 128 of the words of Python's library are binarized in blocks of 128 columns,
from Gram matrices of 4,096 words. Stored as they are, BiLLM's codes take two bits and its magnitudes half a bit, so
that GPTQ with two bits in groups of 64 and a zero point (2.375 bits) stands beside them. The paper counts neither the
bit that says to which part a weight belongs nor magnitudes. Training was shortened from 200 to 120 steps and seeds
from five to four after one seed, for time alone.
"""

import copy

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="billm",
    statement="the blocks of a small language model binarized by BiLLM lose less on held-out text than with GPTQ at "
    "one bit",
    method="BiLLM",
    baseline="GPTQ, 1 bit",
    higher_is_better=False,
    seeds=(0, 1, 2, 3),
)
BLOCKS = "blocks.*.weight"


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    training, held_out = data(seed)
    model = train(language(seed, 128, 8, 256, 3), batches(training, 120, seed))
    gram = ws.stats.gram(model, [batch[0] for batch in batches(training, 4, seed + 1000)], pattern=BLOCKS)
    quantize, names = ws.quantize, list(gram)
    sign = quantize.grids.Sign(128)
    two = {"bits": 2, "group": 64, "symmetric": False, "scale_dtype": "float16", "pattern": names}
    made = {
        "signs": quantize.rtn(model, grid=sign, pattern=names),
        "GPTQ, 1 bit": quantize.gptq(model, stats=gram, grid=sign, pattern=names),
        "BiLLM": quantize.billm(model, stats=gram, scale_dtype="float16", pattern=names),
        "BiLLM, no column binarized twice": quantize.billm(model, stats=gram, salient=0, pattern=names),
        "GPTQ, 2 bits": quantize.gptq(model, stats=gram, **two),
        "GPTQ, 2 bits, ranges searched": quantize.gptq(model, stats=gram, clip=10, **two),
    }
    figures = {"whole": loss_of(model, held_out)}
    scratch = copy.deepcopy(model)
    for name, coded in made.items():
        quantize.dequantize(coded, "float32").load_into(scratch)
        figures[name] = loss_of(scratch, held_out)
    return figures
