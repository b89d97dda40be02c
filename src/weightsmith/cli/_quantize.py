"""``weightsmith quantize gptq ...``: roundings, with a text to calibrate on, budgets, formats and figures."""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from weightsmith.catalogue import PACKAGE, Method
from weightsmith.cli._manual import PATH, SAVING, Manual, Option
from weightsmith.cli._output import check_written, clean, echo_json, laid_out, number, percent, size
from weightsmith.cli._rooms import Room, about, built, catalogue, described, options_of
from weightsmith.cli._save import check_output, save, save_options
from weightsmith.cli._texts import check_texts, windows

if TYPE_CHECKING:
    from weightsmith.inspect import Report
    from weightsmith.weights import Weights

_METHOD, _DATA, _AROUND, _FIGURES = "Method", "Data", "Around it", "Figures"

ROOM = "quantize"

LEARNED = "reconstruct"
"""The rounding of whole blocks."""

_GRID = ("bits", "group", "grid", "symmetric", "scale_dtype", "indivisible", "pattern")
_LEARNING = (
    "train", "steps", "lr", "range_lr", "window", "overlap", "pull", "rank", "divergence", "clip",
)  # fmt: skip

OURS = ("codes", "values")

FORMATS = (
    *OURS, "compressed-tensors", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "mxfp8-quantized",
    "gptq", "gptq_v2", "awq", "bitsandbytes", "gguf",
)  # fmt: skip
"""What is written: our own codes, the values that they stand for, or what another program reads: those of
`weightsmith.quantize.formats`, which help must not import."""


def group() -> click.Group:
    """The ``quantize`` commands."""
    return described(_Room, ROOM, methods, command)


class _Room(Room):
    """Roundings, and what works around them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*(method.name for method in self.find()), *_OTHERS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _OTHERS:
            return _OTHERS[cmd_name]()
        return next((self.make(method) for method in self.find() if method.name == cmd_name), None)


@functools.cache
def methods() -> tuple[Method, ...]:
    """The roundings."""
    lifted = catalogue().lifted(ROOM)
    return tuple(m for m in catalogue().methods if m.room == ROOM and m.name in lifted)


def command(method: Method) -> click.Command:
    """The command of one rounding."""
    points = usual_grid(method)
    own = [_eased(one, points) for one in _own(method)]
    names = {one.name for one in own}
    more = [one for one in (*_data(128), *_around(method), *_figures()) if one.name not in names]
    asks = _asks(method)
    text = " --calibrate text.txt" if asks else ""
    called = f"weightsmith quantize {method.name} model/"
    examples = [(f"{called}{' --bits 4 --group 128' if points == 'int' else ''}{text} -o out/", "Into a folder.")]
    if points == "int":
        mean = "Widths that differ by tensor and are 3.5 in the mean."
        examples.append((f"{called} --bits 3.5 --group 64 --calibrate text.txt -o out/", mean))
    examples.append((f"{called} --calibrate a.txt --evaluate b.txt -o out/", "What it has cost on another text."))

    def run(inputs: str, **given: Any) -> None:
        chosen = {name: given.pop(name) for name in names}
        around = {one.name: given.pop(one.name) for one in more if one.name}
        _run(method, inputs, chosen, around, given)

    return Manual(
        method.name,
        callback=run,
        params=[
            click.Argument(["inputs"], type=PATH, required=True, metavar="MODEL"),
            *own,
            *more,
            *save_options(without={"format", *(name for name in names if name)}),
        ],
        help=about(method),
        short_help=method.summary,
        examples=examples,
        status=SAVING,
    )


def _own(method: Method) -> list[click.Option]:
    """Options of a rounding and its grid; those of a grid are rounding's to nearest where a method passes them on."""
    _, *others = method.public
    if method.name != LEARNED:
        return options_of(method, [p for p in others if p.name != "action"])
    nearest = next(m for m in methods() if m.name == "rtn")
    points = [p for p in nearest.public if p.name in _GRID]
    return options_of(method, [p for p in others if p.name in _LEARNING]) + options_of(nearest, points)


def _asks(method: Method) -> bool:
    """Whether nothing can be done without data."""
    return bool({"stats.gram", "data"} & set(method.needs))


