"""Files with weights and vectors, some of which would run something: checkpoints, bundles and embedding banks."""

from __future__ import annotations

import io
import json
import pickle
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch

from lgssl_nnunet.engine.checkpoints import newest_whole_checkpoint
from lgssl_nnunet.engine.pretrained import load_pretrained
from lgssl_nnunet.inference.bundles import MANIFEST, BundleWriter
from lgssl_nnunet.inference.export_model import export_model
from lgssl_nnunet.inference.models import model_from_folder
from lgssl_nnunet.inference.stored_model import read_stored_model
from lgssl_nnunet.text.bank import EmbeddingBank

sys.path.insert(0, str(Path(__file__).parent))
from mutations import NASTY, archive, damaged, hostile, json_bytes, write
from watching import CANARY, Tally, attempt, fuzz, watched

LAYER = (4, 1, 3, 3, 3)
TENSORS = [
    torch.full(LAYER, float("nan")),
    torch.ones(4, 1, 3, 3),
    torch.ones(LAYER, dtype=torch.complex64),
    torch.ones(LAYER, dtype=torch.int64),
    torch.ones(LAYER).to_sparse(),
    torch.ones(1).expand(2**40),
    torch.ones(LAYER, device="meta"),
    torch.nn.Parameter(torch.ones(LAYER)),
    torch.zeros(0),
    np.float64(3),
]


def test_the_watch_sees_what_hostile_objects_do(tmp_path):
    for number, call in enumerate(hostile(tmp_path / CANARY)[:3]):
        with watched() as seen:
            pickle.loads(pickle.dumps(call))
        assert seen != [], number
        assert (tmp_path / CANARY).is_file(), number
        (tmp_path / CANARY).unlink()


def saved(content: Any, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@st.composite
def checkpoints(draw: st.DrawFn, file: Path, canary: Path) -> bytes:
    kind = draw(st.sampled_from(["archive", "archive", "entry", "entry", "weight", "weight", "legacy", "pickle"]))
    if kind == "archive":
        return draw(archive(file.read_bytes()))
    value = draw(st.sampled_from(hostile(canary)) | st.sampled_from([*NASTY, *TENSORS]))
    if kind == "pickle":
        return pickle.dumps(value)
    content = torch.load(file, weights_only=False)
    place = content["network_weights"] if kind == "weight" else content
    name = draw(st.sampled_from(sorted(place)))
    if draw(st.sampled_from([True, True, True, False])):
        place[name] = value
    else:
        del place[name]
    data = saved(content, zipped=kind != "legacy")
    return draw(damaged(data) | st.just(data)) if kind == "legacy" else data


def test_a_checkpoint_is_refused_or_gives_finite_weights(model, tmp_path):
    file = model / "fold_0/checkpoint_final.pth"
    whole = write(tmp_path / "whole.pth", file.read_bytes())

    def load():
        chosen = model_from_folder(model)
        network = read_stored_model(chosen.folder, chosen.folds, chosen.checkpoint).network_with_weights()
        load_pretrained(network, file)
        return network

    def try_one(content, tally):
        write(file, content)
        network = attempt(load, tmp_path, tally)
        attempt(lambda: newest_whole_checkpoint(file.parent), tmp_path, Tally())
        if network is not None:
            assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())

    fuzz("checkpoints", checkpoints(whole, tmp_path / CANARY), try_one)


def test_a_bundle_with_other_descriptions_is_refused_or_makes_its_network(one_fold, model, tmp_path):
    file = export_model(tmp_path / "model.zip", model_folder=model)
    with zipfile.ZipFile(file) as source:
        members = {name: source.read(name) for name in source.namelist()}
    manifest = members.pop(MANIFEST)

    def load():
        chosen = model_from_folder(file)
        return read_stored_model(chosen.folder, chosen.folds, chosen.checkpoint).network_with_weights()

    expected = load().state_dict()

    def try_one(example, tally):
        changed, content = example
        file.unlink()
        with BundleWriter(file) as writer:
            for name, data in members.items():
                writer.add(name, content if name == changed else data)
            described = {**json.loads(manifest), "members": writer._members}
            writer._write(MANIFEST, content if changed == MANIFEST else json.dumps(described).encode())
        network = attempt(load, tmp_path, tally)
        if network is not None:
            assert all(tensor.equal(expected[key]) for key, tensor in network.state_dict().items())

    originals = {MANIFEST: manifest, **{name: members[name] for name in ("plans.json", "dataset.json")}}
    changed = [st.tuples(st.just(name), json_bytes(json.loads(content))) for name, content in originals.items()]
    fuzz("bundles", st.one_of(changed), try_one)


def other_arrays() -> list[np.ndarray]:
    return [
        np.array(None),
        np.zeros((3, 8)),
        np.full((3, 8), np.nan),
        np.full((3, 8), 1e300),
        np.ones((2, 8)),
        np.ones(3),
        np.ones((3, 8), complex),
        np.ones((3, 8), int),
        np.ones((3, 8), np.longdouble),
        np.zeros((0, 8)),
        np.array(["a", "b"]),
        np.array(["a"] * 3, dtype="S1"),
        np.array("x" * 10**5),
        np.array(3.0),
        np.zeros(3, dtype=[("a", "U3")]),
        np.zeros(2**28, np.float32),
    ]


SHAPES = [
    "(10**9, 10**9)",
    "(99999999999,)",
    "(-1,)",
    "(3, 8, )",
    "()",
    "('a',)",
    "(" * 200,
    "__import__('os').abort()",
]
KINDS = ["<f2", "|O", "<U999999999", "V8", "x", "<f99", "[('a','O')]"]


@st.composite
def banks(draw: st.DrawFn, whole: bytes, canary: Path) -> bytes:
    kind = draw(st.sampled_from(["archive", "replace", "replace", "hostile", "drop", "header"]))
    if kind == "archive":
        return draw(archive(whole))
    with np.load(io.BytesIO(whole)) as content:
        arrays = dict(content)
    name, stream = draw(st.sampled_from(sorted(arrays))), io.BytesIO()
    if kind == "hostile":
        arrays[name] = np.array([draw(st.sampled_from(hostile(canary)))], dtype=object)
    elif kind == "replace":
        arrays[name] = draw(st.sampled_from(other_arrays()))
    else:
        del arrays[name]
    np.savez_compressed(stream, **arrays)
    if kind == "header":
        described = f"{{'descr': {draw(st.sampled_from(KINDS))!r}, 'fortran_order': False, 'shape': "
        header = (described + f"{draw(st.sampled_from(SHAPES))}, }}").ljust(117).encode() + b"\n"
        with zipfile.ZipFile(stream, "a") as target:
            target.writestr(f"{name}.npy", b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + b"\0" * 48)
    return stream.getvalue()


def test_a_bank_is_refused_or_gives_unit_vectors(tmp_path):
    file = tmp_path / "bank.npz"
    vectors = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    EmbeddingBank(("liver", "spleen", "left kidney"), vectors, "minilm", "0" * 64).save(file)

    def try_one(content, tally):
        write(file, content)
        found = attempt(lambda: EmbeddingBank.load(file), tmp_path, tally)
        if found is not None:
            assert np.allclose(np.linalg.norm(found.embeddings, axis=1), 1, atol=1e-5)
            assert len(found.prompts) == len(found.embeddings)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are twice in an archive
        fuzz("embedding banks", banks(file.read_bytes(), tmp_path / CANARY), try_one)
