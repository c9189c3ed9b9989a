"""Random numbers are a function of named seeds, and drawing batches leaves the global generators alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lgssl_nnunet.engine.seeding import derive_seed, isolated_randomness, seed_everything


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_derived_seeds_differ_with_every_part_and_its_place():
    seeds = {derive_seed(*parts) for parts in [(0, 1, 2), (2, 1, 0), (0, 1, 3), (1, 1, 2), (0, 1), (0, 1, 2, 3)]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_derived_seed_is_the_same_on_every_machine():
    assert derive_seed(0, 0, 0, 0) == 7896617691693857887
    assert derive_seed(3, 0, 1, 17) == derive_seed(3, 0, 1, 17)


@pytest.mark.parametrize("seed", [0, 5, 2**63 - 1])
def test_one_seed_sets_all_three_generators(seed):
    seed_everything(seed)
    first = draw()
    draw()
    seed_everything(seed)
    assert draw() == first


def test_isolation_gives_the_generators_back_as_they_were():
    seed_everything(1)
    undisturbed = [draw() for _ in range(2)]
    seed_everything(1)
    before = draw()
    with isolated_randomness(2):
        draw()
    assert [before, draw()] == undisturbed


def test_isolation_gives_the_generators_back_after_an_error():
    seed_everything(1)
    expected = draw()
    seed_everything(1)
    with pytest.raises(ZeroDivisionError), isolated_randomness(2):
        draw()[0] / 0
    assert draw() == expected


def test_what_is_drawn_in_isolation_depends_on_its_seed_only():
    drawn = []
    for outside in (1, 2):
        seed_everything(outside)
        with isolated_randomness(5):
            drawn.append(draw())
    with isolated_randomness(6):
        assert draw() != drawn[0]
    assert drawn[0] == drawn[1]
