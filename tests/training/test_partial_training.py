"""Trainings on cases that annotate only some of the classes: from the raw labels to weights, to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms

from lgssl_nnunet.engine.batches import finest
from lgssl_nnunet.engine.seeding import seed_everything
from lgssl_nnunet.engine.validation import leave_out_of_summary
from lgssl_nnunet.errors import PlansError, SplitError
from lgssl_nnunet.plans.splits import require_every_class
from lgssl_nnunet.registry import find_trainer, trainer_names

SUPPORTED = [name for name in trainer_names() if find_trainer(name).supports_partial_labels]
# With these every term of the method counts from the first step.
ALL_TERMS = {"LGSSLTrainer": {"class_map_weight": 0.5, "alignment_weight": 0.5, "ramp_fraction": 0.0}}
KINDS: dict[str, dict[str, Any]] = {
    "classes": {},
    "regions": {"regions": True},
    "ignore": {"ignore": True},
    "slices": {"shape": (24, 24)},
    "slices with regions": {"shape": (24, 24), "regions": True},
    "slices with ignore": {"shape": (24, 24), "ignore": True},
}
CASES = 4  # Cases 0 and 1 annotate the first class or region, case 2 the second, the last both.


def annotate_everything(raw: Path) -> None:
    """Say in words what goes without saying."""
    content = json.loads((raw / "dataset.json").read_text())
    names = [name for name in content["labels"] if name != "background"]
    content.update(annotated={"all of them": names}, groups={"all of them": ["labeled_*"]})
    (raw / "dataset.json").write_text(json.dumps(content))


def annotate(raw: Path) -> None:
    """Let three of the phantom's labelled cases annotate one class only."""
    content = json.loads((raw / "dataset.json").read_text())
    names = [name for name in content["labels"] if name not in ("background", "ignore")]
    cases = sorted(file.name.split(".")[0] for file in (raw / "labelsTr").iterdir())
    content["annotated"] = {cases[2]: [names[1]], "liver only": [names[0]]}
    content["groups"] = {"liver only": [cases[0], f"{cases[1][:-1]}[{cases[1][-1]}]"]}
    (raw / "dataset.json").write_text(json.dumps(content))


def relabel(raw: Path, number: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    file = sorted((raw / "labelsTr").iterdir())[number]
    image = sitk.ReadImage(str(file))
    changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)).astype(np.uint8))
    changed.CopyInformation(image)
    sitk.WriteImage(changed, str(file), True)


