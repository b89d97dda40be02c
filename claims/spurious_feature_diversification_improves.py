"""Is a point between a model and its fine-tune better under shift if the fine-tune was kept from being sure of
itself?

A small network is trained on clothes that are noisy and turned, so it knows the shifted world; it is fine-tuned on
few plain pictures, once with hard labels (WiSE-FT) and once with labels smoothed by 0.2 (BANG). For each, the share
of the fine-tune is chosen on validation pictures that are shifted otherwise. Test pictures are turned by 20 degrees
and noisy.
"""

import copy

import torch
from _fashion import accuracy, cnn, held_out, noisy, split, train, turned

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="spurious-feature-diversification-improves",
    statement="between a model and its fine-tune, one with smoothed labels is at least as accurate under shift as one "
    "with hard labels",
    method="smoothed labels",
    baseline="hard labels",
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
)
AMOUNTS = (0.1, 0.3, 0.5, 0.7, 0.9)


def measure(seed: int) -> dict[str, float]:
    """Accuracies on shifted test pictures at the best amount, and what explains them."""
    first, second, third = split(seed, [5000, 1500, 1000])
    plain = held_out(seed)
    test = (shifted(plain[0], 20, seed), plain[1])
    validation = (shifted(third[0], -15, seed + 1), third[1])
    base = cnn(seed)
    train(base, first, 3, seed, augment=anyhow)
    figures = {"start": accuracy(base, test)}
    scratch = copy.deepcopy(base)
    for name, smoothing in (("hard labels", 0.0), ("smoothed labels", 0.2)):
        run = copy.deepcopy(base)
        train(run, second, 6, seed, rate=1e-3, smoothing=smoothing)
        best, chosen = -1.0, 0.0
        for amount in AMOUNTS:
            ws.merge.wise_ft([run], base, amount=amount).load_into(scratch)
            best, chosen = max((best, chosen), (accuracy(scratch, validation), amount), key=lambda pair: pair[0])
        ws.merge.wise_ft([run], base, amount=chosen).load_into(scratch)
        before, after, between = (scored(model, test[0]) for model in (base, run, scratch))
        figures[name] = accuracy(scratch, test)
        figures[f"{name}, fine-tune alone"] = accuracy(run, test)
        figures[f"{name}, rescued"] = ws.inspect.rescued(before, after, between, test[1])
        figures[f"{name}, confidence of the fine-tune"] = float(after.softmax(1).amax(1).mean())
    return figures


def anyhow(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noisy, and a batch together turned by up to 20 degrees either way."""
    return noisy(turned(images, 40 * float(torch.rand((), generator=generator)) - 20), generator)


def shifted(images: torch.Tensor, degrees: float, seed: int) -> torch.Tensor:
    """Turned and noisy."""
    return noisy(turned(images, degrees), torch.Generator().manual_seed(seed))


@torch.no_grad()
def scored(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Scores ``[n, c]``."""
    return model.eval()(images)
