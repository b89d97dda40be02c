"""Do depth, widths and tokens tell a benchmark's score of models that the law has not seen?

A table of 24 public language models was entered by hand from their reports: layers, width, feed-forward width,
trillions of tokens, and MMLU with five examples, in percent. 20 of the 24 scores were checked against
model cards and reports; Gemma's two, TinyLlama's and most shapes were not. Each seed fits three quarters
of them and tells the rest. The baseline is a line of the score in the logarithm of compute (tokens times the
parameters that the shape gives, as if all were gated with full attention, which Falcon and the grouped-query models are
not), fitted to the same models. The paper's discount and saturation are left out. Seeds
split one table, so they are not independent and the interval is too narrow.
"""

import math
import random

import torch

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="performance-law-large-language",
    statement="depth, widths and tokens tell unseen models' scores better than a line in the logarithm of compute",
    method="error of the law",
    baseline="error of the line",
    higher_is_better=False,
    seeds=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19),
)
# name: layers, width, feed-forward width, 1e12 tokens, score
MODELS = {
    "Llama 7B": (32, 4096, 11008, 1.0, 35.1),
    "Llama 13B": (40, 5120, 13824, 1.0, 46.9),
    "Llama 33B": (60, 6656, 17920, 1.4, 57.8),
    "Llama 65B": (80, 8192, 22016, 1.4, 63.4),
    "Llama 2 7B": (32, 4096, 11008, 2.0, 45.3),
    "Llama 2 13B": (40, 5120, 13824, 2.0, 54.8),
    "Llama 2 70B": (80, 8192, 28672, 2.0, 68.9),
    "Llama 3 8B": (32, 4096, 14336, 15.0, 66.6),
    "Llama 3 70B": (80, 8192, 28672, 15.0, 79.5),
    "Gemma 2B": (18, 2048, 16384, 3.0, 42.3),
    "Gemma 7B": (28, 3072, 24576, 6.0, 64.3),
    "Qwen 1.8B": (24, 2048, 5504, 2.2, 45.3),
    "Qwen 7B": (32, 4096, 11008, 2.4, 58.2),
    "Qwen 14B": (40, 5120, 13696, 3.0, 66.3),
    "Qwen 72B": (80, 8192, 24576, 3.0, 77.4),
    "Falcon 7B": (32, 4544, 18176, 1.5, 26.2),
    "Falcon 40B": (60, 8192, 32768, 1.0, 55.4),
    "Baichuan 2 7B": (32, 4096, 11008, 2.6, 54.2),
    "Baichuan 2 13B": (40, 5120, 13696, 2.6, 59.2),
    "DeepSeek 7B": (30, 4096, 11008, 2.0, 48.2),
    "DeepSeek 67B": (95, 8192, 22016, 2.0, 71.3),
    "Yi 6B": (32, 4096, 11008, 3.0, 63.2),
    "Yi 34B": (60, 7168, 20480, 3.0, 76.3),
    "TinyLlama 1.1B": (22, 2048, 5632, 3.0, 25.9),
}


def measure(seed: int) -> dict[str, float]:
    """Mean absolute errors in points."""
    rows = []
    for layers, width, ffn, tokens, score in MODELS.values():
        config = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": ffn}
        compute = scaling.training_flops(scaling.body_size(layers, width, ffn, gated=True), tokens * 1e12)
        rows.append({**scaling.performance_features(config, tokens * 1e12), "compute": compute, "score": score})
    random.Random(seed).shuffle(rows)
    seen, unseen = rows[:18], rows[18:]
    law = scaling.fit(seen, "performance", bootstrap=0, delta=5.0)
    line = scaling.fit(seen, LINE, bootstrap=0, delta=5.0)
    mean = sum(row["score"] for row in seen) / len(seen)
    found: dict[str, list[float]] = {"error of the law": [], "error of the line": [], "error of the mean": []}
    for row in unseen:
        shape = {name: row[name] for name in ("depth", "width", "ffn", "tokens")}
        told = float(law.told({name: torch.tensor([value]) for name, value in (shape | {"discount": 1.0}).items()}))
        found["error of the law"].append(abs(told - row["score"]))
        found["error of the line"].append(abs(line.predict(compute=row["compute"]) - row["score"]))
        found["error of the mean"].append(abs(mean - row["score"]))
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


LINE = scaling.Form(
    "line",
    lambda compute, slope, start: slope * compute.log() + start,
    ("compute",),
    {"slope": (0.0, 5.0), "start": (0.0,)},
    target="score",
    free=("slope", "start"),
    scale="linear",
)
