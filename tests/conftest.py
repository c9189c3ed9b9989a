"""One tiny phantom, planned and preprocessed once for the whole session, and trainers that train on it in seconds.

Everything runs in this process and on one thread: the networks are so small that threads would only hold each other up.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

# Before torch is imported anywhere.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["nnUNet_n_proc_DA"] = "0"

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
VARIANTS: dict[str, dict[str, Any]] = {
    "standard": {},
    "two_classes": {},
    "four_classes": {},
    "regions": {"regions": True},
    "ignore": {"ignore": True},
    "regions_and_ignore": {"regions": True, "ignore": True},
    "two_channels": {"num_channels": 2},
    "plane": {"shape": (24, 24)},
}


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Let torch compute on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def no_connections() -> Iterator[None]:
    """Refuse connections to anything but this machine's own worker processes."""

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX:
                raise RuntimeError(f"A test tried to connect to {address}: tests need no network.")
            return original(self, address)

        return connect

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name)))
        yield


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Give every test the environment variables and the threads that the one before it had."""
    import torch

    before, threads = dict(os.environ), torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})


@dataclass(frozen=True)
class TinyDataset:
    """A planned and preprocessed phantom below `root`, which holds nnU-Net's three folders."""

    root: Path
    plans_file: Path

    @property
    def name(self) -> str:
        return self.plans_file.parent.name

    @property
    def raw(self) -> Path:
        return self.root / "nnUNet_raw" / self.name

    @property
    def preprocessed(self) -> Path:
        return self.plans_file.parent

    def plans(self) -> dict[str, Any]:
        """A copy of the plans that may be changed."""
        return json.loads(self.plans_file.read_text())

    def dataset_json(self) -> dict[str, Any]:
        return json.loads((self.preprocessed / "dataset.json").read_text())

    @contextmanager
    def environment(self, results: Path | None = None) -> Iterator[None]:
        """nnU-Net's variables name this dataset's folders (and `results`)."""
        with pytest.MonkeyPatch.context() as patch:
            for variable in FOLDERS:
                patch.setenv(variable, str(self.root / variable))
            if results is not None:
                patch.setenv("nnUNet_results", str(results))
            yield

    def copied_to(self, root: Path) -> TinyDataset:
        """The same dataset in another folder, where tests may change files."""
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return TinyDataset(root, root / self.plans_file.relative_to(self.root))


def write_phantom(root: Path, **spec: Any) -> Path:
    """Write a raw phantom of about 24 voxels a side below `root` and return its folder."""
    from lgssl_nnunet.phantom import PhantomSpec, write_phantom_dataset

    options = {"shape": (20, 24, 24), "num_labeled": 6, "num_unlabeled": 4, "num_test": 2, "dataset_id": 901, **spec}
    return write_phantom_dataset(root / "nnUNet_raw", PhantomSpec(**options), progress=False)


def plan_tiny_dataset(root: Path, name: str, **options: Any) -> TinyDataset:
    """Plan and preprocess a raw dataset below `root`, then shrink network and schedule in the plans."""
    from lgssl_nnunet.plans.plan import plan_and_preprocess

    with pytest.MonkeyPatch.context() as patch:
        for variable in FOLDERS:
            patch.setenv(variable, str(root / variable))
        options = {"configurations": ("3d_fullres", "2d"), **options}
        (file,) = plan_and_preprocess(
            name,
            planner="LGSSLPlannerCPU",
            num_processes=0,
            num_processes_fingerprint=0,
            progress=False,
            **options,
        )
    plans = json.loads(file.read_text())
    plans["lgssl"]["schedule"].update(num_epochs=2, iterations_per_epoch=2, val_iterations_per_epoch=1)
    for configuration in plans["configurations"].values():
        kwargs = configuration["architecture"]["arch_kwargs"]
        stages = len(kwargs["features_per_stage"])
        kwargs.update(features_per_stage=[4, 8, 16, 16, 16, 16, 16, 16][:stages])
        kwargs.update(n_conv_per_stage=[1] * stages, n_conv_per_stage_decoder=[1] * (stages - 1))
        configuration["batch_size"] = 2
    file.write_text(json.dumps(plans, indent=4))
    return TinyDataset(root, file)


