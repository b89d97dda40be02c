"""Claims: the interval, the verdict, what is kept, and the commands."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from weightsmith import claims
from weightsmith.cli import _claims
from weightsmith.errors import Error, MissingPackage

FILE = """
from weightsmith.claims import Claim

CLAIM = Claim(
    key="two-words", statement="b is more than a | always", method="b", baseline="a", margin=0.5, seeds=(3, 4, 5)
)

def measure(seed):
    return {"a": seed, "b": seed + 1 + 0.01 * seed, "other": 7}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "claims" / "two_words.py"
    file.parent.mkdir()
    file.write_text(FILE)
    return file


def claim(**changes) -> claims.Claim:
    fields = {"key": "x", "statement": "b beats a", "method": "b", "baseline": "a", "seeds": (0, 1, 2)}
    return claims.Claim(**{**fields, **changes})


def judged(differences, **changes) -> claims.Result:
    rows = [{"a": 10.0, "b": 10.0 + d} for d in differences]
    return claims.judge(claim(seeds=tuple(range(len(rows))), **changes), rows)


# The interval


@pytest.mark.parametrize(("freedom", "t"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (7, 2.3646), (30, 2.0423)])
def test_student_quantiles_are_those_of_the_tables(freedom: int, t: float) -> None:
    assert claims.student_quantile(freedom) == pytest.approx(t, abs=1e-4)


def test_many_degrees_of_freedom_are_nearly_normal() -> None:
    assert claims.student_quantile(5000) == pytest.approx(statistics.NormalDist().inv_cdf(0.975), abs=1e-3)


def test_the_interval_covers_the_mean_19_times_in_20() -> None:
    chance = random.Random(0)
    intervals = [claims.student_interval([chance.gauss(1, 2) for _ in range(5)]) for _ in range(2000)]
    assert statistics.fmean(low <= 1 <= high for low, high in intervals) == pytest.approx(0.95, abs=0.015)


def test_one_value_has_no_interval() -> None:
    with pytest.raises(Error, match="at least 2 values, got 1"):
        claims.student_interval([1.0])


# The verdict


def test_three_verdicts() -> None:
    assert judged([0.3, 0.31, 0.29]).verdict == "holds"
    assert judged([-0.3, -0.31, -0.29]).verdict == "does not hold"
    assert judged([0.3, -0.31, 0.29]).verdict == "undecided"


def test_the_margin_moves_the_verdict() -> None:
    assert judged([0.3, 0.31, 0.29], margin=0.5).verdict == "does not hold"
    assert judged([-0.3, -0.31, -0.29], margin=-0.5).verdict == "holds"
    assert judged([0.5, 0.5, 0.5], margin=0.5).verdict == "holds"  # the assertion is >=


def test_lower_can_be_better() -> None:
    result = judged([-0.3, -0.31, -0.29], higher_is_better=False)
    assert result.verdict == "holds"
    assert result.difference == pytest.approx(0.3)


def test_differences_are_paired() -> None:
    # The seeds differ far more than the two figures do: unpaired, nothing could be told.
    rows = [{"a": 100.0 * seed, "b": 100.0 * seed + 1 + 0.1 * seed} for seed in range(3)]
    result = claims.judge(claim(), rows)
    assert result.difference == pytest.approx(1.1)
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert result.interval == pytest.approx((1.1 - half, 1.1 + half), abs=1e-4)


@pytest.mark.parametrize("seeds", [(), (1,), (1, 1)])
def test_too_few_seeds(seeds: tuple[int, ...]) -> None:
    with pytest.raises(Error, match="at least 2 different seeds"):
        claim(seeds=seeds)


# Running


def test_run_measures_every_seed(path: Path) -> None:
    said: list[str] = []
    result = claims.run(path, said.append)
    assert result.figures == {"a": [3, 4, 5], "b": [4.03, 5.04, 6.05], "other": [7, 7, 7]}
    assert result.difference == pytest.approx(1.04)
    assert result.verdict == "holds"
    assert result.seeds == (3, 4, 5)
    assert set(result.versions) == {"weightsmith", "torch", "python"}
    assert said[0] == "two-words seed 3: a 3, b 4.03, other 7"


