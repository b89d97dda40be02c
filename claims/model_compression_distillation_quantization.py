"""Does a teacher help a 2-bit student more than labels do, through the same quantizer and for as many steps?

The teacher is a convolutional network for clothes, trained in floats on 6,000 images; the student is the same network
half as wide in its last convolution, trained in floats too and then for three epochs at 2 bits on 1,500 of the images,
with steps that learn, either on labels alone or on labels and the teacher. Weight 0.3 for the labels and temperature 2
were set before any figure was seen.
"""

from functools import partial

import torch
from _fashion import cnn
from _quantized_training import like, score, setting, trained
from torch import nn

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize.training import distilled, fake

CLAIM = Claim(
    key="model-compression-distillation-quantization",
    statement="a 2-bit convolutional student is more accurate trained through its quantizer with a teacher than on "
    "labels alone",
    method="labels and teacher",
    baseline="labels alone",
    seeds=(0, 1, 2, 3, 4),
)


def student(seed: int) -> nn.Module:
    """Half as many channels in the last convolution."""
    model = cnn(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model[6], model[7] = nn.Conv2d(32, 48, 3, padding=1, bias=False), nn.BatchNorm2d(48)
        model[11] = nn.Linear(48, 10)
    return model


def measure(seed: int) -> dict[str, float]:
    """Accuracies on test images."""
    teacher, training, test = setting(seed)
    few = (training[0][:1500], training[1][:1500])
    small = trained(student(seed), few, 6, seed, rate=3e-3)
    figures = {"teacher": score(teacher, test), "student in floats": score(small, test)}
    model = like(small)
    ws.quantize.rtn(model, bits=2, clip=16, pattern="*.weight", action="values").load_into(model)
    figures["rounded, no training"] = score(model, test)
    for way, truth in (("labels alone", 1.0), ("labels and teacher", 0.3), ("teacher alone", 0.0)):
        model = like(small)
        fake(model, bits=2, step="learned", pattern="*.weight")
        loss = partial(distilled, truth=truth, temperature=2.0)
        figures[way] = score(trained(model, few, 6, seed, lambda m, b, loss=loss: loss(m, teacher, b)), test)
    return figures
