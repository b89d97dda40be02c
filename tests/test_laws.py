"""Laws: those that a card names, and those of the house that hold for every method without being named.

One generic test for all rooms. A `Room` below says only how the room's methods are called.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import weightsmith as ws
from weightsmith.card import card_of
from weightsmith.merge.room import example_statistics
from weightsmith.quantize import Coded
from weightsmith.quantize._layout import Layout, parts_of
from weightsmith.quantize.grids import Integer
from weightsmith.weights import Weights

PACKAGE = Path(ws.__file__).parent

SHAPES = ((5,), (4, 3), (1, 8), (9, 1), (2, 3, 4), (1,), (6, 16))
DTYPES = (torch.bfloat16, torch.float16, torch.float64)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zoo() -> Iterator[tuple[str, Tensor]]:
    """Four tensors of one shape, ``[4, *shape]``: the first serves as a base, the others as models or moments."""
    for seed, shape in enumerate(SHAPES):
        plain = random(4, *shape, seed=seed)
        yield f"plain {list(shape)}", plain
    values = random(4, 6, 5, seed=100)
    for size in (1e-6, 1e-3, 1e3, 1e6):
        yield f"of size {size:g}", values * size
    yield "near-equal", values[:1] + 1e-5 * values
    yield "a small change of large values", 1e4 * values[:1] + values
    yield "sparse", values * (random(4, 6, 5, seed=101) > 1)
    yield "zeros", torch.zeros(4, 6, 5)
    yield "all the same", values[:1].expand(4, 6, 5).clone()
    yield "opposed", torch.stack([values[0], values[0] + values[1], values[0] - values[1], values[0] - values[1]])
    yield "many ties", (values * 2).round()
    yield "rows of different size", values * torch.tensor([1e-6, 1e-3, 1, 1e3, 1e6, 0]).reshape(6, 1)
    yield "one outlier", values + 1e4 * torch.nn.functional.one_hot(torch.tensor(3), 5)


def edges() -> Iterator[tuple[str, Tensor]]:
    """Shapes at the edge; the laws of mathematics say little of them, those of the house hold."""
    yield "nothing", torch.zeros(4, 0)
    yield "rows of nothing", torch.zeros(4, 3, 0)
    yield "no rows", torch.zeros(4, 0, 3)


SAMPLES = dict(zoo())
EDGES = dict(edges())
OF_ONE_SHAPE = [kind for kind in SAMPLES if not kind.startswith("plain") and kind not in ("many ties", "near-equal")]
SCALAR = {"a single number": random(4, seed=7)}


@dataclass(frozen=True)
class Room:
    """How the methods of a room are called on a sample ``[4, *shape]``."""

    arguments: Callable[[Callable[..., Any], Tensor], tuple[Any, ...]]
    """What a kernel takes."""
    law_arguments: Callable[[Tensor], tuple[Tensor, ...]]
    """What a law takes after the kernel; the sample may lack models that the kernel does not take."""
    lazily: Callable[[Callable[..., Any], Mapping[str, Tensor]], Weights]
    """The public method on whole checkpoints, one sample a tensor."""
    directly: Callable[[Callable[..., Any], str, Tensor], dict[str, Tensor]]
    """What should come of one tensor of them, from the kernel on the whole tensor."""
    scalars: bool = True
    """Whether the methods take a tensor of no axes."""


# merge


MODELS = {"passthrough": 1}
"""Methods of merging that take another number of models than the three of a sample."""


def merge_models(method: Callable[..., Any], sample: Tensor) -> Tensor:
    """A sample without those models that a method does not take: a base, and then the models."""
    return sample[: 1 + MODELS.get(method.__name__, len(sample) - 1)]


def merge_statistics(method: Callable[..., Any], sample: Tensor) -> list[Tensor | None]:
    """What a method needs of data, stacked; made up, since the laws do not depend on it. Empty if it needs none."""
    needs = card_of(method).needs
    count = len(sample) - 1 + ("base" in needs)
    shape = tuple(sample.shape[1:])
    return [example_statistics(need, count, shape) for need in needs if need.startswith("stats.")]


def merge_arguments(kernel: Callable[..., Any], sample: Tensor) -> tuple[Any, ...]:
    base = [sample[0]] if "base" in card_of(kernel).needs else []
    sample = merge_models(kernel, sample)
    return (sample[1:], *base, *merge_statistics(kernel, sample))


def merge_lazily(public: Callable[..., Any], samples: Mapping[str, Tensor]) -> Weights:
    samples = {name: merge_models(public, sample) for name, sample in samples.items()}
    count = len(next(iter(samples.values())))
    base, *models = [{name: sample[i] for name, sample in samples.items()} for i in range(count)]
    found = {name: stats for name, sample in samples.items() for stats in merge_statistics(public, sample)}
    known = {name: stats for name, stats in found.items() if stats is not None}
    count = len(next(iter(known.values()))) if known else 0
    stats = {"stats": [{name: value[i] for name, value in known.items()} for i in range(count)]} if found else {}
    return public(models, base if "base" in card_of(public).needs else None, **stats)


def merge_directly(kernel: Callable[..., Any], name: str, sample: Tensor) -> dict[str, Tensor]:
    keyed = {"key": name} if "key" in inspect.signature(kernel).parameters else {}
    return {name: kernel(*merge_arguments(kernel, sample), **keyed)}


# prune


def prune_statistics(method: Callable[..., Any], shape: tuple[int, ...]) -> list[Tensor]:
    """What a score needs of data, made up; of the inputs of a flattened row, or of the weight's shape."""
    generator = torch.Generator().manual_seed(0)
    needs = [need for need in card_of(method).needs if need.startswith("stats.")]
    inputs = math.prod(shape[1:])
    made = {
        "stats.gram": lambda: (lambda rows: rows.T @ rows)(torch.randn(inputs + 2, inputs, generator=generator)),
        "stats.activations": lambda: 0.1 + torch.rand(inputs, generator=generator),
        "stats.fisher": lambda: 0.1 + torch.rand(shape, generator=generator),
        "stats.gradients": lambda: torch.randn(shape, generator=generator),
    }
    return [made[need]() for need in needs]


