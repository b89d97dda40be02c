"""How fast and how small opening, casting, re-sharding and saving are, as ratios within one run.

    python benchmarks/io.py                 # 2 GB, and 16 GB for the memory figure
    python benchmarks/io.py --gigabytes 0.5 --large 4

Every job runs in a process of its own. CPU is user + system seconds of the work itself, without the
start of Python and the import of torch, which are the same for all and shown once. Memory is the peak
resident memory beyond the interpreter with torch imported. Rounds alternate between the jobs; the
medians are compared. Inputs are warmed into the page cache first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN = 2048

# Each job sees `source` and `target` and prints what it measured. `begin` is called after the imports.
PRELUDE = """
import json, os, resource, shutil, sys, time
source, target = sys.argv[1:3]
import torch
torch.set_num_threads(int(os.environ["JOB_THREADS"]))

def status(word):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(word))

def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime

def begin():
    global before, started, resident
    # What the last job wrote goes now and not before the imports: a virtual machine hands memory that has
    # been free for a second or two back to its host, and whoever needs it next pays for that.
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")          # forget the peak so far
    resident, before, started = status("VmRSS"), cpu(), time.monotonic()

def end(**extra):
    print(json.dumps({"cpu": cpu() - before, "wall": time.monotonic() - started,
                      "memory": status("VmHWM") - resident, **extra}))
"""

JOBS = {
    "read + write + sync": """
import os
buffer = memoryview(bytearray(2**18))
begin()
os.makedirs(target)
for name in os.listdir(source):
    with open(os.path.join(source, name), "rb", 0) as old, open(os.path.join(target, name), "wb", 0) as new:
        while count := old.readinto(buffer):
            new.write(buffer[:count])
        os.fsync(new.fileno())
end()
""",
    "open": """
import weightsmith.weights as ws
begin()
w = ws.open(source)
end(tensors=len(w), bytes=w.nbytes)
""",
    "weightsmith": """
import weightsmith.weights as ws
begin()
ws.open(source).cast("float16").save(target, max_shard_size="400MB")
end()
""",
    "weightsmith copy": """
import weightsmith.weights as ws
begin()
ws.open(source).save(target, max_shard_size="400MB")
end()
""",
    "weightsmith 512MB": """
import weightsmith.weights as ws
begin()
ws.open(source).cast("float16").save(target, max_shard_size="2GB", memory="512MB")
end()
""",
    "load_file + save_file": """
import os, json
from safetensors.torch import load_file, save_file
begin()
os.makedirs(target)
tensors = {}
for name in sorted(os.listdir(source)):
    if name.endswith(".safetensors"):
        tensors.update(load_file(os.path.join(source, name)))
shard, size, count = {}, 0, 0
for name in list(tensors):
    tensor = tensors.pop(name).to(torch.float16)
    if size + tensor.nbytes > 400_000_000:
        save_file(shard, os.path.join(target, f"{count}.safetensors"))
        shard, size, count = {}, 0, count + 1
    shard[name] = tensor
    size += tensor.nbytes
save_file(shard, os.path.join(target, f"{count}.safetensors"))
end()
""",
}


def make(folder: Path, gigabytes: float) -> int:
    """A sharded bf16 checkpoint of random values, written tensor by tensor. Returns its bytes."""
    import torch

    import weightsmith.weights as ws

    torch.manual_seed(0)
    block = torch.randn(HIDDEN, 4 * HIDDEN).bfloat16()
    layers = max(round(gigabytes * 1e9 / (2 * block.nbytes)), 1)
    shapes = [("attention", (4 * HIDDEN, HIDDEN)), ("mlp", (HIDDEN, 4 * HIDDEN))]
    tensors = {f"model.layers.{i}.{part}.weight": block.view(shape) for i in range(layers) for part, shape in shapes}
    # Nodes that differ, or the tensors would be tied and written once.
    nodes = {name: ws.Held(tensor) for name, tensor in tensors.items()}
    return ws.Weights(nodes).save(folder, max_shard_size="500MB").nbytes


def measure(job: str, source: Path, target: Path, threads: int) -> dict[str, float]:
    """One run of a job in a fresh process."""
    command = [sys.executable, "-c", PRELUDE + JOBS[job], str(source), str(target)]
    environment = os.environ | {
        "JOB_THREADS": str(threads),
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def measure_cp(source: Path, target: Path, synced: bool) -> dict[str, float]:
    """`cp -r`, by what the shell's children used; ``synced`` puts the bytes on the disk, as a save does."""
    if target.exists():
        shutil.rmtree(target)
    os.sync()
    before = os.times()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    if synced:
        subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"cpu": used, "wall": after.elapsed - before.elapsed, "memory": 0}


