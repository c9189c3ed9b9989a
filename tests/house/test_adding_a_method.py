"""Follows docs/adding_a_method.md: the file on the page is a method that trains and predicts."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lgssl_nnunet.trainers
from lgssl_nnunet.errors import UsageError
from lgssl_nnunet.registry import find_trainer, trainer_modules
from lgssl_nnunet.trainers.base import SemiSupervisedTrainer

NAME, MODULE = "ICTTrainer", "lgssl_nnunet.trainers.ict"
LONGEST_METHOD_FILE = 150
# The grid's tests of the file and of its terms; those of what every trainer inherits would double the time.
SHORT_TESTS = "is_short or pickles or documents or terms or every_parameter) and not (bfloat16"
# A plugin of pytest, because the grid collects the trainers while it is imported.
PLUGIN = """
import lgssl_nnunet.trainers

for folders in (lgssl_nnunet.trainers.__path__, lgssl_nnunet.trainers.__spec__.submodule_search_locations):
    if {folder!r} not in folders:
        folders.append({folder!r})
"""


@pytest.fixture(scope="module")
def page(root) -> str:
    return (root / "docs" / "adding_a_method.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def method_file(page, tmp_path_factory) -> Iterator[str]:
    """The text of the page's file, which stands in a second folder of `trainers`."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    text = "".join(f"\n\n{block}" if block.startswith("class ") else f"\n{block}" for block in blocks).lstrip("\n")
    folder = tmp_path_factory.mktemp("trainers")
    (folder / "ict.py").write_text(text, encoding="utf-8")
    folders = [*lgssl_nnunet.trainers.__path__, str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lgssl_nnunet.trainers, "__path__", folders)
        patch.setattr(lgssl_nnunet.trainers.__spec__, "submodule_search_locations", folders)
        importlib.invalidate_caches()
        yield text
    sys.modules.pop(MODULE, None)
    vars(lgssl_nnunet.trainers).pop("ict", None)


@pytest.fixture(scope="module")
def trained(method_file, build_trainer):
    """The page's method after two iterations."""
    trainer = build_trainer(NAME, epochs=1, iterations=2)
    trainer.run_training()
    return trainer


def test_the_registry_finds_the_file_on_the_page(method_file):
    assert trainer_modules()[NAME] == MODULE
    assert find_trainer(NAME).__module__ == MODULE
    assert method_file.count("\n") <= LONGEST_METHOD_FILE


def test_its_hyperparameters_are_documented_and_checked(method_file):
    hyperparameters = find_trainer(NAME).hyperparameters
    for field in dataclasses.fields(hyperparameters):
        assert f"\n        {field.name}: " in type(hyperparameters).__doc__
    with pytest.raises(ValueError, match="alpha=0"):
        dataclasses.replace(hyperparameters, alpha=0)


def test_it_trains_and_logs_its_terms(trained):
    assert trained.iteration == 2
    (row,) = trained.term_log.rows
    assert {"supervised", "consistency", "weight of consistency"} <= row.keys()
    assert all(math.isfinite(value) for value in row.values())


def test_its_checkpoint_predicts(trained, tiny_dataset, tmp_path):
    import SimpleITK as sitk
    import torch

    from lgssl_nnunet.inference.predictor import Case, LGSSLPredictor

    image = tiny_dataset().raw / "imagesTs" / "test_000_0000.nii.gz"
    predictor = LGSSLPredictor(torch.device("cpu"), use_mirroring=False, progress=False)
    predictor.load_model(trained.output_folder_base, ["all"])
    output = tmp_path / "test_000.nii.gz"
    assert predictor.predict_files([Case("test_000", (image,), output)]) == {}
    assert sitk.ReadImage(str(output)).GetSize() == sitk.ReadImage(str(image)).GetSize()


def test_it_refuses_what_the_page_says(method_file, build_trainer, tmp_path):
    with pytest.raises(UsageError, match="use --unlabeled_batch_size 2 or more"):
        build_trainer(NAME, results=tmp_path, training={"unlabeled_batch_size": 1})
    assert not list(tmp_path.iterdir())


def test_the_contract_grid_finds_it_and_has_nothing_to_say_against_it(method_file, root, tmp_path):
    folder = str(Path(inspect.getfile(find_trainer(NAME))).parent)
    (tmp_path / "with_the_pages_file.py").write_text(PLUGIN.format(folder=folder), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "with_the_pages_file", "-p", "no:cacheprovider"]
    command += ["tests/trainers/test_trainer_contract.py", "-k", f"{NAME} and ({SHORT_TESTS})"]
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(command, cwd=root, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 10


def test_a_mixture_with_share_one_is_the_patch_itself(method_file):
    import torch

    mixed = importlib.import_module(MODULE).mixed
    patches = torch.arange(4.0).view(2, 1, 2)
    assert torch.equal(mixed(patches, 1.0), patches)
    assert torch.equal(mixed(patches, 0.25), torch.tensor([[[1.5, 2.5]], [[0.5, 1.5]]]))


def test_the_hooks_on_the_page_exist_and_the_named_files_use_them(page, root):
    rows = re.findall(r"^\| `(\w+)` \| .* \| `(trainers/\w+\.py)` \|$", page, flags=re.MULTILINE)
    assert len(rows) > 4
    for hook, file in rows:
        assert callable(getattr(SemiSupervisedTrainer, hook))
        assert f"def {hook}(" in (root / file).read_text(encoding="utf-8"), (hook, file)


def test_names_on_the_page_exist(page, root):
    for name in set(re.findall(r"`self\.(\w+)", page)) - {"network", "teacher", "hp"}:
        assert hasattr(SemiSupervisedTrainer, name), name
    for file in re.findall(r"\b(?:tests|benchmarks|docs|trainers)/[\w/]+\.\w+", page):
        if file not in ("trainers/ict.py", "tests/trainers/test_ict.py"):
            assert (root / file).is_file(), file
    for keyword in ("trained",):
        assert keyword in inspect.signature(SemiSupervisedTrainer.add_network).parameters
