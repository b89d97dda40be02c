"""Are the groups of widest range those to which four bits instead of two are best given?

The blocks of a small language model of the words of Python's library are rounded at two bits in groups of 16, an eighth
of the groups of every row at four; everything is rounded to nearest, and only the choice of groups differs. Beside it
stand two bits in groups of 8 throughout, which take 4 bits a weight against 3.25. Training was shortened from 250
to 120 steps after one seed, for time alone.
"""

import torch
from _small_language import batches, data, language, train

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize.grids import TwoFour

CLAIM = Claim(
    key="enabling-fast-2-bit-llm",
    statement="with an eighth of the groups of each row at 4 bits and the rest at 2, the outputs of the layers of a "
    "small language model err less if these are the groups of widest range than if they are drawn at random",
    method="widest groups",
    baseline="random groups",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)
BLOCKS = "blocks.*.weight"


def measure(seed: int) -> dict[str, float]:
    """Squared errors of outputs over their squares, mean of all matrices."""
    training, _ = data(seed)
    model = train(language(seed), batches(training, 120, seed))
    gram = ws.stats.gram(model, [batch[0] for batch in batches(training, 8, seed + 1000)], pattern=BLOCKS)
    fresh = ws.stats.gram(model, [batch[0] for batch in batches(training, 8, seed + 2000)], pattern=BLOCKS)
    grid, half = TwoFour(16, 0.125), TwoFour(8, 0.0)
    quantize, generator = ws.quantize, torch.Generator().manual_seed(seed)
    weights = ws.open(model)
    made: dict[str, list[float]] = {}
    for name in gram:
        weight = weights[name].float()
        size = quantize.output_error(weight, torch.zeros_like(weight), fresh[name])
        groups = weight.shape[1] // 16
        drawn = torch.rand(len(weight), groups, generator=generator).argsort(1) < grid.count(weight.shape[1])
        found = {
            "widest groups": quantize.two_four.kernel(weight, grid=grid).values(),
            "widest groups, weighed by inputs": rounded(
                weight, quantize.two_four.kernel(weight, gram[name], grid=grid)
            ),
            "random groups": placed(weight, grid, drawn),
            "two bits, groups of 8": quantize.two_four.kernel(weight, grid=half).values(),
            "widest groups, column by column": quantize.two_four.kernel(weight, gram[name], grid=grid).values(),
        }
        for key, value in found.items():
            made.setdefault(key, []).append(float(quantize.output_error(weight, value, fresh[name]) / size))
    return {key: sum(values) / len(values) for key, values in made.items()}


def placed(weight: torch.Tensor, grid: TwoFour, fine: torch.Tensor) -> torch.Tensor:
    """Rounded to nearest with some groups at four bits."""
    runs = weight.unflatten(1, (*fine.shape[1:], grid.size(weight.shape[1])))
    params, shared = grid.ranges(runs, fine)
    both = {**shared, **params}
    return grid.decode(grid.encode(runs, both), both).flatten(1)


def rounded(weight: torch.Tensor, coded: ws.quantize.Coded) -> torch.Tensor:
    """Rounded to nearest with the parameters of other codes."""
    return ws.quantize.coded(weight, coded.grid, coded.params, coded.shared).values()
