"""Questions and answers, without HTTP."""

from __future__ import annotations

import json
import time

import pytest
import torch

from weightsmith.errors import Error
from weightsmith.look import _answers
from weightsmith.look._answers import Answers, Unknown, title_of
from weightsmith.look._jobs import Jobs
from weightsmith.weights import Weights


@pytest.fixture
def answers(first, second):
    made = Answers([("one", first), ("two", second)])
    yield made
    made.jobs.stop()


def ask(answers, route, **asked):
    words = {name: str(value) for name, value in asked.items()}
    end = time.monotonic() + 20
    while True:
        status, content = answers.answer(route, words)
        if status == 200:
            return json.loads(content)
        assert status == 202
        assert time.monotonic() < end
        time.sleep(0.01)


def number(weights, name):
    return list(weights).index(name)


def test_checkpoints(answers, first):
    found = ask(answers, "checkpoints")["checkpoints"]
    assert [one["title"] for one in found] == ["one", "two"]
    assert found[0]["parameters"] == first.numel
    assert found[0]["bytes"] == first.nbytes
    assert sum(found[0]["dtypes"].values()) == first.numel
    assert found[0]["files"] == [{"name": "config.json", "bytes": 34}, {"name": "vocab.dat", "bytes": 2}]


def test_tensors(answers, first):
    found, float32 = ask(answers, "tensors", of=0), {"name": "float32", "bytes": 4, "countable": True}
    assert [row[0] for row in found["rows"]] == list(first)
    name, kind, shape, tied = found["rows"][number(first, "head.weight")]
    assert (name, found["dtypes"][kind], shape) == ("head.weight", float32, [20, 8])
    assert found["rows"][tied][0] == "model.embed.weight"


def test_figures_of_each_side(answers, first, second):
    index = number(first, "model.layers.1.up.weight")
    one, other = first["model.layers.1.up.weight"].double(), second["model.layers.1.up.weight"].double()
    a = ask(answers, "tensor", of=0, tensor=index, kind="figures")
    b = ask(answers, "tensor", of=1, tensor=number(second, "model.layers.1.up.weight"), kind="figures")
    d = ask(answers, "tensor", of=0, tensor=index, kind="figures", against=1)
    norms = [found["statistics"]["norm"] for found in (a, b, d)]
    assert norms == pytest.approx([float(x.norm()) for x in (one, other, other - one)])
    assert sum(d["histogram"]["counts"]) == one.numel()
    assert d["statistics"]["mean"] == pytest.approx(float((other - one).mean()))


def test_change(answers, first, second):
    index = number(first, "model.layers.1.up.weight")
    found = ask(answers, "tensor", of=0, tensor=index, kind="change", against=1)
    assert found["distance"] == pytest.approx(0.5, abs=0.01)
    assert (found["status"], found["flipped"]) == ("changed", 0)


def test_spectrum_and_picture(answers, first):
    index = number(first, "model.embed.weight")
    found = ask(answers, "tensor", of=0, tensor=index, kind="spectrum")["spectrum"]
    assert found["values"] == pytest.approx(torch.linalg.svdvals(first["model.embed.weight"]).tolist(), rel=1e-5)
    assert ask(answers, "tensor", of=0, tensor=index, kind="picture")["picture"]["rows"] == 20
    flat = ask(answers, "tensor", of=0, tensor=number(first, "broken"), kind="spectrum")
    assert flat["spectrum"] is None
    empty = number(first, "empty")
    assert ask(answers, "tensor", of=0, tensor=empty, kind="figures")["histogram"] is None
    assert ask(answers, "tensor", of=0, tensor=empty, kind="picture")["picture"] is None


