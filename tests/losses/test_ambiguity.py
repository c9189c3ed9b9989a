from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.losses.ambiguity import (
    probable_label_errors,
    prototype_errors,
    prototype_labels,
    sampled_label_errors,
)

LIMIT = 0.1


def test_every_voxel_gets_the_class_of_the_nearest_prototype():
    # Two voxels of each class along one axis; the last one is labelled 0 and lies beside the prototype of class 1.
    features = torch.tensor([0.0, 0.2, 1.0, 1.2, 1.1]).view(1, 1, 1, 5)
    foreground = torch.tensor([0.1, 0.1, 0.9, 0.9, 0.4]).view(1, 1, 1, 5)
    p = torch.cat([1 - foreground, foreground], dim=1)
    found = prototype_labels(features, p, torch.zeros_like(p), LIMIT)
    assert found.flatten().tolist() == [0, 0, 1, 1, 1]


def test_prototypes_are_means_weighted_by_probability():
    # Prototype of class 0: (0 * 0.9 + 1 * 0.6) / 1.5 = 0.4, of class 1: 2. The middle between them is 1.2.
    features = torch.tensor([0.0, 1.0, 2.0]).view(1, 1, 1, 3)
    background = torch.tensor([0.9, 0.6, 0.1]).view(1, 1, 1, 3)
    p = torch.cat([background, 1 - background], dim=1)
    certain = torch.zeros_like(p)
    for value, expected in ((1.19, 0), (1.21, 1)):
        probe = torch.tensor([value]).view(1, 1, 1, 1)
        # A voxel without any probability belongs to no prototype and only asks for its label.
        asked = prototype_labels(
            torch.cat([features, probe], dim=3),
            torch.cat([p, torch.zeros(1, 2, 1, 1)], dim=3),
            torch.zeros(1, 2, 1, 4),
            LIMIT,
        )
        assert asked.flatten()[3] == expected
    assert prototype_labels(features, p, certain, LIMIT).flatten().tolist() == [0, 0, 1]


def test_a_class_without_a_certain_voxel_has_no_prototype():
    features = torch.tensor([0.0, 1.0, 5.0]).view(1, 1, 1, 3)
    p = torch.eye(3).view(1, 3, 1, 3)
    deviation = torch.zeros_like(p)
    deviation[0, 2, 0, 2] = 0.2  # the only voxel of class 2 is uncertain and counts as class 0
    assert set(prototype_labels(features, p, deviation, LIMIT).flatten().tolist()) <= {0, 1}
    assert set(prototype_labels(features, p, deviation, 0.3).flatten().tolist()) == {0, 1, 2}


def test_prototype_errors_are_where_the_student_leaves_the_prototypes():
    side = torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    logits = torch.cat([-8 * side, 8 * side], dim=1)
    half = side[..., ::2, ::2].contiguous()
    passes = [([logits], [side, half])] * 3
    student = torch.softmax(logits, dim=1)
    assert not prototype_errors(passes, student, LIMIT).any()
    wrong = student.clone()
    wrong[0, :, 0, 0] = torch.tensor([0.0, 1.0])
    assert prototype_errors(passes, wrong, LIMIT).nonzero().tolist() == [[0, 0, 0, 0]]


def test_confident_learning_flags_the_label_that_the_teacher_contradicts():
    # Nine voxels of class 0 and nine of class 1 that the teacher confirms, one of each with the wrong label.
    p = torch.tensor([[0.9, 0.1]] * 9 + [[0.1, 0.9]] * 9 + [[0.05, 0.95], [0.95, 0.05]])
    labels = torch.tensor([0] * 9 + [1] * 9 + [0, 1])
    assert probable_label_errors(p, labels).nonzero().flatten().tolist() == [18, 19]


def test_confident_learning_flags_nothing_where_the_teacher_agrees():
    p = torch.tensor([[0.9, 0.1]] * 5 + [[0.2, 0.8]] * 5)
    assert not probable_label_errors(p, torch.tensor([0] * 5 + [1] * 5)).any()


def test_confident_learning_survives_a_class_that_nobody_was_given():
    p = torch.softmax(torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    flagged = probable_label_errors(p, torch.randint(0, 2, (30,), generator=torch.Generator().manual_seed(1)))
    assert flagged.shape == (30,)
    assert flagged.sum() < 30


@pytest.mark.parametrize("number", [3, 1000])
def test_no_more_voxels_than_asked_for_are_looked_at(number):
    torch.manual_seed(0)
    teacher = torch.softmax(3 * torch.randn(2, 2, 6, 6), dim=1)
    student = torch.softmax(3 * torch.randn(2, 2, 6, 6), dim=1)
    flagged = sampled_label_errors(teacher, student, number)
    assert flagged.shape == (2, 1, 6, 6)
    assert flagged.sum() <= number
    if number == 1000:
        # What is flagged carries a label that the teacher holds to be less likely than another.
        own = teacher.gather(1, student.argmax(dim=1, keepdim=True))
        assert flagged.any()
        assert (own[flagged] < 0.5).all()


def test_no_label_is_flagged_that_is_the_most_probable_class():
    torch.manual_seed(0)
    p, labels = torch.softmax(torch.randn(3000, 3), dim=1), torch.randint(0, 3, (3000,))
    flagged = probable_label_errors(p, labels)
    assert flagged.any()
    assert not (flagged & (p.argmax(dim=1) == labels)).any()


def test_both_rules_are_the_same_under_autocast():
    torch.manual_seed(0)
    features, p = torch.randn(1, 4, 30, 30), torch.softmax(3 * torch.randn(1, 3, 30, 30), dim=1)
    labels = torch.randint(0, 3, (900,))
    flat = p.movedim(1, -1).flatten(0, -2)
    expected = prototype_labels(features, p, torch.zeros_like(p), LIMIT), probable_label_errors(flat, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = prototype_labels(features, p, torch.zeros_like(p), LIMIT), probable_label_errors(flat, labels)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
