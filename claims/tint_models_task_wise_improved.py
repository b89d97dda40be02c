"""Does one private layer a task help beyond learned coefficients?

A network that knows digits upright, turned by a quarter and turned by a half is fine-tuned on each. The three are
merged with coefficients that are learned from unlabelled digits, by agreement with the fine-tunes, with and without a
private copy of the second hidden layer for each task. Both are trained alike. (That the private layer needs to be
told the task is its price.)

Which layer is private, and the training of the fine-tunes, were settled on seeds 0 to 2, where test figures were seen.
"""

from _digits import one_thread
from _rotations import Tasks

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="tint-models-task-wise-improved",
    statement="with one private layer for each of three tasks a merge is more accurate on them than with learned "
    "coefficients alone",
    method="private layer",
    baseline="learned coefficients",
    seeds=(100, 101, 102, 103, 104, 105, 106, 107),
    needs=("sklearn",),
)
STEPS = 300


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Mean accuracies on the test digits of all tasks."""
    tasks = Tasks(seed)
    given = (tasks.models, tasks.base, tasks.base, tasks.unlabelled)
    merged = {
        "learned coefficients": ws.merge.adamerging(*given, loss="agreement", steps=STEPS, rate=1e-2),
        "learned by entropy": ws.merge.adamerging(*given, loss="entropy", steps=STEPS, rate=1e-3),
        "best single coefficient": tasks.best_single()[1],
        "before fine-tuning": ws.open(tasks.base),
    }
    tinted = {
        "private layer": ws.merge.tint(*given, "2.*", steps=STEPS),
        "private layer, confident": ws.merge.tint(*given, "2.*", loss="confident", steps=STEPS),
    }
    figures = {name: tasks.accuracies(model, tasks.test) for name, model in merged.items()}
    for name, found in tinted.items():
        figures[name] = tasks.accuracies([found.task(number) for number in range(3)], tasks.test)
    return figures | {"three fine-tunes": tasks.accuracies(list(map(ws.open, tasks.models)), tasks.test)}
