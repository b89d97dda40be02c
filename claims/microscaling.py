"""Can a trained network be cast to eight bits with blocks that share a power of two, weights and inputs alike?

A small language model of the words of Python's library is trained in floats. Then all products of its linear layers
see both factors in blocks of 32 of a microscaling format. Nothing is calibrated or trained further. Training was
shortened from 250 to 120 steps and seeds from five to four after one seed, for time alone.
"""

from _small_language import batches, data, language, loss_of, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="microscaling",
    statement="cast directly to MXINT8, weights and inputs, a small language model loses at most 0.1 % on held-out "
    "text",
    method="MXINT8",
    baseline="float",
    higher_is_better=False,
    margin=-0.001,
    seeds=(0, 1, 2, 3),
)
FORMATS = {
    "MXINT8": ("mxint8", {}),
    "MXFP8, E4M3": ("mxfp8", {}),
    "MXFP8, E5M2": ("mxfp8", {"element": "e5m2"}),
    "MXFP6, E2M3": ("mxfp6", {}),
    "MXFP6, E3M2": ("mxfp6", {"element": "e3m2"}),
    "MXFP4": ("mxfp4", {}),
    "NVFP4": ("nvfp4", {}),
}


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text, as a share of those in floats."""
    training, held_out = data(seed)
    model = train(language(seed), batches(training, 120, seed))
    whole = loss_of(model, held_out)
    figures = {"float": 1.0, "float, nats a word": whole}
    for name, (word, settings) in FORMATS.items():
        with ws.quantize.low_precision(ws.quantize.grids.named(word, **settings)):
            figures[name] = loss_of(model, held_out) / whole
    return figures
