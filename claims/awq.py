"""Does rescaling by the inputs' sizes help rounding to nearest on text that it was not found with?

A small language model of the words of Python's library is trained, and the matrices of its blocks are rounded to 3 bits
in groups of 32, all with what 4,096 words of its training text tell. Ranges of groups are searched by output error on
both sides, so that what is measured is the rescaling alone; the figures without that search, and with errors made up
for column by column, are beside them. Bits and groups were set before any figure was seen.
"""

from typing import Any

from _rescaled import BLOCKS, gains, graph_of, losses, trained

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize import transforms

CLAIM = Claim(
    key="awq",
    statement="at 3 bits in groups of 32 the blocks of a small language model, rescaled, lose less on held-out text "
    "when they are rounded to nearest (ranges searched on both sides)",
    method="AWQ",
    baseline="nearest",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Nats a word on held-out text."""
    model, words, held_out = trained(seed)
    options: dict[str, Any] = {"bits": 3, "group": 32, "symmetric": False, "pattern": BLOCKS}
    graph = graph_of(model, words[0])
    searched = transforms.awq(model, words, graph=graph, gains=gains(), clip=10, **options)
    plain = transforms.awq(model, words, graph=graph, gains=gains(), **options)
    rounded = {"action": "values", "propagate": "dense", "model": model, **options}
    every = {
        "nearest": ws.quantize.sequential(model, words, "rtn", clip=10, **rounded),
        "AWQ": ws.quantize.sequential(searched, words, "rtn", clip=10, **rounded),
        "nearest, whole ranges": ws.quantize.rtn(model, action="values", **options),
        "AWQ, whole ranges": ws.quantize.rtn(plain, action="values", **options),
        "GPTQ": ws.quantize.sequential(model, words, "gptq", **rounded),
        "AWQ, then GPTQ": ws.quantize.sequential(plain, words, "gptq", **rounded),
    }
    return losses(model, every, held_out)
