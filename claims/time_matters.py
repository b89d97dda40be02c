"""Do the bytes that a training step moves tell its time better than its operations?

Real timings, on this machine's processor with one thread: twelve transformers of 2 to 8 layers, widths 32 to 256,
and two batches, the least of several steps each. Every configuration's time is told by a fit to the eleven others,
once from bytes and once from operations. Each seed is another measurement, in another order.
"""

import random
import time

import torch
from _digits import one_thread
from torch import nn

from weightsmith.claims import Claim
from weightsmith.inspect import scaling

CLAIM = Claim(
    key="time-matters",
    statement="bytes moved tell the time of a training step of a model left out of the fit better than operations do",
    method="error of bytes",
    baseline="error of operations",
    higher_is_better=False,
)
CONTEXT, VOCABULARY, HEADS = 32, 256, 4
SHAPES = [(2, 32), (8, 32), (2, 64), (4, 64), (2, 128), (2, 256)]
CONFIGS = [(layers, width, batch) for layers, width in SHAPES for batch in (2, 16)]


class Model(nn.Module):
    """A plain transformer with tied embeddings and attention written out."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, HEADS, 4 * width, 0.0, batch_first=True) for _ in range(layers)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states = self.embed(tokens)
        for block in self.blocks:
            states = block(states)
        return states @ self.embed.weight.T


@one_thread()
def seconds(layers: int, width: int, batch: int, steps: int = 8) -> float:
    """The least time of a step."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Model(layers, width)
        tokens = torch.randint(VOCABULARY, (batch, CONTEXT))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    taken = []
    for _ in range(steps):
        began = time.perf_counter()
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken.append(time.perf_counter() - began)
    return min(taken)


def measure(seed: int) -> dict[str, float]:
    """Mean relative errors, each configuration told by a fit without it."""
    order = CONFIGS[:]
    random.Random(seed).shuffle(order)
    rows = []
    for layers, width, batch in order:
        cost = scaling.step_cost(
            layers=layers, width=width, batch=batch, context=CONTEXT, vocabulary=VOCABULARY, heads=HEADS
        )
        rows.append({"bytes": cost.bytes, "flops": cost.flops, "seconds": seconds(layers, width, batch)})
    laws = {
        "error of bytes": scaling.fit(rows, "step-time", fixed={"per_flop": 0.0}, bootstrap=0),
        "error of operations": scaling.fit(rows, "step-time", fixed={"per_byte": 0.0}, bootstrap=0),
        "error of both": scaling.fit(rows, "step-time", bootstrap=0),
    }
    return {name: float(law.errors().abs().mean()) for name, law in laws.items()}
