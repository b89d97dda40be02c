"""Quality against bytes, recipe by recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weightsmith.errors import Error
from weightsmith.quantize import frontier

SIZES: dict[str, Any] = {"samples": 4, "length": 32}


def test_the_frontier(llama: Path):
    near, far = llama.parent / "near.txt", llama.parent / "far.txt"
    found = frontier(llama, [far, near], calibrate=str(near), bits=(2, 4), group=8, windows=2, **SIZES)
    rows = found.rows()
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        if row["bits"] == 4:
            less = next(r for r in rows if (r["recipe"], r["text"], r["bits"]) == (row["recipe"], row["text"], 2))
            assert row["bytes in all"] > less["bytes in all"]
            assert row["bits a weight"] > less["bits a weight"]
    for text in {row["text"] for row in rows}:
        own = sorted((row["bytes in all"], row["KL"], row["best"]) for row in rows if row["text"] == text)
        least = float("inf")
        for size in dict.fromkeys(size for size, _, _ in own):  # the nearest so far, as sizes grow
            least = min(least, *(nats for other, nats, _ in own if other == size), least)
            assert all(best == (nats == least) for other, nats, best in own if other == size)
    assert len(found.plots) == 2
    assert any("fingerprint" in note for note in found.notes)
    assert any("Warning" in note and "near.txt" in note for note in found.notes)
    assert not any("Warning" in note and "far.txt" in note for note in found.notes)
    assert "Divergence over size" in found.html()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: frontier(m, [], calibrate=t), "at least one text"),
        (lambda m, t: frontier(m, [t], calibrate=t, recipes=["x"]), "there is no recipe 'x'"),
    ],
)
def test_refusals(shared_llama: Path, call: Any, message: str):
    with pytest.raises(Error, match=message):
        call(shared_llama, str(shared_llama.parent / "near.txt"))
