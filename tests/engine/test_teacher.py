"""The mean teacher averages every weight once and never learns by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lgssl_nnunet.engine.teacher import EMATeacher


class Aliased(nn.Module):
    """One tensor under two names, as in nnU-Net's networks, whose decoder holds the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(1, 1, bias=False)
        self.decoder = nn.Module()
        self.decoder.encoder = self.encoder
        self.dropout = nn.Dropout(0.9)
        self.register_buffer("prompts", torch.zeros(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.encoder(image))


def fill(network: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(value)


@pytest.fixture
def student():
    network = Aliased()
    fill(network, 0.0)
    return network


def test_the_first_update_copies_the_student(student):
    teacher = EMATeacher(student, 0.99)
    fill(student, 3.0)
    teacher.update(student)
    assert teacher.network.encoder.weight.item() == 3.0


def test_the_decay_warms_up_and_then_stays(student):
    teacher = EMATeacher(student, 0.7)
    teacher.update(student)
    fill(student, 1.0)
    distances = []
    for _ in range(4):
        teacher.update(student)
        distances.append(1 - teacher.network.encoder.weight.item())
    # Decays 1/2, 2/3, then 0.7.
    assert distances == pytest.approx([1 / 2, 1 / 3, 0.7 / 3, 0.49 / 3])


def test_a_tensor_with_two_names_is_averaged_once(student):
    teacher = EMATeacher(student, 0.9)
    teacher.averaged.n_averaged.fill_(1000)
    fill(student, 1.0)
    teacher.update(student)
    assert teacher.network.encoder.weight.item() == pytest.approx(0.1)
    assert teacher.network.decoder.encoder.weight is teacher.network.encoder.weight


def test_buffers_are_copied(student):
    teacher = EMATeacher(student, 0.9)
    student.prompts.fill_(2.0)
    for _ in range(2):
        teacher.update(student)
    assert teacher.network.prompts.tolist() == [2.0, 2.0]


def test_the_teacher_is_frozen_and_in_evaluation_mode(student):
    student.train()
    teacher = EMATeacher(student, 0.9)
    output = teacher(torch.ones(64, 1))
    assert not output.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.network.parameters())
    assert not any(module.training for module in teacher.network.modules())
    assert student.training


def test_the_teacher_applies_no_dropout(student):
    fill(student, 1.0)
    assert torch.equal(EMATeacher(student, 0.9)(torch.ones(64, 1)), torch.ones(64, 1))


def test_the_teacher_shares_no_memory_with_the_student(student):
    teacher = EMATeacher(student, 0.9)
    fill(student, 5.0)
    assert teacher.network.encoder.weight.item() == 0.0


def test_a_restored_teacher_goes_on_where_it_stopped(student):
    one, other = EMATeacher(student, 0.99), EMATeacher(student, 0.99)
    for value in (1.0, 2.0, 3.0):
        fill(student, value)
        one.update(student)
    other.load_state_dict(one.state_dict())
    fill(student, 4.0)
    for teacher in (one, other):
        teacher.update(student)
    assert torch.equal(one.network.encoder.weight, other.network.encoder.weight)
