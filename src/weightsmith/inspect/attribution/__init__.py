"""Which inputs, weights and training examples an output is due to, and whether such answers can be believed.

The signature of the room: ``(model, inputs, ...) -> attributions`` of the inputs' shape, or ``-> Report``.
"""

from weightsmith.card import table

METHODS = table()
