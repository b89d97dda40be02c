"""Saving over a Ray cluster: real actors on this machine, killed where it hurts."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import weightsmith as ws
from weightsmith import progress
from weightsmith.errors import Error, OutputError
from weightsmith.weights import Weights, _bench, _lazy, _ray, _save, open

ray = pytest.importorskip("ray", reason='needs ray: pip install "weightsmith[ray]"')


def start() -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        "local", num_cpus=3, num_gpus=0, include_dashboard=False, object_store_memory=2**27, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[None]:
    """A cluster that is there already, as far as a save is concerned."""
    if not ray.is_initialized():
        start()
    yield
    assert ray.is_initialized(), "a save leaves alone what it did not start"


@pytest.fixture(scope="module", autouse=True)
def no_cluster_is_left() -> Iterator[None]:
    yield
    ray.shutdown()


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (_lazy, _save):
        monkeypatch.setattr(module, "UNIT", 2**12)


@pytest.fixture
def actors(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every actor that is started."""
    made: list[Any] = []

    class Known(_ray.Actor):
        def __init__(self, ray: Any):
            super().__init__(ray)
            made.append(self._actor)

    monkeypatch.setattr(_ray, "Actor", Known)
    return made


@pytest.fixture
def sources(tmp_path: Path) -> list[Weights]:
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        made = {f"l{i}.w": torch.randn(300, 200 + i, generator=generator).bfloat16() for i in range(4)}
        Weights.of(made | {"n": torch.tensor(3)}).save(tmp_path / f"m{seed}.safetensors")
    return [open(tmp_path / f"m{seed}.safetensors") for seed in range(4)]


def fingerprint(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda bench: os.getpid()))


def ties(models: list[Weights]) -> Weights:
    return ws.merge.ties(models[1:], models[0], density=0.3)


@pytest.mark.usefixtures("cluster", "small_units")
@pytest.mark.parametrize("case", [ties, lambda m: ws.merge.model_stock(m[1:], m[0]), lambda m: ws.merge.mean(m)])
def test_the_bytes_of_threads(case: Any, sources: list[Weights], tmp_path: Path, actors: list[Any]) -> None:
    case(sources).save(tmp_path / "threads")
    events: list[progress.Event] = []
    with progress.listening(events.append):
        case(sources).save(tmp_path / "ray", executor="ray", workers=2)
    assert fingerprint(tmp_path / "ray") == fingerprint(tmp_path / "threads")
    assert events[-1].done == events[-1].total
    assert len(actors) == 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.usefixtures("cluster", "small_units")
def test_an_actor_killed_in_the_middle(sources: list[Weights], tmp_path: Path, actors: list[Any]) -> None:
    ties(sources).save(tmp_path / "threads")
    killed: list[int] = []

    def kill(event: progress.Event) -> None:
        if 0 < event.done < event.total and not killed and len(actors) == 2:
            killed.append(pid_of(actors[0]))
            os.kill(killed[0], signal.SIGKILL)

    often = progress.OFTEN
    progress.OFTEN = 0.0
    try:
        with progress.listening(kill):
            ties(sources).save(tmp_path / "ray", executor="ray", workers=2)
    finally:
        progress.OFTEN = often
    assert len(killed) == 1
    assert len(actors) == 3
    assert pid_of_or_none(actors[0]) is None
    assert fingerprint(tmp_path / "ray") == fingerprint(tmp_path / "threads")


def pid_of_or_none(actor: Any) -> int | None:
    try:
        return pid_of(actor)
    except ray.exceptions.RayActorError:
        return None


@pytest.mark.usefixtures("cluster")
def test_a_piece_that_kills_every_actor(tmp_path: Path, actors: list[Any]) -> None:
    parent = os.getpid()

    def deadly(x: torch.Tensor) -> torch.Tensor:  # goes along by value, as ray brings cloudpickle
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    weights = Weights.of({"fine": torch.ones(10_000), "bad": torch.ones(3)})
    weights = weights.select("fine") | weights.select("bad").map(deadly)
    with pytest.raises(OutputError, match=r"tensor bad: the workers that compute it die .*4 times"):
        weights.save(tmp_path / "out", executor="ray", workers=1)
    assert len(actors) == 4
    assert weights.save(tmp_path / "out", resume=True, workers=None).resumed == 1


@pytest.mark.usefixtures("cluster")
def test_tensors_in_memory_and_errors(sources: list[Weights], tmp_path: Path) -> None:
    large = torch.randn(1500, 700, generator=torch.Generator().manual_seed(0))
    weights = Weights.of({"large": large.t(), "small": torch.ones(3)}) * 2
    weights.save(tmp_path / "a.safetensors", executor="ray", workers=1)
    assert torch.equal(open(tmp_path / "a.safetensors")["large"], large.t() * 2)
    with pytest.raises(Error, match=r"tensor big: the value 1e\+06 does not fit in float16"):
        Weights.of({"big": torch.full((300,), 1e6)}).cast("fp16").save(tmp_path / "b", executor="ray", workers=1)
    opening = _bench.Opening("elsewhere", (str(tmp_path / "nowhere"),), _lazy.CHUNK)
    bench = _bench.Bench()
    bench._open(opening)
    with pytest.raises(Error, match="a file system that all machines of the cluster share"):
        bench._output(0)


def test_a_cluster_of_its_own(sources: list[Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "local")
    folders: list[str] = []
    real = _ray.tempfile.mkdtemp
    monkeypatch.setattr(_ray.tempfile, "mkdtemp", lambda **options: folders.append(real(**options)) or folders[-1])
    ties(sources).save(tmp_path / "threads")
    ties(sources).save(tmp_path / "ray", executor="ray", workers=2)
    assert fingerprint(tmp_path / "ray") == fingerprint(tmp_path / "threads")
    assert not ray.is_initialized()
    assert len(folders) == 1
    assert not Path(folders[0]).exists()
