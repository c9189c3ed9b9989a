"""Bundles from strangers: everything that is not as lgssl_export_model writes it is refused in a sentence."""

from __future__ import annotations

import hashlib
import json
import random
import stat
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lgssl_nnunet.errors import CheckpointError, LGSSLError
from lgssl_nnunet.inference.bundle_weights import pack_weights, unpack_weights
from lgssl_nnunet.inference.bundles import MANIFEST, BundleWriter, open_bundle
from lgssl_nnunet.inference.export_model import export_model
from lgssl_nnunet.inference.models import model_from_folder
from lgssl_nnunet.inference.stored_model import image_rules, read_stored_model

WEIGHTS = "fold_0/checkpoint_final.safetensors"
FIRST_LAYER = "encoder.stages.0.0.convs.0.conv.weight"


@pytest.fixture(scope="module")
def bundle(one_fold, tmp_path_factory) -> Path:
    """A bundle of one fold; not to be changed."""
    folder = one_fold / "Dataset501_Tiny" / "nnUNetTrainer__LGSSLCPUPlans__3d_fullres"
    return export_model(tmp_path_factory.mktemp("bundle") / "model.zip", model_folder=folder)


def load(file: Path) -> None:
    """Do what lgssl_predict does with a bundle before it looks at images."""
    chosen = model_from_folder(file)
    image_rules(chosen.model.read_json("plans.json"), chosen.model.read_json("dataset.json"), chosen.folder)
    read_stored_model(chosen.folder, chosen.folds, chosen.checkpoint).network_with_weights()


class Contents:
    """The members of a bundle, to be changed and written again."""

    def __init__(self, file: Path) -> None:
        with zipfile.ZipFile(file) as archive:
            self.entries = [(entry, archive.read(entry)) for entry in archive.infolist()]

    def __getitem__(self, name: str) -> bytes:
        return next(content for entry, content in self.entries if entry.filename == name)

    def put(self, name: str, content: bytes, described: bool = True, **attributes: int) -> None:
        """Replace or add a member; with `described` the manifest says what it is."""
        entry = zipfile.ZipInfo(name)
        for attribute, value in attributes.items():
            setattr(entry, attribute, value)
        self.entries = [(e, c) for e, c in self.entries if e.filename != name] + [(entry, content)]
        if described:
            member = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            self.change_manifest(lambda manifest: manifest["members"].update({name: member}))

    def change_manifest(self, change: Callable[[dict], object]) -> None:
        manifest = json.loads(self[MANIFEST])
        change(manifest)
        self.put(MANIFEST, json.dumps(manifest).encode(), described=False)

    def change_json(self, name: str, change: Callable[[dict], object]) -> None:
        content = json.loads(self[name])
        change(content)
        self.put(name, json.dumps(content).encode())

    def change_weights(self, change: Callable[[dict], object]) -> None:
        weights = unpack_weights(self[WEIGHTS], "")
        change(weights)
        self.put(WEIGHTS, pack_weights(weights, ""))

    def write(self, file: Path) -> Path:
        with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of duplicates
            for entry, content in self.entries:
                archive.writestr(entry, content)
        return file


@pytest.fixture
def contents(bundle) -> Contents:
    return Contents(bundle)


def put(name: str, described: bool = True, **attributes: int) -> Callable[[Contents], None]:
    return lambda c: c.put(name, b"x", described=described, **attributes)


def duplicate(c: Contents) -> None:
    c.entries.append((zipfile.ZipInfo("plans.json"), c["plans.json"]))


def recompress(c: Contents) -> None:
    for entry, _ in c.entries:
        entry.compress_type = zipfile.ZIP_DEFLATED


def bomb(c: Contents) -> None:
    c.put("dataset.json", b" " * 2**26 + c["dataset.json"], compress_type=zipfile.ZIP_DEFLATED)


def damaged_header(c: Contents) -> None:
    c.put(WEIGHTS, struct.pack("<Q", 2**40) + c[WEIGHTS][8:])


