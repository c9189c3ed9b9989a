"""Every trainer in trainers/ against the properties that each must have; a new trainer is found by itself."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch

from lgssl_nnunet.engine.schedules import sigmoid_rampup
from lgssl_nnunet.errors import LGSSLError, TrainingError
from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset
from lgssl_nnunet.registry import find_trainer, trainer_names

TRAINERS = trainer_names()


@pytest.fixture(scope="session")
def preprocessed(tmp_path_factory):
    """Plans of a tiny phantom, 2 epochs of 2 iterations, 4 base features."""
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("contract")
    old = dict(os.environ)
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[variable] = str(root / variable)
    os.environ["nnUNet_n_proc_DA"] = "0"
    spec = PhantomSpec(shape=(20, 24, 24), num_labeled=5, num_unlabeled=3, num_test=1)
    dataset = write_phantom_dataset(root / "nnUNet_raw", spec, progress=False)
    file = plan_and_preprocess(
        [dataset.name],
        planner="LGSSLPlannerCPU",
        labeled=3,
        configurations=["3d_fullres"],
        num_processes=0,
        num_processes_fingerprint=0,
        progress=False,
    )[0]
    plans = json.loads(file.read_text())
    plans["lgssl"]["schedule"].update(num_epochs=2, iterations_per_epoch=2, val_iterations_per_epoch=1)
    arch = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arch["features_per_stage"] = [min(f // 2, 16) for f in arch["features_per_stage"]]
    yield plans, json.loads((file.parent / "dataset.json").read_text())
    os.environ.clear()
    os.environ.update(old)


@pytest.fixture
def build(preprocessed, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    plans, dataset_json = preprocessed

    def make(name, fold="all", **lgssl):
        own = {**json.loads(json.dumps(plans)), "continue_training": False}
        own["lgssl"].update(lgssl)
        trainer = find_trainer(name)(own, "3d_fullres", fold, dataset_json, torch.device("cpu"))
        trainer.show_progress = False
        return trainer

    return make


def start(trainer):
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def gradients(trainer, batch, keep_unlabeled):
    labeled, unlabeled = trainer.to_batches(batch)
    torch.manual_seed(0)
    terms = trainer.loss_terms(labeled, unlabeled)
    if not keep_unlabeled:
        terms = {name: term for name, term in terms.items() if not term.uses_unlabeled}
    trainer.optimizer.zero_grad()
    trainer.total(terms).backward()
    return {n: p.grad.clone() for n, p in trainer.network.named_parameters() if p.grad is not None}


def weights_after_training(trainer):
    trainer.run_training()
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


@pytest.mark.parametrize("name", TRAINERS)
def test_plugin_exports_the_packages_own_class_and_it_pickles(name):
    from lgssl_nnunet.nnunet_plugin import lgssl_trainers

    assert getattr(lgssl_trainers, name) is find_trainer(name)
    assert pickle.loads(pickle.dumps(find_trainer(name))) is find_trainer(name)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_gives_finite_terms_and_changes_the_network(name, build):
    trainer = start(build(name))
    before = {n: p.detach().clone() for n, p in trainer.network.named_parameters()}
    values = trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.isfinite(torch.as_tensor(float(value))) for value in values.values())
    assert any(not torch.equal(p, before[n]) for n, p in trainer.network.named_parameters())


@pytest.mark.parametrize("name", TRAINERS)
def test_with_unlabeled_weights_zero_gradients_are_those_without_unlabeled_terms(name, build, monkeypatch):
    trainer = start(build(name))
    monkeypatch.setattr(trainer, "ramp", lambda fraction=1.0: 0.0)
    batch = next(trainer.dataloader_train)
    full, alone = gradients(trainer, batch, True), gradients(trainer, batch, False)
    assert full.keys() == alone.keys()
    assert max(float((full[n] - alone[n]).abs().max()) for n in full) < 1e-5


@pytest.mark.parametrize("name", TRAINERS)
def test_resuming_ends_in_the_weights_of_an_uninterrupted_run(name, build):
    torch.set_num_threads(1)
    whole = weights_after_training(build(name))
    first = build(name)
    first.num_val_iterations_per_epoch = 1
    first.save_every = 1
    first.on_epoch_end = _stop_after(first.on_epoch_end)
    with pytest.raises(KeyboardInterrupt):
        first.run_training()
    second = build(name)
    second.load_checkpoint(os.path.join(first.output_folder, "checkpoint_latest.pth"))
    assert second.current_epoch == 1
    resumed = weights_after_training(second)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def _stop_after(method):
    def stop():
        method()
        raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("name", TRAINERS)
def test_a_non_finite_term_stops_before_the_step_and_is_named(name, build, monkeypatch):
    trainer = start(build(name))
    original = trainer.supervised_loss
    monkeypatch.setattr(trainer, "supervised_loss", lambda *args: original(*args) * float("nan"))
    before = [p.detach().clone() for p in trainer.network.parameters()]
    with pytest.raises(TrainingError, match="supervised"):
        trainer.train_step(next(trainer.dataloader_train))
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.network.parameters(), strict=True))


@pytest.mark.parametrize("name", TRAINERS)
def test_a_fold_needs_five_labeled_cases(name, build):
    with pytest.raises(LGSSLError, match="at least 5"):
        build(name, fold=0)


@pytest.mark.parametrize("name", [n for n in TRAINERS if find_trainer(n).views])
def test_without_unlabeled_cases_the_method_refuses(name, build, preprocessed):
    split = {**preprocessed[0]["lgssl"]["split"], "unlabeled": []}
    with pytest.raises(LGSSLError, match="no unlabelled image"):
        build(name, split=split)


@pytest.mark.parametrize("name", TRAINERS)
def test_no_mirroring_is_stored_as_none(name, build):
    trainer = start(build(name, mirroring_axes=[]))
    assert trainer.inference_allowed_mirroring_axes is None


def test_rampup_has_its_published_values():
    assert [round(sigmoid_rampup(step, 100), 4) for step in (0, 25, 50, 75, 100, 200)] == [
        0.0067, 0.0601, 0.2865, 0.7316, 1.0, 1.0,
    ]  # fmt: skip
