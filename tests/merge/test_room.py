"""Merging whole checkpoints: what is read from where, what is refused before anything is read."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge.room import opened_models
from weightsmith.weights import Spec, Weights


class Unread:
    """A node with a spec and no values."""

    grain = 1

    def __init__(self, *shape: int, dtype: torch.dtype = torch.float32):
        self.spec = Spec(shape, dtype)

    def read(self, start: int, stop: int, scratch: object) -> torch.Tensor:
        raise AssertionError("was read")

    def inputs(self) -> tuple[()]:
        return ()

    def identity(self) -> object:
        return "unread"


def unread(**shapes: tuple[int, ...]) -> Weights:
    return Weights({name: Unread(*shape) for name, shape in shapes.items()})


def model(value: float, count: int = 0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), value), "b.bias": torch.full((3,), 10 * value), "n": torch.tensor(count)}


def test_anything_that_can_be_opened_is_a_model(tmp_path: Path):
    Weights.of(model(1.0)).save(tmp_path / "file.safetensors")
    Weights.of(model(2.0)).save(tmp_path / "folder")
    module = nn.Module()
    module.a, module.b = nn.Module(), nn.Module()
    module.a.weight = nn.Parameter(torch.full((2, 3), 6.0))
    module.b.bias = nn.Parameter(torch.full((3,), 60.0))
    module.register_buffer("n", torch.tensor(5))
    found = ws.merge.mean([str(tmp_path / "file.safetensors"), tmp_path / "folder", module, model(7.0)])
    assert torch.equal(found["a.weight"], torch.full((2, 3), 4.0))
    assert torch.equal(found["b.bias"], torch.full((3,), 40.0))
    assert torch.equal(module.a.weight, torch.full((2, 3), 6.0))


def test_nothing_is_read_before_it_is_asked_for():
    models = [unread(a=(2, 3), b=(4,)), unread(a=(2, 3), b=(4,))]
    merged = ws.merge.model_stock(models, unread(a=(2, 3), b=(4,)))
    assert merged.spec("a").shape == (2, 3)
    with pytest.raises(AssertionError, match="was read"):
        merged["a"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weigth": [1, 2]}, r"mean has no option 'weigth' \(did you mean 'weight'\?\); it has weight, normalize"),
        ({"weight": [1, 2, 3]}, "one number for each of the 2 models, got 3"),
        ({"weight": [1, -1]}, "sum to zero"),
        ({"weight": {"a": [1, 1], "b": [1, -1]}}, "sum to zero"),
        ({"weight": {"a": 1}}, "weight says nothing for the tensor b"),
        ({"weight": [ws.by_depth([1, 2])]}, "one number for each of the 2 models, got 1"),
    ],
)
def test_a_bad_option_is_found_before_anything_is_read(options: dict, message: str):
    with pytest.raises(Error, match=message):
        ws.merge.mean([unread(a=(2,), b=(2,)), unread(a=(2,), b=(2,))], **options)


def test_a_base_is_needed_where_the_card_says_so():
    models = [unread(a=(2,)), unread(a=(2,))]
    with pytest.raises(Error, match="model_stock needs base=, the weights that the models were fine-tuned from"):
        ws.merge.model_stock(models)


def test_unlike_models_are_refused_by_name():
    first = unread(a=(2,), b=(3,))
    with pytest.raises(Error, match=r"mean: model 1 and model 2 differ in shape: b \[3\] against \[4\]"):
        ws.merge.mean([first, unread(a=(2,), b=(4,))])
    with pytest.raises(Error, match=r"mean: model 1 and model 3 must have the same tensors: the second lacks b"):
        ws.merge.mean([first, first, unread(a=(2,))])
    with pytest.raises(Error, match=r"model_stock: model 1 and the base differ in shape: a \[2\] against \[1, 2\]"):
        ws.merge.model_stock([first, first], unread(a=(1, 2), b=(3,)))


def test_a_single_model_is_not_a_list():
    for one in ("path", Path("path"), model(1.0), nn.Linear(1, 1)):
        with pytest.raises(Error, match="takes a list of models, got one"):
            opened_models(one, "mean")  # type: ignore[arg-type]
    with pytest.raises(Error, match="mean needs at least 1 model, got 0"):
        ws.merge.mean([])


def test_what_holds_no_floats_comes_from_the_base_or_else_the_first_model():
    first, second, base = model(1.0, count=1), model(3.0, count=2), model(0.0, count=9)
    first |= {"mask": torch.tensor([True, False])}
    second |= {"mask": torch.tensor([False, False])}
    base |= {"mask": torch.tensor([True, True])}
    assert ws.merge.mean([first, second])["n"] == 1
    assert ws.merge.mean([first, second])["mask"].tolist() == [True, False]
    assert ws.merge.mean([first, second], base)["n"] == 9
    assert ws.merge.model_stock([first, second], base)["mask"].tolist() == [True, True]


def test_checkpoints_without_floats_pass_through():
    assert ws.merge.mean([{"n": torch.tensor(3)}, {"n": torch.tensor(4)}])["n"] == 3


def test_a_base_does_not_change_a_method_without_one():
    assert torch.equal(ws.merge.mean([model(1.0), model(3.0)], model(9.0))["a.weight"], torch.full((2, 3), 2.0))


def test_tied_tensors_stay_tied_and_are_merged_once():
    shared, other = torch.ones(2, 2), torch.full((2, 2), 3.0)
    merged = ws.merge.mean([{"embed": shared, "head": shared}, {"embed": other, "head": other}])
    assert merged.ties == {"head": "embed"}
    assert torch.equal(merged["head"], torch.full((2, 2), 2.0))


def test_names_tied_in_one_model_only_come_apart():
    shared = torch.ones(2)
    merged = ws.merge.mean([{"a": shared, "b": shared}, {"a": torch.zeros(2), "b": torch.full((2,), 5.0)}])
    assert merged.ties == {}
    assert merged["a"].tolist() == [0.5, 0.5]
    assert merged["b"].tolist() == [3, 3]


def test_options_by_tensor():
    names = ("embed.weight", "layers.0.w", "layers.1.w", "layers.2.w", "head.weight")
    zeros, ones = ({name: torch.full((1,), value) for name in names} for value in (0.0, 1.0))

    def taken(weight: object) -> list[float]:
        merged = ws.merge.mean([zeros, ones], weight=weight)
        return [merged[name].item() for name in names]

    assert taken([1, {"layers.1.*": 3, "*": 1}]) == [0.5, 0.5, 0.75, 0.5, 0.5]
    assert taken({"layers.*": [0, 1], "*": [1, 0]}) == [0, 1, 1, 1, 0]
    assert taken(lambda name: [1, 0] if "head" in name else [0, 1]) == [1, 1, 1, 1, 0]
    depths = [0, 0, 0.5, 1, 1]
    assert taken([1, ws.by_depth([0, 1])]) == pytest.approx([depth / (1 + depth) for depth in depths])


def test_mixed_dtypes_give_their_common_one():
    one, two = {"w": torch.ones(2, dtype=torch.bfloat16)}, {"w": torch.full((2,), 2.0)}
    assert ws.merge.mean([one, one]).spec("w").dtype == torch.bfloat16
    assert ws.merge.mean([one, two]).spec("w").dtype == torch.float32
    half = {"w": torch.full((2,), 3.0, dtype=torch.float16)}
    assert ws.merge.mean([one, half]).spec("w").dtype == torch.float32
    assert ws.merge.mean([one, two])["w"].tolist() == [1.5, 1.5]


def test_called_with_tensors_it_is_the_kernel():
    models, base = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.zeros(2)
    assert torch.equal(ws.merge.mean(models, weight=[3, 1]), ws.merge.mean.kernel(models, weight=[3, 1]))
    assert torch.equal(ws.merge.model_stock(models, base), ws.merge.model_stock.kernel(models, base))


def test_the_lineage_names_method_options_and_inputs():
    merged = ws.merge.mean([model(1.0), model(2.0)], weight=[1, 3])
    record = merged.lineage.record()
    assert record["method"] == "merge.mean"
    assert record["options"] == {"weight": [1, 3]}
    assert [step["method"] for step in record["inputs"]] == ["memory", "memory"]
    assert len(ws.merge.model_stock([model(1.0), model(2.0)], model(0.0)).lineage.inputs) == 3


def test_the_files_of_the_first_model_travel():
    first = Weights.of(model(1.0)).with_files({"config.json": b"{}"})
    assert ws.merge.mean([first, model(2.0)]).files == {"config.json": b"{}"}


def test_what_a_user_sees():
    shown = inspect.signature(ws.merge.mean).parameters
    assert [(p.name, p.default) for p in shown.values()] == [
        ("models", inspect.Parameter.empty),
        ("base", None),
        ("rest", "error"),
        ("nonfinite", "refuse"),
        ("weight", None),
        ("normalize", True),
    ]
    assert shown["models"].annotation == "Sequence[Source]"
    assert list(inspect.signature(ws.merge.ram).parameters) == ["models", "base", "rest", "nonfinite", "epsilon"]
    assert ws.merge.mean.__doc__ == ws.merge.mean.kernel.__doc__
    assert (ws.merge.mean.__name__, ws.merge.mean.__module__) == ("mean", "weightsmith.merge")


# A base that a method can do without


def test_an_optional_base_is_handed_on_where_it_is_given():
    models, base = [model(1.0), model(3.0)], model(-2.0)
    stacked = torch.stack([one["a.weight"] for one in models])
    for method in (ws.merge.nuslerp, ws.merge.multislerp):
        assert torch.equal(method(models)["a.weight"], method.kernel(stacked))
        assert torch.equal(method(models, base)["a.weight"], method.kernel(stacked, base["a.weight"]))
        assert torch.equal(method(stacked, base["a.weight"]), method.kernel(stacked, base["a.weight"]))
        assert len(method(models, base).lineage.inputs) == 3


# What not all have


def partly() -> tuple[list[Weights], Weights]:
    """Two models and a base: ``w`` in all, ``vocab`` in other shapes, ``extra`` in some."""
    first = Weights.of({"w": torch.zeros(2), "vocab": torch.full((3,), 1.0), "extra": torch.full((1,), 1.0)})
    second = Weights.of({"own": torch.full((1,), 2.0), "vocab": torch.full((4,), 2.0), "w": torch.full((2,), 2.0)})
    base = Weights.of({"w": torch.full((2,), 9.0), "vocab": torch.full((3,), 9.0), "own": torch.full((1,), 9.0)})
    return [first, second], base


@pytest.mark.parametrize("with_base", [True, False])
def test_the_rest_is_an_error_that_lists_it(with_base: bool):
    models, base = partly()
    with pytest.raises(Error, match=r"lacks extra; the first lacks own.*rest='base', 'first' or 'drop'"):
        ws.merge.mean(models, base if with_base else None)


def test_the_rest_from_the_base():
    models, base = partly()
    found = ws.merge.mean(models, base, rest="base")
    assert {name: value.tolist() for name, value in found.items()} == {"w": [1, 1], "vocab": [9, 9, 9], "own": [9]}
    with pytest.raises(Error, match="rest='base' takes what does not match from the base; give base="):
        ws.merge.mean(models, rest="base")


def test_the_rest_from_the_first_that_has_it():
    models, base = partly()
    expected = {"w": [1, 1], "vocab": [1, 1, 1], "extra": [1], "own": [2]}
    assert {name: value.tolist() for name, value in ws.merge.mean(models, rest="first").items()} == expected
    assert {name: value.tolist() for name, value in ws.merge.mean(models, base, rest="first").items()} == expected
    assert list(ws.merge.mean(models, rest="first")) == ["w", "vocab", "extra", "own"]


def test_the_rest_left_out():
    models, base = partly()
    assert list(ws.merge.mean(models, rest="drop")) == ["w"]
    assert list(ws.merge.ties(models, base, rest="drop")) == ["w"]


def test_a_tensor_that_the_base_lacks_is_merged_where_the_method_reads_no_base():
    models = [Weights.of({"w": torch.zeros(1), "head": torch.full((1,), value)}) for value in (1.0, 3.0)]
    base = Weights.of({"w": torch.zeros(1)})
    assert ws.merge.mean(models, base, rest="first")["head"].tolist() == [2]
    assert ws.merge.task_arithmetic(models, base, rest="first")["head"].tolist() == [1]
    assert list(ws.merge.task_arithmetic(models, base, rest="base")) == ["w"]


def test_the_rest_said_wrongly_or_nothing_in_common():
    with pytest.raises(Error, match="mean: rest must be 'error', 'base', 'first' or 'drop', got 'keep'"):
        ws.merge.mean([model(1.0)], rest="keep")
    with pytest.raises(Error, match="there is no tensor that all models have in one shape; model 1 has a"):
        ws.merge.mean([{"a": torch.ones(1)}, {"b": torch.ones(1)}], rest="first")


def test_options_speak_of_what_is_merged_only():
    models, _ = partly()
    assert list(ws.merge.mean(models, rest="first", weight={"w": [1, 3]})) == ["w", "vocab", "extra", "own"]


def test_the_lineage_says_what_became_of_the_rest():
    models, _ = partly()
    assert ws.merge.mean(models, rest="drop").lineage.record()["options"] == {"rest": "drop"}


# What is not finite


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name_and_place(value: float, tmp_path: Path):
    good, bad = {"a": torch.zeros(50), "b": torch.zeros(3)}, {"a": torch.zeros(50), "b": torch.zeros(3)}
    bad["a"][41] = value
    with pytest.raises(Error, match=r"tensor a: the merge gives -?(nan|inf) at element 41, because model 2 holds"):
        ws.merge.mean([good, bad])["a"]
    with pytest.raises(Error, match="because the base holds no number there"):
        ws.merge.task_arithmetic([good, good], bad)["a"]
    with pytest.raises(Error, match="tensor a: the merge gives"):
        ws.merge.mean([good, bad]).save(tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert ws.merge.mean([good, bad])["b"].tolist() == [0, 0, 0]
    allowed = ws.merge.mean([good, bad], nonfinite="allow")["a"]
    assert (~allowed.isfinite()).nonzero().tolist() == [[41]]


def test_what_a_merge_itself_makes_infinite():
    large = {"w": torch.full((2,), 3e38)}
    with pytest.raises(Error, match="where all inputs are finite: it comes from the merge itself"):
        ws.merge.mean([large, large], normalize=False)["w"]


def test_a_sum_that_overflows_is_no_reason_to_refuse():
    large = {"w": torch.full((64,), 3e38)}
    assert torch.equal(ws.merge.mean([large])["w"], large["w"])


def test_nonfinite_said_wrongly():
    with pytest.raises(Error, match="nonfinite must be 'refuse' or 'allow', got 'warn'"):
        ws.merge.mean([model(1.0)], nonfinite="warn")


def test_checked_merges_can_be_resumed():
    """A function of no module would have another identity in every process."""
    held = Weights({"w": Unread(4)})
    for method in (ws.merge.mean, ws.merge.ties, ws.merge.dare_ties):
        base = held if "base" in method.card.needs else None  # type: ignore[attr-defined]
        assert method([held], base).node("w").identity() == method([held], base).node("w").identity()


# Tied names


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def language_model(value: float, tied: bool, says: bool | None, stored: bool = False) -> Weights:
    """An embedding and a head. A tied head is the same tensor, or with ``stored`` not there at all."""
    embedding = torch.full((2, 2), value)
    tensors = {EMBEDDING: embedding, "norm": torch.full((2,), value)}
    if not stored:
        tensors[HEAD] = embedding if tied else torch.full((2, 2), 10 * value)
    config = {} if says is None else {"tie_word_embeddings": says}
    return Weights.of(tensors).with_files({"config.json": json.dumps(config).encode()})


def says_tied(weights: Weights) -> bool | None:
    config = weights.files["config.json"]
    assert isinstance(config, bytes)
    return json.loads(config).get("tie_word_embeddings")


def test_tied_names_with_different_options_come_apart():
    models = [language_model(value, tied=True, says=True) for value in (0.0, 1.0)]
    merged = ws.merge.mean(models, weight={HEAD: [1, 3], "*": [1, 1]})
    assert merged.ties == {}
    assert merged[EMBEDDING].unique().tolist() == [0.5]
    assert merged[HEAD].unique().tolist() == [0.75]
    assert says_tied(merged) is False
    alike = ws.merge.mean(models, weight={HEAD: [1, 3], "*": [1, 3]})
    assert alike.ties == {HEAD: EMBEDDING}
    assert says_tied(alike) is True


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("says", [True, None])
def test_tied_and_untied(says: bool | None, stored: bool):
    tied = language_model(1.0, tied=True, says=says, stored=stored)
    untied = language_model(3.0, tied=False, says=False)
    for models in ([tied, untied], [untied, tied]):
        merged = ws.merge.mean(models)
        assert merged[EMBEDDING].unique().tolist() == [2]
        assert merged[HEAD].unique().tolist() == [(1 + 30) / 2]
        assert merged.ties == {}
        assert says_tied(merged) is False
        moved = ws.merge.task_arithmetic(models, tied, amount=0.5)
        assert moved[EMBEDDING].unique().tolist() == [1 + 0.5 * 2]
        assert moved[HEAD].unique().tolist() == [1 + 0.5 * 29]
        assert says_tied(moved) is False


def test_tied_and_tied_with_an_untied_base():
    models = [language_model(value, tied=True, says=True, stored=True) for value in (1.0, 3.0)]
    base = language_model(0.0, tied=False, says=False)
    merged = ws.merge.task_arithmetic(models, base)
    assert merged[HEAD].unique().tolist() == merged[EMBEDDING].unique().tolist() == [4]
    assert says_tied(merged) is False


@pytest.mark.parametrize("stored", [True, False])
def test_tied_and_tied_stay_tied(stored: bool):
    models = [language_model(value, tied=True, says=True, stored=stored) for value in (1.0, 3.0)]
    merged = ws.merge.mean(models)
    assert merged.ties == ({} if stored else {HEAD: EMBEDDING})
    assert (HEAD in merged) is not stored
    assert says_tied(merged) is True
    assert merged.files == models[0].files


def test_untied_and_untied_stay_untied():
    models = [language_model(value, tied=False, says=False) for value in (1.0, 3.0)]
    assert says_tied(ws.merge.mean(models)) is False
    assert ws.merge.mean(models).files == models[0].files


def test_a_configuration_that_says_untied_of_what_is_tied_is_mended():
    models = [language_model(value, tied=True, says=False) for value in (1.0, 3.0)]
    assert says_tied(ws.merge.mean(models)) is True


def test_a_head_that_is_missing_without_being_tied_is_missing():
    untied, headless = language_model(1.0, tied=False, says=False), language_model(1.0, False, False, stored=True)
    with pytest.raises(Error, match=r"the second lacks lm_head\.weight"):
        ws.merge.mean([untied, headless])


def test_a_configuration_that_cannot_be_read_is_left_alone():
    broken = language_model(1.0, tied=True, says=True).with_files({"config.json": b"{"})
    merged = ws.merge.mean([broken, broken], weight={HEAD: [1, 3], "*": [1, 1]})
    assert merged.files == {"config.json": b"{"}
