from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lgssl_nnunet.errors import DatasetError, SplitError, UsageError
from lgssl_nnunet.plans import protocol as protocol_module
from lgssl_nnunet.plans.cases import load_raw_dataset
from lgssl_nnunet.plans.planner import LGSSLPlannerCPU, LGSSLPlannerResEncM, make_plans
from lgssl_nnunet.plans.protocol import PROTOCOLS_FOLDER, apply_protocol, find_protocol, load_protocols
from lgssl_nnunet.plans.splits import choose_budget, protocol_budget

PROTOCOLS = load_protocols()
TWIN = "CMPXO4J23G58J53Q98SZ"
WITHOUT_TUMOUR = {f"liver_{n:03d}" for n in (32, 34, 38, 41, 47, 87, 89, 91, 105, 106, 114, 115, 119)}
IRCADB = {f"liver_{n:03d}" for n in range(28, 48)}

TINY = {
    "kind": "literature",
    "title": "a list",
    "source": "A publication.",
    "order": "As published.",
    "train": ["lab_03", "lab_01", "lab_00", "unl_00"],
    "validation": ["lab_05"],
    "test": ["test_00", "lab_02"],
    "budgets": [2],
    "patch_size": None,
    "batch_size": None,
    "cautions": ["one thing leaks"],
    "comparable": "Nothing compares.",
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture
def write_protocol(tmp_path, monkeypatch) -> Callable[..., None]:
    """Replace the data files by one protocol, `tiny-literature`, for the tiny dataset: `write_protocol(test=[])`."""
    folder = tmp_path / "protocols"
    folder.mkdir()
    monkeypatch.setattr(protocol_module, "PROTOCOLS_FOLDER", folder)

    def write(**changes) -> None:
        content = {"dataset": "Tiny", "conversion": "Tiny", "protocols": {"tiny-literature": TINY | changes}}
        (folder / "tiny.json").write_text(json.dumps(content))

    write()
    return write


@pytest.fixture
def tiny(raw_dataset, write_protocol):
    """Six labelled cases (lab), two without label (unl), one in imagesUn (more) and one in imagesTs (test)."""
    return raw_dataset(labeled=6, unlabeled=2, in_images_un=1, test=1)


@pytest.fixture
def budget(tiny) -> Callable[..., tuple[str, ...]]:
    """The labelled cases of the tiny protocol for a number."""

    def choose(labeled: int | None = None) -> tuple[str, ...]:
        cases = apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))
        return protocol_budget(cases, labeled).labeled

    return choose


def fingerprint(shape, spacing) -> dict:
    statistics = dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)
    return {
        "spacings": [list(spacing)] * 100,
        "shapes_after_crop": [list(shape)] * 100,
        "foreground_intensity_properties_per_channel": {"0": statistics},
        "median_relative_size_after_cropping": 1.0,
    }


@pytest.fixture
def configurations(raw_dataset) -> Callable[..., dict]:
    """Plan as if the images had this shape and spacing (z, y, x), under a published protocol."""
    raw_dataset(labeled=1, unlabeled=0, in_images_un=0, test=0)

    def plan(name, shape, spacing, planner=LGSSLPlannerCPU) -> dict:
        dataset = load_raw_dataset(901)
        plans = make_plans(dataset, fingerprint(shape, spacing), planner, "Name", protocol=PROTOCOLS[name])
        return plans["configurations"]

    return plan


# ---------------------------------------------------------------------- the data files


def test_every_dataset_has_a_literature_and_a_clean_protocol():
    by_dataset: dict[str, set[str]] = {}
    for protocol in PROTOCOLS.values():
        by_dataset.setdefault(protocol.conversion, set()).add(protocol.kind)
    assert by_dataset == {key: {"literature", "clean"} for key in ("BTCV", "LA", "LiTS", "Pancreas")}
    assert len(PROTOCOLS) == 2 + 3 + 6 + 3


def test_the_data_files_hold_no_entry_that_nothing_reads():
    known = set(TINY) | {"num_test", "labeled", "withdrawn", "left_out"}
    for file in PROTOCOLS_FOLDER.glob("*.json"):
        content = json.loads(file.read_text())
        assert set(content) == {"dataset", "conversion", "protocols"}
        for entry in content["protocols"].values():
            assert set(TINY) <= set(entry) <= known