def test_a_result_comes_back_as_it_was_written(path: Path) -> None:
    assert claims.read(path) is None
    result = claims.run(path)
    target = claims.write(result, path)
    assert target == path.parent / "results" / "two-words.json"
    assert claims.read(path) == result
    fields = json.loads(target.read_text())
    del fields["variant"]  # results that were written before there were variants have none
    target.write_text(json.dumps(fields))
    assert claims.read(path) == result
    assert [file.name for file in target.parent.iterdir()] == ["two-words.json"]


def test_a_changed_claim_makes_its_result_stale(path: Path) -> None:
    result = claims.run(path)
    assert not claims.is_stale(result, path)
    path.write_text(FILE.replace("7", "8"))
    assert claims.is_stale(result, path)


def test_helpers_are_imported_and_part_of_the_digest(path: Path) -> None:
    helper = path.with_name("_figures_of_two_words.py")
    helper.write_text("OTHER = 7")
    path.write_text(
        FILE.replace("7", "OTHER").replace("\nCLAIM", "from _figures_of_two_words import OTHER\n\nCLAIM", 1)
    )
    result = claims.run(path)
    assert result.figures["other"] == [7, 7, 7]
    assert claims.find(path.parent) == [path]
    assert str(path.parent) not in sys.path
    helper.write_text("OTHER = 8 ")
    assert claims.is_stale(result, path)
    assert claims.run(path).figures["other"] == [8, 8, 8]  # the helper was not kept from the first run


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('method="b"', 'method="c"', "measured no 'c', only 'a', 'b', 'other'"),
        ('"a": seed', '"a": float("nan")', "seed 3: a is not a finite number"),
        ("CLAIM =", "THING =", "defines CLAIM"),
        ("def measure", "def other", "defines CLAIM"),
        ('key="two-words"', 'key="three-words"', "belongs in three_words.py"),
        ('key="two-words"', 'key="two-words", variant="big one"', "belongs in two_words__big_one.py"),
    ],
)
def test_what_a_claim_file_must_be(path: Path, old: str, new: str, said: str) -> None:
    path.write_text(FILE.replace(old, new))
    with pytest.raises(Error, match=said):
        claims.run(path)


@pytest.mark.parametrize(
    "change",
    [lambda t: "import no_such_package\n" + t, lambda t: t.replace("seeds=", 'needs=("no_such_package",), seeds=')],
)
def test_a_missing_package_is_named(path: Path, change) -> None:
    path.write_text(change(FILE))
    with pytest.raises(MissingPackage, match=r'no_such_package: pip install "weightsmith\[claims\]"'):
        claims.run(path)


def test_missing_data_are_named(path: Path) -> None:
    path.write_text(FILE.replace("return {", 'open("/no/such/images.gz")\n    return {'))
    with pytest.raises(Error, match=r"claim two-words, seed 3: /no/such/images\.gz is not there"):
        claims.run(path)


def test_find_names_what_it_lacks(path: Path) -> None:
    assert claims.find(path.parent) == claims.find(path.parent, ["two-words"]) == [path]
    with pytest.raises(Error, match=r"no claim for 'two-word' \(did you mean 'two-words'\?\)"):
        claims.find(path.parent, ["two-word"])
    with pytest.raises(Error, match="no such folder of claims"):
        claims.find(path.parent / "nowhere")


# Several claims of one key


@pytest.fixture
def variant(path: Path) -> Path:
    """A second claim of the key; another key begins like it."""
    path.with_name("two_words_more.py").write_text(FILE.replace("two-words", "two-words-more"))
    file = path.with_name("two_words__big_one.py")
    file.write_text(FILE.replace('"two-words"', '"two-words", variant="big one"'))
    return file


def test_a_key_may_have_several_claims(path: Path, variant: Path) -> None:
    assert claims.find(path.parent, ["two-words"]) == [path, variant]
    assert claims.find(path.parent, ["two-words--big-one"]) == [variant]
    assert claims.find(path.parent, ["two-words--big-one", "two-words"]) == [variant, path]  # none of them twice
    assert [claims.claim_name(file) for file in claims.find(path.parent)] == [
        "two-words",
        "two-words--big-one",
        "two-words-more",
    ]
    with pytest.raises(Error, match=r"no claim for 'two-words--big' \(did you mean 'two-words--big-one'\?\)"):
        claims.find(path.parent, ["two-words--big"])
    path.unlink()
    assert claims.find(path.parent, ["two-words"]) == [variant]


