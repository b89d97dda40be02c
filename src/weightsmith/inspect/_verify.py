"""Whether a checkpoint is whole and sane: every file opened, every value read.

Each file is looked at by itself, so that one damaged shard does not hide what is wrong with the
others. Damage is what this is for: it ends in findings, not in exceptions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from weightsmith import progress
from weightsmith.errors import Error, listed
from weightsmith.inspect._diff import diff
from weightsmith.inspect._plain import plain
from weightsmith.inspect._report import Report
from weightsmith.inspect._statistics import Statistics, statistics_of
from weightsmith.text import clean
from weightsmith.weights import Lazy, Weights, dtype_name
from weightsmith.weights import open as open_weights

Severity = Literal["error", "warning", "note"]

FORMATS = {".safetensors": "safetensors", ".gguf": "gguf", ".npz": "npz"}
FORMATS |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), "pt")

_INDEX = ".index.json"
_LARGEST_JSON = 200_000_000
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.\w+$")
# What training leaves beside a model in PyTorch files.
_NOT_MODELS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*|random_states.*)\.(bin|pt|pth)$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or worth knowing.

    ``error``: the checkpoint cannot be used as it is. ``warning``: it can, and is likely not what
    was meant. ``note``: good to know.
    """

    severity: Severity
    message: str
    file: str = ""
    """Relative to the folder that was verified."""
    tensor: str = ""


@dataclass(frozen=True)
class Verified:
    """What `verify` found, errors first."""

    path: str
    findings: tuple[Finding, ...]
    files: int
    """Files with weights that were opened."""
    tensors: int
    bytes: int

    @property
    def ok(self) -> bool:
        """No finding is an error."""
        return all(finding.severity != "error" for finding in self.findings)

    def rows(self) -> list[dict[str, Any]]:
        """One record a finding."""
        return [plain(finding) for finding in self.findings]

    def to_json(self) -> dict[str, Any]:
        """Everything as data that JSON can hold."""
        return {
            "path": self.path,
            "ok": self.ok,
            "files": self.files,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "findings": self.rows(),
        }

    def report(self) -> Report:
        """Whether it is sound, with a row a finding."""
        counts = {severity: sum(one.severity == severity for one in self.findings) for severity in _ORDER}
        return Report(
            f"Soundness of {clean(self.path)}",
            figures={
                "sound": self.ok,
                "files": self.files,
                "tensors": self.tensors,
                "bytes": self.bytes,
                **{f"{severity}s": count for severity, count in counts.items()},
            },
            table=[{name: clean(str(value)) for name, value in row.items()} for row in self.rows()],
            notes=[] if self.findings else ["Nothing is wrong with it."],
        )


@dataclass
class _Seen:
    """The files that opened, and what was found on the way."""

    parts: dict[str, Weights] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, severity: Severity, message: str, file: str = "", tensor: str = "") -> None:
        self.findings.append(Finding(severity, message, file, tensor))

    def open(self, place: str, file: str) -> None:
        try:
            part = open_weights(place)
        except Exception as error:
            self.add("error", _said(error, place), file)
            return
        self.parts[file] = part
        if not part:
            self.add("error", "has no tensors in it", file)

    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


_ORDER = ("error", "warning", "note")


def verify(path: str | os.PathLike[str], threads: int | None = None) -> Verified:
    """Read a checkpoint to its last byte and say everything that is wrong with it.

    Headers, the index against the shards, promised and unexpected tensors, values that are not
    finite, matrices that hold a single value, ``config.json`` against the tensors, and what an
    interrupted save has left.

    Args:
        path: a file or a folder, as for `weightsmith.open`; an address is read as one.
        threads: workers; default one a core.

    Returns:
        Findings; a damaged, missing or unsafe file is one of them, never an exception.
    """
    place = os.fspath(path)
    seen = _Seen()
    if os.path.isdir(place):
        _folder(Path(place), seen)
    else:
        seen.open(place, os.path.basename(place))
    if "://" not in place:
        _leftovers(Path(place), seen)
    for file, part in seen.parts.items():
        _values(file, part, seen, threads)
    if os.path.isdir(place):
        _config(Path(place), seen)
    distinct = {id(node): node for part in seen.parts.values() for node in map(part.node, part)}.values()
    return Verified(
        path=place,
        findings=tuple(sorted(seen.findings, key=lambda finding: _ORDER.index(finding.severity))),
        files=len(seen.parts),
        tensors=sum(len(part) for part in seen.parts.values()),
        bytes=sum(node.spec.nbytes for node in distinct),
    )


