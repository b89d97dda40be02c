"""How near estimates from draws alone come to the exact loss of a model.

A network for digits is treated as a generator of labels: four draws for each of some 1,400 test digits. The rival reads
the same draws as shares and takes the loss of these. For the log loss, draws until the first match stand against the
shares of as many draws as these took on average, with one half added to every class.
"""

import torch
from _digits import mlp, split, train

from weightsmith.claims import Claim
from weightsmith.inspect.evaluation import harmonic_log_loss, quadratic_loss

CLAIM = Claim(
    key="proper-losses-discrete-generative",
    statement="from four draws each, the unbiased quadratic loss is nearer to the exact one than that of the shares",
    method="error, unbiased",
    baseline="error, shares",
    higher_is_better=False,
    needs=("sklearn",),
)
REPEATS, DRAWS = 40, 4


def measure(seed: int) -> dict[str, float]:
    """Mean distances from the exact loss, and how often the intervals held it (given the targets)."""
    training, test = split(seed, [400])
    model = mlp(seed)
    train(model, training, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=8, seed=seed)
    with torch.no_grad():
        chances = (model(test[0]).double() / 2).softmax(1)
    targets, rows = test[1], torch.arange(len(test[1]))
    exact = float((chances.square().sum(1) - 2 * chances[rows, targets]).mean())
    exact_log = float(-chances[rows, targets].log().mean())
    generator = torch.Generator().manual_seed(seed)
    names = ("error, unbiased", "error, shares", "log error, harmonic", "log error, shares", "inside")
    found = dict.fromkeys(names, 0.0)
    spent = 0
    for _ in range(REPEATS):
        draws = torch.multinomial(chances, DRAWS, replacement=True, generator=generator)
        ours = quadratic_loss(draws, targets)
        shares = torch.nn.functional.one_hot(draws, 10).double().mean(1)
        theirs = float((shares.square().sum(1) - 2 * shares[rows, targets]).mean())
        found["error, unbiased"] += abs(ours.estimate - exact) / REPEATS
        found["error, shares"] += abs(theirs - exact) / REPEATS
        found["inside"] += (not ours.excludes(exact)) / REPEATS
        asked = [0]

        def draw(examples: torch.Tensor, asked=asked) -> torch.Tensor:
            asked[0] += len(examples)
            return torch.multinomial(chances[examples], 1, generator=generator)[:, 0]

        harmonic = harmonic_log_loss(draw, targets, limit=100000)
        spent += asked[0]
        each = max(round(asked[0] / len(targets)), 1)
        again = torch.multinomial(chances, each, replacement=True, generator=generator)
        smooth = (torch.nn.functional.one_hot(again, 10).double().sum(1) + 0.5) / (each + 5)
        found["log error, harmonic"] += abs(harmonic.estimate - exact_log) / REPEATS
        found["log error, shares"] += abs(float(-smooth[rows, targets].log().mean()) - exact_log) / REPEATS
    return found | {"exact": exact, "exact log": exact_log, "draws until a match": spent / REPEATS / len(targets)}