def merge_classes(dataset: Path) -> None:
    """Turn the phantom's two classes into one."""
    import SimpleITK as sitk

    for file in [*dataset.glob("labelsTr/*"), *dataset.glob("labelsTs/*")]:
        sitk.WriteImage(sitk.Cast(sitk.ReadImage(str(file)) > 0, sitk.sitkUInt8), str(file))
    description = json.loads((dataset / "dataset.json").read_text())
    description["labels"] = {"background": 0, "liver": 1}
    description["prompts"].pop("gallbladder")
    (dataset / "dataset.json").write_text(json.dumps(description))


def add_class(dataset: Path) -> None:
    """Give the phantom a third class: a box of background in a corner of every labelled image."""
    import SimpleITK as sitk

    for file in [*dataset.glob("labelsTr/*"), *dataset.glob("labelsTs/*")]:
        image = sitk.ReadImage(str(file))
        labels = sitk.GetArrayFromImage(image)
        corner = labels[tuple(slice(1, 9) for _ in labels.shape)]
        corner[corner == 0] = 3
        changed = sitk.GetImageFromArray(labels)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(file))
    description = json.loads((dataset / "dataset.json").read_text())
    description["labels"]["spleen"] = 3
    description["prompts"]["spleen"] = "A magnetic resonance image of the spleen"
    (dataset / "dataset.json").write_text(json.dumps(description))


def plan_configuration(
    patch: Sequence[int] = (16, 16, 16),
    strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    *,
    residual_encoder: bool = False,
    kernels: Sequence[Sequence[int]] | None = None,
    features: int = 4,
) -> ConfigurationManager:
    """A configuration as a planner would write it, one convolution per stage."""
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    stages, dimensions = len(strides), len(patch)
    name = "ResidualEncoderUNet" if residual_encoder else "PlainConvUNet"
    blocks = "n_blocks_per_stage" if residual_encoder else "n_conv_per_stage"
    return ConfigurationManager(
        {
            "patch_size": list(patch),
            "architecture": {
                "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
                "arch_kwargs": {
                    "n_stages": stages,
                    "features_per_stage": [features * 2**stage for stage in range(stages)],
                    "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
                    "kernel_sizes": [list(kernel) for kernel in (kernels or [[3] * dimensions] * stages)],
                    "strides": [list(stride) for stride in strides],
                    blocks: [1] * stages,
                    "n_conv_per_stage_decoder": [1] * (stages - 1),
                    "conv_bias": True,
                    "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
                    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
                    "dropout_op": None,
                    "dropout_op_kwargs": None,
                    "nonlin": "torch.nn.LeakyReLU",
                    "nonlin_kwargs": {"inplace": True},
                },
                "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
            },
        }
    )


@pytest.fixture(scope="session")
def make_configuration() -> Callable[..., ConfigurationManager]:
    """`plan_configuration`."""
    return plan_configuration


