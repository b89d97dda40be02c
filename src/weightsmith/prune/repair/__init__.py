"""What is left is fitted again, so that each layer gives what it gave before.

The signature of the room: a *repair* ``(weight [out, in], gram [in, in], mask [out, in] or None, *, sparsity=) ->
[out, in]`` gives new values to what a mask keeps, exact zeros elsewhere; one that takes ``sparsity`` can choose the
mask as it goes. The room's loop lifts it to ``(weights, mask=None, *, stats, sparsity=, pattern=) -> Weights``, where
``weights`` are those *before* pruning. What trains a live module is ``(module, ...) -> module``.
"""

from weightsmith.card import table

METHODS = table()

__all__ = ["METHODS"]
