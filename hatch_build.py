"""Builds the optional native loops beside the package's Python; without a C compiler the package does without."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run by hand: python hatch_build.py
    BuildHookInterface = object  # type: ignore[assignment, misc]

SOURCE = Path("src/weightsmith/_native.c")
TARGET = Path("src/weightsmith/_native.so")
# No contraction: results must be those of the same steps in PyTorch. Traps are not read, so branches may become masks.
FLAGS = [
    "-O3",
    "-fPIC",
    "-shared",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=default",
]


def compiler() -> list[str] | None:
    """The C compiler that CC names, or the system's."""
    words = os.environ.get("CC", "cc").split()
    return words if words and shutil.which(words[0]) else None


def build(root: Path) -> bool:
    """Compile the loops; False where there is no compiler, or it fails."""
    target = root / TARGET
    target.unlink(missing_ok=True)
    command = compiler()
    if command is None or sys.platform == "win32" or os.environ.get("WEIGHTSMITH_NATIVE") == "0":
        return False
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    done = subprocess.run([*command, *FLAGS, "-o", str(partial), str(root / SOURCE)], capture_output=True, text=True)
    if done.returncode:
        print(f"weightsmith: built without its native loops: {done.stderr.strip()[:500]}", file=sys.stderr)
        partial.unlink(missing_ok=True)
        return False
    partial.replace(target)
    return True


class Native(BuildHookInterface):
    """Hatch calls this before it makes a wheel, an editable one included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if build(Path(self.root)):
            build_data["artifacts"].append(TARGET.as_posix())
            build_data["pure_python"] = False
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"


if __name__ == "__main__":
    sys.exit(0 if build(Path(__file__).parent) else 1)
