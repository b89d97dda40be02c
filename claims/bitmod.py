"""Does a choice of tables by group beat evenly spaced points with a zero of their own at three bits?

The blocks of a small language model of the words of Python's library are rounded to nearest at three bits in groups
of 64, without data; and with ranges searched by the error of outputs, for both. Scales of integers have 16 bits and
their zeros 8, those of mixed tables 8 and their tables 8. Training was shortened from 250 to 120 steps and seeds from
five to four after one seed, for time alone.
"""

import copy

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="bitmod",
    statement="at 3 bits in groups of 64, rounded to nearest without data, a small language model loses less with "
    "mixed tables than with integers that have a zero point",
    method="mixed tables",
    baseline="integers",
    higher_is_better=False,
    seeds=(0, 1, 2, 3),
)
BLOCKS = "blocks.*.weight"


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 120, seed))
    gram = ws.stats.gram(model, [batch[0] for batch in batches(training, 4, seed + 1000)], pattern=BLOCKS)
    quantize, names = ws.quantize, list(gram)
    integers = {"bits": 3, "group": 64, "symmetric": False, "scale_dtype": "float16", "pattern": names}
    tables = {"grid": quantize.grids.MixedTypes(3, 64), "pattern": names}
    made = {
        "integers": quantize.rtn(model, **integers),
        "mixed tables": quantize.bitmod(model, **tables),
        "integers, ranges searched": quantize.rtn(model, stats=gram, clip=10, **integers),
        "mixed tables, ranges searched": quantize.bitmod(model, stats=gram, clip=10, **tables),
        "integers, GPTQ": quantize.gptq(model, stats=gram, **integers),
        "mixed tables, GPTQ": quantize.gptq(model, stats=gram, **tables),
    }
    figures = {"whole": loss_of(model, held_out)}
    scratch = copy.deepcopy(model)
    for name, coded in made.items():
        quantize.dequantize(coded, "float32").load_into(scratch)
        figures[name] = loss_of(scratch, held_out)
    return figures
