"""What a recipe may say: every key, kind and reference is judged before anything is opened, with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from weightsmith.errors import Error
from weightsmith.recipe import _schema
from weightsmith.recipe._schema import Recipe, read, setting, with_settings
from weightsmith.recipe._yaml import load, plain

HEAD = "inputs: {base: base, a: a, b: b}\n"
STEP = "steps: {x: {method: merge.mean, models: [a, b]}}\n"
SAVE = "save: {o: x}\n"


def of(text: str) -> Recipe:
    return read(load(text, "r.yaml")[0])


def step(body: str) -> str:
    return HEAD + f"steps: {{x: {{{body}}}}}\n" + SAVE


TIES = "method: merge.ties, models: [a, b], base: base, "
BAD = [
    # sections of a wrong kind
    ("- a", "1:1", "a recipe must be a mapping of names to values, got a list"),
    (HEAD + STEP + SAVE + "tilte: x", "4:1", "did you mean 'title'"),
    ("inputs: [a]\n" + SAVE, "1:9", "inputs must be a mapping of names to values, got a list"),
    ("inputs:\n" + SAVE, "1:8", "there are no inputs"),
    (SAVE, "1:1", "a recipe needs inputs:"),
    (HEAD + "steps: 3\n" + SAVE, "2:8", "steps must be a mapping of names to values, got 3"),
    (HEAD + STEP + "save: word", "3:7", "got a text"),
    (HEAD + STEP, "1:1", "neither save: nor evaluate:"),
    ("title: [a]\n" + HEAD + STEP + SAVE, "1:8", "title must be a text, got a list"),
    ("report: score.py\n" + HEAD + STEP + SAVE, "1:9", "ends in .html"),
    ("report:\n" + HEAD + STEP + SAVE, "1:8", "report must be a word, got nothing"),
    # inputs
    ("inputs: {ä: a}\n" + SAVE, "1:13", "cannot be a name"),
    ("inputs: {1a: a}\n" + SAVE, "1:14", "cannot be a name"),
    ('inputs: {"a\\n": a}\nsave: {o: a}', "1:17", "cannot be a name"),
    ("inputs: {1: a}\n" + SAVE, "1:13", "the name 1 is not a word"),
    ("inputs: {a: {path: a, pth: b}}\n" + SAVE, "1:23", "did you mean 'path'"),
    ("inputs: {a: {dtype: float32}}\n" + SAVE, "1:13", "needs path:"),
    ("inputs: {a: {path: a, dtype: 3}}\n" + SAVE, "1:30", "dtype of the input a must be a word, got 3"),
    ("inputs: {a: {path: [a]}}\n" + SAVE, "1:20", "path of the input a must be a word, got a list"),
    # steps
    (step("models: [a]"), "2:12", "needs method:"),
    (HEAD + "steps: {a: {expression: b}}\n" + SAVE, "2:12", "'a' already"),
    (step("method: [merge.mean]"), "2:21", "such as merge.ties, got a list"),
    (step("method: merge.lift, models: [a]"), "2:21", "no method 'merge.lift'"),
    (step("method: merge.METHODS"), "2:21", "no method"),
    (step("method: os.system"), "2:21", "no method"),
    (step("method: mean, models: [a]"), "2:21", "did you mean 'merge.mean'"),
    (step("expression: a, method: merge.mean"), "2:28", "it may have expression"),
    (step("expression: ''"), "2:25", "must be a word, got an empty text"),
    (step("expression: a + x"), "2:25", "no input or earlier step 'x'"),
    (step("method: merge.mean, models: 3"), "2:41", "merge.mean takes a list of models"),
    (step("method: merge.mean, models: [a, 3]"), "2:45", "got 3"),
    (step("method: merge.mean, models: [a, [b]]"), "2:45", "got a list"),
    (step("method: merge.mean, models: {a: b}"), "2:41", "takes a list of models"),
    (step("method: merge.mean, models: [a, x]"), "2:45", "no input or earlier step 'x'"),
    (step("method: merge.mean, models: [a, bse]"), "2:45", "did you mean 'base'"),
    (step("method: merge.ties, models: [a, b], base: [base]"), "2:55", "merge.ties takes one base"),
    (step("method: merge.ties, models: [a, b], base: 1"), "2:55", "merge.ties takes one base"),
    (step("method: merge.ties, models: [a, b], base: "), "2:12", "merge.ties needs base:"),
    (step("method: merge.mean, models: [a], else: first, rest: drop"), "2:46", "else: and rest:"),
    (step("method: merge.mean, models: [a], weights: [b]"), "2:46", "weights: and models:"),
    (step("method: prune.magnitude, weights: a, sparsity: 0.5, else: base"), "2:65", "no option 'else'"),
    (step("method: merge.dare_ties, models: [a], base: base, key: 3"), "2:63", "no option 'key'"),
    (step(TIES + "density: much"), "2:70", "density must be a number or a list of numbers, got a text"),
    (step(TIES + "density: "), "2:69", "got nothing"),
    (step(TIES + "density: true"), "2:70", "got yes or no"),
    (step(TIES + "density: [0.5, x]"), "2:76", "density must be"),
    (step(TIES + "density: {}"), "2:70", "a mapping of patterns"),
    (step(TIES + "density: {1: 0.5}"), "2:70", "a mapping of patterns"),
    (step(TIES + "density: {'*': {'*': 0.5}}"), "2:76", "density must be"),
    (step(TIES + "density: {'*': x}"), "2:76", "got a text"),
    (step(TIES + "density: {by_depth: 3}"), "2:81", "by_depth needs a list of numbers, got 3"),
    (step(TIES + "density: {by_depth: []}"), "2:81", "got an empty list"),
    (step(TIES + "density: {by_depth: [0.1, x]}"), "2:87", "must be a number, got a text"),
    (step(TIES + "density: {by_depth: [0.1], '*': 0.2}"), "2:70", "stand alone"),
    (step(TIES + f"amount: 1{'0' * 400}"), "2:69", "too large"),
    (step(TIES + "normalize: 1"), "2:72", "normalize must be true or false, got 1"),
    (
        step("method: merge.dare_ties, models: [a], base: base, seed: 1.5"),
        "2:69",
        "seed must be a whole number, got 1.5",
    ),
    # outputs
    (HEAD + STEP + "save: {'': x}", "3:12", "printable"),
    (HEAD + STEP + 'save: {"a\\0b": x}', "3:16", "printable"),
    (HEAD + STEP + "save: {o: }", "3:10", "must be a mapping of names to values, got nothing"),
    (HEAD + STEP + "save: {o: y}", "3:11", "no input or step 'y'"),
    (HEAD + STEP + "save: {o: {dtype: float32}}", "3:11", "needs weights:"),
    (HEAD + STEP + "save: {o: {weights: x, dtyp: float32}}", "3:24", "did you mean 'dtype'"),
    (HEAD + STEP + "save: {o: {weights: x, dtype: 3}}", "3:31", "must be a word, got 3"),
    (HEAD + STEP + "save: {o: {weights: x, format: [pt]}}", "3:32", "must be a word, got a list"),
    (HEAD + STEP + "save: {o: {weights: x, max_shard_size: true}}", "3:40", "must be a word, got yes or no"),
    (HEAD + STEP + "save: {'o{z}': x}", "3:16", "which is not swept"),
    # figures of merit
    (HEAD + STEP + SAVE + "evaluate: {'': s.py:f}", "4:16", "needs a name"),
    (HEAD + STEP + SAVE + "evaluate: {q: 3}", "4:15", "the measure q must be a mapping"),
    (HEAD + STEP + SAVE + "evaluate: {q: {on: x}}", "4:15", "needs with:"),
    (HEAD + STEP + SAVE + "evaluate: {q: {with: s.py:f, on: []}}", "4:34", "nothing would be measured"),
    (HEAD + STEP + SAVE + "evaluate: {q: {with: s.py:f, on: [y]}}", "4:35", "no input or step 'y'"),
    # sweeps
    (HEAD + STEP + SAVE + "sweep: {y.z: [1]}", "4:14", "sweep: no input or step 'y'"),
    (HEAD + STEP + SAVE + "sweep: {x: [1]}", "4:12", "which option of x"),
    (HEAD + STEP + SAVE + "sweep: {x.weight: []}", "4:19", "got an empty list"),
    (HEAD + STEP + SAVE + "sweep: {x.weight: [1]}", "3:11", "has room for one"),
]


@pytest.mark.parametrize(("text", "place", "said"), BAD, ids=range(len(BAD)))
def test_what_is_wrong_is_said_in_a_line_with_its_place(text: str, place: str, said: str):
    with pytest.raises(Error) as caught:
        of(text)
    message = str(caught.value)
    assert message.startswith(f"r.yaml:{place}: "), message
    assert said in message, message
    assert "\n" not in message
    assert "Node(" not in message


GOOD = [
    (TIES + "density: {by_depth: [0.1, 0.2]}", "density", {"by_depth": [0.1, 0.2]}),
    (TIES + "density: {'a.*': {by_depth: [0.1]}, '*': 1}", "density", {"a.*": {"by_depth": [0.1]}, "*": 1}),
    (TIES + "density: {python: 'data.py:density'}", "density", {"python": "data.py:density"}),
    (TIES + "density: [0.1, 1]", "density", [0.1, 1]),
    ("method: merge.mean, models: {python: 'data.py:models'}", "models", {"python": "data.py:models"}),
    ("method: merge.mean, models: [./a, ../b, ~/c, a.0]", "models", ["./a", "../b", "~/c", "a.0"]),
    ("method: merge.mean, models: [a], weight: ", "weight", None),
    ("method: merge.mean, models: [a], base: ", "base", None),
    ("method: merge.mean, models: [a], else: first", "rest", "first"),
    ("method: merge.mean, weights: [a]", "models", ["a"]),
    ("method: prune.magnitude, sparsity: 2:4", "sparsity", "2:4"),
    ("method: prune.magnitude, sparsity: 0.5", "weights", "b"),
]


@pytest.mark.parametrize(("body", "key", "value"), GOOD, ids=range(len(GOOD)))
def test_what_is_right_stays_as_it_was_written(body: str, key: str, value: object):
    assert plain(of(step(body)).steps["x"].arguments[key]) == value


def test_titles_are_texts_whatever_yaml_makes_of_them():
    assert [of(f"title: {one}\n" + HEAD + STEP + SAVE).title for one in ("", "2.5", "Ünï", "true")] == [
        "",
        "2.5",
        "Ünï",
        "True",
    ]


def test_a_step_depends_on_what_is_swept_before_it_in_the_order_of_the_sweep():
    recipe = of(
        HEAD
        + """
