"""How much each tensor loses.

The signature of the room: ``(weights or measured curves, sparsity, ...) -> {tensor: share removed}``, which every
method of ``prune`` takes as its ``sparsity``. The shares remove ``sparsity`` of all elements together.
"""

from weightsmith.card import table

METHODS = table()

__all__ = ["METHODS"]
