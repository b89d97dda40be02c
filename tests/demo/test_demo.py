"""The demo says what its folders hold, repeats with its seed, and refuses what is not its own."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import weightsmith as ws
from weightsmith import demo, errors, page, prune
from weightsmith.cli import _demo
from weightsmith.demo import _measure, _report, _run

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> demo.Outcome:
    return demo.run(tmp_path_factory.mktemp("demo") / "out", seed=3, settings=demo.QUICK)


@pytest.fixture(scope="module")
def data() -> demo.Digits:
    return demo.digits(3)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all the rest."""
    monkeypatch.setattr(_report, "report", lambda outcome: "")


# What is said is what the folders hold


def test_figures_are_those_of_the_folders(outcome, data):
    assert len(outcome.rows) == 10
    for row in outcome.rows:
        folder = outcome.folder / row.made.key
        weights = ws.open(folder)
        if "bit" in row.made.key:
            weights = ws.quantize.dequantize(weights)
        net = demo.DigitsNet()
        net.load_state_dict(weights.to_dict())
        for found, examples in ((row.test, data.test), (row.shifted, data.shifted), (row.validation, data.validation)):
            assert found.of == len(examples)
            # A sum in another order may tip a picture that stands between two digits.
            assert abs(found.right - int((net(examples.pixels).argmax(1) == examples.labels).sum())) <= 1, row.made.key
        assert row.nbytes == (folder / "model.safetensors").stat().st_size
        zeros = sum(int((tensor == 0).sum()) for tensor in weights.to_dict().values())
        assert row.share_of_zeros == zeros / 56_714
        # No other program reads codes of convolutions, so beside them the config is put aside.
        config = "config.unquantized.json" if "bit" in row.made.key else "config.json"
        assert json.loads((folder / config).read_text())["architectures"] == ["DigitsNet"]


def test_measured_from_disk_not_from_memory(outcome, data, monkeypatch, undrawn):
    """A file that is changed after it was written changes what is measured."""
    target = outcome.folder.parent / "tampered"
    real = _run.make

    def tampering(folder, *rest):
        made = real(folder, *rest)
        blank = {name: torch.zeros_like(tensor) for name, tensor in ws.open(folder / "soup").items()}
        ws.Weights.of(blank).save(folder / "soup", overwrite=True)
        return made

    monkeypatch.setattr(_run, "make", tampering)
    row = demo.run(target, seed=3, settings=demo.QUICK).row("soup")
    assert row.share_of_zeros == 1
    assert row.test.right == int((data.test.labels == 0).sum())  # all scores are equal, so the first digit wins


def test_record_and_report_say_the_same(outcome):
    record = json.loads((outcome.folder / "demo.json").read_text())
    assert record == json.loads(json.dumps(demo.record(outcome)))
    text = outcome.report.read_text()
    for row, kept in zip(outcome.rows, record["checkpoints"], strict=True):
        assert kept["test"]["accuracy"] == row.test.right / row.test.of
        assert f"{100 * row.test.value:.1f}\N{NO-BREAK SPACE}%" in text
        assert f"<td>{row.nbytes:,}</td>" in text
    assert all(page.escape(line) in text for line in _report.findings(outcome))


def test_best_and_greedy_go_by_validation(outcome, data):
    siblings = [row for row in outcome.rows if row.made.kind == "sibling"]
    assert outcome.row("best").validation.right == max(row.validation.right for row in siblings)
    assert outcome.members[0] == outcome.best
    mixed = ws.merge.mean([ws.open(outcome.folder / key) for key in outcome.members])
    greedy = ws.open(outcome.folder / "greedy-soup")
    assert all(torch.allclose(mixed[name], greedy[name]) for name in greedy)
    assert outcome.row("greedy-soup").validation.right >= outcome.row("best").validation.right