steps:
  x: {method: merge.wise_ft, models: [a], base: base}
  y: {method: merge.wise_ft, models: [b], base: base}
  z: {method: merge.mean, models: [y, x.0, x]}
  w: {expression: z - b}
sweep: {y.amount: [0, 1], x.amount: [0, 1], a: [a, c]}
save: {"{a}{x.amount}{y.amount}": w}
"""
    )
    assert recipe.uses("z") == ["y", "x"]
    assert recipe.affected("w") == ("y.amount", "x.amount", "a")
    assert recipe.affected("y") == ("y.amount",)
    assert recipe.affected("x") == ("x.amount", "a")
    assert recipe.affected("b") == ()
    assert recipe.last == "w"


def test_steps_that_use_two_before_them_are_followed_once():
    lines = ["  s0: {expression: a + b}", "  s1: {expression: s0 + b}"]
    lines += [f"  s{n}: {{expression: s{n - 1} + s{n - 2}}}" for n in range(2, 60)]
    recipe = of(HEAD + "steps:\n" + "\n".join(lines) + "\nsweep: {a: [a, b]}\nsave: {'{a}': s59}")
    assert recipe.affected("s59") == ("a",)


SETTINGS = [
    (["x.weight=[1, 3]"], "steps.x.weight", [1, 3]),
    (["steps.x.weight=[1, 3]"], "steps.x.weight", [1, 3]),
    (["x.models.0=base"], "steps.x.models", ["base", "b"]),
    (["x.models.1=a", "x.models.0=b"], "steps.x.models", ["b", "a"]),
    (["t.density.h.0.w=0.1"], "steps.t.density", {"h.0.w": 0.1, "*": 0.5}),
    (["t.density.h.0.w=0.1", "t.density.h.0.w=0.2"], "steps.t.density", {"h.0.w": 0.2, "*": 0.5}),
    (["t.amount.h.*=0.1"], "steps.t.amount", {"h.*": 0.1}),
    (["t.curve.by_depth.1=0.9"], "steps.t.curve", {"by_depth": [0.0, 0.9]}),
    (["a.dtype=bf16"], "inputs.a", {"path": "a", "dtype": "bf16"}),
    (["a=c"], "inputs.a", "c"),
    (["inputs.c=d"], "inputs.c", "d"),
    (["save.o/x.safetensors.dtype=bf16"], "save.o/x.safetensors", {"weights": "x", "dtype": "bf16"}),
    (["save.p/y.pt=x"], "save.p/y.pt", "x"),
    (["save.p/y.pt.weights=x"], "save.p/y.pt", {"weights": "x"}),
    (["evaluate.q.on=[x]"], "evaluate.q", {"with": "s.py:f", "on": ["x"]}),
    (["evaluate.v1.5=s.py:g"], "evaluate.v1.5", "s.py:g"),
    (["sweep.t.amount=[1, 2]"], "sweep.t.amount", [1, 2]),
    (["t.pats.h.0=0.3"], "steps.t.pats", {"h": 1, "h.0": 0.3}),
    (["save.dtype=x"], "save.dtype", "x"),
    (["title=Other"], "title", "Other"),
    (["x.weight="], "steps.x.weight", None),
]
SET = """
inputs: {a: a, b: b}
steps:
  x: {method: merge.mean, models: [a, b]}
  t: {density: 0.5, amount: , curve: {by_depth: [0.0, 1.0]}, pats: {h: 1, h.0: 2}}
