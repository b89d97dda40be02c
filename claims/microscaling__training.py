"""Does a language model learn as well when all of its linear products are in six bits?

A small language model of the words of Python's library is trained twice from one start on the same text: in floats, and
with weights, inputs and gradients in blocks of 32 of MXFP6 (E3M2), forwards and backwards. Weights are kept in floats
and both are measured as they were trained. The number of steps was set for time alone.
"""

from _small_language import batches, data, language, loss_of, next_word, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="microscaling",
    variant="training",
    statement="trained and run with MXFP6 weights, inputs and gradients a small language model ends within 2 % of the "
    "held-out loss of the same training in floats",
    method="MXFP6",
    baseline="float",
    higher_is_better=False,
    margin=-0.02,
    seeds=(0, 1, 2),
)
FORMATS = {"MXFP6": ("mxfp6", {"element": "e3m2"}), "MXFP4": ("mxfp4", {})}


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text, as a share of those in floats."""
    training, held_out = data(seed)
    steps = batches(training, 80, seed, size=16)
    whole = loss_of(train(language(seed, layers=2), steps), held_out)
    figures = {"float": 1.0, "float, nats a word": whole}
    for name, (word, settings) in FORMATS.items():
        grid = ws.quantize.grids.named(word, **settings)

        def loss(model, batch, grid=grid):
            with ws.quantize.low_precision(grid):
                return next_word(model, batch) / len(batch[0])

        model = train(language(seed, layers=2), steps, loss=loss)
        with ws.quantize.low_precision(grid):
            figures[name] = loss_of(model, held_out) / whole
    return figures
