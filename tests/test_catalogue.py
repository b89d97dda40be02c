"""The catalogue reads cards as text, and finds every kind of gap."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner

from weightsmith import card as cards
from weightsmith import claims
from weightsmith.catalogue import Catalogue, check, papers
from weightsmith.cli import _methods
from weightsmith.errors import Error

ROOT = Path(__file__).parents[1]

KERNEL = '''
"""Halves a weight."""
from weightsmith.card import card

@card(
    paper="Nobody 2020, "
    "'Halves'",
    covers=("half-paper",),
    needs=("base",),
    unit="row",
    reduce=total,
    laws=("scale",),
    claim="is half",
)
def halve(weight: Tensor, base: Tensor, *, amount: float = 0.5, solved=None) -> Tensor:
    r"""Half of the weight,
    and no more.

    .. math:: w / 2
    """
'''
KERNEL_FILE, ROOM_FILE = "src/weightsmith/merge/_halve.py", "src/weightsmith/merge/__init__.py"
CLAIM = """
from weightsmith.claims import Claim

CLAIM = Claim(key="half-paper", statement="a half is less than a whole", method="half", baseline="whole")

def measure(seed):
    return {"half": 0.5, "whole": 1.0}
"""

VARIANT = CLAIM.replace('"half-paper"', '"half-paper", variant="big one"').replace("0.5", "1.5")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with one room, one method, its law, test and measured claim: no gap."""
    files = {
        "pyproject.toml": "",
        "src/weightsmith/__init__.py": '_ROOMS = ("merge",)\n__all__ = ["Error", *_ROOMS]\n',
        "src/weightsmith/papers.jsonl": json.dumps({"key": "half-paper", "title": "Halves", "family": "merge"}) + "\n",
        "src/weightsmith/merge/__init__.py": '__all__ = ["METHODS"]\nMETHODS = table(halve)\n',
        "src/weightsmith/merge/laws.py": "def scale(): ...\ndef _hidden(): ...\n",
        "src/weightsmith/merge/_halve.py": KERNEL,
        "tests/merge/test_halve.py": "from weightsmith.merge import halve",
        "claims/half_paper.py": CLAIM,
    }
    for name, text in files.items():
        edit(tmp_path, name, lambda _, text=text: text)
    path = tmp_path / "claims/half_paper.py"
    claims.write(claims.run(path), path)
    return tmp_path


def edit(checkout: Path, name: str, change) -> None:
    file = checkout / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(change(file.read_text() if file.exists() else ""))


def package(checkout: Path) -> Path:
    return checkout / "src" / "weightsmith"


def test_a_method_is_read_whole(checkout: Path) -> None:
    (method,) = Catalogue(package(checkout)).methods
    assert (method.path, method.file, method.test) == ("merge.halve", "merge/_halve.py", "tests/merge/test_halve.py")
    assert KERNEL.splitlines()[method.line - 1].startswith("def halve")
    assert method.paper == "Nobody 2020, 'Halves'"
    assert (method.covers, method.needs, method.unit, method.laws) == (("half-paper",), ("base",), "row", ("scale",))
    assert (method.reduce, method.solve, method.claim, method.departs) == ("total", "", "is half", "")
    assert method.summary == "Half of the weight, and no more."
    assert method.docstring.endswith(".. math:: w / 2")
    assert [str(p) for p in method.parameters] == [
        "weight: Tensor",
        "base: Tensor",
        "amount: float = 0.5",
        "solved=None",
    ]
    assert method.call == "merge.halve(weight, base, *, amount=0.5)"
    assert method.reads == 2
    assert [p.name for p in method.options] == ["amount"]  # base is a need, solved is the room's business


def test_a_lifted_method_is_called_as_its_room_says(checkout: Path) -> None:
    edit(checkout, ROOM_FILE, lambda text: text + "halve: Kind = lift(_halve.halve)\n")
    edit(
        checkout,
        "src/weightsmith/merge/room.py",
        lambda _: (
            """
_PARAMETERS = (
    inspect.Parameter("weights", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Source | None"),
    K("share", K.KEYWORD_ONLY, default=0.5),
)
def lift(kernel):
    "Called on weights."
"""
        ),
    )
    (method,) = Catalogue(package(checkout)).methods
    assert method.call == "merge.halve(weights, *, share=0.5, amount=0.5)"
    assert str(method.public[0]) == "weights: Source | None"
    assert Catalogue(package(checkout)).about("merge") == ("", "Called on weights.")