def fill(known: list[int], wrong: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """A change that leaves `known` values and puts anything of `wrong` elsewhere."""

    def change(label: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(5).choice(wrong, label.shape)
        return np.where(np.isin(label, known), label, noise)

    return change


def configuration_of(kind: str) -> str:
    return "2d" if "slices" in kind else "3d_fullres"


def damage_but_ignored(raw: Path, with_regions: bool, poisoned: bool) -> None:
    """Do what `damage` does, and leave the voxels of an ignore label."""
    ignored = json.loads((raw / "dataset.json").read_text())["labels"].get("ignore")
    before = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in sorted((raw / "labelsTr").iterdir())]
    damage(raw, with_regions, poisoned)
    for number, label in enumerate(before if ignored is not None else []):
        assert (label == ignored).any()
        relabel(raw, number, lambda damaged, label=label: np.where(label == ignored, ignored, damaged))


def damage(raw: Path, with_regions: bool, poisoned: bool) -> None:
    """Take the classes not annotated out of the labels, or put wrong ones in."""
    if with_regions:  # liver with its gallbladder (1, 2), gallbladder (2)
        for number in (0, 1):  # inside the liver nothing tells where the gallbladder is
            inside = np.random.default_rng(number).choice([1, 2], 1) if not poisoned else None
            relabel(raw, number, lambda label, i=inside: np.where(label > 0, i or fill([], [1, 2])(label), 0))
        relabel(raw, 2, fill([2], [0, 1] if poisoned else [0]))
        return
    for number in (0, 1):
        relabel(raw, number, fill([1], [0, 2] if poisoned else [0]))
    relabel(raw, 2, fill([2], [0, 1] if poisoned else [0]))


@pytest.fixture(scope="module")
def planned(new_phantom, plan_phantom, tmp_path_factory) -> Callable[..., Any]:
    """`planned("regions", "poisoned")`: the planned phantom with partial labels, whose other classes are wrong."""
    made: dict[tuple[str, str], Any] = {}

    def get(labels: str = "classes", state: str = "clean") -> Any:
        if (labels, state) not in made:
            root = tmp_path_factory.mktemp(f"{labels}_{state}")
            raw = new_phantom(root, num_labeled=CASES, num_unlabeled=2, num_test=0, **KINDS[labels])
            if state == "declared":
                annotate_everything(raw)
            elif state != "complete":
                annotate(raw)
                damage_but_ignored(raw, "regions" in labels, state == "poisoned")
            made[labels, state] = plan_phantom(root, raw.name, configurations=(configuration_of(labels),))
        return made[labels, state]

    return get


@pytest.fixture(scope="module")
def trained(planned, build_trainer) -> Callable[..., Any]:
    """A trainer after two short epochs."""
    made: dict[tuple[str, ...], Any] = {}

    def get(name: str, labels: str, state: str) -> Any:
        if (name, labels, state) not in made:
            options = {"training": {"seed": 0, "hyperparameters": ALL_TERMS.get(name, {})}}
            options["configuration"] = configuration_of(labels)
            trainer = build_trainer(name, dataset=planned(labels, state), epochs=2, iterations=2, **options)
            trainer.run_training()
            made[name, labels, state] = trainer
        return made[name, labels, state]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_naming_every_class_as_annotated_changes_neither_files_nor_weights(name, planned, trained, build_trainer, same):
    complete, declared = (planned(state=state) for state in ("complete", "declared"))
    assert complete.plans() == declared.plans()
    files = [
        {file.name: file.read_bytes() for file in folder.preprocessed.glob("*fullres/*.b2nd")}
        for folder in (complete, declared)
    ]
    assert files[0] == files[1]
    fingerprints = [
        json.loads(next(f.preprocessed.glob("dataset_fingerprint_*Plans.json")).read_text())
        for f in (complete, declared)
    ]
    assert fingerprints[0] == fingerprints[1]
    weights = [checkpoint(trained(name, "classes", state))["network_weights"] for state in ("complete", "declared")]
    assert same(*weights)


def checkpoint(trainer: Any) -> dict[str, Any]:
    return torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)


def test_the_two_trainers_support_it():
    assert set(SUPPORTED) == {"SupervisedTrainer", "LGSSLTrainer"}


@pytest.mark.slow
@pytest.mark.parametrize("labels", KINDS)
@pytest.mark.parametrize("name", SUPPORTED)
def test_wrong_values_in_classes_not_annotated_leave_the_weights_as_they_are_to_the_bit(name, labels, trained, same):
    clean, poisoned = (checkpoint(trained(name, labels, state)) for state in ("clean", "poisoned"))
    for key in ("network_weights", "optimizer_state", "lgssl"):
        assert same(clean[key], poisoned[key]), key
    for curve in ("train_losses", "val_losses", "mean_fg_dice", "dice_per_class_or_region"):
        assert same(clean["logging"][curve], poisoned["logging"][curve]), curve


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPPORTED)
def test_every_term_is_finite_and_the_weights_are_others_than_with_complete_labels(name, trained, same):
    trainer = trained(name, "classes", "clean")
    assert trainer.non_finite.skipped == 0
    assert len(trainer.term_log.rows) == 2
    values = [value for row in trainer.term_log.rows for value in row.values()]
    assert all(math.isfinite(value) and abs(value) < 1e3 for value in values)
    complete = checkpoint(trained(name, "classes", "complete"))
    assert not same(complete["network_weights"], checkpoint(trainer)["network_weights"])


def test_the_plans_name_the_cases_and_complete_plans_have_no_such_block(planned):
    partial = planned().plans()["lgssl"]["partial_labels"]
    labeled = planned().plans()["lgssl"]["split"]["labeled"]
    assert partial == {labeled[0]: ["liver"], labeled[1]: ["liver"], labeled[2]: ["gallbladder"]}
    assert "partial_labels" not in planned(state="complete").plans()["lgssl"]


# ------------------------------------------------------------------------------------------------- batches and loss


@pytest.fixture(scope="module")
def started(planned, build_trainer) -> Callable[..., Any]:
    def start(name: str = "SupervisedTrainer", labels: str = "classes", **options: Any) -> Any:
        trainer = build_trainer(name, dataset=planned(labels), **options)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer

    return start


