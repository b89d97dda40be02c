"""The mean of the latest checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import weightsmith as ws
from weightsmith.average import lawa
from weightsmith.errors import Error
from weightsmith.weights import Weights

RUN = torch.randn(9, 3, 2, generator=torch.Generator().manual_seed(0))


def run() -> list[dict[str, torch.Tensor]]:
    return [{"w": moment, "n": torch.tensor(i)} for i, moment in enumerate(RUN)]


@pytest.mark.parametrize("last", [1, 2, 6, 9, 20])
def test_the_formula(last: int):
    kept = min(last, len(RUN))
    by_hand = sum(RUN[len(RUN) - kept + i] for i in range(kept)) / kept
    found = lawa(run(), last=last)
    torch.testing.assert_close(found["w"], by_hand)
    assert found["n"] == len(RUN) - 1


def test_the_window_of_the_paper():
    torch.testing.assert_close(lawa(run())["w"], RUN[-6:].mean(0))


def test_all_of_them_is_the_average_kept_in_training():
    average = ws.average.swa()
    for moment in run():
        average.update(moment)
    torch.testing.assert_close(lawa(run(), last=len(RUN))["w"], average.weights()["w"])


def test_checkpoints_on_disk_go_by_their_steps(tmp_path: Path):
    for step, moment in zip((100, 900, 1000), run(), strict=False):
        weights = Weights.of(moment).with_files({"config.json": b'{"step": %d}' % step})
        weights.save(tmp_path / f"checkpoint-{step}")
    found = lawa(sorted(tmp_path.glob("checkpoint-*")), last=2)
    found.save(tmp_path / "out", max_shard_size=None)
    written = ws.open(tmp_path / "out")
    torch.testing.assert_close(written["w"], (RUN[1] + RUN[2]) / 2)
    assert written["n"] == 2
    assert (tmp_path / "out" / "config.json").read_bytes() == b'{"step": 1000}'
    record = written.lineage.record()["made"]
    assert (record["method"], record["options"]) == ("average.lawa", {"last": 2})
    assert [Path(one["options"]["path"]).name for one in record["inputs"]] == ["checkpoint-900", "checkpoint-1000"]


@pytest.mark.usefixtures("small_pieces")
def test_saved_in_pieces_it_is_the_same(tmp_path: Path):
    moments = torch.randn(7, 40, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    for threads in (1, 3):
        lawa([{"w": moment} for moment in moments]).save(tmp_path / f"{threads}.safetensors", threads=threads)
    assert (tmp_path / "1.safetensors").read_bytes()[-400:] == (tmp_path / "3.safetensors").read_bytes()[-400:]
    expected = moments[1:].double().mean(0)
    torch.testing.assert_close(ws.open(tmp_path / "1.safetensors")["w"].double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("last", [0, -3])
def test_none_of_them(last: int):
    with pytest.raises(Error, match=f"lawa needs last= of at least 1, got {last}"):
        lawa(run(), last=last)


def test_only_the_latest_must_be_alike_and_there():
    with pytest.raises(Error, match="lawa: model 1 and model 2"):
        lawa([{"w": torch.ones(2)}, {"v": torch.ones(2)}])
    with pytest.raises(Error, match="lawa needs at least 1 checkpoint, got 0"):
        lawa([])
    with pytest.raises(Error, match="no such file"):
        lawa(["/nowhere/checkpoint-1"])
