"""The mean of the latest checkpoints is where training would be some time later.

While the learning rate is high, the last checkpoint is one place of a noisy walk. The mean of the
latest few is nearer to the middle of where training is now, and unlike a mean of the whole run it
has forgotten where training was long ago.
"""

from __future__ import annotations

from collections.abc import Sequence

from weightsmith.average._parts import combination, opened_run
from weightsmith.average.room import Source
from weightsmith.card import card
from weightsmith.errors import Error
from weightsmith.weights import Weights


@card(
    paper="Kaddour 2022, 'Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight "
    "Averaging'",
    covers=("lawa",),
    unit="model",
    claim="in the middle of a run, the mean of the latest checkpoints is better than any of them",
)
def lawa(checkpoints: Sequence[Source], last: int = 6) -> Weights:
    r"""The mean of the latest checkpoints of a run.

    .. math:: w = \frac{1}{k} \sum_{i = n - k + 1}^{n} w_i

    of :math:`n` checkpoints, with :math:`k` the ``last`` of them.

    Args:
        checkpoints: of one run, usually one an epoch; anything that `weightsmith.open` opens. Paths that differ
            only in numbers (``checkpoint-900``, ``checkpoint-1000``) are put in that order; all others
            are taken from the earliest to the latest, as they stand.
        last: how many; all of them where there are fewer.

    Returns:
        Weights: lazy, in the dtypes of the checkpoints; computed in float32 or wider and rounded once. Running
        statistics of batch norms are averaged like weights, counters are those of the last checkpoint.

    Raises:
        ValueError: no checkpoint, ``last`` below 1, or checkpoints that are not of one architecture.

    >>> run = [{"w": torch.tensor([x])} for x in (9.0, 1.0, 2.0, 6.0)]
    >>> lawa(run, last=3)["w"]
    tensor([3.])
    """
    if last < 1:
        raise Error(f"lawa needs last= of at least 1, got {last}")
    latest = opened_run(checkpoints, "lawa")[-last:]
    return combination(latest, [1 / len(latest)] * len(latest), "average.lawa", {"last": last})