def test_line_ends_at_the_siblings(outcome):
    first, second = (outcome.row(one.key) for one in outcome.ends)
    start, middle, end = outcome.line[0], outcome.line[len(outcome.line) // 2], outcome.line[-1]
    assert (start.test, end.test) == (first.test.value, second.test.value)
    assert (start.shifted, end.shifted) == (first.shifted.value, second.shifted.value)
    assert middle.place == 0.5
    assert middle.test == pytest.approx(outcome.row("soup").test.value, abs=2 / first.test.of)  # the soup of these two


def test_smaller_checkpoints(outcome):
    soup, pruned, small = (outcome.row(key) for key in ("greedy-soup", "pruned", "4-bit"))
    matrices = [name for name in pruned.zeros if name.endswith(".weight")]
    for name in matrices:
        zero, count = pruned.zeros[name]
        assert zero == round(0.8 * count)
    assert pruned.nbytes > 0.95 * soup.nbytes
    assert small.nbytes < 0.25 * soup.nbytes


def test_mask_survives_repair(outcome, data):
    pruned, repaired = (ws.open(outcome.folder / key) for key in ("pruned", "repaired"))
    mask = prune.mask_of(pruned)
    for name in mask:
        assert torch.equal(repaired[name] != 0, mask[name]), name
        assert not torch.equal(repaired[name], pruned[name])
    unmasked = demo.train(pruned, data.training, epochs=1, rate=1e-3)
    assert prune.sparsity_of(unmasked) < 0.7  # not none: pixels that are never inked give no gradient


# Repeating


def test_report_lines_make_the_checkpoints_again(outcome, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"ws": ws, "demo": demo, "data": demo.digits(seed=outcome.seed)}
    for row in outcome.rows:
        exec(row.made.python, names)
        again, kept = ws.open(row.made.key), ws.open(outcome.folder / row.made.key)
        assert list(again) == list(kept)
        assert all(torch.equal(again[name], kept[name]) for name in kept), row.made.key


def test_seed_decides(outcome, tmp_path, undrawn):
    other = demo.run(tmp_path / "other", seed=4, settings=demo.QUICK)
    assert [row.test for row in other.rows] != [row.test for row in outcome.rows]
    assert other.row("start").made.python != outcome.row("start").made.python


def test_training_leaves_threads_randomness_and_start_alone(data):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    start = demo.initial(0)
    before = {name: tensor.clone() for name, tensor in start.to_dict().items()}
    trained = demo.train(start, data.start, epochs=1, rate=1e-3, shifted=1.0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(start[name], before[name]) for name in before)
    assert not torch.equal(trained["head.weight"], before["head.weight"])


# Data


def test_parts_share_no_picture(data):
    assert (len(data.training), len(data.validation), len(data.test)) == (300, 400, 1097)
    total = sum(float(part.pixels.double().sum()) for part in (data.training, data.validation, data.test))
    other = demo.digits(5)
    again = sum(float(part.pixels.double().sum()) for part in (other.training, other.validation, other.test))
    assert total == pytest.approx(again)  # another split of the same pictures
    assert torch.equal(data.start.pixels, data.training.pixels[:150])
    assert torch.equal(data.shifted.labels, data.test.labels)
    assert (data.shifted.pixels != data.test.pixels).flatten(1).any(1).float().mean() > 0.8
    assert torch.allclose(data.shifted.pixels.sum((1, 2, 3)), data.test.pixels.sum((1, 2, 3)))  # nothing falls off


def test_shift_moves_by_at_most_one_pixel():
    pixels = torch.zeros(200, 1, 10, 10)
    pixels[:, 0, 4, 6] = 1
    moved = demo.shift(pixels, torch.Generator().manual_seed(0))
    places = {(int(r), int(c)) for r, c in (one[0].nonzero()[0] for one in moved)}
    assert places == {(r, c) for r in (3, 4, 5) for c in (5, 6, 7)}
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(200))


# Intervals


def test_wilson_solves_its_equation():
    for right, of in ((0, 10), (1, 10), (93, 100), (1097, 1097)):
        found = demo.Share(right, of)
        for edge in found.interval:
            # Each edge is a share p from which the one seen lies 1.96 standard errors away.
            distance = abs(found.value - edge)
            assert math.isclose(distance, 1.959964 * math.sqrt(edge * (1 - edge) / of), abs_tol=1e-9)


def test_difference_counts_pictures_only_one_gets_right():
    first = torch.tensor([True] * 60 + [False] * 40)
    second = torch.tensor([True] * 50 + [False] * 50)
    found = _measure.difference(first, second)
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - 1.96 * 0.03, abs=0.015)  # ten wins in a hundred: deviation 0.03
    assert found.high == pytest.approx(0.1 + 1.96 * 0.03, abs=0.015)
    assert found.verdict == "better"
    assert _measure.difference(second, first).verdict == "worse"
    assert _measure.difference(first, first).verdict == "no difference shown"
    assert _measure.difference(first, ~first).verdict == "no difference shown"


# The folder


def test_runs_over_its_own_output_only(outcome, tmp_path, undrawn):
    (outcome.folder / "demo.json").write_text(json.dumps({"made_by": _run.MARK}))  # as a broken-off run leaves it
    (outcome.folder / "report.html").unlink()
    again = demo.run(outcome.folder, seed=3, settings=demo.QUICK)
    assert [row.test for row in again.rows] == [row.test for row in outcome.rows]
    assert again.report.exists()

    for content in ("{}", "[]", "not JSON", None):
        folder = tmp_path / f"mine {content}"
        folder.mkdir()
        (folder / ("notes.txt" if content is None else "demo.json")).write_text(content or "precious")
        with pytest.raises(errors.OutputError, match="no demo made"):
            demo.run(folder, settings=demo.QUICK)
        assert len(list(folder.iterdir())) == 1
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(errors.OutputError, match="is a file"):
        demo.run(file, settings=demo.QUICK)
    assert file.read_text() == "precious"


