"""Does one network for 8, 4, 3 and 2 bits cost accuracy against four that were trained for one width each?

A convolutional network for clothes, trained in floats on 3,000 images. The elastic one then trains for three epochs,
with the penalty on its weights' moments at the authors' strength, each step going backwards at its largest, a random
and its smallest configuration; each of the four others trains for three epochs at its one width, with learned steps
too, and as many steps of the optimizer. Batch statistics are gathered anew for every network and width. The figures are
means over the four widths; the margin of one point, and all settings, were chosen before any figure was seen, but for
the number of images, which was lowered for time.
"""

import torch
from _quantized_training import like, score, setting, trained

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize.training import configure, elastic, fake, moments, sandwich

CLAIM = Claim(
    key="eq-net",
    statement="one elastic network for 8, 4, 3 and 2 bits is on average within one point of the accuracy of four "
    "networks trained for one width each",
    method="elastic",
    baseline="one network a width",
    margin=-0.01,
    seeds=(0, 1, 2, 3, 4),
)
WIDTHS, EPOCHS, EVEN = (8, 4, 3, 2), 3, 0.015


def measure(seed: int) -> dict[str, float]:
    """Accuracies on test images, by width and in the mean."""
    network, training, test = setting(seed, 3000)
    figures = {"floats": score(network, test)}
    generator, model = torch.Generator().manual_seed(seed), like(network)
    elastic(model, bits=WIDTHS, pattern="*.weight")

    def losses(model, batch):
        sandwich(model, batch, generator=generator)
        return EVEN * moments(model)

    trained(model, training, EPOCHS, seed, losses)
    for bits in WIDTHS:
        configure(model, bits)
        figures[f"elastic, {bits} bits"] = score(_settled(model, training), test)
    for bits in WIDTHS:
        model = like(network)
        fake(model, bits=bits, step="learned", pattern="*.weight")
        trained(model, training, EPOCHS, seed)
        figures[f"one network a width, {bits} bits"] = score(_settled(model, training), test)
        model = like(network)
        ws.quantize.rtn(model, bits=bits, clip=16, pattern="*.weight", action="values").load_into(model)
        figures[f"rounded, {bits} bits"] = score(_settled(model, training), test)
    for way in ("elastic", "one network a width", "rounded"):
        figures[way] = sum(figures[f"{way}, {bits} bits"] for bits in WIDTHS) / len(WIDTHS)
    return figures


@torch.no_grad()
def _settled(model, training):
    """With batch statistics of its own, which every width needs."""
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None
    model.train()
    for images in training[0][:2000].split(500):
        model(images)
    return model.eval()
