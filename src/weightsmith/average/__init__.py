"""One better model out of the moments of one training run.

The signature of the room: a kernel ``(mean [*shape], weight [*shape], count, **options) -> [*shape]``
that folds the next moment into what is kept, lifted to an `Average` with ``update(model)`` and
``weights()``. What is kept is float32 whatever the model's dtype: in bfloat16 an average with a decay
of 0.999 would never move.
"""

from weightsmith.average import _swa
from weightsmith.average.room import Average, Info, State, init, lift, step
from weightsmith.card import table

swa = lift(_swa.swa)

METHODS = table(swa)

__all__ = ["METHODS", "Average", "Info", "State", "init", "lift", "step", "swa"]
