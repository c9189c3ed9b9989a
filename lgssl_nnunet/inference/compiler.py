"""Keeps torch's compiler out of the start of a prediction.

nnU-Net imports one class of it, to recognise a compiled network, and that import takes a third of the start-up.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
IMPORTERS = ("nnunetv2.inference.predict_from_raw_data", "nnunetv2.training.nnUNetTrainer.nnUNetTrainer")
"""The modules of nnU-Net that prediction needs and that import the compiler's class."""


class _Recognising(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        # There is no compiled network before the compiler is imported.
        compiler = sys.modules.get(COMPILER)
        return compiler is not None and isinstance(instance, compiler.OptimizedModule)


class OptimizedModule(metaclass=_Recognising):
    """In the place of torch's class of that name: `isinstance` answers as torch's own does."""


def import_nnunet_without_compiler() -> None:
    """Import nnU-Net's predictor and trainer with a stand-in for the class that they take from torch's compiler.

    Whoever imports the compiler afterwards gets the real one. Does nothing if it is imported already, and nnU-Net is
    imported as usual if it asks the compiler for anything else.
    """
    if COMPILER in sys.modules:
        return
    stand_in = ModuleType(COMPILER)
    stand_in.OptimizedModule = OptimizedModule
    sys.modules[COMPILER] = stand_in
    try:
        for name in IMPORTERS:
            importlib.import_module(name)
    except (ImportError, AttributeError):
        pass  # those that failed are imported again where they are needed, with the real compiler
    finally:
        if sys.modules[COMPILER] is stand_in:
            del sys.modules[COMPILER]