def batch_of(trainer: Any, *numbers: int) -> dict[str, Any]:
    """A batch of the loader under the names of other cases."""
    cases = sorted(trainer.settings["split"]["labeled"])
    batch = {**next(trainer.dataloader_train), "keys": [cases[number] for number in numbers]}
    if not trainer.label_manager.has_regions:  # as the label would have been stored
        for scale in batch["target"]:
            for row, number in enumerate(numbers):
                scale[row][scale[row] == (2, 2, 1, None)[number]] = 0
    return batch


def test_a_batch_knows_what_its_patches_annotate(started):
    trainer = started()
    known = trainer.to_batches(batch_of(trainer, 0, 3))[0].known
    assert known.tolist() == [[True, True, False], [True, True, True]]
    assert trainer.to_batches(batch_of(trainer, 3, 3))[0].known is None
    trainer = started(labels="regions")
    known = trainer.to_batches(batch_of(trainer, 2, 3))[0].known
    assert known.tolist() == [[False, True], [True, True]]


def test_regions_not_annotated_are_0_in_the_target(started):
    trainer = started(labels="regions")
    batch = batch_of(trainer, 2, 3)
    assert all(bool((scale[:, 0].flatten(1).sum(dim=1) > 0).all()) for scale in batch["target"])
    for scale, before in zip(trainer.to_batches(batch)[0].target, batch["target"], strict=True):
        assert not scale[0, 0].any()
        assert torch.equal(scale[1], before[1])
        assert torch.equal(scale[0, 1], before[0, 1])


@pytest.mark.parametrize("labels", ["classes", "regions"])
def test_every_scale_of_deep_supervision_uses_it(started, labels):
    trainer = started(labels=labels)
    labeled = trainer.to_batches(batch_of(trainer, 2, 3))[0]
    outputs = [torch.randn(len(t), labeled.known.shape[1], *t.shape[2:], requires_grad=True) for t in labeled.target]
    trainer.loss.weight_factors = (0.6, 0.4)  # of two scales nnU-Net uses the first
    trainer.supervised_loss(outputs, labeled.target, labeled.known).backward()
    for logits in outputs:
        gradient, p = logits.grad, torch.softmax(logits.detach(), dim=1)
        assert float(gradient[1].abs().max()) > 0
        if labels == "regions":
            assert float(gradient[0, 0].abs().max()) == 0
        else:
            moved = p[0, 1] * gradient[0, 0] - p[0, 0] * gradient[0, 1]
            assert float(moved.abs().max()) <= 1e-6 * float(gradient[0].abs().max())


def test_a_batch_of_complete_patches_takes_nnunets_loss(started, monkeypatch):
    trainer = started()
    labeled = trainer.to_batches(batch_of(trainer, 3, 3))[0]
    from lgssl_nnunet.trainers import base

    monkeypatch.setattr(base, "marginal_logits", lambda *arguments: pytest.fail("merged"))
    assert math.isfinite(float(trainer.loss_terms(labeled, None)["supervised"].value.detach()))


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_labelled_term_depends_on_what_is_annotated(name, started):
    trainer = started(name, training={"seed": 0, "hyperparameters": ALL_TERMS.get(name, {})})
    labeled, unlabeled = trainer.to_batches(batch_of(trainer, 0, 3))
    found = []
    for known in (labeled.known, None):
        seed_everything(0)
        found.append(trainer.loss_terms(replace(labeled, known=known), unlabeled))
    partial, complete = ({name: float(t.value.detach()) for name, t in terms.items()} for terms in found)
    labelled_terms = [name for name, term in found[0].items() if not term.uses_unlabeled]
    assert [name for name in labelled_terms if partial[name] == complete[name]] == []
    assert [name for name in partial if name not in labelled_terms and partial[name] != complete[name]] == []
    assert partial["supervised"] < complete["supervised"]


def test_the_alignment_of_a_partly_annotated_patch_leaves_out_background(started, monkeypatch):
    from lgssl_nnunet.trainers import lg_ssl

    trainer = started("LGSSLTrainer", training={"seed": 0, "hyperparameters": ALL_TERMS["LGSSLTrainer"]})
    seen = []
    original = lg_ssl.alignment
    monkeypatch.setattr(lg_ssl, "alignment", lambda f, p, labels: seen.append(labels) or original(f, p, labels))
    trainer.loss_terms(*trainer.to_batches(batch_of(trainer, 0, 3)))
    assert float(seen[0][0, 0].max()) == 0 < float(seen[0][1, 0].max())


