"""Which layers, which rows, how much at once, and where sums live."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.stats import _taps, activations, features, gram
from weightsmith.stats._taps import Store, layers_of, outputs, runs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "linear": (nn.Linear(5, 3), (7, 5)),
    "linear over positions": (nn.Linear(5, 3), (2, 4, 5)),
    "one row alone": (nn.Linear(5, 3), (5,)),
    "convolution": (nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (2, 2, 7, 6)),
    "one example alone": (nn.Conv2d(2, 3, 2), (2, 5, 5)),
    "along one axis": (nn.Conv1d(2, 3, 3, padding=1, stride=2, padding_mode="circular"), (4, 2, 9)),
    "one example along one axis": (nn.Conv1d(2, 3, 3), (2, 9)),
    "an even kernel, to the same size": (
        nn.Conv2d(2, 3, (4, 2), dilation=(1, 3), padding="same", padding_mode="replicate"),
        (2, 2, 7, 6),
    ),
    "padding that differs by axis": (nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), (2, 2, 5, 6)),
    "no example": (nn.Conv2d(2, 3, 2), (0, 2, 5, 5)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_row_of_features_times_the_weight_is_a_row_of_outputs(kind: str):
    layer, shape = LAYERS[kind]
    value = random(*shape)
    made = features(layer, value) @ layer.weight.flatten(1).T + layer.bias
    torch.testing.assert_close(made, outputs(layer, layer(value)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("at_once", [1, 20, 10**9])
def test_runs_are_the_whole_in_order(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_taps, "AT_ONCE", at_once)
    layer, shape = LAYERS[kind]
    value = random(*shape)
    beside = torch.arange(len(_taps.by_row(layer, value)))
    found = list(runs(layer, value, beside, None))
    torch.testing.assert_close(torch.cat([features(layer, one) for one, _, _ in found]), features(layer, value))
    assert torch.cat([other for _, other, _ in found]).tolist() == beside.tolist()
    assert all(nothing is None for _, _, nothing in found)
    assert len(found) == 1 if at_once == 10**9 else len(found) >= min(len(beside), 1)
    if at_once == 1:
        assert len(found) == max(len(beside), 1)


def test_large_inputs_are_taken_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch):
    weights, mask = random(5, 7, seed=3).abs(), (random(5, 7, seed=4) > 0).long()
    for layer, shape in ((nn.Linear(4, 2), (5, 7, 4)), (nn.Conv2d(2, 3, 2, padding=1), (5, 2, 6, 3))):
        batch = {"x": random(*shape), "attention_mask": mask}
        tokens = (lambda batch: weights) if len(shape) == 3 else (lambda batch: weights[:, 0])
        settings = {"tokens": tokens, "forward": lambda model, batch: model(batch["x"])}
        whole = gram(layer, [batch], **settings)
        with monkeypatch.context() as patch:
            patch.setattr(_taps, "AT_ONCE", 20)
            torch.testing.assert_close(gram(layer, [batch], **settings)["weight"], whole["weight"])


@pytest.mark.parametrize("what", ["mean", "maximum"])
@pytest.mark.parametrize("of", ["inputs", "outputs"])
def test_large_outputs_too(what: Any, of: Any, monkeypatch: pytest.MonkeyPatch):
    layer, value = nn.Linear(4, 2), random(5, 7, 4)
    mask = (random(5, 7, seed=4) > 0).long()
    value[mask == 0] = 100.0
    batch = {"x": value, "attention_mask": mask}

    def found() -> Tensor:
        return activations(layer, [batch], what=what, of=of, forward=lambda model, batch: model(batch["x"]))["weight"]

    whole = found()
    assert float(whole.abs().max()) < 20
    monkeypatch.setattr(_taps, "AT_ONCE", 20)
    torch.testing.assert_close(found(), whole)


@pytest.mark.parametrize("order", [(1, 1, 1, 1), (-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, -1)])
def test_a_shared_total_is_copied_once_when_it_is_taken_apart(order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x if float(x[0, 0]) > 0 else x * 1)

    copies = []
    copy = Store.copy
    monkeypatch.setattr(Store, "copy", lambda self, total, dtype=None: copies.append(dtype) or copy(self, total, dtype))
    found = gram(Changing(), [torch.full((1, 3), float(sign)) for sign in order])
    assert copies.count(None) == (order[0] > 0 > min(order))  # the others are of the result
    assert torch.equal(found["first.weight"], torch.full((3, 3), 4.0))
    assert torch.equal(found["second.weight"], torch.full((3, 3), 4.0))


def test_the_first_sums_are_in_memory_and_the_rest_in_files(tmp_path):
    store = Store(tmp_path, 100)
    small = store.zeros(torch.zeros(3), torch.float64)
    fitting = store.zeros(torch.zeros(9), torch.float64)  # 24 + 72 bytes, and no more
    assert not store.files
    assert store.zeros(torch.zeros(1), torch.float64).data_ptr() in store.files
    assert fitting.data_ptr() not in store.files
    store = Store(tmp_path, 100)
    large = store.zeros(torch.zeros(50, 50), torch.float64)
    assert store.files == {large.data_ptr()}
    assert large.shape == (50, 50)
    assert large.dtype == torch.float64
    assert not large.any()
    large[3, 4] = 7
    assert store.copy(large).data_ptr() in store.files
    assert store.copy(large, torch.float32)[3, 4] == 7
    assert store.copy(small).data_ptr() not in store.files
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_an_error_before_the_data_are_read(
    tmp_path, monkeypatch: pytest.MonkeyPatch
):
    def never():
        raise AssertionError("read")
        yield

    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(Error, match=f"store={tmp_path} cannot be written to"):
        gram(nn.Linear(4, 2), never(), store=tmp_path)


def test_a_full_disk_is_an_error_at_once(tmp_path, monkeypatch: pytest.MonkeyPatch):
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(Error, match="no room for sums of 64 bytes: No space left on device"):
        gram(nn.Linear(4, 2), [random(2, 4)], store=tmp_path, sums=torch.float32)
    assert not list(tmp_path.iterdir())


def test_a_weight_that_something_else_uses_is_left_out():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1, groups=2), nn.ConvTranspose1d(4, 4, 1))
    model.append(nn.Linear(4, 4))
    model[4].weight = model[1].weight
    assert set(layers_of(model, "*")) == {"0.weight"}
