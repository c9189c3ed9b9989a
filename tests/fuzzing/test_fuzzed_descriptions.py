"""JSON and lists of other people: dataset.json, plans, prompts, lists of cases."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import hypothesis.strategies as st

from lgssl_nnunet import training
from lgssl_nnunet.evaluation.evaluate import evaluate
from lgssl_nnunet.inference.models import model_from_folder
from lgssl_nnunet.inference.stored_model import image_rules, read_stored_model
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.integrity import check_integrity
from lgssl_nnunet.plans.splits import choose_budget
from lgssl_nnunet.text.encoders import embed_dataset

sys.path.insert(0, str(Path(__file__).parent))
from mutations import damaged, json_bytes, write
from watching import attempt, fuzz

DATASET_JSON = {
    "channel_names": {"0": "T1"},
    "labels": {"background": 0, "liver": 1, "gallbladder": 2, "ignore": 3},
    "numTraining": 2,
    "file_ending": ".nii.gz",
    "prompts": {"liver": "liver", "gallbladder": ["gallbladder", "kidney"]},
    "overwrite_image_reader_writer": "SimpleITKIO",
}
REGIONS = {
    **DATASET_JSON,
    "labels": {"background": 0, "whole": [1, 2], "gallbladder": 2, "ignore": 3},
    "regions_class_order": [1, 2],
    "prompts": {"whole": "liver"},
}


def with_listed_cases(folder: Path) -> dict:
    names = [file.name.removesuffix("_0000.nii.gz") for file in sorted(folder.glob("imagesTr/*"))]
    listed = {name: {"images": [f"imagesTr/{name}_0000.nii.gz"], "label": f"labelsTr/{name}.nii.gz"} for name in names}
    return {**DATASET_JSON, "dataset": listed}


def test_a_dataset_json_is_refused_or_understood(raw_dataset, tmp_path):
    def read():
        found = load_raw_dataset(901)
        check_integrity(found, progress=False)
        embed_dataset(found.dataset_json, None, "bank")
        return found

    def try_one(content, tally):
        write(raw_dataset / "dataset.json", content)
        found = attempt(read, tmp_path, tally)
        if found is not None:
            assert json.dumps(found.dataset_json) == json.dumps(json.loads(content))
            assert found.labeled
            assert all(file.is_file() for case in found.cases.values() for file in case.images)

    kinds = [json_bytes(kind) for kind in (DATASET_JSON, REGIONS, with_listed_cases(raw_dataset))]
    fuzz("dataset.json", st.one_of(kinds), try_one)


def test_a_prompt_file_is_refused_or_read(tmp_path):
    file = tmp_path / "prompts.json"

    def try_one(content, tally):
        write(file, content)
        found = attempt(lambda: embed_dataset(DATASET_JSON, file, "bank"), tmp_path, tally)
        if found is not None:
            assert [prompt.class_name for prompt in found[0]] == ["background", "liver", "gallbladder"]

    fuzz("prompt files", json_bytes({"liver": "liver", "gallbladder": ["gallbladder", "the gallbladder"]}), try_one)


def test_a_list_of_cases_is_refused_or_read(raw_dataset, tmp_path):
    dataset, file = load_raw_dataset(901), tmp_path / "list.txt"
    names = sorted(dataset.labeled)

    def try_one(content, tally):
        write(file, content)
        budget = attempt(lambda: choose_budget(dataset, labeled_list=file), tmp_path, tally)
        if budget is not None:
            lines = {line.strip() for line in content.decode().splitlines()}
            assert set(budget.labeled) == {line for line in lines if line and not line.startswith("#")}

    text = "\n".join(["# those of the first reader", *names, ""]).encode()
    fuzz("lists of cases", damaged(text, front=28) | st.binary(max_size=40) | st.just(b"9" * 10**6), try_one)


def test_a_description_of_predictions_is_refused_or_understood(raw_dataset, tmp_path):
    prediction = Path(shutil.copytree(raw_dataset / "labelsTr", tmp_path / "prediction"))

    def measure():
        return evaluate(raw_dataset / "labelsTr", prediction, num_processes=0, surface_metrics=False)

    def try_one(content, tally):
        write(prediction / "dataset.json", content)
        found = attempt(measure, tmp_path, tally, may_write=lambda file: file.name.startswith("summary"))
        if found is not None:
            assert {case.dice for case in found["cases"] if case.n_reference} <= {1.0}

    fuzz("dataset.json beside predictions", json_bytes(DATASET_JSON) | json_bytes(REGIONS), try_one)


def test_descriptions_of_a_model_are_refused_or_make_its_network(model, tmp_path):
    originals = {name: (model / name).read_bytes() for name in ("plans.json", "dataset.json")}

    def load():
        chosen = model_from_folder(model)
        image_rules(chosen.model.read_json("plans.json"), chosen.model.read_json("dataset.json"), chosen.folder)
        return read_stored_model(chosen.folder, chosen.folds, chosen.checkpoint).network_with_weights()

    expected = load().state_dict()

    def try_one(example, tally):
        name, content = example
        write(model / name, content)
        network = attempt(load, tmp_path, tally)
        write(model / name, originals[name])
        if network is not None:
            assert all(tensor.equal(expected[key]) for key, tensor in network.state_dict().items())

    changed = [st.tuples(st.just(name), json_bytes(json.loads(content))) for name, content in originals.items()]
    fuzz("plans and dataset.json of a model", st.one_of(changed), try_one)


def test_plans_are_refused_or_make_a_trainer(tiny_dataset, tmp_path, monkeypatch):
    dataset, results = tiny_dataset().copied_to(tmp_path), tmp_path / "results"
    monkeypatch.setattr(training, "_run_training", lambda run, only_validate: run.initialize())

    def train():
        with dataset.environment(results):
            return training.train(901, trainer="LGSSLTrainer", device="cpu", progress=False)

    train()

    def try_one(content, tally):
        write(dataset.plans_file, content)
        shutil.rmtree(results, ignore_errors=True)
        folder = attempt(train, tmp_path, tally, may_write=lambda file: file.is_relative_to(results))
        if folder is not None:
            assert folder.parent == results / dataset.name

    fuzz("plans to train", json_bytes(dataset.plans()), try_one)
