"""lgssl_nnunet: nnU-Net's self-configuring pipeline taught to learn from unlabelled scans.

Each command is a shell around one function that is importable from here; nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# nnU-Net starts eight worker processes by default, each of which imports torch; more workers than cores only cost time.
os.environ.setdefault("nnUNet_def_n_proc", str(min(8, os.cpu_count() or 1)))

# Threads that spin while they wait steal the cores from the data workers and from each other: a training step beside
# other work was 3.5 times slower. Takes effect if torch was not imported before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_FUNCTIONS = {
    "convert_dataset": "lgssl_nnunet.dataset_conversion.datasets",
    "merge_datasets": "lgssl_nnunet.plans.merge",
    "prompts": "lgssl_nnunet.plans.prompt_overview",
    "plan_and_preprocess": "lgssl_nnunet.plans.plan",
    "sparse_annotation": "lgssl_nnunet.plans.sparse_annotation",
    "train": "lgssl_nnunet.training",
    "predict": "lgssl_nnunet.inference.predict",
    "export_model": "lgssl_nnunet.inference.export_model",
    "evaluate": "lgssl_nnunet.evaluation.evaluate",
    "report": "lgssl_nnunet.evaluation.report.report",
    "benchmark": "lgssl_nnunet.evaluation.benchmark.benchmark",
    "info": "lgssl_nnunet.installation",
    "demo": "lgssl_nnunet.demonstration",
}
__all__ = ["__version__", *_FUNCTIONS]


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'lgssl_nnunet' has no attribute {name!r}")
