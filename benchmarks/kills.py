"""One training, killed at random moments and while checkpoints are written, against the same training left alone.

    python benchmarks/kills.py --kills 50

Trains LGSSLTrainer on the phantom with --deterministic, once undisturbed and once killed by SIGKILL and continued with
--c. Every second kill waits until a checkpoint is being written. After each kill all checkpoints are read. Prints what
was found; exits 1 if a checkpoint could not be read, a process was left over, or the final weights differ in a bit.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from lgssl_nnunet.engine.checkpoints import read_checkpoint
from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset

SPEC = PhantomSpec(shape=(20, 24, 24), num_labeled=6, num_unlabeled=6, num_test=1)
EPOCHS = 40
COMMAND = (
    f"{SPEC.dataset_id} 3d_fullres LGSSLTrainer --epochs {EPOCHS} --iterations_per_epoch 4 --deterministic -device cpu"
).split()


def command(module: str, *words: str, variables: dict[str, str]) -> subprocess.Popen:
    code = f"import sys; from lgssl_nnunet.cli.{module} import main; sys.exit(main(sys.argv[1:]))"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=os.environ | variables, text=True, **quiet)


def finish(process: subprocess.Popen) -> None:
    said = process.communicate()[1]
    if process.returncode:
        raise SystemExit(f"{process.args[3:]} ended with {process.returncode}: {said[-2000:]}")


def folders(root: Path, results: str) -> dict[str, str]:
    names = {"nnUNet_raw": "raw", "nnUNet_preprocessed": "preprocessed", "nnUNet_results": results}
    return {variable: str(root / name) for variable, name in names.items()} | {"nnUNet_n_proc_DA": "2"}


def fold_folder(results: Path) -> Path | None:
    return next(results.glob("*/*/fold_all"), None)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def live_and_die(root: Path, results: Path, while_writing: bool, generator: random.Random) -> tuple[bool, list[int]]:
    """Continue the training and kill it.

    Returns:
        Whether a checkpoint was being written then, and the processes that outlived it.
    """
    before = time.time()
    process = command("train", *COMMAND, "--c", variables=folders(root, results.name))
    seconds = generator.uniform(0, 2.5)
    fold, begun = None, None
    while process.poll() is None:
        fold = fold or fold_folder(results)
        written = fold is not None and any(fold.glob(".checkpoint_*"))
        log = max((file.stat().st_mtime for file in fold.glob("training_log_*")), default=0) if fold else 0
        begun = begun or (time.monotonic() if log > before + 1 else None)
        late = begun is not None and time.monotonic() > begun + seconds
        if late and (written or not while_writing):
            break
        time.sleep(0.0005 if late else 0.02)
    workers = children(process.pid) if process.poll() is None else []
    process.kill()
    process.communicate()
    time.sleep(0.5)
    return written, [pid for pid in workers if is_alive(pid)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        write_phantom_dataset(root / "raw", SPEC)
        planning = ["-d", str(SPEC.dataset_id), "-pl", "LGSSLPlannerCPU"]
        finish(command("plan_and_preprocess", *planning, variables=folders(root, "left_alone")))
        finish(command("train", *COMMAND, variables=folders(root, "left_alone")))
        killed = root / "killed"
        writing = unreadable = left_over = lives = 0
        for number in tqdm(range(args.kills), unit="kill"):
            written, outlived = live_and_die(root, killed, number % 2 == 1, generator)
            writing, left_over, lives = writing + written, left_over + len(outlived), number + 1
            for file in killed.glob("*/*/fold_all/*.pth"):
                try:
                    read_checkpoint(file)
                except Exception as error:
                    unreadable += 1
                    print(error, file=sys.stderr)
            if list(killed.glob("*/*/fold_all/checkpoint_final.pth")):
                break
        finish(command("train", *COMMAND, "--c", variables=folders(root, killed.name)))
        ends = [read_checkpoint(fold_folder(root / name) / "checkpoint_final.pth") for name in ("left_alone", "killed")]
        weights = [end["network_weights"] for end in ends]
        equal = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
        left_files = [file.name for file in fold_folder(killed).iterdir() if file.name.startswith(".")]
    print(
        f"{lives} kills, {writing} of them while a checkpoint was being written; {unreadable} unreadable checkpoints, "
        f"{left_over} processes and {len(left_files)} temporary files left over; final weights "
        f"{'equal to the bit' if equal else 'DIFFERENT'}."
    )
    raise SystemExit(0 if equal and not unreadable and not left_over else 1)


if __name__ == "__main__":
    main()
