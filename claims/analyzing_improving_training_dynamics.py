"""Can an average of another length be made after training, from snapshots of two averages?

A small network learns digits for 1,200 steps. Averages of ``sigma_rel`` 0.05 and 0.1 are updated at
every step and stored 20 times; one of 0.15 is kept beside them, to be compared with what is made of the
40 snapshots. Without such snapshots one would store checkpoints and weigh these: the baseline stores
40 of them, and gives each the weight that the average gives the 30 steps around it. Errors are distances
from the average that was kept, as a share of its distance from the last checkpoint. (Part b of the paper.)
"""

import torch
from _digits import loss, mlp, one_thread, split
from torch.nn import functional

import weightsmith as ws
from weightsmith.average._power_ema import power_of
from weightsmith.claims import Claim

CLAIM = Claim(
    key="analyzing-improving-training-dynamics",
    statement="the average of sigma_rel 0.15, made of 20 snapshots each of two others, is closer to the one that was "
    "kept in training than the mean of 40 checkpoints with that average's weights",
    method="error, 40 snapshots",
    baseline="error, 40 checkpoints",
    higher_is_better=False,
    seeds=(100, 101, 102, 103, 104, 105, 106, 107),
    needs=("sklearn",),
)
STEPS, TIMES, WANTED = 1200, 20, 0.15
STORED = (0.05, 0.1)


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Errors, and the loss on test digits of the average that was kept and of the one that was made."""
    (images, labels), test = split(seed, [1000])
    model = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    kept = {sigma: ws.average.power_ema(sigma_rel=sigma) for sigma in (*STORED, WANTED)}
    snapshots: list[ws.Weights] = []
    checkpoints: list[dict[str, torch.Tensor]] = []
    for step in range(1, STEPS + 1):
        part = torch.randint(len(labels), (32,), generator=generator)
        optimizer.zero_grad()
        functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
        for average in kept.values():
            average.update(model)
        if step % (STEPS // TIMES) == 0:
            snapshots += [kept[sigma].weights() for sigma in STORED]
        if step % (STEPS // TIMES // 2) == STEPS // TIMES // 4:  # in the middle of what it stands for
            checkpoints.append({name: value.detach().clone() for name, value in model.state_dict().items()})
    true, last = kept[WANTED].weights(), ws.open(model)
    away = distance(last, true)
    made = ws.average.post_hoc_ema(snapshots, WANTED)
    edges = torch.linspace(0, 1, len(checkpoints) + 1, dtype=torch.float64) ** (power_of(WANTED) + 1)
    figures = {
        "error, 40 snapshots": distance(made, true) / away,
        "error, 40 checkpoints": distance(ws.merge.mean(checkpoints, weight=edges.diff().tolist()), true) / away,
        "error, nearest stored average": min(distance(kept[sigma].weights(), true) for sigma in STORED) / away,
        "error, coefficients of any sum": distance(
            ws.average.post_hoc_ema(snapshots, WANTED, normalize=False), true
        ) / away,
        "error, 10 snapshots": distance(ws.average.post_hoc_ema(thinned(snapshots), WANTED), true) / away,
    }  # fmt: skip
    for name, weights in (("kept", true), ("made", made), ("last", last)):
        scratch = mlp(seed)
        weights.load_into(scratch)
        figures[f"test loss, {name}"] = loss(scratch, test)
    return figures


def thinned(snapshots: list[ws.Weights]) -> list[ws.Weights]:
    """Every fourth pair of snapshots, the last one among them."""
    pairs = [snapshots[start : start + 2] for start in range(0, len(snapshots), 2)]
    return [snapshot for pair in pairs[3::4] for snapshot in pair]


def distance(one: ws.Weights, other: ws.Weights) -> float:
    """The Euclidean distance of all parameters."""
    return sum(float((one[name] - other[name]).double().square().sum()) for name in other) ** 0.5
