"""The contract grid: every trainer in trainers/ against every property, found by itself as soon as its file exists.

`ExampleTeacherTrainer` (conftest.py) joins it where the engine is tested and not the file.
"""

from __future__ import annotations

import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from lgssl_nnunet.data.views import ViewsTransform
from lgssl_nnunet.engine import precision
from lgssl_nnunet.engine.seeding import seed_everything
from lgssl_nnunet.errors import LGSSLError, SplitError, TrainingError, UsageError
from lgssl_nnunet.installation import ext_trainer_path
from lgssl_nnunet.plans.planner import GPU_SCHEDULE
from lgssl_nnunet.registry import _find_stock_trainer, find_trainer, trainer_modules, trainer_names

TRAINERS = trainer_names()
EXAMPLE = "ExampleTeacherTrainer"
GRID = [*TRAINERS, EXAMPLE]
WITH_UNLABELED = [*(name for name in TRAINERS if find_trainer(name).views), EXAMPLE]
WITHOUT_UNLABELED = [name for name in GRID if name not in WITH_UNLABELED]
# Methods in which there is no term without unlabelled patches, and why.
MIXED = {"BCPTrainer": "every patch is a mixture of both kinds"}
LABELED_APART = [name for name in WITH_UNLABELED if name not in MIXED]
# Methods whose unlabelled terms have no ramp, and why.
STEADY = {
    **MIXED,
    "CAMLTrainer": "the auxiliary network's supervision sees unlabelled patches through its attention",
    "PseudoLabelTrainer": "pseudo-labels are finished before the training starts",
}
RAMPED = [name for name in WITH_UNLABELED if name not in STEADY]
# Methods in which labels of labelled patches rightly enter unlabelled terms, and how.
GUIDED = {
    **MIXED,
    "CAMLTrainer": "the auxiliary network's supervision sees unlabelled patches through its attention",
    "MCFTrainer": "the Dice on labelled patches tells which network teaches",
    "TACTrainer": "prototypes of labelled classes are the target",
}
WITHOUT_GUIDE = [name for name in WITH_UNLABELED if name not in GUIDED]
# With these every voxel counts, where a network of two steps is certain of none.
EVERY_VOXEL = {
    "DeSCOTrainer": {"first_threshold": 1.0},
    "FixMatchTrainer": {"threshold": 0.0},
    "UAMTTrainer": {"first_threshold": 1.0},
}
# Hyper-parameters with which a method that trains the planned network takes SupervisedTrainer's steps.
SUPERVISED_AT = {
    "ACMTTrainer": {"consistency_weight": 0.0, "dropout": 0.0},
    "CPSTrainer": {"pseudo_weight": 0.0},
    "FixMatchTrainer": {"pseudo_weight": 0.0},
    "MeanTeacherTrainer": {"consistency_weight": 0.0},
    "PseudoLabelTrainer": {"pseudo_weight": 0.0},
    "UAMTTrainer": {"consistency_weight": 0.0, "dropout": 0.0},
    EXAMPLE: {"weight": 0.0},
}
# Networks, or decoders of one, each of which learns from each of the others in unlabelled terms.
PEERS = {
    "CAMLTrainer": ("network", "auxiliary_network"),
    "CPSTrainer": ("network", "second_network"),
    "CoBioNetTrainer": ("network.first", "network.second"),
    "DeSCOTrainer": ("network", "second_network"),
    "LGSSLTrainer": ("network.decoder", "network.further_decoders.0"),
    "MCFTrainer": ("network.first", "network.second"),
    "MCNetPlusTrainer": ("network.decoder", "network.further_decoders.0", "network.further_decoders.1"),
}
# Methods without peer or teacher, and where their targets come from.
ALONE = {
    "FixMatchTrainer": "the network itself, on the weak view",
    "PseudoLabelTrainer": "a model that was finished before",
    "TACTrainer": "prototypes of labelled patches",
}
# Unlabelled terms that follow something else than peers or teacher: labels, a critic.
TEACHERS = {
    ("BCPTrainer", "labelled voxels"): (),
    ("CAMLTrainer", "supervised auxiliary"): (),
    ("CoBioNetTrainer", "adversarial"): ("critics.0",),
    ("CoBioNetTrainer", "adversarial second"): ("critics.1",),
}
# Methods in which a verdict on labelled patches says who learns: its name, and each of its values.
VERDICTS = {"MCFTrainer": ("_first_is_better", (True, False))}
WITH_TEACHER = [*(name for name in TRAINERS if hasattr(find_trainer(name).hyperparameters, "teacher_decay")), EXAMPLE]


def thin_patches(plans: dict[str, Any]) -> None:
    """A patch so anisotropic that nnU-Net augments it slice by slice."""
    plans["configurations"]["3d_fullres"]["patch_size"] = [4, 24, 24]


