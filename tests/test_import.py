"""What importing costs."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys

import pytest

import weightsmith

HEAVY = ("torch", "numpy", "click", "rich", "safetensors", "transformers", "gguf", "fsspec", "matplotlib", "sklearn")


def after(code: str, before: str = "pass") -> tuple[set[str], float]:
    """The modules that ``code`` brings to those of ``before``, and the seconds it takes."""
    report = f"import json, sys, time; {before}; there = set(sys.modules); began = time.perf_counter(); {code}; "
    report += "seconds = time.perf_counter() - began; print(json.dumps([sorted(sys.modules.keys() - there), seconds]))"
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    modules, seconds = json.loads(run.stdout)
    return set(modules), seconds


def loaded(code: str) -> set[str]:
    return after(code)[0]


@pytest.mark.parametrize("module", ["weightsmith", "weightsmith.errors", "weightsmith.card", "weightsmith.progress"])
def test_what_needs_no_tensors_imports_no_torch(module: str) -> None:
    assert not loaded(f"import {module}") & set(HEAVY)


def test_names_are_listed_without_importing_them() -> None:
    assert not loaded("import weightsmith; dir(weightsmith); weightsmith.Error; weightsmith.__version__") & set(HEAVY)


def test_importing_is_fast() -> None:
    assert min(after("import weightsmith")[1] for _ in range(3)) < 0.25


def test_weights_cost_little_over_torch() -> None:
    needed = "import torch, numpy, uuid, ctypes, hashlib, concurrent.futures"
    modules, seconds = after("import weightsmith.weights", before=needed)
    others = {name for name in modules if not name.startswith("weightsmith")}
    assert len(others) < 25, sorted(others)
    assert not others & set(HEAVY)
    assert seconds < 1


def test_optional_packages_are_imported_where_they_are_used() -> None:
    names = loaded("import weightsmith; weightsmith.weights; weightsmith.open; weightsmith.Weights")
    assert not names & (set(HEAVY) - {"torch", "numpy"})
    assert not any(name.startswith("torch._dynamo") for name in names)


def test_public_names() -> None:
    for name in weightsmith.__all__:
        assert getattr(weightsmith, name) is not None
    assert set(weightsmith.__all__) <= set(dir(weightsmith))
    assert weightsmith.open is weightsmith.weights.open
    with pytest.raises(AttributeError, match="module 'weightsmith' has no attribute 'opne'"):
        weightsmith.opne  # noqa: B018


def test_the_weights_room_names_only_what_exists() -> None:
    assert sorted(set(weightsmith.weights.__all__)) == sorted(weightsmith.weights.__all__)
    for name in weightsmith.weights.__all__:
        assert hasattr(weightsmith.weights, name)
    private = [m.name for m in pkgutil.iter_modules(weightsmith.weights.__path__) if not m.name.startswith("_")]
    assert private == [], "everything public is in the room's own list"
