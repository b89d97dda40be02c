"""`Weights`: laws of lazy arithmetic, rounding, ties, choosing, and loading into modules."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weightsmith.errors import Error
from weightsmith.weights import MissingTensor, Spec, Weights, by_depth, open, promote, working_dtype
from weightsmith.weights._lazy import Held, Scratch

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


class Unreadable:
    """A node that must not be read."""

    def __init__(self, *shape: int, dtype: torch.dtype = torch.bfloat16):
        self.spec, self.grain = Spec(shape, dtype), 1

    def read(self, start: int, stop: int, scratch: Scratch) -> torch.Tensor:
        raise AssertionError("read before it was asked for")

    def inputs(self) -> Iterable[Any]:
        return ()

    def identity(self) -> object:
        return "unreadable"


def weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"matrix": (3, 5), "vector": (7,), "number": (), "empty": (0, 2)}
    return Weights.of({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()})


# Arithmetic


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv], ids=lambda f: f.__name__)
def test_arithmetic_is_done_wide_and_rounded_once(op: Any, dtype: torch.dtype) -> None:
    a, b = weights(dtype), weights(dtype, 1)
    wide = working_dtype(dtype)
    for name in a:
        x, y = a[name].to(wide), b[name].to(wide)
        for lazy, eager in [
            (op(a, b), op(x, y)), (op(a, 3), op(x, 3)), (op(2.5, a), op(2.5, x)),
            (op(op(a, b), 1 / 3), op(op(x, y), 1 / 3)),  # the middle is not rounded
        ]:  # fmt: skip
            assert lazy.spec(name) == Spec(tuple(x.shape), dtype)
            assert torch.equal(lazy[name], eager.to(dtype))
    assert torch.equal((-a)["matrix"], -a["matrix"])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_what_is_added_and_taken_away(dtype: torch.dtype) -> None:
    a, b = weights(dtype), weights(dtype, 1)
    back = a + b - b
    for name in a:
        torch.testing.assert_close(back[name], a[name], rtol=0, atol=1e-6)
    assert torch.equal((a - a)["matrix"], torch.zeros(3, 5, dtype=dtype))


def test_fp8_arithmetic() -> None:
    for dtype in FP8:
        a = weights(dtype)
        twice = a + a
        assert twice.spec("matrix").dtype == dtype
        assert torch.equal(twice["matrix"].float(), (a["matrix"].float() * 2).to(dtype).float())
    mixed = weights(FP8[0]) + weights(FP8[1])
    assert mixed.spec("matrix").dtype == torch.float32


def test_dtypes_of_mixtures() -> None:
    one = {
        d: Weights.of({"a": torch.ones(2, dtype=d)}) for d in (*FLOATS, *FP8, torch.int64, torch.bool, torch.complex64)
    }
    for left in one:
        for right in one:
            if torch.bool in (left, right):
                continue
            total = one[left] + one[right]
            want = promote(left, right)
            assert total.spec("a").dtype == want == promote(right, left)
            assert total["a"].to(torch.complex64).tolist() == [2, 2]
    assert (one[torch.int64] * 0.5).spec("a").dtype == torch.float32
    assert (one[torch.int64] / one[torch.int64]).spec("a").dtype == torch.float32
    assert (one[torch.int64] * 3).spec("a").dtype == torch.int64
    assert (one[torch.bfloat16] * one[torch.bool]).spec("a").dtype == torch.bfloat16
    with pytest.raises(Error, match="tensor a: booleans cannot be subtracted"):
        one[torch.bool] - one[torch.bool]
    with pytest.raises(Error, match="tensor a: PyTorch has no common dtype for uint16 and int32"):
        Weights.of({"a": torch.ones(1, dtype=torch.uint16)}) + Weights.of({"a": torch.ones(1, dtype=torch.int32)})


def test_nothing_is_read_before_it_is_asked_for() -> None:
    lazy = Weights({"layers.0.w": Unreadable(3, 4), "layers.1.w": Unreadable(5)})
    derived = (lazy * by_depth([0, 1]) - 0.3 * lazy + lazy).cast("fp16").to("cpu").rename(lambda n: n + "x")
    derived = derived.map(torch.relu).map(lambda x: x.sum(-1) if x.ndim > 1 else x, unit="row").select("*").drop("z")
    assert derived.specs == {
        "layers.0.wx": Spec((3,), torch.float32), "layers.1.wx": Spec((5,), torch.float32)
    } or derived.spec("layers.0.wx").shape == (3,)  # fmt: skip
    assert derived.numel == 8
    assert "2 tensors, 8 parameters" in repr(derived)
    assert derived.ties == {}
    with pytest.raises(AssertionError, match="read before"):
        derived["layers.0.wx"]


def test_names_must_agree() -> None:
    a = weights()
    with pytest.raises(Error, match="add needs the same tensors on both sides: the second lacks vector"):
        a + a.drop("vector")
    with pytest.raises(Error, match="the first lacks vector"):
        a.drop("vector") - a
    with pytest.raises(Error, match=r"tensor matrix: shapes \[3, 5\] and \[5, 3\] do not fit"):
        a + Weights.of({**a, "matrix": torch.ones(5, 3)})
    with pytest.raises(TypeError):
        a + "word"  # type: ignore[operator]
    with pytest.raises(TypeError):
        a + None  # type: ignore[operator]


def test_numbers_by_tensor() -> None:
    a = Weights.of({"layers.0.w": torch.ones(1), "layers.1.w": torch.ones(1), "layers.2.b": torch.ones(1)})
    assert [t.item() for t in (a * by_depth([1, 3])).values()] == [1, 2, 3]
    assert [t.item() for t in (a * {"*.b": 5, "re:\\.0\\.": 7, "*": 9}).values()] == [7, 9, 5]
    assert [t.item() for t in (a + (lambda name: len(name))).values()] == [11, 11, 11]
    assert [t.item() for t in ({"*": 3} - a).values()] == [2, 2, 2]
    assert [
        t.item()
        for t in (
            a + {"layers.0.w": torch.ones(1), "layers.1.w": torch.ones(1), "layers.2.b": a["layers.2.b"]}
        ).values()
    ] == [2, 2, 2]
    with pytest.raises(Error, match=r'mul says nothing for the tensor layers.0.w: its patterns are \*.b; add "\*"'):
        a * {"*.b": 5}


def test_sum_works() -> None:
    assert sum([weights()] * 3)["vector"].tolist() == (3 * weights())["vector"].tolist()  # type: ignore[index]


def test_a_long_chain_says_so_and_a_wide_one_is_cheap(tmp_path: Path) -> None:
    chain = weights()
    for _ in range(60):
        chain = chain + 1
    assert torch.allclose(chain["vector"], weights()["vector"] + 60, atol=1e-4)
    for _ in range(1000):
        chain = chain + 1
    with pytest.raises(Error, match="tensor vector: more steps follow one another"):
        chain["vector"]
    with pytest.raises(Error, match="more steps follow one another"):
        chain.save(tmp_path / "chain.safetensors")
    doubled = weights()
    for _ in range(40):  # a tree of 2**40 leaves, if it were written out
        doubled = doubled + doubled
    assert torch.equal(doubled["vector"], weights()["vector"] * 2.0**40)
    doubled.save(tmp_path / "a.safetensors")
    assert torch.equal(open(tmp_path / "a.safetensors")["vector"], doubled["vector"])
    assert str(doubled.lineage).count("add") < 2000
    assert len(repr(doubled.lineage)) < 100


# Rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8], ids=str)
def test_a_cast_is_a_rounding_wherever_it_stands(dtype: torch.dtype) -> None:
    a = weights()
    there_and_back = a.cast(dtype).cast("float32")
    for name in a:
        assert torch.equal(there_and_back[name], a[name].to(dtype).float())
        assert torch.equal((a.cast(dtype) - a)[name], a[name].to(dtype).float() - a[name])
    narrow = a.cast(dtype)
    third = (narrow * (1 / 3)).cast(dtype)  # computed wide, and asked to be narrow: that is a rounding too
    want = (narrow["matrix"].float() * (1 / 3)).to(dtype)
    assert torch.equal((third * 3.0)["matrix"].float(), (want.float() * 3).to(dtype).float())
    assert narrow.cast(dtype).node("matrix") is narrow.node("matrix")


OVERFLOWS = [
    (torch.float32, "float16", 65520.0), (torch.float32, "float16", -7e4), (torch.bfloat16, "fp16", 1e30),
    (torch.float32, "float8_e4m3fn", 465.0), (torch.float32, "float8_e5m2", 61441.0), (torch.float16, "fp8", 500.0),
    (torch.float32, "float8_e4m3fnuz", 250.0), (torch.float32, "float8_e5m2fnuz", -62000.0),
    (torch.float64, "float32", 1e39), (torch.float64, "bfloat16", 1e39), (torch.float32, "float8_e4m3fn", float("inf")),
    (torch.float32, "float8_e8m0fnu", -1.0),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "value"), OVERFLOWS, ids=str)
def test_overflow_is_an_error_that_names_the_tensor(source: torch.dtype, target: str, value: float) -> None:
    wide = Weights.of(
        {"fine": torch.ones(3, dtype=source), "large": torch.tensor([1, value, float("nan")], dtype=source)}
    )
    cast = wide.cast(target)
    assert cast["fine"].float().tolist() == [1, 1, 1]
    with pytest.raises(Error, match=r"^tensor large: the value .* does not fit in"):
        cast["large"]
    with pytest.raises(Error, match=r"^tensor large: "):
        cast.to_dict()


@pytest.mark.parametrize(
    ("target", "value"),
    [("float16", 65519.0), ("float16", float("inf")), ("float16", float("nan")), ("float8_e4m3fn", 463.0),
     ("float8_e4m3fn", -448.0), ("float8_e4m3fn", float("nan")), ("float8_e5m2", float("-inf")), ("bfloat16", 3e38)],
)  # fmt: skip
def test_what_fits_is_not_refused(target: str, value: float) -> None:
    got = Weights.of({"a": torch.tensor([value])}).cast(target)["a"]
    assert torch.equal(got.float(), torch.tensor([value]).to(got.dtype).float()) or value != value
    assert bool(got.float().isnan()) == (value != value)


def test_sums_that_overflow_their_dtype() -> None:
    big = Weights.of({"a": torch.full((3,), 6e4, dtype=torch.float16)})
    assert (0.5 * big + 0.5 * big)["a"].tolist() == big["a"].tolist(), "the middle may be large"
    with pytest.raises(Error, match="tensor a: the value 120000 does not fit in float16"):
        (big + big)["a"]


def test_casting_integers() -> None:
    counts = Weights.of({"n": torch.tensor([3, 300]), "flag": torch.tensor([True]), "f": torch.tensor([1.5, -2.7])})
    cast = counts.cast("bf16")
    assert [s.dtype for s in cast.specs.values()] == [torch.int64, torch.bool, torch.bfloat16]
    assert counts.cast("float64", floating=False)["n"].dtype == torch.float64
    with pytest.raises(Error, match="tensor n: the value 300 does not fit in uint8"):
        counts.cast("uint8", floating=False)["n"]
    with pytest.raises(Error, match=r"tensor f: the value -2.7 does not fit in uint8"):
        counts.cast("uint8")["f"]
    assert counts.cast("int8")["f"].tolist() == [1, -2]
    assert Weights.of({"a": torch.tensor([5], dtype=torch.uint64)}).cast("int8", floating=False)["a"].item() == 5
    with pytest.raises(Error, match="tensor a: complex values cannot become"):
        Weights.of({"a": torch.ones(1, dtype=torch.complex64)}).cast("float32", floating=False)["a"]


# What is in memory


def test_views_of_every_kind(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    complex_ = torch.complex(base, -base)
    views = {
        "turned": base.t(), "sliced": base[1:, ::2], "stretched": base[:1].expand(5, 6), "column": base[:, 3],
        "conj": complex_.conj(), "straight": complex_, "imag": complex_.conj().imag, "negative": torch._neg_view(base),
        "param": nn.Parameter(base[2]), "bool": base > 5, "int": base.to(torch.uint16), "zero": base[:0].t(),
    }  # fmt: skip
    whole = Weights.of(views)
    assert whole.ties == {}
    whole.save(tmp_path / "a.safetensors", threads=1)
    read = open(tmp_path / "a.safetensors")
    for name, view in views.items():
        for other in (whole[name], read[name], whole.map(lambda x: x, spec=whole.spec)[name]):
            assert torch.equal(other.to(torch.complex128), view.detach().to(torch.complex128)), name
            assert other.dtype == view.dtype


def test_ties_through_everything(tmp_path: Path) -> None:
    shared, alone = torch.randn(4, 4), torch.randn(4, 4)
    tied = Weights.of({"a": shared, "b": alone, "c": shared, "d": shared.t(), "e": alone.clone()})
    assert tied.ties == {"c": "a"}
    assert tied.numel == 64
    other = Weights.of(tied.to_dict())
    assert other.ties == {"c": "a"}, "to_dict shares them too"
    for derived in (
        tied * 2, tied + other, tied.cast("bf16"), tied.map(torch.neg), tied.rename({"a": "z"}), tied.select("*"),
        tied.map(lambda x: x.sum(1), unit="row"), tied.to("cpu"), -tied, tied | {"new": alone},
    ):  # fmt: skip
        alias, name = next(iter(derived.ties.items()))
        assert (alias, name) == ("c", "z" if "z" in derived else "a")
        assert derived.node(alias) is derived.node(name)
        derived.save(tmp_path / "a.safetensors", overwrite=True)
        assert open(tmp_path / "a.safetensors").ties[alias] == name
    assert (tied * {"a": 2, "*": 1}).ties == {"c": "a"}, "one tensor has one factor: that of its first name"
    apart = tied + Weights.of({**tied, "c": shared.clone()})
    assert apart.ties == {}, "tied in one only: two different sums"
    assert (tied | {"a": alone}).ties == {"b": "a"} or "c" not in (tied | {"a": alone}).ties


# Choosing


def test_choosing() -> None:
    a = weights()
    assert list(a.select("*tor")) == ["vector"]
    assert list(a.select(["matrix", "re:^num"])) == ["matrix", "number"]
    assert list(a.drop(lambda name: "m" in name)) == ["vector"]
    assert list(a.rename({"vector": "v"})) == ["matrix", "v", "number", "empty"]
    assert list(a | {"vector": torch.zeros(2), "new": torch.ones(1)}) == ["matrix", "vector", "number", "empty", "new"]
    assert (a | {"vector": torch.zeros(2)})["vector"].tolist() == [0, 0]
    assert a.names(floating=False) == []
    with pytest.raises(Error, match=r"no tensor fits '\*zz'; there are matrix, vector, number, empty"):
        a.select("*zz")
    with pytest.raises(Error, match=r"cannot rename vectr: no such tensor \(did you mean 'vector'"):
        a.rename({"vectr": "v"})
    with pytest.raises(Error, match="two tensors the name matrix"):
        a.rename({"vector": "matrix"})
    with pytest.raises(Error, match="two tensors the name x"):
        a.rename(lambda name: "x")
    with pytest.raises(Error, match="is no regular expression"):
        a.select("re:(")
    with pytest.raises(MissingTensor, match=r"^no tensor 'vectr' \(did you mean 'vector'\?\)$"):
        a["vectr"]
    with pytest.raises(KeyError):
        a["zzz"]
    assert a.get("zzz") is None
    assert "vector" in a
    assert a == a
    assert a != weights()
    assert len({a, weights()}) == 2


def test_map_changes_shapes() -> None:
    a = Weights.of({"w": torch.arange(12.0).reshape(4, 3), "number": torch.tensor(2.0)})
    norms = a.map(lambda x: x.norm(dim=-1), unit="row").select("w")
    assert norms.spec("w").shape == (4,)
    assert torch.equal(norms["w"], a["w"].norm(dim=1))
    turned = a.map(lambda x: x.mT if x.ndim == 2 else x, unit="tensor")
    assert turned.spec("w").shape == (3, 4)
    assert torch.equal(turned["w"], a["w"].T)
    assert torch.equal((turned + 1.0)["w"], a["w"].T + 1)
    gram = a.select("w").map(lambda x: x.T @ x, unit="tensor")
    product = a.select("w").map(lambda x, g: x @ g, unit="row", whole=[gram])
    torch.testing.assert_close(product["w"], a["w"] @ a["w"].T @ a["w"])
    pairs = a.map(lambda x, y, scale: x - scale * y, a, options={"scale": {"w": 1.0, "*": 0.5}})
    assert (pairs["w"].sum().item(), pairs["number"].item()) == (0, 1)
    mask = a.map(lambda x: x > 1)
    assert mask.spec("w").dtype == torch.bool


@pytest.mark.parametrize(
    ("function", "unit", "message"),
    [
        (lambda x: x.sum(), "element", 'tensor w: the function makes 1 values .*unit="row" or unit="tensor"'),
        (lambda x: x.T, "row", "tensor w: .*must keep the first axis"),
        (lambda x: x.sum(), "row", "tensor w: .*must keep the first axis"),
        (lambda x: x.flatten(), "row", "tensor w: .*must keep the first axis"),
        (lambda x: x @ torch.ones(7, 7), "row", "tensor w: <lambda> cannot be tried without data .*spec="),
        (lambda x: x.item(), "tensor", "tensor w: <lambda> cannot be tried without data"),
    ],
)
def test_functions_that_do_not_fit(function: Any, unit: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        Weights.of({"w": torch.ones(4, 3)}).map(function, unit=unit)


def test_a_promise_that_is_not_kept() -> None:
    a = Weights.of({"w": torch.ones(4, 3)})
    with pytest.raises(Error, match=r"tensor w: .*returned 12 values where 4 were announced"):
        a.map(lambda x: x, unit="row", spec=Spec((4,), torch.float32))["w"]
    with pytest.raises(Error, match="cannot be made row by row"):
        a.map(lambda x: x.sum(), unit="row", spec=Spec((), torch.float32))


# Into modules


class Two(nn.Module):
    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.inside = nn.Embedding(5, 3, device=device)
        self.outside = nn.Linear(3, 5, bias=False, device=device)
        self.outside.weight = self.inside.weight
        self.norm = nn.BatchNorm1d(3, device=device)


def test_load_into(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, other = Two(), Two()
    weights = open(model)
    weights.save(tmp_path / "m.safetensors")
    assert open(tmp_path / "m.safetensors").load_into(other) == ([], [])
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert other.outside.weight is other.inside.weight
    half = Two().half()
    weights.load_into(half)
    assert half.inside.weight.dtype == torch.float16
    assert torch.equal(half.inside.weight, model.inside.weight.half())
    (weights * 2.0).select(floating=True).load_into(model, strict=False)
    assert torch.equal(model.inside.weight, 2 * other.inside.weight)


def test_buffers_that_a_module_makes_by_itself_are_left_to_it() -> None:
    module = torch.nn.Linear(2, 2)
    module.register_buffer("places", torch.arange(2), persistent=False)
    weights = Weights.of({**module.state_dict(), "places": torch.tensor([7, 8])})
    assert weights.load_into(module) == ([], [])
    assert module.places.tolist() == [0, 1]
    with pytest.raises(Error, match=r"it has no place \(did you mean 'bias'|it has no place;"):
        weights.rename({"places": "place"}).load_into(module)


def test_load_into_lacks_and_extras() -> None:
    weights = open(Two())
    assert weights.drop("outside.weight").load_into(Two()) == ([], []), "the alias has its values from the other name"
    with pytest.raises(Error, match=r"it needs norm.bias; it has no extra; or pass strict=False"):
        (weights.drop("norm.bias") | {"extra": torch.ones(1)}).load_into(Two())
    with pytest.raises(Error, match=r"did you mean 'norm.bais'"):
        weights.rename({"norm.bias": "norm.bais"}).load_into(Two())
    loaded = (weights.drop("norm.bias") | {"extra": torch.ones(1)}).load_into(Two(), strict=False)
    assert loaded.missing_keys == ["norm.bias"]
    assert loaded.unexpected_keys == ["extra"]


def test_shapes_are_checked_before_anything_is_copied() -> None:
    model = Two()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wrong = Weights(
        {name: Unreadable(*t.shape, dtype=t.dtype) for name, t in before.items()} | {"norm.bias": Unreadable(4)}
    )
    with pytest.raises(Error, match=r"shapes do not fit the module: norm.bias \[4\] into \[3\]"):
        wrong.load_into(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("drop", ["nothing", "outside.weight", "inside.weight"])
def test_meta_modules(drop: str, tmp_path: Path) -> None:
    source = Two().to(torch.bfloat16)
    open(source).save(tmp_path / "m.safetensors")
    model = Two("meta")
    open(tmp_path / "m.safetensors").drop(drop).load_into(model)
    for name, tensor in model.state_dict().items():
        assert not tensor.is_meta
        assert torch.equal(tensor, source.state_dict()[name])
    assert model.outside.weight is model.inside.weight, "still one parameter"
    assert model.inside.weight.dtype == torch.bfloat16
    assert model.inside.weight.requires_grad
    assert len(list(model.parameters())) == 3
    with torch.no_grad():
        model.inside.weight.add_(1)
    assert torch.equal(open(tmp_path / "m.safetensors")["inside.weight"], source.inside.weight), "the file is untouched"


def test_values_that_trade_places() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = (layer.weight.detach().clone() for layer in model)
    weights = open(model)
    weights.rename({"0.weight": "1.weight", "1.weight": "0.weight"}).load_into(model)
    assert torch.equal(model[0].weight, second)
    assert torch.equal(model[1].weight, first)


def test_to_dict_is_a_state_dict() -> None:
    weights = open(Two())
    state = (weights * 1.0).to_dict()
    assert state["inside.weight"] is state["outside.weight"]
    Two().load_state_dict(state)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_repr_and_sizes() -> None:
    w = Weights.of({"a": torch.zeros(1000, 2), "b": torch.zeros(3, dtype=torch.int8)})
    assert repr(w) == "<Weights: 2 tensors, 2,003 parameters, 8,003 bytes, float32, int8>"
    assert isinstance(w.node("a"), Held)
    assert {**w}.keys() == {"a", "b"}
