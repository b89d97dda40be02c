"""``weightsmith verify``: exit status and what it says of several checkpoints."""

from __future__ import annotations

import json
import os


def test_sound_and_damaged(run, model, tuned):
    assert run("verify", model) == (0, f"{model}: ok: 4 tensors in 1 file, 928 B\n", "")
    os.truncate(tuned / "model.safetensors", 4200)
    status, out, _ = run("verify", model, tuned)
    assert status == 1
    assert out.splitlines()[0].startswith(f"{model}: ok")
    assert out.splitlines()[1].startswith("error: model.safetensors: truncated")
    assert out.splitlines()[2] == f"{tuned}: not ok: 0 tensors in 0 files, 0 B; 1 error"


def test_warnings_do_not_fail(run, model):
    model.with_name("model.partial").mkdir()
    status, out, _ = run("verify", model)
    assert status == 0
    assert out.startswith("warning: model.partial: ")
    assert out.endswith("; 1 warning\n")


def test_json(run, model, tmp_path):
    status, out, _ = run("verify", model, tmp_path / "nowhere", "--json")
    data = json.loads(out)
    assert status == 1
    assert data["ok"] is False
    assert [one["ok"] for one in data["checkpoints"]] == [True, False]
    assert data["checkpoints"][1]["findings"][0]["message"] == "no such file or folder"
