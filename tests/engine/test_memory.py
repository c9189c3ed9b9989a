"""The memory holds bounded, recent embeddings per case and class."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from lgssl_nnunet.engine.memory import MemoryBank, check_sizes
from lgssl_nnunet.errors import UsageError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


def numbered(numbers, size: int = 2) -> torch.Tensor:
    """Embeddings that can be told apart: each consists of its number."""
    return torch.tensor(numbers, dtype=torch.float32)[:, None].expand(-1, size)


def classes(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def numbers(embeddings: torch.Tensor) -> list[int]:
    return sorted(embeddings[:, 0].int().tolist())


def filled() -> MemoryBank:
    bank = MemoryBank(2, 10, CPU)
    bank.replace("a", numbered([1, 2, 3, 10]), classes(0, 0, 0, 1))
    bank.replace("b", numbered([4, 5, 11, 20]), classes(0, 0, 1, 2))
    return bank


def test_a_sample_has_as_many_of_each_class_over_all_cases():
    assert numbers(filled().sample(2))[2:] == [10, 11]
    assert numbers(filled().sample(1))[-1] == 20
    assert filled().sample(1).shape == (3, 2)


def test_a_class_with_fewer_is_left_out():
    assert numbers(filled().sample(5)) == [1, 2, 3, 4, 5]
    assert filled().sample(6).shape == (0, 2)


def test_nothing_is_drawn_twice_and_everything_can_be_drawn():
    bank, seen = filled(), set()
    for _ in range(30):
        drawn = numbers(bank.sample(2))[:2]
        assert len(set(drawn)) == 2
        seen |= set(drawn)
    assert seen == {1, 2, 3, 4, 5}


def test_a_case_that_is_drawn_again_loses_what_it_had_and_other_cases_keep_theirs():
    bank = filled()
    bank.replace("a", numbered([6]), classes(0))
    assert numbers(bank.sample(3)) == [4, 5, 6]
    assert sorted(bank.entries["a"]) == [0]
    assert numbers(torch.cat(list(bank.entries["b"].values()))) == [4, 5, 11, 20]


def test_there_is_room_for_so_many_per_case_and_class():
    bank = MemoryBank(2, 3, CPU)
    bank.replace("a", numbered(range(8)), classes(0, 1, 0, 1, 0, 1, 0, 0))
    bank.replace("b", numbered([20, 21]), classes(0, 0))
    assert {case: {c: numbers(e) for c, e in entry.items()} for case, entry in bank.entries.items()} == {
        "a": {0: [0, 2, 4], 1: [1, 3, 5]},
        "b": {0: [20, 21]},
    }


def test_a_case_without_a_correct_voxel_has_nothing():
    bank = filled()
    bank.replace("a", numbered([]), classes())
    assert numbers(bank.sample(2)) == [4, 5]


def test_an_empty_memory_gives_no_embedding():
    assert MemoryBank(32, 10, CPU).sample(1).shape == (0, 32)


def test_it_keeps_no_graph_and_no_more_than_it_shows():
    bank, embeddings = MemoryBank(2, 1, CPU), numbered([1, 2, 3]).clone().requires_grad_()
    bank.replace("a", embeddings, classes(0, 0, 0))
    (kept,) = bank.entries["a"].values()
    assert not kept.requires_grad
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_a_restored_memory_draws_the_same_to_the_bit(same):
    bank, restored = filled(), MemoryBank(2, 10, CPU)
    state = copy.deepcopy(bank.state_dict())
    restored.load_state_dict(state)
    assert same(restored.state_dict(), bank.state_dict())
    for count in (1, 2, 5):
        torch.manual_seed(1)
        first = bank.sample(count)
        torch.manual_seed(1)
        assert torch.equal(restored.sample(count), first)


def test_restoring_replaces_what_was_there_and_is_not_tied_to_the_state():
    bank, other = filled(), MemoryBank(2, 10, CPU)
    other.replace("z", numbered([99]), classes(0))
    state = bank.state_dict()
    other.load_state_dict(state)
    other.replace("a", numbered([6]), classes(0))
    assert numbers(other.sample(3)) == [4, 5, 6]
    assert numbers(bank.sample(5)) == [1, 2, 3, 4, 5]
    assert numbers(state["a"][0]) == [1, 2, 3]


def sizes(memory_size: int, memory_samples: int, max_queries: int, correlation_weight: float = 1) -> SimpleNamespace:
    return SimpleNamespace(**locals())


def test_sizes_that_just_suffice_are_taken_and_smaller_ones_refused_with_the_remedy():
    check_sizes(sizes(64, 255, 2), cases=4, classes=4)
    with pytest.raises(UsageError, match=r"holds 252 .* memory_size=64 or more, or --set memory_samples=252 or less"):
        check_sizes(sizes(63, 255, 2), cases=4, classes=4)
    with pytest.raises(UsageError, match=r"max_queries=2 leaves no voxel for each of 5 classes: .* max_queries=3 or"):
        check_sizes(sizes(64, 255, 2), cases=4, classes=5)
    check_sizes(sizes(63, 255, 2, correlation_weight=0), cases=4, classes=5)


@pytest.mark.parametrize(("samples", "drawn"), [(6, 6), (7, 0)])
def test_sizes_are_refused_where_a_full_memory_gives_no_sample(samples, drawn):
    bank = MemoryBank(2, 2, CPU)
    for case in "abc":
        bank.replace(case, numbered(range(5)), torch.zeros(5))
    assert len(bank.sample(samples)) == drawn
    with nullcontext() if drawn else pytest.raises(UsageError, match="draws none"):
        check_sizes(sizes(2, samples, 1), cases=3, classes=2)
