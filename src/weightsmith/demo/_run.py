"""A run of the demo: make the checkpoints, read each back, measure it, write the report."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightsmith import errors, progress
from weightsmith._version import __version__
from weightsmith.demo._make import Made, Settings, Sibling, make, siblings_of, steps_of
from weightsmith.demo._measure import Difference, Share, bytes_on_disk, difference, share, zeros_by_tensor
from weightsmith.demo._task import Digits, accuracy, digits, right
from weightsmith.weights import open as open_weights

MARK = "weightsmith demo"
RECORD, REPORT = "demo.json", "report.html"


@dataclass(frozen=True)
class Row:
    """A checkpoint and what was measured on it, read back from its folder."""

    made: Made
    validation: Share
    test: Share
    shifted: Share
    against: Difference | None
    """On the test pictures, against the checkpoint ``made.reference``; None for that itself."""
    against_shifted: Difference | None
    nbytes: int
    zeros: dict[str, tuple[int, int]]
    """Tensor -> (zeros, values)."""
    lineage: str

    @property
    def share_of_zeros(self) -> float:
        """Among all values."""
        return sum(zero for zero, _ in self.zeros.values()) / sum(count for _, count in self.zeros.values())


@dataclass(frozen=True)
class Point:
    """A place between two siblings (0 is the first, 1 the second) and the accuracy there."""

    place: float
    test: float
    shifted: float


@dataclass(frozen=True)
class Outcome:
    """All that a run found."""

    folder: Path
    seed: int
    settings: Settings
    rows: list[Row]
    best: str
    """The sibling with the highest accuracy on the validation pictures."""
    members: list[str]
    """The siblings in the greedy soup, in the order in which they were taken."""
    ends: tuple[Sibling, Sibling]
    line: list[Point]
    sizes: dict[str, int]
    """How many pictures each part of the data has."""
    seconds: float
    versions: dict[str, str]

    def row(self, key: str) -> Row:
        """The row of a checkpoint; ``"best"`` is the best sibling's."""
        wanted = self.best if key == "best" else key
        return next(row for row in self.rows if row.made.key == wanted)

    @property
    def report(self) -> Path:
        """Where the report is."""
        return self.folder / REPORT


def run(
    folder: str | os.PathLike[str] = "weightsmith-demo", seed: int = 0, settings: Settings | None = None
) -> Outcome:
    """Make all checkpoints, measure them, and write the report.

    Args:
        folder: gets a folder for each checkpoint, ``report.html`` and ``demo.json``. One that an
            earlier run made is overwritten; one that holds anything else is refused.
        seed: of the split, the training and the intervals. The same seed gives the same figures
            (but for seconds) on the same machine and versions.
        settings: what to make; default `Settings()`.

    Raises:
        MissingPackage: scikit-learn or matplotlib is not installed.
        OutputError: the folder holds something that no demo made.
    """
    from weightsmith.demo import _report

    began = time.perf_counter()
    check_packages()
    place, chosen = Path(folder), settings or Settings()
    _claim(place)
    data = digits(seed)
    count = steps_of(chosen)
    with progress.task("weightsmith demo", 2 * count + chosen.points) as told:
        made, members = make(place, data, seed, chosen, told)
        best, rows = _measured(place, made, data, seed, told)
        ends, line = _between(place, data, chosen, told)
    sizes = {field.name: len(getattr(data, field.name)) for field in dataclasses.fields(data)}
    seconds = time.perf_counter() - began
    outcome = Outcome(place, seed, chosen, rows, best, members, ends, line, sizes, seconds, _versions())
    outcome.report.write_text(_report.report(outcome), encoding="utf-8")
    (place / RECORD).write_text(json.dumps(record(outcome), indent=2) + "\n", encoding="utf-8")
    return outcome


def check_packages() -> None:
    """An error, before any work, if something that the demo needs is not installed."""
    for module, package, purpose in (
        ("sklearn", "scikit-learn", "the demo's data"),
        ("matplotlib", "matplotlib", "the demo's report"),
    ):
        if importlib.util.find_spec(module) is None:
            raise errors.missing(package, "demo", purpose)


