"""Can real training runs tell which setting matters, through noise?

60 runs of a small network on 300 digits with random settings: learning rate (4e-5 to 4e-2), weight decay, strength of
shifts by up to a pixel, of noise and of erasing, each over its range, and a setting that does nothing. A line through
the runs ranks them. Measured is the size of the learning rate's coefficient against that of the setting that does
nothing, in points of accuracy a standard deviation.
"""

import torch
from _digits import accuracy, mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="what-augmentations-sensitive-hyper-parameters",
    statement="the learning rate's coefficient is larger than that of a setting which does nothing",
    method="learning rate",
    baseline="nothing",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
RUNS = 60


def measure(seed: int) -> dict[str, float]:
    """Sizes of coefficients, in points of accuracy; the line's R2; how many of the settings are certain."""
    training, test = split(seed, [300])
    generator = torch.Generator().manual_seed(seed)
    runs = []
    for number in range(RUNS):
        draw = torch.rand(6, generator=generator).tolist()
        run = {
            "learning rate": 4e-5 * 1000 ** draw[0],
            "decay": 1e-5 * 1e4 ** draw[1],
            "shift": draw[2],
            "noise": draw[3],
            "erase": draw[4],
            "nothing": draw[5],
        }
        model = mlp(seed * 1000 + number, width=32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=run["learning rate"], weight_decay=run["decay"])
        train(model, training, optimizer, epochs=5, seed=number, augment=augmentation(run))
        runs.append(run | {"score": 100 * accuracy(model, test)})
    found = ws.inspect.theory.sensitivity(runs, log=["learning rate", "decay"], seed=seed)
    sizes = {row["setting"]: abs(row["coefficient"]) for row in found.rows()}
    certain = sum(row["certain"] for row in found.rows())
    return sizes | {"R2": found["R2"], "certain": certain, "rank of nothing": 1 + list(sizes).index("nothing")}


def augmentation(run: dict[str, float]):
    """Each image is shifted, made noisy and erased, as strongly as the run says."""

    def changed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        squares = images.reshape(-1, 8, 8)
        step = int(torch.randint(-1, 2, (1,), generator=generator))
        if float(torch.rand(1, generator=generator)) < run["shift"]:
            squares = squares.roll(step, dims=2)
        squares = squares + 0.3 * run["noise"] * torch.randn(squares.shape, generator=generator)
        keep = torch.rand(squares.shape, generator=generator) >= 0.5 * run["erase"]
        return (squares * keep).reshape(images.shape)

    return changed
