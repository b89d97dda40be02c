"""Words of Python's own library as text for small language models: what several claims measure with."""

from __future__ import annotations

import functools
import random
import re
import sysconfig
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

UNKNOWN = 0


@functools.cache
def _words() -> list[list[str]]:
    """The words and signs of each file, in the order of the files' names."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.glob("*.py") if file.stat().st_size > 4000)
    return [re.findall(r"[A-Za-z_]+|\d+|[^\w\s]", file.read_text(encoding="utf-8", errors="ignore")) for file in files]


@functools.cache
def _coded(vocabulary: int) -> list[Tensor]:
    counts = Counter(word for words in _words() for word in words)
    known = {word: place + 1 for place, (word, _) in enumerate(counts.most_common(vocabulary - 1))}
    return [torch.tensor([known.get(word, UNKNOWN) for word in words]) for words in _words()]


def texts(seed: int, vocabulary: int, length: int, held_out: float = 0.2) -> tuple[Tensor, Tensor]:
    """Training text and held-out text ``[n, length]``, of different files; words beyond the most frequent are 0."""
    files = list(_coded(vocabulary))
    random.Random(seed).shuffle(files)
    few = round(held_out * len(files))

    def cut(parts: list[Tensor]) -> Tensor:
        whole = torch.cat(parts)
        return whole[: len(whole) // length * length].view(-1, length)

    return cut(files[few:]), cut(files[:few])