def _claim(folder: Path) -> None:
    """Make the folder the demo's own, or refuse to."""
    if folder.exists() and not folder.is_dir():
        raise errors.OutputError(f"{folder}: is a file; give a folder for the demo's output")
    if folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise errors.OutputError(
            f"{folder}: holds something that no demo made (it has no {RECORD} of one); give another folder with --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Written first, so that a run that was broken off can be started again.
    (folder / RECORD).write_text(json.dumps({"made_by": MARK}) + "\n", encoding="utf-8")


def _is_ours(folder: Path) -> bool:
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("made_by") == MARK


def _measured(
    folder: Path, made: list[Made], data: Digits, seed: int, told: Callable[[int], None]
) -> tuple[str, list[Row]]:
    parts = {"validation": data.validation, "test": data.test, "shifted": data.shifted}
    hits: dict[str, dict[str, torch.Tensor]] = {}
    for one in made:
        weights = open_weights(folder / one.key)
        hits[one.key] = {part: right(weights, examples) for part, examples in parts.items()}
        told(1)
    siblings = [one.key for one in made if one.kind == "sibling"]
    best = max(siblings, key=lambda key: int(hits[key]["validation"].sum()))  # the first, if several are
    rows = []
    for one in made:
        weights = open_weights(folder / one.key)
        reference = best if one.reference == "best" else one.reference
        against = {
            part: None if one.key == reference else difference(hits[one.key][part], hits[reference][part], seed)
            for part in ("test", "shifted")
        }
        rows.append(
            Row(
                made=one,
                validation=share(hits[one.key]["validation"]),
                test=share(hits[one.key]["test"]),
                shifted=share(hits[one.key]["shifted"]),
                against=against["test"],
                against_shifted=against["shifted"],
                nbytes=bytes_on_disk(folder / one.key),
                zeros=zeros_by_tensor(weights),
                lineage=str(weights.lineage),
            )
        )
    return best, rows


def _between(
    folder: Path, data: Digits, settings: Settings, told: Callable[[int], None]
) -> tuple[tuple[Sibling, Sibling], list[Point]]:
    """Accuracy along the line between two siblings of one learning rate, without and with shifts."""
    siblings = siblings_of(settings)
    middle = 2 * (len(settings.rates) // 2)
    ends = siblings[middle], siblings[middle + 1]
    first, second = (open_weights(folder / one.key) for one in ends)
    line = []
    for number in range(settings.points):
        place = number / (settings.points - 1)
        between = (1 - place) * first + place * second
        line.append(Point(place, accuracy(between, data.test), accuracy(between, data.shifted)))
        told(1)
    return ends, line


def _versions() -> dict[str, str]:
    return {
        "weightsmith": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def record(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON-able data; what ``--json`` prints and ``demo.json`` holds."""
    return {
        "made_by": MARK,
        "folder": str(outcome.folder),
        "report": str(outcome.report),
        "seed": outcome.seed,
        "settings": dataclasses.asdict(outcome.settings),
        "examples": outcome.sizes,
        "best_sibling": outcome.best,
        "greedy_soup_of": outcome.members,
        "checkpoints": [_row_record(row) for row in outcome.rows],
        "between": {
            "siblings": [one.key for one in outcome.ends],
            "points": [dataclasses.asdict(point) for point in outcome.line],
        },
        "seconds": round(outcome.seconds, 2),
        "versions": outcome.versions,
    }


def _row_record(row: Row) -> dict[str, Any]:
    return {
        "checkpoint": row.made.key,
        "title": row.made.title,
        "kind": row.made.kind,
        "validation": _share_record(row.validation),
        "test": _share_record(row.test),
        "shifted": _share_record(row.shifted),
        "compared_with": row.made.reference,
        "difference": row.against and dataclasses.asdict(row.against) | {"verdict": row.against.verdict},
        "difference_shifted": row.against_shifted
        and dataclasses.asdict(row.against_shifted) | {"verdict": row.against_shifted.verdict},
        "bytes": row.nbytes,
        "zeros": row.share_of_zeros,
        "seconds": round(row.made.seconds, 3),
    }


def _share_record(one: Share) -> dict[str, Any]:
    low, high = one.interval
    return {"accuracy": one.value, "low": low, "high": high, "right": one.right, "of": one.of}
