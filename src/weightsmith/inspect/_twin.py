"""What a reference model predicts for a text, kept in a file so that it is asked once.

Log-probabilities are kept in float16: near the likely tokens, which decide a divergence, they are exact to a
two-thousandth, and their errors cancel over tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weightsmith.errors import Error, OutputError
from weightsmith.text import size
from weightsmith.weights import Weights

LOWEST = -60_000.0
"""The least that is kept of a log-probability: float16 knows no smaller number."""

Predictions = Iterator[tuple[int, Tensor, Tensor]]
"""``(window, log-probabilities [rows, vocabulary], tokens that come [rows])``, in order."""


@dataclass(frozen=True)
class Twin:
    """What a reference said of the windows of one text."""

    tokens: tuple[tuple[int, ...], ...]
    losses: Tensor
    """``[windows]``, nats, summed."""
    place: Path
    vocabulary: int

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``[rows, vocabulary]``, float32 and normalized, and the likeliest tokens ``[rows]``."""
        kept = np.load(self.place / "said.npy", mmap_mode="r")[start:stop]
        likeliest = np.load(self.place / "likeliest.npy", mmap_mode="r")[start:stop]
        said = torch.from_numpy(kept.astype(np.float32))
        return said - said.logsumexp(dim=1, keepdim=True), torch.from_numpy(likeliest.astype(np.int64))


def digest(weights: Weights, *settings: Any) -> str:
    """What must be equal for a kept answer to be that of these weights."""
    own = [[name, weights.node(name).identity()] for name in weights]
    files = {name: _content(value) for name, value in sorted(weights.files.items()) if name.endswith(".json")}
    return hashlib.blake2b(json.dumps([own, files, settings], sort_keys=True).encode(), digest_size=12).hexdigest()


def _content(value: Any) -> str:
    from weightsmith.weights._files import content_of

    data = content_of(value)
    return hashlib.blake2b(data, digest_size=12).hexdigest()


@contextmanager
def folder_of(cache: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder in which answers are kept: a given one, or one that goes with its user."""
    if cache is not None:
        place = Path(cache)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cache {place}: {error.strerror or error}") from None
        yield place
        return
    with tempfile.TemporaryDirectory(prefix="weightsmith-") as made:
        yield Path(made)


def kept(place: Path, key: str, tokens: Sequence[Sequence[int]]) -> Twin | None:
    """A twin that is there whole, for these tokens."""
    folder = place / key
    try:
        known = json.loads((folder / "twin.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if known.get("tokens") != [list(window) for window in tokens]:
        return None
    losses = torch.tensor(known["losses"], dtype=torch.float64)
    return Twin(tuple(map(tuple, tokens)), losses, folder, known["vocabulary"])


def make(
    place: Path,
    key: str,
    tokens: Sequence[Sequence[int]],
    rows: int,
    vocabulary: int,
    ask: Callable[[], Predictions],
) -> Twin:
    """Ask a reference and keep its answers; the folder appears when it is whole.

    Args:
        rows: tokens that are predicted in all windows.

    Raises:
        Error: no room on the disk.
    """
    wanted, free = rows * vocabulary * 2, shutil.disk_usage(place).free
    if wanted > 0.95 * free:
        raise OutputError(
            f"{place}: what the reference says takes {size(wanted)}, and {size(free)} are free; fewer windows take less"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{key}-", suffix=".partial", dir=place))
    try:
        said = np.lib.format.open_memmap(partial / "said.npy", mode="w+", dtype=np.float16, shape=(rows, vocabulary))
        likeliest = np.empty(rows, dtype=np.int32)
        losses, done = torch.zeros(len(tokens), dtype=torch.float64), 0
        for window, logs, truth in ask():
            if not bool(logs.isfinite().any(dim=1).all()) or bool(logs.isnan().any()):
                raise Error("the reference gives no number (NaN) for some token")
            end = done + len(truth)
            said[done:end] = logs.clamp(min=LOWEST).to(torch.float16).cpu().numpy()
            likeliest[done:end] = logs.argmax(dim=1).cpu().numpy()
            losses[window] -= logs.gather(1, truth[:, None]).sum(dtype=torch.float64).cpu()
            done = end
        said.flush()
        del said
        np.save(partial / "likeliest.npy", likeliest)
        record = {"tokens": [list(window) for window in tokens], "losses": losses.tolist(), "vocabulary": vocabulary}
        (partial / "twin.json").write_text(json.dumps(record), encoding="utf-8")
        shutil.rmtree(place / key, ignore_errors=True)  # of other tokens, or not whole
        partial.rename(place / key)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Twin(tuple(map(tuple, tokens)), losses, place / key, vocabulary)