def name_class(where: str, name: str) -> Callable[[Contents], None]:
    def change(plans: dict) -> None:
        architecture = plans["configurations"]["3d_fullres"]["architecture"]
        (architecture if where == "network_class_name" else architecture["arch_kwargs"])[where] = name

    return lambda c: c.change_json("plans.json", change)


def set_plans(**values: object) -> Callable[[Contents], None]:
    return lambda c: c.change_json("plans.json", lambda plans: plans.update(values))


def set_configuration(**values: object) -> Callable[[Contents], None]:
    return lambda c: c.change_json("plans.json", lambda plans: plans["configurations"]["3d_fullres"].update(values))


def set_manifest(**values: object) -> Callable[[Contents], None]:
    return lambda c: c.change_manifest(lambda manifest: manifest.update(values))


def set_model(**values: object) -> Callable[[Contents], None]:
    return lambda c: c.change_manifest(lambda manifest: manifest["model"].update(values))


def other_size(c: Contents) -> None:
    c.change_manifest(lambda manifest: manifest["members"]["plans.json"].update(size=3))


HOSTILE = {
    "path escape": (put("../evil.json"), r"holds '\.\./evil\.json', which is no part of a bundle"),
    "path escape among folds": (put("fold_0/../../x.safetensors"), "no part of a bundle"),
    "absolute path": (put("/etc/cron.d/evil"), "holds '/etc/cron.d/evil', which is no part"),
    "Windows path": (put("C:\\evil.json"), "no part of a bundle"),
    "folder": (put("fold_0/"), "no part of a bundle"),
    "symlink": (put("dataset.json", external_attr=(stat.S_IFLNK | 0o777) << 16), "holds dataset.json as a link"),
    "duplicate": (duplicate, "holds plans.json twice"),
    "extra member, described": (put("fold_1/checkpoint_final.safetensors"), "lacks something or has it wrong"),
    "extra member, not described": (put("fold_1/a.safetensors", False), "which its manifest.json does not name"),
    "pickle": (put("postprocessing.pkl"), "no part of a bundle"),
    "member missing": (lambda c: c.entries.pop(1), "it lacks dataset.json"),
    "wrong size": (other_size, "plans.json has another size"),
    "wrong checksum": (lambda c: c.put(WEIGHTS, b"x" * len(c[WEIGHTS]), described=False), "is not what manifest.json"),
    "compressed": (recompress, "is compressed, which nothing in a bundle is"),
    "size bomb": (bomb, "dataset.json is compressed"),
    "large JSON": (lambda c: c.put("dataset.json", b" " * (2**26 + 1)), "dataset.json has 67108865 bytes, more than"),
    "deep JSON": (lambda c: c.put("dataset.json", b"[" * 10**6), "dataset.json is no JSON"),
    "JSON that is no object": (lambda c: c.put("dataset.json", b"[1]"), "dataset.json is no JSON object"),
    "safetensors header damaged": (damaged_header, "is no whole safetensors file"),
    "safetensors cut": (lambda c: c.put(WEIGHTS, c[WEIGHTS][:-4]), "is no whole safetensors file"),
    "pickle as safetensors": (lambda c: c.put(WEIGHTS, b"\x80\x04cos\nsystem\n" * 9), "is no whole safetensors file"),
    "no safetensors of ours": (lambda c: c.put(WEIGHTS, save({"x": torch.ones(2)})), "is no whole safetensors file"),
    "missing tensor": (lambda c: c.change_weights(lambda w: w.pop(FIRST_LAYER)), "do not fit the network"),
    "surplus tensor": (lambda c: c.change_weights(lambda w: w.update(x=torch.ones(2))), "do not fit the network"),
    "tensor of another shape": (
        lambda c: c.change_weights(lambda w: w.update({FIRST_LAYER: torch.ones(4, 1, 3, 3, 5)})),
        "do not fit the network",
    ),
    "network that is a function": (
        name_class("network_class_name", "torch.nn.functional.torch.hub.load"),
        r"plans\.json builds its network from torch\.nn\.functional\.torch\.hub\.load",
    ),
    "network of another package": (name_class("network_class_name", "shutil.rmtree"), "from shutil.rmtree"),
    "layer that is a function": (name_class("norm_op", "torch.nn.functional.torch.os.system"), "torch.os.system"),
    "class that torch.nn only imports": (name_class("nonlin", "torch.nn.modules.module.OrderedDict"), "OrderedDict"),
    "reader that is none": (set_plans(image_reader_writer="np"), "reads images with np"),
    "reader that is not there": (set_plans(image_reader_writer="Nothing"), "reads images with Nothing"),
    "label manager that is none": (set_plans(label_manager="partial"), "prepares images with partial"),
    "preprocessor that is none": (set_configuration(preprocessor_name="multiprocessing"), "with multiprocessing"),
    "normalisation that is none": (set_configuration(normalization_schemes=["ABC"]), "prepares images with ABC"),
    "resampling that is none": (set_configuration(resampling_fn_data="np"), "prepares images with np"),
    "plans without configurations": (lambda c: c.put("plans.json", b"{}"), "do not make a model"),
    "images without channels": (lambda c: c.put("dataset.json", b"{}"), "do not make a model .KeyError"),
    "labels that are none": (
        lambda c: c.change_json("dataset.json", lambda content: content.update(labels=3)),
        "do not make a model",
    ),
    "unknown trainer": (set_model(trainer="Nobody"), "There is no trainer called 'Nobody'"),
    "trainer that is a module": (set_model(trainer="torch"), "There is no trainer called 'torch'"),
    "unknown configuration": (set_model(configuration="4d"), "has no configuration '4d'"),
    "escape sequence in a name": (set_model(dataset="\x1b[2J"), "lacks something or has it wrong"),
    "model of another type": (set_manifest(model=[1]), "lacks something or has it wrong"),
    "axis that is none": (set_manifest(mirroring_axes=[0, 7]), "has it wrong: mirroring_axes"),
    "axis that is a word": (set_manifest(mirroring_axes="xy"), "has it wrong: mirroring_axes"),
    "weights without a time": (set_manifest(weights=[{"fold": "0", "checkpoint": "a.pth"}]), "has it wrong"),
    "no weights": (set_manifest(weights=[]), "has it wrong: members"),
    "future format": (set_manifest(format_version=2), r"is a bundle of format 2, .* reads format 1: install a newer"),
    "other format": (set_manifest(format="something"), "is no model bundle"),
    "manifest missing": (lambda c: c.entries.pop(), "is no model bundle .*nnUNetv2_install_pretrained_model_from_zip"),
}


