"""The start of a prediction without torch's compiler, and of its readers without torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

START = "from lgssl_nnunet.inference.compiler import import_nnunet_without_compiler as start; start();"


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.slow
def test_a_prediction_does_not_import_the_compiler():
    code = """
import sys
import lgssl_nnunet.inference.predict
from lgssl_nnunet.registry import find_trainer
find_trainer("LGSSLTrainer")
print(any(name.startswith("torch._dynamo") for name in sys.modules))
"""
    assert run(START + code) == "False"
    assert run(code) == "True"  # without it, nnU-Net imports the compiler


def test_a_process_that_reads_images_does_without_torch():
    assert run("import sys, lgssl_nnunet.inference.reading; print('torch' in sys.modules)") == "False"


@pytest.mark.slow
def test_compiled_networks_are_still_recognised_and_others_are_not():
    code = """
import torch
from nnunetv2.inference import predict_from_raw_data as of_nnunet
plain = torch.nn.Linear(1, 1)
print(isinstance(plain, of_nnunet.OptimizedModule))
compiled = torch.compile(plain)
print(isinstance(compiled, of_nnunet.OptimizedModule), isinstance(plain, of_nnunet.OptimizedModule))
from torch._dynamo import OptimizedModule
print(OptimizedModule is type(compiled))
"""
    assert run(START + code).split() == ["False", "True", "False", "True"]


@pytest.mark.slow
def test_nnunet_is_imported_as_usual_if_it_needs_more_of_the_compiler(tmp_path):
    (tmp_path / "needs_more.py").write_text("from torch._dynamo import OptimizedModule, reset\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from lgssl_nnunet.inference import compiler
compiler.IMPORTERS = ("needs_more",)
compiler.import_nnunet_without_compiler()
import needs_more
print(callable(needs_more.reset), needs_more.OptimizedModule.__module__)
"""
    assert run(code).split() == ["True", "torch._dynamo.eval_frame"]
