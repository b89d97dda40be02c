"""``weightsmith average``: the latest, the best combination, another length of memory."""

from __future__ import annotations

import json

import pytest
import torch

import weightsmith
from weightsmith.weights import Weights

RUN = torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(0))
STEPS = [100 * number for number in range(5, 13)]  # 500 to 1200: a shell sorts 1000 before 500


@pytest.fixture
def checkpoints(tmp_path):
    """Eight checkpoints of a run, as a shell lists them."""
    for step, moment in zip(STEPS, RUN, strict=True):
        weights = Weights.of({"w": moment, "n": torch.tensor(step)})
        weights.with_files({"config.json": b'{"step": %d}' % step}).save(tmp_path / f"checkpoint-{step}")
    return sorted(tmp_path.iterdir())


@pytest.fixture
def judge(tmp_path):
    """A spec: nearer to twice the last less the one before is better, which no average reaches."""
    goal = tmp_path / "goal.pt"
    torch.save(2 * RUN[-1] - RUN[-2], goal)
    text = f"import torch\ngoal = torch.load({str(goal)!r})\ndef near(w): return -float((w['w'] - goal).norm())\n"
    (tmp_path / "judge.py").write_text(text)
    return f"{tmp_path / 'judge.py'}:near"


def made(path, expected):
    torch.testing.assert_close(weightsmith.open(path)["w"], expected)


def test_the_latest_by_their_steps(run, checkpoints, tmp_path):
    status, out, err = run("average", *checkpoints, "--last", "3", "-o", tmp_path / "out")
    assert status == 0
    assert out.splitlines()[0] == f"mean of 3 checkpoints, {tmp_path}/checkpoint-1000 to {tmp_path}/checkpoint-1200"
    assert out.splitlines()[1].startswith(f"{tmp_path}/out: 2 tensors")
    assert err == (
        f"weightsmith: note: taken by their numbers, {tmp_path}/checkpoint-500 to {tmp_path}/checkpoint-1200\n"
    )
    made(tmp_path / "out", RUN[-3:].mean(0))
    assert weightsmith.open(tmp_path / "out")["n"] == 1200
    assert json.loads((tmp_path / "out" / "config.json").read_text())["step"] == 1200


def test_six_where_nothing_is_said(run, checkpoints, tmp_path):
    assert run("average", *checkpoints, "-o", tmp_path / "out")[0] == 0
    made(tmp_path / "out", RUN[-6:].mean(0))
    in_order = [tmp_path / f"checkpoint-{step}" for step in STEPS[:2]]
    status, out, err = run("average", *in_order, "-o", tmp_path / "two.safetensors", "--dtype", "float64")
    assert (status, err) == (0, "")
    assert out.startswith("mean of 2 checkpoints, ")
    made(tmp_path / "two.safetensors", RUN[:2].mean(0).double())


def test_names_that_tell_no_order(run, checkpoints, tmp_path):
    checkpoints[0].rename(tmp_path / "final")
    paths = [tmp_path / "final", *checkpoints[1:3]]
    status, _, err = run("average", *paths, "--last", "1", "-o", tmp_path / "out")
    assert status == 0
    assert "note: taken in the order given: " in err
    assert "differ in more than numbers" in err
    made(tmp_path / "out", weightsmith.open(checkpoints[2])["w"])


def test_json_alone(run, checkpoints, tmp_path):
    status, out, _ = run("average", *checkpoints, "-o", tmp_path / "out", "--json")
    assert status == 0
    assert json.loads(out)["tensors"] == 2
    assert json.loads(out)["average"] == {"last": 6}


# Search


def test_a_search(run, checkpoints, judge, tmp_path):
    arguments = ["--search", "--evaluate", judge, "--budget", "40", "--seed", "3", "-o", tmp_path / "out"]
    status, out, _ = run("average", *checkpoints, *arguments)
    assert status == 0
    lines = out.splitlines()
    assert [line.split(": ")[0] for line in lines[:8]] == [f"{tmp_path}/checkpoint-{step}" for step in STEPS]
    assert lines[8].startswith("score -")
    assert lines[8].endswith("the best of 40 evaluations")
    from weightsmith.evaluators import evaluator

    expected = weightsmith.average.lcsc(checkpoints, evaluator(judge), budget=40, seed=3)
    made(tmp_path / "out", expected["w"])
    said = [float(line.split(": ")[1]) for line in lines[:8]]
    assert said == pytest.approx(expected.lineage.options["coefficients"], abs=1e-4)
    assert sum(said) == pytest.approx(1, abs=1e-3)


def test_a_search_among_the_latest(run, checkpoints, judge, tmp_path):
    arguments = ["--search", "--evaluate", judge, "--budget", "12", "--last", "2", "-o", tmp_path / "out"]
    status, out, _ = run("average", *checkpoints, *arguments)
    assert status == 0
    assert len(out.splitlines()) == 4
    assert run("average", *checkpoints, *arguments[:-1], tmp_path / "again", "--json")[0] == 0
    made(tmp_path / "again", weightsmith.open(tmp_path / "out")["w"])