def _eased(one: click.Option, points: str) -> click.Option:
    """Statistics may be given, or are gathered on a text; a method may have points of its own."""
    if one.name == "stats":
        one.required = one.multiple = False
        one.help = "What weightsmith.stats found, saved; or give --calibrate."
    if one.name == "grid":
        one.help = f"{(one.help or '').partition('  [default')[0]}  [default: {points}]"
    return one


def usual_grid(method: Method) -> str:
    """The word of the grid that a rounding has by default, read as text."""
    own = next((p.default for p in method.parameters if p.name == "grid"), None)
    return _grids().get(str(own).partition("(")[0], "int")


@functools.cache
def _grids() -> dict[str, str]:
    """Class -> word."""
    module = ast.parse(PACKAGE.joinpath("quantize", "grids", "__init__.py").read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "GRIDS" and isinstance(node.value, ast.Dict):
            return {
                ast.unparse(kind): ast.literal_eval(word)
                for word, kind in zip(node.value.keys, node.value.values, strict=True)
                if word is not None
            }
    return {}


def _data(samples: int, required: bool = False) -> list[Option]:
    return [
        Option(["--calibrate"], type=PATH, multiple=True, metavar="TEXT", section=_DATA, required=required,
               help="A text that says what inputs are like. Repeatable: texts are mixed."),
        Option(["--samples"], type=click.IntRange(1), default=samples, show_default=True, section=_DATA,
               help="Windows of it."),
        Option(["--length"], type=click.IntRange(2), default=512, show_default=True, section=_DATA,
               help="Tokens of a window."),
        Option(["--device"], default="cpu", show_default=True, section=_DATA, help="Where the model computes."),
        Option(["--compute"], type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
               section=_DATA, help="In what it does."),
    ]  # fmt: skip


def _around(method: Method) -> list[Option]:
    inputs = ["changed", "dense", *(["both"] if method.name == LEARNED else [])]
    guide = [
        Option(["--guide"], type=click.Choice(["attention", "loss"]), section=_DATA,
               help="Let tokens count as much as the attention that they receive, or as the loss hangs on them.  "
               "[default: all alike]")
    ]  # fmt: skip
    transforms = [m.name for m in catalogue().methods if m.room == "quantize.transforms" and _by_data(m)]
    return [
        Option(["--propagate"], type=click.Choice(inputs), default="changed", show_default=True,
               section=_DATA, help="Whether layers see what the quantized ones before them give."),
        Option(["--store"], type=PATH, metavar="FOLDER", section=_DATA,
               help="Keeps finished blocks; the same command goes on from there."),
        Option(["--transform"], type=click.Choice(transforms), section=_AROUND,
               help="What is done to the weights before; the function stays as it is."),
        *(guide if any(p.name == "stats" for p in method.public) else []),
        Option(["--allocate"], type=click.Choice(["loss", "output"]), default="loss", show_default=True,
               section=_AROUND, help="By what a mean of --bits is shared among tensors."),
        Option(["--embeddings"], type=click.IntRange(1, 8), metavar="BITS", section=_AROUND,
               help="Code embeddings and head as well, rounded to nearest."),
        Option(["--heal"], type=click.IntRange(0), default=0, show_default=True, metavar="STEPS", section=_AROUND,
               help="Let the steps of all groups learn through the whole model, for this many batches."),
        *_format(),
    ]  # fmt: skip


def _format() -> list[Option]:
    return [
        Option(["--format"], type=click.Choice(FORMATS), default="codes", show_default=True, section=_AROUND,
               metavar="FORMAT", help="codes (ours), values (floats), or what others read: compressed-tensors (or one "
               "of its own formats), gptq, gptq_v2, awq, bitsandbytes, gguf (one file)."),
        Option(["--requantize"], metavar="KIND", section=_AROUND,
               help="With gguf: how it packs tensors whose codes it cannot hold, such as Q8_0.  [default: an error]"),
    ]  # fmt: skip


def _figures(required: bool = False) -> list[Option]:
    return [
        Option(["--evaluate"], type=PATH, multiple=True, metavar="TEXT", section=_FIGURES, required=required,
               help="Tell perplexity, KL and agreement before and after. Take another text than --calibrate."),
        Option(["--report"], type=PATH, metavar="FILE", section=_FIGURES, help="A page with plots by layer: .html."),
        Option(["--seed"], type=int, default=0, show_default=True, help="Of random choices."),
    ]  # fmt: skip


def _by_data(method: Method) -> bool:
    return {p.name for p in method.public if p.default is None} <= {"weights", "batches"}


# What it does


def _run(method: Method, source: str, chosen: Mapping[str, Any], more: dict[str, Any], given: dict[str, Any]) -> None:
    from weightsmith import open as open_weights

    options = {name: built(value) for name, value in chosen.items() if value is not None and value != ()}
    more.setdefault("seed", options.get("seed", 0))
    _check(method, options, more)
    _check_place(more, given)
    before = open_weights(source)
    _check_format(method, before, options, more)
    batches = windows(before, more) if more["calibrate"] else None
    after = _quantized(method, before, options, more, batches)
    _told(before, after, options.get("stats"), more, given, batches, f"Quantized: {method.name}")


def _check(method: Method, options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    calibrates = bool(more["calibrate"])
    if _asks(method) and not calibrates and "stats" not in options:
        other = "" if method.name == LEARNED else " (or --stats FILE)"
        raise click.UsageError(f"{method.name} asks the data: add --calibrate TEXT{other}")
    if calibrates and "stats" in options:
        raise click.UsageError("--calibrate and --stats say the same thing in two ways; give one")
    for name in ("transform", "guide", "heal", "store"):
        if more.get(name) and not calibrates:
            raise click.UsageError(f"--{name} asks the data: add --calibrate TEXT")
    bits = options.get("bits")
    if isinstance(bits, float) and not bits.is_integer() and not calibrates:
        raise click.UsageError(f"--bits {bits:g} is shared among the tensors by what data say: add --calibrate TEXT")


def _check_format(method: Method, before: Weights, options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """What a format cannot hold is told before data are asked."""
    if more["format"] in OURS:
        return
    from weightsmith import quantize
    from weightsmith.quantize.room import outlined

    learned = method.name == LEARNED
    own = {name: value for name, value in options.items() if name in _GRID or (name != "stats" and not learned)}
    if isinstance(own.get("bits"), float):
        own["bits"] = int(own["bits"])
    found = outlined(quantize.METHODS["rtn" if learned else method.name].kernel, before, own)
    _packed(_embedded(found, options, more), more)


def _check_place(more: Mapping[str, Any], given: dict[str, Any]) -> None:
    """What cannot be read or written is found now."""
    if given.get("dtype") and more["format"] != "values":
        raise click.UsageError("--dtype would round the steps of the codes: say --scale-dtype, or --format values")
    if more["requantize"] and more["format"] != "gguf":
        raise click.UsageError("--requantize is for --format gguf")
    check_written(more["report"], True, "a report", [".html"])
    check_output(given)
    check_texts(more)


def _quantized(
    method: Method, before: Weights, options: dict[str, Any], more: Mapping[str, Any], batches: Any
) -> Weights:
    quantize = importlib.import_module("weightsmith.quantize")
    if batches is not None:
        if "seed" not in {p.name for p in method.public}:
            options.pop("seed", None)
        return quantize.one_shot(
            before, options.pop("bits", None), calibrate=batches, method=method.name, transform=more["transform"],
            guide=more.get("guide"), allocate=more["allocate"], embeddings=more["embeddings"], heal=more["heal"],
            propagate=more["propagate"], dtype=more["compute"], device=more["device"], store=more["store"],
            resume=bool(more["store"]),
            **{"seed": more["seed"], **options},
        )  # fmt: skip
    if isinstance(options.get("bits"), float):
        options["bits"] = int(options["bits"])
    return _embedded(quantize.METHODS[method.name](before, **options), options, more)


def _embedded(after: Weights, options: Mapping[str, Any], more: Mapping[str, Any]) -> Weights:
    if not more.get("embeddings"):
        return after
    from weightsmith.quantize import with_embeddings
    from weightsmith.quantize._one_shot import AROUND

    return with_embeddings(after, more["embeddings"], {name: options[name] for name in AROUND if name in options})


def _told(
    before: Weights, after: Weights, stats: Any, more: Mapping[str, Any], given: dict[str, Any], batches: Any,
    title: str,
) -> None:  # fmt: skip
    """Figures and the report, and then the checkpoint in the format that is wanted."""
    from weightsmith import inspect

    packed = _packed(after, more)  # what cannot be is told before figures are
    reports = [inspect.quantized(before, after, stats=stats)]
    if more["evaluate"]:
        reports.append(
            inspect.language(
                {"before": before, "after": after}, list(more["evaluate"]), before, dtype=more["compute"],
                device=more["device"],
            )
        )  # fmt: skip
    found: dict[str, Any] = {"quantized": reports[0].figures}
    if batches is not None and hasattr(batches, "record"):
        found["calibration"] = batches.record
    if len(reports) > 1:
        found["evaluated"] = reports[1].rows()
    if after.lineage.method == "quantize.auto":
        found["chosen"] = dict(after.lineage.options)
    if more["report"]:
        from weightsmith.inspect import page_of
        from weightsmith.page import written

        written(more["report"], page_of(reports, title))
    if not given.get("as_json"):
        _say(reports, more["report"], found.get("chosen"))
    save(packed, given, found)


def _packed(after: Weights, more: Mapping[str, Any]) -> Weights:
    """What is to be written."""
    if more["format"] == "codes":
        return after
    from weightsmith.quantize import dequantize, formats

    if more["format"] == "values":
        return dequantize(after)
    own = {"requantize": more["requantize"]} if more["requantize"] else {}
    return formats.pack(after, format=more["format"], **own)


def _say(reports: Sequence[Report], page: str | None, chosen: Mapping[str, Any] | None) -> None:
    figures = reports[0].figures
    rows = [
        ["matrices", str(figures["matrices"])],
        ["bits a weight", number(figures["bits a weight"])],
        ["bytes of these matrices", f"{size(figures['bytes before'])} to {size(figures['bytes'])}"],
        ["bytes in all", f"{size(figures['bytes in all before'])} to {size(figures['bytes in all'])}"],
    ]
    if figures["left in full precision"]:
        rows.append(["left in full precision", str(figures["left in full precision"])])
    for line in laid_out(["", ""], rows, 1):
        click.echo(line)
    if chosen:
        table = [[clean(name), number(found)] for name, found in sorted(chosen["KL"].items(), key=lambda one: one[1])]
        for line in laid_out(["recipe", "KL"], table, 1):
            click.echo(line)
    if len(reports) > 1:
        table = [
            [clean(row["text"]), row["model"], number(row["perplexity"]), number(row["KL"]), percent(row["agreement"])]
            for row in reports[1].rows()
        ]
        for line in laid_out(["text", "", "perplexity", "KL", "agreement"], table, 2):
            click.echo(line)
    if page:
        click.echo(f"report: {clean(page)}")


# A size, and the best that it can have


def _auto() -> click.Command:
    def run(inputs: str, target_size: str | None, bits: float | None, group: int, recipe: Sequence[str],
            **given: Any) -> None:  # fmt: skip
        from weightsmith import open as open_weights
        from weightsmith import quantize

        if (target_size is None) == (bits is None):
            raise click.UsageError("give --target-size, or --bits")
        more = {one.name: given.pop(one.name) for one in own if one.name in given}
        _check_place(more, given)
        before = open_weights(inputs)
        batches = windows(before, more)
        after = quantize.auto(
            before, target_size, bits=bits, calibrate=batches, group=group or None, recipes=list(recipe) or None,
            dtype=more["compute"], device=more["device"], seed=more["seed"],
        )  # fmt: skip
        _told(before, after, None, more, given, batches, "Quantized: auto")

    own = [*_data(32, required=True), *_format(), *_figures()]
    words = [
        Option(["--target-size"], section=_METHOD, metavar="SIZE", help="Bytes of all tensors, at most: 80MB."),
        Option(["--bits"], type=float, metavar="BITS", section=_METHOD,
               help="In place of a size, the mean width of a code."),
        Option(["--group"], type=click.IntRange(0), default=64, show_default=True, section=_METHOD,
               help="Inputs that share a step, or the most that do where this does not fill a row; 0 for whole rows."),
        Option(["--recipe"], multiple=True, metavar="NAME", section=_METHOD,
               help="Try these alone. Repeatable.  [default: all]"),
    ]  # fmt: skip
    return Manual(
        "auto",
        callback=run,
        params=[
            click.Argument(["inputs"], type=PATH, required=True, metavar="MODEL"),
            *words,
            *own,
            *save_options(without={"format"}),
        ],
        help="The best that some recipes make of a size.\n\nWidths are shared among the tensors by what each of them "
        "costs; what comes before and how codes are chosen is tried on windows of the text that nothing was "
        "calibrated on.",
        short_help="The best that some recipes make of a size.",
        examples=[("weightsmith quantize auto model/ --target-size 80MB --calibrate text.txt -o out/", "To a size.")],
        status=SAVING,
    )


# Quality against bytes


def _frontier() -> click.Command:
    def run(inputs: str, bits: str, recipe: Sequence[str], group: int, **given: Any) -> None:
        from weightsmith import quantize
        from weightsmith.inspect import page_of
        from weightsmith.page import written

        check_written(given["report"], True, "a report", [".html"])
        found = quantize.frontier(
            inputs, list(given["evaluate"]), calibrate=list(given["calibrate"]), bits=_numbers(bits),
            recipes=list(recipe) or ("nearest", "gptq"), group=group or None, samples=given["samples"],
            length=given["length"], dtype=given["compute"], device=given["device"], seed=given["seed"],
        )  # fmt: skip
        if given["report"]:
            written(given["report"], page_of([found], "Quality against bytes"))
        if given.get("as_json"):
            echo_json({"rows": found.rows(), "notes": found.notes, "figures": found.figures})
            return
        table = [
            [
                clean(row["text"]), row["recipe"], f"{row['bits']:g}", size(row["bytes in all"]), number(row["KL"]),
                percent(row["agreement"]), number(row["perplexity"]), "*" if row["best"] else "",
            ]
            for row in found.rows()
        ]  # fmt: skip
        heads = ["text", "recipe", "bits", "bytes", "KL", "agreement", "perplexity", ""]
        for line in laid_out(heads, table, 3):
            click.echo(line)
        for note in found.notes:
            click.echo(clean(note))
        if given["report"]:
            click.echo(f"report: {clean(given['report'])}")

    words = [
        Option(["--bits"], default="2,3,4,8", show_default=True, metavar="LIST", section=_METHOD,
               help="Widths, means among them."),
        Option(["--recipe"], multiple=True, metavar="NAME", section=_METHOD,
               help="Repeatable.  [default: nearest, gptq]"),
        Option(["--group"], type=click.IntRange(0), default=64, show_default=True, section=_METHOD,
               help="Inputs that share a step, or the most that do where this does not fill a row; 0 for whole rows."),
    ]  # fmt: skip
    return Manual(
        "frontier",
        callback=run,
        params=[
            click.Argument(["inputs"], type=PATH, required=True, metavar="MODEL"),
            *words,
            *_data(32, required=True),
            *_figures(required=True),
            Option(["--json", "as_json"], is_flag=True, help="Print one JSON document and nothing else."),
        ],
        help="Divergence and perplexity over bytes, for several recipes and widths.\n\nNothing is written but the "
        "report. A star marks what nothing as small is nearer than.",
        short_help="Divergence and perplexity over bytes.",
        examples=[
            (
                "weightsmith quantize frontier model/ --calibrate near.txt --evaluate far.txt --report r.html",
                "Two recipes at four widths.",
            )
        ],
    )


def _numbers(said: str) -> list[float]:
    try:
        return [float(one) for one in said.split(",")]
    except ValueError:
        raise click.UsageError(f"--bits {said!r} is no list of numbers, such as 2,3,4,8") from None


def _reconstruct() -> click.Command:
    return command(next(m for m in catalogue().methods if (m.room, m.name) == (ROOM, LEARNED)))


_OTHERS = {LEARNED: _reconstruct, "auto": _auto, "frontier": _frontier}
