"""DeSCO by the numbers of its section, in dense mode and on two slices per case."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from torch import nn

from lgssl_nnunet.engine.batches import LabeledBatch, Term, finest
from lgssl_nnunet.engine.schedules import slice_trust
from lgssl_nnunet.engine.seeding import seed_everything
from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.plans import propagation
from lgssl_nnunet.plans.sparse_annotation import sparse_annotation
from lgssl_nnunet.registry import trainer_names

NAME = "DeSCOTrainer"
FOLDER = "LGSSLCPUPlans_3d_fullres"


@pytest.fixture
def start(started):
    return lambda **values: started(NAME, training={"seed": 0, "hyperparameters": values})


@pytest.fixture(scope="module")
def two_slices(tiny_dataset, tmp_path_factory):
    """The phantom with two slices per case, propagated without moving them; not to be changed."""
    dataset = tiny_dataset().copied_to(tmp_path_factory.mktemp("two_slices"))
    with dataset.environment(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(propagation.REGISTRATIONS, "simpleitk", lambda fixed, moving, label, spacing: label)
        file = sparse_annotation(dataset.name, num_processes=0, progress=False)
    return type(dataset)(dataset.root, file)


@pytest.fixture
def start_sparse(started, two_slices):
    def run(dataset=two_slices, epochs=2, **values):
        return started(NAME, dataset=dataset, epochs=epochs, training={"seed": 0, "hyperparameters": values})

    return run


@pytest.fixture
def own_copy(two_slices, tmp_path):
    """The same dataset, of which a test may damage files."""
    return two_slices.copied_to(tmp_path)


def batches(trainer):
    return trainer.to_batches(next(trainer.dataloader_train))


def terms(trainer, given=None) -> dict[str, Term]:
    given = given or batches(trainer)
    seed_everything(0)
    return trainer.loss_terms(*given)


def touched(loss, network) -> set[str]:
    """The parameters that a loss has a gradient for."""
    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(names, found, strict=True) if gradient is not None and gradient.any()}


class Fixed(nn.Module):
    """A network with one answer, which remembers what it was shown."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits).float())
        self.seen = []

    def forward(self, image):
        self.seen.append((image.clone(), torch.is_grad_enabled()))
        return [self.logits.expand(len(image), *self.logits.shape[1:])]


# ------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("ramp", [0.0, 0.25, 1.0])
def test_the_weights_of_labels_and_pseudo_labels_add_up_to_one(ramp, start, monkeypatch):
    trainer, asked = start(pseudo_weight=0.4, ramp_fraction=0.3), []
    monkeypatch.setattr(trainer, "ramp", lambda fraction=1.0: asked.append(fraction) or ramp)
    found = {name: term.weight for name, term in terms(trainer).items()}
    pseudo = pytest.approx(0.4 * ramp)
    rest = pytest.approx(1 - 0.4 * ramp)
    assert found == {"supervised": rest, "supervised second": rest, "pseudo": pseudo, "pseudo second": pseudo}
    assert asked[0] == 0.3


def test_with_a_weight_of_one_labels_have_no_gradient(start):
    trainer = start(pseudo_weight=1.0, ramp_fraction=0.0, first_threshold=1.0)
    found = terms(trainer)
    assert found["supervised"].weight == found["supervised second"].weight == 0
    silent = {
        name: Term(term.value if "pseudo" in name else term.value * 0, term.weight) for name, term in found.items()
    }
    for network in (trainer.network, trainer.second):
        parameters = list(network.parameters())
        total, alone = (
            torch.autograd.grad(trainer.total(t), parameters, retain_graph=True, allow_unused=True)
            for t in (found, silent)
        )
        for a, b in zip(total, alone, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pseudo_weight", 1.5),
        ("ramp_fraction", -0.1),
        ("noise", -1.0),
        ("dropout", 1.0),
        ("passes", 0),
        ("first_threshold", 1.1),
        ("last_threshold", -0.1),
        ("trust", 1.1),
        ("trust_stages", 0),
    ],
)
def test_values_outside_their_range_are_refused_by_name(name, value, build):
    with pytest.raises(UsageError, match=name):
        build(NAME, training={"seed": 0, "hyperparameters": {name: value}})


