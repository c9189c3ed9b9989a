"""The four datasets' prompts, as conversion writes them, need neither a network nor the text extra."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lgssl_nnunet.dataset_conversion.datasets import DATASETS, find_dataset

CODE = """
import json, socket, sys

class NoExtra:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"open_clip", "transformers", "huggingface_hub"}:
            raise ModuleNotFoundError(name)

def no_network(*arguments, **options):
    raise OSError("no network")

sys.meta_path.insert(0, NoExtra())
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network

from lgssl_nnunet.text.encoders import embed_prompts
from lgssl_nnunet.text.prompts import build_prompts

found = embed_prompts(build_prompts(json.loads(sys.argv[1])))
sources = [text.source for texts in found.texts for text in texts]
print(json.dumps([found.encoder, list(found.embeddings.shape), sources]))
"""


@pytest.mark.parametrize("key", sorted(DATASETS))
def test_every_class_of_a_published_dataset_is_in_the_bank(key):
    dataset = find_dataset(key)
    content = {"channel_names": {"0": dataset.channel}, "labels": dataset.labels, "prompts": dict(dataset.prompts)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(content)], capture_output=True, encoding="utf-8", check=True
    )
    encoder, shape, sources = json.loads(done.stdout)
    assert encoder == "bank (all-MiniLM-L6-v2)"
    assert shape == [len(dataset.labels), 384]
    assert set(sources) <= {"bank, by sentence", "bank, by synonym"}