# --------------------------------------------------------------------------------------------- the unlabelled stream


def test_both_streams_draw_partly_annotated_cases_and_the_unlabelled_one_opens_no_label(started, monkeypatch):
    import blosc2

    trainer = started("LGSSLTrainer")
    split = trainer.settings["split"]
    partial = sorted(split["labeled"])[:3]
    assert trainer.partly_annotated_cases() == partial
    loader = trainer.unlabeled_loader(trainer.configuration_manager.patch_size, ComposeTransforms([]))
    assert loader._data.identifiers == sorted([*split["unlabeled"], *partial])
    opened, original = [], blosc2.open
    monkeypatch.setattr(blosc2, "open", lambda urlpath, **o: opened.append(Path(urlpath)) or original(urlpath, **o))
    for case in loader._data.identifiers:
        image, segmentation, _, properties = loader._data.load_case(case)
        assert segmentation.shape == (1, *image.shape[1:])
        assert (segmentation == -1).all()
        assert properties["class_locations"] is None
    folder = Path(trainer.preprocessed_dataset_folder)
    assert sorted(file for file in opened if file.parent == folder) == [folder / f"{case}.b2nd" for case in partial]
    assert {file.parent for file in opened} == {folder, trainer.unlabeled_folder}


def test_completely_annotated_cases_stay_out_of_the_unlabelled_stream(planned, build_trainer):
    trainer = build_trainer("LGSSLTrainer", dataset=planned(state="complete"))
    assert trainer.partly_annotated_cases() == []


@pytest.mark.slow
def test_partly_annotated_cases_alone_are_enough_to_train(planned, build_trainer):
    split = {**planned().plans()["lgssl"]["split"], "unlabeled": []}
    trainer = build_trainer("LGSSLTrainer", dataset=planned(), epochs=1, iterations=2, split=split)
    trainer.run_training()
    assert [row["agreement"] > 0 for row in trainer.term_log.rows] == [True]
    with pytest.raises(SplitError, match="no unlabelled image"):
        build_trainer("LGSSLTrainer", dataset=planned(state="complete"), split=split)


# ------------------------------------------------------------------------------------------------------- validation


def test_the_pseudo_dice_counts_what_a_case_annotates(started):
    trainer = started()
    batch = batch_of(trainer, 0, 3)
    target = finest(batch["target"])
    for head in trainer.network.decoder.seg_layers:  # gallbladder everywhere
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.tensor([0.0, 0.0, 9.0])
    with torch.no_grad():
        counts = trainer.validation_step(batch)
        complete = trainer.validation_step({**batch, "keys": batch_of(trainer, 3, 3)["keys"]})
    voxels = target[0].numel()
    gallbladder = int((target[1] == 2).sum())
    assert counts["tp_hard"].tolist() == [0, gallbladder]
    assert counts["fp_hard"].tolist() == [0, voxels - gallbladder]
    assert counts["fn_hard"].tolist() == [int((target == 1).sum()), 0]
    assert complete["fp_hard"].tolist() == [0, 2 * voxels - gallbladder]
    assert counts["loss"] < complete["loss"]


def test_a_partial_step_counts_as_nnunets_where_nothing_is_hidden(started, monkeypatch):
    trainer = started()
    batch = batch_of(trainer, 3, 3)
    with torch.no_grad():
        stock = trainer.validation_step({**batch, "target": [scale.clone() for scale in batch["target"]]})
        monkeypatch.setattr(trainer, "known_classes", lambda cases: torch.ones(len(cases), 3, dtype=torch.bool))
        ours = trainer.validation_step(batch)
    assert ours.keys() == stock.keys()
    for name in stock:
        np.testing.assert_allclose(ours[name], stock[name], rtol=1e-6)


@pytest.mark.slow
def test_the_final_validation_leaves_out_what_a_case_does_not_annotate(trained, planned, tmp_path):
    trainer = trained("SupervisedTrainer", "classes", "poisoned")
    with planned(state="poisoned").environment(tmp_path):
        trainer.perform_actual_validation()
    text = (Path(trainer.output_folder) / "validation" / "summary.json").read_text()
    summary = json.loads(text)
    found = [entry["metrics"] for entry in summary["metric_per_case"]]
    left_out = [{key for key, values in m.items() if math.isnan(values["TP"])} for m in found]
    assert left_out == [{"2"}, {"2"}, {"1"}, set()]
    for key, cases in (("1", (0, 1, 3)), ("2", (2, 3))):
        expected = np.nanmean([found[number][key]["Dice"] for number in cases])
        assert summary["mean"][key]["Dice"] == pytest.approx(float(expected), nan_ok=True)
        assert summary["mean"][key]["n_ref"] == np.mean([found[number][key]["n_ref"] for number in cases])


