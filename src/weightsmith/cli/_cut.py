"""``weightsmith cut``: a smaller model of fewer units and layers, from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from weightsmith.cli._manual import PATH, SAVING, Manual, Option, option
from weightsmith.cli._output import clean, laid_out, number, size
from weightsmith.cli._save import check_output, save, save_options

if TYPE_CHECKING:
    from weightsmith.graph import UnitGraph
    from weightsmith.prune.repair import Stage
    from weightsmith.weights import Weights

SCORES = ("l1", "l2", "taylor", "activations", "kcm", "random")
ASKING = ("taylor", "activations", "kcm")
"""Scores that need a text."""

STAGES: tuple[Stage, ...] = ("blocks", "all")
"""Of healing: nothing has to stay zero, so all that is left can learn."""

_WHAT, _WHICH, _DATA = "What is left", "Which units", "Data"


def command() -> click.Command:
    """The ``cut`` command."""

    @click.command(
        "cut",
        cls=Manual,
        short_help="Make a model smaller: fewer neurons, heads, experts, layers.",
        examples=[
            ("weightsmith cut model/ -o small/ --keep 0.7", "Without data: the units whose weights are smallest go."),
            (
                "weightsmith cut model/ -o small/ --keep 0.7 --score taylor --calibrate near.txt --evaluate far.txt",
                "Those go whose loss would be least, and perplexities before and after are told.",
            ),
            ("weightsmith cut model/ -o small/ --layers 24 --calibrate near.txt", "Six of thirty layers go."),
            (
                "weightsmith cut model/ -o small/ --keep 0.7 --calibrate near.txt --heal 200 --evaluate far.txt",
                "What is left is trained to say what the whole model says.",
            ),
            ("weightsmith cut net.pt -o small.pt --keep 0.5 --graph graph.json", "A network of your own."),
        ],
        status=SAVING,
    )
    @click.argument("model", type=PATH)
    @option("--keep", type=click.FloatRange(0, 1, min_open=True), metavar="SHARE", section=_WHAT,
            help="Of the budget, at most; after layers are dropped.")  # fmt: skip
    @option("--budget", type=click.Choice(["parameters", "flops"]), default="parameters", show_default=True,
            section=_WHAT, help="What --keep is a share of.")  # fmt: skip
    @option("--layers", type=click.IntRange(1), metavar="N", section=_WHAT,
            help="Keep N layers: those that turn the stream most.")  # fmt: skip
    @option("--multiple", type=click.IntRange(1), metavar="N", default=1, show_default=True, section=_WHAT,
            help="New sizes of neurons are multiples of this.")  # fmt: skip
    @option("--least", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE", section=_WHAT,
            help="That each layer keeps of its units.")  # fmt: skip
    @option("--score", type=click.Choice(SCORES), section=_WHICH,
            help="Which units matter; taylor, activations and kcm read a text.  "
            "[default: activations with --calibrate, else l2, which can ruin a language model]")  # fmt: skip
    @option("--scope", type=click.Choice(["global", "uniform"]), default="global", show_default=True, section=_WHICH,
            help="One order of all units, or the same share of each layer.")  # fmt: skip
    @option("--kind", "kinds", multiple=True, metavar="KIND", section=_WHICH,
            help="Only units of this kind: neurons, heads, groups, queries, experts. Repeatable.")  # fmt: skip
    @option("--graph", "graph_file", type=PATH, section=_WHICH,
            help="Which axes belong together, as JSON.  [default: by the model's family]")  # fmt: skip
    @option("--seed", type=int, default=0, show_default=True, section=_WHICH, help="Of random scores.")
    @option("--calibrate", type=PATH, metavar="TEXT", section=_DATA, help="The text that scores are found on.")
    @option("--samples", type=click.IntRange(1), default=16, show_default=True, section=_DATA, help="Windows of it.")
    @option("--length", type=click.IntRange(2), default=256, show_default=True, section=_DATA,
            help="Tokens of a window.")  # fmt: skip
    @option("--heal", type=click.IntRange(0), default=0, metavar="STEPS", section=_DATA,
            help="Train what is left so long, towards the whole model, on the windows of --calibrate.")  # fmt: skip
    @option("--evaluate", "texts", type=PATH, multiple=True, metavar="TEXT", section=_DATA,
            help="Tell the perplexity before and after. Take another text than --calibrate.")  # fmt: skip
    def cut(model: str, **given: Any) -> None:
        """Cut the least important units, or whole layers, of MODEL, so that its tensors become smaller.

        Units are what lives and dies together: a neuron with its rows and columns, a group of heads with its keys and
        values. config.json follows, so the output loads as MODEL does; layers keep one size where the config has one
        number for them. The result is checked by loading it where transformers knows the model.

        What is cut is gone: --heal trains what is left for a while, block by block and then as a whole.
        """
        from weightsmith import open as open_weights

        given["score"] = given["score"] or ("activations" if given["calibrate"] else "l2")
        _check(given)
        before = open_weights(model)
        after, told = _cut(before, **_chosen(given))
        _said(told, given["as_json"])
        save(after, given, {"cut": told})

    cut.params += [one for one in save_options() if isinstance(one, Option)]
    return cut


_OWN = (
    "keep", "budget", "layers", "multiple", "least", "score", "scope", "kinds", "graph_file", "seed", "calibrate",
    "samples", "length", "heal", "texts",
)  # fmt: skip


def _chosen(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _OWN}


def _check(given: Mapping[str, Any]) -> None:
    """Errors in the options, before anything is read."""
    if given["keep"] is None and given["layers"] is None:
        raise click.UsageError("nothing to cut: add --keep SHARE, --layers N, or both")
    if given["calibrate"] is None and given["score"] in ASKING and given["keep"] is not None:
        raise click.UsageError(f"--score {given['score']} reads a text: add --calibrate TEXT")
    if given["calibrate"] is None and given["layers"] is not None:
        raise click.UsageError("--layers reads a text to find out which matter: add --calibrate TEXT")
    if given["calibrate"] is None and given["heal"]:
        raise click.UsageError("--heal trains on a text: add --calibrate TEXT")
    check_output(given)


def _cut(
    before: Weights,
    keep: float | None,
    budget: str,
    layers: int | None,
    multiple: int,
    least: float,
    score: str,
    scope: str,
    kinds: tuple[str, ...],
    graph_file: str | None,
    seed: int,
    calibrate: str | None,
    samples: int,
    length: int,
    heal: int,
    texts: tuple[str, ...],
) -> tuple[Weights, dict[str, Any]]:
    """The smaller weights, and what there is to tell of them."""
    from weightsmith.errors import Error
    from weightsmith.graph import keep_layers, load, of, take
    from weightsmith.inspect import language
    from weightsmith.language import read_text
    from weightsmith.prune import structured

    for text in filter(None, (calibrate, *texts)):
        read_text(text)
    if layers is not None and graph_file is not None and keep is not None:
        raise Error("--graph is of all layers, so it does not fit after --layers; cut in two steps")
    after = before
    told: dict[str, Any] = {"before": _size(before)}
    lent = _Lent(calibrate, samples, length)
    if layers is not None:
        model, _, batches = lent.model(after)
        scores = structured.layer_scores(model, batches)
        ((stack, _),) = scores.items()
        kept = structured.kept_layers(scores, layers)
        after = keep_layers(after, kept, prefix=f"{stack}." if stack else "")
        told["layers"] = kept
    if keep is not None:
        graph = load(graph_file) if graph_file else of(after)
        graph.check(after)
        spaces = _spaces(graph, kinds, "config.json" in after.files)
        found = _scores(lent, after, graph, score, spaces, seed)
        cost = structured.parameters(graph, after)
        if budget == "flops":
            model, own, batches = lent.model(after, graph)
            cost = structured.flops(model, own, batches[0])
        multiples = {name: multiple for name in spaces if graph.spaces[name].kind == "neurons" or kinds}
        allocation = structured.allocate(
            found, graph, keep, cost=cost, scope=scope, least=least, multiple=multiples  # type: ignore[arg-type]
        )  # fmt: skip
        if len(allocation):
            after = take(after, graph, allocation)
        told["kept"] = cost({name: len(index) for name, index in allocation.items()}) / cost({})
        told["spaces"] = _sizes(graph, spaces, allocation)
    told["after"] = _size(after)
    if heal:
        after, told["healed"] = _healed(before, after, lent.model(before)[2], heal, seed)
    lent.clear()
    told["loads"] = _loads(after)
    if texts:
        report = language({"before": before, "after": after}, list(texts), windows=samples, length=length)
        told["perplexity"] = [
            {"text": row["text"], "model": row["model"], "perplexity": row["perplexity"]} for row in report.rows()
        ]
    return after, told


def _healed(
    before: Weights, after: Weights, batches: list[Any], steps: int, seed: int
) -> tuple[Weights, dict[str, Any]]:
    """The smaller weights, trained, and what was done; blocks one by one where they pair with the whole model's."""
    import warnings

    from weightsmith.prune.repair import heal_weights

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        healed = heal_weights(after, before, batches, steps=steps, stages=STAGES, seed=seed)
    notes = [str(one.message) for one in said if str(one.message).startswith("heal leaves")]
    for note in notes:
        click.echo(clean(f"note: {note}"), err=True)
    return healed, {"steps": steps, "stages": [stage for stage in STAGES if stage != "blocks" or not notes]}


