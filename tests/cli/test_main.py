"""What all commands share: errors on one line, JSON alone on standard output, no torch where none is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
import torch

import weightsmith
from weightsmith import cli
from weightsmith.cli import SECTIONS, main, root
from weightsmith.cli._rooms import rooms
from weightsmith.weights import Weights

SOURCE = str(Path(weightsmith.__file__).parents[1])

WITHOUT_TORCH = """
import sys
from weightsmith.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.exit("torch" in sys.modules)
"""


def commands():
    """Every command, however deep, as its words."""

    def walk(command, words):
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=words[-1] if words else "weightsmith")
            for name in command.list_commands(context):
                yield from walk(command.get_command(context, name), (*words, name))
        else:
            yield words

    return list(walk(root(), ()))


def test_the_commands_are_those_of_the_sections_and_rooms():
    first = {words[0] for words in commands()}
    assert first == {name for names in SECTIONS.values() for name in names} | set(rooms())
    assert {"merge", "prune", "quantize"} <= first


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_help_page(run, words):
    status, out, err = run(*words, "--help")
    assert (status, err) == (0, "")
    assert out.startswith("Usage: weightsmith " + " ".join(words))
    assert max(map(len, out.splitlines())) <= 100


def test_the_help_of_a_manual_page_has_its_parts(run):
    _, out, _ = run("convert", "-h")
    parts = [
        "Usage:",
        "Write the weights of PATH",
        "Which tensors:",
        "Output:",
        "default: 5GB",
        "Examples:",
        "Exit status:",
    ]
    places = [out.index(part) for part in parts]
    assert places == sorted(places)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["show", "--help"], ["methods"], ["prune", "magnitude", "-h"]]
)
def test_without_torch(shell, arguments):
    done = shell(*arguments, code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_completion_without_torch(shell):
    env = {
        "_WEIGHTSMITH_COMPLETE": "bash_complete",
        "COMP_WORDS": "weightsmith prune magnitude --spar",
        "COMP_CWORD": "3",
    }
    done = shell(code=WITHOUT_TORCH, env=env)
    assert (done.returncode, done.stdout) == (0, "plain,--sparsity\n")


def test_an_error_is_one_line(run, tmp_path):
    status, out, err = run("show", tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert err == f"weightsmith: error: {tmp_path}/nowhere: no such file or folder\n"


def test_an_error_with_json_is_json_as_well(run, tmp_path):
    status, out, err = run("show", tmp_path / "nowhere", "--json")
    assert status == 2
    assert json.loads(out) == {"error": f"{tmp_path}/nowhere: no such file or folder"}
    assert err.startswith("weightsmith: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sho"], "no command 'sho' (did you mean 'show'?); try weightsmith --help"),
        (["merge", "maen"], "no method 'maen' in merge (did you mean 'mean'?); try weightsmith merge --help"),
        (["show"], "Missing argument 'PATH'"),
        (["convert", "x"], "Missing option '-o' / '--output'; try weightsmith convert --help"),
        (["show", "x", "--lairs"], "No such option"),
    ],
)
def test_a_wrong_command_line(run, arguments, message):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_what_a_file_says_cannot_steer_the_terminal(run, tmp_path):
    Weights.of({"a\x1b[31m\nb": torch.ones(2)}).save(tmp_path / "w.safetensors")
    _, out, _ = run("show", tmp_path / "w.safetensors")
    assert "\x1b" not in out
    assert r"a\x1b[31m\nb" in out
    _, out, _ = run("show", tmp_path / "w.safetensors", "--json")
    assert json.loads(out)["tensors"][0]["name"] == "a\x1b[31m\nb"


def test_interrupted(run, monkeypatch, model, tmp_path):
    def stop(*arguments, **options):
        (tmp_path / "out.partial").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(Weights, "save", stop)
    status, _, err = run("convert", model, "-o", tmp_path / "out")
    assert status == 130
    assert "--resume goes on" in err


def test_a_real_interrupt_and_its_resume(run, tmp_path):
    Weights.of({f"w{i}": torch.randn(1000, 1000) for i in range(6)}).save(tmp_path / "big")
    # Every piece of the output waits a moment, so that the signal arrives in the middle.
    slow = (
        "import sys, time, weightsmith.weights._save as s; old = s._pwrite\n"
        "def pwrite(*a):\n    time.sleep(0.5); old(*a)\n"
        "s._pwrite = pwrite\nfrom weightsmith.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", slow, "convert", tmp_path / "big", "-o", tmp_path / "out", "--threads", "1"]
    environment = os.environ | {"PYTHONPATH": SOURCE}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "out.partial" / "journal"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not journal.exists():
        time.sleep(0.02)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (130, ""), err
    assert "--resume goes on from here" in err
    assert not (tmp_path / "out").exists()
    status, said, _ = run("convert", tmp_path / "big", "-o", tmp_path / "out", "--threads", "1", "--resume", "--json")
    assert status == 0
    assert json.loads(said)["tensors"] == 6
    assert run("diff", tmp_path / "big", tmp_path / "out")[0] == 0


def test_a_reader_that_has_enough(model, tmp_path):
    line = f"{sys.executable} -m weightsmith show {model} --json | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], env=os.environ | {"PYTHONPATH": SOURCE}, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert done.stdout.startswith("{")
    assert done.stdout.strip("{\n") in ("0", "141")  # 0 where it all fitted into the pipe


def test_a_reader_that_is_gone():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", "completion", "bash"],
        env=os.environ | {"PYTHONPATH": SOURCE},
        stdout=write,
        stderr=subprocess.PIPE,
        timeout=60,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_mistake_of_ours_is_not_hidden(monkeypatch):
    monkeypatch.setattr(cli.Root, "get_command", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["show", "x"])