@pytest.mark.parametrize("name", PROTOCOLS)
def test_the_lists_of_a_protocol_have_no_case_twice(name):
    protocol = PROTOCOLS[name]
    listed = [*protocol.train, *protocol.held_out]
    assert len(set(listed)) == len(listed)
    assert set(protocol.withdrawn) <= set(listed)
    assert set(protocol.left_out).isdisjoint(listed)
    assert all(set(cases) <= set(protocol.train) and len(cases) == n for n, cases in protocol.labeled.items())
    assert all(number <= len(protocol.train) for number in protocol.budgets)
    assert "_" not in name


def sizes(name: str) -> tuple[int, int, int]:
    return len(PROTOCOLS[name].train), len(PROTOCOLS[name].validation), PROTOCOLS[name].num_test


def test_the_lists_have_the_published_sizes():
    assert sizes("la-literature") == (80, 0, 20)
    assert sizes("la-clean") == (99, 0, 54)
    assert sizes("pancreas-literature") == (62, 0, 20)
    assert sizes("pancreas-coranet") == (62, 0, 18)
    assert sizes("pancreas-clean") == (61, 0, 19)
    assert sizes("btcv-literature") == (20, 4, 6)
    assert sizes("lits-literature") == (110, 0, 21)
    assert sizes("lits-desco") == sizes("lits-clean") == (100, 0, 31)


def test_left_atrium_keeps_the_published_order_and_the_clean_lists_lack_the_twin():
    literature, clean = PROTOCOLS["la-literature"], PROTOCOLS["la-clean"]
    assert literature.train[:4] == (
        "06SR5RBREL16DQ6M8LWS",
        "0RZDK210BSMWAA6467LU",
        "1D7CUD1955YZPGK8XHJX",
        "1GU15S0GJ6PFNARO469W",
    )
    assert literature.train.index(TWIN) == 42
    assert clean.train == tuple(case for case in (*literature.train, *literature.test) if case != TWIN)
    assert clean.train[:16] == literature.train[:16]
    assert clean.test is None
    assert TWIN in clean.left_out


def test_pancreas_leaks_in_the_published_list_and_not_in_the_clean_ones():
    literature = PROTOCOLS["pancreas-literature"]
    assert "pancreas_0025" in literature.test
    assert "pancreas_0002" in literature.train
    assert literature.train[10] == "pancreas_0070"
    assert set(literature.withdrawn) == {"pancreas_0025", "pancreas_0070"}
    for name in ("pancreas-clean", "pancreas-coranet"):
        protocol = PROTOCOLS[name]
        assert {*protocol.train, *protocol.held_out}.isdisjoint(literature.withdrawn)
        assert set(protocol.left_out) == set(literature.withdrawn)
    assert PROTOCOLS["pancreas-clean"].train[:6] == literature.train[:6]
    coranet = PROTOCOLS["pancreas-coranet"]
    assert coranet.train[:12] == tuple(f"pancreas_{number:04d}" for number in range(1, 13))


def test_the_published_labelled_sets_of_btcv_are_not_nested():
    labeled = {number: set(cases) for number, cases in PROTOCOLS["btcv-literature"].labeled.items()}
    assert list(labeled) == [2, 4, 8]
    assert labeled[2] == {"btcv_0023", "btcv_0028"}
    assert not labeled[2] <= labeled[4]
    assert not labeled[4] <= labeled[8]


def test_the_folds_of_btcv_are_the_draw_that_their_file_describes():
    everyone = [f"btcv_{number:04d}" for number in (*range(1, 11), *range(21, 41))]
    draw = sorted(everyone, key=lambda case: digest(f"btcv-clean:{case}"))
    for fold in range(5):
        protocol = PROTOCOLS[f"btcv-clean-{fold}"]
        test = draw[6 * fold : 6 * fold + 6]
        rest = [case for case in everyone if case not in test]
        assert protocol.test == tuple(sorted(test))
        assert protocol.train == tuple(sorted(rest, key=lambda case: digest(f"btcv-clean-{fold}:{case}")))