def test_all_is_well(checkout: Path) -> None:
    assert check(package(checkout)) == []


def test_positional_defaults_belong_to_the_last_arguments(checkout: Path) -> None:
    edit(
        checkout,
        "src/weightsmith/merge/_halve.py",
        lambda t: t.replace("*, amount: float = 0.5, solved=None", "a, b=1"),
    )
    (method,) = Catalogue(package(checkout)).methods
    assert [(p.name, p.default) for p in method.parameters][-2:] == [("a", None), ("b", "1")]


def replaced(old: str, new: str):
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (ROOM_FILE, replaced("table(halve)", "table()"), "halve: not in METHODS of merge"),
        (ROOM_FILE, replaced("table(halve)", "table(halve, third)"), "METHODS lists third"),
        (ROOM_FILE, replaced("METHODS = table(halve)", ""), "merge has no METHODS"),
        (KERNEL_FILE, replaced('("scale",)', '("scales",)'), "unknown law 'scales' (did you mean 'scale'?)"),
        (KERNEL_FILE, replaced('("scale",)', '("_hidden",)'), "unknown law '_hidden'"),
        (KERNEL_FILE, replaced('"half-paper"', '"half-papers"'), "'half-papers' (did you mean 'half-paper'?)"),
        (KERNEL_FILE, replaced('"Nobody 2020, "\n    "\'Halves\'"', '""'), "halve: no paper"),
        ("tests/merge/test_halve.py", lambda _: "halves", "tests/merge/test_halve.py does not mention it"),
        ("claims/half_paper.py", lambda text: text + "\n# changed", "changed since it was measured"),
        ("claims/half_paper.py", replaced("CLAIM = Claim(", "OTHER = Claim("), "has a line CLAIM = Claim("),
        ("claims/half_paper.py", replaced('statement="a half is less than a whole"', "statement=WORDS"), "as text"),
        ("claims/half_paper.py", replaced('key="half-paper"', 'key="other"'), "its key 'other'"),
        ("claims/other.py", lambda _: CLAIM.replace("half-paper", "other"), "unknown catalogue key 'other'"),
        ("claims/results/half-paper.json", lambda _: "{", "not a claim's result"),
        ("claims/results/lost.json", lambda _: "{}", "no claim claims/lost.py"),
        ("claims/half_paper__big_one.py", lambda _: CLAIM, "'half-paper' and its variant '' do not make its name"),
        (
            "claims/half_paper__big_one.py",
            lambda _: VARIANT,
            "not measured; weightsmith claims run half-paper--big-one",
        ),
        ("claims/results/half-paper--big-one.json", lambda _: "{}", "no claim claims/half_paper__big_one.py"),
    ],
)
def test_a_gap_is_named(checkout: Path, name: str, change, said: str) -> None:
    edit(checkout, name, change)
    gaps = check(package(checkout))
    assert len(gaps) >= 1
    assert any(said in gap for gap in gaps), gaps


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tests/merge/test_halve.py", "merge/_halve.py:15 halve: no test tests/merge/test_halve.py"),
        ("claims/results/half-paper.json", "claims/half_paper.py: not measured; weightsmith claims run half-paper"),
    ],
)
def test_a_missing_file_is_named(checkout: Path, name: str, said: str) -> None:
    (checkout / name).unlink()
    assert check(package(checkout)) == [said]


def test_a_method_without_a_claim_is_a_gap(checkout: Path) -> None:
    (checkout / "claims/half_paper.py").unlink()
    (checkout / "claims/results/half-paper.json").unlink()
    assert check(package(checkout)) == ["half-paper: covered by a method, but claims/half_paper.py does not exist"]