class _Lent:
    """The model with weights in it, and batches of the text, made when first asked for."""

    def __init__(self, text: str | None, samples: int, length: int):
        self.text, self.samples, self.length = text, samples, length
        self.made: tuple[Any, Any, Any] | None = None

    def clear(self) -> None:
        self.made = None

    def model(self, weights: Weights, graph: UnitGraph | None = None) -> tuple[Any, Any, list[Any]]:
        """The module, its graph under its own names, and batches."""
        import torch

        from weightsmith.language import built, carried, cut, read_text

        if self.made is None or self.made[0] is not weights:
            self.made = None  # before the next one needs the memory
            model, tokenizer = built(weights, carried(weights), torch.float32)
            model.eval()
            if self.text is None:
                batches = [{"input_ids": torch.zeros(1, self.length, dtype=torch.long), "use_cache": False}]
            else:
                windows = cut(read_text(self.text), tokenizer, model, self.length, self.samples, self.text)
                batches = [{"input_ids": torch.tensor([one]), "use_cache": False} for one in windows.tokens]
            self.made = (weights, model, batches)
        _, model, batches = self.made
        return model, None if graph is None else _renamed(graph, weights, model), batches


def _renamed(graph: UnitGraph, weights: Weights, model: Any) -> UnitGraph:
    """The graph under the names that the module has for the tensors; spaces are called the same."""
    from weightsmith.graph import of
    from weightsmith.weights import Weights

    own = Weights.of(model.state_dict())
    if all(name in own for name in graph.tensors):
        return graph
    return of(own.with_files({"config.json": weights.files["config.json"]}))


