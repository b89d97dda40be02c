"""Commands made from cards and signatures do what the functions do."""

from __future__ import annotations

import json

import click
import pytest
import torch

import weightsmith
from weightsmith.cli import _rooms
from weightsmith.cli._rooms import Nothing, Value, _methods

NAMES = [f"{method.room}.{method.name}" for method in _methods()]


@pytest.fixture
def models(model, tuned):
    return weightsmith.open(model), weightsmith.open(tuned)


def equal(path, weights):
    made = weightsmith.open(path)
    assert list(made) == list(weights)
    for name in made:
        torch.testing.assert_close(made[name], weights[name], rtol=0, atol=0)


def test_merging(run, model, tuned, models, tmp_path):
    status, out, err = run("merge", "mean", model, tuned, "--weight", "3,1", "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    assert out.startswith(f"{tmp_path / 'out'}: 4 tensors")
    equal(tmp_path / "out", weightsmith.merge.mean(list(models), weight=[3, 1]))


def test_a_switch(run, model, tuned, models, tmp_path):
    run("merge", "mean", model, tuned, "--weight", "1,1", "--no-normalize", "-o", tmp_path / "out")
    equal(tmp_path / "out", weightsmith.merge.mean(list(models), weight=[1, 1], normalize=False))


def test_a_base(run, model, tuned, models, tmp_path):
    status, _, err = run("merge", "model_stock", tuned, tuned, "-o", tmp_path / "out")
    assert status == 2
    assert "--base" in err
    assert run("merge", "model_stock", tuned, tuned, "--base", model, "-o", tmp_path / "out")[0] == 0
    equal(tmp_path / "out", weightsmith.merge.model_stock([models[1], models[1]], base=models[0]))


def test_pruning_with_every_kind_of_option(run, model, models, tmp_path):
    arguments = ["--sparsity", "0.25", "--scope", "global", "--pattern", "h.0.*", "--pattern", "h.1.*"]
    assert run("prune", "magnitude", model, *arguments, "-o", tmp_path / "out")[0] == 0
    equal(tmp_path / "out", weightsmith.prune.magnitude(models[0], 0.25, scope="global", pattern=["h.0.*", "h.1.*"]))


@pytest.mark.parametrize(
    ("word", "sparsity"),
    [
        ("2:4", "2:4"),
        ('{"h.0.*": 0.75, "*": "2:4"}', {"h.0.*": 0.75, "*": "2:4"}),
        ("by_depth(0.1, 0.9)", weightsmith.by_depth([0.1, 0.9])),
    ],
)
def test_options_that_differ_by_tensor(run, model, models, tmp_path, word, sparsity):
    assert run("prune", "magnitude", model, "--sparsity", word, "-o", tmp_path / "out")[0] == 0
    equal(tmp_path / "out", weightsmith.prune.magnitude(models[0], sparsity))


def test_statistics_of_one_model(run, model, models, tmp_path):
    gram = torch.diag(torch.arange(1.0, 9.0))
    weightsmith.Weights.of({f"h.{i}.fc.weight": gram for i in range(3)}).save(tmp_path / "gram.safetensors")
    options = ["--bits", "2", "--groups", "2", "--steps", "3", "--pattern", "h.*"]
    for stats in ([], ["--stats", tmp_path / "gram.safetensors"]):  # which the method can do without
        said = run("share", "grouped_codebooks", model, *options, *stats, "-o", tmp_path / "out", "--overwrite")
        assert (said[0], said[2]) == (0, "")
        given = {"stats": tmp_path / "gram.safetensors"} if stats else {}
        made = weightsmith.share.grouped_codebooks(models[0], bits=2, groups=2, steps=3, pattern="h.*", **given)
        equal(tmp_path / "out", made)


def test_quantizing_to_json(run, model, models, tmp_path):
    status, out, _ = run("quantize", "rtn", model, "--bits", "8", "--group", "none", "-o", tmp_path / "out", "--json")
    assert status == 0
    assert json.loads(out)["tensors"] == len(weightsmith.open(tmp_path / "out"))
    equal(tmp_path / "out", weightsmith.quantize.rtn(models[0], bits=8, group=None))


def test_a_wrong_value_is_said_before_anything_is_written(run, model, tmp_path):
    status, _, err = run("prune", "magnitude", model, "--sparsity", "7", "-o", tmp_path / "out")
    assert status == 2
    assert "between 0 and 1, got 7" in err
    assert not (tmp_path / "out").exists()


def test_save_options_work(run, model, tuned, tmp_path):
    arguments = ["--dtype", "float16", "--max-shard-size", "200"]
    assert run("merge", "mean", model, tuned, *arguments, "-o", tmp_path / "out")[0] == 0
    assert weightsmith.open(tmp_path / "out").spec("h.0.fc.weight").dtype == torch.float16
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_methods_that_need_more_than_files_and_words_have_no_command():
    assert "merge.mean" in NAMES
    assert "merge.stack" not in NAMES
    assert not any({"data", "graph"} & set(method.needs) for method in _methods())
    assert not any(name.startswith("average.") for name in NAMES)


SCORE = """
def small(weights):
    return -float(sum(weights[name].double().square().sum() for name in weights))
"""


def test_a_method_that_measures(run, model, tuned, models, tmp_path):
    (tmp_path / "score.py").write_text(SCORE)
    spec = f"{tmp_path / 'score.py'}:small"
    status, _, err = run("merge", "greedy_soup", model, tuned, "--evaluate", spec, "-o", tmp_path / "out")
    assert (status, err) == (0, "")

    def small(weights):
        return -float(sum(weights[name].double().square().sum() for name in weights))

    equal(tmp_path / "out", weightsmith.merge.greedy_soup(list(models), small))
    status, _, err = run("merge", "greedy_soup", model, tuned, "--evaluate", f"{spec}er", "-o", tmp_path / "no")
    assert status == 2
    assert "did you mean 'small'" in err


def test_statistics(run, model, tuned, models, tmp_path):
    told = []
    for number, one in enumerate(models):
        one.map(torch.square).save(tmp_path / f"{number}.safetensors")
        told += ["--stats", tmp_path / f"{number}.safetensors"]
    status, _, err = run("merge", "fisher", model, tuned, *told, "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    stats = [one.map(torch.square) for one in models]
    equal(tmp_path / "out", weightsmith.merge.fisher(list(models), stats=stats))


@pytest.mark.parametrize("method", _methods(), ids=NAMES)
def test_options_are_those_of_the_function(method):
    """The signature read as text is the one that Python sees."""
    import importlib
    import inspect

    function = importlib.import_module(f"weightsmith.{method.room}").METHODS[method.name]
    parameters = list(inspect.signature(function).parameters.values())[1:]
    wanted = [one.name for one in parameters if "Callable" not in str(one.annotation)]
    options = [one for one in _rooms.command(method).params if getattr(one, "section", "") == "Method"]
    assert sorted(one.name for one in options) == sorted(wanted)
    assert all(one.help for one in options), "an option without an explanation in Args:"


@pytest.mark.parametrize(
    ("word", "value"),
    [("0.5", 0.5), ("3", 3), ("1,2", [1, 2]), ("[1]", [1]), ("true", True), ('{"a*": 1}', {"a*": 1}), ("1e-3", 1e-3)],
)
def test_values(word, value):
    made = Value().convert(word, None, None)
    assert made == value
    assert type(made) is type(value)


def test_words_only_where_they_are_meant():
    assert Value(text=True).convert("2:4", None, None) == "2:4"
    assert isinstance(Value().convert("None", None, None), Nothing)
    for word in ("2:4", "{broken", "by_depth(x)"):
        with pytest.raises(click.BadParameter, match="neither a number"):
            Value().convert(word, None, None)