def test_the_claims_of_a_key_keep_their_own_results(path: Path, variant: Path) -> None:
    said: list[str] = []
    result = claims.run(variant, said.append)
    assert (result.key, result.variant) == ("two-words", "big one")
    assert said[0].startswith("two-words--big-one seed 3: ")
    assert claims.write(result, variant).name == "two-words--big-one.json"
    assert claims.read(variant) == result
    assert claims.read(path) is None


@pytest.mark.parametrize("name", ["big__one", "Big", "big--one", " big", "a/b"])
def test_a_variant_is_some_plain_words(name: str) -> None:
    with pytest.raises(Error, match="its variant is words of small letters"):
        claim(variant=name)


# The commands


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(_claims.group(), arguments, env={"COLUMNS": "80"})


def test_run_and_table(path: Path) -> None:
    folder = ("--folder", str(path.parent))
    ran = invoke("run", "two-words", *folder)
    assert ran.exit_code == 0
    assert "two-words seed 5: a 5, b 6.05, other 7" in ran.stderr
    shown = invoke("table", *folder)
    assert shown.stdout == ran.stdout
    assert "holds  two-words" in shown.stdout
    assert "b against a: +1.04 [+1.02, +1.06], asserted ≥ 0.5, 3 seeds" in " ".join(shown.stdout.split())
    assert max(map(len, shown.stdout.splitlines())) <= 80
    assert json.loads(invoke("table", "--json", *folder).stdout)[0]["verdict"] == "holds"
    lines = invoke("table", "--markdown", *folder).stdout.splitlines()
    assert [line.replace("\\|", "").count("|") for line in lines] == [5, 5, 5]
    path.write_text(FILE + "\n")
    assert "stale" in invoke("table", *folder).stdout


def test_json_alone_is_on_standard_output(path: Path) -> None:
    ran = invoke("run", "--all", "--json", "--folder", str(path.parent))
    assert json.loads(ran.stdout)[0]["key"] == "two-words"
    assert ran.stderr == ""


def test_the_commands_know_all_claims_of_a_key(path: Path, variant: Path) -> None:
    folder = ("--folder", str(path.parent))
    assert [r["variant"] for r in json.loads(invoke("run", "two-words", "--json", *folder).stdout)] == ["", "big one"]
    shown = invoke("table", *folder).stdout
    assert "holds  two-words--big-one" in shown
    assert "not measured  two-words-more" in shown
    variant.write_text("CLAIM = None")
    ran = json.loads(invoke("run", "two-words--big-one", "--json", *folder).stdout)
    assert (ran[0]["key"], ran[0]["variant"], ran[0]["verdict"]) == ("two-words", "big one", "failed")


def test_one_failure_does_not_lose_the_others(path: Path) -> None:
    (path.parent / "another.py").write_text("CLAIM = None")
    ran = invoke("run", "--all", "--folder", str(path.parent))
    assert isinstance(ran.exception, Error)
    assert "another.py: a claim file defines" in str(ran.exception)
    assert claims.read(path) is not None
    assert json.loads(invoke("table", "--json", "--folder", str(path.parent)).stdout)[0] == {
        "key": "another",
        "variant": "",
        "verdict": "not measured",
    }


def test_a_failure_is_part_of_the_one_json_document(path: Path) -> None:
    (path.parent / "another.py").write_text("CLAIM = None")
    ran = invoke("run", "--all", "--json", "--folder", str(path.parent))
    assert ran.exit_code == 2
    first, second = json.loads(ran.stdout)
    assert (first["key"], first["verdict"], second["verdict"]) == ("another", "failed", "holds")
    assert "a claim file defines" in first["error"]


def test_run_needs_keys_or_all(path: Path) -> None:
    for arguments in ((), ("two-words", "--all")):
        assert "--all" in str(invoke("run", *arguments, "--folder", str(path.parent)).exception)
