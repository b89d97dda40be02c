"""Sparse layers against the dense ones that they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.prune import _execution, break_even, execute, to_semi_structured
from weightsmith.prune._execution import BlockRows, Scattered, SparseLayer, _pays_from, sparse_form

LAYOUTS = ("scattered", "1x1", "3x1", "4x1", "16x1", "auto")


def sparse(*shape: int, share: float = 0.9, seed: int = 0, height: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    zero = torch.rand(-(-shape[0] // height), *shape[1:], generator=generator) < share
    return torch.where(zero.repeat_interleave(height, 0)[: shape[0]], 0.0, values)


def pruned(model: nn.Module, share: float = 0.9) -> nn.Module:
    with torch.no_grad():
        for i, value in enumerate(model.parameters()):
            if value.dim() > 1:
                value.copy_(sparse(*value.shape, share=share, seed=i))
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 24), (7, 5), (1, 1), (5, 64), (33, 3)])
@pytest.mark.parametrize("share", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 6])
def test_products_are_those_of_the_dense_matrix(layout, shape, share, batch):
    weight = sparse(*shape, share=share)
    made = sparse_form(weight, layout)
    columns = torch.randn(shape[1], batch, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made(columns), weight @ columns, rtol=1e-5, atol=1e-5)
    assert torch.equal(made.dense(), weight)


def test_what_is_stored():
    weight = sparse(64, 40, height=16)
    assert sparse_form(weight, "scattered").stored() == int(weight.count_nonzero())
    blocks = int(weight.view(4, 16, 40).any(dim=1).sum())
    assert 16 * blocks <= sparse_form(weight, "16x1").stored() < 16 * blocks * 1.5
    even = torch.zeros(64, 40)
    even[:, ::10] = 1
    assert sparse_form(even, "16x1").stored() == 64 * 4


@pytest.mark.parametrize("gathered", [1, 100, 10**6])
@pytest.mark.parametrize("filled", [1.0, 1.3, 9.0])
def test_buckets_and_runs_change_nothing(gathered, filled, monkeypatch):
    monkeypatch.setattr(_execution, "GATHERED", gathered)
    monkeypatch.setattr(_execution, "FILLED", filled)
    weight = sparse(70, 50, height=4)
    weight[:4] = 1.0  # one block that keeps all columns
    made = sparse_form(weight, "4x1")
    assert len(made.sizes) == (1 if filled == 9 else _execution.BUCKETS)
    columns = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made(columns), weight @ columns, rtol=1e-5, atol=1e-5)
    assert torch.equal(made.dense(), weight)


def test_the_layout_is_seen():
    def height(weight: Tensor) -> int:
        made = sparse_form(weight)
        return made.height if isinstance(made, BlockRows) else 0

    assert [height(sparse(64, 64, height=h)) for h in (1, 4, 8, 16, 32)] == [0, 4, 8, 16, 32]
    assert isinstance(sparse_form(sparse(64, 64, share=0.0)), BlockRows)  # dense: one block of all columns
    halves = sparse_form(sparse(8, 8).bfloat16())
    assert isinstance(halves, BlockRows)
    assert halves.height == 1


@pytest.mark.parametrize("layout", ["scattered", "4x1"])
def test_linear_layers(layout):
    model = pruned(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 8, bias=False)))
    fast = execute(model, layout=layout, least=0.5)
    assert [type(m) for m in fast] == [SparseLayer, nn.ReLU, SparseLayer]
    for shape in [(24,), (3, 24), (2, 5, 24), (0, 24)]:
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(fast(inputs), model(inputs))


@pytest.mark.parametrize("layout", ["scattered", "4x1"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_of_one_position(layout, stride):
    model = pruned(nn.Sequential(nn.Conv2d(6, 8, 1, stride=stride), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 1, bias=False)))
    fast = execute(model, layout=layout, least=0.5)
    assert [type(m) for m in fast] == [SparseLayer, nn.Conv2d, SparseLayer]
    for shape in [(6, 9, 11), (1, 6, 8, 8), (3, 6, 7, 9)]:
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(fast(inputs), model(inputs))
    line = pruned(nn.Conv1d(6, 8, 1, stride=stride))
    for shape in [(6, 9), (2, 6, 9)]:
        torch.testing.assert_close(execute(line, least=0.5)(torch.ones(shape)), line(torch.ones(shape)))
    torch.testing.assert_close(fast[2].weight, model[2].weight.detach())


def test_the_model_is_left_as_it_was_and_shares_the_rest():
    model = pruned(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fast = execute(model, pattern="0.*", least=0.5)
    assert type(model[0]) is nn.Linear
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert fast[1].weight is model[1].weight
    assert fast[1].running_mean is model[1].running_mean
    assert fast[2].weight is model[2].weight
    assert fast[0].bias is model[0].bias
    assert not fast[0].training
    alone = pruned(nn.Linear(8, 8))
    assert isinstance(execute(alone, least=0.5), SparseLayer)


def test_gradients_of_inputs_and_biases():
    model = pruned(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)))
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    for layout in ("scattered", "4x1"):
        fast = execute(model, layout=layout, least=0.5)
        found = []
        for one in (fast, model):
            given = inputs.clone().requires_grad_()
            one.zero_grad()
            one(given).square().sum().backward()
            found.append((given.grad, one[0].bias.grad.clone()))
        torch.testing.assert_close(found[0], found[1])


def test_a_layer_used_twice_is_one_layer():
    shared = nn.Linear(8, 8)
    model = pruned(nn.ModuleDict({"a": shared, "b": shared}))
    fast = execute(model, least=0.5)
    assert isinstance(fast["a"], SparseLayer)
    assert fast["a"] is fast["b"]


def test_what_stays():
    class Own(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "own": Own(8, 8),
            "wide": nn.Conv2d(8, 8, 3),
            "groups": nn.Conv2d(8, 8, 1, groups=2),
            "padded": nn.Conv2d(8, 8, 1, padding=1),
            "hooked": nn.Linear(8, 8),
            "early": nn.Linear(8, 8),
            "watched": nn.Linear(8, 8),
            "patched": nn.Linear(8, 8),
            "normed": nn.Linear(8, 8),
            "dense": nn.Linear(8, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "plain": nn.Linear(8, 8),
        }
    )
    pruned(model)
    nn.init.ones_(model["dense"].weight)
    model["hooked"].register_forward_hook(lambda *given: None)
    model["early"].register_forward_pre_hook(lambda *given: None)
    model["watched"].register_full_backward_hook(lambda *given: None)
    model["patched"].forward = lambda values: values  # as programs do that load weights when they are needed
    nn.utils.parametrizations.weight_norm(model["normed"])
    fast = execute(model, least=0.5)
    assert [name for name, m in fast.named_modules() if isinstance(m, SparseLayer)] == ["plain"]


@pytest.mark.parametrize("layout", ["scattered", "4x1"])
def test_it_is_saved_loaded_and_copied(layout, tmp_path):
    model = pruned(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    fast = execute(model, layout=layout, least=0.5)
    inputs = torch.ones(2, 16)
    expected = fast(inputs)
    torch.save(fast.state_dict(), tmp_path / "s.pt")
    again = copy.deepcopy(fast)
    nn.init.zeros_(again[0].bias)
    for name, value in again.named_buffers():
        if name.endswith(("matrix", "values_0")):
            (value if value.layout == torch.strided else value.values()).zero_()
    assert torch.equal(fast(inputs), expected)  # a copy is a copy
    assert not torch.allclose(again(inputs), expected)
    again.load_state_dict(torch.load(tmp_path / "s.pt"))
    assert torch.equal(again(inputs), expected)
    wide = copy.deepcopy(fast).double()
    torch.testing.assert_close(wide(inputs.double()).float(), expected)


def test_a_part_of_a_model_at_a_time():
    """What was replaced before is shared, and not replaced again."""
    model = pruned(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    first = execute(model, layout="scattered", least=0.5, pattern="0.*")
    both = execute(first, layout="4x1", least=0.5)
    assert [type(layer.product) for layer in both] == [Scattered, BlockRows]
    assert both[0].product.matrix is first[0].product.matrix
    torch.testing.assert_close(both(torch.ones(2, 16)), model(torch.ones(2, 16)))


@pytest.mark.parametrize("layout", ["scattered", "4x1"])
def test_inputs_that_do_not_fit(layout):
    """More or fewer than the columns of the weight must not be passed over."""
    fast = execute(pruned(nn.Linear(16, 8)), layout=layout, least=0.5)
    for width in (15, 17):
        with pytest.raises(Error, match=f"16 inputs got {width}"):
            fast(torch.ones(2, width))
    images = execute(pruned(nn.Conv2d(16, 8, 1)), layout=layout, least=0.5)
    with pytest.raises(Error, match="16 inputs got 15"):
        images(torch.ones(2, 15, 4, 4))
    for shape in ((16, 4), (1, 2, 16, 4, 4)):
        with pytest.raises(Error, match="along 2 axes"):
            images(torch.ones(shape))


@pytest.mark.parametrize("layout", ["scattered", "4x1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(layout, dtype):
    """Also for inputs that an operation before has made narrow."""
    model = pruned(nn.Linear(16, 8))
    fast, inputs = execute(model, layout=layout, least=0.5), torch.ones(3, 16, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fast(inputs).float(), model(inputs).float(), rtol=0.02, atol=0.02)


def test_a_compiled_model():
    model = pruned(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    for layout in ("scattered", "4x1"):
        fast = execute(model, layout=layout, least=0.5)
        found = torch.compile(fast, backend="eager")(torch.ones(2, 16))
        torch.testing.assert_close(found, model(torch.ones(2, 16)))


def test_halves():
    weight = sparse(32, 16, height=16).bfloat16()
    columns = torch.ones(16, 3, dtype=torch.bfloat16)
    torch.testing.assert_close(sparse_form(weight)(columns), weight @ columns, rtol=0.02, atol=0.05)
    with pytest.raises(Error, match="no scattered product"):
        sparse_form(weight, "scattered")
    with pytest.raises(Error, match="no scattered product"):
        sparse_form(weight.float(), "scattered").bfloat16()(columns)
    model = pruned(nn.Sequential(nn.Linear(24, 16), nn.GELU(), nn.Linear(16, 7, bias=False)))
    for dtype in (torch.bfloat16, torch.float16):
        narrow, inputs = copy.deepcopy(model).to(dtype), torch.ones(2, 3, 24, dtype=dtype)
        found = execute(narrow, least=0.5)(inputs)
        assert found.dtype == dtype
        torch.testing.assert_close(found, narrow(inputs), rtol=0.02, atol=0.02)


def test_refusals():
    with pytest.raises(Error, match="no plain linear layer"):
        execute(nn.Sequential(nn.ReLU()))
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(Error, match="90% zeros"):
        execute(model)
    with pytest.raises(Error, match="least"):
        execute(model, least=2)
    for layout in ("csr", "0x1", "4x4"):
        with pytest.raises(Error, match="layout is"):
            execute(pruned(model), layout=layout, least=0.5)


def test_where_it_pays():
    report = break_even((64, 32), sparsities=(0.9, 0.5), batches=(1, 4), layouts=("scattered", "4x1"), repeats=2)
    assert [(row["sparsity"], row["layout"], row["batch"]) for row in report.table] == [
        (s, layout, b) for s in (0.5, 0.9) for layout in ("scattered", "4x1") for b in (1, 4)
    ]
    assert max(report["difference"]) < 1e-5
    assert min(report["dense"]) > 0
    assert len(report.plots) == 2
    assert {"scattered, batch 1: pays from", "4x1, batch 4: pays from"} < set(report.figures)


def test_from_which_sparsity_on():
    def found(*ratios: float):
        shares = (0.5, 0.8, 0.9)
        return _pays_from([{"sparsity": s, "speed-up": r} for s, r in zip(shares, ratios, strict=True)])

    assert found(0.5, 1.1, 2.0) == 0.8
    assert found(1.5, 0.9, 2.0) == 0.9  # a dip counts
    assert found(1.5, 1.2, 1.0) == "nowhere"


def test_settings_of_the_measurement():
    for options in ({"sparsities": ()}, {"repeats": 0}, {"sparsities": (1.5,)}, {"batches": ()}):
        with pytest.raises(Error, match="break_even needs"):
            break_even((8, 8), **options)


def test_random_weights_lie_in_the_blocks_of_the_layout():
    scattered, blocks = (_execution._pruned((32, 20), 0.9, layout, 0) for layout in ("scattered", "8x1"))
    assert int(scattered.count_nonzero()) == int(blocks.count_nonzero()) == 64
    assert sparse_form(blocks, "8x1").stored() < sparse_form(scattered, "8x1").stored()
    assert int((blocks != 0).view(4, 8, 20).any(dim=1).sum()) == 8  # of eight entries each


def test_what_the_kernels_of_graphics_cards_take():
    weight = torch.ones(32, 64)
    weight.view(-1, 4)[:, 1:3] = 0
    takes = _execution._is_two_of_four
    assert takes(weight.half())
    assert takes(weight.bfloat16())
    assert not takes(weight)
    assert not takes(weight[:16].half())
    assert not takes(weight[:, :32].half())
    weight[31, 61] = 1.0  # three of the last four
    assert not takes(weight.half())


def test_two_of_four_needs_a_graphics_card():
    with pytest.raises(Error, match=r"compute capability.*cpu"):
        to_semi_structured(nn.Sequential(nn.Linear(64, 32)))
    with pytest.raises(Error, match="no linear layer"):
        to_semi_structured(nn.Sequential(nn.ReLU()))


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="2:4 kernels need a CUDA device of compute capability 8.0 or more",
)
def test_two_of_four_on_a_graphics_card():
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8))
    with torch.no_grad():
        for layer in (model[0], model[3]):
            layer.weight.view(-1, 4)[:, 1:3] = 0
    model = model.half().cuda()
    inputs = torch.randn(64, 128, device="cuda", dtype=torch.half)
    expected = model(inputs)
    assert to_semi_structured(model) == ["0.weight"]  # the second is not 2:4, the third too small
    torch.testing.assert_close(model(inputs), expected, rtol=1e-2, atol=1e-2)


def test_scattered_products_keep_what_was_not_zero():
    weight = sparse(9, 9)
    assert Scattered(weight).stored() == int(weight.count_nonzero())