def test_an_installed_package_has_no_checkout_to_check(checkout: Path) -> None:
    (checkout / "pyproject.toml").unlink()
    (checkout / "tests/merge/test_halve.py").unlink()
    assert check(package(checkout)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replaced('claim="is half"', "claim=words()"), "claim of its card is not written out"),
        (replaced('claim="is half"', 'clam="is half"'), "a card has no clam"),
        (replaced("def halve(", "def halve(("), "_halve.py:15"),
    ],
)
def test_an_unreadable_card_is_an_error(checkout: Path, change, said: str) -> None:
    edit(checkout, KERNEL_FILE, change)
    with pytest.raises(Error, match=said):
        check(package(checkout))


def test_a_room_in_a_room(checkout: Path) -> None:
    inner = "src/weightsmith/merge/align/"
    edit(checkout, inner + "__init__.py", lambda _: "METHODS = table(match)")
    edit(checkout, inner + "_match.py", lambda _: KERNEL.replace("def halve", "def match"))
    gaps = check(package(checkout))
    assert gaps == ["merge/align/_match.py:15 match: no test tests/merge/align/test_match.py"]  # laws are merge's
    assert [m.path for m in Catalogue(package(checkout)).methods] == ["merge.halve", "merge.align.match"]


def test_public_names(checkout: Path) -> None:
    assert Catalogue(package(checkout)).public_names() == [
        "weightsmith.Error",
        "weightsmith.merge",
        "weightsmith.merge.METHODS",
        "weightsmith.merge.halve",
    ]


def test_evidence_of_a_paper(checkout: Path) -> None:
    (found,) = Catalogue(package(checkout)).evidence
    assert [m.name for m in found.methods] == ["halve"]
    assert [m.verdict for m in found.measured] == ["does not hold"]  # a half is not more than a whole
    edit(checkout, "claims/half_paper.py", lambda text: text + "\n# changed")
    edit(checkout, "claims/half_paper__big_one.py", lambda _: VARIANT)
    (found,) = Catalogue(package(checkout)).evidence
    assert [(m.claim.variant, m.verdict) for m in found.measured] == [("", "stale"), ("big one", "not measured")]
    path = checkout / "claims/half_paper__big_one.py"
    claims.write(claims.run(path), path)
    (found,) = Catalogue(package(checkout)).evidence
    assert [m.verdict for m in found.measured] == ["stale", "holds"]


def test_a_variant_alone_is_a_claim_too(checkout: Path) -> None:
    for file in ("claims/half_paper.py", "claims/results/half-paper.json"):
        (checkout / file).unlink()
    path = checkout / "claims/half_paper__big_one.py"
    edit(checkout, "claims/half_paper__big_one.py", lambda _: VARIANT)
    claims.write(claims.run(path), path)
    assert check(package(checkout)) == []


# This package


