"""Real processes, each with its own share of the data, against one process with all of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weightsmith.errors import Error
from weightsmith.stats import Activations, Fisher, Gram, GuidedGram, collect, reduced
from weightsmith.weights import Weights

WHATS = ("norm", "mean", "mean_absolute", "maximum", "second_moment")
STATISTICS: dict[str, Any] = {
    "gram": Gram(),
    "blocks": Gram(form=1),
    "fisher": Fisher("given"),
    "guided": GuidedGram(2),
} | {what: Activations(what) for what in WHATS}


class Routed(nn.Module):
    """Two layers that share an input, of which one is left out when the data say so, and some for rare inputs."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.query, self.key, self.rare, self.never = (nn.Linear(3, 4) for _ in range(4))
            self.rarer = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        made = self.query(x) + self.key(x)
        return made + self.rare(x) + self.rarer(2 * x) if bool((x > 5).any()) else made


def shares() -> list[list[tuple[Tensor, Tensor]]]:
    """Of three processes: two batches, one large batch that alone goes to the rare layer, and none."""
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(n, 3, generator=generator), torch.arange(n) % 4) for n in (4, 1, 9)]
    data[2][0][0, 0] = 6.0
    return [data[:2], data[2:], []]


def gathered(rank: int, case: str) -> Any:
    model, own = Routed(), shares()[rank]
    if case == "together":
        return collect(model, own, STATISTICS, group="world")
    if case == "afterwards":
        return reduced(collect(model, own, STATISTICS) if own else None)
    if case == "alone":
        return {"": reduced(collect(model, own, {"gram": Gram()})["gram"] if own else None)}
    if case == "pairs":
        group = torch.distributed.new_group([1, 2])
        return collect(model, own, STATISTICS, group=group) if rank else {}
    if case == "wrong":
        if rank == 1:
            own[0][0][0, 0] = torch.nan
        return collect(model, own, {"gram": Gram()}, group="world")
    if case == "other kinds":
        return reduced({"x": collect(model, own, {"x": Gram() if rank else Activations()})["x"]} if own else None)
    if case == "other names":
        pattern = "query.*" if rank else "*"
        return reduced(collect(model, own, {"gram": Gram(pattern)})["gram"] if own else None)
    if case == "other shapes":
        return collect(model, own, {"gram": Gram(form=1 if rank else "diagonal")}, group="world")
    if case == "other words":
        return reduced(collect(model, own, {str(rank): Gram()}) if own else None)
    if case == "renamed":  # means over rows, of which the new names say nothing
        if not own:
            return reduced(None)
        means = collect(model, own, {"mean": Activations("mean", pattern="query.*")})["mean"]
        return reduced(means.rename(lambda name: f"x.{name}"))
    if case == "no statistic":
        return reduced(Weights.of({"x": torch.ones(2)}) if rank == 1 else None)
    assert case == "no data"
    return collect(model, [], {"gram": Gram()}, group="world")


CASES = (
    "together",
    "afterwards",
    "alone",
    "pairs",
    "wrong",
    "other kinds",
    "other names",
    "other shapes",
    "other words",
    "renamed",
    "no statistic",
    "no data",
)


def process(rank: int, folder: str) -> None:
    """What this file does when it is run as a program."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    found: dict[str, Any] = {}
    for case in CASES:
        try:
            one = gathered(rank, case)
            found[case] = {key: (dict(w), dict(w.metadata), w.ties) for key, w in one.items()}
        except Error as error:
            found[case] = f"Error: {error}"
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of three processes found, in every case."""
    folder = tmp_path_factory.mktemp("processes")
    started = [subprocess.Popen([sys.executable, __file__, str(rank), str(folder)]) for rank in range(3)]
    try:
        codes = [one.wait(timeout=300) for one in started]
    finally:
        for one in started:
            one.kill()
    assert codes == [0, 0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(3)]


def same(values: dict[str, Tensor], expected: Weights) -> None:
    assert list(values) == list(expected)
    for name in expected:
        assert values[name].dtype == expected[name].dtype
        torch.testing.assert_close(values[name], expected[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", ["together", "afterwards"])
def test_every_process_gets_what_one_finds_in_all_the_data(found, case: str):
    expected = collect(Routed(), [batch for share in shares() for batch in share], STATISTICS)
    for rank in range(3):
        assert list(found[rank][case]) == list(STATISTICS)
        for key, one in expected.items():
            values, metadata, _ = found[rank][case][key]
            same(values, one)
            assert metadata == one.metadata
            assert all(torch.equal(values[name], found[0][case][key][0][name]) for name in values)


def test_a_layer_that_one_process_called_and_one_that_none_did(found):
    for rank in range(3):
        values, _, ties = found[rank]["together"]["gram"]
        assert set(values) == {"query.weight", "key.weight", "rare.weight", "rarer.weight"}
        # In the process that has it, all three share their input; query and key do in both.
        assert ties == {"key.weight": "query.weight"}


def test_a_statistic_by_itself(found):
    expected = collect(Routed(), [batch for share in shares() for batch in share], {"gram": Gram()})["gram"]
    for rank in range(3):
        same(found[rank]["alone"][""][0], expected)


def test_some_of_the_processes(found):
    assert found[0]["pairs"] == {}
    expected = collect(Routed(), shares()[1], STATISTICS)
    for rank in (1, 2):
        for key, one in expected.items():
            same(found[rank]["pairs"][key][0], one)


ERRORS = {
    "other kinds": "Error: reduced: x needs statistics of one kind, got activations norm of inputs, gram",
    "other names": "Error: reduced needs statistics of one model: the second lacks key.weight, rare.weight, ",
    "other shapes": "Error: reduced: gram: query.weight is float32[3] in one process and float32[3, 1, 1] in another",
    "other words": "Error: processes gathered different statistics: [['0'], ['1']]",
    "renamed": "Error: the statistic does not say on how many rows x.query.weight rests; combine before renaming",
    "no data": "Error: statistics need at least one batch of data in one of the processes, got none",
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_go_together_is_an_error_in_every_process(found, case: str):
    for rank in range(3):
        assert found[rank][case].startswith(ERRORS[case])


def test_what_goes_wrong_in_one_process_is_an_error_in_all(found):
    for rank in range(3):
        said = found[rank]["wrong"]
        assert "key.weight: its inputs in batch 1 are not finite" in said
        assert said.startswith(
            "Error: key.weight" if rank == 1 else "Error: statistics of several processes: process 1:"
        )


def test_what_is_no_statistic_in_one_process_is_an_error_in_all(found):
    for rank in range(3):
        assert "these weights do not say of how many examples" in found[rank]["no statistic"]
        assert ("process 1: " in found[rank]["no statistic"]) == (rank != 1)


def test_one_process_alone(tmp_path: Path):
    with pytest.raises(Error, match="init_process_group first"):
        collect(Routed(), shares()[0], STATISTICS, group="world")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        expected = collect(Routed(), shares()[0], STATISTICS)
        made = collect(Routed(), shares()[0], STATISTICS, group="world")
    finally:
        torch.distributed.destroy_process_group()
    for key, one in expected.items():
        same(dict(made[key]), one)
        assert made[key].metadata == one.metadata


if __name__ == "__main__":
    process(int(sys.argv[1]), sys.argv[2])
