"""The loss around a minimum settles as 1 / k when examples are added: a small network on digits.

The network is trained on all the digits that are then added one by one, as in the paper. The slope of the mean change
over k, from k = 10 on and on logarithmic axes, is to be -1; the claim holds where it is within 0.2 of that. The
bound is computed beside it, with gradients (which the paper takes to be zero at the minimum) and without.
"""

import torch
from _digits import loss, mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="unraveling-the-hessian",
    statement="with one more example the loss around a minimum changes by what falls as the inverse of their number",
    method="distance of the slope from -1",
    baseline="tolerance",
    higher_is_better=False,
    needs=("sklearn",),
)
TOLERANCE = 0.2


def measure(seed: int) -> dict[str, float]:
    """Slopes on a sphere and in the plane of the largest curvature, and how often the bound holds."""
    data, _ = split(seed, [1000])
    model = mlp(seed, width=32)
    train(model, data, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=40, seed=seed)
    around = ws.inspect.landscape.growth(model, data, radius=1.0, curved=24, seed=seed)
    top = ws.inspect.landscape.top_eigen(model, None, [data], count=2, steps=15)
    along = ws.inspect.landscape.growth(model, data, radius=1.0, directions=top.vectors, curved=0, seed=seed)
    return {
        "distance of the slope from -1": abs(around["slope"] + 1),
        "tolerance": TOLERANCE,
        "slope": around["slope"],
        "slope in the plane of the largest curvature": along["slope"],
        "height": around["height"],
        "height in the plane of the largest curvature": along["height"],
        "share of means within the bound": around["share of means within the bound"],
        "share of means within the bound without gradients": around[
            "share of means within the bound without gradients"
        ],
        "training loss": loss(model, data),
    }
