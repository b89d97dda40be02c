"""Are four bits a weight as good as floats, and do fewer bits break?

The paper measures language models on ten benchmarks; here a small network on handwritten digits is
rounded to nearest, with one step a row, at 8, 4, 3 and 2 bits. Bytes are those of the written file.
"""

import copy
import tempfile
from pathlib import Path

import torch
from _digits import accuracy, loss, mlp, split, train

import weightsmith as ws
from weightsmith.claims import Claim

CLAIM = Claim(
    key="comprehensive-evaluation-quantization-strategies",
    statement="at 4 bits, rounded to nearest, test accuracy is within one point of the float network",
    method="accuracy, 4 bits",
    baseline="accuracy, float",
    margin=-0.01,
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    needs=("sklearn",),
)


def measure(seed: int) -> dict[str, float]:
    """Accuracy, loss and bytes on disk at each width."""
    training, test = split(seed, [1200])
    model = mlp(seed, width=128)
    train(model, training, torch.optim.Adam(model.parameters(), lr=1e-3), epochs=30, seed=seed)
    scratch = copy.deepcopy(model)
    figures = {
        "accuracy, float": accuracy(model, test),
        "loss, float": loss(model, test),
        "bytes, float": stored(model),
    }
    for bits in (8, 4, 3, 2):
        coded = ws.quantize.rtn(model, bits=bits)
        ws.quantize.dequantize(coded).load_into(scratch)
        figures[f"accuracy, {bits} bits"] = accuracy(scratch, test)
        figures[f"loss, {bits} bits"] = loss(scratch, test)
        figures[f"bytes, {bits} bits"] = stored(coded)
    return figures


def stored(weights) -> float:
    """Bytes of the values in a written file (its header padding left out)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        ws.open(weights).save(path)
        return float(ws.open(path).nbytes)
