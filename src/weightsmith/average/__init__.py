"""One better model out of the moments of one training run.

The signature of the room: a kernel ``(mean [*shape], weight [*shape], count, **options) -> [*shape]``
that folds the next moment into what is kept, lifted to an `Average` with ``update(model)`` and
``weights()``. What is kept is float32 whatever the model's dtype: in bfloat16 an average with a decay
of 0.999 would never move. Methods for a run that is over (`lawa`, `lcsc`, `post_hoc_ema`) take the
checkpoints that it left: ``(checkpoints, **options) -> Weights``.
"""

from weightsmith.average import _power_ema, _swa
from weightsmith.average._lawa import lawa
from weightsmith.average._lcsc import lcsc
from weightsmith.average._parts import by_step
from weightsmith.average._post_hoc import ema_coefficients, post_hoc_ema, profile_of
from weightsmith.average.room import Average, Info, State, init, lift, step
from weightsmith.card import table

swa = lift(_swa.swa)
power_ema = lift(_power_ema.power_ema)

METHODS = table(swa, power_ema, lawa, lcsc, post_hoc_ema)

__all__ = [
    "METHODS",
    "Average",
    "Info",
    "State",
    "by_step",
    "ema_coefficients",
    "init",
    "lawa",
    "lcsc",
    "lift",
    "post_hoc_ema",
    "power_ema",
    "profile_of",
    "step",
    "swa",
]
