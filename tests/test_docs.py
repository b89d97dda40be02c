"""The guides' examples run and print what they say; the site builds and loads nothing from afar."""

from __future__ import annotations

import doctest
import html.parser
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("README.md")])
BLOCK = re.compile(r"^```(python|pycon|console|sh|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_examples_run(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = guide.read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "guide"}
    for number, found in enumerate(BLOCK.finditer(text)):
        if guide.stem == "README":  # its blocks do not build on each other
            (tmp_path / str(number)).mkdir()
            monkeypatch.chdir(tmp_path / str(number))
            make_inputs()
        kind, code = found.groups()
        line = text.count("\n", 0, found.start()) + 1
        if kind == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", code)
            assert name, f"{guide.name}:{line}: the first line of a YAML block is the name of its file"
            Path(name[1]).write_text(code, encoding="utf-8")
            if guide.stem == "README":
                run(["run", name[1]])
        elif kind == "python":
            exec(compile("\n" * line + code, str(guide), "exec"), names)
        elif kind == "pycon":
            check_session(code, names, guide, line)
        else:
            for command in commands(code):
                run(command)


def make_inputs() -> None:
    """The checkpoints that the README speaks of, small."""
    import gguf
    import torch

    import weightsmith as ws

    for name in ("base", "run_a", "run_b", "ckpt-100", "ckpt-200"):
        ws.Weights.of({"layers.0.weight": torch.randn(64, 64), "layers.0.bias": torch.randn(64)}).save(name)
    Path("recipe.yaml").write_text("inputs: {a: run_a, b: run_b}\nsteps: {soup: {method: merge.mean, models: [a, b]}}\n"
                                   "save: {made: soup}\n")  # fmt: skip
    writer = gguf.GGUFWriter("model.gguf", "unknown")
    writer.add_tensor("layer.weight", torch.randn(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_session(code: str, names: dict[str, object], guide: Path, line: int) -> None:
    """Run a session with `doctest`; the names that it makes stay for the next block."""
    test = doctest.DocTestParser().get_doctest(code, names, guide.name, str(guide), line)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    runner.run(test, out=said.append, clear_globs=False)
    names.update(test.globs)
    assert not said, "".join(said)


def commands(code: str) -> Iterator[list[str]]:
    """The ``weightsmith`` commands of a block for the shell, continued lines joined."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[:1] == ["weightsmith"]:
            yield words[1:]


def run(command: list[str]) -> None:
    """Run a command in this process: importing torch anew for each would take most of the time."""
    from weightsmith.cli import main

    status = main(command)
    differs = command[0] == "diff" and status == 1  # as diff(1) does
    assert differs or status == 0, f"weightsmith {' '.join(command)}"


# The site


class Loads(html.parser.HTMLParser):
    """What a page loads when it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        said = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(said.get("src") or "")
        elif tag == "link":
            self.found.append(said.get("href") or "")


def far(address: str) -> bool:
    return address.startswith(("http:", "https:", "//"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lacking = [name for name in ("sphinx", "furo", "myst_parser") if importlib.util.find_spec(name) is None]
    if lacking:
        pytest.skip(f'needs {", ".join(lacking)}: pip install "weightsmith[docs]"')
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(
        ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("_build", "methods", "generated", "__pycache__")
    )
    out = folder / "out"
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", folder / "docs", out]
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return out


def test_every_method_and_paper_has_its_place(site: Path) -> None:
    from weightsmith.catalogue import Catalogue

    catalogue = Catalogue()
    for method in catalogue.methods:
        page = (site / "methods" / method.room / f"{method.name}.html").read_text(encoding="utf-8")
        assert f'id="weightsmith.{method.path}"' in page
    papers = (site / "generated" / "papers.html").read_text(encoding="utf-8")
    assert all(f">{key}<" in papers for key in catalogue.papers)


def test_pages_load_nothing_from_afar(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 8
    for page in pages:
        loads = Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        assert loads.found
        assert not [address for address in loads.found if far(address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_formulas_are_mathml(site: Path) -> None:
    page = (site / "methods" / "merge" / "mean.html").read_text(encoding="utf-8")
    assert "<mfrac>" in page
    assert "\\frac" not in page
