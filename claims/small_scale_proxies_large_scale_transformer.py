"""Do normalised queries and keys and a z-loss make a small transformer mind its learning rate less?

Words and signs of Python's own library; two blocks, AdamW with warm-up, gradients clipped at 1 (as in the paper, so
that the baseline is not a straw man), the same seeds at every rate. The power law of the largest attention logit is
fitted to the four smallest rates of the plain model and set against what was measured at the next.
"""

import math
from collections.abc import Iterator

import torch
from _digits import one_thread
from _sources import texts
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.claims import Claim
from weightsmith.inspect import training

CLAIM = Claim(
    key="small-scale-proxies-large-scale-transformer",
    statement="normalised queries and keys with a z-loss lower the sensitivity of the final loss to the learning rate",
    method="sensitivity, normalised and z-loss",
    baseline="sensitivity, plain",
    higher_is_better=False,
)
VOCABULARY, LENGTH, STEPS, BATCH, WIDTH, HEADS = 300, 32, 100, 8, 32, 2
RATES = [1e-3 * 10 ** (step / 2) for step in range(7)]  # 1e-3 to 1


@one_thread()
def measure(seed: int) -> dict[str, float]:
    """Sensitivities in nats, best losses, and largest attention logits."""
    learned, held_out = texts(seed, VOCABULARY, LENGTH)
    initial = held_out_loss(transformer(seed, False), held_out)
    logits: dict[bool, list[float]] = {False: [], True: []}

    def trained(normalised: bool, rate: float) -> float:
        loss, largest = run(seed, learned, held_out, rate, normalised)
        logits[normalised].append(largest)
        return loss

    plain, stable = (
        training.learning_rate_sweep(lambda rate, _, kind=kind: trained(kind, rate), RATES, initial)
        for kind in (False, True)
    )
    law = training.logit_growth(RATES[:4], logits[False][:4], at=RATES[4:5])
    return {
        "sensitivity, normalised and z-loss": stable["sensitivity"],
        "sensitivity, plain": plain["sensitivity"],
        "best loss, normalised and z-loss": stable["best loss"],
        "best loss, plain": plain["best loss"],
        "best rate, normalised and z-loss": stable["best rate"],
        "best rate, plain": plain["best rate"],
        "largest attention logit, normalised and z-loss": finite(logits[True][-2]),
        "largest attention logit, plain": finite(logits[False][-2]),
        "exponent of the logits' growth": law["exponent"],
        "logit foreseen at 0.1, over measured": law["fitted"][-1] / logits[False][4],
        "initial loss": initial,
    }


def finite(value: float) -> float:
    """A run that failed may leave no number."""
    return value if math.isfinite(value) else 1e9


def run(seed: int, learned: Tensor, held_out: Tensor, rate: float, normalised: bool) -> tuple[float, float]:
    """The final loss on held-out text, and the largest attention logit half-way, where the rate is still high."""
    model = transformer(seed, normalised)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    monitor = training.StabilityMonitor(model)
    for step, ids in enumerate(batches(seed, learned)):
        done = step / STEPS
        for group in optimizer.param_groups:
            group["lr"] = rate * (min(1.0, (step + 1) / 10) * (1 + math.cos(math.pi * done)) / 2)
        middle = step == STEPS // 2
        if middle:
            with monitor.watching():
                logits = model(ids)
        else:
            logits = model(ids)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        if normalised:
            loss = loss + training.z_loss(logits)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if middle:
            monitor.step(loss=loss.detach(), logits=logits)
        optimizer.step()
    return held_out_loss(model, held_out), monitor.report()["largest attention logit"]


def batches(seed: int, learned: Tensor) -> Iterator[Tensor]:
    """Random texts."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        yield learned[torch.randint(len(learned), (BATCH,), generator=generator)]


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Tensor) -> float:
    """Mean loss of 64 texts."""
    ids = held_out[:64]
    return float(functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


class QueryKeyNorm(nn.Module):
    """Layer norms of queries and of keys, over each head's width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(query), self.key(key)


class Block(nn.Module):
    """Attention and a wide layer, each after a norm."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.heads = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attended = nn.Linear(WIDTH, WIDTH, bias=False)
        self.wide = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.norms = QueryKeyNorm(WIDTH // HEADS) if normalised else None

    def forward(self, states: Tensor) -> Tensor:
        parts = self.heads(self.first(states)).chunk(3, dim=2)
        query, key, value = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        if self.norms is not None:
            query, key = self.norms(query, key)
        found = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.attended(found.transpose(1, 2).flatten(2))
        return states + self.wide(self.second(states))


class Transformer(nn.Module):
    """Two blocks."""

    def __init__(self, normalised: bool) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(normalised), Block(normalised))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        return self.head(self.norm(self.blocks(self.embed(ids) + self.places(places))))


def transformer(seed: int, normalised: bool) -> Transformer:
    """A new one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformer(normalised)