def test_what_would_stop_the_save_is_found_before_the_search(run, checkpoints, tmp_path):
    (tmp_path / "judge.py").write_text(f"def score(w):\n    open({str(tmp_path / 'asked')!r}, 'w')\n    return 1\n")
    search = ["--search", "--evaluate", f"{tmp_path / 'judge.py'}:score"]
    for output, message in (
        (checkpoints[0], "; choose another place"),
        (tmp_path / "judge.py" / "x", ""),
        (tmp_path / "out.gguf", "cannot write gguf"),
    ):
        status, _, err = run("average", *checkpoints, *search, "-o", output)
        assert status == 2
        assert message in err
    status, _, err = run("average", *checkpoints, *search, "-o", tmp_path / "out", "--dtype", "float31")
    assert (status, "float31" in err) == (2, True)
    Weights.of({"w": torch.ones(1)}).save(tmp_path / "taken")
    assert "exists; choose another place" in run("average", *checkpoints, *search, "-o", tmp_path / "taken")[2]
    assert not (tmp_path / "asked").exists()
    assert run("average", *checkpoints, *search, "--budget", "13", "-o", tmp_path / "taken", "--overwrite")[0] == 0
    assert (tmp_path / "asked").exists()


# Another length


@pytest.fixture
def snapshots(tmp_path):
    """Two averages of a walk, stored every 20 of 200 steps; and where each step was."""
    walk = 5 + torch.randn(200, 4, generator=torch.Generator().manual_seed(1)).cumsum(0) / 14
    averages = {sigma: weightsmith.average.power_ema(sigma_rel=sigma) for sigma in (0.05, 0.1)}
    for step, moment in enumerate(walk, start=1):
        for sigma, average in averages.items():
            average.update({"w": moment})
            if step % 20 == 0:
                average.weights().save(tmp_path / f"ema-{sigma}-{step}.safetensors")
    return walk


@pytest.mark.parametrize(("more", "steps"), [([], 200), (["--step", "140"], 140)])
def test_another_length(run, snapshots, tmp_path, more, steps):
    paths = sorted(tmp_path.glob("ema-*"))
    status, out, err = run("average", *paths, "--sigma-rel", "0.15", *more, "-o", tmp_path / "out")
    assert (status, err) == (0, "")
    assert out.startswith(f"sigma_rel 0.15 at step {steps}, of 20 snapshots; what they cannot tell: ")
    wanted = weightsmith.average.power_ema(sigma_rel=0.15)
    for moment in snapshots[:steps]:
        wanted.update({"w": moment})
    moved = float((snapshots[steps - 1] - wanted.weights()["w"]).norm())
    assert float((weightsmith.open(tmp_path / "out")["w"] - wanted.weights()["w"]).norm()) < 0.02 * moved


def test_what_is_no_snapshot(run, checkpoints, tmp_path):
    status, _, err = run("average", *checkpoints, "--sigma-rel", "0.1", "-o", tmp_path / "out")
    assert status == 2
    assert "does not say that it is a snapshot of power_ema" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--search"], "--search needs --evaluate"),
        (["--evaluate", "x.py:f"], "--evaluate is for --search"),
        (["--budget", "50"], "--budget is for --search"),
        (["--seed", "0"], "--seed is for --search"),
        (["--sigma-rel", "0.1", "--last", "3"], "--sigma-rel takes all snapshots, and goes without --last"),
        (["--sigma-rel", "0.1", "--search", "--evaluate", "x.py:f"], "goes without --search"),
        (["--step", "3"], "--step is for --sigma-rel"),
        (["--last", "0"], "--last"),
        (["--sigma-rel", "0.4"], "sigma_rel is the length of an average as a share of the run"),
        (["--search", "--evaluate", "nowhere.py:f"], "nowhere.py: no such file"),
        (["--search", "--evaluate", "accuracy"], "'accuracy' is no evaluator; write"),
    ],
)
def test_what_does_not_go_together(run, snapshots, tmp_path, arguments, message):
    paths = sorted(tmp_path.glob("ema-0.05-*"))
    status, _, err = run("average", *paths, *arguments, "-o", tmp_path / "out")
    assert status == 2
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_budget_too_small_is_said_before_anything_is_asked(run, checkpoints, judge, tmp_path):
    arguments = ["--search", "--evaluate", judge, "--budget", "5", "-o", tmp_path / "out"]
    status, _, err = run("average", *checkpoints, *arguments)
    assert status == 2
    assert "lcsc needs budget= of at least 13 for 8 checkpoints, got 5" in err


def test_it_is_a_command_and_no_group(run):
    status, out, _ = run("average", "--help")
    assert status == 0
    assert "CHECKPOINT..." in out
    assert all(word in out for word in ("--last", "--search", "--evaluate", "--sigma-rel", "Exit status"))
