"""How loss and score change with size, data, compute and time: laws fitted to runs, and what they predict.

The signature of the room: ``(table of runs, form) -> Law`` with ``predict``, ``optimal``, intervals and ``report()``.
"""

from weightsmith.card import table

METHODS = table()
