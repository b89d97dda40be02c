"""What the demo does: every step from the shared start to a small model, each kept as a folder.

A step opens the folders before it and writes its own, so that what is measured later is what
anyone would read from disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith import merge, progress, prune, quantize
from weightsmith.demo._task import Digits, accuracy, initial, train
from weightsmith.weights import Weights
from weightsmith.weights import open as open_weights


@dataclass(frozen=True)
class Settings:
    """What a run is made with. Chosen so that models differ and the whole is quick; the same for every seed."""

    start_epochs: int = 40
    start_rate: float = 2e-3
    epochs: int = 20
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    sparsity: float = 0.8
    repair_epochs: int = 20
    repair_rate: float = 1e-3
    bits: tuple[int, ...] = (8, 4, 2)
    small_bits: int = 4
    points: int = 21
    """Places on the line between two siblings at which it is evaluated."""


QUICK = Settings(start_epochs=4, epochs=2, rates=(1e-3,), repair_epochs=2, bits=(4,), points=5)
"""Tiny, for tests: everything happens, nothing is learnt well."""


@dataclass(frozen=True)
class Made:
    """A checkpoint in its folder, and how it came about."""

    key: str
    """The name of its folder."""
    title: str
    kind: str
    """start, sibling, averaged, pruned or quantized."""
    about: str
    python: str
    """Lines that make it again, run in the folder of all checkpoints."""
    reference: str
    """The checkpoint it is compared with; ``"best"`` for the best sibling."""
    seconds: float


@dataclass(frozen=True)
class Sibling:
    """How one fine-tune differs from the others."""

    key: str
    number: int
    rate: float
    shifted: float

    @property
    def augmentation(self) -> str:
        """In words."""
        return "shifted pictures" if self.shifted else "plain pictures"


def siblings_of(settings: Settings) -> list[Sibling]:
    """Every learning rate, with plain and with shifted pictures."""
    choices = [(rate, shifted) for rate in settings.rates for shifted in (0.0, 1.0)]
    return [Sibling(f"sibling-{n}", n, rate, shifted) for n, (rate, shifted) in enumerate(choices, 1)]


def steps_of(settings: Settings) -> int:
    """How many checkpoints `make` writes."""
    return 1 + len(siblings_of(settings)) + 3 + 2 + len(settings.bits) + 1


def make(
    folder: Path, data: Digits, seed: int, settings: Settings, told: Callable[[int], None]
) -> tuple[list[Made], list[str]]:
    """Make and write every checkpoint.

    Args:
        folder: gets one folder for each.
        data: from `digits` with the same seed.
        told: called with 1 after each checkpoint.

    Returns:
        What was made, in order, and the keys of the siblings that the greedy soup is made of.
    """
    made: list[Made] = []

    def keep(step: Made, produce: Callable[[], Weights]) -> None:
        began = time.perf_counter()
        with progress.silent():  # a bar for each of many short saves would only flicker
            produce().save(folder / step.key, overwrite=True)
        made.append(_timed(step, time.perf_counter() - began))
        told(1)

    def at(key: str) -> Weights:
        return open_weights(folder / key)

    _train_all(keep, at, data, seed, settings)
    members = _average(keep, at, data, siblings_of(settings))
    _prune(keep, at, data, seed, settings)
    _quantize(keep, at, settings)
    return made, members


Keep = Callable[[Made, Callable[[], Weights]], None]
At = Callable[[str], Weights]


def _timed(step: Made, seconds: float) -> Made:
    return Made(step.key, step.title, step.kind, step.about, step.python, step.reference, seconds)


def _step(key: str, title: str, kind: str, about: str, call: str, reference: str, before: Sequence[str] = ()) -> Made:
    python = "\n".join([*before, f"weights = {call}", f'weights.save("{key}")'])
    return Made(key, title, kind, about, python, reference, 0.0)


def _train_all(keep: Keep, at: At, data: Digits, seed: int, settings: Settings) -> None:
    own = 100 * seed  # a seed for each training; those of two runs have none in common
    epochs, rate = settings.start_epochs, settings.start_rate
    keep(
        _step(
            "start",
            "shared start",
            "start",
            f"Trained from nothing on {len(data.start)} pictures, shifted at random; {epochs} epochs at {rate:g}.",
            f"demo.train(demo.initial(seed={seed}), data.start, epochs={epochs}, rate={rate}, shifted=1.0, seed={own})",
            "best",
        ),
        lambda: train(initial(seed), data.start, epochs=epochs, rate=rate, shifted=1.0, seed=own),
    )
    for one in siblings_of(settings):
        options = {"epochs": settings.epochs, "rate": one.rate, "shifted": one.shifted, "seed": own + one.number}
        keep(
            _step(
                one.key,
                f"sibling {one.number}",
                "sibling",
                f"The start, trained on with {len(data.training)} {one.augmentation}; "
                f"{settings.epochs} epochs at {one.rate:g}.",
                f'demo.train(ws.open("start"), data.training, {_written(options)})',
                "best",
            ),
            lambda options=options: train(at("start"), data.training, **options),
        )


def _average(keep: Keep, at: At, data: Digits, siblings: Sequence[Sibling]) -> list[str]:
    keys = [one.key for one in siblings]
    models = f'[f"sibling-{{n}}" for n in range(1, {len(keys) + 1})]'
    keep(
        _step("soup", "uniform soup", "averaged", "The mean of all siblings.", f"ws.merge.mean({models})", "best"),
        lambda: merge.mean([at(key) for key in keys]),
    )
    scores: list[float] = []
    taken: list[int] = []

    def evaluate(weights: Weights) -> float:
        scores.append(accuracy(weights, data.validation))
        return scores[-1]

    keep(
        _step(
            "greedy-soup",
            "greedy soup",
            "averaged",
            "The mean of those siblings that do not make it worse on the validation pictures.",
            f"ws.merge.greedy_soup({models}, lambda w: demo.accuracy(w, data.validation))",
            "best",
        ),
        lambda: merge.greedy_soup(
            [at(key) for key in keys], evaluate, lambda tasting: taken.extend([tasting.candidate] * tasting.taken)
        ),
    )
    keep(
        _step(
            "model-stock",
            "Model Stock",
            "averaged",
            "From the start towards the mean of the siblings, as far as the angles between them say.",
            f'ws.merge.model_stock({models}, base="start")',
            "best",
        ),
        lambda: merge.model_stock([at(key) for key in keys], base=at("start")),
    )
    first = scores[: len(keys)]
    return [keys[first.index(max(first))], *(keys[index] for index in taken)]


def _prune(keep: Keep, at: At, data: Digits, seed: int, settings: Settings) -> None:
    percent = f"{100 * settings.sparsity:g} %"
    keep(
        _step(
            "pruned",
            "pruned",
            "pruned",
            f"The greedy soup without the smallest {percent} of every matrix and convolution.",
            f'ws.prune.magnitude("greedy-soup", sparsity={settings.sparsity})',
            "greedy-soup",
        ),
        lambda: prune.magnitude(at("greedy-soup"), settings.sparsity),
    )
    options = {"epochs": settings.repair_epochs, "rate": settings.repair_rate, "shifted": 0.5, "seed": 100 * seed + 50}
    keep(
        _step(
            "repaired",
            "pruned, repaired",
            "pruned",
            f"The pruned one, trained for {settings.repair_epochs} epochs more (half of the pictures shifted) "
            "with its zeros held at zero.",
            f"demo.train(pruned, data.training, {_written(options)}, mask=ws.prune.mask_of(pruned))",
            "greedy-soup",
            ['pruned = ws.open("pruned")'],
        ),
        lambda: train(at("pruned"), data.training, **options, mask=prune.mask_of(at("pruned"))),
    )


def _quantize(keep: Keep, at: At, settings: Settings) -> None:
    wanted = [("greedy-soup", bits) for bits in settings.bits] + [("repaired", settings.small_bits)]
    for source, bits in wanted:
        is_soup = source == "greedy-soup"
        keep(
            _step(
                f"{bits}-bit" if is_soup else f"repaired-{bits}-bit",
                f"{bits}-bit" if is_soup else f"pruned, repaired, {bits}-bit",
                "quantized",
                f"The {'greedy soup' if is_soup else 'repaired one'} with its matrices and convolutions rounded "
                f"to {bits} bits.",
                f'ws.quantize.rtn("{source}", bits={bits})',
                source,
            ),
            lambda source=source, bits=bits: quantize.rtn(at(source), bits=bits),
        )


def _written(options: dict[str, float]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
