"""`lgssl_predict`: segment images with a trained model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from lgssl_nnunet.cli.common import (
    add_common_arguments,
    add_model_arguments,
    choose_device,
    command_parser,
    run_command,
)

_EXAMPLES = """\
examples:
  lgssl_predict -i imagesTs -o segmentations
  lgssl_predict -i scan.nii.gz -o segmentations -d 501 -tr LGSSLTrainer
  lgssl_predict -i imagesTs -o segmentations -m MODEL_FOLDER -f 0 1 2 --precision fp32
  lgssl_predict -i imagesTs -o segmentations --classes liver spleen
  lgssl_predict -i imagesTs -o segmentations -m liver.zip      # a bundle of lgssl_export_model

Without -d, -tr, -p, -c: if all finished models belong to one dataset, its newest one predicts, a semi-supervised
one before SupervisedTrainer; otherwise the datasets are listed. The model is printed and written into the output.
exit status: 0 done, 1 some cases failed (named at the end, the others are written), 2 the call or the images do not fit
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser: nnUNetv2_predict's flags, and -m of nnUNetv2_predict_from_modelfolder."""
    parser = command_parser("lgssl_predict", "Segment images with a trained model.", _EXAMPLES)
    _add_input_and_model(parser)
    _add_prediction(parser)
    _add_machine(parser)
    add_common_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _run(arguments), arguments)


def _add_input_and_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("input and output")
    group.add_argument(
        "-i",
        required=True,
        metavar="INPUT",
        help="one image file (models with one channel), or a folder of files named CASE_0000.nii.gz, CASE_0001.nii.gz, "
        "... (one per channel; the ending is that of the training images)",
    )
    group.add_argument(
        "-o", required=True, metavar="OUTPUT", help="folder for the segmentations CASE.nii.gz; made if missing"
    )
    group.add_argument(
        "--classes",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="write only these classes (or regions), with their values in dataset.json; decided over all classes, "
        "what the others win becomes background (default: all)",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace segmentations that OUTPUT already holds; they are removed before the new ones are made",
    )
    group.add_argument(
        "--continue_prediction",
        "--c",
        action="store_true",
        help="keep segmentations that OUTPUT already holds and make what is missing",
    )
    group.add_argument(
        "--save_probabilities",
        action="store_true",
        help="also write the probabilities of all classes (CASE.npz, CASE.pkl), which nnUNetv2_ensemble needs",
    )
    group.add_argument(
        "--save_selection_maps",
        action="store_true",
        help="also write where the text-vision fusion lets its feature pass (0 to 1, on the grid of the image) as "
        "selection_maps/CASE.nii.gz, and a picture of it, selection_maps/CASE.png; needs a model with prompts "
        "(LGSSLTrainer)",
    )
    group = add_model_arguments(parser)
    group.add_argument(
        "-chk",
        default="checkpoint_final.pth",
        metavar="FILE",
        help="file name of the checkpoint (default: %(default)s)",
    )
    group.add_argument(
        "-prev_stage_predictions", metavar="FOLDER", help="not supported: cascades are refused, use nnUNetv2_predict"
    )


def _add_prediction(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how to predict")
    group.add_argument(
        "--precision",
        choices=("auto", "stock", "fp32", "bf16", "fp16"),
        default="auto",
        help="arithmetic: auto takes the fastest that the device has, stock is nnU-Net's own and gives its voxels "
        "(fp16 sums), fp32 is exact (default: %(default)s)",
    )
    group.add_argument(
        "-step_size",
        type=float,
        default=0.5,
        metavar="FRACTION",
        help="distance of neighbouring windows as a fraction of the patch, over 0 up to 1; larger is faster and less "
        "accurate (default: %(default)s)",
    )
    group.add_argument(
        "--disable_tta",
        action="store_true",
        help="do not average over mirrored images; up to 8 times faster in 3D, a little less accurate",
    )
    group.add_argument(
        "-num_parts", type=int, default=1, metavar="N", help="split the cases over N calls (default: %(default)s)"
    )
    group.add_argument(
        "-part_id", type=int, default=0, metavar="K", help="this call's part, from 0 to N - 1 (default: %(default)s)"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine and output on screen")
    group.add_argument(
        "-device", metavar="DEVICE", help="cpu, cuda, cuda:1 or mps (default: the best one there is; it is printed)"
    )
    group.add_argument(
        "--not_on_device",
        action="store_true",
        help="keep the logits in RAM instead of GPU memory; slower, for images too large for the GPU",
    )
    for flag, variable, work in (
        ("-npp", "nnUNet_npp", "read and resample images"),
        ("-nps", "nnUNet_nps", "resample and write segmentations"),
    ):
        group.add_argument(
            flag,
            type=_worker_count,
            default=os.environ.get(variable) or str(min(3, os.cpu_count() or 1)),
            metavar="N",
            help=f"worker processes that {work}; each needs RAM for one image; 0: none (default: %(default)s)",
        )
    group.add_argument("--disable_progress_bar", action="store_true", help="show no progress bar")
    group.add_argument("--verbose", action="store_true", help="let nnU-Net print what it does")


def _worker_count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes (0, 1, 2, ...)")
    return int(text)


def _run(arguments: argparse.Namespace) -> None:
    from lgssl_nnunet.inference.compiler import import_nnunet_without_compiler

    import_nnunet_without_compiler()

    from lgssl_nnunet.inference.predict import predict

    predict(
        arguments.i,
        arguments.o,
        dataset=arguments.d,
        configuration=arguments.c,
        folds=arguments.f,
        plans=arguments.p,
        trainer=arguments.tr,
        checkpoint=arguments.chk,
        model_folder=arguments.m,
        precision=arguments.precision,
        trust_checkpoint=arguments.trust_checkpoint,
        step_size=arguments.step_size,
        disable_tta=arguments.disable_tta,
        classes=arguments.classes,
        save_probabilities=arguments.save_probabilities,
        save_selection_maps=arguments.save_selection_maps,
        continue_prediction=arguments.continue_prediction,
        overwrite=arguments.overwrite,
        num_processes_preprocessing=arguments.npp,
        num_processes_segmentation_export=arguments.nps,
        num_parts=arguments.num_parts,
        part_id=arguments.part_id,
        device=choose_device(arguments.device),
        not_on_device=arguments.not_on_device,
        prev_stage_predictions=arguments.prev_stage_predictions,
        verbose=arguments.verbose,
        progress=not arguments.disable_progress_bar,
    )
