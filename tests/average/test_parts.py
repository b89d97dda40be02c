"""The order of checkpoints, and their combinations."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

import weightsmith as ws
from weightsmith.average import by_step
from weightsmith.average._parts import combination, in_order, opened_run
from weightsmith.errors import Error
from weightsmith.weights import Weights


@pytest.mark.parametrize(
    "names",
    [
        ["checkpoint-900", "checkpoint-1000", "checkpoint-20000"],
        ["run2/ckpt-9/", "run2/ckpt-10/", "run2/ckpt-0011/"],
        ["epoch=1-step=900.ckpt", "epoch=2-step=100.ckpt", "epoch=10-step=3.ckpt"],
        ["0.pt"],
        [],
    ],
)
def test_by_step(names: list[str]):
    shuffled = list(names)
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert by_step(shuffled) == names
    assert by_step(Path(name) for name in shuffled) == [Path(name) for name in names]


def test_names_that_tell_no_order():
    with pytest.raises(Error, match=r"checkpoint-9, final: these names differ in more than numbers"):
        by_step(["checkpoint-9/", "final/"])
    with pytest.raises(Error, match="two of these are the same checkpoint"):
        by_step(["checkpoint-9/", "checkpoint-10", "checkpoint-09"])
    assert in_order(["final/", "checkpoint-9/"]) == ["final/", "checkpoint-9/"]


def test_what_is_no_path_stays_where_it_is():
    later, earlier = {"w": torch.ones(1)}, {"w": torch.zeros(1)}
    assert in_order([later, "checkpoint-2", earlier, "checkpoint-1"]) == [
        later,
        "checkpoint-2",
        earlier,
        "checkpoint-1",
    ]


def test_a_run_on_disk_is_opened_by_step(tmp_path: Path):
    for number in (900, 1000):
        Weights.of({"w": torch.tensor([float(number)])}).save(tmp_path / f"checkpoint-{number}")
    paths = sorted(tmp_path.iterdir())
    assert [path.name for path in paths] == ["checkpoint-1000", "checkpoint-900"]  # as a shell sorts them
    assert [float(one["w"]) for one in opened_run(paths, "m")] == [900, 1000]


def test_what_is_no_run():
    with pytest.raises(Error, match="m takes a list of checkpoints of one run, got one str"):
        opened_run("checkpoint-1", "m")  # type: ignore[arg-type]
    with pytest.raises(Error, match="m needs at least 1 checkpoint, got 0"):
        opened_run([], "m")
    with pytest.raises(Error, match=r"m: model 1 and model 2 .*w \[2\] against \[3\]"):
        opened_run([{"w": torch.ones(2)}, {"w": torch.ones(3)}], "m")


def test_a_combination_by_hand():
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    run = [
        Weights.of({"w": value, "n": torch.tensor(i)}).with_files({"f": b"%d" % i}) for i, value in enumerate(values)
    ]
    mixed = combination(run, [0.5, -1.0, 1.5], "average.mine", {"a": 1})
    torch.testing.assert_close(mixed["w"], 0.5 * values[0] - values[1] + 1.5 * values[2])
    assert mixed["n"] == 2
    assert mixed.files["f"] == b"2"
    assert (mixed.lineage.method, mixed.lineage.options) == ("average.mine", {"a": 1})


def test_what_has_no_share_is_not_read():
    broken = Weights.of({"w": torch.full((2,), float("nan"))})
    fine = Weights.of({"w": torch.ones(2)})
    assert combination([fine, broken], [1.0, 0.0], "m", {})["w"].tolist() == [1, 1]
    with pytest.raises(Error, match="m: all 2 coefficients are 0"):
        combination([fine, broken], [0.0, 0.0], "m", {})


def test_narrow_floats_are_added_in_float32_and_rounded_once():
    values = (256.0, 258.0, 258.0)
    run = [Weights.of({"w": torch.tensor([value], dtype=torch.bfloat16)}) for value in values]
    mixed = combination(run, [1 / 3] * 3, "m", {})
    assert mixed.spec("w").dtype == torch.bfloat16
    assert mixed["w"].item() == 258  # 257.33; bfloat16 counts by twos here
    assert ws.average.lawa([{"w": run[0]["w"]}] * 3)["w"].item() == 256


def test_tied_weights_stay_tied():
    shared = torch.ones(2)
    run = [Weights.of({"a": shared, "b": shared}), Weights.of({"a": 3 * shared, "b": 3 * shared})]
    run[1] = Weights.of(dict.fromkeys(("a", "b"), run[1]["a"]))
    mixed = combination(run, [0.5, 0.5], "m", {})
    assert mixed.ties == {"b": "a"}
    assert mixed["b"].tolist() == [2, 2]
