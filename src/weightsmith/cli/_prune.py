"""``weightsmith prune wanda ...``: the methods of pruning, with a text to calibrate on, repair, healing and figures."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from weightsmith.catalogue import Method
from weightsmith.cli._manual import PATH, SAVING, Manual, Option
from weightsmith.cli._output import check_written, clean, laid_out, number, percent, size
from weightsmith.cli._rooms import Room, about, built, catalogue, described, options_of
from weightsmith.cli._save import check_output, save, save_options
from weightsmith.cli._texts import check_texts, windows

if TYPE_CHECKING:
    from weightsmith.calibration import Texts
    from weightsmith.inspect import Report
    from weightsmith.weights import Weights

_DATA, _AFTER, _FIGURES = "Data", "Around it", "Figures"

ROOM, REPAIRS, ALLOCATIONS = "prune", "prune.repair", "prune.allocation"


def group() -> click.Group:
    """The ``prune`` commands."""
    return described(_Room, ROOM, methods, command)


class _Room(Room):
    """Scores, and repairs that choose what goes as if they were scores."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [method.name for method in self.find()]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return next((self.make(method) for method in self.find() if method.name == cmd_name), None)


@functools.cache
def methods() -> tuple[Method, ...]:
    """Scores, and repairs that choose what goes."""
    lifted = {room: catalogue().lifted(room) for room in (ROOM, REPAIRS)}
    found = [m for m in catalogue().methods if m.room in lifted and m.name in lifted[m.room]]
    return tuple(m for m in found if m.room == ROOM or chooses(m))


def chooses(method: Method) -> bool:
    """Whether a repair can choose what goes."""
    return any(p.name == "sparsity" for p in method.parameters)


def command(method: Method) -> click.Command:
    """The command of one method."""
    _, *others = method.public
    own = [_eased(one) for one in options_of(method, [p for p in others if p.name not in ("mask", "action")])]
    names = {one.name for one in own}
    others = [one for one in _others() if one.name not in names]
    asks = any(need.startswith("stats.") for need in method.needs)
    examples = [(f"weightsmith prune {method.name} model/ --sparsity 0.5 --calibrate text.txt -o out/", "On a text.")]
    if not asks:
        examples = [(f"weightsmith prune {method.name} model/ --sparsity 0.5 -o out/", "Into a folder.")]
    healed = f"weightsmith prune {method.name} model/ --sparsity 2:4 --calibrate near.txt --heal 200 -o out/"
    examples.append((healed, "Two of four are kept, and then trained towards the dense model."))
    told = f"weightsmith prune {method.name} model/ --calibrate near.txt --evaluate far.txt --report r.html -o out/"
    examples.append((told, "What it has cost, with plots by layer."))

    def run(inputs: str, **given: Any) -> None:
        chosen = {name: given.pop(name) for name in names}
        more = {one.name: given.pop(one.name) for one in others if one.name}
        _run(method, inputs, chosen, more, given)

    return Manual(
        method.name,
        callback=run,
        params=[
            click.Argument(["inputs"], type=PATH, required=True, metavar="MODEL"),
            *own,
            *others,
            *save_options(without={name for name in names if name}),
        ],
        help=about(method),
        short_help=method.summary,
        examples=examples,
        status=SAVING,
    )


def _eased(one: click.Option) -> click.Option:
    """Statistics may be given, or are gathered on a text."""
    if one.name == "stats":
        one.required = one.multiple = False
        one.help = "What weightsmith.stats found, saved; or give --calibrate."
    return one


def _others() -> list[Option]:
    lifted = catalogue().lifted(REPAIRS)
    repairs = [m.name for m in catalogue().methods if m.room == REPAIRS and m.name in lifted]
    allocations = [m.name for m in catalogue().methods if m.room == ALLOCATIONS and _gives_shares(m)]
    return [
        Option(["--calibrate"], type=PATH, multiple=True, metavar="TEXT", section=_DATA,
               help="A text that says which weights matter. Repeatable: texts are mixed."),
        Option(["--samples"], type=click.IntRange(1), default=128, show_default=True, section=_DATA,
               help="Windows of it."),
        Option(["--length"], type=click.IntRange(2), default=512, show_default=True, section=_DATA,
               help="Tokens of a window."),
        Option(["--device"], default="cpu", show_default=True, section=_DATA, help="Where the model computes."),
        Option(["--compute"], type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
               section=_DATA, help="In what it does."),
        Option(["--propagate"], type=click.Choice(["changed", "dense"]), default="changed", show_default=True,
               section=_DATA, help="Whether layers see what the pruned ones before them give."),
        Option(["--store"], type=PATH, metavar="FOLDER", section=_DATA,
               help="Keeps finished blocks; the same command goes on from there."),
        Option(["--allocate"], type=click.Choice(allocations), section=_AFTER,
               help="How the budget is shared among tensors.  [default: the same share of each]"),
        Option(["--repair"], type=click.Choice(repairs), section=_AFTER,
               help="How the weights that stay make up for the others."),
        Option(["--heal"], type=click.IntRange(0), default=0, metavar="STEPS", section=_AFTER,
               help="Train so long after it, towards the dense model; zeros stay."),
        Option(["--pack"], type=click.Choice(["bitmask", "sparse-bitmask", "sparse-24-bitmask"]), section=_AFTER,
               help="Write a bit for each place and the values that are left."),
        Option(["--evaluate"], type=PATH, multiple=True, metavar="TEXT", section=_FIGURES,
               help="Tell perplexity, KL and agreement before and after. Take another text than --calibrate."),
        Option(["--report"], type=PATH, metavar="FILE", section=_FIGURES, help="A page with plots by layer: .html."),
        Option(["--seed"], type=int, default=0, show_default=True, help="Of random choices."),
    ]  # fmt: skip


