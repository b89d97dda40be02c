"""Whether one model is better than another: metrics, intervals, tests, calibration, fairness.

The signature of the room: ``(predictions, targets, ...) -> figure or Report``.
"""

from weightsmith.card import table

METHODS = table()
