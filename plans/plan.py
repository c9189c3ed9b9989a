"""From a raw dataset to plans and preprocessed cases: the function behind `lgssl_plan_and_preprocess`."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lgssl_nnunet.data.partial_labels import class_values, foreground_classes
from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.files import copy_file, read_json_if_valid, write_json
from lgssl_nnunet.locks import hold_lock, lock_beside
from lgssl_nnunet.paths import data_folders, use_data_folders
from lgssl_nnunet.plans.cases import Case, RawDataset, held_out_cases, load_raw_dataset
from lgssl_nnunet.plans.partial_labels import partial_labels
from lgssl_nnunet.plans.protocol import (
    LITERATURE_CONFIGURATION,
    Protocol,
    ProtocolCases,
    apply_protocol,
    find_protocol,
)
from lgssl_nnunet.plans.splits import Budget, choose_budget, protocol_budget, require_every_class
from lgssl_nnunet.problems import raise_if_any

if TYPE_CHECKING:
    from lgssl_nnunet.plans.planner import LGSSLPlanningMixin
    from lgssl_nnunet.text.encoders import PromptEmbeddings
    from lgssl_nnunet.text.prompts import Prompt

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
DEFAULT_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
"""Worker processes per configuration, as in nnU-Net; never more than there are cores."""


@dataclass(frozen=True)
class PlanningOptions:
    """What holds for every dataset of one call; the arguments of `plan_and_preprocess` of the same names."""

    planner: str
    plans_name: str | None
    text_encoder: str
    ensemble_prompts: bool
    configurations: tuple[str, ...]
    gpu_memory_target: float | None
    overwrite_target_spacing: tuple[float, ...] | None
    preprocessor_name: str
    verify: bool
    clean: bool
    preprocess: bool
    num_processes: tuple[int, ...]
    num_processes_fingerprint: int
    verbose: bool
    progress: bool


@dataclass(frozen=True)
class PlanningJob:
    """One dataset with everything that is decided before any image is read."""

    dataset: RawDataset
    budget: Budget
    plans_name: str
    prompts: list[Prompt]
    embeddings: PromptEmbeddings
    published: ProtocolCases | None
    held_out: Mapping[str, Case] | None

    @property
    def preprocessed(self) -> Path:
        """The dataset's folder in `nnUNet_preprocessed`."""
        return data_folders()["nnUNet_preprocessed"].path / self.dataset.name


