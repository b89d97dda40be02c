"""Losses token by token: by slow loops, and what is left out."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from weightsmith.errors import Error
from weightsmith.inspect.training import (
    TokenLosses,
    decay_groups,
    frequency_buckets,
    frequency_decay,
    label_losses,
    row_norms,
    token_counts,
    token_losses,
)
from weightsmith.inspect.training._parts import rank_correlation, ranks

VOCABULARY = 7


class Language(nn.Module):
    """Predicts the next token from this one alone."""

    def __init__(self, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(VOCABULARY, 5)
            self.drop = nn.Dropout(0.5)
            self.head = nn.Linear(5, VOCABULARY, bias=False)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(self.drop(self.embed(input_ids))))


def texts(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([8.0, 4, 2, 1, 0.5, 0.5, 0])
    ids = torch.multinomial(shares.expand(6, -1), 9, replacement=True, generator=generator)
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    return [{"input_ids": ids[:3], "attention_mask": mask[:3]}, {"input_ids": ids[3:], "attention_mask": mask[3:]}]


def by_loop(model, batches):
    """The losses of each token as a label, one prediction at a time."""
    losses: dict[int, list[float]] = {}
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            logits = model.eval()(ids[None]).logits[0].detach()
            for t in range(1, len(ids)):
                if mask[t]:
                    loss = -float(logits[t - 1].log_softmax(dim=0)[ids[t]])
                    losses.setdefault(int(ids[t]), []).append(loss)
    return losses


def test_token_losses_by_a_slow_loop():
    model, batches = Language(), texts()
    counts = token_counts(batches, VOCABULARY)
    found = token_losses(model, batches, counts, buckets=3)
    losses = by_loop(model, batches)
    means = {token: sum(values) / len(values) for token, values in losses.items()}
    bucket = frequency_buckets(counts, 3)
    for row in found.table:
        inside = [token for token in range(VOCABULARY) if bucket[token] == row["bucket"]]
        noted = [means[token] for token in inside if token in means]
        over = [loss for token in inside for loss in losses.get(token, [])]
        assert row["loss"] == pytest.approx(sum(noted) / len(noted), rel=1e-5)
        assert row["loss over text"] == pytest.approx(sum(over) / len(over), rel=1e-5)
        assert row["predictions"] == len(over)
        assert row["share of text"] == pytest.approx(sum(int(counts[t]) for t in inside) / int(counts.sum()))
    every = [loss for values in losses.values() for loss in values]
    assert found["mean over text"] == pytest.approx(sum(every) / len(every), rel=1e-5)
    assert found["mean over tokens"] == pytest.approx(sum(means.values()) / len(means), rel=1e-5)
    assert found["gap"] == pytest.approx(found["loss"][-1] - found["loss"][0])
    assert found["tokens without a prediction"] == VOCABULARY - len(means)


def test_ranks_are_shared_by_equal_values():
    """By scipy, whose ranks and correlation these are."""
    stats = pytest.importorskip("scipy.stats", reason="ranks are compared with scipy's")
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, 6, (2, 30), generator=generator).double()
    assert ranks(first).tolist() == (stats.rankdata(first.numpy()) - 1).tolist()
    expected = stats.spearmanr(first.numpy(), second.numpy()).statistic
    assert rank_correlation(first, second) == pytest.approx(expected)
    assert math.isnan(rank_correlation(first, torch.zeros(30)))
    assert math.isnan(rank_correlation(first, torch.full((30,), math.nan)))
    assert math.isnan(rank_correlation(first[:0], second[:0]))


def test_bad_options_are_found_before_the_model_is_asked():
    def asked(model, batch):
        raise AssertionError

    for wrong in ({"buckets": 0}, {"equal": "words"}, {"counts": torch.zeros(3)}):
        with pytest.raises(Error, match=r"buckets|equal is|counts are"):
            token_losses(Language(), texts(), forward=asked, **wrong)


def test_counts_default_to_the_batches_and_plain_tensors_do():
    model, batches = Language(), [batch["input_ids"] for batch in texts()]
    plain = token_losses(model, batches, buckets=2)
    masked = token_losses(model, [{"input_ids": ids} for ids in batches], buckets=2)
    assert plain["loss"] == masked["loss"]
    seen = torch.zeros(VOCABULARY, dtype=torch.long)
    for ids in batches:
        seen += ids[:, 1:].flatten().bincount(minlength=VOCABULARY)
    told = token_losses(model, batches, seen, buckets=2)
    assert told["loss"] == plain["loss"]
    assert told["mean count"] == plain["mean count"]


def test_masked_and_ignored_labels_count_for_nothing():
    model = Language().eval()
    ids = torch.tensor([[1, 2, 3, 4]])
    labels = torch.tensor([[-100, -100, 3, 4]])
    losses, tokens = label_losses(model, {"input_ids": ids, "labels": labels})
    assert tokens.tolist() == [3, 4]
    expected = functional.cross_entropy(model(ids).logits[0, 1:3], ids[0, 2:], reduction="none")
    assert losses.tolist() == pytest.approx(expected.tolist())
    kept, rest = label_losses(model, UserDict(input_ids=ids, labels=labels))  # as tokenizers make them
    assert torch.equal(kept, losses)
    assert torch.equal(rest, tokens)
    classes = nn.Linear(2, 3)
    kept, rest = label_losses(classes, (torch.ones(3, 2), torch.tensor([1, -100, 0])))
    assert rest.tolist() == [1, 0]
    assert len(kept) == 2
    counts = token_counts([{"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 0, 0]])}], 5)
    assert counts.tolist() == [0, 1, 1, 0, 0]


def test_buckets_hold_even_shares():
    counts = torch.arange(1, 101)
    tokens = frequency_buckets(counts, 4)
    assert tokens.bincount().tolist() == [25] * 4
    assert int(tokens[-1]) == 0
    assert int(tokens[0]) == 3
    text = frequency_buckets(counts, 4, equal="text")
    sums = [int(counts[text == place].sum()) for place in range(4)]
    assert max(sums) - min(sums) <= 2 * 100
    assert frequency_buckets(torch.tensor([1, 18, 1]), 5, equal="text").tolist() == [4, 2, 4]  # by where its middle is


@pytest.mark.parametrize("counts", [torch.zeros(3), torch.tensor([-1, 2]), torch.ones(2, 2)])
def test_buckets_refuse(counts):
    with pytest.raises(Error, match="counts are"):
        frequency_buckets(counts)
    with pytest.raises(Error, match="counts are"):
        frequency_decay(counts, 0.1)


def test_recorder_by_hand():
    watch = TokenLosses(torch.tensor([10, 5, 1]), buckets=3, memory=0.5, learned=0.5)
    limit = 0.5 * math.log(3)
    assert watch.limit == pytest.approx(limit)
    watch.step(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([0, 0, 1]))  # means 1.5 and 1
    watch.step(torch.tensor([0.1]), torch.tensor([1]))  # running .55 > .549
    watch.step(torch.tensor([[0.0]]), torch.tensor([[1]]))  # running .275: learned at step 2
    found = watch.report()
    assert found["predictions"] == [2, 3, 0]
    assert found["loss"][:2] == pytest.approx([1.5, 1.1 / 3], rel=1e-6)
    assert math.isnan(found["loss"][2])
    assert found["learned"][:2] == [0.0, 1.0]
    assert found["step learned"][1] == 2.0
    assert found["running loss"][1] == pytest.approx(0.275, rel=1e-6)
    assert watch.curves[1][1] == pytest.approx(0.1)
    with pytest.raises(Error, match="do not fit"):
        watch.step(torch.zeros(2), torch.zeros(3, dtype=torch.long))
    for wrong in (3, -100):
        with pytest.raises(Error, match=f"label {wrong} does not fit"):
            watch.step(torch.zeros(2), torch.tensor([1, wrong]))
    with pytest.raises(Error, match="token -1"):
        token_counts([torch.tensor([[2, -1]])], 5)


def test_a_token_is_learned_once_and_the_past_weighs_what_memory_says():
    watch = TokenLosses(torch.tensor([1, 1]), buckets=1, memory=0.75, learned=1.0)
    for loss in (1.0, 0.0, 0.0, 0.0):  # running 1, 0.75, 0.5625 (below ln 2), 0.42
        watch.step(torch.tensor([loss]), torch.tensor([0]))
    assert watch.learned.tolist() == [2, -1]
    assert float(watch.running[0]) == pytest.approx(0.75**3)


def test_recorder_agrees_with_the_function():
    model, batches = Language().eval(), texts()
    counts = token_counts(batches, VOCABULARY)
    watch = TokenLosses(counts, buckets=3)
    for batch in batches:
        watch.step(*label_losses(model, batch))
    assert watch.report()["loss"] == pytest.approx(token_losses(model, batches, counts, buckets=3)["loss"], rel=1e-6)


def test_row_norms_by_hand():
    counts = torch.tensor([16, 4, 1, 0])
    rows = torch.tensor([[4.0], [2.0], [1.0], [9.0]])
    found = row_norms(rows, counts, buckets=3)
    assert found["norm"] == [4.0, 2.0, 1.0]
    assert found["slope"] == pytest.approx(0.5)  # norm is the root of the count
    assert found["rank correlation with count"] == pytest.approx(1.0)
    assert found["mean norm of tokens that never come up"] == 9.0
    with pytest.raises(Error, match="do not fit"):
        row_norms(rows, counts[:3])


def test_frequency_decay_and_groups():
    counts = torch.tensor([9, 1, 0])
    assert frequency_decay(counts, 0.3, power=0.5).tolist() == pytest.approx([0.3, 0.1, 0.0])
    assert frequency_decay(counts, 0.3, power=0).tolist() == pytest.approx([0.3] * 3)
    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 3))
    with_decay, without = decay_groups(model, "0.*", 0.1)
    assert [id(p) for p in with_decay["params"]] == [id(model[1].weight)]
    assert {id(p) for p in without["params"]} == {id(model[0].weight), id(model[1].bias)}
    assert len(decay_groups(model, "0.*", 0.1, vectors=True)[0]["params"]) == 2
    torch.optim.AdamW(decay_groups(model, "0.*", 0.1))
    with pytest.raises(Error, match="embed"):
        decay_groups(model, "embed", 0.1)


def test_the_model_is_left_as_it_was():
    model = Language().train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    token_losses(model, texts(), buckets=2)
    assert model.training
    assert model.drop.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.random.get_rng_state())
    with pytest.raises(Error, match="at least one prediction"):
        token_losses(model, [])
    with pytest.raises(Error, match="does not fit a vocabulary of 2"):
        token_losses(model, texts(), torch.ones(2))
