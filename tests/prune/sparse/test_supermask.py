"""Signed masks over constants: the ternary mask by hand, constants that never change, and two bits a weight on disk."""

import math

import pytest
import torch
from torch import nn

from weightsmith import Error
from weightsmith.adapt import fold
from weightsmith.errors import FormatError
from weightsmith.prune.sparse import packed, signed_supermask, unpacked
from weightsmith.prune.sparse._supermask import of_two_bits, signed_constants, two_bits


def network(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, width, bias=False), nn.ELU(), nn.Linear(width, 3, bias=False)]
    return nn.Sequential(*layers)


def learned(model, steps=10):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        x = torch.randn(16, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()


def test_weights_are_constants_of_both_signs_by_layer():
    model = network(64)
    signed_supermask(model, sparsity=0.0, seed=5)
    for i, inputs in ((0, 8), (2, 64)):
        original = model[i].parametrizations.weight.original
        assert torch.equal(original.abs(), torch.full_like(original, math.sqrt(6 / inputs)))
        assert 0.3 < (original > 0).float().mean() < 0.7
        torch.testing.assert_close(original.abs().square() * inputs / 2, torch.full_like(original, 3.0))  # 3 x He
    one, other = (signed_constants(torch.empty(20, 20), seed, "w") for seed in (2**40, 2**40 + 2**35))
    assert not torch.equal(one, other)
    assert not torch.equal(one, signed_constants(torch.empty(20, 20), 2**40, "v"))


def test_latent_masks_begin_uniform_within_their_bound_and_on_their_own():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, (1, 2)))
    found = signed_supermask(model, seed=5)
    for name, fans in (("0.weight", 9 * (8 + 16)), ("1.weight", 2 * (16 + 4))):
        latent, bound = found[name].latent, math.sqrt(6 / fans)
        assert 0.9 * bound < latent.max() <= bound
        assert -bound <= latent.min() < -0.9 * bound
        assert latent.square().mean().item() == pytest.approx(bound**2 / 3, rel=0.25)
    plain = nn.Sequential(nn.Conv2d(8, 16, 3))
    signs = signed_supermask(plain, above=-1, below=-1, seed=5)["0.weight"].latent.sign() * plain[0].weight.sign()
    assert abs(signs.mean()) < 0.1  # masks and constants are drawn independently


def test_constants_are_as_exact_as_the_weights_and_do_not_follow_the_usual_dtype():
    wide = signed_constants(torch.empty(4, 7, dtype=torch.float64), 0, "w")
    assert wide.abs().unique().tolist() == [math.sqrt(6 / 7)]
    narrow = signed_constants(torch.empty(4, 7), 0, "w")
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(signed_constants(torch.empty(4, 7, dtype=torch.float32), 0, "w"), narrow)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(wide.float(), narrow)


def test_the_mask_follows_its_thresholds():
    model = network()
    made = signed_supermask(model, above=0.1, below=-0.3)["0.weight"]
    with torch.no_grad():
        made.latent.copy_(torch.linspace(-0.6, 0.6, 128).reshape(16, 8))
    by_hand = [[1 if m > 0.1 else -1 if m < -0.3 else 0 for m in row] for row in made.latent.tolist()]
    assert made.mask().tolist() == by_hand
    constants = model[0].parametrizations.weight.original
    assert torch.equal(model[0].weight, constants * torch.tensor(by_hand))
    assert {-1, 0, 1} == set(made.mask().unique().tolist())


def test_a_sparsity_hides_exactly_so_many_also_among_zeros():
    model = network()
    found = signed_supermask(model, sparsity={"0.*": 0.9, "*": 0.25})
    for _ in range(3):
        assert int((model[0].weight == 0).sum()) == round(0.9 * 128)
        assert int((model[2].weight == 0).sum()) == 12
        learned(model, 2)
    with torch.no_grad():
        found["0.weight"].latent.zero_()
    assert int((model[0].weight == 0).sum()) == round(0.9 * 128)


