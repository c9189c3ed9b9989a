from __future__ import annotations

import math

import pytest
import torch

from lgssl_nnunet.losses.correlation import (
    best_per_class,
    confident_agreements,
    correct_agreements,
    log_correlation,
    omni_correlation,
)


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def softmax(values: list[float]) -> list[float]:
    total = sum(math.exp(value) for value in values)
    return [math.exp(value) / total for value in values]


def slow_correlation(query: list[float], memory: list[list[float]], temperature: float, cosine: bool) -> list[float]:
    def dot(a, b):
        product = sum(x * y for x, y in zip(a, b, strict=True))
        return product / (math.hypot(*a) * math.hypot(*b)) if cosine else product

    return softmax([dot(query, entry) / temperature for entry in memory])


def logits_of(classes: torch.Tensor, margin: torch.Tensor | float, number: int) -> torch.Tensor:
    """Logits (B, C, *S) that predict `classes`, the more confidently the larger the margin."""
    one_hot = torch.nn.functional.one_hot(classes, number).movedim(-1, 1).float()
    return one_hot * (margin[:, None] if isinstance(margin, torch.Tensor) else margin)


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_correlation_is_a_distribution_over_the_memory(similarity):
    rows = log_correlation(torch.randn(7, 5), torch.randn(11, 5), 0.1, similarity).exp()
    assert rows.shape == (7, 11)
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(7))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_the_loss_is_the_slow_formula(similarity):
    first, second, memory = torch.randn(4, 3), torch.randn(4, 3), torch.randn(6, 3)
    total = 0.0
    for a, b in zip(first.tolist(), second.tolist(), strict=True):
        learned, given = (slow_correlation(q, memory.tolist(), 0.5, similarity == "cosine") for q in (a, b))
        total -= sum(g * math.log(p) for p, g in zip(learned, given, strict=True))
    assert omni_correlation(first, second, memory, 0.5, similarity).item() == pytest.approx(total / 4, rel=1e-5)


def test_one_query_before_two_memories_by_hand():
    query, memory = torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0], [0.0, 2.0]])
    cosine = torch.softmax(torch.tensor([6.0, 8.0]), dim=0)
    torch.testing.assert_close(log_correlation(query, memory, 0.1, "cosine").exp()[0], cosine)
    dot = torch.softmax(torch.tensor([15.0, 8.0]), dim=0)
    torch.testing.assert_close(log_correlation(query, memory, 1.0, "dot").exp()[0], dot)


def test_equal_networks_have_the_mean_entropy_of_the_rows():
    queries, memory = torch.randn(9, 4), torch.randn(20, 4)
    rows = log_correlation(queries, memory, 0.1, "cosine").exp()
    entropy = -(rows * rows.log()).sum(dim=1).mean()
    torch.testing.assert_close(omni_correlation(queries, queries, memory, 0.1), entropy)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_features_of_zero_relate_to_all_of_512_memories_alike(similarity):
    zero = torch.zeros(3, 32)
    loss = omni_correlation(zero, zero, torch.randn(512, 32), 0.1, similarity)
    assert loss.item() == pytest.approx(6.238325, abs=1e-5)
    assert loss.item() == pytest.approx(math.log(512), rel=1e-6)


def test_the_order_of_the_networks_matters():
    first, second, memory = torch.randn(5, 4), torch.randn(5, 4), torch.randn(8, 4)
    assert omni_correlation(first, second, memory, 0.1) != omni_correlation(second, first, memory, 0.1)


def test_both_networks_get_a_gradient():
    first, second = (torch.randn(5, 4, requires_grad=True) for _ in range(2))
    omni_correlation(first, second, torch.randn(8, 4), 0.1).backward()
    assert first.grad.abs().max() > 0
    assert second.grad.abs().max() > 0


@pytest.mark.parametrize(("queries", "memory"), [(0, 8), (5, 0), (0, 0)])
def test_without_queries_or_without_memory_it_is_zero_and_moves_nothing(queries, memory):
    first, second = (torch.randn(queries, 4, requires_grad=True) for _ in range(2))
    loss = omni_correlation(first, second, torch.randn(memory, 4), 0.1)
    loss.backward()
    assert loss == 0
    assert (first.grad == 0).all()
    assert (second.grad == 0).all()


def test_it_is_computed_in_fp32_and_far_queries_stay_finite():
    half = 100 * torch.randn(5, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = omni_correlation(half, half.flip(0), half, 0.1, "dot")
    assert loss.dtype == torch.float32
    assert loss.isfinite()


# --------------------------------------------------------------------------------------------------------- the voxels


def test_the_best_voxels_of_each_class_are_chosen_in_their_order():
    classes = torch.tensor([[[0, 1, 0], [1, -1, 0]], [[0, 1, 1], [7, 0, 2]]])
    score = torch.tensor([[[1.0, 5.0, 3.0], [6.0, 99.0, 2.0]], [[4.0, 7.0, 1.0], [99.0, 0.0, 0.0]]])
    assert best_per_class(classes, score, 3, 2).tolist() == [6, 2, 7, 3, 11]
    assert best_per_class(classes, score, 4, 1).tolist() == [6, 7, 11]
    assert best_per_class(torch.full((2, 2), -1), torch.rand(2, 2), 3, 5).tolist() == []


def test_queries_are_where_the_networks_agree_and_the_first_one_is_most_confident():
    classes = torch.tensor([[0, 0, 0, 1, 1, 1]])
    other = torch.tensor([[0, 0, 1, 1, 1, 0]])
    margin = torch.tensor([[1.0, 3.0, 9.0, 2.0, 4.0, 9.0]])
    backwards = 10 - margin
    chosen = confident_agreements(logits_of(classes, margin, 2), logits_of(other, backwards, 2), 1)
    assert chosen.tolist() == [1, 4]
    assert confident_agreements(logits_of(classes, margin, 2), logits_of(other, backwards, 2), 9).tolist() == [
        1, 0, 4, 3,
    ]  # fmt: skip


def test_networks_that_agree_nowhere_give_no_query():
    classes = torch.zeros(1, 4, 4, dtype=torch.long)
    assert confident_agreements(logits_of(classes, 1.0, 3), logits_of(classes + 1, 1.0, 3), 5).numel() == 0


def test_what_is_remembered_is_correct_for_both_networks_and_never_ignored():
    ignore = 3
    label = torch.tensor([[[0, 1, 2, 1, ignore, ignore]]])
    first = torch.tensor([[0, 1, 2, 1, 0, 2]])
    second = torch.tensor([[0, 1, 1, 0, 0, 2]])
    positions, classes = correct_agreements(logits_of(first, 1.0, 3), logits_of(second, 1.0, 3), label, 9)
    assert dict(zip(positions.tolist(), classes.tolist(), strict=True)) == {0: 0, 1: 1}


def test_what_is_remembered_of_many_voxels_is_a_random_part():
    label = torch.zeros(1, 1, 8, 8, dtype=torch.int16)
    logits = logits_of(label[:, 0].long(), 1.0, 2)
    draws = [correct_agreements(logits, logits, label, 10)[0].tolist() for _ in range(2)]
    assert all(len(set(draw)) == 10 for draw in draws)
    assert draws[0] != draws[1]
    assert any(draw != sorted(draw) for draw in draws)
