"""Does a signature make a model more robust that was trained on other images?

From one start three networks are trained on clothes: one on clean images and one on the same images with noise,
which give the signature, and one on other clean images, which is patched with the signature's first layers in eight
bits. All are tested on noisy images. Batch norm re-estimated on noisy images without labels makes a network more
robust by itself, so the patched and the unpatched network both have it.
"""

import copy

import torch
from _fashion import THERE, accuracy, cnn, held_out, noisy, split, train

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.errors import Error

CLAIM = Claim(
    key="robust-weight-signatures",
    statement="with a signature of the first layers put on, a network is more accurate under noise than without, "
    "batch norm re-estimated on noisy images in both",
    method="noisy, patched",
    baseline="noisy, batch norm alone",
    seeds=(100, 101, 102, 103, 104, 105),
)
SIZE, DEPTH = 0.4, 0.3


def measure(seed: int) -> dict[str, float]:
    """Accuracies on noisy and on clean test images."""
    if not THERE:
        raise Error("the images of Fashion-MNIST are not here: apt install dataset-fashion-mnist, or set FASHION_MNIST")
    first, second, third = split(seed, [2000, 3000, 3000])
    base = cnn(seed)
    train(base, first, epochs=3, seed=seed)
    clean, robust, target = (copy.deepcopy(base) for _ in range(3))
    train(clean, second, epochs=2, seed=seed, rate=2e-3)
    train(robust, second, epochs=2, seed=seed, rate=2e-3, augment=disturbed)
    train(target, third, epochs=2, seed=seed + 1, rate=2e-3)
    test = held_out(seed)
    tests = {"noisy": (disturbed(test[0], torch.Generator().manual_seed(seed)), test[1]), "clean": test}
    calibration = disturbed(third[0][:1000], torch.Generator().manual_seed(seed + 1)).split(250)

    scratch, own = copy.deepcopy(base), ws.open(target)
    signature = ws.merge.signature(robust, clean, base, depth=DEPTH)
    stored = ws.quantize.rtn(signature, bits=8, pattern=lambda name: len(signature.spec(name).shape) > 1)
    patched = ws.merge.patch(target, [stored])
    update = (ws.open(robust) - ws.open(base)).select(signature.__contains__)
    rest = (ws.open(robust) - ws.open(clean)).select(signature.__contains__)
    every = {
        "batch norm alone": own,
        "patched": patched,
        "patched with the whole update": ws.merge.patch(target, [update]),
        "patched with the difference to clean": ws.merge.patch(target, [rest]),
        "patched in all layers": ws.merge.patch(target, [ws.merge.signature(robust, clean, base)]),
    }
    figures = {"noisy, as it was": accuracy(target, tests["noisy"]), "clean, as it was": accuracy(target, test)}
    for name, weights in every.items():
        (weights | ws.stats.batch_norm(scratch, calibration, weights=weights)).load_into(scratch)
        figures[f"noisy, {name}"] = accuracy(scratch, tests["noisy"])
    on_clean = patched | ws.stats.batch_norm(scratch, third[0][:1000].split(250), weights=patched)
    on_clean.load_into(scratch)
    figures["clean, patched"] = accuracy(scratch, test)
    ws.merge.patch(on_clean | own.select("*running_*"), [stored], amount=-1).load_into(scratch)
    figures["clean, taken off again"] = accuracy(scratch, test)
    return figures | {"share of bytes": stored.nbytes / own.nbytes}


def disturbed(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The images with noise."""
    return noisy(images, generator, SIZE)
