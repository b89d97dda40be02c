"""Merging whole checkpoints: what is read from where, what is refused before anything is read."""

from __future__ import annotations

import inspect
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
        ("weight", None),
        ("normalize", True),
    ]
    assert shown["models"].annotation == "Sequence[Source]"
    assert list(inspect.signature(ws.merge.model_stock).parameters) == ["models", "base"]
    assert ws.merge.mean.__doc__ == ws.merge.mean.kernel.__doc__
    assert (ws.merge.mean.__name__, ws.merge.mean.__module__) == ("mean", "weightsmith.merge")
