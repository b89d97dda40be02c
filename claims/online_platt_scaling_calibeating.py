"""Does a curve that learns from every outcome stay calibrated where one fitted once does not?

Forecasts are a network's probabilities that a digit is 5 or more. The stream is of 4,000 digits it was not trained on,
drawn with replacement; the share of digits of 5 or more falls from 80 to 20 %, and up to a third of the outcomes are
false by the end. The fixed curve is fitted to the first 500. A stronger rival, refitted every 250 outcomes to the last
500, stands beside it.
"""

import torch
from _digits import mlp, split, train

from weightsmith.claims import Claim
from weightsmith.inspect.evaluation import calibration_error, log_loss, online_calibration, platt

CLAIM = Claim(
    key="online-platt-scaling-calibeating",
    statement="under drift, online Platt scaling has less log loss after the first 500 outcomes than a Platt curve "
    "fitted to these",
    method="log loss, online",
    baseline="log loss, fixed",
    higher_is_better=False,
    needs=("sklearn",),
)
LENGTH, FIRST = 4000, 500


def measure(seed: int) -> dict[str, float]:
    """Log losses and calibration errors (10 bins) after the first 500."""
    said, came = stream(seed)
    logits = torch.logit(said.clamp(1e-6, 1 - 1e-6))
    a, b = platt(logits[:FIRST], came[:FIRST])
    refitted = torch.empty_like(said)
    for start in range(FIRST, LENGTH, 250):
        c, d = platt(logits[start - 500 : start], came[start - 500 : start])
        refitted[start : start + 250] = torch.sigmoid(c * logits[start : start + 250] + d)
    made = {
        "as it is": said,
        "fixed": torch.sigmoid(a * logits + b),
        "refitted": refitted,
        "online": online_calibration(said, came),
        "online beta": online_calibration(said, came, "beta"),
        "online, tracking": online_calibration(said, came, "platt", "tracking"),
        "online, hedging": online_calibration(said, came, "platt", "hedging", seed=seed),
    }
    found = {}
    for name, one in made.items():
        found[f"log loss, {name}"] = log_loss(one[FIRST:].clamp(1e-3, 1 - 1e-3), came[FIRST:])
        found[f"calibration error, {name}"] = calibration_error(one[FIRST:], came[FIRST:], bins=10)
    return found


def stream(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Forecasts and outcomes."""
    training, test = split(seed, [300])
    model = mlp(seed)
    train(model, training, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=30, seed=seed)
    with torch.no_grad():
        chance = model(test[0]).double().softmax(1)[:, 5:].sum(1)
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(LENGTH) / LENGTH
    large = torch.rand(LENGTH, generator=generator) < 0.8 - 0.6 * time
    pools = [torch.where((test[1] >= 5) == bool(side))[0] for side in (0, 1)]
    draws = [pool[torch.randint(len(pool), (LENGTH,), generator=generator)] for pool in pools]
    chosen = torch.where(large, draws[1], draws[0])
    false = torch.rand(LENGTH, generator=generator) < time / 3
    return chance[chosen], (large ^ false).long()