@pytest.fixture(scope="session")
def stock_network() -> Callable[..., torch.nn.Module]:
    """nnU-Net's own network for a configuration."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    def build(
        configuration: ConfigurationManager, channels: int = 1, classes: int = 3, deep_supervision: bool = True
    ) -> torch.nn.Module:
        return get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            channels,
            classes,
            deep_supervision=deep_supervision,
        )

    return build


@pytest.fixture(scope="session")
def new_phantom() -> Callable[..., Path]:
    """`write_phantom`."""
    return write_phantom


@pytest.fixture(scope="session")
def plan_phantom() -> Callable[..., TinyDataset]:
    """`plan_tiny_dataset`."""
    return plan_tiny_dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyDataset]:
    """`tiny_dataset("regions")`: a planned and preprocessed variant of the phantom; not to be changed."""
    made: dict[str, TinyDataset] = {}

    def get(variant: str = "standard") -> TinyDataset:
        if variant not in made:
            root = tmp_path_factory.mktemp(variant)
            raw = write_phantom(root, **VARIANTS[variant])
            if variant == "two_classes":
                merge_classes(raw)
            if variant == "four_classes":
                add_class(raw)
            made[variant] = plan_tiny_dataset(root, raw.name)
        return made[variant]

    return get


@pytest.fixture(scope="session")
def build_trainer(tiny_dataset, tmp_path_factory) -> Callable[..., Any]:
    """Make a trainer on a tiny dataset, without pictures and progress bars.

    `build_trainer("LGSSLTrainer", variant="regions", epochs=4, mirroring_axes=[1])`: keywords that are not named below
    replace entries of `plans["lgssl"]`.
    """

    def build(
        trainer: str | type,
        *,
        variant: str = "standard",
        dataset: TinyDataset | None = None,
        configuration: str = "3d_fullres",
        fold: int | str = "all",
        results: Path | None = None,
        epochs: int = 2,
        iterations: int = 2,
        changes: Callable[[dict[str, Any]], None] | None = None,
        **lgssl: Any,
    ) -> Any:
        import torch

        from lgssl_nnunet.registry import find_trainer

        dataset = dataset or tiny_dataset(variant)
        plans = dataset.plans()
        plans["lgssl"]["schedule"].update(num_epochs=epochs, iterations_per_epoch=iterations)
        plans["lgssl"].update(copy.deepcopy(lgssl))
        if changes is not None:
            changes(plans)
        trainer_class = find_trainer(trainer) if isinstance(trainer, str) else trainer
        with dataset.environment(results or tmp_path_factory.mktemp("results")):
            made = trainer_class(
                {**plans, "continue_training": False},
                configuration,
                fold,
                dataset.dataset_json(),
                torch.device("cpu"),
            )
        made.show_progress = False
        without_pictures(made)
        return made

    return build


def without_pictures(trainer: Any) -> None:
    """Drawing takes longer than training these networks; tests/engine draws once."""
    trainer.logger.plot_progress_png = lambda folder: None
    if hasattr(trainer, "term_log"):
        trainer.term_log.plot = lambda path: None


@pytest.fixture(scope="session")
def same() -> Callable[[Any, Any], bool]:
    """Whether two nested structures of tensors, arrays and numbers are equal to the bit."""
    import numpy as np
    import torch

    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, np.ndarray):
            return isinstance(b, np.ndarray) and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
        if isinstance(a, Mapping):
            return isinstance(b, Mapping) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
        return bool(a == b or (a != a and b != b))

    return equal


@pytest.fixture
def held_elsewhere() -> Callable[[Path], AbstractContextManager[None]]:
    """A context in which another process holds a lock file, as a second command would."""
    script = "import sys, filelock; a = filelock.FileLock(sys.argv[1]); a.acquire(); print(flush=True); input()"

    @contextmanager
    def hold(file: Path) -> Iterator[None]:
        file.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", script, str(file)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            try:
                yield
            finally:
                process.kill()

    return hold


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """A context in which no file can grow beyond so many bytes, which programs meet like a full disk."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def files_below() -> Callable[[Path], dict[str, tuple[int, int]]]:
    """A function that returns size and modification time of every file below a folder, locks aside."""

    def look(folder: Path) -> dict[str, tuple[int, int]]:
        return {
            str(file.relative_to(folder)): (file.stat().st_size, file.stat().st_mtime_ns)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.suffix != ".lock"
        }

    return look


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Wait until a condition holds, for at most some seconds."""

    def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "nothing happened"
            time.sleep(0.1)

    return wait


@pytest.fixture
def is_running() -> Callable[[int], bool]:
    """Whether a process is there and not a zombie, by Linux's /proc."""

    def look(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    return look
