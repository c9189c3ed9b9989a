"""The passes that benchmarks/step_cost.py counts per method: against the literature's table and against real steps."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from lgssl_nnunet.registry import find_trainer, trainer_names

ROOT = Path(__file__).resolve().parents[2]


def load_step_cost():
    spec = importlib.util.spec_from_file_location("step_cost", ROOT / "benchmarks" / "step_cost.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_cost"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


step_cost = load_step_cost()
COUNTED = sorted(set(step_cost.COUNTS) & set(trainer_names()))
# Shares of stock 3D nnU-Net with 32 to 320 features (methods.md section 18).
STOCK = {"network": 1.0, "encoder": 0.29, "decoder": 0.71, "interpolating decoder": 0.71, "faithful decoder": 1.14}
STOCK["gated network"] = 1.02
# Convolutions that a step may have on top of the floor, as a share of it; elsewhere 5 %.
MORE = {"CoBioNetTrainer": 6.0, "MCFTrainer": 0.25}  # critics; the other network has the gradient
SETTINGS = {
    "LGSSLTrainer": [{"faithful_decoder": True}],
    "MCNetPlusTrainer": [{"faithful_decoder": True}, {"num_decoders": 2}],
    "UAMTTrainer": [{"passes": 3}],
    "ACMTTrainer": [{"variant": variant} for variant in ("uncertainty", "label_error", "prototype")],
    "DeSCOTrainer": [{"passes": 3}],
    "CAMLTrainer": [{"faithful_decoder": True}],
}
CELLS = [(name, values) for name in COUNTED for values in [{}, *SETTINGS.get(name, [])]]


@pytest.mark.parametrize("name", COUNTED)
def test_with_stock_nnunets_shares_the_floor_is_that_of_section_18(name):
    passes = step_cost.COUNTS[name](find_trainer(name).hyperparameters)
    if passes.section_18 is not None:
        assert step_cost.floor_in_passes(passes, STOCK) / 2 == pytest.approx(passes.section_18, abs=0.02)


@pytest.mark.parametrize(("name", "values"), CELLS, ids=[f"{name} {values or ''}" for name, values in CELLS])
def test_a_real_step_has_the_passes_that_are_counted(name, values, with_settings, started):
    flops = {}
    for cell, trainer in (("reference", started(step_cost.REFERENCE)), ("own", with_settings(name, **values))):
        batches = [next(trainer.dataloader_train) for _ in range(2)]
        subject = step_cost.Subject(name, trainer, batches, 0.0)
        subject.step(0)
        with FlopCounterMode(display=False) as counter:
            subject.step(1)
        # Without matrix products: the rules leave attention and heads out, which is most of such a tiny network.
        flops[cell] = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "convolution" in str(op))
    passes = subject.passes
    parts = step_cost.build_parts(subject, {*passes.trained, *passes.untrained})
    floor = step_cost.floor_in_passes(passes, {part: parts[part].cost() for part in parts})
    # A little less is right: nothing goes back to the image from the first convolution.
    assert 0.97 < flops["own"] / flops["reference"] / floor < 1 + MORE.get(name, 0.05)


def test_times_of_passes_add_up_to_the_floor_in_seconds():
    passes = step_cost.Passes({"encoder": 2, "decoder": 3}, {"network": 5})
    seconds = {("encoder", True): 1.0, ("decoder", True): 10.0, ("network", False): 100.0, ("network", True): 7.0}
    assert step_cost.floor_in_seconds(passes, seconds) == 2 + 30 + 500


def test_rounds_in_which_the_machine_is_slower_do_not_change_the_ratio():
    reference = [[1.0, 1.0], [4.0, 4.0], [1.0, 1.0]]
    own = [[2.0, 2.0, 9.0], [8.0, 8.0, 9.0], [2.0, 2.0, 9.0]]
    assert step_cost.ratio(own, reference) == 2


def test_a_row_says_what_is_unknown(started):
    trainer = started(step_cost.REFERENCE)
    trainer.__class__ = type("UnknownTrainer", (type(trainer),), {})
    subject = step_cost.Subject("UnknownTrainer", trainer, [], 0.5, [[1.0]], overheads=[1.0], flops=10)
    row = step_cost.result(subject, subject, {}, {})
    assert (row["floor ratio"], row["floor seconds"], row["step ratio"]) == (None, None, 1.0)
    assert step_cost.table([row]).splitlines()[-1].count(" - ") == 7


@pytest.mark.slow
def test_the_script_measures_every_cell_and_writes_nothing_to_the_results(tiny_dataset, tmp_path):
    dataset = tiny_dataset()
    with dataset.environment(tmp_path / "results"):
        words = [sys.executable, str(ROOT / "benchmarks" / "step_cost.py"), "901", "--plans", dataset.plans_file.stem]
        words += ["--trainers", "PseudoLabelTrainer", "MeanTeacherTrainer:noise=0", "--steps", "1", "--rounds", "2"]
        words += ["-device", "cpu", "--output", str(tmp_path / "report.json")]
        done = subprocess.run(words, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["trainer"] for row in rows] == [step_cost.REFERENCE, "PseudoLabelTrainer", "MeanTeacherTrainer:noise=0"]
    for row in rows:
        (first,), (second,) = row["every step's seconds"]
        assert row["step seconds"] == pytest.approx((first + second) / 2, rel=1e-3)
        assert row["floor seconds"] > 0
        assert row["counted ratio"] == pytest.approx(row["floor ratio"], rel=0.02)
    assert f"| {rows[2]['trainer']} | " in done.stdout
    assert not (tmp_path / "results").exists()