def _scores(lent: _Lent, weights: Weights, graph: UnitGraph, score: str, spaces: list[str], seed: int) -> Any:
    from weightsmith.prune import structured

    if score == "random":
        return structured.random(weights, graph, seed=seed, spaces=spaces)
    if score in ("l1", "l2"):
        return structured.norms(weights, graph, order=int(score[1]), spaces=spaces)
    model, own, batches = lent.model(weights, graph)
    return getattr(structured, score)(model, own, batches, spaces=spaces)


def _spaces(graph: UnitGraph, kinds: tuple[str, ...], config: bool) -> list[str]:
    """The spaces that are cut, all of some kinds if any are named."""
    from weightsmith.errors import Error, did_you_mean
    from weightsmith.prune import structured

    if not kinds:
        return structured.cuttable(graph)
    there = {space.kind for space in graph.spaces.values()}
    for kind in kinds:
        if kind not in there:
            raise Error(f"no units are of the kind {kind!r}{did_you_mean(kind, there)}; there are {', '.join(there)}")
    found = [name for name, space in graph.spaces.items() if space.kind in kinds]
    held = structured.bound(graph) if config else {}
    why = next((held[name] for name in found if name in held), None)
    if why is not None:
        raise Error(f"--kind {graph.spaces[next(n for n in found if n in held)].kind}: they cannot be cut alone: {why}")
    return found


def _sizes(graph: UnitGraph, spaces: list[str], allocation: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Kind -> units before and after, over all spaces of the kind."""
    found: dict[str, dict[str, int]] = {}
    for name in spaces:
        space = graph.spaces[name]
        counts = found.setdefault(space.kind, {"before": 0, "after": 0})
        counts["before"] += space.size
        counts["after"] += len(allocation[name]) if name in allocation else space.size
    return found


def _size(weights: Weights) -> dict[str, int]:
    ties = weights.ties
    own = [name for name in weights if name not in ties]
    return {
        "parameters": sum(weights.spec(name).numel for name in own),
        "bytes": sum(weights.spec(name).nbytes for name in own),
    }


def _loads(weights: Weights) -> str | None:
    """The class that transformers makes of the weights; None where it is no language model that it knows."""
    import importlib.util

    import torch

    from weightsmith.errors import Error
    from weightsmith.language import carried, described, with_weights

    if importlib.util.find_spec("transformers") is None:
        return None
    try:
        config, _ = described(carried(weights))
    except Error:
        return None
    return type(with_weights(config, weights, torch.float32)).__name__


def _said(told: Mapping[str, Any], as_json: bool) -> None:
    """The table for people."""
    if as_json:
        return
    rows = [[name, *(f"{told[when][name]:,}" for when in ("before", "after"))] for name in ("parameters",)]
    rows.append(["bytes", size(told["before"]["bytes"]), size(told["after"]["bytes"])])
    rows += [[kind, f"{n['before']:,}", f"{n['after']:,}"] for kind, n in told.get("spaces", {}).items()]
    read = told.get("perplexity", [])
    for text in dict.fromkeys(row["text"] for row in read):
        pair = {row["model"]: row["perplexity"] for row in read if row["text"] == text}
        rows.append([f"perplexity, {clean(text)}", number(pair["before"]), number(pair["after"])])
    for line in laid_out(["", "before", "after"], rows, 1):
        click.echo(line)
    if "layers" in told:
        click.echo("layers kept: " + " ".join(map(str, told["layers"])))
    if "healed" in told:
        blocks = "each block and of " if "blocks" in told["healed"]["stages"] else ""
        click.echo(f"healed: {told['healed']['steps']} steps of {blocks}the whole")
    if told["loads"]:
        click.echo(f"loads in transformers as {told['loads']}")
