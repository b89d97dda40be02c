"""An embedding whose gradients are of one size from the start, so that coarse states of its optimizer do no harm."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    r"""An embedding with uniform Xavier initialisation and a layer norm behind it.

    .. math:: y = \mathrm{LayerNorm}(E_i), \qquad E \sim U(-a, a), \quad a = \sqrt{6 / (\text{words} + \text{width})}

    A word that is rare moves seldom and then far; the norm bounds what reaches the next layer, and the initialisation
    gives all words one scale. Keep the states of its optimizer whole as well:
    ``eight_bit(optimizer, keep=embeddings(model))``.

    Args:
        num_embeddings: words.
        embedding_dim: width.
        padding_idx: of the word whose vector is zero and stays so; what leaves the module is then the norm's bias.
        **options: of ``torch.nn.Embedding``: ``device``, ``dtype``, ``max_norm``, ...

    Source: Dettmers, Lewis, Shleifer, Zettlemoyer 2022, '8-bit Optimizers via Block-wise Quantization' (stable
    embedding layer). The paper's is for words without positions: add positions before the norm where there are some.

    >>> layer = StableEmbedding(10, 4)
    >>> bool(layer(torch.tensor([1, 2])).mean(dim=-1).abs().max() < 1e-6)
    True
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, **options: Any):
        super().__init__(num_embeddings, embedding_dim, padding_idx, **options)
        self.norm = nn.LayerNorm(embedding_dim, device=options.get("device"), dtype=options.get("dtype"))

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(super().forward(input))


def embeddings(model: nn.Module) -> list[Tensor]:
    """The weights of all embeddings of a model, each once: what `eight_bit` should keep whole.

    >>> model = torch.nn.Sequential(StableEmbedding(5, 2), torch.nn.Linear(2, 3))
    >>> [list(weight.shape) for weight in embeddings(model)]
    [[5, 2]]
    """
    found = (part.weight for part in model.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag))
    return list({id(weight): weight for weight in found}.values())