@pytest.mark.parametrize(("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")])
def test_missing_package_is_said_before_any_work(tmp_path, monkeypatch, module, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    with pytest.raises(errors.MissingPackage, match=rf'{package}: pip install "weightsmith\[demo\]"'):
        demo.run(tmp_path / "out", settings=demo.QUICK)
    assert not (tmp_path / "out").exists()


# The page


class _Checker(HTMLParser):
    """Collects what is wrong with the nesting, and what refers to what."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if len(dict(attrs)) != len(attrs):
            self.wrong.append(f"<{tag}> has an attribute twice")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if "svg" not in self.open and tag not in self.VOID:
            self.wrong.append(f"<{tag}/> is not closed in HTML")

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")


@pytest.fixture(scope="module")
def checked(outcome) -> tuple[str, _Checker]:
    text = _report.report(outcome)
    checker = _Checker()
    checker.feed(text)
    checker.close()
    return text, checker


def test_page_is_well_formed(checked):
    _, checker = checked
    assert checker.wrong == []
    assert checker.open == []
    ids = [attrs["id"] for _, attrs in checker.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    names = [attrs[key] for _, attrs in checker.tags for key in ("aria-labelledby",) if key in attrs]
    local = [attrs["href"][1:] for _, attrs in checker.tags if (attrs.get("href") or "").startswith("#")]
    assert names
    assert set(names + local) <= set(ids)


def test_page_asks_for_nothing(checked):
    text, checker = checked
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert {tag for tag, _ in checker.tags} & {"script", "iframe", "img", "object"} == set()
    links = [attrs.get("href") or attrs.get("src") or "#" for _, attrs in checker.tags]
    assert {link for link in links if not link.startswith("#")} == {"data:,"}
    assert all(found.startswith("url(#") for found in _found(r"url\([^)]*\)", text))


def test_page_can_be_read_without_seeing_it(checked):
    _, checker = checked
    tags = checker.tags
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in tags if tag == "th")
    drawings = [attrs for tag, attrs in tags if tag == "svg"]
    assert len(drawings) == 5
    assert all(attrs.get("role") == "img" and len(attrs.get("aria-label") or "") > 60 for attrs in drawings)
    assert [tag for tag, _ in tags].count("figcaption") == len(drawings)
    levels = [int(tag[1]) for tag, _ in tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_drawings_have_the_colours_of_the_page(checked):
    text, _ = checked
    assert not any(colour in text for colour in page.COLOURS.values())
    drawings = "".join(_found(r"<svg.*?</svg>", text))
    assert "var(--blue)" in drawings
    assert "<text" in drawings
    assert "<style" not in drawings
    strays = set(_found(r"(?<!&)#[0-9a-f]{6}\b", drawings))
    assert strays == set()


def test_words_are_escaped():
    hostile = "<script>&\"'"
    cell = page.Cell(hostile, hostile)
    pieces = [
        page.table("key", hostile, [hostile], [[cell, cell]]),
        page.paragraph(hostile),
        page.bullets([hostile]),
        page.code(hostile),
        page.folded(hostile, ""),
        page.page(hostile, "", [page.Section("key", hostile, "")], ""),
    ]
    assert all("<script" not in piece for piece in pieces)


def _found(pattern: str, text: str) -> list[str]:

    return re.findall(pattern, text, flags=re.DOTALL)


# The command


def test_command(tmp_path, monkeypatch, outcome, undrawn):
    launched = []
    monkeypatch.setattr(click, "launch", lambda place: launched.append(place))
    place = str(tmp_path / "out")
    plain = CliRunner().invoke(_demo.command(), ["--seed", "3", "--out", place, "--quick", "--open"])
    assert plain.exit_code == 0, plain.output
    assert launched == [(Path(place) / "report.html").resolve().as_uri()]
    assert "report.html" in plain.output.replace("\n", "")
    for row in outcome.rows:
        low, high = row.test.interval
        assert f"{100 * row.test.value:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in plain.output
        assert f"{row.nbytes:,}" in plain.output


def test_command_prints_json(tmp_path, monkeypatch, outcome):
    monkeypatch.setattr(demo, "run", lambda folder, seed, settings: outcome)
    found = CliRunner().invoke(_demo.command(), ["--json", "--out", str(tmp_path)])
    assert json.loads(found.output) == json.loads(json.dumps(demo.record(outcome)))


def test_command_starts_without_torch():

    script = "import sys; from weightsmith.cli._demo import command; command(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
