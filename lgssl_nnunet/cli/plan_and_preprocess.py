"""`lgssl_plan_and_preprocess`: integrity, fingerprint, plans, prompt embeddings and preprocessing of a raw dataset."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lgssl_nnunet.cli.common import add_common_arguments, add_prompt_arguments, command_parser, run_command
from lgssl_nnunet.errors import UsageError

_DESCRIPTION = """\
Check a raw dataset, plan experiments on its labelled and unlabelled images and preprocess both.

Labelled: in imagesTr with a file in labelsTr. Unlabelled: in imagesUn, in imagesTr without a label file, or left out by
--labeled. Running the command again preprocesses only new and changed cases."""

_EXAMPLES = """\
examples:
  lgssl_plan_and_preprocess -d 501
  lgssl_plan_and_preprocess -d 501 --labeled 8 --seed 1 -c 3d_fullres
  lgssl_plan_and_preprocess -d 501 --protocol la-literature --labeled 8
  lgssl_plan_and_preprocess -d 501 -pl LGSSLPlannerCPU --labeled 4 -overwrite_target_spacing 1.25 1.25 1.25"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser; flags of nnUNetv2_plan_and_preprocess keep their letters and meaning."""
    parser = command_parser("lgssl_plan_and_preprocess", _DESCRIPTION, _EXAMPLES)
    parser.add_argument(
        "-d",
        nargs="+",
        required=True,
        metavar="DATASET",
        help="ids or folder names of one or more datasets in nnUNet_raw, such as 501 (required)",
    )
    _add_case_arguments(parser)
    _add_planning_arguments(parser)
    _add_work_arguments(parser)
    add_common_arguments(parser)
    return parser


def _add_case_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("labelled cases and prompts")
    group.add_argument(
        "--labeled", type=int, metavar="N", help="use N labelled cases, the rest is unlabelled (default: all)"
    )
    group.add_argument(
        "--labeled_list", metavar="FILE", help="use the labelled cases named in this file, one per line (default: all)"
    )
    group.add_argument(
        "--protocol",
        metavar="NAME",
        help="use the training and test cases of this protocol, such as la-literature; --labeled takes the first N of "
        "its list (names: docs/protocols.md; default: none)",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the draw; its draws are nested (default: 0)")
    add_prompt_arguments(group)


def _add_planning_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("planning")
    group.add_argument(
        "-pl",
        default="LGSSLPlanner",
        metavar="PLANNER",
        help="LGSSLPlanner, LGSSLPlannerCPU (small and short, without GPU), nnUNetPlannerResEncM, "
        "nnUNetPlannerResEncL or nnUNetPlannerResEncXL (default: LGSSLPlanner)",
    )
    group.add_argument(
        "-gpu_memory_target",
        type=float,
        metavar="GB",
        help="GPU memory in GB for a step of LGSSLTrainer; changes patch and batch size (default: the planner's)",
    )
    group.add_argument(
        "-overwrite_target_spacing",
        nargs="+",
        type=float,
        metavar="MM",
        help="three spacings in mm (z y x) for 3d_fullres (default: chosen from the images)",
    )
    group.add_argument(
        "-overwrite_plans_name", metavar="NAME", help="name of the plans file (default: tells planner, budget and seed)"
    )
    group.add_argument(
        "-preprocessor_name",
        default="DefaultPreprocessor",
        metavar="CLASS",
        help="nnU-Net's preprocessor class (default: DefaultPreprocessor)",
    )
    group.add_argument(
        "-fpe",
        default="DatasetFingerprintExtractor",
        metavar="CLASS",
        help="not supported: the fingerprint must know which cases are labelled (default: DatasetFingerprintExtractor)",
    )


def _add_work_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument(
        "-c",
        nargs="+",
        default=["2d", "3d_fullres", "3d_lowres"],
        metavar="CONFIGURATION",
        help="configurations to preprocess; those not in the plans are skipped (default: 2d 3d_fullres 3d_lowres)",
    )
    group.add_argument(
        "-np",
        nargs="+",
        type=int,
        metavar="PROCESSES",
        help="worker processes for preprocessing, one number or one per configuration; 0 for none "
        "(default: 8, 4 and 8, at most one per core)",
    )
    group.add_argument(
        "-npfp",
        type=int,
        metavar="PROCESSES",
        help="worker processes for integrity check and fingerprint; 0 for none (default: 8, at most one per core)",
    )
    group.add_argument(
        "--verify_dataset_integrity", action="store_true", help="accepted as in nnU-Net; always on (default: on)"
    )
    group.add_argument("--no_verify", action="store_true", help="skip the integrity check (default: off)")
    group.add_argument("--no_pp", action="store_true", help="stop after the plans, do not preprocess (default: off)")
    group.add_argument(
        "--clean", action="store_true", help="redo fingerprint and preprocessing even if unchanged (default: off)"
    )
    group.add_argument("--verbose", action="store_true", help="name every case that is preprocessed (default: off)")
    group.add_argument("--no_pbar", action="store_true", help="no progress bars, for log files (default: off)")


def run(arguments: argparse.Namespace) -> None:
    """Hand the arguments to `plan_and_preprocess` and print the plans files."""
    if arguments.fpe != "DatasetFingerprintExtractor":
        raise UsageError("-fpe is not supported: the extractor must know which cases are labelled; leave the flag out.")
    if arguments.no_verify and arguments.verify_dataset_integrity:
        raise UsageError("--no_verify and --verify_dataset_integrity exclude each other; give one of them.")
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    files = plan_and_preprocess(
        arguments.d,
        planner=arguments.pl,
        labeled=arguments.labeled,
        labeled_list=arguments.labeled_list,
        protocol=arguments.protocol,
        seed=arguments.seed,
        prompts=arguments.prompts,
        text_encoder=arguments.text_encoder,
        ensemble_prompts=arguments.ensemble_prompts,
        configurations=arguments.c,
        gpu_memory_target=arguments.gpu_memory_target,
        overwrite_target_spacing=arguments.overwrite_target_spacing,
        overwrite_plans_name=arguments.overwrite_plans_name,
        preprocessor_name=arguments.preprocessor_name,
        verify=not arguments.no_verify,
        clean=arguments.clean,
        preprocess=not arguments.no_pp,
        num_processes=arguments.np,
        num_processes_fingerprint=arguments.npfp,
        verbose=arguments.verbose,
        progress=not arguments.no_pbar,
    )
    for file in files:
        print(file)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: run(arguments), arguments)


if __name__ == "__main__":
    raise SystemExit(main())