def test_the_clean_lists_of_lits_are_the_draw_that_their_file_describes():
    strata: dict[tuple[bool, bool], list[str]] = {}
    for case in sorted((f"liver_{n:03d}" for n in range(131)), key=lambda case: digest(f"lits-clean:{case}")):
        strata.setdefault((case in WITHOUT_TUMOUR, case in IRCADB), []).append(case)
    test, places = [], []
    for stratum, number in {(True, True): 1, (True, False): 2, (False, True): 4, (False, False): 24}.items():
        test += strata[stratum][:number]
        rest = strata[stratum][number:]
        places += [((2 * j - 1) / (2 * len(rest)), digest(f"lits-clean:{c}"), c) for j, c in enumerate(rest, 1)]
    protocol = PROTOCOLS["lits-clean"]
    assert protocol.test == tuple(sorted(test))
    assert protocol.train == tuple(case for *_, case in sorted(places))


@pytest.mark.parametrize("number", [5, 10, 20, 50])
def test_every_beginning_of_the_clean_list_of_lits_has_its_share_of_tumours_and_origins(number):
    protocol = PROTOCOLS["lits-clean"]
    for kind in (WITHOUT_TUMOUR, IRCADB):
        share = sum(case in kind for case in protocol.train) / len(protocol.train)
        assert abs(sum(case in kind for case in protocol.train[:number]) - number * share) <= 1


def test_desco_labels_the_first_five_cases():
    assert PROTOCOLS["lits-desco"].train[:5] == ("liver_127", "liver_115", "liver_121", "liver_118", "liver_126")


def test_an_unknown_name_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(UsageError, match="did you mean la-literature") as caught:
        find_protocol("la-litrature")
    assert all(name in str(caught.value) for name in PROTOCOLS)


# ---------------------------------------------------------------------- cases


def test_the_first_cases_of_the_list_are_labelled_and_the_others_unlabelled(budget):
    assert budget(2) == ("lab_01", "lab_03")
    assert budget(3) == ("lab_00", "lab_01", "lab_03")


def test_only_published_sets_are_labelled_where_sets_are_not_nested(write_protocol, budget):
    write_protocol(labeled={"1": ["lab_00"], "2": ["lab_01", "lab_03"]})
    assert budget(1) == ("lab_00",)
    assert budget(2) == ("lab_01", "lab_03")
    with pytest.raises(SplitError, match="published for 1, 2 cases and not nested"):
        budget(3)


@pytest.mark.parametrize(
    ("labeled", "message"),
    [(0, "at least one"), (5, "only 4 training cases"), (4, "no label for unl_00"), (None, "no label for unl_00")],
)
def test_numbers_of_labelled_cases_that_the_protocol_does_not_have_are_refused(budget, labeled, message):
    with pytest.raises(SplitError, match=message):
        budget(labeled)


def test_a_number_that_nobody_published_is_named(budget, caplog):
    budget(3)
    assert "--labeled 3: published numbers of labelled cases are 2." in caplog.text


def test_without_a_number_every_training_case_is_labelled(write_protocol, budget):
    write_protocol(train=["lab_03", "lab_01"])
    assert budget() == ("lab_01", "lab_03")


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_missing_cases_are_refused_by_name(tiny, write_protocol, part):
    write_protocol(**{part: [*TINY[part], *(f"gone_{index}" for index in range(7))]})
    with pytest.raises(DatasetError, match="lacks 7 of the cases of tiny-literature: gone_0") as caught:
        apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))
    assert "gone_4 and 2 more" in str(caught.value)
    assert "lgssl_convert_dataset Tiny" in str(caught.value)


def test_a_training_case_in_images_ts_is_missing(tiny, write_protocol):
    write_protocol(train=["lab_00", "test_00"], test=[])
    with pytest.raises(DatasetError, match="lacks 1 of the cases of tiny-literature: test_00"):
        apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))


def test_withdrawn_cases_may_be_missing(tiny, write_protocol, caplog):
    withdrawn = {"gone_0": "withdrawn", "gone_1": "withdrawn"}
    write_protocol(train=["lab_03", "gone_0", "lab_01"], test=["gone_1", "lab_02"], withdrawn=withdrawn)
    cases = apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))
    assert cases.train == ("lab_03", "lab_01")
    assert cases.dataset.test == ("lab_02",)
    assert "gone_0 is not there and is skipped (withdrawn)" in caplog.text


def test_withdrawn_cases_that_are_there_are_used(tiny, write_protocol):
    write_protocol(train=["lab_03", "lab_01"], withdrawn={"lab_01": "withdrawn"})
    cases = apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))
    assert cases.train == ("lab_03", "lab_01")


