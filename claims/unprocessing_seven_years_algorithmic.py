"""Is the plain model, cut by group at the same gap, as accurate as models trained to be fair?

Clothes for the upper body; the question is whether a picture is of a shirt or a coat (against T-shirts and pullovers),
the groups are dark and bright pictures. Three small networks: plain, reweighted so that group and class are
independent, and penalised for the gap in mean scores between groups within each class. Thresholds are fitted on 6,000
pictures and judged on 6,000 others, where gaps are measured too.
"""

import torch
from _digits import one_thread
from _fashion import split
from torch import nn
from torch.nn import functional

from weightsmith.claims import Claim
from weightsmith.inspect.evaluation import fairness_frontier

CLAIM = Claim(
    key="unprocessing-seven-years-algorithmic",
    statement="at the gap of each fair model (equalized odds), thresholds by group on the most accurate model are no "
    "less accurate, half a point allowed",
    method="accuracy, base at their gap",
    baseline="accuracy, fair models",
    margin=-0.005,
)


def measure(seed: int) -> dict[str, float]:
    """Means over the two fair models; gaps of both sides, and what unprocessing makes of all three."""
    parts = [prepared(part) for part in split(seed, [10000, 15000, 15000])]
    models = {name: fitted(parts[0], name, seed) for name in ("plain", "reweighted", "penalised")}
    with torch.no_grad():
        scores = [{name: model(part[0])[:, 0].sigmoid() for name, model in models.items()} for part in parts]
    found = fairness_frontier(
        scores[2], parts[2][1], parts[2][2], fitting=scores[1], fitting_labels=parts[1][1], fitting_groups=parts[1][2],
        seed=seed,
    )  # fmt: skip
    fair = [row for row in found.table if row["model"] != "plain"]
    plain = next(row for row in found.table if row["model"] == "plain")
    unprocessed = found["unprocessed"]
    return {
        "accuracy, base at their gap": sum(row["base at this gap"] for row in fair) / 2,
        "accuracy, fair models": sum(row["accuracy"] for row in fair) / 2,
        "gap, base": sum(row["its gap"] for row in fair) / 2,
        "gap, fair models": sum(row["gap"] for row in fair) / 2,
        "accuracy, plain": plain["accuracy"],
        "gap, plain": plain["gap"],
        "unprocessed, best minus worst": max(unprocessed) - min(unprocessed),
    }


def prepared(part):
    """Pictures ``[n, 196]``, labels and groups of four kinds of clothes."""
    images, labels = part
    upper = torch.isin(labels, torch.tensor([0, 2, 4, 6]))
    images, labels = images[upper], labels[upper]
    small = functional.avg_pool2d(images, 2).flatten(1)
    return small, torch.isin(labels, torch.tensor([4, 6])).long(), (small.mean(1) > 0.35).long()


@one_thread()
def fitted(data, kind: str, seed: int) -> nn.Module:
    """One hidden layer, ten epochs."""
    images, labels, groups = data
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 1))
    cell = 2 * groups + labels
    count = torch.bincount(cell, minlength=4).double()
    # Kamiran and Calders: the share that group and class would have together if independent, over the one they have.
    wanted = torch.stack(
        [(groups == g).double().mean() * (labels == y).double().mean() for g in (0, 1) for y in (0, 1)]
    )
    weight = (wanted * len(labels) / count).float()[cell] if kind == "reweighted" else torch.ones(len(labels))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(10):
        for part in torch.randperm(len(labels), generator=generator).split(128):
            logits = model(images[part])[:, 0]
            target = labels[part].float()
            loss = (weight[part] * functional.binary_cross_entropy_with_logits(logits, target, reduction="none")).mean()
            if kind == "penalised":
                loss = loss + 0.5 * gap(logits.sigmoid(), labels[part], groups[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def gap(chances: torch.Tensor, labels: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Of mean scores between groups, within classes."""
    total = chances.new_zeros(())
    for y in (0, 1):
        sides = [chances[(labels == y) & (groups == g)] for g in (0, 1)]
        if all(map(len, sides)):
            total = total + (sides[0].mean() - sides[1].mean()).abs()
    return total