# Files


def _folder(folder: Path, seen: _Seen) -> None:
    try:
        files = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    except OSError as error:
        seen.add("error", error.strerror or str(error))
        return
    shards = [name for name in files if Path(name).suffix in FORMATS and not _NOT_MODELS.match(name)]
    indices = [name for name in files if name.endswith(_INDEX) and Path(name.removesuffix(_INDEX)).suffix in FORMATS]
    for name in shards:
        seen.open(str(folder / name), name)
    for index in indices:
        _index(folder, index, shards, seen)
    _numbering(shards, indices, seen)
    if not shards and not indices:
        seen.add("error", f"no weights in this folder (looked for {', '.join(FORMATS)})")
    kinds = sorted({FORMATS[Path(name).suffix] for name in shards})
    if len(kinds) > 1:
        seen.add("warning", f"weights in several formats ({', '.join(kinds)}), which may differ")
    elif not seen.has_errors():
        _together(folder, seen)


def _together(folder: Path, seen: _Seen) -> None:
    """What only opening all as one can find."""
    try:
        open_weights(folder)
    except Exception as error:
        seen.add("error", _said(error, str(folder)))


def _index(folder: Path, index: str, shards: list[str], seen: _Seen) -> None:
    try:
        content = _json(folder / index)
        promised = {str(tensor): str(shard) for tensor, shard in content["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        seen.add("error", f"no valid index with a weight_map: {str(error)[:200]}", index)
        return
    by_shard: dict[str, set[str]] = {}
    for tensor, shard in promised.items():
        by_shard.setdefault(shard, set()).add(tensor)
    for shard, tensors in sorted(by_shard.items()):
        if shard not in shards:
            seen.add("error", f"this shard is missing; it holds {listed(sorted(tensors), 3)}", shard)
        elif shard in seen.parts:
            _promises(shard, tensors, seen.parts[shard], index, seen)
    suffix = Path(index.removesuffix(_INDEX)).suffix
    for shard in shards:
        if shard not in by_shard and Path(shard).suffix == suffix:
            seen.add("warning", f"{index} does not name this file; it is not part of the checkpoint", shard)
    _total(content, index, [seen.parts[shard] for shard in by_shard if shard in seen.parts], len(by_shard), seen)


def _promises(shard: str, promised: set[str], part: Weights, index: str, seen: _Seen) -> None:
    lacking = sorted(promised - set(part))
    if lacking:
        seen.add("error", f"{index} promises {listed(lacking)}, which this shard does not have", shard)
    # A tied name may be left out: it is found through the one it is tied to.
    ties = part.ties
    extra = [name for name in part if name not in promised and name not in ties]
    if extra:
        seen.add("warning", f"{index} does not name {listed(extra)}, which this shard has", shard)


def _total(content: Any, index: str, parts: list[Weights], shards: int, seen: _Seen) -> None:
    metadata = content.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, Mapping) else None
    found = sum(part.nbytes for part in parts)
    if isinstance(total, int) and len(parts) == shards and total != found:
        seen.add("warning", f"total_size is {total:,}, the tensors have {found:,} bytes", index)


def _numbering(shards: list[str], indices: list[str], seen: _Seen) -> None:
    """Numbered shards without an index: are all of them there, and each tensor once?"""
    sets: dict[tuple[str, int], set[int]] = {}
    for shard in shards:
        if indices:
            return
        if part := _NUMBERED.match(shard):
            sets.setdefault((part["stem"], int(part["count"])), set()).add(int(part["number"]))
    for (stem, count), there in sets.items():
        lacking = sorted(set(range(1, min(count, 99_999) + 1)) - there)
        if lacking:
            seen.add("error", f"shards {listed(map(str, lacking))} of {count} of {stem} are missing")


def _leftovers(path: Path, seen: _Seen) -> None:
    beside = path.absolute().with_name(path.absolute().name + ".partial")
    if beside.is_dir():
        seen.add(
            "warning", "an interrupted save of this checkpoint: finish it with --resume, or remove it", beside.name
        )


# Values


def _values(file: str, part: Weights, seen: _Seen, threads: int | None) -> None:
    ties = part.ties
    names = [name for name in part if name not in ties]
    single = []
    for name, found in zip(names, _figures(file, part, names, seen, threads), strict=True):
        if found is None:
            continue
        if found.nonfinite:
            _nonfinite(file, name, part.spec(name).numel, found, seen)
        elif _is_constant(part.node(name), found):
            if len(part.spec(name).shape) > 1:
                seen.add("warning", f"every value is {found.min:g}", file, name)
            else:
                single.append(name)
    if single:
        seen.add("note", f"{len(single)} vectors hold a single value each, as in new models: {listed(single)}", file)


def _figures(file: str, part: Weights, names: list[str], seen: _Seen, threads: int | None) -> list[Statistics | None]:
    try:
        return statistics_of([part.node(name) for name in names], threads)
    except Exception:  # one unreadable tensor: find out which, and go on with the others
        return [_figure(file, part, name, seen) for name in names]


def _figure(file: str, part: Weights, name: str, seen: _Seen) -> Statistics | None:
    try:
        with progress.silent():
            return statistics_of([part.node(name)], threads=1)[0]
    except Exception as error:
        seen.add("error", f"cannot be read: {_said(error, file)}", file, name)
        return None


def _nonfinite(file: str, name: str, values: int, found: Statistics, seen: _Seen) -> None:
    counts = [f"{found.nan:,} NaN"] * bool(found.nan) + [f"{found.inf:,} infinite"] * bool(found.inf)
    # A causal mask kept as a buffer is made of minus infinity, and right so.
    severity = "note" if "mask" in name and not found.nan else "error"
    seen.add(severity, f"{' and '.join(counts)} of {values:,} values", file, name)


def _is_constant(node: Lazy, found: Statistics) -> bool:
    return node.spec.dtype.is_floating_point and node.spec.numel > 1 and found.min == found.max


# config.json against the tensors


def _config(folder: Path, seen: _Seen) -> None:
    place = folder / "config.json"
    if not place.is_file() or not seen.parts:
        return
    try:
        config = _json(place)
        if not isinstance(config, dict):
            raise ValueError("it is no mapping")
    except (OSError, ValueError, RecursionError) as error:
        seen.add("error", f"no valid JSON: {str(error)[:200]}", "config.json")
        return
    nodes = {name: part.node(name) for part in seen.parts.values() for name in part}
    inner = config.get("text_config")
    config = {**(inner if isinstance(inner, dict) else {}), **config}
    _vocabulary(config, nodes, seen)
    _dtype(config, nodes, seen)
    _tie(config, nodes, seen)


def _vocabulary(config: Mapping[str, Any], nodes: Mapping[str, Lazy], seen: _Seen) -> None:
    promised = config.get("vocab_size")
    for name in _named(_EMBEDDING, nodes):
        rows = nodes[name].spec.shape[0] if nodes[name].spec.shape else 0
        if not isinstance(promised, int) or rows == promised:
            continue
        severity = "error" if rows < promised else "note"
        seen.add(severity, f"vocab_size is {promised}, the embedding has {rows} rows", "config.json", name)


def _dtype(config: Mapping[str, Any], nodes: Mapping[str, Lazy], seen: _Seen) -> None:
    promised = config.get("dtype", config.get("torch_dtype"))
    found = {dtype_name(n.spec.dtype) for n in nodes.values() if n.spec.dtype.is_floating_point}
    if isinstance(promised, str) and found and promised.removeprefix("torch.") not in found:
        seen.add("note", f"the dtype is {promised} here, the tensors are {', '.join(sorted(found))}", "config.json")


def _tie(config: Mapping[str, Any], nodes: Mapping[str, Lazy], seen: _Seen) -> None:
    heads, embeddings = _named(_HEAD, nodes), _named(_EMBEDDING, nodes)
    if config.get("tie_word_embeddings") is not True or len(heads) != 1 or len(embeddings) != 1:
        return
    head, embedding = nodes[heads[0]], nodes[embeddings[0]]
    if head is embedding:
        return
    try:
        same = diff(Weights({"w": head}), Weights({"w": embedding})).same
    except Exception:  # unreadable values have a finding of their own already
        return
    if not same:
        message = f"tie_word_embeddings is true, but {heads[0]} differs from {embeddings[0]} and would be lost"
        seen.add("warning", message, "config.json", heads[0])


def _named(pattern: re.Pattern[str], names: Iterable[str]) -> list[str]:
    return [name for name in names if pattern.search(name)]


# Small things


def _json(place: Path) -> Any:
    if place.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{place.stat().st_size} bytes are not believable")
    return json.loads(place.read_bytes())


def _said(error: Exception, place: str) -> str:
    """The message without the place, which a finding has of its own."""
    text = str(error).removeprefix(f"{place}: ") if isinstance(error, Error) else f"{type(error).__name__}: {error}"
    return text or type(error).__name__