def main() -> None:
    """Measure, print the table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--large", type=float, default=16.0, help="size of the checkpoint for the memory figure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where to work (needs three times the size)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="weightsmith-benchmark-") as place:
        figures = compared(Path(place), options)
    print(rendered(figures))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def compared(place: Path, options: argparse.Namespace) -> dict[str, object]:
    """Medians of all jobs, alternating, and the memory on the large checkpoint."""
    source, target = place / "source", place / "target"
    size = make(source, options.gigabytes)
    subprocess.run(f"cat {source}/* > /dev/null", shell=True, check=True)
    rounds: dict[str, list[dict[str, float]]] = {job: [] for job in ("cp", "cp + sync", *JOBS) if "512" not in job}
    for _ in range(options.rounds + 1):
        for job, runs in rounds.items():
            if job in JOBS:
                runs.append(measure(job, source, target, options.threads))
            else:
                runs.append(measure_cp(source, target, synced=job == "cp + sync"))
    for runs in rounds.values():
        del runs[0]  # a virtual machine pays for memory that it touches for the first time
    jobs = {job: {key: statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "memory")}
            for job, runs in rounds.items()}  # fmt: skip
    shutil.rmtree(source)
    shutil.rmtree(target, ignore_errors=True)
    large = make(place / "large", options.large)
    jobs["weightsmith 512MB"] = measure("weightsmith 512MB", place / "large", target, options.threads)
    machine = {"processor": platform.processor() or platform.machine(), "threads": options.threads}
    return {"bytes": size, "large_bytes": large, "rounds": options.rounds, "machine": machine, "jobs": jobs}


def rendered(figures: dict) -> str:
    """The table for people: every figure beside its ratio to `cp` or to safetensors."""
    jobs = figures["jobs"]
    cp, synced, peer = jobs["cp"], jobs["cp + sync"], jobs["load_file + save_file"]
    lines = [
        f"{figures['bytes'] / 1e9:.2f} GB sharded bf16, medians of {figures['rounds']}, "
        f"{figures['machine']['threads']} threads",
        "",
        "| job | CPU s | CPU / cp | CPU / (cp + sync) | wall / (cp + sync) | memory MB | memory / load+save |",
        "|---|---|---|---|---|---|---|",
    ]
    for job in ("cp", "cp + sync", "read + write + sync", "weightsmith copy", "weightsmith", "load_file + save_file"):
        row = jobs[job]
        lines.append(
            f"| {job} | {row['cpu']:.2f} | {row['cpu'] / cp['cpu']:.2f} "
            f"| {row['cpu'] / synced['cpu']:.2f} | {row['wall'] / synced['wall']:.2f} "
            f"| {row['memory'] / 1e6:.0f} | {row['memory'] / peer['memory']:.3f} |"
        )
    lines += [
        "",
        f"opening: {jobs['open']['wall'] * 1e3:.1f} ms, {jobs['open']['memory'] / 1e6:.1f} MB",
        f'memory="512MB" on {figures["large_bytes"] / 1e9:.1f} GB: {jobs["weightsmith 512MB"]["memory"] / 1e6:.0f} MB',
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