save: {o/x.safetensors: x}
evaluate: {q: s.py:f}
"""


@pytest.mark.parametrize(("given", "place", "value"), SETTINGS, ids=[given[0] for given, _, _ in SETTINGS])
def test_settings_reach_every_place(given: list[str], place: str, value: object):
    document = with_settings(load(SET, "r.yaml")[0], [setting(one) for one in given])
    found = plain(document)
    section, _, rest = place.partition(".")
    name, _, option = rest.partition(".") if section in ("steps", "inputs") else (rest, "", "")
    found = found[section][name] if name else found[section]
    found = found[option] if option else found
    assert found == value
    if isinstance(value, dict):
        assert list(found) == list(value)  # the first pattern that fits is taken


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("x.models.2=a", "x.models is a list of 2, counted from 0; it has no item '2'"),
        ("x.models.a=a", "it has no item 'a'"),
        ("title.x=3", "no 'x'"),
        ("xx.weight=3", "no step, input or section 'xx'"),
        ("x.weight=1\n---\n2", "this is a second one"),
        ("=3", "step.option=value"),
        ("x.weight", "step.option=value"),
    ],
)
def test_settings_that_have_no_place(given: str, said: str):
    with pytest.raises(Error, match="--set") as caught:
        with_settings(load("title: t\n" + SET, "r.yaml")[0], [setting(given)])
    assert said in str(caught.value)


def test_a_setting_changes_neither_the_document_nor_other_places():
    document = load(SET, "r.yaml")[0]
    before = plain(document)
    changed = plain(with_settings(document, [setting("x.models.0=b"), setting("t.density=1")]))
    assert plain(document) == before
    assert changed == before | {
        "steps": {"x": {"method": "merge.mean", "models": ["b", "b"]}, "t": before["steps"]["t"] | {"density": 1}}
    }


def test_base_name():
    assert [_schema.base_name(one) for one in ("a", "a.0", "a.12", "a.b", "./a.0/b")] == [
        "a",
        "a",
        "a",
        "a.b",
        "./a.0/b",
    ]


RAW: list[tuple[bytes, str]] = [
    (b"", "r.yaml:1:1: is empty"),
    (b"# nothing\n", "r.yaml:1:1: is empty"),
    ("title: x\ntitlé: x".encode("latin-1"), "r.yaml:2:5: is not a text in UTF-8"),
    (b"title: x\na: \x07", "r.yaml:2:4: the character #x07"),
    (b"inputs:\n\ta: a", "r.yaml:2:1: "),
    (b"inputs: {a: a}\ninputs: {b: b}", "r.yaml:2:1: the key 'inputs' is there already"),
    (b"inputs: {a: a}\nsave: {o: a}\n---\na: b", "r.yaml:4:1: a recipe is one document"),
]


@pytest.mark.parametrize(("raw", "said"), RAW, ids=range(len(RAW)))
def test_files_that_are_no_recipe(raw: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from weightsmith import recipe as recipes

    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(raw)
    with pytest.raises(Error) as caught:
        recipes.read("r.yaml")
    assert str(caught.value).startswith(said)


@pytest.mark.parametrize(
    "change", [str.encode, lambda t: t.encode("utf-8-sig"), lambda t: t.replace("\n", "\r\n").encode()]
)
def test_marks_and_line_ends_of_windows_change_nothing(change: Callable[[str], bytes], tmp_path: Path):
    from weightsmith import recipe as recipes

    path = tmp_path / "r.yaml"
    path.write_bytes(change(HEAD + STEP + SAVE))
    found = recipes.read(path)
    assert isinstance(found, Recipe)
    assert plain(found.document) == plain(load(HEAD + STEP + SAVE)[0])


def test_anchors_and_merged_mappings():
    text = (
        HEAD
        + """
steps:
  x: &one {method: merge.mean, models: [a, b]}
  y: {<<: *one, weight: [1, 3]}
save: {o: y}
"""
    )
    found = of(text).steps["y"].arguments
    assert {key: plain(value) for key, value in found.items()} == {"models": ["a", "b"], "weight": [1, 3]}
