"""Do outputs of layers change less if channels with outliers are split before inputs and weights are rounded?

A small language model of the words of Python's library is trained. The inputs of its matrices and the matrices are
rounded to 4 bits, each token and each row on a grid of its own, as they are, and after channels were taken apart and
put together to the same number. Thresholds are found with 4,096 words of training text, errors measured on held-out
text. The baseline is SmoothQuant's rescaling of the same channels; rounding alone is beside it.
"""

import torch
from _rescaled import given, trained

from weightsmith.claims import Claim
from weightsmith.quantize import coded, transforms
from weightsmith.quantize.grids import Integer

CLAIM = Claim(
    key="qllm",
    statement="the outputs of a small language model's layers with inputs and weights rounded to 4 bits are nearer to "
    "what they were after channels were split and put together than after SmoothQuant's rescaling",
    method="QLLM",
    baseline="SmoothQuant",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Squared error of the outputs of layers, as a share of their squares, averaged."""
    model, words, held_out = trained(seed)
    names = [f"blocks.{block}.{name}.weight" for block in range(4) for name in ("q", "gate", "o", "down")]
    grid = Integer(bits=4, symmetric=False)
    seen, inputs = given(model, torch.cat(words), names), given(model, held_out[:32, :-1], names)
    found: dict[str, float] = {"none": 0.0, "SmoothQuant": 0.0, "QLLM": 0.0}
    for name in names:
        weight = model.get_parameter(name).detach()
        channels = transforms.qllm(seen[name], weight, bits=4)
        scale = (seen[name].abs().amax(0) / weight.abs().amax(0)).sqrt().clamp(min=1e-5)
        both = {
            "none": (inputs[name], weight),
            "SmoothQuant": (inputs[name] / scale, weight * scale),
            "QLLM": (channels.write(inputs[name]), channels.read(weight)),
        }
        wanted = inputs[name] @ weight.T
        for way, (rows, matrix) in both.items():
            off = coded(rows, grid).values() @ coded(matrix, grid).values().T - wanted
            found[way] += float(off.square().sum() / wanted.square().sum()) / len(names)
    return found
