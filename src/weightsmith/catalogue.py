"""Which method does what, from which paper, and how well that is checked.

Reads the methods' cards, signatures and docstrings as text: nothing of a room is imported, so this
is quick, needs no torch, and describes a checkout that does not run. Papers come from
``papers.jsonl``; what is done about each of them is found in cards and claims, never written down.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from weightsmith import claims
from weightsmith.errors import Error, did_you_mean

PACKAGE = Path(__file__).parent

_LITERAL = ("paper", "covers", "needs", "unit", "laws", "claim", "departs")
_NAMED = ("reduce", "solve", "unit_for", "joint")
INTERNAL = ("solved", "start", "key", "generator")
"""Arguments of a kernel that the room hands to it; a caller does not name them."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An argument of a kernel, as text. ``default`` is None where there is none."""

    name: str
    annotation: str = ""
    default: str | None = None
    keyword_only: bool = False

    def __str__(self) -> str:
        hint = f": {self.annotation}" if self.annotation else ""
        if self.default is None:
            return self.name + hint
        return f"{self.name}{hint} = {self.default}" if hint else f"{self.name}={self.default}"


@dataclasses.dataclass(frozen=True)
class Method:
    """A method: where it is, its card, its signature and its docstring."""

    room: str
    name: str
    file: str
    """Relative to the package, with ``/``."""
    line: int
    paper: str
    covers: tuple[str, ...]
    needs: tuple[str, ...]
    unit: str
    reduce: str
    solve: str
    unit_for: str
    joint: str
    laws: tuple[str, ...]
    claim: str
    departs: str
    parameters: tuple[Parameter, ...]
    """Of the kernel."""
    public: tuple[Parameter, ...]
    """What a caller gives: of the function that the room lifted from the kernel."""
    returns: str
    docstring: str

    @property
    def path(self) -> str:
        """``merge.ties``: where it is found below ``weightsmith``."""
        return f"{self.room}.{self.name}"

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, on one line."""
        return " ".join(self.docstring.split("\n\n")[0].split())

    @property
    def options(self) -> tuple[Parameter, ...]:
        """The arguments that a caller may leave out or gives by keyword."""
        given = (p for p in self.public if p.default is not None or p.keyword_only)
        return tuple(p for p in given if p.name not in self.needs)

    @property
    def call(self) -> str:
        """How it is called, without ``weightsmith.``: ``merge.mean(models, base=None, *, weight=None)``."""
        words = []
        for parameter in self.public:
            if parameter.keyword_only and "*" not in words:
                words.append("*")
            words.append(parameter.name if parameter.default is None else f"{parameter.name}={parameter.default}")
        return f"{self.path}({', '.join(words)})"

    @property
    def reads(self) -> int:
        """How often the values are read at least: twice where statistics come first."""
        return 2 if self.reduce or self.solve else 1

    @property
    def test(self) -> str:
        """Where its test belongs, relative to the checkout."""
        file = Path(self.file)
        return (Path("tests") / file.parent / f"test_{file.stem.lstrip('_')}.py").as_posix()


@dataclasses.dataclass(frozen=True)
class Paper:
    """A paper of the catalogue."""

    key: str
    title: str
    family: str


@dataclasses.dataclass(frozen=True)
class Measured:
    """A claim, and what came of it."""

    claim: claims.Claim
    result: claims.Result | None
    stale: bool = False

    @property
    def verdict(self) -> str:
        """``holds``, ``does not hold``, ``undecided``; ``stale`` or ``not measured``."""
        if self.result is None:
            return "not measured"
        return "stale" if self.stale else self.result.verdict


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What there is for a paper: the methods that name it, and its claims, those without a variant first."""

    paper: Paper
    methods: tuple[Method, ...]
    measured: tuple[Measured, ...]


