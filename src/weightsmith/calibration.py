"""Texts as calibration data: windows of tokens, how they were chosen, and whether they are those one evaluates on.

What pruning and quantizing learn of a model's inputs they learn from these windows, so the choice is a part of the
result: it has a fingerprint, and a text that is to judge the result must not be among them. Nothing is fetched: the
tokenizer is the one beside the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith import language
from weightsmith.errors import Error

if TYPE_CHECKING:
    from torch import Tensor

SPAN = 20
"""Tokens in a row that two texts share only if one was taken from the other, as a rule."""

MOST_SHARED = 0.01
"""The share of a text's spans that may stand in the calibration data: licences and set phrases."""


@dataclass(frozen=True)
class File:
    """A text that windows were taken from."""

    name: str
    sha256: str
    windows: int


@dataclass(frozen=True)
class Texts(Sequence[Any]):
    """Batches of one window each: ``{"input_ids": [1, length]}``, for encoders with ``"attention_mask"`` as well.

    Attributes:
        windows: the tokens.
        files: where they are from.
        length: tokens of a window.
        seed: what they were chosen with.
        masked: whether the model is an encoder, which fills in masked words.

    >>> Texts(((1, 2), (3, 4)), (), length=2, seed=0)[1]
    {'input_ids': tensor([[3, 4]])}
    """

    windows: tuple[tuple[int, ...], ...]
    files: tuple[File, ...]
    length: int
    seed: int
    masked: bool = False
    _tokenizer: Any = field(default=None, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> Any:
        import torch

        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        tokens: Tensor = torch.tensor([self.windows[index]])
        batch = {"input_ids": tokens}
        return {**batch, "attention_mask": torch.ones_like(tokens)} if self.masked else batch

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files' contents, the tokens, their number and their length."""
        said = [[file.sha256 for file in self.files], self.windows, len(self), self.length]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    @property
    def record(self) -> dict[str, Any]:
        """What a report says of them, as plain data."""
        files = [{"name": file.name, "sha256": file.sha256, "windows": file.windows} for file in self.files]
        return {
            "fingerprint": self.fingerprint,
            "samples": len(self),
            "length": self.length,
            "seed": self.seed,
            "files": files,
        }

    def overlap(self, path: str | os.PathLike[str]) -> float:
        """How much of a text stands in these windows: the share of its runs of `SPAN` tokens, from 0 to 1."""
        text = language.read_text(path)
        tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) < SPAN:
            raise Error(f"{path}: {len(tokens)} tokens are too few to be compared; {SPAN} at least")
        import numpy

        own = numpy.concatenate([_spans(window) for window in self.windows])
        return float(numpy.isin(_spans(tokens), own).mean())


def batches(weights: Any, given: Any, samples: int = 128, length: int = 512, *, seed: int = 0) -> Sequence[Any]:
    """Batches of text files, or those that are given, as a sequence.

    Args:
        weights: what carries the tokenizer; only asked for texts.
        given: a text file, several, or batches as `weightsmith.stats.collect` takes them.
        samples, length, seed: as in `texts`.

    Raises:
        Error: nothing is given, or what `texts` raises.

    >>> batches({}, [1, 2])
    [1, 2]
    """
    given = [given] if isinstance(given, str | os.PathLike) else given
    listed = given if isinstance(given, Texts) else list(given)
    if not listed:
        raise Error("calibration needs a text file or batches; got none")
    if isinstance(listed, list) and all(isinstance(one, str | os.PathLike) for one in listed):
        return texts(weights, listed, samples=samples, length=length, seed=seed)
    return listed