def test_the_untouched_bundle_loads_again_after_it_was_written_by_the_tests(contents, tmp_path):
    load(contents.write(tmp_path / "same.zip"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_bundle_is_refused_in_a_sentence_and_writes_nothing(kind, contents, tmp_path, monkeypatch):
    change, message = HOSTILE[kind]
    change(contents)
    folder = tmp_path / "only this"
    folder.mkdir()
    file = contents.write(folder / "hostile.zip")
    monkeypatch.chdir(folder)
    with pytest.raises(LGSSLError, match=message):
        load(file)
    assert list(tmp_path.rglob("*")) == [folder, file]


def test_a_member_that_claims_to_be_larger_than_the_archive_is_refused(bundle, tmp_path):
    data = bytearray(bundle.read_bytes())
    directory = data.rindex(b"PK\x01\x02")
    data[directory + 20 : directory + 28] = struct.pack("<II", 2**31, 2**31)  # the two sizes of the last entry
    (tmp_path / "bomb.zip").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest\.json has 2147483648 bytes, more than"):
        load(tmp_path / "bomb.zip")
    directory = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4 + 46)
    entry = data.index(WEIGHTS.encode(), directory) - 46
    data = bytearray(bundle.read_bytes())
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**31, 2**31)
    (tmp_path / "bomb.zip").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"its files are said to have 214\d+ bytes, and the archive has \d{4,6}\)"
    ):
        load(tmp_path / "bomb.zip")