def prune_arguments(kernel: Callable[..., Any], sample: Tensor) -> tuple[Any, ...]:
    return (sample[0], *prune_statistics(kernel, tuple(sample.shape[1:])))


def prune_law(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A score that knows what it needs of the data, as laws call it."""
    return lambda weight: kernel(weight, *prune_statistics(kernel, tuple(weight.shape)))


def prune_lazily(public: Callable[..., Any], samples: Mapping[str, Tensor]) -> Weights:
    told = {name: stats for name, sample in samples.items() for stats in prune_statistics(public, sample[0].shape)}
    given = {"stats": told} if told else {}
    return public({name: sample[0] for name, sample in samples.items()}, 0.4, pattern="*", scope="tensor", **given)


def prune_directly(kernel: Callable[..., Any], name: str, sample: Tensor) -> dict[str, Tensor]:
    weight, *stats = prune_arguments(kernel, sample)
    keyed = {"key": name} if "key" in inspect.signature(kernel).parameters else {}
    order = kernel(weight, *stats, **keyed).flatten().argsort(stable=True, descending=True)
    keep = weight.numel() - round(0.4 * weight.numel())
    result = torch.zeros_like(weight).flatten()
    result[order[:keep]] = weight.flatten()[order[:keep]]
    return {name: result.reshape(weight.shape)}


# quantize


def quantize_lazily(public: Callable[..., Any], samples: Mapping[str, Tensor]) -> Weights:
    told = {name: stats for name, sample in samples.items() for stats in prune_statistics(public, sample[0].shape)}
    given = {"stats": told} if told else {}
    return public({name: sample[0] for name, sample in samples.items()}, pattern="*", indivisible="ragged", **given)


def quantize_directly(kernel: Callable[..., Any], name: str, sample: Tensor) -> dict[str, Tensor]:
    weight, *stats = prune_arguments(kernel, sample)
    grid = inspect.signature(kernel).parameters["grid"].default
    if hasattr(grid, "scale_dtype"):
        grid = dataclasses.replace(grid, scale_dtype=sample.dtype)
    layout = Layout(tuple(weight.shape), grid)
    parts = parts_of(kernel(layout.matrix(weight), *stats, grid=grid), layout)
    return {f"{name}{ending}": part for ending, part in parts.items()} | {f"{name}_shape": torch.tensor(weight.shape)}


# average


def average_lazily(public: Callable[..., Any], samples: Mapping[str, Tensor]) -> Weights:
    average = public()
    for moment in range(4):
        average.update({name: sample[moment] for name, sample in samples.items()})
    return average.weights()


def average_directly(kernel: Callable[..., Any], name: str, sample: Tensor) -> dict[str, Tensor]:
    wide = sample.to(torch.promote_types(sample.dtype, torch.float32))
    mean = functools.reduce(lambda kept, i: kernel(kept, wide[i], i), range(1, 4), wide[0])
    return {name: mean.to(sample.dtype)}


def average_arguments(kernel: Callable[..., Any], sample: Tensor) -> tuple[Any, ...]:
    return (sample[0].to(torch.promote_types(sample.dtype, torch.float32)), sample[1], 3)


ROOMS = {
    "merge": Room(merge_arguments, lambda sample: (sample[1:], sample[0]), merge_lazily, merge_directly),
    "prune": Room(prune_arguments, lambda sample: (sample[0],), prune_lazily, prune_directly),
    "quantize": Room(prune_arguments, lambda sample: (sample[0],), quantize_lazily, quantize_directly, False),
    "average": Room(average_arguments, lambda sample: (sample,), average_lazily, average_directly),
    # Its methods work on whole models: nothing below calls them on a sample.
    "adapt": Room(lambda kernel, sample: (), lambda sample: (), prune_lazily, prune_directly),
}

PLAIN = {"inspect", "optim", "share", "start"}
"""Rooms whose functions are lifted from nothing and have no laws in common: they read, or make weights anew."""

METHODS = {
    f"{room}.{name}": method
    for room in ROOMS
    for name, method in importlib.import_module(f"weightsmith.{room}").METHODS.items()
}
LIFTED = {name: method for name, method in METHODS.items() if hasattr(method, "kernel")}
NAMED = [(name, law) for name, method in METHODS.items() for law in card_of(method).laws]

every_method = pytest.mark.parametrize("method", sorted(LIFTED))


def room_of(method: str) -> Room:
    return ROOMS[method.partition(".")[0]]


def laws_of(room: str) -> ModuleType:
    return importlib.import_module(f"weightsmith.{room}.laws")


def law_names(room: str) -> set[str]:
    module = laws_of(room)
    own = inspect.getmembers(module, lambda f: inspect.isfunction(f) and f.__module__ == module.__name__)
    return {name for name, _ in own if not name.startswith("_")}


def results(kernel: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    found = kernel(*arguments)
    if isinstance(found, Coded):
        return (found.codes, *found.params.values(), *found.shared.values(), found.values())
    return found if isinstance(found, tuple) else (found,)


def samples_for(method: str) -> dict[str, Tensor]:
    scalars = room_of(method).scalars and not {"stats.gram", "stats.activations"} & set(card_of(METHODS[method]).needs)
    return SAMPLES | EDGES | (SCALAR if scalars else {})


def close(found: Tensor, expected: Tensor, inputs: Tensor, what: str) -> None:
    """Equal; floats up to a sum's rounding at the size of the inputs."""
    size = float(inputs.abs().max()) if inputs.numel() and expected.is_floating_point() else 0.0
    step = max(torch.finfo(expected.dtype).eps, 1e-6) if expected.is_floating_point() else 0.0
    torch.testing.assert_close(found, expected, rtol=2 * step, atol=step * size, msg=lambda text: f"{what}: {text}")


# The laws that cards name


def test_every_room_with_methods_is_known_here():
    rooms = {file.parent.name for file in PACKAGE.glob("*/__init__.py") if "METHODS = table(" in file.read_text()}
    assert rooms == set(ROOMS) | PLAIN


@pytest.mark.parametrize("room", ROOMS)
def test_every_law_is_named_by_a_card_and_every_named_one_is_a_law(room: str):
    named = {law for method, law in NAMED if method.startswith(f"{room}.")}
    assert named == law_names(room)


def test_what_is_not_lifted_works_on_whole_models():
    assert {card_of(METHODS[name]).unit for name in METHODS.keys() - LIFTED.keys()} == {"model"}


@pytest.mark.parametrize(("method", "law"), NAMED)
def test_a_named_law_holds(method: str, law: str):
    check = getattr(laws_of(method.partition(".")[0]), law)
    kernel = METHODS[method].kernel
    kernel = prune_law(kernel) if method.startswith("prune.") else kernel
    for kind, sample in SAMPLES.items():
        try:
            taken = merge_models(kernel, sample) if method.startswith("merge.") else sample
            check(kernel, *room_of(method).law_arguments(taken))
        except AssertionError as error:
            raise AssertionError(f"{law} does not hold for {method} on weights that are {kind}: {error}") from None


def sloppy_rounding(weight: Tensor, way: Callable[[Tensor], Tensor] = torch.floor) -> Coded:
    scale = weight.flatten(1).abs().amax(1, keepdim=True).clamp(min=1e-30) / 7.5
    return of_integers(way(weight.flatten(1) / scale), scale)


def of_integers(codes: Tensor, scale: Tensor) -> Coded:
    return Coded((codes.clamp(-8, 7) + 8).to(torch.uint8), {"scale": scale}, Integer())


BROKEN: dict[str, Callable[..., Any]] = {
    "merge.model_order": lambda models: models[0],
    "merge.agreement": lambda models: models.sum(0),
    "merge.translation": lambda models: 1.5 * models.mean(0),
    "merge.scale": lambda models: models.mean(0) + 1,
    "merge.rotation": lambda models: models.amax(0),
    "prune.nested": lambda weight: torch.rand_like(weight),
    "prune.scale": lambda weight: (weight.abs() - 3).abs(),
    "prune.sign": lambda weight: weight,
    "prune.element_order": lambda weight: weight.abs() + torch.arange(weight.numel()).reshape(weight.shape),
    "quantize.half_a_step": sloppy_rounding,
    "quantize.scale": lambda weight: of_integers(weight.flatten(1).round(), torch.ones(len(weight), 1)),
    "quantize.row_order": lambda weight: of_integers(
        torch.arange(len(weight)).reshape(-1, 1).expand(weight.shape), torch.ones(len(weight), 1)
    ),
    "quantize.sign": sloppy_rounding,
    "average.constant": lambda mean, weight, count: mean + weight / count,
    "average.linear": lambda mean, weight, count: mean * 0.5 + weight * weight * 0.5,
    "average.plain_mean": lambda mean, weight, count: mean.lerp(weight, 0.5),
}


@pytest.mark.parametrize(("room", "law"), [(room, law) for room in ROOMS for law in sorted(law_names(room))])
def test_a_law_refuses_what_breaks_it(room: str, law: str):
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        getattr(laws_of(room), law)(BROKEN[f"{room}.{law}"], *ROOMS[room].law_arguments(SAMPLES["plain [6, 16]"]))


# The laws of the house


@every_method
def test_inputs_are_untouched_and_calls_are_repeatable(method: str):
    kernel = METHODS[method].kernel
    state = torch.random.get_rng_state()
    for kind, sample in samples_for(method).items():
        arguments = room_of(method).arguments(kernel, sample)
        before = sample.clone()
        first = [result.clone() for result in results(kernel, arguments)]
        again = results(kernel, arguments)
        assert torch.equal(sample, before), f"inputs that are {kind} were written to"
        for one, other in zip(first, again, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other), kind
    assert torch.equal(torch.random.get_rng_state(), state), "a kernel drew from the global generator"


@every_method
def test_results_own_their_memory(method: str):
    kernel = METHODS[method].kernel
    sample = SAMPLES["plain [4, 3]"].clone()
    before = sample.clone()
    for result in results(kernel, room_of(method).arguments(kernel, sample)):
        result.zero_()
    assert torch.equal(sample, before)


def strided(tensor: Tensor) -> Iterator[Tensor]:
    """The same values in memory laid out in other ways."""
    yield tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    yield tensor.repeat_interleave(2, dim=-1)[..., ::2]
    yield torch.nn.functional.pad(tensor, (1, 2))[..., 1:-2]


@every_method
def test_any_strides_give_the_same(method: str):
    kernel = METHODS[method].kernel
    for kind, sample in (SAMPLES | EDGES).items():
        expected = results(kernel, room_of(method).arguments(kernel, sample))
        for other in strided(sample):
            found = results(kernel, room_of(method).arguments(kernel, other))
            for one, two in zip(found, expected, strict=True):
                close(one, two, sample, kind)


@every_method
def test_finite_in_finite_out(method: str):
    kernel = METHODS[method].kernel
    for kind, sample in samples_for(method).items():
        for result in results(kernel, room_of(method).arguments(kernel, sample)):
            assert result.isfinite().all(), kind


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_method
def test_other_dtypes_are_computed_in_float32_or_wider_and_rounded_once(method: str, dtype: torch.dtype):
    kernel = METHODS[method].kernel
    wide = torch.promote_types(dtype, torch.float32)
    for kind, sample in samples_for(method).items():
        narrow = sample.clamp(-3e4, 3e4).to(dtype)
        found = results(kernel, room_of(method).arguments(kernel, narrow))
        expected = results(kernel, room_of(method).arguments(kernel, narrow.to(wide)))
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other.to(one.dtype)), kind


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
@every_method
@pytest.mark.usefixtures("small_pieces")
def test_streamed_equals_direct(method: str, dtype: torch.dtype, tmp_path: Path):
    """In several chunks and units, by name and through a file, with one thread and with three."""
    chosen = [sample for kind, sample in samples_for(method).items() if kind not in OF_ONE_SHAPE]
    samples = {f"{i}.weight": sample for i, sample in enumerate(chosen)}
    samples["strided"] = random(4, 7, 9, seed=50).transpose(1, 2)
    samples = {name: sample.clamp(-3e4, 3e4).to(dtype) for name, sample in samples.items()}
    room, public = room_of(method), METHODS[method]
    expected: dict[str, Tensor] = {}
    for name, sample in samples.items():
        expected |= room.directly(public.kernel, name, sample)
    lazy = room.lazily(public, samples)
    assert {n: (s.shape, s.dtype) for n, s in lazy.specs.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    for threads in (1, 3):
        room.lazily(public, samples).save(tmp_path / f"{threads}.safetensors", threads=threads)
    one, three = (ws.open(tmp_path / f"{threads}.safetensors") for threads in (1, 3))
    assert set(one) == set(three) == set(expected)
    for name, value in expected.items():
        close(lazy[name], value, value, name)
        assert torch.equal(one[name], lazy[name]), f"{name} is not the same when saved"
        assert torch.equal(three[name], one[name]), f"{name} depends on the number of threads"


def test_quantized_values_are_read_back_as_the_codes_say():
    """`quantize_directly` above compares packed codes; this ties them to values."""
    weight = SAMPLES["plain [6, 16]"][0]
    found = ws.quantize.dequantize(ws.quantize.rtn({"l.weight": weight}))["l.weight"]
    assert torch.equal(found, ws.quantize.rtn(weight).values())
