"""Does it help to weigh each weight of two siblings by how sure each of them is of it?

A small network that knows all digits a little is fine-tuned twice: on the digits 0 to 4 and on 5 to 9.
Both are merged, without any training, to one that should know all ten.
"""

from _digits import one_thread
from _siblings import Family

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="fisher-merging",
    statement="the Fisher-weighted mean of two fine-tunes on different digits is at least as accurate on all digits as "
    "their plain mean",
    method="Fisher-weighted mean",
    baseline="plain mean",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110, 111),
    needs=("sklearn",),
)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Accuracies on test digits of all ten classes."""
    family = Family(seed)
    true, empirical = (
        [family.fisher(model, task, labels) for task, model in enumerate(family.models, start=1)]
        for labels in ("all", "given")
    )
    return {
        "Fisher-weighted mean": family.score(ws.merge.fisher(family.models, stats=true)),
        "with the empirical Fisher": family.score(ws.merge.fisher(family.models, stats=empirical)),
        "plain mean": family.score(ws.merge.mean(family.models)),
        "before fine-tuning": family.score(ws.open(family.base)),
        "one fine-tune": family.score(ws.open(family.models[0])),
    }
