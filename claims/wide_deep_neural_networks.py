"""Is the singular kernel of the right power a better classifier than one neighbour, under label noise?

Points on the ordinary sphere (dimension 2), two halves as classes, a quarter of all labels flipped: the best possible
error is 0.25, and one nearest neighbour tends to 0.375. The kernel is the distance to the power of minus 2, which is
what `optimal_activation(2)` becomes with depth; a finite network of 40 layers of it votes beside it.
"""

import torch

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="wide-deep-neural-networks",
    statement="with 4,000 noisy examples on a sphere the singular kernel errs less than the nearest neighbour",
    method="error, singular kernel",
    baseline="error, nearest neighbour",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Errors on 2,000 test points with noisy labels, by the number of examples; and of the majority."""
    theory = ws.inspect.theory
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        points = torch.nn.functional.normalize(torch.randn(count, 3, generator=generator), dim=1)
        clean = (points[:, 0] > 0).long()
        return points, torch.where(torch.rand(count, generator=generator) < 0.25, 1 - clean, clean)

    test, labels = draw(2000)
    examples, marks = draw(4000)

    def error(count: int, **kernel) -> float:
        said = theory.kernel_classes(examples[:count], marks[:count], test, **kernel)
        return float((said != labels).double().mean())

    coefficients = theory.optimal_activation(2)
    deep = {"activation": theory.dual(lambda x: theory.hermite(coefficients, x)), "depth": 40}
    return {
        "error, singular kernel": error(4000, exponent=2.0),
        "error, nearest neighbour": error(4000, exponent=2000.0),
        "error, singular kernel, 200 examples": error(200, exponent=2.0),
        "error, nearest neighbour, 200 examples": error(200, exponent=2000.0),
        "error, 40 layers, 500 examples": error(500, **deep),
        "error, singular kernel, 500 examples": error(500, exponent=2.0),
    }