def plan_and_preprocess(
    dataset_ids: Sequence[int | str] | int | str,
    *,
    planner: str = "LGSSLPlanner",
    labeled: int | None = None,
    labeled_list: Path | str | None = None,
    protocol: str | None = None,
    seed: int = 0,
    prompts: Path | str | None = None,
    text_encoder: str = "bank",
    ensemble_prompts: bool = False,
    configurations: Sequence[str] = CONFIGURATIONS,
    gpu_memory_target: float | None = None,
    overwrite_target_spacing: Sequence[float] | None = None,
    overwrite_plans_name: str | None = None,
    preprocessor_name: str = "DefaultPreprocessor",
    verify: bool = True,
    clean: bool = False,
    preprocess: bool = True,
    num_processes: int | Sequence[int] | None = None,
    num_processes_fingerprint: int | None = None,
    verbose: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Plan experiments on labelled and unlabelled cases and preprocess both.

    Labelled cases lie in imagesTr and have a file in labelsTr; unlabelled ones lie in imagesUn, or in imagesTr without
    a label file, or are left out by a budget. Labels of unlabelled cases are never opened. Planning again redoes only
    what has changed.

    Args:
        dataset_ids: ids (501) or folder names ("Dataset501_Name") in `nnUNet_raw`.
        planner: a name of `lgssl_nnunet.plans.planner.PLANNERS`.
        labeled: number of labelled cases to draw; the other labelled cases become unlabelled. None: all.
        labeled_list: text file that names the labelled cases to use, one identifier per line.
        protocol: name of a protocol (`lgssl_nnunet.plans.protocol`), whose lists fix which cases train and test;
            `labeled` takes the first ones of its list.
        seed: seed of the draw; draws with one seed are nested.
        prompts: JSON file with a prompt, or several, by class name; it overrides those of dataset.json.
        text_encoder: where prompt embeddings come from: "bank" (shipped), an open_clip model or local weights.
        ensemble_prompts: average every phrase over all templates of the modality.
        configurations: which configurations to preprocess; those that the plans do not have are skipped.
        gpu_memory_target: memory in GB that one step of LGSSLTrainer may take; None for the planner's default.
        overwrite_target_spacing: three spacings in mm for 3d_fullres, in the order of the array axes (z, y, x).
        overwrite_plans_name: name of the plans, in place of the one that tells planner and budget.
        preprocessor_name: nnU-Net's preprocessor class.
        verify: check the integrity of the dataset first.
        clean: check all cases, make the fingerprint and preprocess all cases again, changed or not.
        preprocess: False stops after the plans.
        num_processes: worker processes for preprocessing, one number or one per configuration; 0 for none. None:
            nnU-Net's defaults, at most one per core.
        num_processes_fingerprint: worker processes for integrity check and fingerprint; None: at most 8, one per core.
        verbose: name every case that is preprocessed.
        progress: show progress bars.

    Returns:
        The plans files, one per dataset.

    Raises:
        UsageError: an argument names something unknown or does not fit the others.
        DatasetError: the dataset is damaged or incomplete; every problem is listed.
        SplitError: the requested labelled cases do not exist, or none of them annotates some class.
        PromptError: a class has no usable prompt or embedding.
        PlansError: no plans fit the request.
        FolderBusyError: another process is planning the dataset.
    """
    use_data_folders()
    options = PlanningOptions(
        planner=planner,
        plans_name=overwrite_plans_name,
        text_encoder=text_encoder,
        ensemble_prompts=ensemble_prompts,
        configurations=tuple(configurations),
        gpu_memory_target=gpu_memory_target,
        overwrite_target_spacing=None if overwrite_target_spacing is None else tuple(overwrite_target_spacing),
        preprocessor_name=preprocessor_name,
        verify=verify,
        clean=clean,
        preprocess=preprocess,
        num_processes=_processes(num_processes, configurations),
        num_processes_fingerprint=_cores(8) if num_processes_fingerprint is None else num_processes_fingerprint,
        verbose=verbose,
        progress=progress,
    )
    planner_class = _check_options(options)
    lists = _find_lists(protocol, labeled_list, seed)
    ids = [dataset_ids] if isinstance(dataset_ids, (int, str)) else list(dataset_ids)
    jobs = [_prepare(i, options, planner_class, labeled, labeled_list, lists, seed, prompts) for i in ids]
    return [_run(job, options, planner_class) for job in jobs]


def _prepare(
    dataset_id: int | str,
    options: PlanningOptions,
    planner_class: type[LGSSLPlanningMixin],
    labeled: int | None,
    labeled_list: Path | str | None,
    protocol: Protocol | None,
    seed: int,
    prompts: Path | str | None,
) -> PlanningJob:
    """Sort the cases, choose the budget and embed the prompts: all that can be refused without reading an image."""
    complete = load_raw_dataset(dataset_id)
    published = None if protocol is None else apply_protocol(protocol, complete)
    if published is None:
        budget = choose_budget(complete, labeled=labeled, labeled_list=labeled_list, seed=seed)
        dataset = complete.with_labeled(budget.labeled)
    else:
        budget = protocol_budget(published, labeled)
        dataset = published.dataset.with_labeled(budget.labeled)
    _report_cases(complete, dataset, budget)
    if not dataset.problems:  # which are told all at once
        require_every_class(dataset)
    worded, embeddings = _embed(dataset.dataset_json, prompts, options)
    plans_name = options.plans_name or f"{planner_class.plans_prefix}{budget.name}"
    held_out = _held_out(complete, published)
    job = PlanningJob(dataset, budget, plans_name, worded, embeddings, published, held_out)
    _refuse_foreign_plans(job.preprocessed / f"{plans_name}.json")
    return job


def _held_out(complete: RawDataset, published: ProtocolCases | None) -> dict[str, Case] | None:
    """Return the test and validation cases of a protocol, None without one: then they are those of imagesTs."""
    if published is None:
        return None
    there = {**held_out_cases(complete.folder, complete.dataset_json), **complete.cases}
    return {name: there[name] for name in (*published.validation, *published.dataset.test)}


def _run(job: PlanningJob, options: PlanningOptions, planner_class: type[LGSSLPlanningMixin]) -> Path:
    with hold_lock(lock_beside(job.preprocessed, "planning"), job.preprocessed):
        return _run_locked(job, options, planner_class)


def _run_locked(job: PlanningJob, options: PlanningOptions, planner_class: type[LGSSLPlanningMixin]) -> Path:
    twins = _check_integrity(job, options)
    plans = _plan(job, options, planner_class)
    plans["lgssl"]["twins"] = twins
    file = job.preprocessed / f"{job.plans_name}.json"
    old = read_json_if_valid(file)
    copy_file(job.dataset.folder / "dataset.json", job.preprocessed / "dataset.json")
    write_json(plans, file)
    state = "written" if old is None else "unchanged" if old == plans else "replaced by different ones"
    logger.info("Plans %s: %s", state, file)
    for name, configuration in plans["configurations"].items():
        patch, batch = configuration["patch_size"], configuration["batch_size"]
        logger.info("  %s: patch %s, batch %d, spacing %s", name, patch, batch, configuration["spacing"])
    if options.preprocess:
        _preprocess(job, plans, options)
    return file


def _check_integrity(job: PlanningJob, options: PlanningOptions) -> list[list[str]]:
    """Return the pairs of twins among the training cases; none are known without the check."""
    if not options.verify:
        raise_if_any(job.dataset.problems, job.dataset.name)
        return []
    from lgssl_nnunet.plans.integrity import check_integrity

    passed_file = job.preprocessed / "integrity.manifest.json"
    if options.clean:
        passed_file.unlink(missing_ok=True)
    return check_integrity(
        job.dataset,
        held_out=job.held_out,
        passed_file=passed_file,
        num_processes=options.num_processes_fingerprint,
        progress=options.progress,
    )


def _plan(job: PlanningJob, options: PlanningOptions, planner_class: type[LGSSLPlanningMixin]) -> dict[str, Any]:
    """Return the complete plans: nnU-Net's part and the block of this package."""
    from lgssl_nnunet.plans.fingerprint import dataset_fingerprint
    from lgssl_nnunet.plans.planner import make_plans

    fingerprint, label_values = dataset_fingerprint(
        job.dataset,
        job.preprocessed / f"dataset_fingerprint_{job.plans_name}.json",
        clean=options.clean,
        num_processes=options.num_processes_fingerprint,
        progress=options.progress,
    )
    plans = make_plans(
        job.dataset,
        fingerprint,
        planner_class,
        job.plans_name,
        preprocessor_name=options.preprocessor_name,
        gpu_memory_target=options.gpu_memory_target,
        overwrite_target_spacing=options.overwrite_target_spacing,
        protocol=None if job.published is None else job.published.protocol,
    )
    plans["lgssl"] = _lgssl_block(job, plans, planner_class)
    unseen = _unseen_classes(job, label_values)
    if unseen:
        plans["lgssl"]["unseen_classes"] = unseen
    return plans


def _unseen_classes(job: PlanningJob, label_values: set[int]) -> list[str]:
    """Return, and warn of, the classes of which no labelled case has a voxel: nothing can be learnt of them."""
    labels = job.dataset.dataset_json["labels"]
    unseen = [name for name in foreground_classes(labels) if not class_values(labels[name]) & label_values]
    if unseen:
        logger.warning(
            "None of the %d labelled cases has a voxel of %s: a model cannot learn it, and lgssl_predict --classes "
            "refuses it. Name cases that have it with --labeled_list, or choose another --seed.",
            len(job.dataset.labeled),
            " and ".join(unseen),
        )
    return unseen


def _lgssl_block(job: PlanningJob, plans: Mapping[str, Any], planner_class: type[LGSSLPlanningMixin]) -> dict[str, Any]:
    from lgssl_nnunet.plans.sidedness import find_sides
    from lgssl_nnunet.plans.text import text_block, wordings
    from lgssl_nnunet.text.prompts import has_regions

    sides = find_sides(
        wordings(job.prompts, job.embeddings),
        {name: case.images[0] for name, case in job.dataset.cases.items()},
        plans["image_reader_writer"],
        plans["transpose_forward"],
    )
    block = {
        "schema_version": SCHEMA_VERSION,
        "split": {
            "labeled": sorted(job.dataset.labeled),
            "unlabeled": sorted(job.dataset.unlabeled),
            "validation": [] if job.published is None else list(job.published.validation),
            "test": list(job.dataset.test),
        },
        "draw_seed": job.budget.seed,
        "schedule": dict(planner_class.schedule),
        "text": text_block(job.prompts, job.embeddings, has_regions(job.dataset.dataset_json)),
        "mirroring_axes": sides.axes,
    }
    if sides.lying is not None:
        block["left_right"] = sides.lying._asdict()
    partial = partial_labels(job.dataset)
    if partial:
        block["partial_labels"] = {name: list(classes) for name, classes in partial.items()}
    return block if job.published is None else block | {"protocol": job.published.protocol.name}


def _preprocess(job: PlanningJob, plans: dict[str, Any], options: PlanningOptions) -> None:
    from lgssl_nnunet.plans.preprocessing import copy_labels, preprocess_configuration

    planned = plans["configurations"]
    if not any(name in planned for name in options.configurations):
        raise PlansError(
            f"{job.plans_name} has no configuration {' or '.join(options.configurations)}; "
            f"it has {', '.join(planned)}: give one of these with -c."
        )
    copy_labels(job.dataset, job.preprocessed)
    for name, processes in zip(options.configurations, options.num_processes, strict=True):
        if name not in planned:
            logger.info("%s: not in %s, skipped.", name, job.plans_name)
            continue
        preprocess_configuration(
            job.dataset,
            plans,
            name,
            job.preprocessed,
            clean=options.clean,
            num_processes=processes,
            progress=options.progress,
            verbose=options.verbose,
        )


def _embed(
    dataset_json: dict[str, Any], prompt_file: Path | str | None, options: PlanningOptions
) -> tuple[list[Prompt], PromptEmbeddings]:
    """Embed the prompts, name them, and warn of classes that have one vector."""
    from lgssl_nnunet.text.encoders import embed_dataset
    from lgssl_nnunet.text.similarity import SAME, cosine_matrix, similar_pairs

    worded, embeddings = embed_dataset(
        dataset_json, prompt_file, options.text_encoder, ensemble=options.ensemble_prompts
    )
    for prompt, texts in zip(worded, embeddings.texts, strict=True):
        for text in texts:
            logger.info("Prompt of %s: %r (%s)", prompt.class_name, text.sentence, text.source)
    names = [prompt.class_name for prompt in worded]
    for pair in similar_pairs(names, cosine_matrix(embeddings.embeddings), SAME):
        logger.warning(
            "Classes %s and %s have the same embedding: word one of them differently", pair.first, pair.second
        )
    return worded, embeddings


def _report_cases(complete: RawDataset, dataset: RawDataset, budget: Budget) -> None:
    logger.info(
        "%s: found %d labelled, %d unlabelled and %d test cases.",
        complete.name,
        len(complete.labeled),
        len(complete.unlabeled),
        len(complete.test),
    )
    logger.info(
        "Budget: %s; planning with %d labelled and %d unlabelled cases.",
        budget.description,
        len(dataset.labeled),
        len(dataset.unlabeled),
    )
    partial = partial_labels(dataset)
    if partial:
        logger.info("%d of the labelled cases annotate only some of the classes.", len(partial))
        if not dataset.unlabeled:
            logger.info("Without unlabelled cases LGSSLTrainer learns from the images of these what they leave open.")
    elif not dataset.unlabeled:
        logger.warning(
            "%s has no unlabelled case: only SupervisedTrainer can train on these plans. Put images into imagesUn, or "
            "use --labeled N to treat labelled cases as unlabelled.",
            complete.name,
        )


def _refuse_foreign_plans(file: Path) -> None:
    if file.exists() and "lgssl" not in (read_json_if_valid(file) or {}):
        raise UsageError(f"{file}: not written by lgssl_plan_and_preprocess; choose another -overwrite_plans_name.")


def _check_options(options: PlanningOptions) -> type[LGSSLPlanningMixin]:
    """Refuse what cannot work, before any dataset is looked at, and return the planner."""
    name = options.plans_name
    if name is not None and (not name or Path(name).name != name or name.endswith(".json") or "__" in name):
        raise UsageError(
            f"-overwrite_plans_name {name}: give a plain name without folder, file ending and double underscore."
        )
    _check_configurations(options.configurations)
    _check_target_spacing(options.overwrite_target_spacing)
    if options.num_processes_fingerprint < 0:
        raise UsageError(f"-npfp {options.num_processes_fingerprint}: give a number of processes, 0 for none.")
    if options.gpu_memory_target is not None and not options.gpu_memory_target > 0:
        raise UsageError(f"-gpu_memory_target {options.gpu_memory_target}: give a positive number of GB.")
    from lgssl_nnunet.plans.planner import find_planner

    planner_class = find_planner(options.planner)
    if options.gpu_memory_target is not None and not planner_class.accepts_memory_target:
        raise UsageError(f"-gpu_memory_target has no meaning for {options.planner}; leave it out or use LGSSLPlanner.")
    _check_preprocessor(options.preprocessor_name)
    return planner_class


def _find_lists(protocol: str | None, labeled_list: Path | str | None, seed: int) -> Protocol | None:
    """Return the protocol that `--protocol` names, and refuse what would choose the cases as well."""
    if protocol is None:
        return None
    if labeled_list is not None:
        raise UsageError("--protocol and --labeled_list exclude each other; give one of them.")
    if seed:
        raise UsageError(f"--protocol {protocol} draws nothing, its lists are fixed: leave out --seed {seed}.")
    return find_protocol(protocol)


def _check_configurations(configurations: Sequence[str]) -> None:
    for name in configurations:
        if name == "3d_cascade_fullres":
            raise UsageError("3d_cascade_fullres is not supported yet; use 3d_fullres or 3d_lowres.")
        if name not in (*CONFIGURATIONS, LITERATURE_CONFIGURATION):
            near = difflib.get_close_matches(name, CONFIGURATIONS, n=1, cutoff=0) or CONFIGURATIONS
            raise UsageError(f"-c {name}: no such configuration; did you mean {near[0]}?")
    if not configurations or len(set(configurations)) != len(configurations):
        raise UsageError(f"-c: give one or more of {', '.join(CONFIGURATIONS)}, each once.")


def _check_target_spacing(spacing: Sequence[float] | None) -> None:
    if spacing is not None and (len(spacing) != 3 or not all(length > 0 for length in spacing)):
        shown = " ".join(str(length) for length in spacing)
        raise UsageError(f"-overwrite_target_spacing {shown}: give three positive numbers in mm (z y x).")


def _check_preprocessor(name: str) -> None:
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = os.path.join(nnunetv2.__path__[0], "preprocessing")
    if recursive_find_python_class(folder, name, "nnunetv2.preprocessing") is None:
        raise UsageError(f"-preprocessor_name {name}: nnU-Net has no such class; did you mean DefaultPreprocessor?")


def _processes(number: int | Sequence[int] | None, configurations: Sequence[str]) -> tuple[int, ...]:
    if number is None:
        return tuple(_cores(DEFAULT_PROCESSES.get(name, 4)) for name in configurations)
    numbers = (number,) if isinstance(number, int) else tuple(number)
    if len(numbers) == 1:
        numbers *= len(configurations)
    if len(numbers) != len(configurations) or any(count < 0 for count in numbers):
        raise UsageError(f"-np: give one number of processes, or one for each of {', '.join(configurations)}.")
    return numbers


def _cores(limit: int) -> int:
    return min(limit, os.cpu_count() or 1)
