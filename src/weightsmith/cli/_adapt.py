"""``weightsmith adapt``: merge adapters into a model, combine them, take one out of a model."""

from __future__ import annotations

import json
from typing import Any

import click

from weightsmith.cli._manual import PATH, SAVING, Manual, option, pattern_option
from weightsmith.cli._rooms import Value, built
from weightsmith.cli._save import save, save_options

_METHOD = "Method"
_COMBINATIONS = (
    *("cat", "linear", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
)


def group() -> click.Group:
    """The ``adapt`` commands."""

    @click.group("adapt", short_help="Merge LoRA adapters into a model, combine them, or take one out.")
    def adapt() -> None:
        """Adapters: small changes of a model that are kept apart from it.

        Adapters are PEFT folders with an adapter_config.json. Neither PEFT nor the model's own code is needed.
        """

    adapt.add_command(_apply())
    adapt.add_command(_combine())
    adapt.add_command(_extract())
    return adapt


def _apply() -> click.Command:
    @click.command(
        "apply",
        cls=Manual,
        short_help="A model with an adapter merged into its weights.",
        examples=[
            ("weightsmith adapt apply base/ adapter/ -o merged/", "What the adapter makes of the model."),
            ("weightsmith adapt apply base/ adapter/ --amount 0.5 -o half/", "Half of its change."),
        ],
        status=SAVING,
    )
    @click.argument("model", type=PATH)
    @click.argument("adapter", type=PATH)
    @option(
        "--amount",
        type=Value(),
        metavar="VALUE",
        section=_METHOD,
        help="How much of the change; by tensor as JSON or by_depth(...).  [default: 1.0]",
    )
    @option(
        "--tied",
        type=click.Choice(["keep", "untie"]),
        section=_METHOD,
        help="A tensor that is embedding and head at once: change both (keep), or write two (untie), which is what "
        "the adapter was trained as.  [default: an error where it matters]",
    )
    def apply(model: str, adapter: str, amount: Any, tied: str | None, **given: Any) -> None:
        """Write MODEL with the LoRA in ADAPTER merged into its weights.

        The product of the adapter's factors is added row by row while the model streams through, in float32,
        and rounded once. rsLoRA, DoRA, embeddings, convolutions, biases, trained tokens and modules saved whole
        are understood; what is not is an error that names the setting.
        """
        from weightsmith.adapt import apply as merged

        save(merged(model, adapter, 1.0 if amount is None else built(amount), tied=tied), given)  # type: ignore[arg-type]

    apply.params += save_options()
    return apply


def _combine() -> click.Command:
    @click.command(
        "combine",
        cls=Manual,
        short_help="Several adapters of one base into one adapter.",
        examples=[
            ("weightsmith adapt combine a/ b/ --weight 0.7,0.3 -o both/", "Their exact weighted sum."),
            ("weightsmith adapt combine a/ b/ --combination svd --rank 16 -o both/", "The nearest sum of rank 16."),
        ],
        status=SAVING,
    )
    @click.argument("adapters", type=PATH, nargs=-1, required=True, metavar="ADAPTER...")
    @option("--weight", type=Value(), metavar="VALUES", section=_METHOD, help="One number an adapter.  [default: 1]")
    @option(
        "--combination",
        type=click.Choice(_COMBINATIONS),
        metavar="HOW",
        default="cat",
        show_default=True,
        section=_METHOD,
        help=f"{', '.join(_COMBINATIONS)}: cat is exact, svd the nearest of a rank; the others are PEFT's.",
    )
    @option("--rank", type=click.IntRange(1), metavar="N", section=_METHOD, help="Of the result, for svd.")
    @option("--density", type=float, metavar="SHARE", section=_METHOD, help="Share kept by ties, dare and prune.")
    @option(
        "--majority",
        type=click.Choice(["total", "frequency"]),
        default="total",
        show_default=True,
        section=_METHOD,
        help="Whether ties vote by sums or by counts.",
    )
    @option("--seed", type=int, default=0, show_default=True, section=_METHOD, help="For dare.")
    def combine(adapters: tuple[str, ...], weight: Any, **given: Any) -> None:
        """Write one adapter that does what the weighted sum of all ADAPTERs does, exactly or nearly."""
        from weightsmith.adapt import combine as combined

        names = ("combination", "rank", "density", "majority", "seed")
        options = {name: given.pop(name) for name in names}
        numbers = weight if weight is None or isinstance(weight, list) else [weight]
        save(combined(list(adapters), numbers, **options), given)

    combine.params += save_options()
    return combine


def _extract() -> click.Command:
    @click.command(
        "extract",
        cls=Manual,
        short_help="What fine-tuning changed, as an adapter.",
        examples=[
            ("weightsmith adapt extract tuned/ --base base/ --rank 16 -o adapter/", "The nearest of rank 16."),
            ("weightsmith adapt extract tuned/ --base base/ --energy 0.9 -o adapter/", "Ranks that keep 90 %."),
        ],
        status=SAVING,
    )
    @click.argument("model", type=PATH)
    @option("--base", type=PATH, required=True, section=_METHOD, help="The checkpoint it was trained from.")
    @option("--rank", type=Value(), metavar="N", section=_METHOD, help="Rank, or with --energy the largest.")
    @option("--energy", type=Value(), metavar="SHARE", section=_METHOD, help="Share of each change to keep.")
    @option(
        "--rest",
        type=click.Choice(["save", "skip", "refuse"]),
        default="save",
        show_default=True,
        section=_METHOD,
        help="What becomes of changed tensors that are no products: norms, biases, embeddings.",
    )
    @option("--embeddings", is_flag=True, section=_METHOD, help="Embeddings become products, too.")
    @option("--prefix", default="", metavar="WORD", section=_METHOD, help="Put before all names.")
    @option("--seed", type=int, default=0, show_default=True, section=_METHOD, help="For large decompositions.")
    @pattern_option
    def extract(model: str, base: str, rank: Any, energy: Any, pattern: tuple[str, ...], **given: Any) -> None:
        """Write an adapter that turns the base into MODEL, or as nearly as its rank allows.

        Without --json a line says which share of the change it keeps.
        """
        from weightsmith.adapt import extract as extracted
        from weightsmith.weights import as_bytes

        options = {name: given.pop(name) for name in ("rest", "embeddings", "prefix", "seed")}
        found = extracted(
            model,
            base,
            built(rank),
            energy=built(energy),
            pattern=list(pattern) or "*",
            dtype=given.pop("dtype") or "float32",
            threads=given["threads"],
            memory=as_bytes(given["memory"]),
            **options,
        )
        save(found, given)
        if not given.get("as_json"):
            report = found.lineage.options
            ranks = [one["rank"] for one in report["tensors"].values()]
            if ranks:
                spread = f"rank {min(ranks)}" if min(ranks) == max(ranks) else f"ranks {min(ranks)} to {max(ranks)}"
                click.echo(f"{spread}; keeps {report['kept']:.2%} of the change of {len(ranks)} weights")
            if report["skipped"]:
                click.echo(f"left out: {json.dumps(report['skipped'])}")

    extract.params += save_options()
    return extract
