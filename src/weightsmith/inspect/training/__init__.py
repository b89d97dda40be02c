"""What a training run does to weights, seen while it runs or from its checkpoints.

The signature of the room: ``(model or checkpoints, data?) -> Report``, or a recorder whose ``step`` is called in a
training loop and whose ``report()`` says what it saw.
"""

from weightsmith.card import table

METHODS = table()
