"""Measured claims: does what a paper says hold here, on real data, over several seeds?

A claim is a file ``claims/<key_with_underscores>.py`` with two names in it::

    CLAIM = Claim(key="model-soups", statement="...", method="soup", baseline="best single")

    def measure(seed: int) -> dict[str, float]: ...

Further claims on the same paper are variants: ``Claim(key="model-soups", variant="text encoder", ...)``
in ``claims/model_soups__text_encoder.py``, called ``model-soups--text-encoder`` where one is named.

``measure`` returns figures by name, among them those that `Claim.method` and `Claim.baseline` name.
The runner takes, per seed, the difference *method minus baseline* (the other way round where lower
is better, so that more is always better) and puts a 95 % Student interval around the mean of these
paired differences. The claim asserts ``difference >= margin``. The verdict is

- ``holds`` when the whole interval is at or above the margin,
- ``does not hold`` when the whole interval is below it,
- ``undecided`` when the margin lies inside: the seeds do not tell.

Results are kept whatever they say, with versions, seeds and a digest of the claim's text, so that a
result older than its claim shows.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from weightsmith.errors import Error, did_you_mean, listed, missing

Verdict = Literal["holds", "does not hold", "undecided"]
Measure = Callable[[int], Mapping[str, float]]

CONFIDENCE = 0.95
_SOURCE = "the claim's file or the helper that it imports says where its data come from"


@dataclasses.dataclass(frozen=True)
class Claim:
    """What is asserted, and between which two figures.

    Attributes:
        key: the paper's key in the catalogue.
        statement: the assertion, in a sentence.
        method: name of the figure that should be better.
        baseline: name of the figure it is compared with.
        higher_is_better: False for losses, errors and times.
        margin: by how much it must be better, in the figures' unit; below 0 for "no worse than".
        seeds: one measurement each; at least two, or there is no interval.
        needs: packages that are not dependencies of weightsmith, by the name they are imported with.
        variant: what sets this claim apart from the key's others, in a word or two; empty for the first.

    Raises:
        Error: fewer than two seeds, or one named twice; a variant that makes no file name.
    """

    key: str
    statement: str
    method: str
    baseline: str
    higher_is_better: bool = True
    margin: float = 0.0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    needs: tuple[str, ...] = ()
    variant: str = ""

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < max(len(self.seeds), 2):
            raise Error(f"claim {self.name}: needs at least 2 different seeds, got {list(self.seeds)}")
        if not re.fullmatch(r"([a-z0-9]+( [a-z0-9]+)*)?", self.variant):
            raise Error(f"claim {self.key}: its variant is words of small letters and digits, got {self.variant!r}")

    @property
    def name(self) -> str:
        """What it is called where one claim is meant: ``model-soups--text-encoder``."""
        return claim_name(Path(file_name(self.key, self.variant)))


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured, and the verdict that follows from it.

    ``figures`` holds per name one value per seed. ``difference`` is the mean of the paired
    differences and ``interval`` its 95 % interval, in the figures' unit, more being better.
    ``versions`` and ``digest`` (of the claim file's text) say what was run.
    """

    key: str
    statement: str
    method: str
    baseline: str
    higher_is_better: bool
    margin: float
    seeds: tuple[int, ...]
    figures: dict[str, list[float]]
    difference: float
    interval: tuple[float, float]
    verdict: Verdict
    seconds: float
    versions: dict[str, str]
    digest: str
    variant: str = ""


def file_name(key: str, variant: str = "") -> str:
    """The name of a claim's file.

    >>> file_name("model-soups"), file_name("model-soups", "text encoder")
    ('model_soups.py', 'model_soups__text_encoder.py')
    """
    return "__".join(filter(None, (key, variant))).replace("-", "_").replace(" ", "_") + ".py"


def claim_name(path: Path) -> str:
    """What a claim file's claim is called: its key, with ``--`` and its variant where it has one.

    >>> claim_name(Path("claims/model_soups__text_encoder.py"))
    'model-soups--text-encoder'
    """
    return path.stem.replace("_", "-")


def key_of(path: Path) -> str:
    """The key of a claim file.

    >>> key_of(Path("claims/model_soups__text_encoder.py"))
    'model-soups'
    """
    return claim_name(path).partition("--")[0]


