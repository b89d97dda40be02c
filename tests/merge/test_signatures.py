"""Signatures: at right angles to the clean update, put on and taken off, and stored small."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.merge import patch, signature
from weightsmith.weights import Weights


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def family(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], ...]:
    """A robust run, a clean one, and their base: layers, batch norm and a counter."""
    shapes = {"0.weight": (8, 3, 3, 3), "0.bias": (8,), "1.weight": (8,), "1.running_mean": (8,), "1.running_var": (8,)}
    shapes |= {"3.weight": (6, 32), "5.weight": (4, 6)}
    base = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    clean = {name: base[name] + 0.1 * normal(*shape, seed=10 + i) for i, (name, shape) in enumerate(shapes.items())}
    robust = {
        name: base[name] + 0.7 * (clean[name] - base[name]) + 0.1 * normal(*shape, seed=20 + i)
        for i, (name, shape) in enumerate(shapes.items())
    }
    made = []
    for number, model in enumerate((robust, clean, base)):
        made.append({name: value.to(dtype) for name, value in model.items()})
        made[-1]["1.num_batches_tracked"] = torch.tensor(number)
    return tuple(made)


def by_hand(robust: Tensor, clean: Tensor, base: Tensor) -> Tensor:
    d = [float(a) - float(b) for a, b in zip(robust.flatten(), base.flatten(), strict=True)]
    c = [float(a) - float(b) for a, b in zip(clean.flatten(), base.flatten(), strict=True)]
    product = sum(x * y for x, y in zip(d, c, strict=True))
    length = sum(y * y for y in c)
    slope = product / length if length else 0.0
    return torch.tensor([x - slope * y for x, y in zip(d, c, strict=True)]).reshape(base.shape)


WEIGHTS = ["0.weight", "0.bias", "1.weight", "3.weight", "5.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_formula(dtype: torch.dtype):
    robust, clean, base = family(dtype)
    found = signature(robust, clean, base)
    assert list(found) == WEIGHTS
    for name in found:
        assert found.spec(name).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        expected = by_hand(robust[name], clean[name], base[name]).to(found.spec(name).dtype)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("small_pieces")
def test_it_is_at_right_angles_to_the_clean_update_of_the_whole_tensor(tmp_path: Path):
    """Also where a tensor comes in pieces, each of which alone has another slope."""
    robust, clean, base = family()
    signature(robust, clean, base).save(tmp_path / "s.safetensors", threads=3)
    found = ws.open(tmp_path / "s.safetensors")
    whole = signature(robust, clean, base)
    for name in found:
        update = (clean[name] - base[name]).flatten().double()
        angle = found[name].flatten().double() @ update / (found[name].double().norm() * update.norm())
        assert abs(float(angle)) < 1e-6
        assert torch.equal(found[name], whole[name])


def test_the_parts_add_up_to_the_robust_update():
    """What is left out is along the clean update, and nothing else."""
    robust, clean, base = family()
    found = signature(robust, clean, base)
    for name in found:
        rest = robust[name] - base[name] - found[name]
        update = clean[name] - base[name]
        slope = float((rest * update).sum() / update.square().sum())
        torch.testing.assert_close(rest, slope * update, rtol=1e-3, atol=1e-5)


def test_a_clean_run_that_did_not_move_takes_nothing_away():
    robust, _, base = family()
    found = signature(robust, base, base)
    for name in found:
        assert torch.equal(found[name], robust[name] - base[name])


def test_a_robust_run_along_the_clean_one_has_no_signature():
    _, clean, base = family()
    robust = {name: base[name] + 2 * (clean[name] - base[name]) for name in base}
    found = signature(robust, clean, base)
    for name in found:
        torch.testing.assert_close(found[name], torch.zeros_like(found[name]), rtol=0, atol=1e-6)


def test_the_first_layers_alone():
    robust, clean, base = family()
    assert list(signature(robust, clean, base, depth=0.0)) == ["0.weight", "0.bias"]
    assert list(signature(robust, clean, base, depth=0.5)) == ["0.weight", "0.bias", "1.weight"]
    assert list(signature(robust, clean, base, pattern="*.bias")) == ["0.bias"]
    assert list(signature(robust, clean, base, pattern=["0.*", "5.*"], depth=0.9)) == ["0.weight", "0.bias"]


def test_depth_does_not_hang_on_the_order_of_names():
    """Ten layers in the order in which a file may have them."""
    names = sorted(f"layers.{i}.weight" for i in range(11))
    models: Any = [{name: normal(4, seed=i) for name in names} for i in range(3)]
    assert set(signature(*models, depth=0.2)) == {f"layers.{i}.weight" for i in range(3)}


def test_put_on_and_taken_off():
    robust, clean, base = family()
    found = signature(robust, clean, base)
    on = patch(clean, [found])
    for name in clean:
        expected = clean[name] + found[name] if name in found else clean[name]
        assert torch.equal(on[name], expected), name
        assert on.spec(name).dtype == clean[name].dtype
    off = patch(on, [found], amount=-1)
    stored = patch(Weights.of(on.to_dict()), [found], amount=-1)
    for name in WEIGHTS:
        torch.testing.assert_close(off[name], clean[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(stored[name], clean[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 0.5, -2.0])
def test_the_amount_scales(scale: float):
    robust, clean, base = family()
    found = signature(robust, clean, base)
    on = patch(clean, [found], amount=scale)
    for name in WEIGHTS:
        torch.testing.assert_close(on[name], clean[name] + scale * found[name])


def test_amounts_by_signature_and_by_tensor():
    model = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    one, two = {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, {"b.weight": torch.full((2,), 10.0)}
    found = patch(model, [one, two], amount=[1.0, -0.5])
    assert found["a.weight"].tolist() == [1, 1]
    assert found["b.weight"].tolist() == [-4, -4]
    found = patch(model, [one, two], amount=[{"a.*": 3.0, "*": 0.0}, 1.0])
    assert found["a.weight"].tolist() == [3, 3]
    assert found["b.weight"].tolist() == [10, 10]
    found = patch(model, [one, two], amount={"a.*": 2.0, "*": 1.0})
    assert found["a.weight"].tolist() == [2, 2]
    assert found["b.weight"].tolist() == [11, 11]


def test_several_signatures_commute_up_to_rounding():
    robust, clean, base = family()
    other, _, _ = family()
    found = [signature(robust, clean, base), signature(base, clean, other)]
    one, two = patch(clean, found), patch(clean, found[::-1])
    for name in WEIGHTS:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-6)


def test_what_no_signature_speaks_of_is_the_models_own():
    robust, clean, base = family()
    on = patch(clean, [signature(robust, clean, base, depth=0.0)])
    for name in clean:
        assert torch.equal(on[name], clean[name]) == (not name.startswith("0."))
    own = Weights.of(clean)
    assert patch(own, [signature(robust, clean, base, depth=0.0)]).node("5.weight") is own.node("5.weight")


def test_buffers_that_hold_no_floats_are_untouched():
    """Also where a plain difference speaks of them."""
    robust, clean, _ = family()
    difference = ws.open(robust) - ws.open(clean)
    found = patch(clean, [difference])
    assert found["1.num_batches_tracked"].item() == 1
    assert found["1.num_batches_tracked"].dtype == torch.int64
    torch.testing.assert_close(found["5.weight"], robust["5.weight"], rtol=0, atol=1e-6)


def test_what_a_difference_says_of_a_counter_is_passed_over_and_whole_numbers_are_numbers():
    model = {"n": torch.tensor([3]), "w": torch.ones(2)}
    found = patch(model, [{"n": torch.tensor([2.0]), "w": torch.tensor([1, 2])}], amount=0.5)
    assert found["n"].tolist() == [3]
    assert found["w"].tolist() == [1.5, 2.0]


def test_bfloat16_models_are_rounded_once():
    robust, clean, base = family(torch.bfloat16)
    found = signature(robust, clean, base)
    on = patch(clean, [found], amount=0.5)
    for name in WEIGHTS:
        assert on.spec(name).dtype == torch.bfloat16
        assert torch.equal(on[name], (clean[name].float() + 0.5 * found[name]).bfloat16())
    off = patch(on, [found], amount=-0.5)  # lazily there was no rounding in between
    for name in WEIGHTS:
        assert torch.equal(off[name], clean[name])


def test_a_quantized_signature_is_read_back(tmp_path: Path):
    robust, clean, base = family()
    found = signature(robust, clean, base)
    small = ws.quantize.rtn(found, bits=8, pattern="*.weight")
    small.save(tmp_path / "small.safetensors")
    assert small.nbytes < 0.6 * found.nbytes
    on = patch(clean, [tmp_path / "small.safetensors"])
    expected = ws.quantize.dequantize(small)
    for name in WEIGHTS:
        torch.testing.assert_close(on[name], clean[name] + expected[name])
        torch.testing.assert_close(on[name], clean[name] + found[name], rtol=0, atol=0.01)
    off = patch(on, [small], amount=-1)
    for name in WEIGHTS:
        torch.testing.assert_close(off[name], clean[name], rtol=0, atol=1e-6)


def test_files_and_lineage(tmp_path: Path):
    robust, clean, base = family()
    for name, model in (("robust", robust), ("clean", clean), ("base", base)):
        folder = tmp_path / name
        Weights.of(model).with_files({"config.json": b"{}"}).save(folder)
    found = signature(tmp_path / "robust", tmp_path / "clean", tmp_path / "base", depth=0.5)
    assert not found.files
    assert "merge.signature" in str(found.lineage)
    found.save(tmp_path / "s.safetensors")
    on = patch(tmp_path / "clean", [tmp_path / "s.safetensors"], amount=0.5)
    assert set(on.files) == {"config.json"}
    on.save(tmp_path / "out")
    written = ws.open(tmp_path / "out")
    assert "merge.patch(amount=0.5" in str(written.lineage)
    for name in WEIGHTS:
        torch.testing.assert_close(written[name], on[name])


def test_tied_tensors_stay_tied_and_are_changed_once():
    embed = normal(5, 4, seed=0)
    model = Weights.of({"embed.weight": embed, "head.weight": embed})
    delta = torch.ones(5, 4)
    for given in ({"embed.weight": delta}, {"head.weight": delta}, {"embed.weight": delta, "head.weight": delta}):
        found = patch(model, [given])
        assert found.ties == {"head.weight": "embed.weight"}
        assert torch.equal(found["head.weight"], embed + 1)
    with pytest.raises(Error, match=r"head\.weight is tied to another tensor .* signature 1 changes them differently"):
        patch(model, [{"embed.weight": delta, "head.weight": 2 * delta}])


def test_tied_tensors_come_apart_where_amounts_differ():
    embed = torch.zeros(2)
    model = Weights.of({"embed.weight": embed, "head.weight": embed})
    found = patch(model, [{"embed.weight": torch.ones(2)}], amount={"embed.*": 1.0, "*": 2.0})
    assert not found.ties
    assert found["embed.weight"].tolist() == [1, 1]
    assert found["head.weight"].tolist() == [2, 2]


def test_of_tied_models():
    tied = [normal(5, 4, seed=i) for i in range(3)]
    found = signature(*(Weights.of({"embed.weight": value, "head.weight": value}) for value in tied))
    assert found.ties == {"head.weight": "embed.weight"}


def test_modules_are_models():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        robust, clean, base = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(3))
    found = signature(robust, clean, base)
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    patch(clean, [found]).load_into(clean)


def test_strided_and_empty_and_single_values():
    def make(seed: int) -> dict[str, Tensor]:
        return {"a.weight": normal(6, 5, seed=seed).t(), "b.weight": torch.zeros(0, 3), "c": normal(1, seed=seed)[0]}

    robust, clean, base = make(0), make(1), make(2)
    found = signature(robust, clean, base)
    torch.testing.assert_close(found["a.weight"], by_hand(*(m["a.weight"] for m in (robust, clean, base))))
    assert found["b.weight"].shape == (0, 3)
    assert abs(found["c"].item()) < 1e-6  # a line has no right angle
    assert patch(clean, [found])["b.weight"].shape == (0, 3)


def test_a_signature_of_a_broken_model_is_refused():
    robust, clean, base = family()
    robust["5.weight"][0, 0] = float("nan")
    found = signature(robust, clean, base)
    with pytest.raises(Error, match=r"tensor 5\.weight: signature: a model holds NaN"):
        found["5.weight"]
    assert found["3.weight"].isfinite().all()


def test_refusals():
    robust, clean, base = family()
    found = signature(robust, clean, base)
    with pytest.raises(Error, match="signature: depth lies between 0"):
        signature(robust, clean, base, depth=1.5)
    with pytest.raises(Error, match="signature: no tensor with floats fits pattern='nothing'"):
        signature(robust, clean, base, pattern="nothing")
    with pytest.raises(Error, match=r"no tensor that fits pattern='5\.weight' lies at depth 0\.5"):
        signature(robust, clean, base, pattern="5.weight", depth=0.5)
    with pytest.raises(Error, match=r"signature: model 1 and the base differ in shape: 5\.weight"):
        signature(robust, clean, base | {"5.weight": torch.ones(2)})
    with pytest.raises(Error, match="patch takes a list of signatures, got one Weights"):
        patch(clean, found)  # type: ignore[arg-type]
    with pytest.raises(Error, match="patch takes a list of signatures, got one str"):
        patch(clean, "signature.safetensors")
    with pytest.raises(Error, match="patch needs at least 1 signature, got 0"):
        patch(clean, [])
    with pytest.raises(Error, match="amount needs one number for each of the 1 signatures, got 2"):
        patch(clean, [found], amount=[1, 2])
    with pytest.raises(Error, match="patch: amount must be finite, got nan"):
        patch(clean, [found], amount=float("nan"))
    with pytest.raises(Error, match=r"no 5\.wait, of which signature 2 speaks \(did you mean '5\.weight'"):
        patch(clean, [found, {"5.wait": torch.ones(4, 6)}])
    with pytest.raises(Error, match=r"patch: 5\.weight is \[4, 6\], but \[6, 4\] in signature 1"):
        patch(clean, [{"5.weight": torch.ones(6, 4)}])
