"""What a model folder may hold: weights that are numbers, and entries of the kind that nnU-Net writes."""

from __future__ import annotations

import pytest
import torch

from lgssl_nnunet.errors import CheckpointError
from lgssl_nnunet.inference.models import read_model_json
from lgssl_nnunet.inference.stored_model import read_stored_model


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("trainer_name", ["nnUNetTrainer"]),
        ("init_args", ("3d_fullres",)),
        ("init_args", {"configuration": None}),
        ("network_weights", torch.ones(3)),
        ("network_weights", {"encoder": "text"}),
        ("inference_allowed_mirroring_axes", 1),
        ("inference_allowed_mirroring_axes", (0, 7)),
        ("inference_allowed_mirroring_axes", (0, 0)),
    ],
)
def test_an_entry_of_another_kind_is_named(entry, value, model_maker):
    folder = model_maker()
    file = folder / "fold_0/checkpoint_final.pth"
    torch.save({**torch.load(file), entry: value}, file)
    with pytest.raises(CheckpointError, match=rf"checkpoint_final\.pth has another {entry} than nnU-Net writes"):
        read_stored_model(folder, ["0"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_in_any_fold(value, model_maker):
    folder = model_maker(folds=(0, 1))
    file = folder / "fold_0/checkpoint_final.pth"
    checkpoint = torch.load(file)
    name = next(iter(checkpoint["network_weights"]))
    checkpoint["network_weights"][name].view(-1)[0] = value
    torch.save(checkpoint, file)
    with pytest.raises(CheckpointError, match=r"fold_0.checkpoint_final\.pth are NaN or infinite in encoder"):
        read_stored_model(folder, ["0", "1"]).network_with_weights()


def test_descriptions_that_are_no_objects_are_refused(tmp_path):
    (tmp_path / "plans.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"plans\.json holds no JSON object"):
        read_model_json(tmp_path, "plans.json")