def as_on_a_gpu(plans: dict[str, Any]) -> None:
    """The optimiser and the learning rates that GPU planners plan."""
    names = ("optimizer", "lr_schedule", "initial_lr", "weight_decay")
    plans["lgssl"]["schedule"].update({name: GPU_SCHEDULE[name] for name in names})


SCHEDULES = {"adamw and cosine": None, "sgd and poly": as_on_a_gpu}
SITUATIONS = {
    "3d": {},
    "3d with augmentation in 2d": {"changes": thin_patches},
    "2d configuration of 3d images": {"configuration": "2d"},
    "2d images": {"variant": "plane", "configuration": "2d"},
    "one foreground class": {"variant": "two_classes"},
    "three foreground classes": {"variant": "four_classes"},
    "three foreground classes in 2d": {"variant": "four_classes", "configuration": "2d"},
    "regions": {"variant": "regions"},
    "ignore label": {"variant": "ignore"},
    "regions and ignore label": {"variant": "regions_and_ignore"},
    "two channels": {"variant": "two_channels"},
}
# What a method refuses before it writes anything, and why; whatever is not listed it must train.
REFUSES = {
    ("CAMLTrainer", "regions"): "the memory keeps embeddings by class",
    ("CAMLTrainer", "regions and ignore label"): "the memory keeps embeddings by class",
}
MAX_LINES = 150

Terms = dict[str, Any]
Lesson = dict[int, torch.Tensor]


def terms_of(trainer: Any, batches: tuple) -> Terms:
    """The terms of a step as `train_step` computes them, with the same dropout each time."""
    seed_everything(0)
    with trainer.autocast():
        return trainer.loss_terms(*batches)


def every_voxel(name: str) -> dict[str, Any]:
    """Options of `started` with which a method leaves no voxel out for want of certainty."""
    return {"training": {"seed": 0, "hyperparameters": EVERY_VOXEL.get(name, {})}}


def trained_parameters(trainer: Any) -> dict[str, torch.Tensor]:
    """Everything that the optimiser steps: the network's parameters by their names, a companion's with its prefix."""
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = dict(trainer.network.named_parameters())
    for part, companion in companions(trainer).items():
        named |= {f"{part}/{name}": p for name, p in companion.named_parameters() if id(p) in optimized}
    return named


def companions(trainer: Any) -> dict[str, torch.nn.Module]:
    """The networks beside the prediction network, the teacher excepted."""
    return {name: part for name, part in trainer.parts.items() if isinstance(part, torch.nn.Module)}


def learning_rates(trainer: Any) -> list[float]:
    """The learning rate of each group of the trainer's optimiser; critics have an optimiser of their own."""
    return [group["lr"] for group in trainer.optimizer.param_groups]


def num_networks(trainer: Any) -> int:
    """The networks that the trainer's optimiser steps, each with a group of parameters."""
    trained = {name.split("/")[0] for name in trained_parameters(trainer) if "/" in name}
    return len(getattr(trainer.network, "networks", (trainer.network,))) + len(trained)


def gradients(trainer: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    trainer.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in trained_parameters(trainer).items() if p.grad is not None}


@contextmanager
def disturbed(network: torch.nn.Module) -> Iterator[None]:
    """Every weight of a network moved a little, for a while."""
    generator = torch.Generator().manual_seed(2)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    yield
    with torch.no_grad():
        for parameter, weights in zip(network.parameters(), before, strict=True):
            parameter.copy_(weights)


def part_of(trainer: Any, name: str) -> torch.nn.Module:
    """A network or a part of one by its name in `PEERS` and `TEACHERS`."""
    first, _, rest = name.partition(".")
    named = {"network": trainer.network, **companions(trainer)}
    if trainer.teacher is not None:
        named["teacher"] = trainer.teacher.network
    return named[first].get_submodule(rest)


def lessons(trainer: Any, batches: tuple, learners: tuple[str, ...]) -> dict[tuple[str, str], Lesson]:
    """By unlabelled term and learner, the gradients that the term has in the learner, as far as they are not 0."""
    parameters = {learner: list(part_of(trainer, learner).parameters()) for learner in learners}
    found = {}
    for term, declared in terms_of(trainer, batches).items():
        if declared.uses_unlabeled:
            every = [p for own in parameters.values() for p in own]
            gradient = iter(torch.autograd.grad(declared.value, every, retain_graph=True, allow_unused=True))
            for learner, own in parameters.items():
                numbered = enumerate([next(gradient) for _ in own])
                found[term, learner] = {i: g for i, g in numbered if g is not None and g.any()}
    return found