def _gives_shares(method: Method) -> bool:
    """Whether weights, or curves of what pruning them does, are all that an allocation asks for."""
    first = method.parameters[0].name if method.parameters else ""
    return first in ("weights", "curves") and method.returns == "dict[str, float]"


# What it does


def _run(method: Method, source: str, chosen: Mapping[str, Any], more: dict[str, Any], given: dict[str, Any]) -> None:
    from weightsmith import open as open_weights

    options = {name: built(value) for name, value in chosen.items() if value is not None and value != ()}
    more.setdefault("seed", options.get("seed", 0))  # a random score has a seed of its own
    _check(method, options, more)
    check_written(more["report"], True, "a report", [".html"])
    check_output(given)
    before = open_weights(source)
    check_texts(more)
    batches = windows(before, more) if more["calibrate"] else None
    after = _pruned(method, before, options, more, batches)
    reports = _reports(before, after, options.get("stats"), more)
    told: dict[str, Any] = {"pruned": reports[0].figures}
    if batches is not None:
        told["calibration"] = batches.record
    if len(reports) > 1:
        told["evaluated"] = reports[1].rows()
    if more["report"]:
        from weightsmith.inspect._report import page_of
        from weightsmith.page import written

        written(more["report"], page_of(reports, f"Pruned: {method.name}"))
    if not given.get("as_json"):
        _say(reports, more["report"])
    if more["pack"]:
        from weightsmith.prune import formats

        after = formats.pack(after, format=more["pack"])
    save(after, given, told)


def _check(method: Method, options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    asks = next((need for need in method.needs if need.startswith("stats.")), None)
    calibrates = bool(more["calibrate"])
    if asks and not calibrates and "stats" not in options:
        raise click.UsageError(f"{method.name} asks the data: add --calibrate TEXT (or --stats FILE)")
    if calibrates and "stats" in options:
        raise click.UsageError("--calibrate and --stats say the same thing in two ways; give one")
    for name in ("repair", "heal", "store"):
        if more[name] and not calibrates:
            raise click.UsageError(f"--{name} asks the data: add --calibrate TEXT")
    if more["repair"] and method.room == REPAIRS:
        raise click.UsageError(f"{method.name} repairs by itself; --repair is for scores")


def _pruned(
    method: Method, before: Weights, options: dict[str, Any], more: Mapping[str, Any], batches: Texts | None
) -> Weights:
    prune = importlib.import_module("weightsmith.prune")
    if batches is not None:
        own = method.room == REPAIRS
        options.pop("seed", None)
        wanted = {name: options[name] for name in ("sparsity", "scope", "structure", "pattern") if name in options}
        if set(options) - set(wanted):
            raise click.UsageError(f"--{min(set(options) - set(wanted))} does not go with --calibrate yet; use Python")
        return prune.one_shot(
            before, calibrate=batches, score=None if own else method.name,
            repair=method.name if own else more["repair"], allocate=more["allocate"], heal=more["heal"],
            propagate=more["propagate"], dtype=more["compute"],
            device=more["device"], store=more["store"], resume=bool(more["store"]), seed=more["seed"], **wanted,
        )  # fmt: skip
    if more["allocate"]:
        allocation = importlib.import_module(f"weightsmith.{ALLOCATIONS}").METHODS[more["allocate"]]
        told = {name: options[name] for name in ("pattern",) if name in options}
        options["sparsity"] = allocation(before, float(options.get("sparsity", 0.5)), **told)
    room = importlib.import_module(f"weightsmith.{method.room}")
    return room.METHODS[method.name](before, **options)


def _reports(before: Weights, after: Weights, stats: Any, more: Mapping[str, Any]) -> list[Report]:
    from weightsmith import inspect

    reports = [inspect.pruning(before, after, stats=stats)]
    if more["evaluate"]:
        reports.append(
            inspect.language(
                {"before": before, "after": after}, list(more["evaluate"]), before, dtype=more["compute"],
                device=more["device"],
            )
        )  # fmt: skip
    return reports


def _say(reports: Sequence[Report], page: str | None) -> None:
    found = reports[0].figures
    rows = [
        ["zeros", percent(found["zeros"])],
        ["bytes of these matrices", size(found["bytes"])],
        ["packed with a bitmask", size(found["packed bytes"])],
    ]
    for line in laid_out(["", ""], rows, 1):
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