# ------------------------------------------------------------------------------------------------- own patches


def shown_to(network) -> list[torch.Tensor]:
    shown = []
    network.register_forward_pre_hook(lambda _, arguments: shown.append(arguments[0].detach().clone()))
    return shown


def test_the_networks_take_the_rows_in_turns_and_swap_them_in_every_iteration(start):
    trainer = start(passes=1, noise=0.0)
    labeled, unlabeled = given = batches(trainer)
    first, second = shown_to(trainer.network), shown_to(trainer.second)
    for iteration in (0, 1, 2):
        trainer.iteration = iteration
        first.clear(), second.clear()
        trainer.loss_terms(*given)
        own, others = iteration % 2, 1 - iteration % 2
        expected = {
            "first": [labeled.image[own], unlabeled.strong[own], *[unlabeled.strong[others]] * 2],
            "second": [labeled.image[others], unlabeled.strong[others], *[unlabeled.strong[own]] * 2],
        }
        for shown, wanted in ((first, expected["first"]), (second, expected["second"])):
            assert [image.shape[0] for image in shown] == [2, 1, 1]  # own patches together, a clean pass, a noisy one
            assert torch.equal(torch.cat(shown), torch.stack(wanted))


def test_with_one_patch_both_networks_take_it(started):
    trainer = started(NAME, training={"seed": 0, "unlabeled_batch_size": 1, "hyperparameters": {"passes": 1}})
    given = batches(trainer)
    first, second = shown_to(trainer.network), shown_to(trainer.second)
    trainer.loss_terms(*given)
    assert torch.equal(first[0][1:], given[1].strong)
    assert torch.equal(second[0][1:], given[1].strong)
    assert len(first[0]) == 2


@pytest.mark.parametrize("sparse", [False, True])
def test_each_loss_trains_its_own_network_only(sparse, start, start_sparse):
    trainer = (start_sparse if sparse else start)(first_threshold=1.0)
    found = terms(trainer)
    for name, term in found.items():
        own, other = trainer.network, trainer.second
        if name.endswith("second"):
            own, other = other, own
        assert touched(term.value, own)
        assert not touched(term.value, other)


def test_the_second_network_starts_from_weights_of_its_own_and_is_kept_in_the_checkpoint(start, tmp_path):
    trainer = start()
    pairs = zip(trainer.network.parameters(), trainer.second.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    trainer.save_checkpoint(tmp_path / "checkpoint.pth")
    stored = torch.load(tmp_path / "checkpoint.pth", weights_only=False)
    assert stored["lgssl"]["second_network"].keys() == trainer.second.state_dict().keys()


# ----------------------------------------------------------------------------------------------- pseudo-labels


def test_pseudo_labels_are_the_others_classes_where_its_mean_prediction_is_certain(start, monkeypatch):
    """Three classes, two voxels on either side of the threshold, by hand."""
    trainer = start()
    monkeypatch.setattr(trainer, "ramp", lambda fraction=1.0: 0.2)
    threshold = (0.75 + 0.25 * 0.2) * math.log(3)
    p = np.array([[0.90, 0.05, 0.05], [0.70, 0.20, 0.10], [0.72, 0.14, 0.14], [0.5, 0.3, 0.2], [0.1, 0.15, 0.75]])
    entropy = -(p * np.log(p)).sum(axis=1)
    certain = entropy < threshold
    assert list(certain) == [True, True, True, False, True]
    student = np.array([[1.0, 0.0, -1.0]] * 5)
    log_q = student - np.log(np.exp(student).sum(axis=1, keepdims=True))
    expected = -np.mean(log_q[np.arange(5), p.argmax(axis=1)][certain])
    teacher = Fixed(np.log(p).T.reshape(1, 3, 5, 1, 1))
    outputs = torch.as_tensor(student.T.reshape(1, 3, 5, 1, 1), dtype=torch.float32)
    found = trainer._learn_from(teacher, outputs, torch.zeros(1, 1, 5, 1, 1))
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("ramp", "share"), [(0.0, 0.6), (0.5, 0.7), (1.0, 0.8)])
def test_the_threshold_moves_from_the_first_to_the_last_share_of_the_maximal_entropy(ramp, share, start, monkeypatch):
    trainer = start(first_threshold=0.6, last_threshold=0.8)
    monkeypatch.setattr(trainer, "ramp", lambda fraction=1.0: ramp)
    logits = torch.zeros(1, 3, 1, 1, 400)
    logits[:, 0] = torch.linspace(0, 6, 400)
    p = logits.softmax(dim=1)
    certain = -(p * p.log()).sum(dim=1) < share * math.log(3)
    outputs = torch.zeros_like(logits, requires_grad=True)
    trainer._learn_from(Fixed(logits), outputs, torch.zeros(1, 1, 1, 1, 400)).backward()
    assert torch.equal(outputs.grad.abs().sum(dim=1) > 0, certain)