def test_a_class_that_no_validation_case_annotates_is_left_out_of_the_mean_over_classes(tmp_path):
    counts = dict.fromkeys(("TP", "FP", "FN", "Dice"), 1.0)
    entries = [{"prediction_file": f"/out/{case}.nii.gz", "metrics": {"1": counts, "2": counts}} for case in "ab"]
    file = tmp_path / "summary.json"
    file.write_text(json.dumps({"metric_per_case": entries, "mean": {"1": counts, "2": counts}, "foreground_mean": {}}))
    dice, mean = leave_out_of_summary(file, ".nii.gz", dict.fromkeys("ab", lambda key: key == 2))
    assert dice[1] == mean == json.loads(file.read_text())["foreground_mean"]["Dice"] == 1
    assert math.isnan(dice[2])


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", [name for name in trainer_names() if name not in SUPPORTED])
def test_other_trainers_refuse_in_a_sentence_before_anything_is_written(name, planned, build_trainer, tmp_path):
    with pytest.raises(PlansError, match=rf"3 labelled cases of .*{name}.*SupervisedTrainer or LGSSLTrainer"):
        build_trainer(name, dataset=planned(), results=tmp_path)
    split = {**planned().plans()["lgssl"]["split"], "unlabeled": []}
    with pytest.raises(PlansError, match=rf"3 labelled cases of .*{name}"):
        build_trainer(name, dataset=planned(), results=tmp_path, split=split)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("names", [["heart"], ["background", "liver"]])
def test_plans_with_classes_that_dataset_json_does_not_have_are_refused(build_trainer, names):
    with pytest.raises(PlansError, match=f"name {names[0]}, which dataset.json does not have as a class"):
        build_trainer("SupervisedTrainer", partial_labels={"a": names})


def test_a_fold_whose_training_cases_lack_a_class_is_refused(tiny_dataset, build_trainer):
    labeled = sorted(tiny_dataset().plans()["lgssl"]["split"]["labeled"])
    partial = {case: ["liver"] for case in labeled[1:]}
    folds = [build_trainer("SupervisedTrainer", fold=fold).do_split()[1] for fold in range(5)]
    (lacking,) = (fold for fold, validation in enumerate(folds) if labeled[0] in validation)
    with pytest.raises(SplitError, match=f"training cases of fold {lacking} annotates gallbladder"):
        build_trainer("SupervisedTrainer", fold=lacking, partial_labels=partial)
    for fold in {*range(5), "all"} - {lacking}:
        build_trainer("SupervisedTrainer", fold=fold, partial_labels=partial)


def test_a_fold_that_leaves_nothing_unlabelled_is_refused(tiny_dataset, build_trainer):
    split = {**tiny_dataset().plans()["lgssl"]["split"], "unlabeled": []}
    (partial, *_), options = sorted(split["labeled"]), {"split": split}
    folds = [build_trainer("SupervisedTrainer", fold=fold).do_split()[1] for fold in range(5)]
    (lacking,) = (fold for fold, validation in enumerate(folds) if partial in validation)
    options["partial_labels"] = {partial: ["liver"]}
    with pytest.raises(SplitError, match=f"no unlabelled image for fold {lacking}, .* train with -f all, put images"):
        build_trainer("LGSSLTrainer", fold=lacking, **options)
    for fold in {*range(5), "all"} - {lacking}:
        build_trainer("LGSSLTrainer", fold=fold, **options)


def test_two_scans_are_enough_for_the_budget_check(planned):
    from lgssl_nnunet.plans.cases import load_raw_dataset

    with planned().environment():
        dataset = load_raw_dataset(901)
        cases = sorted(dataset.labeled)
        require_every_class(dataset.with_labeled([cases[0], cases[2]]))
        with pytest.raises(SplitError, match="annotates gallbladder"):
            require_every_class(dataset.with_labeled(cases[:2]))
