"""The scripts, and a real bash that completes with one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import weightsmith

SOURCE = str(Path(weightsmith.__file__).parents[1])


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(run, shell, monkeypatch):
    status, out, err = run("completion", shell)
    assert (status, err) == (0, "")
    assert f"_WEIGHTSMITH_COMPLETE={shell}_complete" in out
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    assert run("completion")[1] == out


def test_an_unknown_shell(run, monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/tcsh")
    status, _, err = run("completion")
    assert status == 2
    assert "'tcsh'" in err


@pytest.fixture
def complete(tmp_path, run):
    """What bash offers for a line whose last word is unfinished."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    script = tmp_path / "complete.sh"
    script.write_text(run("completion", "bash")[1])
    command = tmp_path / "bin" / "weightsmith"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m weightsmith "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": SOURCE, "PATH": f"{command.parent}:{os.environ['PATH']}"}

    def call(line):
        words = line.split(" ")
        asked = (
            f"source {script} && complete -p weightsmith && COMP_WORDS=({' '.join(w or chr(34) * 2 for w in words)}) "
            f'COMP_CWORD={len(words) - 1} && _weightsmith_completion weightsmith && printf "%s\\n" "${{COMPREPLY[@]}}"'
        )
        done = subprocess.run(
            [bash, "-c", asked], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        first, *offers = done.stdout.splitlines()
        assert first.startswith("complete ")
        return offers

    return call


def test_bash_completes(complete):
    assert complete("weightsmith sho") == ["show"]
    assert "magnitude" in complete("weightsmith prune ")
    assert complete("weightsmith diff a b --sort lar") == ["largest"]
    assert complete("weightsmith convert x --over") == ["--overwrite"]
    assert complete("weightsmith prune magnitude x --scope g") == ["global"]
    assert complete("weightsmith convert x --dtype bf") == ["bfloat16"]
