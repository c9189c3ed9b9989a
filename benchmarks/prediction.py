"""Time, memory and agreement of lgssl_predict against nnUNetv2_predict: same model, images and number of processes.

    export nnUNet_raw=... nnUNet_preprocessed=... nnUNet_results=...
    python benchmarks/prediction.py MODEL_FOLDER IMAGES --references LABELS --rounds 3
    python benchmarks/prediction.py MODEL_FOLDER IMAGES --options --disable_tta --only stock auto

Both commands run as a user runs them, start-up included, in turns: every form once per round, forwards in one round,
backwards in the next. The ratio is the median over rounds of stock's seconds by the form's. Memory is the highest sum
of the resident sets of the command and all its processes, read twenty times a second; what processes share counts in
each, for both commands alike. Voxels that differ and Dice are those of the last round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from lgssl_nnunet.training import PLUGIN_FOLDER

FORMS = {"stock": None, "auto": "auto", "fp32": "fp32", "lgssl stock": "stock"}


@dataclass
class Form:
    """One way to predict, with what was measured in each round."""

    name: str
    output: Path
    seconds: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def command(form: Form, args: argparse.Namespace) -> list[str]:
    """Return the command line of a form; the options are written the same in both commands."""
    words = ["-i", str(args.images), "-o", str(form.output), "-f", "all", "-device", args.device]
    words += ["-npp", str(args.processes), "-nps", str(args.processes), "--disable_progress_bar", *args.options]
    if FORMS[form.name] is None:
        return ["nnUNetv2_predict_from_modelfolder", "-m", str(args.model), *words]
    return ["lgssl_predict", "-m", str(args.model), "--precision", FORMS[form.name], *words]


def run(form: Form, args: argparse.Namespace) -> None:
    """Predict into an empty folder and note seconds and memory.

    Raises:
        SystemExit: the command failed.
    """
    shutil.rmtree(form.output, ignore_errors=True)
    environment = {**os.environ, "nnUNet_extTrainer": str(PLUGIN_FOLDER)}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(command(form, args), env=environment, stdout=log, stderr=log)
        peak = [0]
        watch = threading.Thread(target=_watch, args=(process, peak))
        watch.start()
        status = process.wait()
        form.seconds.append(time.perf_counter() - start)
        watch.join()
        form.memory.append(peak[0])
        if status:
            log.seek(0)
            raise SystemExit(f"{' '.join(command(form, args))} failed:\n{log.read().decode()[-3000:]}")


def _watch(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        peak[0] = max(peak[0], sum(_resident(pid) for pid in _family(process.pid)))
        time.sleep(0.05)


def _family(root: int) -> set[int]:
    """Return the process and all that descend from it."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    family = {root}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def segmentations(folder: Path, ending: str) -> dict[str, np.ndarray]:
    files = sorted(folder.glob(f"*{ending}"))
    return {file.name: sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in files}


def equal_voxels(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Return the share of equal voxels over all cases."""
    return sum(int((one[name] == other[name]).sum()) for name in one) / sum(mask.size for mask in one.values())


def dice(masks: dict[str, np.ndarray], references: dict[str, np.ndarray]) -> list[float]:
    """Return the mean Dice over the cases, per label."""
    values = []
    for label in sorted(set(np.unique(np.concatenate([np.unique(mask) for mask in references.values()]))) - {0}):
        pairs = [(masks[name] == label, reference == label) for name, reference in references.items()]
        values.append(statistics.mean(2 * (a & b).sum() / max(a.sum() + b.sum(), 1) for a, b in pairs))
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder with fold_all")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--references", type=Path, help="folder of reference segmentations, for Dice")
    parser.add_argument(
        "--only", nargs="+", default=list(FORMS), choices=list(FORMS), help="forms; stock is always run"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="-npp and -nps of both commands")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="further options of both commands")
    parser.add_argument("-device", default="cpu")
    args = parser.parse_args()
    ending = json.loads((args.model / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
    with tempfile.TemporaryDirectory() as scratch:
        forms = [Form(name, Path(scratch) / name.replace(" ", "_")) for name in FORMS if name in {"stock", *args.only}]
        for turn in range(args.rounds):
            for form in forms[:: 1 if turn % 2 == 0 else -1]:
                run(form, args)
                print(f"round {turn + 1}: {form.name} {form.seconds[-1]:.1f} s", file=sys.stderr)
        masks = {form.name: segmentations(form.output, ending) for form in forms}
        references = segmentations(args.references, ending) if args.references else {}
    print("| form | seconds | times faster | memory [MB] | memory ratio | equal voxels | Dice per label |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    stock = forms[0]
    for form in forms:
        faster = statistics.median(s / own for s, own in zip(stock.seconds, form.seconds, strict=True))
        equal = equal_voxels(masks["stock"], masks[form.name])
        values = " ".join(f"{value:.4f}" for value in dice(masks[form.name], references)) if references else "-"
        print(
            f"| {form.name} | {statistics.median(form.seconds):.1f} | {faster:.2f} | {max(form.memory) / 2**20:.0f} | "
            f"{max(form.memory) / max(stock.memory):.2f} | {100 * equal:.4f} % | {values} |"
        )


if __name__ == "__main__":
    main()
