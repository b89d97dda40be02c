"""How fast and how small merging is, as ratios within one run to `cp` of one input and to mergekit.

    python benchmarks/merge.py                              # three models of 1.1 billion parameters and their base
    python benchmarks/merge.py --small                      # a tenth of that
    python benchmarks/merge.py --methods ties mean --rounds 1 --without-mergekit

The models are of Llama's shape in bfloat16, made here: a base of random values and three fine-tunes that
differ from it by small ones. Every job runs in a process of its own, the start of Python and all imports
included, since who merges pays for them; what a process takes to import the library is shown beside it.
CPU is user + system seconds; memory is the peak resident memory of the process. Rounds alternate
between the jobs, the medians are compared, and inputs are in the page cache. mergekit runs as its
command line does, where it is installed (`pip install "weightsmith[peers]"`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HIDDEN, INNER, KEYS, VOCABULARY, LAYERS = 2048, 5632, 256, 32000, 22
MODELS = ("a", "b", "c")

# Method -> mergekit's name, how many models it takes, whether it is given the base, and mergekit's parameters.
METHODS: dict[str, tuple[str, int, bool, dict[str, Any]]] = {
    "mean": ("linear", 3, False, {}),
    "task_arithmetic": ("task_arithmetic", 3, True, {}),
    "ties": ("ties", 3, True, {"density": 0.2}),
    "dare_ties": ("dare_ties", 3, True, {"density": 0.5}),
    "slerp": ("slerp", 2, False, {"t": 0.5}),
    "karcher": ("karcher", 3, False, {}),
    "model_stock": ("model_stock", 3, True, {}),
}

OURS = """
import sys
import weightsmith as ws
method, count, based, source, target = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True", sys.argv[4], sys.argv[5]
models = [ws.open(f"{source}/{name}") for name in "abc"[:count]]
base = {"base": ws.open(f"{source}/base")} if based else {}
getattr(ws.merge, method)(models, **base).save(target)
"""


# The models


@dataclass
class Drawn:
    """A tensor of random values that is made while it is written: ``0.02 n``, and for a fine-tune ``0.002 n`` more."""

    spec: Any
    seed: int
    model: int
    grain: int = 2**17

    def read(self, start: int, stop: int, scratch: object) -> Any:
        import torch

        def normal(seed: int) -> torch.Tensor:
            return torch.randn(stop - start, generator=torch.Generator().manual_seed(seed))

        place = self.seed * 1_000_003 + start // self.grain
        base = (0.02 * normal(place)).bfloat16().float()
        return base + 0.002 * normal(place + 7919 * self.model) if self.model else base

    def inputs(self) -> tuple[()]:
        return ()

    def identity(self) -> object:
        return ["drawn", self.seed, self.model]


def shapes(share: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of a model of Llama's shape with 1.1 billion parameters, or with a share of its layers and words."""
    words = round(VOCABULARY * share)
    yield "model.embed_tokens.weight", (words, HIDDEN)
    for layer in range(max(round(LAYERS * share), 1)):
        parts = {"q": (HIDDEN, HIDDEN), "k": (KEYS, HIDDEN), "v": (KEYS, HIDDEN), "o": (HIDDEN, HIDDEN)}
        for part, shape in parts.items():
            yield f"model.layers.{layer}.self_attn.{part}_proj.weight", shape
        for part, shape in {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}.items():
            yield f"model.layers.{layer}.mlp.{part}_proj.weight", shape
        for norm in ("input", "post_attention"):
            yield f"model.layers.{layer}.{norm}_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (words, HIDDEN)


def make(folder: Path, share: float) -> int:
    """The base and the models as checkpoints. Returns the bytes of one."""
    import torch

    from weightsmith.weights import Spec, Weights

    found = dict(shapes(share))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": max(round(LAYERS * share), 1),
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": round(VOCABULARY * share),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    size = 0
    for model, name in enumerate(("base", *MODELS)):
        nodes = {n: Drawn(Spec(shape, torch.bfloat16), seed, model) for seed, (n, shape) in enumerate(found.items())}
        weights = Weights(nodes).with_files({"config.json": json.dumps(config).encode()})
        size = weights.save(folder / name).nbytes
    return size


# The jobs


def command_of(method: str, source: Path, target: Path) -> list[str]:
    """The command of ours."""
    _, count, based, _ = METHODS[method]
    return [sys.executable, "-c", OURS, method, str(count), str(based), str(source), str(target)]


