"""What theory says of networks, computed: critical starts, infinite widths, margins, memories.

The signature of the room: ``(activation, shape or small model) -> Report``.
"""

from weightsmith.card import table

METHODS = table()
