"""The predictor against nnU-Net's own, voxel for voxel, and what it refuses to load."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import weakref
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from lgssl_nnunet.errors import CheckpointError, UsageError
from lgssl_nnunet.inference import predictor as module
from lgssl_nnunet.inference.predictor import Case, LGSSLPredictor

CPU = torch.device("cpu")


def load(folder, folds=(0,), **options) -> LGSSLPredictor:
    predictor = LGSSLPredictor(CPU, progress=False, **options)
    predictor.load_model(folder, folds)
    return predictor


def cases_in(images, output) -> list[Case]:
    return [
        Case(name, (images / f"{name}_0000.nii.gz",), output / f"{name}.nii.gz")
        for name in sorted(file.name.removesuffix("_0000.nii.gz") for file in images.iterdir())
    ]


def voxels(file) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


@pytest.mark.parametrize("axes", [(0, 1, 2), (1,), None])
def test_stock_precision_gives_nnunets_voxels_and_probabilities(model_maker, images, tmp_path, axes):
    folder = model_maker(folds=(0, 1), mirroring_axes=axes)
    theirs = nnUNetPredictor(device=CPU, allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(folder), (0, 1))
    (tmp_path / "theirs").mkdir()
    files = [[str(images / "a_0000.nii.gz")], [str(images / "b_0000.nii.gz")]]
    theirs.predict_from_files_sequential(files, str(tmp_path / "theirs"), save_probabilities=True)
    ours = load(folder, folds=(0, 1))
    assert ours.predict_files(cases_in(images, tmp_path / "ours"), save_probabilities=True) == {}
    for name in "ab":
        assert len(np.unique(voxels(tmp_path / "ours" / f"{name}.nii.gz"))) > 1
        assert np.array_equal(*[voxels(tmp_path / who / f"{name}.nii.gz") for who in ("ours", "theirs")])
        assert np.array_equal(*[np.load(tmp_path / who / f"{name}.npz")["probabilities"] for who in ("ours", "theirs")])


@pytest.mark.parametrize("use_mirroring", [True, False])
@pytest.mark.parametrize("views", [1, 2, 3, 100])
def test_fp32_logits_equal_a_plain_loop_over_windows_and_mirrors(views, use_mirroring, one_fold, monkeypatch):
    monkeypatch.setattr(module, "VIEWS_AT_ONCE", views)
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    predictor = load(folder, precision="fp32", use_mirroring=use_mirroring)
    image = torch.randn(1, 16, 16, 32)
    flips = [f for n in range(4) for f in itertools.combinations((2, 3, 4), n)] if use_mirroring else [()]
    network = predictor.network.eval()
    window = module.compute_gaussian((16, 16, 16), dtype=torch.float32, device=CPU)
    total, weight = torch.zeros(3, 16, 16, 32), torch.zeros(16, 16, 32)
    batches = []
    network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    with torch.no_grad():
        for start in (0, 8, 16):
            patch = image[None, ..., start : start + 16]
            mean = sum(network(patch.flip(flip)).flip(flip) for flip in flips)[0] / len(flips)
            total[..., start : start + 16] += mean * window
            weight[..., start : start + 16] += window
    batches.clear()
    logits = predictor.predict_logits_from_preprocessed_data(image)
    assert logits.dtype == torch.float32
    assert torch.allclose(logits, total / weight, atol=1e-5)
    assert sum(batches) == 3 * len(flips)
    assert set(batches[:-1]) <= {views}


def test_fp32_is_near_stock(one_fold):
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    image = torch.randn(1, 18, 16, 16)
    stock, fp32 = (
        load(folder, precision=p).predict_logits_from_preprocessed_data(image).float() for p in ("stock", "fp32")
    )
    assert not torch.equal(stock, fp32)
    # In the corners of the image the window's weight is so small that fp16 keeps one or two digits of it.
    assert torch.allclose(stock[:, 4:-4, 4:-4, 4:-4], fp32[:, 4:-4, 4:-4, 4:-4], atol=2e-2)


def test_several_folds_average_their_logits(model_maker):
    folder = model_maker(folds=(0, 1))
    image = torch.randn(1, 16, 16, 16)
    both, first, second = (
        load(folder, folds, precision="fp32").predict_logits_from_preprocessed_data(image)
        for folds in ((0, 1), (0,), (1,))
    )
    assert not torch.allclose(first, second, atol=1e-3)
    assert torch.allclose(both, (first + second) / 2, atol=1e-5)


def test_an_empty_list_of_mirroring_axes_means_no_mirroring(model_maker):
    folder = model_maker(mirroring_axes=())
    for precision in ("stock", "fp32"):
        predictor = load(folder, precision=precision)
        assert predictor.allowed_mirroring_axes is None
        assert predictor.predict_logits_from_preprocessed_data(torch.randn(1, 16, 16, 16)).shape == (3, 16, 16, 16)


def test_bf16_is_refused_where_it_is_emulated_and_near_fp32_where_it_is_not(one_fold, monkeypatch):
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: False)
    with pytest.raises(UsageError, match=r"cpu does not compute in torch\.bfloat16 natively"):
        load(folder, precision="bf16")
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: True)
    image = torch.randn(1, 16, 16, 16)
    bf16, fp32 = (load(folder, precision=p).predict_logits_from_preprocessed_data(image) for p in ("bf16", "fp32"))
    assert bf16.dtype == torch.float32
    assert not torch.equal(bf16, fp32)
    assert torch.allclose(bf16, fp32, atol=0.1)


@pytest.mark.parametrize(
    ("device", "has_bf16", "expected"),
    [("cpu", True, "bf16"), ("cpu", False, "fp32"), ("cuda", False, "fp16"), ("mps", True, "fp32")],
)
def test_auto_is_the_fastest_that_the_device_computes_natively(device, has_bf16, expected, monkeypatch):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: has_bf16)
    assert module.resolve_precision("auto", torch.device(device)) == expected


def test_fp16_is_for_cuda_alone():
    assert module.resolve_precision("fp16", torch.device("cuda")) == "fp16"
    for device in ("cpu", "mps"):
        with pytest.raises(UsageError, match=rf"--precision fp16: {device} does not compute in torch\.float16"):
            module.resolve_precision("fp16", torch.device(device))


def test_export_by_slabs_writes_what_nnunets_export_writes(model_maker, images, tmp_path, monkeypatch):
    folder = model_maker(folds=(0, 1))
    written = []
    monkeypatch.setattr(module, "write_segmentation", lambda *a, own=module.write_segmentation: written.append(own(*a)))
    for who, slabs in (("slabs", True), ("nnunet", False)):
        monkeypatch.setattr(module, "can_export_by_slabs", lambda _, slabs=slabs: slabs)
        assert load(folder, (0, 1), precision="fp32").predict_files(cases_in(images, tmp_path / who)) == {}
    assert len(written) == 2
    for name in "ab":
        ours, theirs = (voxels(tmp_path / who / f"{name}.nii.gz") for who in ("slabs", "nnunet"))
        assert len(np.unique(ours)) > 1
        assert (ours != theirs).mean() <= 1e-4


def test_probabilities_and_stock_precision_take_nnunets_export(one_fold, images, tmp_path, monkeypatch):
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    monkeypatch.setattr(module, "write_segmentation", lambda *_: pytest.fail("slabs"))
    cases = cases_in(images, tmp_path)
    assert load(folder, precision="fp32").predict_files(cases, save_probabilities=True) == {}
    assert load(folder, precision="stock").predict_files(cases) == {}


@pytest.mark.parametrize(("cases", "workers", "started"), [(0, 3, 0), (1, 3, 0), (2, 3, 1), (5, 3, 3), (5, 0, 0)])
def test_no_worker_is_started_that_has_nothing_to_do(cases, workers, started, one_fold, monkeypatch, tmp_path):
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    asked, some = [], [Case(str(n), (), tmp_path / f"{n}.nii.gz") for n in range(cases)]
    monkeypatch.setattr(module, "processes", lambda workers: asked.append(workers) or module._InProcess())
    predictor = load(folder, precision="fp32")
    predictor.predict_files(some, num_processes_preprocessing=workers, num_processes_segmentation_export=0)
    assert asked == [0, started]


def test_an_unknown_precision_names_the_known_ones():
    with pytest.raises(UsageError, match="use auto, stock, fp32, bf16, fp16"):
        LGSSLPredictor(CPU, precision="half")


def test_a_failing_case_is_named_and_the_others_are_written(one_fold, images, image_maker, tmp_path, caplog):
    bad = image_maker(images / "c_0000.nii.gz", seed=3)
    voxels_of_bad = np.zeros((16, 16, 16), dtype=np.float32)
    voxels_of_bad[3, 3, 3] = np.nan  # ITK reads NaN in NIfTI files as 0, so this must be found another way
    nibabel.save(nibabel.Nifti1Image(voxels_of_bad, np.eye(4)), bad)
    image_maker(images / "d_0000.nii.gz", seed=4)
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    with caplog.at_level(logging.ERROR):
        failures = load(folder).predict_files(cases_in(images, tmp_path / "out"))
    assert list(failures) == ["c"]
    assert "1 voxels are NaN or infinite" in failures["c"]
    assert "Case c failed" in caplog.text
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["a.nii.gz", "b.nii.gz", "d.nii.gz"]


def poison(predictor, value, is_poisoned) -> None:
    """Have the network give a voxel that is no number where `is_poisoned` says so of its output."""

    def spoil(network, inputs, output):
        if is_poisoned(output):
            output[:, 1, 8, 8, 8] = value
        return output

    predictor.network.register_forward_hook(spoil)


@pytest.mark.parametrize("precision", ["stock", "fp32"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_case_whose_logits_are_no_numbers_fails_alone(value, precision, one_fold, images, tmp_path):
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    predictor, seen = load(folder, precision=precision, perform_everything_on_device=False), []
    poison(predictor, value, lambda output: not seen and not seen.append(output.shape))  # the first window of case a
    failures = predictor.predict_files(cases_in(images, tmp_path / "out"))
    assert list(failures) == ["a"]
    message = {"stock": "use --precision fp32", "fp32": "look for extreme values in the image"}[precision]
    nnunets_own = (precision, value) == ("stock", np.inf)
    assert ("Encountered inf" if nnunets_own else f"in precision {precision}; {message}") in failures["a"]
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b.nii.gz"]


@pytest.mark.parametrize("has_own_switch", [True, False])
def test_fp32_on_cuda_is_without_tf32_and_leaves_cudnn_as_it_was(has_own_switch, monkeypatch):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "benchmark", cudnn.benchmark)  # nnU-Net switches it on and leaves it
    if not has_own_switch:  # as before torch 2.9
        cudnn = SimpleNamespace(allow_tf32=True, benchmark=True)
        monkeypatch.setattr(torch.backends, "cudnn", cudnn)

    def state():
        return (cudnn.conv.fp32_precision if has_own_switch else cudnn.allow_tf32), cudnn.benchmark

    predictor = LGSSLPredictor(torch.device("cuda"), precision="fp32", progress=False)
    before = state()
    assert before[0] not in ("ieee", False)
    with predictor._autocast():
        assert state() == ("ieee" if has_own_switch else False, before[1])
    assert state() == before
    with predictor._autocast(), pytest.raises(MemoryError), predictor._autocast():
        raise MemoryError
    assert state() == before


def test_what_overflows_in_half_precision_is_predicted_again_in_fp32(one_fold, monkeypatch, caplog):
    monkeypatch.setattr(module, "cpu_has_bf16", lambda: True)
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    bf16, fp32 = (load(folder, precision=precision) for precision in ("bf16", "fp32"))
    poison(bf16, np.inf, lambda output: output.dtype == torch.bfloat16)
    image = torch.randn(1, 16, 16, 24)
    assert torch.equal(*[predictor.predict_logits_from_preprocessed_data(image) for predictor in (bf16, fp32)])
    assert "NaN or infinity in bf16; the case is predicted again in fp32" in caplog.text
    assert bf16.precision == "bf16"
    poison(bf16, np.inf, lambda output: True)
    with pytest.raises(module.LogitsError, match="in precision fp32; look for extreme values"):
        bf16.predict_logits_from_preprocessed_data(image)
    assert bf16.precision == "bf16"


def test_the_second_try_in_ram_finds_the_memory_of_the_first_one_free(one_fold):
    """What torch.OutOfMemoryError leads to on a GPU: nnU-Net predicts again with the logits in RAM."""
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    predictor = load(folder, precision="fp32")
    predictor.perform_everything_on_device = True  # nnU-Net switches it off for the CPU
    held, alive, forward = [], [], predictor.network.forward

    def run_out(batch):
        if len(held) < 2:
            tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
            logits = [tensor for tensor in tensors if tensor.shape == (3, 16, 16, 40)]
            held.append([weakref.ref(tensor) for tensor in (*logits, batch)])
            if len(held) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
        elif not alive:
            alive.append(sum(reference() is not None for references in held for reference in references))
        return forward(batch)

    predictor.network.forward = run_out
    assert predictor.predict_logits_from_preprocessed_data(torch.randn(1, 16, 16, 40)).isfinite().all()
    assert [len(references) for references in held] == [2, 2]
    assert alive == [0]


def test_an_export_that_fails_leaves_no_partial_file(one_fold, images, tmp_path, monkeypatch):
    def fail(*arguments):
        (tmp_path / "out").joinpath("seen").touch()
        raise MemoryError("no room")

    monkeypatch.setattr(module, "export_prediction_from_logits", fail)
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    failures = load(folder).predict_files(cases_in(images, tmp_path / "out"))
    assert failures == {"a": "MemoryError: no room", "b": "MemoryError: no room"}
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["seen"]


def test_a_worker_gets_the_predictor_without_its_weights(one_fold):
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    predictor = load(folder)
    state = predictor.__getstate__()
    assert state["network"] is None
    assert state["list_of_parameters"] is None
    assert predictor.network is not None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "plans.json").unlink(), "plans.json is missing"),
        (lambda f: (f / "dataset.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "fold_0" / "checkpoint_final.pth").unlink(), "checkpoint_final.pth is missing"),
        (lambda f: (f / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK"), "cannot be read"),
        (lambda f: torch.save({"weights": 1}, f / "fold_0" / "checkpoint_final.pth"), "no trainer_name and no init_"),
    ],
)
def test_a_damaged_model_folder_is_refused_in_a_sentence(model_maker, damage, message):
    folder = model_maker()
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_weights_that_do_not_fit_the_plans_name_the_file(model_maker):
    folder = model_maker()
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 12]
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(CheckpointError, match=r"checkpoint_final\.pth do not fit the network"):
        load(folder)


def test_an_unknown_trainer_is_refused(model_maker):
    with pytest.raises(UsageError, match="LGSSLTrainr"):
        load(model_maker(trained_by="LGSSLTrainr"))


def test_a_cascade_is_refused(model_maker):
    with pytest.raises(UsageError, match="second stage of a cascade"):
        load(model_maker(configuration="3d_cascade_fullres"))


@pytest.mark.parametrize("ahead", [0, 1, 2, 7])
@pytest.mark.parametrize("number", [0, 1, 5])
def test_cases_come_in_order_and_the_first_is_not_left_to_a_worker(number, ahead, one_fold, monkeypatch, tmp_path):
    class Reader(module._InProcess):
        def submit(self, function, predictor, case):
            submitted.append(case.name)
            return super().submit(function, predictor, case)

    submitted, some = [], [Case(str(n), (), tmp_path / f"{n}.nii.gz") for n in range(number)]
    monkeypatch.setattr(module, "_preprocess_as_nnunet", lambda _, case: case.name)
    predictor = load(one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres")
    seen = []
    for position, (case, future) in enumerate(predictor._preprocessed(some, Reader(), ahead)):
        seen.append((case.name, future.result()))
        assert len(submitted) <= position + max(ahead, 1)
    assert seen == [(str(n), str(n)) for n in range(number)]
    assert submitted == [str(n) for n in range(1, number)]


@pytest.mark.parametrize("where", ["network_class_name", "norm_op"])
def test_plans_that_name_anything_but_networks_and_layers_are_refused(where, model_maker):
    folder = model_maker()
    plans = json.loads((folder / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    (architecture if where == "network_class_name" else architecture["arch_kwargs"])[where] = "shutil.rmtree"
    (folder / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(CheckpointError, match=r"plans\.json builds its network from shutil\.rmtree"):
        load(folder)


def test_a_checkpoint_that_would_run_something_is_refused_and_read_when_trusted(model_maker):
    folder = model_maker()
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    torch.save({**checkpoint, "extra": itertools.count()}, file)
    with pytest.raises(CheckpointError, match=r"holds more than tensors and numbers \(itertools\.count\)"):
        load(folder)
    LGSSLPredictor(CPU, progress=False).load_model(folder, [0], trust=True)
