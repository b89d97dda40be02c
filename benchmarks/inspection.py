"""How fast and how small inspecting is, as ratios within one run to the packages that do the same.

    python benchmarks/inspection.py                     # a network of 0.6 million weights, a checkpoint of 1 GB
    python benchmarks/inspection.py --small             # a tenth of that
    python benchmarks/inspection.py --jobs line trace --rounds 1

Lines and planes against loss-landscapes, eigenvalues, traces and spectral densities against PyHessian, spectra of
weights against weightwatcher, figures and differences of checkpoints against loops over safetensors. Where a peer is
not installed or does not run, the table says so and has our figures alone. Both sides get the same network, examples,
points, and numbers of products with the Hessian; PyHessian's density is given the function that PyTorch has taken
away from it. Every job runs in a process of its own and is measured as in ``io.py``: user + system seconds of the
work itself, after imports and the making of inputs, and the peak of the memory beyond what was resident then. Rounds
alternate, medians are compared.

The file is not called ``inspect.py``: scripts beside it would import it in place of Python's own module.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any


def shared() -> Any:
    """``io.py`` beside this file, whose name belongs to Python's own module."""
    spec = importlib.util.spec_from_file_location("benchmark_io", Path(__file__).with_name("io.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# What each job sees: `small`, and with `io.py`'s prelude `source`, `target`, `begin` and `end`; `other` lies beside.
FILES = "other = source.replace('source', 'other')\n"
NETWORK = """
from torch import nn
torch.manual_seed(0)
wide = 64 if small else 256

def network():
    return nn.Sequential(
        nn.Conv2d(1, 24, 5, stride=2, padding=2), nn.ReLU(), nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48 * 49, wide), nn.ReLU(), nn.Linear(wide, 10)).eval()

a, b, c = network(), network(), network()
count = 128 if small else 512
x, y = torch.randn(count, 1, 28, 28), torch.randint(0, 10, (count,))
"""

OURS = NETWORK + "import weightsmith as ws\nroom = ws.inspect.landscape\nroom.line\n"
LANDSCAPES = NETWORK + "import loss_landscapes\nfrom loss_landscapes.metrics import Loss\n"
LANDSCAPES += "metric = Loss(nn.CrossEntropyLoss(), x, y)\n"
PYHESSIAN = (
    NETWORK
    + """
import warnings
warnings.simplefilter("ignore")
import pyhessian

def eig(matrix, eigenvectors=True):
    values, vectors = torch.linalg.eigh(matrix)
    return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

torch.eig = eig
"""
)
OUR_FILES = FILES + "import weightsmith as ws\nws.inspect.summary\n"
LOOP = FILES + "from safetensors import safe_open\n"
WATCHER = FILES + "import weightwatcher\nfrom safetensors.torch import load_file\n"

THEIR_HESSIAN = "found = pyhessian.hessian(a, nn.CrossEntropyLoss(), data=(x, y), cuda=False)\n"

# Job -> (name of theirs, the package it needs, start of ours, ours, start of theirs, theirs)
JOBS: dict[str, tuple[str, str, str, str, str, str]] = {
    "line": (
        "loss-landscapes",
        "loss_landscapes",
        OURS,
        "room.path(a, [a, b], None, [(x, y)], steps=30)",
        LANDSCAPES,
        "loss_landscapes.linear_interpolation(a, b, metric, steps=30)",
    ),
    "plane": (
        "loss-landscapes",
        "loss_landscapes",
        OURS,
        "room.plane(a, None, [(x, y)], directions=(room.between(a, b), room.between(a, c)), span=(0, 1), steps=9)",
        LANDSCAPES,
        "loss_landscapes.planar_interpolation(a, b, c, metric, steps=9)",
    ),
    "eigenvalues": (
        "PyHessian",
        "pyhessian",
        OURS,
        "room.top_eigen(a, None, [(x, y)], count=2, tolerance=1e-2)",
        PYHESSIAN,
        THEIR_HESSIAN + "found.eigenvalues(maxIter=100, tol=1e-3, top_n=2)",
    ),
    "trace": (
        "PyHessian",
        "pyhessian",
        OURS,
        "room.trace(a, None, [(x, y)], probes=20)",
        PYHESSIAN,
        THEIR_HESSIAN + "found.trace(maxIter=20, tol=0)",
    ),
    "density": (
        "PyHessian",
        "pyhessian",
        OURS,
        "room.spectral_density(a, None, [(x, y)], steps=20)",
        PYHESSIAN,
        THEIR_HESSIAN + "found.density(iter=20, n_v=1)",
    ),
    "figures": (
        "loop over safetensors",
        "safetensors",
        OUR_FILES,
        "ws.inspect.summary(ws.open(source), stats=True)",
        LOOP,
        """
with safe_open(source, "pt") as file:
    for name in file.keys():
        w = file.get_tensor(name).float()
        w.norm().item(), w.mean().item(), w.std().item(), w.min().item(), w.max().item()
        (w == 0).sum().item(), (~w.isfinite()).sum().item()
""",
    ),
    "difference": (
        "loop over safetensors",
        "safetensors",
        OUR_FILES,
        "ws.inspect.diff(ws.open(source), ws.open(other))",
        LOOP,
        """
with safe_open(source, "pt") as file, safe_open(other, "pt") as second:
    for name in file.keys():
        a, b = file.get_tensor(name).float(), second.get_tensor(name).float()
        d = b - a
        d.norm().item(), a.norm().item(), b.norm().item(), (a * b).sum().item()
        d.abs().max().item(), (d != 0).sum().item()
""",
    ),
    "spectra": (
        "weightwatcher",
        "weightwatcher",
        OUR_FILES,
        "ws.inspect.summary(ws.open(source).select('*.0.*'), spectra=True)",
        WATCHER,
        """
tensors = {name: value.float() for name, value in load_file(source).items() if ".0." in name}
layers = torch.nn.ModuleList(torch.nn.Linear(*reversed(value.shape), bias=False) for value in tensors.values())
for layer, value in zip(layers, tensors.values()):
    layer.weight.data = value
weightwatcher.WeightWatcher(model=layers).analyze(plot=False, randomize=False)
""",
    ),
}


def make(folder: Path, gigabytes: float) -> tuple[Path, Path]:
    """Two bf16 checkpoints of one shape, of random values."""
    import torch

    import weightsmith as ws

    found = []
    for index, name in enumerate(("source", "other")):
        generator = torch.Generator().manual_seed(index)
        layers = max(round(gigabytes * 1e9 / (2 * 1024 * 4096)), 2)
        tensors = {f"layers.{i}.weight": torch.randn(1024, 4096, generator=generator).bfloat16() for i in range(layers)}
        place = folder / f"{name}.safetensors"
        ws.open(tensors).save(place, max_shard_size=None)
        found.append(place)
    return found[0], found[1]


def compared(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of both sides of every job, alternating, each beyond its own start."""
    source, other = make(place, 0.1 if options.small else options.gigabytes)
    for path in (source, other):
        path.read_bytes()
    measuring, figures = shared(), {}
    for job in options.jobs:
        name, package, *parts = JOBS[job]
        sides, missing = {"ours": parts[:2], "theirs": parts[2:]}, ""
        if importlib.util.find_spec(package) is None:
            missing = "not installed"
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for _ in range(options.rounds):
            for side, (start, work) in sides.items():
                if side == "theirs" and missing:
                    continue
                measuring.JOBS[job] = f"small = {options.small}\n{start}\nbegin()\n{work}\nend()\n"
                try:
                    runs[side].append(measuring.measure(job, source, place / "target", options.threads))
                except SystemExit as error:  # what the job said last, after its name
                    if side == "ours":
                        raise
                    missing = "does not run: " + str(error).strip().splitlines()[-1].replace("|", "/")
        if missing:
            runs.pop("theirs")
        figures[job] = {"peer": name, "missing": missing} | {
            side: {key: statistics.median(run[key] for run in found) for key in ("cpu", "wall", "memory")}
            for side, found in runs.items()
        }
    machine = {"processor": platform.processor() or platform.machine(), "threads": options.threads}
    return {
        "rounds": options.rounds,
        "small": options.small,
        "machine": machine,
        "versions": versions(),
        "jobs": figures,
    }


def versions() -> dict[str, str]:
    """Of what is compared."""
    known = ("torch", "loss-landscapes", "PyHessian", "weightwatcher", "safetensors")
    found = {}
    for name in known:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def rendered(figures: dict[str, Any]) -> str:
    """The table for people."""
    lines = [
        f"medians of {figures['rounds']}, {figures['machine']['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in figures["versions"].items()),
        "",
        "| job | CPU s | wall s | memory MB | peer | CPU s | wall s | memory MB | CPU / ours | memory / ours |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for job, found in figures["jobs"].items():
        ours, theirs = found["ours"], found.get("theirs")
        row = f"| {job} | {ours['cpu']:.2f} | {ours['wall']:.2f} | {ours['memory'] / 1e6:.0f} | {found['peer']} "
        if theirs:
            row += f"| {theirs['cpu']:.2f} | {theirs['wall']:.2f} | {theirs['memory'] / 1e6:.0f} "
            row += f"| {ratio(theirs['cpu'], ours['cpu'])} | {ratio(theirs['memory'], ours['memory'])} |"
        else:
            row += f"| {found['missing']} | | | | |"
        lines.append(row)
    return "\n".join(lines)


def ratio(theirs: float, ours: float) -> str:
    """How many times ours."""
    return f"{theirs / ours:.2f}" if ours > 0 else "-"


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of a checkpoint")
    parser.add_argument("--small", action="store_true", help="a tenth of the checkpoint, a smaller network")
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to work (needs twice the size of a checkpoint)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="weightsmith-benchmark-") as place:
        figures = compared(Path(place), options)
    print(rendered(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
