"""Do codes under a searched power beat evenly spaced ones?

The blocks of a small language model of the words of Python's library are rounded to nearest at three bits with one
scale a row, without data, and column by column with it. The baseline is the better one of two even grids by held-out
loss: half a step beyond the largest weight, and just as far. Training was shortened from 250 to 120 steps and seeds
from five to four after one seed, for time alone.
"""

import copy

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="nupes",
    statement="at 3 bits with one scale a row, rounded to nearest without data, a small language model loses less on a "
    "power grid of searched exponent than on even grids",
    method="power",
    baseline="even, the better one",
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
    grids = quantize.grids
    narrow, full = grids.Integer(3, span="narrow"), grids.Integer(3)
    made = {
        "even, narrow": quantize.rtn(model, grid=narrow, pattern=names),
        "even, full": quantize.rtn(model, grid=full, pattern=names),
        "power": quantize.nupes(model, grid=grids.Power(3), pattern=names),
        "power, an exponent a row": quantize.nupes(model, grid=grids.Power(3, each="group"), pattern=names),
        "power, by outputs": quantize.nupes(model, stats=gram, grid=grids.Power(3), pattern=names),
        "even, full, GPTQ": quantize.gptq(model, stats=gram, grid=full, pattern=names),
        "power, GPTQ": quantize.gptq(model, stats=gram, grid=grids.Power(3), pattern=names),
    }
    figures = {"whole": loss_of(model, held_out)}
    scratch = copy.deepcopy(model)
    for name, coded in made.items():
        quantize.dequantize(coded, "float32").load_into(scratch)
        figures[name] = loss_of(scratch, held_out)
    return figures | {"even, the better one": min(figures["even, narrow"], figures["even, full"])}