def same_lesson(a: Lesson, b: Lesson) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[i], b[i]) for i in a)


def other_images(batches: tuple) -> tuple:
    """The same labelled batch with other unlabelled images, each view changed."""
    labeled, unlabeled = batches
    changed = {
        name: torch.randn(view.shape, generator=torch.Generator().manual_seed(1))
        for name in ("weak", "strong")
        if (view := getattr(unlabeled, name)) is not None
    }
    return labeled, dataclasses.replace(unlabeled, **changed)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def prediction_gradients(trainer: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of what the network predicts, which tell the parameters that prediction uses."""
    trainer.set_deep_supervision_enabled(False)
    found = gradients(trainer, trainer.network(image).square().sum())
    trainer.set_deep_supervision_enabled(True)
    return {name: gradient for name, gradient in found.items() if gradient.abs().max() > 0}


def biases_before_normalisation(network: torch.nn.Module) -> set[str]:
    """Biases of convolutions have no effect where a normalisation follows; segmentation layers have none."""
    return {
        f"{name}.bias"
        for name, module in network.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)) and ".seg_layers." not in name
    }


def after_two_steps(trainer: Any) -> tuple[Any, tuple]:
    """The trainer and a batch, once gates that start closed are open."""
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    return trainer, trainer.to_batches(next(trainer.dataloader_train))


def checkpoint(trainer: Any, name: str = "checkpoint_final.pth") -> dict[str, Any]:
    return torch.load(Path(trainer.output_folder) / name, weights_only=False)


# ---------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("name", TRAINERS)
def test_the_plugin_module_exports_the_packages_own_class(name):
    from lgssl_nnunet.nnunet_plugin import lgssl_trainers

    assert getattr(lgssl_trainers, name) is find_trainer(name)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_class_pickles(name):
    assert pickle.loads(pickle.dumps(find_trainer(name))) is find_trainer(name)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_name_does_not_exist_in_nnunetv2(name):
    assert _find_stock_trainer(name) is None


@pytest.mark.parametrize("name", TRAINERS)
def test_the_file_is_short(name):
    file = Path(__import__(trainer_modules()[name], fromlist=[name]).__file__)
    assert len(file.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", TRAINERS)
def test_hyperparameters_are_a_frozen_dataclass_that_documents_every_field(name):
    hyperparameters = find_trainer(name).hyperparameters
    assert type(hyperparameters).__dataclass_params__.frozen
    for field in dataclasses.fields(hyperparameters):
        assert f"\n        {field.name}: " in type(hyperparameters).__doc__


# ---------------------------------------------------------------------------------------------------- terms and logs


@pytest.mark.parametrize("name", GRID)
def test_every_term_of_every_iteration_is_finite_and_logged(name, finished):
    trainer = finished(name)
    assert [row["epoch"] for row in trainer.term_log.rows] == [0, 1]
    for row in trainer.term_log.rows:
        assert len(row) > 1
        assert all(math.isfinite(value) for value in row.values())
    header = (Path(trainer.output_folder) / "lgssl_terms.csv").read_text().splitlines()[0]
    assert header.split(",") == ["epoch", *trainer.term_log.names()]


@pytest.mark.parametrize("name", GRID)
def test_a_step_reports_the_value_of_each_term_and_the_weight_of_each_unlabeled_one(name, started):
    trainer = started(name)
    batch = next(trainer.dataloader_train)
    terms = terms_of(trainer, trainer.to_batches(batch))
    values = trainer.train_step(batch)
    weights = {f"weight of {term}" for term in terms if terms[term].uses_unlabeled}
    assert set(values) == {"loss", *terms, *weights}


@pytest.mark.parametrize("name", WITH_UNLABELED)
def test_a_method_with_an_unlabeled_stream_declares_terms_that_use_it(name, started):
    trainer = started(name)
    terms = terms_of(trainer, trainer.to_batches(next(trainer.dataloader_train)))
    assert any(term.uses_unlabeled for term in terms.values())
    assert any(not term.uses_unlabeled for term in terms.values()) == (name in LABELED_APART)


@pytest.mark.parametrize("name", WITHOUT_UNLABELED)
def test_a_method_without_an_unlabeled_stream_never_sees_an_unlabeled_patch(name, started):
    trainer = started(name)
    batches = trainer.to_batches(next(trainer.dataloader_train))
    assert batches[1] is None
    assert not any(term.uses_unlabeled for term in terms_of(trainer, batches).values())


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("name", GRID)
def test_each_term_has_a_gradient_in_a_network_that_is_finite_and_not_zero(name, started):
    trainer = started(name, **every_voxel(name))
    trainer.train_step(next(trainer.dataloader_train))  # after it, teacher and student (or decoders) differ for sure
    batches = trainer.to_batches(next(trainer.dataloader_train))
    for term in terms_of(trainer, batches):
        found = gradients(trainer, terms_of(trainer, batches)[term].value)
        assert all(torch.isfinite(gradient).all() for gradient in found.values()), term
        assert any(gradient.abs().max() > 0 for gradient in found.values()), term


@pytest.mark.parametrize("name", GRID)
def test_the_labeled_terms_alone_train_every_parameter_that_prediction_uses(name, started):
    trainer, batches = after_two_steps(started(name))
    used = set(prediction_gradients(trainer, batches[0].image)) - biases_before_normalisation(trainer.network)
    terms = terms_of(trainer, batches)
    labeled = {n: term for n, term in terms.items() if name in MIXED or not term.uses_unlabeled}
    found = gradients(trainer, trainer.total(labeled))
    assert used
    assert [n for n in sorted(used) if n not in found or not found[n].abs().max() > 0] == []


@pytest.mark.parametrize("name", GRID)
def test_the_total_trains_every_parameter_of_the_network_and_of_its_companions(name, started):
    trainer, batches = after_two_steps(started(name))
    found = gradients(trainer, trainer.total(terms_of(trainer, batches)))
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    # Critics are no part of it: `extra_steps` trains them.
    expected = {n for n, p in trained_parameters(trainer).items() if p.requires_grad}
    expected -= biases_before_normalisation(trainer.network)
    for part, companion in companions(trainer).items():
        expected -= {f"{part}/{n}" for n in biases_before_normalisation(companion)}
    # nnU-Net's deep supervision gives the lowest resolution the weight 0.
    expected = {n for n in expected if ".seg_layers.0." not in n}
    assert [n for n in sorted(expected) if n not in found or not found[n].abs().max() > 0] == []


@pytest.mark.parametrize("name", GRID)
def test_every_trainable_parameter_of_the_network_is_in_the_optimizer_once(name, started):
    trainer = started(name)
    optimized = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(optimized) == len(set(optimized))
    assert {id(p) for p in trainer.network.parameters() if p.requires_grad} <= set(optimized)
    assert set(optimized) == {id(p) for p in trained_parameters(trainer).values()}


@pytest.mark.parametrize("name", GRID)
def test_a_method_with_an_optimizer_of_its_own_says_that_it_trains_in_one_process(name, started, trainer_class):
    # Nothing would average its gradients over the processes.
    has_own = any(hasattr(part, "optimizer") for part in started(name).parts.values())
    assert not (has_own and trainer_class(name).supports_several_gpus)


@pytest.mark.parametrize("name", WITH_UNLABELED)
def test_what_unlabeled_terms_teach_comes_from_each_teacher_or_peer_and_not_from_the_learner(
    name, started, monkeypatch
):
    trainer, batches = after_two_steps(started(name, **every_voxel(name)))
    learners = PEERS.get(name, ("network",))
    partners = PEERS.get(name, ("teacher",) if trainer.teacher is not None else ())
    assert bool(partners) != (name in ALONE), "say in PEERS or in ALONE which networks learn from each other"
    taught, method, verdicts = set(), *VERDICTS.get(name, ("loss_terms", (None,)))
    for verdict in verdicts:
        if verdict is not None:
            monkeypatch.setattr(trainer, method, lambda *_, verdict=verdict: verdict)
        before = lessons(trainer, batches, learners)
        assert all(same_lesson(before[key], lesson) for key, lesson in lessons(trainer, batches, learners).items())
        taught |= {learner for (term, learner), lesson in before.items() if lesson and (name, term) not in TEACHERS}
        for partner in dict.fromkeys((*partners, *(p for key in TEACHERS if key[0] == name for p in TEACHERS[key]))):
            with disturbed(part_of(trainer, partner)):
                after = lessons(trainer, batches, learners)
            for (term, learner), lesson in before.items():
                if lesson and learner != partner and partner in TEACHERS.get((name, term), partners):
                    assert not same_lesson(lesson, after[term, learner]), (term, learner, partner)
    assert taught == set(learners)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_labeled_terms_know_no_teacher(name, started):
    trainer, batches = after_two_steps(started(name))
    before = terms_of(trainer, batches)
    with disturbed(trainer.teacher.network):
        after = terms_of(trainer, batches)
    assert all(torch.equal(before[n].value, after[n].value) for n in before if not before[n].uses_unlabeled)


@pytest.mark.parametrize("name", LABELED_APART)
def test_with_unlabeled_weights_zero_gradients_are_the_labeled_ones_whatever_the_unlabeled_images(name, started):
    trainer = started(name)
    trainer.train_step(next(trainer.dataloader_train))
    batches = trainer.to_batches(next(trainer.dataloader_train))
    labeled = {n: t for n, t in terms_of(trainer, batches).items() if not t.uses_unlabeled}
    alone = gradients(trainer, trainer.total(labeled))
    silenced = {
        n: dataclasses.replace(t, weight=0.0) if t.uses_unlabeled else t
        for n, t in terms_of(trainer, other_images(batches)).items()
    }
    assert largest_difference(gradients(trainer, trainer.total(silenced)), alone) < 1e-5


@pytest.mark.parametrize("name", SUPERVISED_AT)
def test_with_weight_zero_steps_are_those_of_supervised_training_to_the_bit(name, started, same):
    # With SGD: the first steps of AdamW do not tell a loss from its half.
    trainer = started(name, changes=as_on_a_gpu, training={"seed": 0, "hyperparameters": SUPERVISED_AT[name]})
    supervised = started("SupervisedTrainer", changes=as_on_a_gpu)
    supervised.network.load_state_dict(trainer.network.state_dict())
    for _ in range(2):
        batch = next(trainer.dataloader_train)
        trainer.train_step(batch)
        supervised.train_step({key: value for key, value in batch.items() if not key.startswith("unlabeled_")})
        assert same(dict(trainer.network.state_dict()), dict(supervised.network.state_dict()))


@pytest.mark.parametrize("name", RAMPED)
def test_a_ramp_at_zero_silences_the_unlabeled_terms(name, started, monkeypatch):
    trainer = started(name)
    monkeypatch.setattr(trainer, "ramp", lambda fraction=1.0: 0.0)
    batches = trainer.to_batches(next(trainer.dataloader_train))
    full = gradients(trainer, trainer.total(terms_of(trainer, batches)))
    labeled = {n: t for n, t in terms_of(trainer, batches).items() if not t.uses_unlabeled}
    assert largest_difference(full, gradients(trainer, trainer.total(labeled))) < 1e-5


@pytest.mark.parametrize("name", WITH_UNLABELED)
def test_other_unlabeled_images_change_only_the_terms_that_use_them(name, started):
    trainer = started(name, **every_voxel(name))
    trainer.train_step(next(trainer.dataloader_train))
    batches = trainer.to_batches(next(trainer.dataloader_train))
    before, after = terms_of(trainer, batches), terms_of(trainer, other_images(batches))
    changed = {n for n in before if abs(float(before[n].value.detach() - after[n].value.detach())) > 1e-5}
    assert changed == {n for n in before if before[n].uses_unlabeled}


@pytest.mark.parametrize("name", WITHOUT_GUIDE)
def test_the_labeled_segmentation_does_not_enter_the_unlabeled_terms(name, started):
    trainer = started(name)
    labeled, unlabeled = trainer.to_batches(next(trainer.dataloader_train))
    empty = dataclasses.replace(labeled, target=[torch.zeros_like(scale) for scale in labeled.target])
    before, after = terms_of(trainer, (labeled, unlabeled)), terms_of(trainer, (empty, unlabeled))
    for term in (n for n in before if before[n].uses_unlabeled):
        assert float(before[term].value.detach()) == float(after[term].value.detach())
    assert any(float(before[n].value.detach()) != float(after[n].value.detach()) for n in before)


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_gradient_reaches_the_teacher_and_no_optimizer_holds_it(name, started):
    trainer = started(name)
    trainer.train_step(next(trainer.dataloader_train))
    batches = trainer.to_batches(next(trainer.dataloader_train))
    trainer.total(terms_of(trainer, batches)).backward()
    parameters = list(trainer.teacher.network.parameters())
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert all(p.grad is None and not p.requires_grad and id(p) not in optimized for p in parameters)
    assert not trainer.teacher.network.training


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_teacher_copies_the_first_step_and_then_lags_behind_the_student(name, started):
    trainer = started(name)

    def distance() -> float:
        pairs = zip(trainer.teacher.network.parameters(), trainer.network.parameters(), strict=True)
        return max(float((teacher - student).detach().abs().max()) for teacher, student in pairs)

    trainer.train_step(next(trainer.dataloader_train))
    assert distance() == 0
    trainer.train_step(next(trainer.dataloader_train))
    assert distance() > 0


# ----------------------------------------------------------------------------------------------------------- situations


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", GRID)
def test_a_training_step_works_or_the_trainer_refuses_what_is_listed_up_front(name, situation, started, tmp_path):
    if (name, situation) in REFUSES:
        with pytest.raises(LGSSLError):
            started(name, results=tmp_path, **SITUATIONS[situation])
        assert not list(tmp_path.iterdir())
        return
    trainer = started(name, results=tmp_path, **SITUATIONS[situation])
    before = [p.detach().clone() for p in trainer.network.parameters()]
    values = trainer.train_step(next(trainer.dataloader_train))
    assert all(math.isfinite(float(value)) for value in values.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))
    trainer.on_validation_epoch_start()
    with torch.no_grad():
        assert math.isfinite(float(trainer.validation_step(next(trainer.dataloader_val))["loss"]))


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_patches_of_three_foreground_classes_hold_all_of_them(configuration, started):
    trainer = started("SupervisedTrainer", variant="four_classes", configuration=configuration)
    targets = [trainer.to_batches(next(trainer.dataloader_train))[0].target[0] for _ in range(4)]
    assert trainer.label_manager.num_segmentation_heads == 4
    assert set(torch.cat(targets).unique().tolist()) - {-1} == {0, 1, 2, 3}


def test_the_lists_of_this_file_name_trainers_and_situations_that_exist():
    lists = (STEADY, GUIDED, EVERY_VOXEL, SUPERVISED_AT, PEERS, ALONE, VERDICTS)
    named = {*(name for names in lists for name in names), *(name for name, _ in (*TEACHERS, *REFUSES))}
    assert named <= set(GRID)
    assert {situation for _, situation in REFUSES} <= set(SITUATIONS)


@pytest.mark.parametrize("name", WITH_UNLABELED)
def test_without_unlabeled_cases_the_method_refuses_and_leaves_no_folder(name, build, tiny_dataset, tmp_path):
    split = {**tiny_dataset().plans()["lgssl"]["split"], "unlabeled": []}
    with pytest.raises(SplitError, match="no unlabelled image"):
        build(name, split=split, results=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", WITHOUT_UNLABELED)
def test_a_method_that_needs_no_unlabeled_case_trains_without_one(name, started, tiny_dataset):
    split = {**tiny_dataset().plans()["lgssl"]["split"], "unlabeled": []}
    trainer = started(name, split=split)
    assert math.isfinite(float(trainer.train_step(next(trainer.dataloader_train))["loss"]))


@pytest.mark.parametrize("fold", range(5))
@pytest.mark.parametrize("name", GRID)
def test_a_fold_needs_five_labeled_cases(name, fold, build, tiny_dataset):
    split = tiny_dataset().plans()["lgssl"]["split"]
    few = {**split, "labeled": split["labeled"][:4], "unlabeled": split["unlabeled"] + split["labeled"][4:]}
    with pytest.raises(SplitError, match="at least 5"):
        build(name, fold=fold, split=few)


@pytest.mark.parametrize("name", GRID)
def test_folds_split_the_labeled_cases_and_nothing_else(name, build, tiny_dataset):
    labeled = set(tiny_dataset().plans()["lgssl"]["split"]["labeled"])
    validated = []
    for fold in range(5):
        training, validation = build(name, fold=fold).do_split()
        assert set(training) | set(validation) == labeled
        assert not set(training) & set(validation)
        validated += validation
    assert sorted(validated) == sorted(labeled)


@pytest.mark.parametrize("name", GRID)
def test_the_streams_hold_the_cases_of_the_split(name, started, tiny_dataset):
    split = tiny_dataset().plans()["lgssl"]["split"]
    loaders = started(name).dataloader_train.data_loader.loaders
    assert list(loaders["labeled"].indices) == split["labeled"]
    if "unlabeled" in loaders:
        assert list(loaders["unlabeled"].indices) == split["unlabeled"]


@pytest.mark.parametrize("name", WITH_UNLABELED)
def test_as_many_unlabeled_patches_as_asked_for_are_drawn_for_every_view(name, build, started, trainer_class):
    asked = {"training": {"seed": 0, "unlabeled_batch_size": 3}}
    if trainer_class(name).pairs_batches:
        with pytest.raises(UsageError, match="pairs every labelled with an unlabelled patch"):
            build(name, **asked)
        return
    trainer = started(name, **asked)
    labeled, unlabeled = trainer.to_batches(next(trainer.dataloader_train))
    views = {name: len(view) for name in ("weak", "strong") if (view := getattr(unlabeled, name)) is not None}
    assert views == dict.fromkeys(trainer.views, 3)
    assert (len(labeled.image), len(unlabeled.keys)) == (2, 3)


# --------------------------------------------------------------------------------------------- optimiser and precision


@pytest.mark.parametrize("name", GRID)
def test_gpu_plans_are_trained_with_nnunets_optimizer_and_schedule(name, started):
    trainer = started(name, epochs=4, changes=as_on_a_gpu)
    assert type(trainer.optimizer) is torch.optim.SGD
    assert type(trainer.lr_scheduler) is PolyLRScheduler
    for group in trainer.optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.99, True, 3e-5)
    for epoch in range(4):
        trainer.lr_scheduler.step(epoch)
        assert learning_rates(trainer) == pytest.approx([1e-2 * (1 - epoch / 4) ** 0.9] * num_networks(trainer))


@pytest.mark.parametrize("name", GRID)
def test_cpu_plans_are_trained_with_adamw_and_a_learning_rate_that_falls_every_iteration(name, started):
    trainer = started(name, epochs=2, iterations=2)
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {1e-2}
    for step in range(4):
        trainer.train_step(next(trainer.dataloader_train))
        rate = 1e-3 * (1 + math.cos(math.pi * step / 4))
        assert learning_rates(trainer) == pytest.approx([rate] * num_networks(trainer))


@pytest.mark.parametrize("name", GRID)
def test_a_processor_with_bfloat16_computes_the_terms_in_it_and_they_stay_finite(name, started, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    trainer, seen = started(name), []
    original = trainer.loss_terms

    def loss_terms(*batches: Any) -> Terms:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return original(*batches)

    trainer.loss_terms = loss_terms
    values = trainer.train_step(next(trainer.dataloader_train))
    assert seen == [(True, torch.bfloat16)]
    assert all(math.isfinite(float(value)) for value in values.values())
    assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", GRID)
def test_a_processor_without_bfloat16_computes_in_float32(name, started, monkeypatch):
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    trainer, seen = started(name), []
    original = trainer.loss_terms
    trainer.loss_terms = lambda *batches: seen.append(torch.is_autocast_enabled("cpu")) or original(*batches)
    trainer.train_step(next(trainer.dataloader_train))
    assert seen == [False]


# ------------------------------------------------------------------------------------------------------------ mirroring


@pytest.mark.parametrize(
    ("configuration", "allowed", "expected"),
    [
        ("3d_fullres", None, (0, 1, 2)),
        ("3d_fullres", [0, 1], (0, 1)),
        ("3d_fullres", [], None),
        ("2d", [0, 1], (0,)),
        ("2d", [0], None),
    ],
)
@pytest.mark.parametrize("name", GRID)
def test_training_and_checkpoint_mirror_along_the_planned_axes_only(
    name, configuration, allowed, expected, started, tmp_path
):
    trainer = started(name, configuration=configuration, mirroring_axes=allowed)
    for loader in trainer.dataloader_train.data_loader.loaders.values():
        views = isinstance(loader.transforms, ViewsTransform)
        pipeline = loader.transforms.geometry if views else loader.transforms
        mirrors = [t for t in pipeline.transforms if isinstance(t, MirrorTransform)]
        assert [tuple(mirror.allowed_axes) for mirror in mirrors] == ([expected] if expected else [])
    trainer.save_checkpoint(tmp_path / "checkpoint.pth")
    stored = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert stored["inference_allowed_mirroring_axes"] == expected


# ---------------------------------------------------------------------------------------------- failing and resuming


@pytest.mark.parametrize("name", GRID)
def test_a_term_that_is_not_finite_skips_the_step_and_is_named(name, started, same, caplog):
    trainer = started(name)
    trainer.train_step(next(trainer.dataloader_train))
    batch = next(trainer.dataloader_train)
    original = trainer.loss_terms

    def state() -> list[dict]:
        parts = [part.state_dict() for part in (trainer.network, *trainer._stateful_parts().values())]
        return [*parts, trainer.optimizer.state_dict()["state"]]

    before = pickle.dumps(state())
    for broken in terms_of(trainer, trainer.to_batches(batch)):

        def loss_terms(*batches: Any, broken: str = broken) -> Terms:
            terms = original(*batches)
            return {**terms, broken: dataclasses.replace(terms[broken], value=terms[broken].value * float("inf"))}

        trainer.loss_terms = loss_terms
        done = trainer.iteration
        assert set(trainer.train_step(batch)) == {"loss"}
        assert f"Iteration {done} is skipped: the loss term '{broken}' became" in caplog.text
        assert same(state(), pickle.loads(before))
        assert trainer.iteration == done + 1
        trainer.non_finite.done()


@pytest.mark.parametrize("name", GRID)
def test_a_gradient_that_is_not_finite_skips_the_step_and_five_end_the_run(name, started, same, caplog):
    trainer = started(name)
    next(iter(trainer.network.parameters())).register_hook(lambda gradient: gradient * float("nan"))
    before = pickle.dumps(trainer.network.state_dict())
    batch = next(trainer.dataloader_train)
    for _ in range(4):
        assert math.isnan(trainer.train_step(batch)["loss"])
    assert "norm of the gradient, although the loss is finite, became nan (4 skipped so far)" in caplog.text
    with pytest.raises(TrainingError, match=r"5 steps in a row .* iteration 4, because the norm of the gradient"):
        trainer.train_step(batch)
    assert same(trainer.network.state_dict(), pickle.loads(before))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", GRID)
def test_resuming_ends_as_an_uninterrupted_run_to_the_bit(name, schedule, check_resuming):
    check_resuming(name, epochs=4, changes=SCHEDULES[schedule])


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_the_checkpoint_holds_the_teacher_beside_the_prediction_network(name, finished, same):
    trainer = finished(name)
    stored = checkpoint(trainer)
    assert same(stored["lgssl"]["teacher"], trainer.teacher.state_dict())
    assert same(stored["network_weights"], trainer.network.state_dict())


# ----------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("name", GRID)
def test_the_weights_fit_the_network_that_the_class_builds_from_the_plans_alone(name, finished, trainer_class):
    trainer = finished(name)
    network = trainer_class(name).build_network_architecture(
        trainer.plans_manager,
        trainer.configuration_manager,
        trainer.num_input_channels,
        trainer.label_manager.num_segmentation_heads,
        enable_deep_supervision=False,
    )
    network.load_state_dict(checkpoint(trainer)["network_weights"], strict=True)
    patch = trainer.configuration_manager.patch_size
    logits = network.eval()(torch.zeros(1, trainer.num_input_channels, *patch))
    assert logits.shape == (1, trainer.label_manager.num_segmentation_heads, *patch)


@pytest.mark.parametrize("name", TRAINERS)
def test_the_model_folder_predicts_an_image_file(name, finished, tiny_dataset, tmp_path):
    import SimpleITK as sitk

    from lgssl_nnunet.inference.predictor import Case, LGSSLPredictor

    trainer = finished(name)
    image = tiny_dataset().raw / "imagesTs" / "test_000_0000.nii.gz"
    predictor = LGSSLPredictor(torch.device("cpu"), use_mirroring=False, progress=False)
    predictor.load_model(trainer.output_folder_base, ["all"])
    output = tmp_path / "test_000.nii.gz"
    assert predictor.predict_files([Case("test_000", (image,), output)]) == {}
    segmentation = sitk.ReadImage(str(output))
    assert segmentation.GetSize() == sitk.ReadImage(str(image)).GetSize()
    assert set(np.unique(sitk.GetArrayViewFromImage(segmentation))) <= {0, 1, 2}


@pytest.mark.parametrize("name", [name for name in TRAINERS if (name, "regions") not in REFUSES])
def test_a_model_of_regions_writes_label_values(name, build, tiny_dataset, tmp_path):
    import SimpleITK as sitk

    from lgssl_nnunet.cli.predict import main

    trainer = build(name, variant="regions", epochs=1)
    trainer.run_training()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    for key, weight in content["network_weights"].items():
        if ".seg_layers." in key and key.endswith("weight"):
            weight.mul_(50)  # so that a network of two steps finds regions that overlap
    torch.save(content, file)
    words = f"-device cpu -npp 0 -nps 0 --disable_tta --disable_progress_bar --save_probabilities -o {tmp_path / 'out'}"
    images = str(tiny_dataset("regions").raw / "imagesTs")
    assert main(["-m", trainer.output_folder_base, "-i", images, *words.split()]) == 0
    segmentations = sorted((tmp_path / "out").glob("*.nii.gz"))
    assert len(segmentations) == 2
    order = tiny_dataset("regions").dataset_json()["regions_class_order"]
    written = set()
    for segmentation in segmentations:
        probabilities = np.load(segmentation.with_name(segmentation.name.replace(".nii.gz", ".npz")))["probabilities"]
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(segmentation)))
        expected = np.zeros_like(found)
        for region, value in zip(probabilities, order, strict=True):
            expected[region > 0.5] = value
        assert np.array_equal(found, expected)
        written |= set(np.unique(found).tolist())
    assert written == {0, 1, 2}


@pytest.mark.parametrize("name", TRAINERS)
def test_stock_nnunet_predicts_the_same_logits_from_the_model_folder(name, finished, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from lgssl_nnunet.inference.predictor import LGSSLPredictor

    monkeypatch.setenv("nnUNet_extTrainer", str(ext_trainer_path()))
    trainer = finished(name)
    stock = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    stock.initialize_from_trained_model_folder(trainer.output_folder_base, ("all",), "checkpoint_final.pth")
    ours = LGSSLPredictor(torch.device("cpu"), use_mirroring=False, progress=False)
    ours.load_model(trainer.output_folder_base, ["all"])
    image = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 22, 26, 26)).astype(np.float32))
    logits: list[Callable] = [p.predict_logits_from_preprocessed_data(image) for p in (stock, ours)]
    assert torch.equal(*logits)