def test_the_label_comes_from_one_clean_pass_and_the_certainty_from_noisy_ones(start):
    trainer = start(passes=5, noise=0.3)
    image = torch.randn(1, 1, 4, 4, 4)
    logits = torch.randn(1, 3, 4, 4, 4)
    teacher = Fixed(logits)
    trainer._learn_from(teacher, logits, image)
    assert torch.equal(teacher.seen[0][0], image)
    assert not any(grad for _, grad in teacher.seen)
    noise = torch.cat([shown - image for shown, _ in teacher.seen[1:]])
    assert noise.abs().max() <= 0.6 + 1e-6
    assert len(noise.reshape(5, -1).unique(dim=0)) == 5


def test_passes_without_noise_differ_by_dropout(start):
    image = torch.randn(1, 1, 20, 24, 24)
    for dropout, differ in ((0.5, True), (0.0, False)):
        trainer = start(dropout=dropout)
        with torch.no_grad():
            once, again = (finest(trainer.second(image)) for _ in range(2))
        assert torch.equal(once, again) != differ


def test_where_nothing_is_certain_the_term_is_zero(start):
    trainer = start(first_threshold=0.0)
    value = terms(trainer)["pseudo"].value
    assert float(value.detach()) == 0
    assert not touched(value, trainer.network)


# --------------------------------------------------------------------------------------------------------- modes


def log_of(trainer) -> str:
    return "".join(file.read_text() for file in Path(trainer.output_folder).glob("training_log*.txt"))


def test_the_log_says_which_mode_a_run_is_in(start, start_sparse):
    assert "DeSCO trains in dense mode" in log_of(start())
    assert "DeSCO trains in sparse mode" in log_of(start_sparse())


@pytest.mark.parametrize("name", [name for name in trainer_names() if name != NAME])
def test_other_methods_refuse_plans_of_two_slices(name, build, two_slices, tmp_path):
    with pytest.raises(PlansError, match=r"train DeSCOTrainer, or name LGSSLCPUPlans with -p"):
        build(name, dataset=two_slices, results=tmp_path)
    assert not list(tmp_path.iterdir())


def test_in_dense_mode_the_loss_on_labels_is_nnunets(start):
    trainer = start(dropout=0.0)
    labeled, unlabeled = batches(trainer)
    found = terms(trainer, (labeled, unlabeled))
    target = [scale[0:1] for scale in labeled.target]
    expected = trainer.supervised_loss(trainer.network(labeled.image[0:1]), target)
    torch.testing.assert_close(found["supervised"].value, expected)


def test_a_run_on_two_slices_trains_to_the_end(build, two_slices):
    trainer = build(NAME, dataset=two_slices)
    trainer.run_training()
    assert len(trainer.term_log.rows) == 2
    assert all(math.isfinite(value) for row in trainer.term_log.rows for value in row.values())


def test_resuming_on_two_slices_ends_as_an_uninterrupted_run_to_the_bit(check_resuming, two_slices):
    check_resuming(NAME, dataset=two_slices, iterations=1, training={"seed": 0, "hyperparameters": {"passes": 2}})


# --------------------------------------------------------------------------------------- two slices: the batches


