"""What is left is fitted again, so that each layer gives what it gave before.

The signature of the room: a *repair* ``(weight [out, in], gram [in, in], mask [out, in] or None, *, sparsity=) ->
[out, in]`` gives new values to what a mask keeps, exact zeros elsewhere; one that takes ``sparsity`` can choose the
mask as it goes. The room's loop lifts it to ``(weights, mask=None, *, stats, sparsity=, pattern=) -> Weights``, where
``weights`` are those *before* pruning. What trains a live module is ``(module, ...) -> module``.

The better a repair fits the data it is given, the worse it may do on other texts: draw the Gram matrix to its diagonal
with ``shrink=`` (0.2 to 0.4) where they differ.
"""

from weightsmith.card import table
from weightsmith.prune.repair import _admm, _least_squares, _sparsegpt
from weightsmith.prune.repair._bias import bias_correction
from weightsmith.prune.repair._heal import Stage, heal, heal_weights
from weightsmith.prune.repair._lora import masked_lora, scale_lora
from weightsmith.prune.repair._reconstruct import reconstruct
from weightsmith.prune.repair._small import Part, trainable
from weightsmith.prune.repair.room import Repair, lift

admm: Repair = lift(_admm.admm)
least_squares: Repair = lift(_least_squares.least_squares)
sparsegpt: Repair = lift(_sparsegpt.sparsegpt)

METHODS = table(
    admm,
    bias_correction,
    heal,
    heal_weights,
    least_squares,
    masked_lora,
    reconstruct,
    scale_lora,
    sparsegpt,
    trainable,
)

__all__ = [
    "METHODS",
    "Part",
    "Repair",
    "Stage",
    "admm",
    "bias_correction",
    "heal",
    "heal_weights",
    "least_squares",
    "lift",
    "masked_lora",
    "reconstruct",
    "scale_lora",
    "sparsegpt",
    "trainable",
]
