"""Do task vectors add up better when they are scaled by the curvatures of their tasks?

A small network that knows all digits a little is fine-tuned twice: on the digits 0 to 4 and on 5 to 9.
Both task vectors are added to it, without any training.
"""

from _digits import one_thread
from _siblings import Family

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="uncertainty-gradient-matching",
    statement="two task vectors added with gradient matching are at least as accurate on the digits of both as the "
    "Fisher-weighted mean",
    method="gradient matching",
    baseline="Fisher-weighted mean",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111),
    needs=("sklearn",),
)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Accuracies on test digits of all ten classes."""
    family = Family(seed)
    models, base = family.models, family.base
    own = family.fisher(base, 0)
    tasks = [family.fisher(model, task) for task, model in enumerate(models, start=1)]
    matched = ws.merge.gradient_matching(models, base=base, stats=[*tasks, own])
    return {
        "gradient matching": family.score(matched),
        "Fisher-weighted mean": family.score(ws.merge.fisher(models, stats=tasks)),
        "sum of task vectors": family.score(ws.merge.mean([*models, base], weight=[1, 1, -1])),
        "plain mean": family.score(ws.merge.mean(models)),
        "before fine-tuning": family.score(ws.open(base)),
    }