class Catalogue:
    """What a package folder and its checkout say. Everything is read once, when asked for.

    Args:
        package: the folder of the package; its checkout is found around it, if there is one.
    """

    def __init__(self, package: Path = PACKAGE):
        self.package = package
        self._lifts: dict[str, dict[str, dict[str, str]]] = {}
        self._leading: dict[str, tuple[Parameter, ...]] = {}
        around = package.parent.parent
        self.checkout = around if (around / "pyproject.toml").exists() else None

    @cached_property
    def papers(self) -> dict[str, Paper]:
        """All papers by key."""
        lines = (self.package / "papers.jsonl").read_text(encoding="utf-8").splitlines()
        return {paper.key: paper for paper in (Paper(**json.loads(line)) for line in lines)}

    @cached_property
    def tables(self) -> dict[str, tuple[str, ...]]:
        """Per room the names in its ``METHODS``, in order."""
        found = {}
        for file in sorted(self.package.rglob("__init__.py")):
            names = _table(_parsed(file))
            if names is not None:
                found[self._dotted(file.parent)] = names
        return found

    @cached_property
    def kernels(self) -> list[Method]:
        """Every function that wears a card, listed or not, by file and line."""
        return [method for file in sorted(self.package.rglob("*.py")) for method in self._kernels(file)]

    @cached_property
    def methods(self) -> list[Method]:
        """The methods of all rooms, by room and then in the order of its table."""
        known = {(method.room, method.name): method for method in self.kernels}
        listed = ((room, name) for room, names in self.tables.items() for name in names)
        return [known[place] for place in listed if place in known]

    @cached_property
    def claim_files(self) -> list[Path]:
        """The claim files of the checkout."""
        folder = self.checkout and self.checkout / "claims"
        return claims.find(folder) if folder and folder.is_dir() else []

    @cached_property
    def evidence(self) -> list[Evidence]:
        """One record per paper, by key. An unreadable claim counts as none; `gaps` names it."""
        return [self._evidence(paper) for paper in sorted(self.papers.values(), key=lambda paper: paper.key)]

    def laws(self, room: str) -> set[str]:
        """The public functions of a room's ``laws.py``, or of the room around it."""
        folder = self._folder(room)
        while folder != self.package:
            if (folder / "laws.py").exists():
                body = _parsed(folder / "laws.py").body
                return {n.name for n in body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")}
            folder = folder.parent
        return set()

    def lifted(self, room: str) -> set[str]:
        """The methods that a room's ``__init__`` makes with ``name = lift(...)``."""
        return set(self._lifted(room))

    def _lifted(self, room: str) -> dict[str, dict[str, str]]:
        """The same, with the defaults that ``lift(..., option=default)`` gives to what the room adds."""
        if room not in self._lifts:
            self._lifts[room] = {}
            for node in _parsed(self._folder(room) / "__init__.py").body:
                value = getattr(node, "value", None)
                if isinstance(value, ast.Call) and _is_call(value, "lift"):
                    defaults = {str(k.arg): ast.unparse(k.value) for k in value.keywords}
                    self._lifts[room] |= dict.fromkeys(_targets(node), defaults)
        return self._lifts[room]

    def leading(self, room: str, name: str = "") -> tuple[Parameter, ...]:
        """What a room's lifted methods take first: ``_PARAMETERS`` of its ``room.py``; of one with its defaults."""
        if room not in self._leading:
            written = _assigned(_parsed(self._folder(room) / "room.py"), "_PARAMETERS")
            entries = written.elts if isinstance(written, ast.Tuple) else []
            self._leading[room] = tuple(_written_parameter(entry) for entry in entries if isinstance(entry, ast.Call))
        defaults = self._lifted(room).get(name, {})
        return tuple(
            dataclasses.replace(p, default=defaults[p.name]) if p.name in defaults else p for p in self._leading[room]
        )

    def about(self, room: str) -> tuple[str, str]:
        """The docstring of a room, and that of the ``lift`` through which all its methods are called."""
        functions = _parsed(self._folder(room) / "room.py").body
        lift = next((n for n in functions if isinstance(n, ast.FunctionDef) and n.name == "lift"), None)
        module = ast.get_docstring(_parsed(self._folder(room) / "__init__.py")) or ""
        return module, (ast.get_docstring(lift) or "") if lift else ""

    def public_names(self) -> list[str]:
        """What a caller may name: the package's own names, those of its parts, and every method; sorted."""
        names = {f"weightsmith.{method.path}" for method in self.methods}
        for name in _exported(self.package / "__init__.py"):
            inside = _exported(self.package / name / "__init__.py")
            names |= {f"weightsmith.{name}", *(f"weightsmith.{name}.{inner}" for inner in inside)}
        return sorted(names)

    def _folder(self, room: str) -> Path:
        return self.package.joinpath(*room.split("."))

    def _dotted(self, folder: Path) -> str:
        return ".".join(folder.relative_to(self.package).parts)

    def _room(self, file: Path) -> str:
        """The innermost room around a file, or its folder where there is none."""
        folder = file.parent
        while folder != self.package:
            if self._dotted(folder) in self.tables:
                return self._dotted(folder)
            folder = folder.parent
        return self._dotted(file.parent)

    def _kernels(self, file: Path) -> Iterator[Method]:
        text = file.read_text(encoding="utf-8")
        if "@card(" not in text:
            return
        place = file.relative_to(self.package).as_posix()
        for node in _parsed(file).body:
            if isinstance(node, ast.FunctionDef) and (card := _card(node)) is not None:
                room = self._room(file)
                lifted = node.name in self._lifted(room)
                yield _method(node, card, room, place, self.leading(room, node.name) if lifted else None)

    def _evidence(self, paper: Paper) -> Evidence:
        methods = tuple(method for method in self.methods if paper.key in method.covers)
        measured = (_measured(path) for path in self.claim_files if claims.key_of(path) == paper.key)
        return Evidence(paper, methods, tuple(filter(None, measured)))


def _measured(path: Path) -> Measured | None:
    try:
        claim, result = read_claim(path), claims.read(path)
    except Error:
        return None
    return Measured(claim, result, result is not None and claims.is_stale(result, path))


def methods() -> list[Method]:
    """The methods of this package, by room and then in the order of its table."""
    return Catalogue().methods


def papers() -> list[Paper]:
    """The papers of the catalogue, by key."""
    return list(Catalogue().papers.values())


def check(package: Path = PACKAGE) -> list[str]:
    """What is missing or does not fit together, one sentence each; empty when all is well."""
    catalogue = Catalogue(package)
    return [*_table_gaps(catalogue), *_card_gaps(catalogue), *_test_gaps(catalogue), *_claim_gaps(catalogue)]


# Gaps


def _table_gaps(catalogue: Catalogue) -> Iterator[str]:
    carded = {(method.room, method.name) for method in catalogue.kernels}
    for method in catalogue.kernels:
        if method.room not in catalogue.tables:
            yield f"{_where(method)}: {method.room or 'the package'} has no METHODS = table(...) in its __init__.py"
        elif method.name not in catalogue.tables[method.room]:
            yield f"{_where(method)}: not in METHODS of {method.room}"
    for room, names in catalogue.tables.items():
        for name in names:
            if (room, name) not in carded:
                yield f"{room}: METHODS lists {name}, but no function of that name wears a card"


def _card_gaps(catalogue: Catalogue) -> Iterator[str]:
    for method in catalogue.kernels:
        laws = catalogue.laws(method.room)
        for law in method.laws:
            if law not in laws:
                yield f"{_where(method)}: unknown law {law!r}{did_you_mean(law, laws)}"
        for key in method.covers:
            if key not in catalogue.papers:
                yield f"{_where(method)}: unknown catalogue key {key!r}{did_you_mean(key, catalogue.papers)}"
        for field in ("paper", "docstring"):
            if not getattr(method, field):
                yield f"{_where(method)}: no {field}"


def _test_gaps(catalogue: Catalogue) -> Iterator[str]:
    if catalogue.checkout is None:
        return
    for method in catalogue.methods:
        test = catalogue.checkout / method.test
        if not test.exists():
            yield f"{_where(method)}: no test {method.test}"
        elif not re.search(rf"\b{method.name}\b", test.read_text(encoding="utf-8")):
            yield f"{_where(method)}: {method.test} does not mention it"


def _claim_gaps(catalogue: Catalogue) -> Iterator[str]:
    if catalogue.checkout is None:
        return
    for path in catalogue.claim_files:
        yield from _one_claims_gaps(catalogue, path)
    kept = {claims.result_path(path) for path in catalogue.claim_files}
    for result in sorted((catalogue.checkout / "claims" / "results").glob("*.json")):
        if result not in kept:
            yield f"claims/results/{result.name}: no claim claims/{claims.file_name(result.stem)}"
    named = {claims.key_of(path) for path in catalogue.claim_files}
    for key in sorted({key for method in catalogue.methods for key in method.covers if key in catalogue.papers}):
        if key not in named:
            yield f"{key}: covered by a method, but claims/{claims.file_name(key)} does not exist"


def _one_claims_gaps(catalogue: Catalogue, path: Path) -> Iterator[str]:
    place = f"claims/{path.name}"
    try:
        claim, result = read_claim(path), claims.read(path)
    except Error as error:
        yield f"{place}: {error}"
        return
    if claims.file_name(claim.key, claim.variant) != path.name:
        yield f"{place}: its key {claim.key!r} and its variant {claim.variant!r} do not make its name"
    if claim.key not in catalogue.papers:
        yield f"{place}: unknown catalogue key {claim.key!r}{did_you_mean(claim.key, catalogue.papers)}"
    if result is None:
        yield f"{place}: not measured; weightsmith claims run {claim.name}"
    elif claims.is_stale(result, path):
        yield f"{place}: changed since it was measured; weightsmith claims run {claim.name}"


def _where(method: Method) -> str:
    return f"{method.file}:{method.line} {method.name}"


# Reading code as text


def read_claim(path: Path) -> claims.Claim:
    """The `Claim` of a claim file, without running it.

    Raises:
        Error: there is no ``CLAIM = Claim(...)`` whose values are written out.
    """
    call = _assigned(_parsed(path), "CLAIM")
    if not isinstance(call, ast.Call) or call.args:
        raise Error("a claim file has a line CLAIM = Claim(key=..., statement=..., ...)")
    try:
        return claims.Claim(**{str(k.arg): ast.literal_eval(k.value) for k in call.keywords})
    except (ValueError, TypeError) as error:
        raise Error(f"its CLAIM cannot be read as text: {error}") from None


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except FileNotFoundError:
        return ast.Module(body=[], type_ignores=[])
    except SyntaxError as error:
        raise Error(f"{file}:{error.lineno}: {error.msg}") from None


def _assigned(module: ast.Module, name: str) -> ast.expr | None:
    """The value that a module assigns to a name at its top level."""
    return next((getattr(node, "value", None) for node in module.body if name in _targets(node)), None)


def _targets(node: ast.stmt) -> list[str]:
    """The names that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _is_call(node: ast.expr | None, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _table(module: ast.Module) -> tuple[str, ...] | None:
    """The names in ``METHODS = table(a, b, c)``, or None without such a line."""
    call = _assigned(module, "METHODS")
    if not isinstance(call, ast.Call):
        return None
    return tuple(_entry(argument) for argument in call.args)


def _entry(argument: ast.expr) -> str:
    """The name of a method in a table: ``ties``, ``module.ties`` or ``lift(ties)``."""
    if isinstance(argument, ast.Call) and argument.args:
        return _entry(argument.args[0])
    return argument.attr if isinstance(argument, ast.Attribute) else ast.unparse(argument)


def _exported(file: Path) -> list[str]:
    """The public names of a module: its ``__all__``, whose parts are written out."""
    module = _parsed(file)
    names = _assigned(module, "__all__")
    return _words(module, names) if names is not None else []


def _words(module: ast.Module, node: ast.expr) -> list[str]:
    """The words of a list of words, in which ``*OTHER`` stands for those of another list of the module."""
    if not isinstance(node, ast.List | ast.Tuple):
        raise Error(f"__all__ holds {ast.unparse(node)}: its names must be written out")
    words: list[str] = []
    for element in node.elts:
        if isinstance(element, ast.Starred) and isinstance(element.value, ast.Name):
            inner = _assigned(module, element.value.id)
            words += _words(module, inner if inner is not None else element)
        elif isinstance(element, ast.Constant) and isinstance(element.value, str):
            words.append(element.value)
        else:
            raise Error(f"__all__ holds {ast.unparse(element)}: its names must be written out")
    return words


def _card(function: ast.FunctionDef) -> ast.Call | None:
    found = (d for d in function.decorator_list if isinstance(d, ast.Call) and _is_call(d, "card"))
    return next(found, None)


def _method(
    function: ast.FunctionDef, card: ast.Call, room: str, file: str, leading: tuple[Parameter, ...] | None
) -> Method:
    """The record of a kernel. ``leading`` is what its lifted form takes first; None if it is called as it is."""
    fields: dict[str, Any] = {"covers": (), "needs": (), "laws": (), "unit": "element"}
    for keyword in card.keywords:
        name = str(keyword.arg)
        try:
            fields[name] = ast.unparse(keyword.value) if name in _NAMED else ast.literal_eval(keyword.value)
        except ValueError:
            raise Error(f"{file}:{card.lineno} {function.name}: {name} of its card is not written out") from None
    unknown = set(fields) - set(_LITERAL) - set(_NAMED)
    if unknown:
        raise Error(f"{file}:{card.lineno} {function.name}: a card has no {', '.join(sorted(unknown))}")
    own = tuple(_parameters(function.args))
    if leading is None:
        public = own if fields.get("unit") == "model" else tuple(p for p in own if p.name not in INTERNAL)
    else:
        taken = {*INTERNAL, *(p.name for p in leading)}
        asked = {need.partition(".")[0] for need in fields["needs"] if "." in need}  # "stats.gram" is given as stats=
        lifted = (
            p if p.keyword_only else dataclasses.replace(p, default=None, keyword_only=True)
            for p in own
            if (p.keyword_only or p.name in asked) and p.name not in taken
        )
        public = (*leading, *lifted)
    return Method(
        room=room,
        name=function.name,
        file=file,
        line=function.lineno,
        **{name: fields.get(name, "") for name in (*_LITERAL, *_NAMED)},
        parameters=own,
        public=public,
        returns=ast.unparse(function.returns) if function.returns else "",
        docstring=ast.get_docstring(function) or "",
    )


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    padded: Iterable[ast.expr | None] = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    pairs = [*zip(positional, padded, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    for index, (argument, default) in enumerate(pairs):
        yield Parameter(
            name=argument.arg,
            annotation=ast.unparse(argument.annotation) if argument.annotation else "",
            default=ast.unparse(default) if default is not None else None,
            keyword_only=index >= len(positional),
        )


def _written_parameter(call: ast.Call) -> Parameter:
    """``inspect.Parameter("base", KIND, default=None, annotation="Source | None")``, as text."""
    words = {str(k.arg): k.value for k in call.keywords}
    hint, default = words.get("annotation"), words.get("default")
    return Parameter(
        name=str(ast.literal_eval(call.args[0])),
        annotation=str(ast.literal_eval(hint)) if hint else "",
        default=ast.unparse(default) if default else None,
        keyword_only=ast.unparse(call.args[1]).endswith("KEYWORD_ONLY"),
    )