def texts(
    weights: Any,
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    samples: int = 128,
    length: int = 512,
    *,
    seed: int = 0,
    apart_from: Iterable[str | os.PathLike[str]] = (),
) -> Texts:
    """Windows of tokens from texts, as many from each, drawn without replacement from windows that do not overlap.

    Args:
        weights: anything `weightsmith.open` opens that carries its config and its tokenizer.
        paths: files of text (UTF-8).
        samples: windows in all; one after the other from each text in turn.
        length: tokens of a window, special ones included.
        seed: of the draw.
        apart_from: texts that the result will be judged on.

    Returns:
        Texts: a sequence of batches, with their fingerprint.

    Raises:
        Error: no text, a text that is too short for its share, that cannot be read or that is in ``apart_from`` (the
            same file, or more than `MOST_SHARED` of its spans); no config or tokenizer beside the weights; a length
            that the model does not take.

    >>> texts({}, [], samples=4)
    Traceback (most recent call last):
    weightsmith.errors.Error: calibration: 4 windows of 0 texts; at least 1 text, and 1 window of each
    """
    import torch

    from weightsmith.solve import generator_for
    from weightsmith.weights import open

    places = [Path(p) for p in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    if not places or samples < len(places):
        raise Error(f"calibration: {samples} windows of {len(places)} texts; at least 1 text, and 1 window of each")
    language.check("calibration", length, samples, "cpu")
    files = language.carried(open(weights))
    config, tokenizer = language.config_and_tokenizer(files, _check)
    others = {Path(p): _sha256(Path(p)) for p in apart_from}
    model, masked = _without_weights(config), _is_masked(config)
    back = _back(tokenizer) if masked else ()
    drawn: list[list[tuple[int, ...]]] = []
    made: list[File] = []
    for number, place in enumerate(places):
        sha = _sha256(place)
        _check_apart(place, sha, others)
        wanted = samples // len(places) + (number < samples % len(places))
        found = language.cut(language.read_text(place), tokenizer, model, length - len(back), None, str(place)).tokens
        whole = [window for window in found if len(window) + len(back) == length]
        if len(whole) < wanted:
            raise Error(
                f"{place}: has {len(whole)} windows of {length} tokens, and {wanted} are wanted; take fewer samples, "
                "shorter ones or a longer text"
            )
        order = torch.randperm(len(whole), generator=generator_for(seed, number))[:wanted].tolist()
        drawn.append([(*whole[index], *back) for index in order])
        made.append(File(place.name, sha, wanted))
    turns = max(len(windows) for windows in drawn)
    mixed = tuple(windows[turn] for turn in range(turns) for windows in drawn if turn < len(windows))
    result = Texts(mixed, tuple(made), length, seed, masked, tokenizer)
    for other in others:
        if (share := result.overlap(other)) > MOST_SHARED:
            raise Error(
                f"{other}: {share:.0%} of it stands in the calibration data word for word, so it cannot judge the "
                "result; calibrate on another text"
            )
    return result


def _check(config: Any) -> None:
    """An error for models that a text alone does not run."""
    if getattr(config, "is_encoder_decoder", False):
        raise Error(f"calibration on a text needs a language model or an encoder; {config.model_type} translates")


def _is_masked(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)


def _without_weights(config: Any) -> Any:
    """What of the model a text is cut for: how long it may be, and which tokens there are."""
    import torch
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except Exception as error:  # transformers raises whatever comes
        raise Error(f"transformers cannot make the model of this config.json: {error}") from error


def _back(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts after a text."""
    bare, dressed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = (at for at in range(len(dressed)) if dressed[at : at + len(bare)] == bare)
    return tuple(dressed[next(starts, len(dressed)) + len(bare) :])


def _sha256(path: Path) -> str:
    language.read_text(path)  # so that the error for what is no text is the usual one
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_apart(place: Path, sha: str, others: dict[Path, str]) -> None:
    same = next((other for other, own in others.items() if own == sha), None)
    if same is not None:
        raise Error(f"{place}: is to be judged on as well ({same}); calibrate on another text")


def _spans(tokens: Sequence[int]) -> Any:
    """A number for every run of `SPAN` tokens, ``[len - SPAN + 1]`` uint64."""
    import numpy

    values = numpy.asarray(tokens, dtype=numpy.uint64) + numpy.uint64(1)
    count = max(len(values) - SPAN + 1, 0)
    total = numpy.zeros(count, dtype=numpy.uint64)
    with numpy.errstate(over="ignore"):
        for shift in range(SPAN):
            total = total * numpy.uint64(0x9E3779B97F4A7C15) + values[shift : shift + count]
    return total