def test_codes_that_are_no_numbers():
    codes = torch.arange(8, dtype=torch.uint8).reshape(2, 4).view(torch.float4_e2m1fn_x2)
    answers = Answers([(word, Weights.of({"w": codes})) for word in "ab"])
    assert ask(answers, "tensors", of=0)["dtypes"][0]["countable"] is False
    assert ask(answers, "tensor", of=0, tensor=0, kind="figures")["statistics"] is None
    assert ask(answers, "tensor", of=0, tensor=0, kind="picture")["picture"] is None
    assert ask(answers, "tensor", of=0, tensor=0, kind="spectrum")["spectrum"] is None
    with pytest.raises(Unknown, match="packed"):
        ask(answers, "tensor", of=0, tensor=0, kind="change", against=1)
    answers.jobs.stop()


def test_values_that_are_no_numbers(answers, first):
    found = ask(answers, "tensor", of=0, tensor=number(first, "broken"), kind="figures")
    assert (found["statistics"]["nan"], found["statistics"]["inf"]) == (1, 1)
    assert sum(found["histogram"]["counts"]) == 2


def test_what_cannot_be_compared(answers, first):
    for name, words in (("broken", "two shapes"), ("<img src=x onerror=alert(1)>.steps", "no tensor")):
        with pytest.raises(Unknown, match=words):
            ask(answers, "tensor", of=0, tensor=number(first, name), kind="figures", against=1)
    with pytest.raises(Unknown, match="second checkpoint"):
        ask(answers, "tensor", of=0, tensor=0, kind="change")


@pytest.mark.parametrize("word", ["", "-1", "2", "9" * 30, "1e0", "²", "0x0", " 0", "../../etc/passwd"])
def test_numbers_only(answers, word):
    with pytest.raises(Unknown):
        answers.answer("tensors", {"of": word})
    with pytest.raises(Unknown):
        answers.answer("file", {"of": "0", "file": word})
    with pytest.raises(Unknown):
        answers.answer("nothing", {})
    with pytest.raises(Unknown):
        answers.answer("tensor", {"of": "0", "tensor": "0", "kind": word})


def test_survey_in_parts(answers, first, second, monkeypatch):
    monkeypatch.setattr(_answers, "ROWS", 3)
    assert ask(answers, "survey", of=0, against=1)["rows"] == []  # nobody said go
    rows, since = [], 0
    for _ in range(500):
        found = ask(answers, "survey", of=0, against=1, since=since, go=1)
        assert len(found["rows"]) <= 3
        rows += found["rows"]
        since = found["next"]
        if found["whole"]:
            break
        time.sleep(0.005)
    assert sorted(row[0] for row in rows) == [i for i, name in enumerate(first) if name in second]
    assert ask(answers, "survey", of=0, against=1)["read"] == found["total"]


def test_files_are_text_up_to_a_size(answers, monkeypatch):
    found = ask(answers, "file", of=0, file=0)
    assert (found["text"], found["is_text"]) == ('{"a": "<script>alert(1)</script>"}', True)
    assert ask(answers, "file", of=0, file=1)["is_text"] is False
    monkeypatch.setattr(_answers, "SHOWN", 5)
    found = ask(answers, "file", of=0, file=0)
    assert (found["text"], found["shown"], found["bytes"]) == ('{"a":', 5, 34)


def test_lineage(answers):
    assert any("overlay" in line for line in ask(answers, "lineage", of=1)["lines"])


def test_too_much_memory(first):
    answers = Answers([("one", first)], Jobs(memory=2**26 + 1))
    with pytest.raises(Error, match="--spectra"):
        ask(answers, "tensor", of=0, tensor=0, kind="spectrum")
    answers.jobs.stop()


def test_a_file_on_disk_that_is_cut_short(tmp_path):
    Weights.of({"w": torch.ones(1000)}).save(tmp_path / "w.safetensors")
    import weightsmith

    weights = weightsmith.open(tmp_path / "w.safetensors")
    with open(tmp_path / "w.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 100)
    answers = Answers([("one", weights)])
    with pytest.raises(Error, match="early"):
        ask(answers, "tensor", of=0, tensor=0, kind="figures")
    answers.jobs.stop()


def test_nothing_to_look_at():
    with pytest.raises(Error, match="nothing to look at"):
        Answers([])


def test_title():
    assert [title_of(path) for path in ("a/b/", "/", "s3://x/y")] == ["a/b", "/", "s3://x/y"]
