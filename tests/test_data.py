"""Examples from words: known sets, files, functions, and what is wrong with them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from weightsmith.data import examples
from weightsmith.errors import Error


def test_digits():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    found = examples("digits")
    assert (len(found), list(found.inputs.shape)) == (1797, [1797, 64])
    assert (float(found.inputs.min()), float(found.inputs.max())) == (0, 1)
    assert sorted(set(found.labels.tolist())) == list(range(10))
    assert len(examples("digits", 5)) == 5


def test_clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(Error, match="dataset-fashion-mnist brings it"):
        examples("fashion-mnist")
    pixels = np.arange(2 * 784, dtype=np.uint32).astype(np.uint8)
    with gzip.open(tmp_path / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(bytes(16) + pixels.tobytes())
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(bytes(8) + bytes([3, 9]))
    found = examples("fashion-mnist")
    assert list(found.inputs.shape) == [2, 1, 28, 28]
    assert found.inputs[0, 0, 0, 5] == pytest.approx(5 / 255)
    assert found.labels.tolist() == [3, 9]
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(Error, match="t10k-labels"):
        examples("fashion-mnist")


def test_arrays_and_texts(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3)), y=np.array([1.0, 0.0]))
    assert examples(str(tmp_path / "a.npz")).labels.tolist() == [1, 0]
    (tmp_path / "t.csv").write_text('label,text\n1,"good, really"\n0,bad\n')
    found = examples(str(tmp_path / "t.csv"))
    assert found.inputs == ["good, really", "bad"]
    assert found.labels.tolist() == [1, 0]
    assert [(len(x), y.tolist()) for x, y in found.batches(1)] == [(1, [1]), (1, [0])]
    (tmp_path / "mine.py").write_text("import torch\ndef data(): return torch.zeros(4, 2), [0, 1, 2, 1]\nfew = 3\n")
    assert examples(f"{tmp_path / 'mine.py'}:data").labels.tolist() == [0, 1, 2, 1]
    with pytest.raises(Error, match="must be a pair"):
        examples(f"{tmp_path / 'mine.py'}:few")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,klass\nx,1\n", "has no column 'label'; it has text, klass"),
        ("a.csv", "text,label\nx,1\ny,good\n", "a\\.csv:3: a label is the number of a class, got 'good'"),
        ("a.csv", "text,label\n", "at least one"),
        ("a.csv", "", "has no column 'text'; it has none"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(Error, match=message):
        examples(str(tmp_path / name))


def test_arrays_that_do_not_fit(tmp_path: Path):
    file = tmp_path / "a.npz"
    for arrays, message in (
        ({"x": np.ones(3), "y": np.ones(2, int)}, "3 inputs and 2 labels"),
        ({"x": np.ones(2), "y": np.array([0, -1])}, "found -1"),
        ({"x": np.ones(2), "y": np.array([0, 0.5])}, "is the number of a class"),
        ({"x": np.ones(2), "z": np.ones(2)}, "has no array 'y'; it has x, z"),
        ({"x": np.ones(2), "y": np.ones((2, 2), int)}, r"labels must be \[n\]"),
    ):
        np.savez(file, **arrays)
        with pytest.raises(Error, match=message):
            examples(str(file))
    np.savez(file, x=np.array([{}, 1], dtype=object), y=np.zeros(2, int))
    with pytest.raises(Error, match=r"a\.npz"):  # objects would have to be unpickled
        examples(str(file))
    with pytest.raises(Error, match=r"none\.npz: No such file"):
        examples(str(tmp_path / "none.npz"))
    with pytest.raises(Error, match="did you mean 'digits'"):
        examples("digit")
    with pytest.raises(Error, match="at least one example"):
        examples("digits", 0)


def test_labels_become_whole_numbers(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones(1, "float32"), y=np.array([2], "uint8"))
    assert examples(str(tmp_path / "a.npz")).labels.dtype == torch.int64


def test_files_that_are_damaged_or_of_another_kind(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones((50, 3)), y=np.zeros(50, int))
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Error, match=r"a\.npz"):
        examples(str(tmp_path / "a.npz"))
    with (tmp_path / "b.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(Error, match="single array"):
        examples(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "c.npz", x=np.ones(2), y=np.array([0, np.nan]))
    with pytest.raises(Error, match="found nan"):
        examples(str(tmp_path / "c.npz"))
    (tmp_path / "long.csv").write_text("text,label\n" + "x" * 200_000 + ",1\n")
    with pytest.raises(Error, match=r"long\.csv: field larger"):
        examples(str(tmp_path / "long.csv"))


def test_a_mark_of_byte_order_belongs_to_no_column(tmp_path: Path):
    (tmp_path / "t.csv").write_text("text,label\ngood,1\n", encoding="utf-8-sig")
    assert examples(str(tmp_path / "t.csv")).inputs == ["good"]