def digest(path: Path) -> str:
    """SHA-256 of a claim file's text, and of the helpers (``_*.py`` beside it) that it imports."""
    total = hashlib.sha256(path.read_bytes())
    for helper in helpers(path):
        total.update(helper.read_bytes())
    return total.hexdigest()


def helpers(path: Path) -> list[Path]:
    """The files beside a claim from which it imports: what several claims measure with."""
    names = re.findall(r"^(?:from|import) (_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [file for name in dict.fromkeys(names) if (file := path.with_name(f"{name}.py")).exists()]


def result_path(path: Path) -> Path:
    """Where the result of a claim file is kept: ``results/<name>.json`` beside it."""
    return path.parent / "results" / f"{claim_name(path)}.json"


def find(folder: Path, keys: Iterable[str] = ()) -> list[Path]:
    """The claim files of a folder, or those of some keys; ``key--variant`` is one claim of a key.

    Raises:
        Error: the folder is not there, or has no claim for a key.
    """
    if not folder.is_dir():
        raise Error(f"{folder}: no such folder of claims; name one with --folder")
    paths = sorted(folder.glob("[!_]*.py"), key=claim_name)
    known = {claim_name(path): path for path in paths}
    chosen: dict[Path, None] = {}
    for key in keys:
        found = [path for path in paths if key in (claim_name(path), key_of(path))]
        if not found:
            raise Error(f"{folder}: no claim for {key!r}{did_you_mean(key, known)}; write {file_name(key)}")
        chosen |= dict.fromkeys(found)
    return list(chosen) or paths


def load(path: Path) -> tuple[Claim, Measure]:
    """The claim and the measurement of one file. Runs the file.

    Raises:
        Error: the file lacks ``CLAIM`` or ``measure``, or is not named after its key and variant.
        MissingPackage: a package that the claim needs is not installed.
    """
    spec = importlib.util.spec_from_file_location(f"weightsmith_claim_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Error(f"{path}: cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        with _importable(path):
            spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise missing(str(error.name), "claims", f"the claim {path.name}") from None
    claim, measure = getattr(module, "CLAIM", None), getattr(module, "measure", None)
    if not isinstance(claim, Claim) or not callable(measure):
        raise Error(f"{path}: a claim file defines CLAIM = Claim(...) and measure(seed)")
    if path.name != file_name(claim.key, claim.variant):
        raise Error(f"{path}: the claim {claim.name} belongs in {file_name(claim.key, claim.variant)}")
    for package in claim.needs:
        if importlib.util.find_spec(package) is None:
            raise missing(package, "claims", f"the claim {claim.name}")
    return claim, cast(Measure, measure)


@contextmanager
def _importable(path: Path) -> Iterator[None]:
    """Let a claim import the helpers beside it, and leave no trace: another folder may have some of that name."""
    sys.path.insert(0, str(path.parent))
    try:
        yield
    finally:
        sys.path.remove(str(path.parent))
        for helper in helpers(path):
            sys.modules.pop(helper.stem, None)


def run(path: Path, tell: Callable[[str], None] = lambda line: None) -> Result:
    """Measure a claim on all of its seeds. ``tell`` is given one line per seed.

    Raises:
        Error: ``measure`` does not find its data, does not return the figures that the claim names, or they are
            not finite.
    """
    claim, measure = load(path)
    told = digest(path)
    began = time.perf_counter()
    rows: list[dict[str, float]] = []
    for seed in claim.seeds:
        try:
            figures = measure(seed)
        except FileNotFoundError as error:
            raise Error(f"claim {claim.name}, seed {seed}: {error.filename} is not there; {_SOURCE}") from None
        rows.append(_checked(claim, seed, figures))
        tell(f"{claim.name} seed {seed}: " + ", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    return judge(claim, rows, seconds=time.perf_counter() - began, digest=told)


def _checked(claim: Claim, seed: int, figures: Mapping[str, float]) -> dict[str, float]:
    where = f"claim {claim.name}, seed {seed}"
    for name in (claim.method, claim.baseline):
        if name not in figures:
            raise Error(f"{where}: measured no {name!r}, only {listed(map(repr, figures))}")
    unusable = [name for name, value in figures.items() if not math.isfinite(value)]
    if unusable:
        raise Error(f"{where}: {listed(unusable)} is not a finite number")
    return {name: float(value) for name, value in figures.items()}


def judge(claim: Claim, rows: Sequence[Mapping[str, float]], *, seconds: float = 0.0, digest: str = "") -> Result:
    """The result that follows from one row of figures per seed.

    >>> claim = Claim("x", "a is more than b", method="a", baseline="b", seeds=(0, 1, 2))
    >>> judge(claim, [{"a": 3.0, "b": 1.0}, {"a": 3.1, "b": 1.0}, {"a": 2.9, "b": 1.0}]).verdict
    'holds'
    """
    if len(rows) != len(claim.seeds):
        raise Error(f"claim {claim.name}: {len(claim.seeds)} seeds but {len(rows)} rows of figures")
    sign = 1 if claim.higher_is_better else -1
    differences = [sign * (row[claim.method] - row[claim.baseline]) for row in rows]
    mean, interval = statistics.fmean(differences), student_interval(differences)
    asserted = {field: getattr(claim, field) for field in _SHARED}
    return Result(
        **asserted,
        figures={name: [row[name] for row in rows] for name in rows[0] if all(name in row for row in rows)},
        difference=mean,
        interval=interval,
        verdict=verdict(interval, claim.margin),
        seconds=round(seconds, 1),
        versions=versions(),
        digest=digest,
    )


_SHARED = ("key", "variant", "statement", "method", "baseline", "higher_is_better", "margin", "seeds")


def verdict(interval: tuple[float, float], margin: float) -> Verdict:
    """What an interval of the difference says about ``difference >= margin``.

    >>> verdict((0.1, 0.3), 0.0), verdict((-0.3, -0.1), 0.0), verdict((-0.1, 0.3), 0.0)
    ('holds', 'does not hold', 'undecided')
    """
    low, high = interval
    if low >= margin:
        return "holds"
    return "does not hold" if high < margin else "undecided"


def student_interval(values: Sequence[float]) -> tuple[float, float]:
    r"""The 95 % interval of a mean, from at least two independent values.

    .. math:: \bar x \pm t_{n-1}\, s / \sqrt n

    >>> low, high = student_interval([1.0, 2.0, 3.0])
    >>> round(low, 3), round(high, 3)
    (-0.484, 4.484)
    """
    if len(values) < 2:
        raise Error(f"an interval needs at least 2 values, got {len(values)}")
    mean = statistics.fmean(values)
    half = student_quantile(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


@functools.cache
def student_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """``t`` such that a Student variable of ``freedom`` degrees lies in ``[-t, t]`` with that probability.

    >>> round(student_quantile(1), 3), round(student_quantile(9), 3)
    (12.706, 2.262)
    """
    # With t = sqrt(freedom) tan(a) the density of the angle is cos(a) ** (freedom - 1): bounded, on [0, pi / 2].
    whole = _simpson(freedom - 1, math.pi / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        inside = _simpson(freedom - 1, middle) < confidence * whole
        low, high = (middle, high) if inside else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _simpson(power: int, stop: float, steps: int = 400) -> float:
    """The integral of ``cos ** power`` from 0 to ``stop``."""
    values = [math.cos(stop * i / steps) ** power for i in range(steps + 1)]
    return stop / steps / 3 * (values[0] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]) + values[-1])


def versions() -> dict[str, str]:
    """Of what a measurement depends on: weightsmith, torch and Python."""
    from weightsmith._version import __version__

    return {"weightsmith": __version__, "torch": metadata.version("torch"), "python": platform.python_version()}


# Results on disk


def write(result: Result, path: Path) -> Path:
    """Keep a result beside its claim file; returns where. An older one is replaced whole."""
    target = result_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False) + "\n"
    partial = target.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, target)
    return target


def read(path: Path) -> Result | None:
    """The result kept for a claim file, or None.

    Raises:
        Error: the file is not a result.
    """
    target = result_path(path)
    if not target.exists():
        return None
    try:
        fields: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
        return Result(**{**fields, "seeds": tuple(fields["seeds"]), "interval": tuple(fields["interval"])})
    except (ValueError, TypeError, KeyError) as error:
        raise Error(f"{target}: not a claim's result ({error}); run the claim again") from None


def is_stale(result: Result, path: Path) -> bool:
    """Whether the claim file was changed after the result was measured."""
    return result.digest != digest(path)


def default_folder() -> Path:
    """``claims`` of the checkout that this package runs from, else ``claims`` where one stands."""
    checkout = Path(__file__).parents[2]
    inside = (checkout / "pyproject.toml").exists() and (checkout / "claims").is_dir()
    return checkout / "claims" if inside else Path("claims")
