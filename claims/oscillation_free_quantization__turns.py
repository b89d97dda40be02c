"""How much rarer do codes turn back where all weights but those at a border are frozen late in training?

As in the claim on accuracy; learned steps with the same freezing, and means without, stand beside it there.
"""

from oscillation_free_quantization import measure as accuracies

from weightsmith.claims import Claim

CLAIM = Claim(
    key="oscillation-free-quantization",
    variant="turns",
    statement="late in training at 2 bits, codes turn back at most a fifth as often with steps from means and freezing "
    "as with learned steps",
    method="turns, means, frozen late",
    baseline="a fifth of the turns of learned steps",
    higher_is_better=False,
    seeds=(0, 1, 2),
)


def measure(seed: int) -> dict[str, float]:
    """Turns a thousand weights and steps."""
    figures = accuracies(seed)
    return figures | {"a fifth of the turns of learned steps": figures["turns, learned steps"] / 5}
