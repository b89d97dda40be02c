"""Can mixtures of experts that were fitted on four machines become one, without their data?

On each machine a mixture of two linear experts predicts from the upper half of a digit (its first principal
directions) how much ink lies in a part of the lower half. The four are reduced to one with inputs alone. The baseline
averages their parameters, the experts of every machine ordered by their constants. The mixture of all four, which
has four times the experts, and one fitted on all data are measured beside them.
"""

import torch
from _digits import one_thread, split
from torch import Tensor

from weightsmith.claims import Claim
from weightsmith.merge.moe import Mixture, expected, fit, reduce_mixture

CLAIM = Claim(
    key="distributed-learning-mixtures-experts",
    statement="the reduction of four machines' mixtures predicts with a smaller squared error than the average of "
    "their parameters",
    method="reduced",
    baseline="average of parameters",
    higher_is_better=False,
    seeds=(100, 101, 102, 103, 104, 105),
    needs=("sklearn",),
)
MACHINES, EACH, DIRECTIONS, EXPERTS = 4, 200, 4, 2


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Mean squared errors on test digits, in units of the targets' variance."""
    (learn, _), (test, _) = split(seed, [MACHINES * EACH])
    (inputs, goals), (held_out, right) = prepared(learn, learn), prepared(learn, test)
    parts = zip(inputs.split(EACH), goals.split(EACH), strict=True)
    local = [fit(x, y, EXPERTS, steps=40, starts=2, seed=seed + number) for number, (x, y) in enumerate(parts)]
    machines = Mixture(*(torch.stack(part) for part in zip(*local, strict=True)))
    order = machines.experts[..., -1].argsort(dim=1)
    averaged = Mixture(
        machines.gates.take_along_dim(order[..., None], 1).mean(0),
        machines.experts.take_along_dim(order[..., None], 1).mean(0),
        machines.variances.take_along_dim(order, 1).mean(0),
    )
    predictions = {
        "reduced": expected(reduce_mixture(machines, inputs[:EACH]).mixture, held_out),
        "average of parameters": expected(averaged, held_out),
        "all experts": expected(machines, held_out).mean(0),
        "fitted on all data": expected(fit(inputs, goals, EXPERTS, steps=40, starts=2, seed=seed), held_out),
    }
    figures = {name: float((found - right).square().mean()) for name, found in predictions.items()}
    alone = [float((found - right).square().mean()) for found in expected(machines, held_out)]
    return figures | {"one machine": sum(alone) / MACHINES}


def prepared(seen: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of unit size, and targets of unit variance, by what was ``seen``."""
    centre = seen[:, :32].mean(0)
    _, sizes, directions = torch.linalg.svd(seen[:, :32] - centre, full_matrices=False)
    scale = sizes[:DIRECTIONS] / len(seen) ** 0.5
    inputs = (images[:, :32] - centre) @ directions[:DIRECTIONS].T / scale
    ink, known = (part[:, 32:].reshape(-1, 4, 8)[:, 2, :4].sum(1) for part in (images, seen))
    return inputs.double(), ((ink - known.mean()) / known.std()).double()
