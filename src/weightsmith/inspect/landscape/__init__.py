"""The loss around and between checkpoints: lines, planes, paths, barriers, curvature, volume.

The signature of the room: ``(model, loss, data, ...) -> Report``. A loss is ``loss(model) -> tensor``, a number
for the data that it closes over, or ``loss(model, batch)`` with batches; the model is left as it was.
"""

from weightsmith.card import table

METHODS = table()