def test_left_out_cases_are_used_nowhere(tiny, write_protocol, caplog):
    caplog.set_level("INFO")
    write_protocol(train=["lab_03"], left_out={"more_00": "a copy of lab_03"})
    used = apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901)).dataset
    assert list(used.cases) == ["lab_03"]
    assert "leaves out more_00: a copy of lab_03" in caplog.text


def test_unlisted_cases_are_left_out_and_named_except_in_images_un(tiny, caplog):
    caplog.set_level("INFO")
    cases = apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))
    assert list(cases.dataset.labeled) == ["lab_00", "lab_01", "lab_03"]
    assert list(cases.dataset.unlabeled) == ["more_00", "unl_00"]
    assert "does not mention 2 cases, left out: lab_04, unl_01" in caplog.text
    assert "1 cases of imagesUn are not of tiny-literature" in caplog.text
    assert "one thing leaks" in caplog.text


def test_a_test_case_in_images_un_is_not_unlabelled(tiny, write_protocol):
    write_protocol(test=["more_00"])
    cases = apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))
    assert "more_00" not in cases.dataset.cases
    assert cases.dataset.test == ("more_00",)


def test_all_of_images_ts_may_be_the_test_cases(tiny, write_protocol):
    write_protocol(test="imagesTs", num_test=1)
    cases = apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))
    assert cases.dataset.test == ("test_00",)


@pytest.mark.parametrize("number", [0, 2])
def test_another_number_of_cases_in_images_ts_is_refused(tiny, write_protocol, number):
    write_protocol(test="imagesTs", num_test=number)
    with pytest.raises(DatasetError, match=f"tests on the {number} cases of this folder and it holds 1"):
        apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))


def test_a_training_case_among_those_of_images_ts_is_refused(tiny, write_protocol):
    write_protocol(test="imagesTs", num_test=2)
    tiny.add("lab_00", labeled=False, folder="imagesTs")
    with pytest.raises(DatasetError, match="lab_00 would be test and training case"):
        apply_protocol(find_protocol("tiny-literature"), load_raw_dataset(901))


def test_a_protocol_of_another_dataset_is_refused_with_those_that_fit(tiny, write_protocol, monkeypatch):
    tiny_protocol = find_protocol("tiny-literature")
    monkeypatch.setattr(protocol_module, "load_protocols", lambda: PROTOCOLS | {"tiny-literature": tiny_protocol})
    with pytest.raises(UsageError, match="these fit it: tiny-literature"):
        apply_protocol(PROTOCOLS["la-literature"], load_raw_dataset(901))
    monkeypatch.setattr(protocol_module, "load_protocols", lambda: PROTOCOLS)
    with pytest.raises(UsageError, match="no protocol fits it: leave --protocol out"):
        apply_protocol(PROTOCOLS["la-literature"], load_raw_dataset(901))


def test_a_list_of_ones_own_may_not_take_the_name_of_a_protocol(tiny, tmp_path):
    (tmp_path / "tiny-literature.txt").write_text("lab_00\n")
    with pytest.raises(UsageError, match="are those of --protocol; rename the file"):
        choose_budget(load_raw_dataset(901), labeled_list=tmp_path / "tiny-literature.txt")


@pytest.fixture
def official_download(data_root) -> Callable[[str], None]:
    """Empty files under the names of the official download of a dataset, as converted; no withdrawn cases."""

    def write(conversion: str) -> None:
        protocols = [protocol for protocol in PROTOCOLS.values() if protocol.conversion == conversion]
        folder = data_root / "nnUNet_raw" / "Dataset901_Official"
        cases = {case for protocol in protocols for case in (*protocol.train, *protocol.held_out)}
        cases -= {case for protocol in protocols for case in protocol.withdrawn}
        for part in ("imagesTr", "labelsTr", "imagesTs"):
            (folder / part).mkdir(parents=True)
        for case in cases:
            (folder / "imagesTr" / f"{case}_0000.nii.gz").touch()
            (folder / "labelsTr" / f"{case}.nii.gz").touch()
        for number in range(54 if conversion == "LA" else 0):
            (folder / "imagesTs" / f"code_{number}_0000.nii.gz").touch()
        content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"}
        (folder / "dataset.json").write_text(json.dumps(content))

    return write


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_and_its_budgets_fit_the_official_download(official_download, name):
    protocol = PROTOCOLS[name]
    official_download(protocol.conversion)
    cases = apply_protocol(protocol, load_raw_dataset(901))
    missing = len(set(protocol.withdrawn) & set(protocol.train))
    assert len(cases.dataset.labeled) == len(cases.train) == len(protocol.train) - missing
    assert set(cases.dataset.cases).isdisjoint([*cases.dataset.test, *cases.validation, *protocol.left_out])
    assert len(cases.dataset.test) == protocol.num_test - len(set(protocol.withdrawn) & set(protocol.test or ()))
    for number in protocol.budgets:
        assert len(protocol_budget(cases, number).labeled) == number


