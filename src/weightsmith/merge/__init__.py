"""Several models of one architecture into one.

The signature of the room: ``(models [k, *shape], base [*shape], **options) -> [*shape]`` on
tensors, lifted to ``(models, base=None, **options) -> Weights``. Methods that choose among whole
models (`greedy_soup`) take an ``evaluate`` instead of a base. Tensors that hold no floats (counters,
masks) come from the base, or else from the first model.
"""

from weightsmith.card import table
from weightsmith.merge import _mean, _model_stock
from weightsmith.merge._soups import greedy_soup
from weightsmith.merge.room import Merge, lift

mean: Merge = lift(_mean.mean)
model_stock: Merge = lift(_model_stock.model_stock)

METHODS = table(mean, model_stock, greedy_soup)

__all__ = ["METHODS", "Merge", "greedy_soup", "lift", "mean", "model_stock"]
