"""Does it help to merge two siblings so that each layer keeps its outputs on each sibling's inputs?

A small network that knows all digits a little is fine-tuned twice: on the digits 0 to 4 and on 5 to 9.
Both are merged, without any training, to one that should know all ten. Only the inner products of the
layers' inputs are used, no label and no image.
"""

from _digits import one_thread
from _siblings import Family

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="regmean",
    statement="the regression mean of two fine-tunes on different digits is at least as accurate on all digits as "
    "their plain mean",
    method="regression mean",
    baseline="plain mean",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111),
    needs=("sklearn",),
)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Accuracies on test digits of all ten classes."""
    family = Family(seed)
    grams = [ws.stats.gram(model, [images]) for model, (images, _) in zip(family.models, family.tasks[1:], strict=True)]
    return {
        "regression mean": family.score(ws.merge.regmean(family.models, stats=grams)),
        "without shrinking": family.score(ws.merge.regmean(family.models, stats=grams, alpha=1.0)),
        "plain mean": family.score(ws.merge.mean(family.models)),
        "before fine-tuning": family.score(ws.open(family.base)),
    }