def test_too_many_files_are_refused_before_they_are_looked_at(contents, tmp_path):
    contents.entries += [(zipfile.ZipInfo(f"fold_0/{number}.safetensors"), b"") for number in range(1000)]
    with pytest.raises(CheckpointError, match="it holds 1004 files"):
        load(contents.write(tmp_path / "many.zip"))


@pytest.mark.parametrize("content", [b"", b"PK", b"this is text", b"\x80\x04cos\nsystem\n(S'true'\ntR."])
def test_what_is_no_zip_archive_is_refused(content, tmp_path):
    (tmp_path / "model.zip").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.zip is no model bundle \(.*give a bundle of lgssl_export_model"):
        load(tmp_path / "model.zip")


def test_a_truncated_bundle_is_refused_wherever_it_ends(bundle, tmp_path):
    whole = bundle.read_bytes()
    for end in (*range(1, len(whole), len(whole) // 40), len(whole) - 1):
        (tmp_path / "cut.zip").write_bytes(whole[:end])
        with pytest.raises(CheckpointError):
            load(tmp_path / "cut.zip")


def test_a_bundle_with_changed_bytes_is_refused_or_gives_the_same_weights(bundle, tmp_path):
    whole = bundle.read_bytes()
    expected = read_stored_model(bundle, ["0"]).weights
    chance, refused = random.Random(0), 0
    for _ in range(200):
        changed = bytearray(whole)
        for _ in range(chance.choice((1, 3))):
            place = chance.choice((chance.randrange(len(whole)), chance.randrange(len(whole) - 3000, len(whole))))
            changed[place] = chance.randrange(256)
        (tmp_path / "changed.zip").write_bytes(changed)
        try:
            chosen = model_from_folder(tmp_path / "changed.zip")
            found = read_stored_model(chosen.folder, chosen.folds, chosen.checkpoint).weights
        except LGSSLError:
            refused += 1
            continue
        for one, other in zip(expected.values(), found.values(), strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)
    assert refused > 100


def test_a_bundle_that_is_replaced_while_it_is_read_is_noticed(contents, tmp_path):
    file = contents.write(tmp_path / "model.zip")
    opened = open_bundle(file)
    contents.change_json("plans.json", lambda plans: plans.update(plans_name="Other"))
    contents.write(file)
    with pytest.raises(CheckpointError, match=r"plans\.json is not what manifest\.json says"):
        opened.read_json("plans.json")


def test_the_same_content_gives_the_same_bytes_and_tells_neither_time_nor_machine(tmp_path):
    for name in "ab":
        with BundleWriter(tmp_path / name) as writer:
            writer.add("plans.json", b"{}")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        (entry,) = archive.infolist()
    assert (entry.date_time, entry.create_system) == ((1980, 1, 1, 0, 0, 0), 3)


def test_weights_come_back_to_the_bit_under_all_their_names(same):
    base = torch.randn(3, 4, 5)
    weights = {
        "a": base,
        "a again": base,
        "equal": base.clone(),
        "part": base[1:],
        "other layout": base.permute(2, 0, 1),
        "half": base.half(),
        "bf16": base.bfloat16(),
        "flag": torch.tensor(True),
        "count": torch.tensor(7),
        "zeros": torch.zeros(60),
        "none": torch.zeros(0, 3),
    }
    content = pack_weights(weights, "")
    found = unpack_weights(content, "")
    assert same(
        {name: tensor.contiguous() for name, tensor in weights.items()}, {name: found[name] for name in weights}
    )
    assert len(content) < 2.2 * base.nbytes + len(weights) * 100 + 60 * 4 + base.nbytes + 200


def test_what_is_no_tensor_does_not_go_along():
    with pytest.raises(CheckpointError, match=r"the file: epoch is a int and no tensor"):
        pack_weights({"epoch": 3}, "the file")


def test_opening_a_bundle_imports_no_torch(bundle):
    code = f"import sys; from lgssl_nnunet.inference.models import model_from_folder as m; m({str(bundle)!r});"
    code += "print('torch' in sys.modules, 'nnunetv2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.stdout.split() == ["False"] * 2