# ---------------------------------------------------------------------- planning


def poison(*files: Path) -> None:
    for file in files:
        assert file.exists()
        file.write_bytes(b"poison")


def test_held_out_cases_and_labels_outside_the_budget_are_never_opened(tiny, plan_tiny, data_root):
    held_out = ("lab_02", "lab_05", "lab_04")
    poison(*(tiny.image_file(case) for case in held_out), *(tiny.label_file(case) for case in held_out))
    poison(tiny.image_file("test_00", folder="imagesTs"), tiny.image_file("unl_01"), tiny.label_file("lab_00"))
    file = plan_tiny(protocol="tiny-literature", labeled=2)
    assert file.name == "LGSSLCPUPlans_labeled2_tiny-literature.json"
    block = json.loads(file.read_text())["lgssl"]
    assert block["split"] == {
        "labeled": ["lab_01", "lab_03"],
        "unlabeled": ["lab_00", "more_00", "unl_00"],
        "validation": ["lab_05"],
        "test": ["lab_02", "test_00"],
    }
    assert block["protocol"] == "tiny-literature"
    preprocessed = data_root / "nnUNet_preprocessed" / "Dataset901_Tiny"
    assert {path.name.split(".")[0].removesuffix("_seg") for path in preprocessed.rglob("*.b2nd")} == {
        "lab_00", "lab_01", "lab_03", "more_00", "unl_00",
    }  # fmt: skip
    assert [path.name for path in (preprocessed / "gt_segmentations").iterdir()] == ["lab_01.nii.gz", "lab_03.nii.gz"]
    made = json.loads((preprocessed / f"dataset_fingerprint_{file.stem}.json").read_text())
    assert len(made["spacings"]) == 5


def test_all_training_cases_without_a_number(tiny, write_protocol, plan_tiny):
    write_protocol(train=["lab_03", "lab_01", "lab_00"])
    file = plan_tiny(protocol="tiny-literature", preprocess=False)
    assert file.name == "LGSSLCPUPlans_tiny-literature.json"
    assert json.loads(file.read_text())["lgssl"]["split"]["labeled"] == ["lab_00", "lab_01", "lab_03"]


def test_a_protocol_adds_its_name_and_otherwise_plans_as_a_list_of_the_same_cases(
    raw_dataset, write_protocol, plan_tiny, tmp_path
):
    raw_dataset(labeled=3, unlabeled=1, in_images_un=0, test=1)
    (tmp_path / "own.txt").write_text("lab_00\nlab_02\n")
    write_protocol(train=["lab_02", "lab_00", "lab_01", "unl_00"], validation=[], test=["test_00"])
    options = {"overwrite_plans_name": "P", "preprocess": False}
    own = json.loads(plan_tiny(labeled_list=tmp_path / "own.txt", **options).read_text())
    published = json.loads(plan_tiny(protocol="tiny-literature", labeled=2, **options).read_text())
    assert published["lgssl"].pop("protocol") == "tiny-literature"
    assert published == own
    assert list(own["configurations"]) == ["2d", "3d_fullres"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labeled_list": "list.txt"}, "--protocol and --labeled_list exclude each other"),
        ({"seed": 3}, "leave out --seed 3"),
        ({"protocol": "tiny"}, "did you mean tiny-literature"),
    ],
)
def test_what_does_not_go_with_a_protocol_is_refused_before_the_dataset_is_looked_for(
    data_root, write_protocol, plan_tiny, options, message
):
    with pytest.raises(UsageError, match=message):
        plan_tiny(**{"protocol": "tiny-literature", **options})


# ---------------------------------------------------------------------- the published patch size