def command_of_mergekit(method: str, source: Path, target: Path, folder: Path) -> list[str]:
    """The command of mergekit, with its configuration written beside."""
    name, count, based, options = METHODS[method]
    config: dict[str, Any] = {
        "merge_method": name,
        "dtype": "bfloat16",
        "models": [{"model": str(source / model), "parameters": {"weight": 1.0}} for model in MODELS[:count]],
        "parameters": options,
    }
    if based or name == "slerp":  # mergekit's slerp calls the first of two the base
        config["base_model"] = str(source / ("base" if based else MODELS[0]))
    path = folder / f"{name}.json"  # YAML holds JSON
    path.write_text(json.dumps(config))
    program = "from mergekit.scripts.run_yaml import main; main()"
    return [sys.executable, "-c", program, str(path), str(target)]


def measured(command: list[str], target: Path, threads: int) -> dict[str, float]:
    """CPU seconds, wall seconds and peak memory of a process; what it wrote last time is gone just before."""
    reader, writer = os.pipe()
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
    # Memory that has been free for a second or two is handed back to the host of a virtual machine, and whoever needs
    # it next pays for that: so the old output goes now.
    shutil.rmtree(target, ignore_errors=True)
    before = os.times()
    with open(os.devnull, "wb") as nowhere:
        process = os.fork()
        if not process:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(writer, 2)
            os.close(reader)
            os.execvpe(command[0], command, environment)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    _, status, used = os.wait4(process, 0)
    if status:
        raise SystemExit(f"{command} failed:\n{said.decode(errors='replace')[-3000:]}")
    return {
        "cpu": used.ru_utime + used.ru_stime,
        "wall": os.times().elapsed - before.elapsed,
        "memory": used.ru_maxrss * (1024 if sys.platform != "darwin" else 1),
    }


def compared(place: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Medians of all jobs, alternating."""
    source, target = place / "models", place / "out"
    share = 0.1 if options.small else options.billions / 1.1
    size = make(source, share)
    for name in ("base", *MODELS):
        subprocess.run(f"cat {source / name}/* > /dev/null", shell=True, check=True)
    start = [sys.executable, "-c", "import weightsmith.merge"]
    jobs = {"cp": ["cp", "-r", str(source / "a"), str(target)], "start": start}
    for method in options.methods:
        jobs[f"weightsmith {method}"] = command_of(method, source, target)
    if options.mergekit:
        jobs["start of mergekit"] = [sys.executable, "-c", "import mergekit.scripts.run_yaml"]
        for method in options.methods:
            jobs[f"mergekit {method}"] = command_of_mergekit(method, source, target, place)
    runs: dict[str, list[dict[str, float]]] = {job: [] for job in jobs}
    for turn in range(options.rounds + 1):
        for job, command in jobs.items():
            if turn or not job.startswith("mergekit"):  # the first round warms up, and theirs are long
                runs[job].append(measured(command, target, options.threads))
    figures = {}
    for job, found in runs.items():
        kept = found[-options.rounds :]
        figures[job] = {key: statistics.median(run[key] for run in kept) for key in ("cpu", "wall", "memory")}
    machine = {"processor": platform.processor() or platform.machine(), "threads": options.threads}
    versions = {name: importlib.metadata.version(name) for name in ("torch", *(["mergekit"] * options.mergekit))}
    return {"bytes": size, "rounds": options.rounds, "machine": machine, "versions": versions, "jobs": figures}


def rendered(figures: dict[str, Any], methods: list[str]) -> str:
    """The table for people."""
    jobs = figures["jobs"]
    cp = jobs["cp"]["cpu"]
    lines = [
        f"three models and a base of {figures['bytes'] / 1e9:.2f} GB each, bf16, medians of {figures['rounds']}, "
        f"{figures['machine']['threads']} threads; cp of one: {cp:.2f} CPU s; "
        f"start: {jobs['start']['cpu']:.2f} CPU s"
        + (f", of mergekit {jobs['start of mergekit']['cpu']:.2f}" if "start of mergekit" in jobs else ""),
        "",
        "| method | CPU s | CPU / cp | wall s | memory MB | mergekit CPU s | wall s | memory MB | CPU / ours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in methods:
        ours, theirs = jobs[f"weightsmith {method}"], jobs.get(f"mergekit {method}")
        row = f"| {method} | {ours['cpu']:.1f} | {ours['cpu'] / cp:.1f} | {ours['wall']:.1f} "
        row += f"| {ours['memory'] / 1e6:.0f} "
        if theirs:
            row += f"| {theirs['cpu']:.1f} | {theirs['wall']:.1f} | {theirs['memory'] / 1e6:.0f} "
            row += f"| {theirs['cpu'] / ours['cpu']:.1f} |"
        else:
            row += "| | | | |"
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--billions", type=float, default=1.1, help="parameters of a model")
    parser.add_argument("--small", action="store_true", help="a tenth of 1.1 billion parameters")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--without-mergekit", dest="mergekit", action="store_false")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to work (needs five times the size of a model)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.mergekit = options.mergekit and importlib.util.find_spec("mergekit") is not None
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="weightsmith-benchmark-") as place:
        figures = compared(Path(place), options)
    print(rendered(figures, options.methods))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
