"""Labelled examples to measure classifiers on, from a word that a command line can hold. Nothing is fetched.

Two sets of pictures are known by name, since packages bring them: ``digits`` (scikit-learn) and ``fashion-mnist``
(Debian's ``dataset-fashion-mnist``). All else is a file.
"""

from __future__ import annotations

import csv
import gzip
import os
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.errors import Error, did_you_mean, missing

if TYPE_CHECKING:
    from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts it; the variable FASHION_MNIST names another folder."""

FORMS = "digits, fashion-mnist, examples.npz (x and y), examples.csv (text and label), or file.py:function"
"""What a spec may look like, for messages."""


@dataclass(frozen=True)
class Examples:
    """Inputs and their labels."""

    name: str
    inputs: Tensor | list[str]
    """``[n, ...]``, or n texts."""
    labels: Tensor
    """``[n]`` int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, size: int) -> Iterator[tuple[Any, Tensor]]:
        """Runs of at most ``size`` examples."""
        for start in range(0, len(self), size):
            yield self.inputs[start : start + size], self.labels[start : start + size]


def examples(spec: str, limit: int | None = None) -> Examples:
    """The examples that a spec names, or the first ``limit`` of them.

    ``digits``
        1797 pictures ``[n, 64]`` in [0, 1], of scikit-learn.
    ``fashion-mnist``
        The 10,000 test pictures ``[n, 1, 28, 28]`` in [0, 1].
    ``examples.npz``
        The arrays ``x`` ``[n, ...]`` and ``y`` ``[n]``.
    ``examples.csv``
        The columns ``text`` and ``label``; a label is a number of a class.
    ``file.py:function``
        What a function of your own returns, or a name holds: ``(x [n, ...], y [n])``.

    Raises:
        ValueError: no such form or file, inputs and labels that do not fit together, labels that are no classes.
        MissingPackage: ``digits`` without scikit-learn.

    >>> import numpy, pathlib, tempfile
    >>> file = pathlib.Path(tempfile.mkdtemp(), "few.npz")
    >>> numpy.savez(file, x=numpy.zeros((3, 2), "float32"), y=numpy.array([0, 1, 1]))
    >>> found = examples(str(file))
    >>> len(found), list(found.inputs.shape), found.labels.tolist()
    (3, [3, 2], [0, 1, 1])
    """
    if limit is not None and limit < 1:
        raise Error(f"{spec}: needs at least one example, got a limit of {limit}")
    if spec == "digits":
        inputs, labels = _digits()
    elif spec == "fashion-mnist":
        inputs, labels = _fashion()
    elif spec.endswith(".npz"):
        inputs, labels = _npz(spec)
    elif spec.endswith(".csv"):
        inputs, labels = _csv(spec)
    elif ".py:" in spec:
        from weightsmith.evaluators import from_file

        found = from_file(spec)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise Error(f"{spec}: must be a pair of inputs and labels, got {type(found).__name__}")
        inputs, labels = found
    else:
        near = did_you_mean(spec, ("digits", "fashion-mnist"))
        raise Error(f"{spec!r} names no examples{near}; write {FORMS}")
    return checked(spec, inputs, labels, limit)


def checked(name: str, inputs: Any, labels: Any, limit: int | None = None) -> Examples:
    """Examples of inputs and labels that fit together.

    Raises:
        Error: they do not.
    """
    import torch

    if not (isinstance(inputs, list) and all(isinstance(one, str) for one in inputs)):
        inputs = torch.as_tensor(inputs)
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or not len(labels):
        raise Error(f"{name}: labels must be [n] with at least one, got {list(labels.shape)}")
    if len(inputs) != len(labels):
        raise Error(f"{name}: {len(inputs)} inputs and {len(labels)} labels do not fit together")
    wrong = labels[(labels < 0) | (labels != labels.round())] if labels.is_floating_point() else labels[labels < 0]
    if len(wrong):
        raise Error(f"{name}: a label is the number of a class, 0, 1, ...; found {wrong[0].item():g}")
    return Examples(name, inputs[:limit], labels[:limit].long().cpu())


def _digits() -> tuple[Any, Any]:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing("scikit-learn", "demo", "the digits") from None
    images, labels = load_digits(return_X_y=True)
    return (images / 16).astype("float32"), labels


def _fashion() -> tuple[Any, Any]:
    import numpy

    folder = Path(os.environ.get("FASHION_MNIST", FASHION))
    read = []
    for part, skipped in (("images-idx3", 16), ("labels-idx1", 8)):
        file = folder / f"t10k-{part}-ubyte.gz"
        try:
            with gzip.open(file) as opened:
                read.append(numpy.frombuffer(opened.read(), numpy.uint8, offset=skipped))
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise Error(
                f"fashion-mnist: {file}: {getattr(error, 'strerror', None) or error}; Debian's package "
                "dataset-fashion-mnist brings it, and FASHION_MNIST names another folder"
            ) from None
    if len(read[0]) % 784:
        raise Error(f"fashion-mnist: {folder}: {len(read[0])} bytes are no pictures of 28 x 28")
    return (read[0].reshape(-1, 1, 28, 28) / 255).astype("float32"), read[1].astype("int64")


def _npz(spec: str) -> tuple[Any, Any]:
    import numpy

    try:
        found = numpy.load(spec, allow_pickle=False)
        if isinstance(found, numpy.ndarray):
            raise Error(f"{spec}: is a single array; numpy.savez writes x and y")
        with found:
            lacking = [name for name in ("x", "y") if name not in found]
            if lacking:
                raise Error(f"{spec}: has no array {lacking[0]!r}; it has {', '.join(found) or 'none'}")
            return found["x"], found["y"]
    except Error:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise Error(f"{spec}: {getattr(error, 'strerror', None) or error}") from None


def _csv(spec: str) -> tuple[list[str], list[int]]:
    try:
        with Path(spec).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            known = list(reader.fieldnames or ())
            for column in ("text", "label"):
                if column not in known:
                    raise Error(f"{spec}: has no column {column!r}; it has {', '.join(known) or 'none'}")
            texts, labels = [], []
            for row in reader:
                if not (row["label"] or "").strip().isdecimal():
                    raise Error(f"{spec}:{reader.line_num}: a label is the number of a class, got {row['label']!r}")
                texts.append(row["text"] or "")
                labels.append(int(row["label"]))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise Error(f"{spec}: {getattr(error, 'strerror', None) or error}") from None
    return texts, labels
