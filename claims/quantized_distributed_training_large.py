"""When weights may only lie on a coarse lattice, is it better that the lattice is shifted at random?

A perceptron of two hidden layers learns 800 digits with stochastic gradient descent for 20 epochs. After every step all
weights are rounded to multiples of 1/64: to the nearest; or to points that are shifted by one random share of the
spacing, the same for all weights (what the paper's analysis rests on). In both the weights of the last epoch are tested
as they lie, and each has the better of two rates, 0.05 and 0.4, by 200 validation digits: with the smaller one hardly
any step is as long as half the spacing. (With one rate of 0.05 and 30 epochs, tried first on seed 0, rounding to the
nearest learned nothing.) Beside them: every weight rounded up or down at random by itself, and weights that may lie
anywhere.
"""

import torch
from _digits import accuracy, loss, mlp, one_thread, split
from torch.nn import functional

from weightsmith.claims import Claim
from weightsmith.quantize.codecs import onto_lattice

CLAIM = Claim(
    key="quantized-distributed-training-large",
    statement="weights kept on a lattice of 1/64 reach a lower test loss with a random shift a step than without",
    method="loss, shifted",
    baseline="loss, nearest",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
SPACING, RATES, EPOCHS = 1 / 64, (0.05, 0.4), 20


def measure(seed: int) -> dict[str, float]:
    """Test losses and accuracies."""
    training, validation, test = split(seed, [800, 200])
    found = {}
    for name in ("shifted", "nearest", "each by itself", "free"):
        tried = [_trained(seed, training, name, rate) for rate in RATES]
        model = min(tried, key=lambda one: loss(one, validation))
        found |= {f"loss, {name}": loss(model, test), f"accuracy, {name}": accuracy(model, test)}
    return found


@one_thread()
def _trained(seed, data, rounding, rate):
    model = mlp(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    images, labels = data
    order, chance = (torch.Generator().manual_seed(seed + more) for more in (0, 1000))
    for _ in range(EPOCHS):
        for part in torch.randperm(len(labels), generator=order).split(32):
            optimizer.zero_grad()
            functional.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
            if rounding in ("shifted", "nearest"):
                onto_lattice(
                    model.parameters(), SPACING, generator=chance, shift=0.0 if rounding == "nearest" else None
                )
            elif rounding == "each by itself":
                with torch.no_grad():
                    for one in model.parameters():
                        one.copy_((one / SPACING + torch.rand(one.shape, generator=chance)).floor() * SPACING)
    return model