def test_every_scale_has_two_labels_and_two_distances_and_padding_counts_as_none(start_sparse):
    trainer = start_sparse()
    loader = trainer.dataloader_train.data_loader.loaders["labeled"]
    assert any(need for need in loader.need_to_pad)
    zero = 0
    for _ in range(4):
        labeled, _ = batches(trainer)
        assert all(scale.shape[1] == 4 for scale in labeled.target)
        assert finest(labeled.target).dtype == torch.int16
        labels, steps = finest(labeled.target)[:, :2], finest(labeled.target)[:, 2:]
        assert set(labels.unique().tolist()) <= {0, 1, 2}
        assert steps.min() >= 0
        padding = steps[:, 0] == 0
        assert torch.equal(padding, steps[:, 1] == 0)
        assert not labels[:, 0][padding].any()
        zero += int(padding.sum())
    assert zero > 0


def test_patches_with_forced_foreground_are_centred_on_the_slices(start_sparse):
    trainer = start_sparse()
    data = trainer.dataloader_train.data_loader.loaders["labeled"]._data
    _, annotation, _, properties = data.load_case("labeled_000")
    steps = annotation[2:]
    for label, places in properties["class_locations"].items():
        assert len(places)
        for _, *place in places:
            assert annotation[(0, *place)] == label
            assert 1 in steps[(slice(None), *place)]


def test_validation_has_whole_labels(start_sparse):
    assert finest(next(start_sparse().dataloader_val)["target"]).shape[1] == 1


def test_whole_labels_are_not_used_in_training(start_sparse, own_copy, same):
    """Neither the label maps nor the places of the classes in them."""
    expected = next(start_sparse().dataloader_train)
    for case in own_copy.plans()["lgssl"]["split"]["labeled"]:
        folder = own_copy.preprocessed / FOLDER
        (folder / f"{case}_seg.b2nd").write_bytes(b"no label")
        properties = load_pickle(str(folder / f"{case}.pkl"))
        write_pickle({**properties, "class_locations": {1: np.array([[0, 0, 0, 0]])}}, str(folder / f"{case}.pkl"))
        (own_copy.preprocessed / "gt_segmentations" / f"{case}.nii.gz").unlink()
    trainer = start_sparse(dataset=own_copy)
    assert same(next(trainer.dataloader_train), expected)
    trainer.train_step(next(trainer.dataloader_train))


def test_a_missing_annotation_is_an_error_and_no_reason_to_read_the_whole_label(start_sparse, own_copy):
    trainer = start_sparse(dataset=own_copy)
    for file in (own_copy.preprocessed / f"{FOLDER}_orthogonal").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError):
        next(trainer.dataloader_train)


# ------------------------------------------------------------------------------------------ two slices: the loss


