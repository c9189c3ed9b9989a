"""Raw datasets of half-labelled Hippocampus cases: what partial labels are worth.

    python benchmarks/partial_labels_raw.py nnUNet_raw/Dataset510_Hippocampus nnUNet_raw --ids 521 522 523 524

Half of the labelled cases keep label 1, the other half label 2, divided so that the first 8 cases that seeds 0, 1 and 2
draw are four and four. Written are, with links to the images and the test labels whole where both classes are trained:

- 521 Partial: dataset.json says which case annotates what (docs/partial_labels.md).
- 522 AsBackground: the same labels without saying so, so the missing class is background.
- 523 First, 524 Second: one class each; cases of the other class are unlabelled. Their budget of 4 draws the very
  cases that the budget of 8 draws above.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm import tqdm

from lgssl_nnunet.plans.splits import permute

SEEDS, BUDGET = (0, 1, 2), 8
NAMES = ("Partial", "AsBackground", "First", "Second")


def divide(cases: Iterable[str]) -> dict[str, int]:
    """Return the label value that each case keeps, 1 or 2, as many of each in what every seed draws."""
    cases, kept = sorted(cases), {}
    for seed in SEEDS:
        drawn = permute(cases, seed)[:BUDGET]
        for case in drawn:
            if case not in kept:
                ones = sum(kept.get(name) == 1 for name in drawn)
                twos = sum(kept.get(name) == 2 for name in drawn)
                kept[case] = 1 if ones <= twos else 2
        if sum(kept[case] == 1 for case in drawn) != BUDGET // 2:
            raise ValueError(f"seed {seed} cannot be divided equally")
    for number, case in enumerate(case for case in cases if case not in kept):
        kept[case] = 1 + number % 2
    return kept


def write_label(source: Path, target: Path, values: dict[int, int]) -> None:
    """Write a segmentation in which only the given values are left, renamed as they say."""
    label = sitk.ReadImage(str(source))
    array = sitk.GetArrayFromImage(label)
    changed = np.zeros_like(array)
    for old, new in values.items():
        changed[array == old] = new
    image = sitk.GetImageFromArray(changed)
    image.CopyInformation(label)
    sitk.WriteImage(image, str(target))


def link_all(source: Path, target: Path) -> None:
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        (target / file.name).symlink_to(file.resolve())


def write_dataset(source: Path, target: Path, kept: dict[str, int], kind: str) -> None:
    """Write one of the four datasets."""
    content = json.loads((source / "dataset.json").read_text())
    ending = content["file_ending"]
    names = {value: name for name, value in content["labels"].items() if value}
    single = {"First": 1, "Second": 2}.get(kind)
    for folder in ("imagesTr", "imagesTs"):
        link_all(source / folder, target / folder)
    (target / "labelsTr").mkdir()
    for case, value in tqdm(kept.items(), desc=target.name):
        if single in (None, value):
            new = 1 if single else value
            write_label(source / "labelsTr" / f"{case}{ending}", target / "labelsTr" / f"{case}{ending}", {value: new})
    if single is None:
        link_all(source / "labelsTs", target / "labelsTs")
    else:
        (target / "labelsTs").mkdir()
        for file in sorted((source / "labelsTs").glob(f"*{ending}")):
            write_label(file, target / "labelsTs" / file.name, {single: 1})
        content["labels"] = {"background": 0, names[single]: 1}
        content["prompts"] = {names[single]: content["prompts"][names[single]]}
    content["numTraining"] = len(list((target / "labelsTr").iterdir()))
    if kind == "Partial":
        content["groups"] = {f"only {names[v]}": [case for case in kept if kept[case] == v] for v in (1, 2)}
        content["annotated"] = {f"only {names[v]}": [names[v]] for v in (1, 2)}
    (target / "dataset.json").write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write raw datasets of half-labelled Hippocampus cases.")
    parser.add_argument("source", type=Path, help="Dataset510_Hippocampus")
    parser.add_argument("raw", type=Path, help="folder of raw datasets")
    parser.add_argument("--ids", type=int, nargs=4, default=[521, 522, 523, 524], help="ids of the four datasets")
    arguments = parser.parse_args()
    ending = json.loads((arguments.source / "dataset.json").read_text())["file_ending"]
    kept = divide(file.name.removesuffix(ending) for file in (arguments.source / "labelsTr").glob(f"*{ending}"))
    for number, kind in zip(arguments.ids, NAMES, strict=True):
        write_dataset(arguments.source, arguments.raw / f"Dataset{number}_Hippocampus{kind}", kept, kind)
