"""Sparsity along training: masks that move, penalties and parametrizations that make weights removable.

The signature of the room: a *rule* ``(step, weights, gradients, momenta, masks, generator) -> masks`` and a controller
that puts it on any optimizer; a *penalty* ``(weights) -> number``; a parametrization with ``fold``; or a training
driver ``(module, train, ...) -> module`` where ``train(module)`` is yours.
"""

from weightsmith.card import table

METHODS = table()

__all__ = ["METHODS"]