def test_left_atrium_gets_the_published_patch_and_a_network_that_runs_on_it(configurations, stock_network):
    from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

    planned = configurations("la-literature", (88, 576, 576), (0.625, 0.625, 0.625))
    literature, fullres = planned["3d_literature"], planned["3d_fullres"]
    assert literature["patch_size"] == [80, 112, 112]
    assert literature["batch_size"] == 2
    network = literature["architecture"]["arch_kwargs"]
    assert network["strides"] == [[1, 1, 1]] + [[2, 2, 2]] * 4
    assert network["features_per_stage"] == [8, 16, 32, 64, 128]
    same = set(fullres) - {"patch_size", "batch_size", "architecture"}
    assert {key: literature[key] for key in same} == {key: fullres[key] for key in same}
    network |= {"features_per_stage": [2] * 5, "n_conv_per_stage": [1] * 5, "n_conv_per_stage_decoder": [1] * 4}
    with torch.no_grad():
        built = stock_network(ConfigurationManager(literature), classes=2, deep_supervision=False)
        assert built(torch.zeros(1, 1, 80, 112, 112)).shape == (1, 2, 80, 112, 112)


@pytest.mark.parametrize(
    ("name", "spacing", "patch_size"),
    [
        ("pancreas-coranet", (1.0, 0.8, 0.8), [96, 96, 96]),
        ("btcv-literature", (3.0, 0.76, 0.76), [64, 128, 128]),
        ("lits-literature", (1.0, 0.77, 0.77), [32, 160, 160]),
        ("lits-desco", (1.0, 0.77, 0.77), [64, 176, 176]),
        ("lits-desco", (0.77, 0.77, 3.0), [176, 64, 176]),  # the third axis comes first in nnU-Net's arrays
    ],
)
@pytest.mark.parametrize("planner", [LGSSLPlannerCPU, LGSSLPlannerResEncM])
def test_published_patches_are_kept_exactly(configurations, name, spacing, patch_size, planner):
    literature = configurations(name, (200, 400, 400), spacing, planner)["3d_literature"]
    assert literature["patch_size"] == patch_size
    network = literature["architecture"]["arch_kwargs"]
    shrunk = torch.tensor(network["strides"]).prod(0)
    assert not any(length % int(factor) for length, factor in zip(patch_size, shrunk, strict=True))
    stages = network["n_stages"]
    assert stages >= 5
    blocks = "n_blocks_per_stage" if planner is LGSSLPlannerResEncM else "n_conv_per_stage"
    per_stage = (network["strides"], network["kernel_sizes"], network["features_per_stage"], network[blocks])
    assert {len(entry) for entry in per_stage} == {stages}
    assert len(network["n_conv_per_stage_decoder"]) == stages - 1


def test_without_a_published_patch_or_a_3d_configuration_there_is_no_extra_one(configurations, caplog):
    caplog.set_level("INFO")
    assert "3d_literature" not in configurations("lits-clean", (60, 60, 60), (1.0, 1.0, 1.0))
    assert "publications do not agree on a patch size" in caplog.text
    assert list(configurations("la-literature", (1, 60, 60), (1.0, 1.0, 1.0))) == ["2d"]
    assert "the plans have no 3d_fullres" in caplog.text


@pytest.mark.parametrize("preprocessed_as", ["3d_fullres", "3d_literature"])
def test_the_extra_configuration_trains_on_the_cases_of_3d_fullres(
    tiny, write_protocol, plan_tiny, monkeypatch, preprocessed_as
):
    from lgssl_nnunet.trainers.base import SemiSupervisedTrainer
    from lgssl_nnunet.training import train

    def step(trainer) -> None:
        trainer.initialize()
        with torch.no_grad():
            assert trainer.network(torch.zeros(1, 1, 16, 24, 16))[0].shape == (1, 3, 16, 24, 16)

    monkeypatch.setattr(SemiSupervisedTrainer, "run_training", step)
    write_protocol(patch_size=[16, 24, 16], batch_size=3, validation=[])
    plans = json.loads(plan_tiny(protocol="tiny-literature", labeled=2, configurations=(preprocessed_as,)).read_text())
    assert plans["configurations"]["3d_literature"]["batch_size"] == 3
    folder = train(901, "3d_literature", "SupervisedTrainer", device="cpu", progress=False)
    assert folder.name == "SupervisedTrainer__LGSSLCPUPlans_labeled2_tiny-literature__3d_literature"
