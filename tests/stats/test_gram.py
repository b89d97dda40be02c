"""Gram matrices, against the layers' own outputs: what they are for is to say how outputs change."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weightsmith as ws
from weightsmith.errors import Error
from weightsmith.stats import gram


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change_of_outputs(layer: nn.Module, inputs: Tensor, change: Tensor) -> float:
    """The squared change of the outputs under a change of the weight, by running the layer twice."""
    before = layer(inputs).double()
    with torch.no_grad():
        layer.weight += change
    after = layer(inputs).double()
    with torch.no_grad():
        layer.weight -= change
    return (after - before).square().sum().item()


LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear over positions": (nn.Linear(5, 3), (2, 4, 5)),
    "convolution": (nn.Conv2d(2, 3, 3), (2, 2, 6, 5)),
    "strides and padding": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 2, 7, 6)),
    "padding of the same size": (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (2, 2, 5, 5)),
    "one example alone": (nn.Conv2d(2, 3, 2), (2, 5, 5)),
    "along one axis": (nn.Conv1d(2, 3, 3, padding=1, stride=2), (4, 2, 9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_it_says_how_much_outputs_change(kind: str):
    layer, shape = LAYERS[kind]
    inputs = random(*shape)
    matrix = gram(layer, [inputs])["weight"].double()
    change = 0.5 * random(*layer.weight.shape, seed=1)
    flat = change.flatten(1).double()
    assert float((flat @ matrix @ flat.T).trace()) == pytest.approx(change_of_outputs(layer, inputs, change), rel=1e-4)


def test_batches_add_up():
    layer, inputs = nn.Linear(4, 2), random(9, 4)
    whole = gram(layer, [inputs])["weight"]
    torch.testing.assert_close(gram(layer, inputs.split([2, 3, 4]))["weight"], whole)
    torch.testing.assert_close(whole, inputs.T @ inputs)


def test_the_sum_over_batches_is_float64():
    layer = nn.Linear(1, 1)
    batches = [torch.tensor([[4096.0]])] + [torch.ones(1, 1)] * 8  # 2^24 + 1 is not a float32
    assert float(gram(layer, batches)["weight"]) == 2**24 + 8


def test_a_wider_model_has_wider_sums():
    layer = nn.Linear(1, 1).double()
    batches = [torch.tensor([[4096.0]])] + [torch.ones(1, 1)] * 8
    found = gram(layer, [batch.double() for batch in batches], sums=torch.float32)["weight"]
    assert float(found) == 2**24 + 8
    assert found.dtype == torch.float32


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.query(x) * self.key(x) + self.value(x))


def test_layers_with_one_input_share_one_matrix():
    found = gram(Attention(), random(6, 4).split(2))
    assert found.ties == {"key.weight": "query.weight", "value.weight": "query.weight"}
    torch.testing.assert_close(found["key.weight"], random(6, 4).T @ random(6, 4))


class Changing(nn.Module):
    """Layers that share their input on some batches only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x[0, 0]) > 0:
            return self.first(x) + self.second(x)
        return self.second(self.first(x) * 0 + 2)


@pytest.mark.parametrize("order", [(1, -1, 1), (-1, 1, 1), (1, 1, -1)])
def test_a_matrix_that_is_shared_on_some_batches_only_is_taken_apart(order: tuple[int, ...]):
    batches = [torch.full((2, 3), float(sign * (number + 1))) for number, sign in enumerate(order)]
    found = gram(Changing(), batches)
    ones = torch.ones(3, 3)
    torch.testing.assert_close(found["first.weight"], sum(2 * (i + 1) ** 2 for i in range(3)) * ones)
    second = sum(2 * ((i + 1) ** 2 if sign > 0 else 4) for i, sign in enumerate(order))
    torch.testing.assert_close(found["second.weight"], second * ones)
    assert not found.ties
    assert json.loads(found.metadata["weightsmith.rows"]) == {"first.weight": 6, "second.weight": 6}