def test_only_the_latent_masks_learn_and_constants_stay_to_the_bit():
    model = network()
    found = signed_supermask(model, sparsity=0.5)
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"latent"}
    before = [model[i].parametrizations.weight.original.detach().clone() for i in (0, 2)]
    masks = [made.mask() for made in found.values()]
    learned(model)
    for i, constants in zip((0, 2), before, strict=True):
        assert torch.equal(model[i].parametrizations.weight.original, constants)
    assert any((made.mask() * mask == -1).any() for made, mask in zip(found.values(), masks, strict=True))
    fold(model)
    for i, constants in zip((0, 2), before, strict=True):
        assert torch.equal(model[i].weight.abs(), torch.where(model[i].weight == 0, 0.0, constants.abs()))


def test_the_latent_gradient_is_constant_times_gradient_everywhere():
    model = nn.Linear(4, 3, bias=False)
    made = signed_supermask(model, sparsity=0.5)["weight"]
    pull = torch.randn(3, 4)
    (model.weight * pull).sum().backward()
    torch.testing.assert_close(made.latent.grad, pull * model.parametrizations.weight.original)
    model.requires_grad_(True)
    model.weight.sum().backward()
    assert model.parametrizations.weight.original.grad is None


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 1001])
def test_two_bits_and_back(count):
    mask = torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(count)).to(torch.int8)
    codes = two_bits(mask)
    assert codes.dtype == torch.uint8
    assert len(codes) == math.ceil(count / 4)
    assert torch.equal(of_two_bits(codes, count), mask)
    by_hand = [sum((int(m) + 1) << 2 * k for k, m in enumerate(mask[j : j + 4])) for j in range(0, count, 4)]
    assert codes.tolist() == by_hand


def test_a_file_of_two_bits_a_weight_gives_the_network_back(tmp_path):
    model = network(4096)
    signed_supermask(model, sparsity=0.95, seed=2**40 + 17)
    learned(model, 3)
    saved = packed(model)
    saved.save(tmp_path / "masks.safetensors")
    count = 8 * 4096 + 4096 * 3
    assert sum(saved[name].numel() for name in saved if name != "seed") == count // 4
    assert (tmp_path / "masks.safetensors").stat().st_size < count // 4 + 5000  # the header is filled up to 4096
    for source in (saved, tmp_path / "masks.safetensors"):
        other = network(4096)
        unpacked(other, source)
        x = torch.randn(5, 8)
        assert torch.equal(other(x), model(x))
        assert all(p.requires_grad for p in other.parameters())


def test_only_constants_of_the_seed_under_their_names_are_packed():
    model = network()
    signed_supermask(model, seed=3)
    outer = nn.Sequential(model)
    with pytest.raises(Error, match=r"constants of 0\.0\.weight are not those of seed 3"):
        packed(outer)
    loaded = network()
    signed_supermask(loaded, seed=4)
    loaded.load_state_dict(model.state_dict())
    with pytest.raises(Error, match="are not those of seed 4"):
        packed(loaded)
    codes = packed(model).to_dict()
    assert all(torch.equal(value, codes[name]) for name, value in packed(model.bfloat16()).to_dict().items())


def test_what_is_no_packed_mask_is_refused():
    model = network()
    signed_supermask(model, pattern="0.*")
    saved = packed(model).to_dict()
    with pytest.raises(FormatError, match="fits no plain weight"):
        unpacked(nn.Linear(3, 3), saved)
    with pytest.raises(FormatError, match="fits no plain weight"):
        unpacked(network(4), saved)
    with pytest.raises(FormatError, match="no packed masks"):
        unpacked(network(), {"0.weight": torch.ones(16, 8)})
    both = network()
    signed_supermask(both)
    saved = packed(both).to_dict()
    broken = saved | {"supermask.2.weight": torch.full_like(saved["supermask.2.weight"], 255)}
    target = network()
    with pytest.raises(FormatError, match="none of -1, 0 and 1"):
        unpacked(target, broken)
    assert all(torch.equal(p, q) for p, q in zip(target.parameters(), network().parameters(), strict=True))
    with pytest.raises(Error, match="needs the masks"):
        packed(network())
    with pytest.raises(Error, match="must not lie above"):
        signed_supermask(network(), above=0.0, below=0.1)
    with pytest.raises(Error, match="between 0 and 1"):
        signed_supermask(network(), sparsity=2.0)
