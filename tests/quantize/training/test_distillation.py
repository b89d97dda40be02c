"""Losses from a teacher against their formulas, and what they leave alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weightsmith import Error
from weightsmith.quantize.training import distilled, divergence, fake

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


def networks() -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), teacher


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_by_hand(temperature):
    teacher, student = torch.randn(5, 3), torch.randn(5, 3)
    total = 0.0
    for given, own in zip(teacher, student, strict=True):
        p, q = (given / temperature).softmax(0), (own / temperature).softmax(0)
        total += sum((a * (a / b).log()).item() for a, b in zip(p, q, strict=True))
    found = divergence(teacher, student, X, temperature)
    assert found.item() == pytest.approx(temperature**2 * total / 5, rel=1e-4)


def test_the_loss_is_the_mix_of_both_terms():
    student, teacher = networks()
    teacher.eval()
    logits, given = student(X), teacher(X)
    truth = nn.functional.cross_entropy(logits, LABELS)
    wanted = 0.3 * truth + 0.7 * divergence(given, logits, X, 2.0)
    teacher.train()
    assert distilled(student, teacher, (X, LABELS), truth=0.3, temperature=2.0).item() == pytest.approx(wanted.item())
    assert distilled(student, teacher, (X, LABELS), truth=1.0).item() == pytest.approx(truth.item())
    assert distilled(student, teacher, X, truth=0.0).item() >= 0


def test_the_teacher_is_left_as_it_was_and_gets_no_gradient():
    student, teacher = networks()
    teacher.train()
    teacher[1].eval()
    state, random = copy.deepcopy(teacher.state_dict()), torch.get_rng_state()
    distilled(student, teacher, (X, LABELS)).backward()
    assert [part.training for part in teacher] == [True, False, True, True]
    assert all(torch.equal(value, state[name]) for name, value in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_tokens_that_are_padding_do_not_count():
    torch.manual_seed(0)
    table, other = nn.Embedding(7, 7), nn.Embedding(7, 7)

    def model(embedding):
        class Causal(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = embedding

            def forward(self, input_ids, attention_mask=None):
                return SimpleNamespace(logits=self.table(input_ids))

        return Causal()

    short = {"input_ids": torch.tensor([[1, 2, 3]])}
    padded = {"input_ids": torch.tensor([[1, 2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    found = [distilled(model(table), model(other), batch).item() for batch in (short, padded)]
    assert found[0] == pytest.approx(found[1])


def test_a_quantized_student_learns_what_its_teacher_knows():
    torch.manual_seed(1)
    x = torch.randn(256, 4)
    teacher = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    student = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    fake(student, bits=2)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = distilled(student, teacher, x, truth=0.0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len(student[0].weight[0].unique()) <= 4


def test_what_cannot_be_is_refused():
    student, teacher = networks()
    for options in ({"truth": 1.5}, {"truth": -0.1}, {"temperature": 0.0}):
        with pytest.raises(Error, match="truth lies in"):
            distilled(student, teacher, (X, LABELS), **options)
    with pytest.raises(Error, match=r"the student gives \[6, 5\] and the teacher \[6, 3\]"):
        distilled(nn.Linear(4, 5), teacher, (X, LABELS))
    with pytest.raises(Error, match="no labels"):
        distilled(student, teacher, X)


def test_a_teacher_that_could_learn_gets_no_gradient():
    teacher, student = (torch.randn(5, 3).requires_grad_() for _ in range(2))
    divergence(teacher, student, X).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0