def test_an_input_that_is_overwritten_is_not_the_same_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            return self.first(x) + self.second(x.mul_(3))

    found = gram(InPlace(), [torch.ones(1, 2)])
    assert found["second.weight"].tolist() == [[9, 9], [9, 9]]
    assert found["first.weight"].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    "other",
    [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"kernel_size": 1}],
)
def test_convolutions_of_one_input_share_a_matrix_where_they_make_the_same_patches(other: dict[str, Any]):
    def pair(*settings: dict[str, Any]) -> nn.ModuleList:
        return nn.ModuleList(nn.Conv1d(2, 3, **({"kernel_size": 2} | setting)) for setting in settings)

    def forward(model: Any, x: Tensor) -> Tensor:
        return torch.stack([layer(x).sum() for layer in model])

    data = [random(3, 2, 6)]
    found = gram(pair({}, other), data, forward=forward)
    assert not found.ties
    for name, setting in (("0.weight", {}), ("1.weight", other)):
        torch.testing.assert_close(found[name], gram(pair(setting), data, forward=forward)["0.weight"])
    assert gram(pair(other, other), data, forward=forward).ties == {"1.weight": "0.weight"}
    both = {"padding": 1} | other  # that only the way of padding differs, too
    if "padding_mode" in other:
        assert not gram(pair({"padding": 1}, both), data, forward=forward).ties


def test_a_layer_that_is_called_twice_counts_twice():
    layer = nn.Linear(2, 2)
    found = gram(nn.ModuleList([layer]), [torch.ones(1, 2)], forward=lambda model, x: layer(x) + layer(x))
    assert found["0.weight"].tolist() == [[2, 2], [2, 2]]


def test_padded_tokens_do_not_count():
    layer = nn.Linear(2, 2)
    tokens, mask = random(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": tokens, "attention_mask": mask}
    found = gram(layer, [batch], forward=lambda model, batch: model(batch["x"]))["weight"]
    kept = tokens[mask.bool()]
    torch.testing.assert_close(found, kept.T @ kept)


def test_weights_whose_inputs_do_not_say_all_have_none():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 4)
            self.grouped = nn.Conv1d(4, 4, 1, groups=2)
            self.idle, self.hidden, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 6)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.hidden(self.grouped(self.embed(x).mT).mT))

    assert set(gram(Tied(), [torch.tensor([[1, 2]])])) == {"hidden.weight"}


def test_narrow_floats_are_multiplied_in_float32():
    layer = nn.Linear(1, 1).bfloat16()
    found = gram(layer, [torch.full((300, 1), 1.0078125, dtype=torch.bfloat16)])["weight"]
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(300 * 1.0078125**2, rel=1e-5)


def test_convolutions_of_narrow_floats():
    layer, data = nn.Conv2d(2, 3, 3, stride=2, padding=1), random(3, 2, 6, 5).bfloat16()
    found = gram(copy.deepcopy(layer).bfloat16(), [data])["weight"]
    torch.testing.assert_close(found, gram(layer, [data.float()])["weight"])


def test_a_pattern_chooses_and_one_that_fits_nothing_is_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    assert set(gram(model, [torch.ones(1, 2)], pattern="1.*")) == {"1.weight"}
    with pytest.raises(Error, match=r"no weight .* fits 'nothing'"):
        gram(model, [torch.ones(1, 2)], pattern="nothing")


def test_it_is_saved_and_opened_with_its_count(tmp_path):
    gram(Attention(), random(6, 4).split(2)).save(tmp_path / "gram.safetensors")
    found = ws.open(tmp_path / "gram.safetensors")
    again = ws.stats.combine(found, gram(Attention(), [random(2, 4, seed=9)]))
    assert again.metadata["weightsmith.examples"] == "8"


