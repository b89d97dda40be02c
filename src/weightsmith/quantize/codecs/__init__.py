"""One codec for what is not a layer's weight: states of optimizers, messages between processes, tensors in files.

A `BlockCodec` makes `Blocks` of any tensor and a tensor of those: ``encode(values) -> blocks``,
``decode(blocks) -> values``. Its settings are separate: the table of values, the bits, the length of a block, how it
rounds. Over that stand sums and gathers of processes in which codes travel, and a lattice for weights that are trained.
"""

from weightsmith.card import table
from weightsmith.quantize.codecs._blocks import BlockCodec, Blocks
from weightsmith.quantize.codecs._codebooks import dynamic_codebook, linear_codebook, quantile_codebook
from weightsmith.quantize.codecs._lattice import onto_lattice
from weightsmith.quantize.codecs._sharded import send_codes
from weightsmith.quantize.codecs._wire import Wire, gathered, mean_gradients, scattered_sum

METHODS = table(gathered, onto_lattice, scattered_sum, send_codes)

__all__ = [
    "METHODS",
    "BlockCodec",
    "Blocks",
    "Wire",
    "dynamic_codebook",
    "gathered",
    "linear_codebook",
    "mean_gradients",
    "onto_lattice",
    "quantile_codebook",
    "scattered_sum",
    "send_codes",
]
