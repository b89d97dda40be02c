"""Do turns that even out variances leave less error in products of rounded inputs than a Hadamard turn alone?

A small language model of the words of Python's library is trained. The inputs and the matrices that read its stream
(gains of norms folded) and its values are turned, by KLT and Hadamard or by Hadamard alone, and both rounded at 4 bits,
each token and each row on a grid of its own. Turns are found with 4,096 words of training text, errors measured on
held-out text. There is no Mamba in it: what is measured is the turn, which the paper puts into any matrix.
"""

from collections.abc import Callable

import torch
from _rescaled import given, trained
from torch import Tensor

import weightsmith as ws
from weightsmith.claims import Claim
from weightsmith.quantize import coded, transforms
from weightsmith.quantize.grids import Integer

CLAIM = Claim(
    key="mambaquant",
    statement="the outputs of a small language model's layers with inputs and weights rounded to 4 bits are nearer to "
    "what they were after a turn by KLT and Hadamard than after a turn by Hadamard alone",
    method="KLT and Hadamard",
    baseline="Hadamard",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4),
)


def measure(seed: int) -> dict[str, float]:
    """Squared error of the outputs of the layers that are turned, as a share of their squares, averaged."""
    model, words, held_out = trained(seed)
    names = [f"blocks.{block}.{name}.weight" for block in range(4) for name in ("q", "gate", "o", "down")]
    gram = ws.stats.gram(model, words)
    turns: dict[str, Callable[[Tensor], Tensor]] = {
        "none": lambda moment: torch.eye(len(moment), dtype=torch.float64),
        "Hadamard": lambda moment: transforms.hadamard(len(moment), seed=seed),
        "KLT and Hadamard": transforms.karhunen_loeve,
    }
    found = dict.fromkeys(turns, 0.0)
    grid = Integer(bits=4, symmetric=False)
    inputs = given(model, held_out[:32, :-1], names)
    for name in names:
        weight = model.get_parameter(name).detach()
        wanted = inputs[name] @ weight.T
        for turn, make in turns.items():
            matrix = make(gram[name]).float()
            rows, back = (coded(x @ matrix.T, grid).values() for x in (inputs[name], weight))
            off = (rows @ back.T - wanted).square().sum() / wanted.square().sum()
            found[turn] += float(off) / len(names)
    return found
