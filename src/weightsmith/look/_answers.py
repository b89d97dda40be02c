"""Questions about checkpoints and their answers as JSON. Nothing here knows of HTTP.

Checkpoints, tensors and files are asked for by their numbers, so no word of a question is ever a path.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weightsmith.errors import Error
from weightsmith.inspect import diff, summary
from weightsmith.inspect._plain import plain
from weightsmith.inspect._spectra import has_spectrum
from weightsmith.inspect._statistics import is_countable
from weightsmith.look import _survey, _values
from weightsmith.look._jobs import Job, Jobs, Stopped, Work
from weightsmith.weights import Lazy, Weights, dtype_name

SHOWN = 2**18
"""Bytes of a file that are shown."""

ROWS = 20_000
"""Rows of a survey in one answer."""

KINDS = ("figures", "spectrum", "picture", "change")
"""What can be asked about a tensor."""


class Unknown(Error):
    """There is no such thing to ask about."""


class Answers:
    """What the page can ask about some checkpoints.

    Args:
        checkpoints: what to call each, and its weights.
    """

    def __init__(self, checkpoints: Sequence[tuple[str, Weights]], jobs: Jobs | None = None):
        if not checkpoints:
            raise Error("there is nothing to look at: name a checkpoint")
        self.titles = [title for title, _ in checkpoints]
        self.weights = [weights for _, weights in checkpoints]
        self.jobs = jobs or Jobs()
        self._names = [list(weights) for weights in self.weights]
        self._surveys: dict[tuple[int, ...], _survey.Survey] = {}
        self._listings: dict[int, bytes] = {}
        self._lock = threading.Lock()

    def answer(self, route: str, asked: Mapping[str, str]) -> tuple[int, bytes]:
        """The HTTP status and the JSON of one question.

        Raises:
            Unknown: no such route, or a number that is none.
        """
        routes: dict[str, Callable[[Mapping[str, str]], tuple[int, bytes]]] = {
            "checkpoints": self._checkpoints,
            "tensors": self._tensors,
            "tensor": self._tensor,
            "survey": self._survey,
            "lineage": self._lineage,
            "file": self._file,
        }
        if route not in routes:
            raise Unknown(f"nothing is known of {route[:40]!r}")
        return routes[route](asked)

    def cancel(self, number: int) -> tuple[int, bytes]:
        """Call off a computation."""
        return 200, encoded({"cancelled": self.jobs.cancel(number)})

    # Without reading a value

    def _checkpoints(self, asked: Mapping[str, str]) -> tuple[int, bytes]:
        return 200, encoded({"checkpoints": [self._checkpoint(index) for index in range(len(self.weights))]})

    def _checkpoint(self, index: int) -> dict[str, Any]:
        weights = self.weights[index]
        dtypes: dict[str, int] = {}
        for node in {id(node): node for node in map(weights.node, weights)}.values():
            name = dtype_name(node.spec.dtype)
            dtypes[name] = dtypes.get(name, 0) + node.spec.numel
        return {
            "title": self.titles[index],
            "tensors": len(weights),
            "parameters": weights.numel,
            "bytes": weights.nbytes,
            "dtypes": dict(sorted(dtypes.items(), key=lambda item: -item[1])),
            "files": [{"name": name, "bytes": _size(file)} for name, file in weights.files.items()],
            "metadata": {name: value[:2000] for name, value in list(weights.metadata.items())[:50]},
        }

    def _tensors(self, asked: Mapping[str, str]) -> tuple[int, bytes]:
        """``rows`` of ``[name, number of its dtype, shape, number of the tensor it is tied to or -1]``."""
        of = self._of(asked)
        with self._lock:
            if of not in self._listings:
                self._listings[of] = self._listing(of)
            return 200, self._listings[of]

    def _listing(self, of: int) -> bytes:
        weights, names = self.weights[of], self._names[of]
        ties, place = weights.ties, {name: index for index, name in enumerate(names)}
        dtypes: dict[Any, int] = {}
        rows = []
        for name in names:
            spec = weights.spec(name)
            kind = dtypes.setdefault(spec.dtype, len(dtypes))
            rows.append([name, kind, spec.shape, place[ties[name]] if name in ties else -1])
        kinds = [{"name": dtype_name(t), "bytes": t.itemsize, "countable": is_countable(t)} for t in dtypes]
        return encoded({"dtypes": kinds, "rows": rows})

    def _lineage(self, asked: Mapping[str, str]) -> tuple[int, bytes]:
        made = self.weights[self._of(asked)].lineage
        return 200, encoded({"lines": str(made).splitlines()[:2000]})

    def _file(self, asked: Mapping[str, str]) -> tuple[int, bytes]:
        files = list(self.weights[self._of(asked)].files.items())
        name, file = files[_number(asked, "file", len(files))]
        total = _size(file)
        if isinstance(file, bytes):
            raw = file[:SHOWN]
        else:
            buffer = bytearray(min(total, SHOWN))
            file.read_into(0, memoryview(buffer))
            raw = bytes(buffer)
        is_text = b"\0" not in raw
        text = raw.decode("utf-8", "replace") if is_text else ""
        return 200, encoded({"name": name, "bytes": total, "shown": len(raw), "text": text, "is_text": is_text})

    # Computed when asked for

    def _tensor(self, asked: Mapping[str, str]) -> tuple[int, bytes]:
        kind = asked.get("kind", "")
        if kind not in KINDS:
            raise Unknown(f"of a tensor one can ask for {', '.join(KINDS)}")
        of, name = self._of(asked), self._name(asked)
        key: tuple[Any, ...] = (kind, of, name)
        node = self.weights[of].node(name)
        cost = 2**26
        if "against" in asked:
            against = _number(asked, "against", len(self.weights))
            key = (*key, against)
            node, pair = self._pair(of, against, name)
            if kind == "change":
                return self._job(key, lambda: self._change(name, pair), cost)
        elif kind == "change":
            raise Unknown("a change needs a second checkpoint")
        if kind == "figures":
            return self._job(key, lambda: self._figures(name, node), cost)
        if kind == "picture":
            return self._job(key, lambda: self._picture(node), cost)
        if not (has_spectrum(node.spec) and is_countable(node.spec.dtype)):
            return 200, encoded({"spectrum": None, "why": "only a matrix of floats has singular values"})
        return self._job(key, lambda: self._spectrum(node), _values.spectrum_cost(node.spec))

    def _pair(self, of: int, against: int, name: str) -> tuple[Lazy, tuple[Lazy, Lazy]]:
        a, b = self.weights[of], self.weights[against]
        if name not in b:
            raise Unknown(f"{self.titles[against]} has no tensor of this name")
        pair = a.node(name), b.node(name)
        if pair[0].spec.shape != pair[1].spec.shape:
            raise Unknown("tensors of two shapes cannot be set against each other")
        if not all(is_countable(node.spec.dtype) for node in pair):
            raise Unknown("the values of a packed dtype are no numbers by themselves")
        return _values.change(*pair), pair

    def _figures(self, name: str, node: Lazy) -> dict[str, Any]:
        found = summary(Weights({name: node}), stats=True, threads=_survey.threads()).tensors[0].stats
        return {"statistics": found, "histogram": None if found is None else _values.histogram(node, found)}

    def _picture(self, node: Lazy) -> dict[str, Any]:
        possible = is_countable(node.spec.dtype) and node.spec.numel > 0
        return {"picture": _values.picture(node) if possible else None}

    def _spectrum(self, node: Lazy) -> dict[str, Any]:
        found = _values.singular_values(node)
        return {
            "spectrum": found,
            "why": "" if found else "there are values that are not finite, or whose squares are not",
        }

    def _change(self, name: str, pair: tuple[Lazy, Lazy]) -> dict[str, Any]:
        one, other = (Weights({name: node}) for node in pair)
        return diff(one, other, threads=_survey.threads()).rows()[0] | _values.flips(*pair)

    def _survey(self, asked: Mapping[str, str]) -> tuple[int, bytes]:
        """Rows from ``since`` on; ``go=1`` lets the survey begin or go on."""
        of = self._of(asked)
        key: tuple[int, ...] = (of,)
        if "against" in asked:
            key = (of, _number(asked, "against", len(self.weights)))
        with self._lock:
            if key not in self._surveys:
                sides = [self.weights[index] for index in key]
                self._surveys[key] = _survey.changes(*sides) if len(sides) == 2 else _survey.norms(*sides)
            survey = self._surveys[key]
        job = None
        if not survey.whole and asked.get("go") == "1":
            job = self.jobs.ask(("survey", *key), survey.work, 2**26, patient=True)
            if job.state == "failed":
                raise job.error or Error("the survey failed")
        since = _number(asked, "since", len(survey.rows) + 1) if "since" in asked else 0
        rows = survey.rows[since : since + ROWS]
        return 200, encoded(
            {
                "rows": plain(rows),
                "next": since + len(rows),
                "read": survey.read,
                "total": survey.total,
                "whole": survey.whole and since + len(rows) == len(survey.rows),
                "job": job.number if job is not None else None,
            }
        )

    def _job(self, key: tuple[Any, ...], compute: Callable[[], Any], cost: int) -> tuple[int, bytes]:
        job = self.jobs.ask(key, lambda: _once(compute), cost)
        if job.state == "done":
            return 200, job.result
        if job.state == "failed":
            raise job.error or Error("the computation failed")
        if job.state == "stopped":
            raise Stopped
        return 202, encoded(self._state(job))

    def _state(self, job: Job) -> dict[str, Any]:
        state = {"job": job.number, "state": job.state, "label": job.label, "done": job.done, "total": job.total}
        return state | ({"before": self.jobs.place(job)} if job.state == "waiting" else {})

    # Numbers

    def _of(self, asked: Mapping[str, str]) -> int:
        return _number(asked, "of", len(self.weights))

    def _name(self, asked: Mapping[str, str]) -> str:
        names = self._names[self._of(asked)]
        return names[_number(asked, "tensor", len(names))]


def encoded(data: Any) -> bytes:
    """As compact JSON."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).encode()


def _once(compute: Callable[[], Any]) -> Work:
    """Work in one go."""
    return encoded(plain(compute()))
    yield


def _number(asked: Mapping[str, str], name: str, end: int) -> int:
    word = asked.get(name, "")
    if not (word.isascii() and word.isdigit() and len(word) <= 9 and int(word) < end):
        raise Unknown(f"{name} must be a whole number below {end}")
    return int(word)


def _size(file: Any) -> int:
    return len(file) if isinstance(file, bytes) else file.size


def title_of(path: str | os.PathLike[str]) -> str:
    """What a checkpoint is called: its path as it was given, without a slash at the end."""
    return os.fspath(path).rstrip("/") or os.fspath(path)
