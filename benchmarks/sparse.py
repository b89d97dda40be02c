"""Where zeros pay: as time (sparse products against dense ones) and as bytes on disk (packing and unpacking).

    python benchmarks/sparse.py                        # one thread, 2048 x 2048
    python benchmarks/sparse.py --shape 4096 1024 --threads 2 --batches 1 16 256
    python benchmarks/sparse.py --no-products          # packing alone

Products: medians of timings that alternate with the dense product in one process; "pays from" is the lowest share of
zeros that was tried from which on the sparse one was faster. Packing: one thread, CPU seconds (user + system) of
writing a pruned checkpoint packed, and of writing it dense again from the packed file, against writing it as it is;
with the bytes of the files.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import weightsmith as ws


def packing(folder: Path, side: int, rounds: int) -> list[dict[str, Any]]:
    """Bytes and CPU seconds of every layout, by share of zeros and dtype."""
    source, made, back = (folder / f"{name}.safetensors" for name in ("source", "packed", "back"))
    rows = []
    for dtype, sparsity in itertools.product((torch.bfloat16, torch.float32), (0.5, 0.9, 0.99)):
        generator = torch.Generator().manual_seed(0)
        dense = {f"l{i}.weight": torch.randn(side, side, generator=generator).to(dtype) for i in range(2)}
        ws.prune.magnitude(dense, sparsity).save(source, overwrite=True)
        copied = spent(lambda: ws.open(source).save(back, **ALONE), rounds)
        for layout in ("bitmask", "sparse-bitmask"):
            packed = spent(functools.partial(pack, source, layout, made), rounds)
            dense_again = spent(lambda: ws.prune.formats.unpack(made).save(back, **ALONE), rounds)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "zeros": sparsity,
                    "format": layout,
                    "bytes, share": made.stat().st_size / source.stat().st_size,
                    "copy s": copied,
                    "pack s": packed,
                    "unpack s": dense_again,
                }
            )
    return rows


def pack(source: Path, layout: Any, target: Path) -> None:
    """A file, packed into another."""
    ws.prune.formats.pack(source, layout, threads=1).save(target, **ALONE)


ALONE: dict[str, Any] = {"threads": 1, "overwrite": True}


def spent(work: Callable[[], object], rounds: int) -> float:
    """CPU seconds of this process, the median."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return statistics.median(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(2048, 2048), metavar=("OUT", "IN"))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--layouts", nargs="+", default=["scattered", "4x1", "16x1", "32x1"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-products", action="store_true")
    parser.add_argument("--no-packing", action="store_true")
    parser.add_argument("--side", type=int, default=4096, help="of the two matrices that are packed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {}
    if not options.no_products:
        report = ws.prune.break_even(
            tuple(options.shape),
            sparsities=options.sparsities,
            batches=options.batches,
            layouts=options.layouts,
            repeats=options.rounds,
        )
        print(report)
        found["products"] = report.to_json()
    if not options.no_packing:
        with tempfile.TemporaryDirectory(prefix="weightsmith-benchmark-") as folder:
            rows = packing(Path(folder), options.side, min(options.rounds, 3))
        print(ws.inspect.Report("Packing", table=rows))
        found["packing"] = rows
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
