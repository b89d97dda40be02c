"""A checkpoint of a wanted size: it fits, and nothing that was tried was nearer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import weightsmith as ws
from weightsmith import calibration, quantize
from weightsmith.errors import Error
from weightsmith.quantize import RECIPES, auto, dequantize
from weightsmith.quantize._judged import Judge

SIZES: dict[str, Any] = {"samples": 4, "length": 32}
RECIPES_TRIED = ("nearest", "gptq")


def test_auto_fits_the_size_and_takes_what_is_nearest(llama: Path, tmp_path: Path):
    whole = ws.open(llama)
    for size in (whole.nbytes // 3, whole.nbytes * 2 // 7):
        found = auto(llama, size, calibrate=str(llama.parent / "near.txt"), group=8, recipes=RECIPES_TRIED, **SIZES)
        ties = found.ties
        assert sum(found.spec(name).nbytes for name in found if name not in ties) <= size
        told = found.lineage.options
        assert set(told["KL"]) == set(RECIPES_TRIED)
        assert told["chosen"] == min(told["KL"], key=told["KL"].get)
        assert "model.embed_tokens.weight" in quantize.codes(found)
    found.save(tmp_path / "q")
    judged = list(calibration.texts(llama, [llama.parent / "near.txt"], **SIZES))[:1]
    assert Judge(whole, judged)(dequantize(tmp_path / "q")) == pytest.approx(min(told["KL"].values()), rel=1e-3)


def test_auto_by_mean_bits_leaves_embeddings(llama: Path):
    found = auto(llama, bits=3.2, calibrate=str(llama.parent / "near.txt"), group=8, recipes=["nearest"], **SIZES)
    assert "model.embed_tokens.weight" in found
    assert all(code.grid.bits in (2, 3, 4, 5, 6, 8) for code in quantize.codes(found).values())


def test_every_recipe_runs(llama: Path):
    found = auto(llama, bits=3.0, calibrate=str(llama.parent / "near.txt"), group=8, **SIZES)
    assert set(found.lineage.options["KL"]) == set(RECIPES)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: auto(m, calibrate=t), "auto takes a size or bits"),
        (lambda m, t: auto(m, 100, calibrate=t), "100 bytes cannot be had"),
        (
            lambda m, t: auto(m, 3000, calibrate=t, group=8, **SIZES),
            r"3000 bytes cannot be had: with the fewest bits that are tried \(2; 4 for embeddings .* it is 6170",
        ),
        (lambda m, t: auto(m, bits=3.0, calibrate=t, recipes=["gptk"]), r"no recipe 'gptk' \(did you mean 'gptq'"),
    ],
)
def test_refusals(shared_llama: Path, call: Any, message: str):
    with pytest.raises(Error, match=message):
        call(shared_llama, str(shared_llama.parent / "near.txt"))
