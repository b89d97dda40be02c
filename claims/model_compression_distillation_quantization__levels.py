"""Do points that learned through the loss beat those of least squared error, with the weights standing still?

A convolutional network for clothes, trained in floats on 6,000 images, gets one table of eight points a tensor, at the
centres of least squared error. Then the tables, biases and norms learn for two epochs; the baseline trains its biases
and norms for as long, and its tables stand still, so that what is compared is the points alone.
"""

from _quantized_training import like, score, setting, trained

from weightsmith.claims import Claim
from weightsmith.quantize.training import fake, learned_levels

CLAIM = Claim(
    key="model-compression-distillation-quantization",
    variant="levels",
    statement="with 3-bit tables, a convolutional network is more accurate where the points learn than where they stay "
    "at the centres of least squared error, biases and norms being trained in both",
    method="points learn",
    baseline="points of least error",
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Accuracies on test images, with tables of 8 points (2 bits beside: of 4)."""
    network, training, test = setting(seed)
    figures = {"floats": score(network, test)}
    for bits, ending in ((3, ""), (2, ", 2 bits")):
        for way, learns in (("points learn", True), ("points of least error", False)):
            model = like(network)
            for made in learned_levels(model, bits=bits, pattern="*.weight").values():
                made.levels.requires_grad_(learns)
            figures[way + ending] = score(trained(model, training, 2, seed), test)
        model = like(network)
        fake(model, bits=bits, clip=16, pattern="*.weight")
        for stack in (p for name, p in model.named_parameters() if name.endswith("original")):
            stack.requires_grad_(False)
        figures["even points" + ending] = score(trained(model, training, 2, seed), test)
    return figures