def test_every_paper_of_the_catalogue_is_listed_once() -> None:
    every = papers()
    assert len(every) == 511
    assert all(paper.title and paper.family for paper in every)
    lines = (ROOT / "src/weightsmith/papers.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == sorted({paper.key for paper in every})


def test_text_and_import_agree() -> None:
    catalogue = Catalogue()
    for room, names in catalogue.tables.items():
        table = importlib.import_module(f"weightsmith.{room}").METHODS
        assert tuple(table) == names
        for method in (m for m in catalogue.methods if m.room == room):
            worn = cards.card_of(table[method.name])
            for field in ("paper", "covers", "needs", "unit", "laws", "claim", "departs"):
                assert getattr(method, field) == getattr(worn, field), (method.path, field)
            assert bool(method.reduce) == (worn.reduce is not None)
            called = inspect.signature(table[method.name]).parameters.values()
            named = [p for p in called if p.kind is not p.VAR_KEYWORD]
            assert [(p.name, p.kind is p.KEYWORD_ONLY, p.default is p.empty) for p in named] == [
                (p.name, p.keyword_only, p.default is None) for p in method.public
            ]


def test_public_names_agree_with_the_import() -> None:
    package = importlib.import_module("weightsmith")
    names = Catalogue().public_names()
    for name in package.__all__:
        assert f"weightsmith.{name}" in names


def test_nothing_of_a_room_is_imported() -> None:
    code = """
        import sys, weightsmith.catalogue as catalogue, weightsmith.cli._methods as methods
        catalogue.check(), methods.rows()
        print("torch" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT / "src"
    )
    assert done.stdout.strip() == "False", done.stderr


# The command


@pytest.fixture
def here(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(_methods, "Catalogue", lambda: Catalogue(package(checkout)))
    return checkout


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(_methods.command(), arguments, env={"COLUMNS": "80"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_rows_are_chosen_by_room_and_pattern(here: Path) -> None:
    assert [row["method"] for row in _methods.rows()] == ["merge.halve"]
    assert _methods.rows("merge", "h*")[0]["options"] == {"amount": "0.5"}
    assert _methods.rows(None, "third*") == []
    with pytest.raises(Error, match=r"no room 'merg' \(did you mean 'merge'\?\)"):
        _methods.rows("merg")


def test_rooms_are_told_apart(here: Path) -> None:
    for room in ("merge/align", "prune"):
        edit(here, f"src/weightsmith/{room}/__init__.py", lambda _: "METHODS = table(halve)")
        edit(here, f"src/weightsmith/{room}/_halve.py", lambda _: KERNEL)
    assert [row["method"] for row in _methods.rows("merge")] == ["merge.halve", "merge.align.halve"]
    assert [row["method"] for row in _methods.rows("prune")] == ["prune.halve"]
    with pytest.raises(Error, match=r"'halve' is in several rooms: merge.halve or merge.align.halve or prune.halve"):
        invoke("halve")
    assert "weightsmith.prune.halve" in invoke("prune.halve")


def test_the_list_fits_a_terminal(here: Path) -> None:
    text = invoke()
    assert "halve" in text
    assert "Half of the weight, and no more." in text
    assert max(map(len, text.splitlines())) <= 80


def test_one_method(here: Path) -> None:
    for name in ("halve", "merge.halve"):
        text = " ".join(invoke(name).split())
        for part in ("amount: float = 0.5", "Nobody 2020, 'Halves'", "is half", "merge/_halve.py:15", "read twice"):
            assert part in text
    assert "solved" not in text


def test_json_is_the_card(here: Path) -> None:
    assert json.loads(invoke("--json"))[0] == json.loads(invoke("halve", "--json"))


def test_an_unknown_method_is_an_error(here: Path) -> None:
    with pytest.raises(Error, match=r"no method 'halv' \(did you mean 'halve'\?\)"):
        invoke("halv")
    with pytest.raises(Error, match="not both"):
        invoke("halve", "--room", "merge")


# The tool


def tool():
    spec = importlib.util.spec_from_file_location("catalogue_tool", ROOT / "tools" / "catalogue.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_write_then_check(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "tools").mkdir()
    (checkout / "README.md").write_text("# x\n<!-- methods:start -->old<!-- methods:end -->\ny\n")
    assert tool().main(["--check"], checkout) == 1
    said = capsys.readouterr().out
    assert "tools/public_names.txt: stale" in said
    assert "README.md: stale" in said
    assert tool().main(["--write"], checkout) == 0
    assert "| `ws.merge` | `halve` |" in (checkout / "README.md").read_text()
    assert (checkout / "README.md").read_text().endswith("<!-- methods:end -->\ny\n")
    assert tool().main(["--check"], checkout) == 0
    edit(checkout, "tools/public_names.txt", lambda text: text.replace("weightsmith.Error\n", ""))
    assert tool().main(["--check"], checkout) == 1
    assert "lacks 'weightsmith.Error'" in capsys.readouterr().out


def test_the_readme_has_a_row_for_each_claim(checkout: Path) -> None:
    (checkout / "tools").mkdir()
    (checkout / "README.md").write_text("<!-- claims:start --><!-- claims:end -->\n")
    path = checkout / "claims/half_paper__big_one.py"
    path.write_text(VARIANT)
    claims.write(claims.run(path), path)
    assert tool().main(["--write"], checkout) == 0
    lines = (checkout / "README.md").read_text().splitlines()
    assert [line.split(" | ")[0::3] for line in lines if "Halves" in line] == [
        ["| Halves", "does not hold |"],
        ["| Halves (big one)", "holds |"],
    ]


def test_a_lost_marker_is_an_error(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (checkout / "tools").mkdir()
    (checkout / "README.md").write_text("<!-- methods:start -->")
    assert tool().main(["--check"], checkout) == 1
    assert "needs exactly one <!-- methods:start -->" in capsys.readouterr().out
