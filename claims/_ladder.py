"""A ladder of small character models, trained on Python's own library: what claims on scaling laws measure with.

A model sees the last 8 characters (of 64 kinds) through an embedding and two hidden layers, and tells the next. A
dozen seconds on one core train all widths; a run's losses are read at several points along it, with a constant
learning rate, so that each width gives a loss for several amounts of data.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _digits import one_thread
from torch import Tensor, nn
from torch.nn import functional

KINDS, CONTEXT = 64, 8
WIDTHS = (8, 16, 32, 64, 128)
MARKS = (100, 200, 400, 800)
BATCH = 512

Texts = tuple[Tensor, Tensor]
"""Characters for training and for testing, from different files."""


@functools.cache
def code() -> Texts:
    """The sources of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return _split(sorted(folder.glob("*.py")))


@functools.cache
def prose() -> Tensor:
    """The language reference that Python carries for its help: English about Python, in no file of `code`."""
    file = Path(sysconfig.get_paths()["stdlib"]) / "pydoc_data" / "topics.py"
    return _alphabet()[torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8).long()]


@functools.cache
def _alphabet() -> Tensor:
    """Byte -> kind: letters without case, digits, the usual signs; everything else is one kind."""
    kinds = torch.full((256,), 63)
    signs = "abcdefghijklmnopqrstuvwxyz0123456789 \n_.,:;()[]{}'\"=+-*/<>#@\\"
    for index, sign in enumerate(signs[:63]):
        kinds[ord(sign)] = index
        kinds[ord(sign.upper())] = index
    return kinds


def _split(files: Sequence[Path]) -> Texts:
    if not files:
        raise FileNotFoundError(2, "no sources", "the sources of Python's library")
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for index, file in enumerate(files):
        parts[index % 5 == 4].append(file.read_bytes())
    kinds = _alphabet()
    train, test = (kinds[torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long()] for part in parts)
    return train, test


def model(width: int, seed: int, depth: int = 2) -> nn.Sequential:
    """An embedding of 16, hidden layers of this width, 64 answers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = [nn.Embedding(KINDS, 16), nn.Flatten()]
        inside = 16 * CONTEXT
        for _ in range(depth):
            layers += [nn.Linear(inside, width), nn.ReLU()]
            inside = width
        return nn.Sequential(*layers, nn.Linear(inside, KINDS))


def size(made: nn.Module) -> int:
    """Parameters without the embedding."""
    return sum(parameter.numel() for parameter in made.parameters()) - KINDS * 16


def windows(text: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """The characters before and at some places."""
    at = places[:, None] + torch.arange(CONTEXT + 1)
    cut = text[at]
    return cut[:, :-1], cut[:, -1]


@torch.no_grad()
def held_out(made: nn.Module, text: Tensor, count: int = 8192) -> tuple[float, float]:
    """Mean loss, and share of characters told right, at fixed places of a text."""
    places = torch.randint(len(text) - CONTEXT - 1, (count,), generator=torch.Generator().manual_seed(0))
    inputs, right = windows(text, places)
    logits = made(inputs)
    return float(functional.cross_entropy(logits, right)), float((logits.argmax(dim=1) == right).float().mean())


@one_thread()
def train(
    made: nn.Module,
    text: Tensor,
    steps: int,
    seed: int,
    batch: int = BATCH,
    rate: Callable[[int], float] = lambda step: 2e-3,
    after: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """Adam; ``rate(step)`` from step 0, ``after(steps done)``. Returns the training losses."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(made.parameters(), lr=rate(0))
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        places = torch.randint(len(text) - CONTEXT - 1, (batch,), generator=generator)
        inputs, right = windows(text, places)
        loss = functional.cross_entropy(made(inputs), right)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        after(step + 1)
    return losses


@functools.cache
def table(seed: int) -> tuple[dict[str, float], ...]:
    """A record a width and mark: N, D (characters), loss and share told right on code, and the loss on prose."""
    train_text, test_text = code()
    other = prose()
    rows: list[dict[str, float]] = []
    for width in WIDTHS:
        made = model(width, seed)

        def mark(done: int, made: nn.Module = made) -> None:
            if done in MARKS:
                loss, right = held_out(made, test_text)
                row = {"N": size(made), "D": done * BATCH, "loss": loss, "accuracy": right, "error": 1 - right}
                rows.append(row | {"prose": held_out(made, other)[0]})

        train(made, train_text, max(MARKS), seed, after=mark)
    return tuple(rows)