def test_the_trust_in_propagated_labels_follows_the_published_table():
    table = [slice_trust(iteration, 6000, 0.95, 6) for iteration in range(0, 6000, 1000)]
    assert table == pytest.approx([0.95, 0.9455, 0.7612, 0.5, 0.2730, 0.0737], abs=5e-5)
    assert [slice_trust(1000 * stage + 999, 6000, 0.95, 6) for stage in range(6)] == table
    for length in (6, 102, 250_000):
        assert [slice_trust(-(-stage * length // 6), length, 0.95, 6) for stage in range(6)] == table
    assert [slice_trust(step, 4, 0.8, 2) for step in range(4)] == [0.8, 0.8, 0.5, 0.5]


def annotated(trainer, steps=None) -> LabeledBatch:
    """A labelled batch with random label maps and distances."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (2, 2, 8, 8, 8), generator=generator)
    if steps is None:
        steps = torch.randint(1, 6, (2, 2, 8, 8, 8), generator=generator)
    return torch.cat([labels, steps.expand(2, 2, 8, 8, 8)], dim=1).to(torch.int16)


def by_hand(logits, label, weight) -> float:
    """Weighted cross-entropy and Dice of a batch in numpy."""
    logits, label, weight = (array.detach().double().numpy() for array in (logits, label, weight))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = np.stack([label == value for value in range(3)], axis=1)
    cross_entropy = (weight * -np.log((p * target).sum(axis=1))).sum() / weight.sum()
    axes, w = (2, 3, 4), weight[:, None]
    dice = (2 * (w * p * target).sum(axes) + 1e-5) / ((w * p).sum(axes) + (w * target).sum(axes) + 1e-5)
    return cross_entropy + 1 - dice[:, 1:].mean()


@pytest.mark.parametrize("turn", [0, 1])
def test_each_network_learns_its_own_label_map_with_trust_to_the_power_of_the_distance(turn, start_sparse):
    trainer = start_sparse(trust=0.7)
    target, logits = annotated(trainer), torch.randn(2, 3, 8, 8, 8)
    expected = by_hand(logits, target[:, turn], 0.7 ** (target[:, 2 + turn].float() - 1))
    assert float(trainer._sparse_loss(logits, target, turn)) == pytest.approx(expected, rel=1e-5)
    other = target.clone()
    other[:, [1 - turn, 3 - turn]] = 2
    assert torch.equal(trainer._sparse_loss(logits, other, turn), trainer._sparse_loss(logits, target, turn))


def test_equal_weights_are_the_plain_loss_and_a_constant_factor_changes_nothing(start_sparse):
    trainer = start_sparse(trust=0.5)
    logits = torch.randn(2, 3, 8, 8, 8)
    near, far = (annotated(trainer, torch.tensor(steps)) for steps in (1, 4))
    expected = by_hand(logits, near[:, 0], torch.ones(2, 8, 8, 8))
    for target in (near, far):
        assert float(trainer._sparse_loss(logits, target, 0)) == pytest.approx(expected, rel=1e-4)


def test_without_trust_only_the_true_slices_have_a_gradient(start_sparse):
    trainer = start_sparse(trust=0.0)
    target, logits = annotated(trainer), torch.randn(2, 3, 8, 8, 8, requires_grad=True)
    trainer._sparse_loss(logits, target, 0).backward()
    assert torch.equal(logits.grad.abs().sum(dim=1) > 0, target[:, 2] == 1)


def test_padding_has_no_gradient_however_great_the_trust(start_sparse):
    trainer = start_sparse(trust=1.0)
    target, logits = annotated(trainer), torch.randn(2, 3, 8, 8, 8, requires_grad=True)
    target[:, 2:, :3] = 0
    trainer._sparse_loss(logits, target, 0).backward()
    assert torch.equal(logits.grad.abs().sum(dim=1) > 0, target[:, 2] > 0)


def test_every_scale_is_supervised_as_nnunet_weights_them(start_sparse):
    trainer = start_sparse()
    labeled, _ = batches(trainer)
    outputs = [scale.detach().requires_grad_() for scale in trainer.network(labeled.image)]
    trainer._sparse_loss(outputs, labeled.target, 0).backward()
    assert [scale.grad is not None for scale in outputs] == [bool(w) for w in trainer.loss.weight_factors]


@pytest.mark.parametrize(
    ("values", "progress"), [({"trust": 0.5}, 0.0), ({"trust_stages": 2}, 0.25), ({"trust_stages": 10}, 0.95)]
)
def test_the_hyperparameters_of_the_sparse_mode_have_an_effect(values, progress, start_sparse):
    losses = []
    for given in ({}, values):
        trainer = start_sparse(epochs=50, **given)
        trainer.iteration = int(progress * trainer.num_iterations)
        losses.append(float(trainer._sparse_loss(torch.ones(2, 3, 8, 8, 8).cumsum(1), annotated(trainer), 0)))
    assert losses[0] != losses[1]


def test_the_sparse_terms_of_a_step_are_these_losses(start_sparse):
    trainer = start_sparse(dropout=0.0)
    labeled, unlabeled = batches(trainer)
    found = terms(trainer, (labeled, unlabeled))
    for turn, (name, network) in enumerate(
        {"supervised": trainer.network, "supervised second": trainer.second}.items()
    ):
        own = slice(turn, turn + 1)
        expected = trainer._sparse_loss(network(labeled.image[own]), [scale[own] for scale in labeled.target], turn)
        torch.testing.assert_close(found[name].value, expected)