def by_hand(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum of weighted outer products, row by row, float64."""
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for number, row in enumerate(rows.double()):
        total += torch.outer(row, row) * (1.0 if weights is None else float(weights[number]))
    return total


@pytest.mark.parametrize("inputs", [1, 6, 255, 256, 257, 600])
def test_wide_matrices_made_from_half_the_products_are_whole(inputs: int):
    layer, data = nn.Linear(inputs, 1), random(40, inputs)
    found = gram(layer, data.split([3, 17, 20]))["weight"]
    torch.testing.assert_close(found, by_hand(data).float(), rtol=1e-5, atol=1e-4)
    assert torch.equal(found, found.T)


@pytest.mark.parametrize("kind", LAYERS)
def test_blocks_and_the_diagonal_are_parts_of_the_full_matrix(kind: str):
    layer, shape = LAYERS[kind]
    data = [random(*shape), random(*shape, seed=1)]
    full = gram(layer, data)["weight"]
    inputs = len(full)
    torch.testing.assert_close(gram(layer, data, form="diagonal")["weight"], full.diagonal())
    for size in (number for number in range(1, inputs + 1) if inputs % number == 0):
        blocks = gram(layer, data, form=size)["weight"]
        assert blocks.shape == (inputs // size, size, size)
        assert torch.equal(blocks, blocks.mT)
        expected = [full[i : i + size, i : i + size] for i in range(0, inputs, size)]
        torch.testing.assert_close(blocks, torch.stack(expected))


def test_the_form_may_differ_by_tensor():
    found = gram(Attention(), [random(6, 4)], form={"out.*": "diagonal", "*": 2})
    assert found.spec("query.weight").shape == (2, 2, 2)
    assert found.spec("out.weight").shape == (4,)
    assert found.ties == {"key.weight": "query.weight", "value.weight": "query.weight"}
    found = gram(Attention(), [random(6, 4)], form={"key.*": "diagonal", "*": "full"})  # of one input, two forms
    torch.testing.assert_close(found["key.weight"], found["query.weight"].diagonal())
    assert torch.equal(found["value.weight"], found["query.weight"])


def test_forms_that_fit_no_layer_are_refused_before_the_data_are_read():
    def never():
        raise AssertionError("read")
        yield

    for form, message in (
        (3, "weight: its 4 inputs cannot be cut into blocks of 3"),
        (0, "form of weight is 'full', 'diagonal' or the size of blocks, got 0"),
        (True, "got True"),
        ("diag", "got 'diag'"),
    ):
        with pytest.raises(Error, match=message):
            gram(nn.Linear(4, 2), never(), form=form)
    with pytest.raises(Error, match="is no folder"):
        gram(nn.Linear(4, 2), never(), store="/nowhere/at/all")
    with pytest.raises(Error, match=r"sums is torch\.float32 or torch\.float64"):
        gram(nn.Linear(4, 2), never(), sums=torch.float16)


FORMS = ["full", 2, "diagonal"]


def of_form(matrix: Tensor, form: str | int) -> Tensor:
    if form == "full":
        return matrix
    if form == "diagonal":
        return matrix.diagonal()
    return torch.stack([matrix[i : i + 2, i : i + 2] for i in range(0, len(matrix), 2)])


@pytest.mark.parametrize("form", FORMS)
def test_tokens_count_as_much_as_is_said(form: str | int):
    layer, inputs = nn.Linear(4, 2), random(3, 5, 4)
    weights = random(3, 5, seed=2).abs()
    weights[0, 1] = 0
    found = gram(
        layer, [(inputs[:2], weights[:2]), (inputs[2:], weights[2:])], tokens=lambda batch: batch[1], form=form
    )
    expected = by_hand(inputs.flatten(0, 1), weights.flatten())
    torch.testing.assert_close(found["weight"], of_form(expected, form).float(), rtol=1e-5, atol=1e-5)


def test_whole_weights_are_repeated_rows():
    layer, inputs = nn.Linear(3, 2), random(2, 2, 3)
    found = gram(layer, [inputs], tokens=lambda batch: torch.tensor([[2, 0], [1, 3]]))["weight"]
    rows = inputs.flatten(0, 1)[[0, 0, 2, 3, 3, 3]]
    torch.testing.assert_close(found, rows.T @ rows)


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3), (2, 5, 4, 3)])
def test_a_weight_for_each_example(shape: tuple[int, ...]):
    layer, inputs = nn.Linear(3, 2), random(*shape)
    found = gram(layer, [inputs], tokens=lambda batch: torch.tensor([3.0, 0.5]))["weight"]
    expected = 3 * by_hand(inputs[0].reshape(-1, 3)) + 0.5 * by_hand(inputs[1].reshape(-1, 3))
    torch.testing.assert_close(found, expected.float())


def test_a_weight_for_each_example_of_a_convolution():
    layer, inputs = nn.Conv2d(2, 3, 2), random(3, 2, 4, 4)
    found = gram(layer, [inputs], tokens=lambda batch: torch.tensor([3.0, 0.0, 0.5]))["weight"]
    one, last = (gram(layer, [inputs[i : i + 1]])["weight"] for i in (0, 2))
    torch.testing.assert_close(found, 3 * one + 0.5 * last)


def test_padding_counts_for_nothing_whatever_its_weight():
    layer, tokens = nn.Linear(2, 2), random(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    tokens[mask == 0] = torch.nan  # not even what is not finite
    batch = {"x": tokens, "attention_mask": mask}
    weights = torch.tensor([[1.0, 2.0, 9.0], [0.5, 9.0, 9.0]])
    found = gram(layer, [batch], tokens=lambda batch: weights, forward=lambda model, batch: model(batch["x"]))["weight"]
    expected = by_hand(torch.stack([tokens[0, 0], tokens[0, 1], tokens[1, 0]]), torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(found, expected.float())


def test_tokens_in_one_row_are_told_by_their_number():
    """Routers of experts are given ``[n t, in]``."""
    layer, tokens, mask = nn.Linear(2, 2), random(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = {"x": tokens, "attention_mask": mask}
    weights = random(2, 3, seed=4).abs()
    found = gram(
        layer, [batch], tokens=lambda batch: weights, forward=lambda model, batch: model(batch["x"].flatten(0, 1))
    )
    torch.testing.assert_close(found["weight"], by_hand(tokens[mask.bool()], weights[mask.bool()]).float())


def test_token_weights_that_cannot_be_are_refused():
    layer, inputs = nn.Linear(3, 2), random(2, 5, 3)
    for weights, message in (
        (-torch.ones(2, 5), "not negative"),
        (torch.full((2, 5), torch.nan), "finite weights"),
        (torch.ones(3, 5), r"\[n, t\] or \[n\] for a batch of n = 2 examples, got \[3, 5\]"),
        (torch.ones(2, 4), r"weight: tokens= \[2, 4\] says nothing of the rows of its input \[2, 5, 3\]"),
        (torch.ones(2, 5, 1), r"got \[2, 5, 1\]"),
        ([1, 2], "got list"),
    ):
        with pytest.raises(Error, match=message):
            gram(layer, [inputs], tokens=lambda batch, weights=weights: weights)
    with pytest.raises(Error, match=r"weight: tokens= \[2, 5\] says nothing"):
        gram(nn.Conv1d(3, 2, 1), [random(2, 3, 5)], tokens=lambda batch: torch.ones(2, 5))
    with pytest.raises(Error, match=r"weight: tokens= \[3\] says nothing"):  # one example, with three channels
        gram(nn.Conv1d(3, 2, 1), [random(3, 5)], tokens=lambda batch: torch.ones(3))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_inputs_that_are_not_finite_are_an_error_that_names_the_first_layer(form: str | int, bad: float):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].bias[2] = bad  # so that the second layer is the first to be given it
    data = [random(3, 4)]
    with pytest.raises(Error, match=r"1\.weight: its inputs in batch 1 are not finite"):
        gram(model, data, form=form)


@pytest.mark.parametrize("form", FORMS)
def test_squares_that_float32_cannot_hold_are_an_error(form: str | int):
    data = torch.tensor([[0.0, 0.0, 1e30, 0.0]], dtype=torch.float64)
    with pytest.raises(Error, match="too large to be squared in float32"):
        gram(nn.Linear(4, 2).double(), [data], form=form)
    assert float(gram(nn.Linear(4, 2).double(), [data / 1e12], form=form)["weight"].max()) == pytest.approx(1e36)


def test_the_batch_that_is_not_finite_is_named_and_is_the_last_one_read():
    read = []
    data = [random(3, 4), torch.full((1, 4), torch.nan), random(3, 4)]
    with pytest.raises(Error, match=r"weight: its inputs in batch 2"):
        gram(nn.Linear(4, 2), (read.append(1) or batch for batch in data))
    assert len(read) == 2


def test_layers_that_were_given_no_row_have_no_matrix():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.some, self.none, self.conv = nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv1d(3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.some(x) + self.none(x[:0]).sum() + self.conv(x[:0, :, None].expand(0, 3, 4)).sum()

    found = gram(Routed(), [random(2, 3), random(0, 3)])
    assert set(found) == {"some.weight"}


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
def test_sums_of_many_batches(sums: torch.dtype):
    """float32 sums: measured 1e-6 of the mean diagonal after 512 batches."""
    layer, data = nn.Linear(24, 2), [random(64, 24, seed=i) + 1 for i in range(256)]
    exact = sum(batch.double().T @ batch.double() for batch in data)
    assert isinstance(exact, Tensor)
    found = gram(layer, data, sums=sums)["weight"]
    assert found.dtype == torch.float32
    error = float((found.double() - exact).abs().max() / exact.diagonal().mean())
    assert error < (3e-6 if sums == torch.float32 else 2e-7)
    if sums == torch.float32:
        assert not torch.equal(found, gram(layer, data)["weight"])


def test_autocast_does_not_narrow_the_products():
    layer, inputs = nn.Linear(8, 2), random(500, 8)

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    assert torch.equal(gram(layer, [inputs], forward=forward)["weight"], gram(layer, [inputs])["weight"])


@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
def test_inference_mode_does_no_harm(sums: torch.dtype):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            return self.first(x) + self.second(x.mul_(3))

    def forward(model, batch):
        with torch.inference_mode():
            return model(batch)

    data = [torch.ones(1, 2), torch.ones(2, 2)]
    found = gram(Twice(), data, forward=forward, sums=sums)
    assert found["first.weight"].tolist() == [[3, 3], [3, 3]]
    assert found["second.weight"].tolist() == [[27, 27], [27, 27]]


@pytest.mark.parametrize("memory", [None, 1, 300, "1MB"])
@pytest.mark.parametrize("sums", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [(1, 1, 1), (-1, 1, 1)])
def test_sums_in_files_are_the_same_to_the_bit_and_leave_no_file(tmp_path, memory, sums, order):
    folder = tmp_path / "sums"
    folder.mkdir()
    batches = [torch.full((2, 3), float(sign * (number + 1))) for number, sign in enumerate(order)]
    expected = gram(Changing(), batches, sums=sums)
    found = gram(Changing(), batches, sums=sums, store=folder, memory=memory)
    assert found.ties == expected.ties
    for name in expected:
        assert torch.equal(found[name], expected[name])
    assert not list(folder.iterdir())
    found.save(tmp_path / "gram.safetensors")
    assert torch.equal(ws.open(tmp_path / "gram.safetensors")["second.weight"], expected["second.weight"])


def test_gpt2s_own_layers_have_none():
    """Their weights lie ``[in, out]``; a matrix for a square one would fit the wrong side unnoticed."""
    transformers = pytest.importorskip("transformers", reason="its Conv1D")
    layer = transformers.pytorch_utils.Conv1D(4, 4)
    model = nn.Sequential(layer, nn.Linear(4, 2))
    assert set(gram(model, [random(2, 4)])) == {"1.weight"}


def test_it_does_not_keep_inputs_alive():
    import weakref

    alive: list[weakref.ref[Tensor]] = []
    most = 0

    class Watching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            nonlocal most
            for layer in self.layers:
                x = layer(x)
                alive.append(weakref.ref(x))
                most = max(most, sum(ref() is not None for ref in alive))
            return x

    gram(Watching(), random(8, 4).split(2))
    assert most <= 1  # what the model itself holds
