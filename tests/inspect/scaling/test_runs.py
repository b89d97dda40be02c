"""Tables of runs: every way in gives the same table, and every bad cell is named with its line."""

from __future__ import annotations

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.inspect import scaling
from weightsmith.inspect.scaling import _runs

COLUMNS = {"N": [1e6, 2e6, 4e6], "loss": [3.0, 2.8, 2.5]}


def written(tmp_path, text):
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_all_ways_in_are_one(tmp_path):
    path = written(tmp_path, "\ufeffN, loss\n1e6,3\n\n2_000_000, 2.8\n4000000,2.5\n")
    records = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
    tensors = {name: torch.tensor(column) for name, column in COLUMNS.items()}
    for given in (COLUMNS, records, path, str(path), tensors, _runs.read(COLUMNS)):
        table = _runs.read(given)
        for name, column in COLUMNS.items():
            assert table.numbers(name).tolist() == pytest.approx(column, rel=1e-6)
            assert table.numbers(name).dtype == torch.float64


def test_renaming_takes_the_named_column():
    table = _runs.read({"params": [1.0, 2.0], "N": [7.0, 8.0]}, {"N": "params"})
    assert table.numbers("N").tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty file"),
        ("N,loss\n", "no runs"),
        ("N,Loss\n1,2\n3,4\n", "no column 'loss' (did you mean 'Loss'?)"),
        ("N,loss\n1,2\n3,abc\n4,5\n", "line 3: loss is 'abc', no number"),
        ("N,loss\n1,2\n\n3,\n4,5\n", "line 4: loss is empty"),
        ("N,loss\n1,2\n3,nan\n4,5\n", "line 3: loss is nan"),
        ("N,loss\n1,2\n3,inf\n4,5\n", "line 3: loss is inf"),
        ("N,loss\n1,2\n-3,2\n4,5\n", "line 3: N is -3, which is not above 0"),
        ("N,loss\n1,2\n3,0\n4,5\n", "line 3: loss is 0, which is not above 0"),
        ("N,loss\n1,2\n", "1 runs cannot tell the 2 constants"),
        ("N,loss\n1,2\n3,4\n1.0,2.0\n", "line 4: the same N, loss as"),
        ("N,loss\n1,2,9\n", "line 2: 3 cells under 2 columns"),
        ("N,N,loss\n1,1,2\n", "line 1: column 'N' stands twice"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, text, says):
    path = written(tmp_path, text)
    with pytest.raises(Error) as caught:
        scaling.fit(path, "kaplan-size", bootstrap=0)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_twin_names_the_first_of_them(tmp_path):
    path = written(tmp_path, "N,loss\n1,2\n3,4\n1.0,2.0\n")
    with pytest.raises(Error, match=r"line 4: .* as .*line 2"):
        scaling.fit(path, "kaplan-size")
    assert len(scaling.fit(path, "kaplan-size", bootstrap=0, duplicates=True).observed) == 3


def test_what_is_no_text_is_refused(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xff\xfe\x00N")
    with pytest.raises(Error, match="no UTF-8"):
        _runs.read(path)


def test_tables_in_memory_are_checked_too():
    with pytest.raises(Error, match="different lengths"):
        _runs.read({"N": [1.0], "loss": [1.0, 2.0]})
    with pytest.raises(Error, match="run 2: loss is empty"):
        _runs.read([{"N": 1, "loss": 2}, {"N": 2}]).numbers("loss")
    with pytest.raises(Error, match=r"column N of the table is 5\.0"):
        _runs.read({"N": 5.0})
    with pytest.raises(Error, match=r"run 1: N is .* no number"):
        _runs.read([{"N": torch.ones(2)}]).numbers("N")
    with pytest.raises(Error, match="no runs"):
        _runs.read([])
    with pytest.raises(FileNotFoundError):
        _runs.read("nowhere.csv")
