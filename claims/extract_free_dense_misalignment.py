"""Do attention scores that keep their sign find the one word that does not fit?

CLIP cannot be had here. The "words" are pictures of digits, eight to a text, all of one class but for one that was
swapped for another class. A small transformer was trained to name the class that most words have. Asked for what
speaks against the true class, the word with the lowest score is taken; scores cut at 0, as is usual, are the baseline,
and gradient times input stands beside. Texts whose class is named rightly count.
"""

import torch
from _digits import Data, one_thread, split
from torch import Tensor, nn
from torch.nn import functional

from weightsmith.claims import Claim
from weightsmith.inspect.attribution import attention_attribution, input_gradients

CLAIM = Claim(
    key="extract-free-dense-misalignment",
    statement="the lowest signed attention score falls on the one wrong word more often than the lowest score cut at 0",
    method="found, signed",
    baseline="found, cut at 0",
    seeds=(0, 1, 2, 3, 4),
    needs=("sklearn",),
)
WORDS = 8


class Reader(nn.Module):
    """A token that reads, and eight pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.start = nn.Linear(64, 48), nn.Parameter(torch.zeros(1, 1, 48))
        layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(48, 10)

    def forward(self, words: Tensor) -> Tensor:
        tokens = torch.cat([self.start.expand(len(words), -1, -1), self.embed(words)], dim=1)
        return self.head(self.encoder(tokens)[:, 0])


def texts(data: Data, count: int, wrong: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Texts ``[n, 8, 64]``, their classes, and where the first ``wrong`` words of another class stand."""
    images, labels = data
    classes = torch.randint(10, (count,), generator=generator)
    others = (classes + torch.randint(1, 10, (count,), generator=generator)) % 10
    weights = functional.one_hot(labels, 10).T.float()
    mine = torch.multinomial(weights[classes], WORDS, replacement=True, generator=generator)
    foils = torch.multinomial(weights[others], WORDS, replacement=True, generator=generator)
    order = torch.rand(count, WORDS, generator=generator).argsort(dim=1)
    is_foil = order < wrong
    return images[torch.where(is_foil, foils, mine)], classes, order.argsort(dim=1)[:, 0]


@one_thread()
def trained(data: Data, seed: int) -> Reader:
    """Trained on texts with up to three wrong words."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Reader()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        words, classes, _ = texts(data, 64, step % 4, generator)
        loss = functional.cross_entropy(model(words), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def measure(seed: int) -> dict[str, float]:
    """Shares of texts in which the wrong word has the lowest score."""
    training, test = split(seed, [1200])
    model = trained(training, seed)
    words, classes, places = texts(test, 500, 1, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        right = model(words).argmax(dim=1) == classes
    words, classes, places = words[right], classes[right], places[right]

    def found(scores: Tensor) -> float:
        # Equal lowest scores (zeros) share the hit.
        lowest = scores == scores.min(dim=1, keepdim=True).values
        return float((lowest.double() / lowest.sum(dim=1, keepdim=True)).gather(1, places[:, None]).mean())

    def attended(layers: int, signed: bool = True) -> Tensor:
        return attention_attribution(model, words, target=classes, row=0, layers=layers, signed=signed)[:, 1:]

    gradient = (input_gradients(model, words, target=classes) * words).sum(dim=2)
    return {
        "found, signed": found(attended(3)),
        "found, cut at 0": found(attended(3, signed=False)),
        "found, signed, last layer alone": found(attended(1)),
        "found, signed, last two layers": found(attended(2)),
        "found, gradient x input": found(gradient),
        "named rightly": float(right.double().mean()),
        "by chance": 1 / WORDS,
    }
