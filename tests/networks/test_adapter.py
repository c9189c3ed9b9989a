from __future__ import annotations

import math

import pytest
import torch

from lgssl_nnunet.errors import PromptError, UsageError
from lgssl_nnunet.text.adapter import AttentionPrompts, FixedVolumePrompts, prompt_embeddings

CLASSES, WIDTH, CHANNELS = 3, 12, 8
SHAPES = [(2, 3, 4), (3, 4)]


def adapters(shape=(2, 3, 4), classes=CLASSES, stop_gradient=True):
    embeddings = prompt_embeddings("text", torch.randn(classes, WIDTH))
    return {
        "fixed_volume": FixedVolumePrompts(embeddings, CHANNELS, shape, stop_gradient=stop_gradient),
        "attention": AttentionPrompts(embeddings, CHANNELS, len(shape), stop_gradient=stop_gradient),
    }


MODES = list(adapters())


def test_text_keeps_directions_and_has_unit_root_mean_square():
    table = torch.randn(CLASSES, WIDTH) * torch.tensor([[0.1], [1.0], [30.0]])
    result = prompt_embeddings("text", table.tolist())
    torch.testing.assert_close(result.square().mean(1), torch.ones(CLASSES))
    torch.testing.assert_close(torch.cosine_similarity(result, table), torch.ones(CLASSES))


def test_random_prompts_are_the_same_each_time_and_know_nothing_of_the_text():
    first, second = torch.randn(CLASSES, WIDTH), torch.randn(CLASSES, WIDTH)
    assert torch.equal(prompt_embeddings("random", first, 3), prompt_embeddings("random", second, 3))
    assert not torch.equal(prompt_embeddings("random", first, 3), prompt_embeddings("random", first, 4))
    torch.testing.assert_close(
        prompt_embeddings("random", first, 3).norm(dim=1), prompt_embeddings("text", first).norm(dim=1)
    )


@pytest.mark.parametrize("classes", [2, 3, 14])
def test_shuffled_prompts_leave_no_class_its_own(classes):
    table = torch.randn(classes, WIDTH)
    text = prompt_embeddings("text", table)
    for seed in range(5):
        shuffled = prompt_embeddings("shuffled", table, seed)
        assert not (shuffled == text).all(1).any()
        assert torch.equal(shuffled.sum(1).sort().values, text.sum(1).sort().values)
        assert torch.equal(shuffled, prompt_embeddings("shuffled", table, seed))


def test_drawing_controls_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    prompt_embeddings("random", torch.ones(2, 4))
    assert torch.equal(before, torch.get_rng_state())


def test_one_class_cannot_be_shuffled():
    with pytest.raises(UsageError, match="at least two"):
        prompt_embeddings("shuffled", torch.ones(1, WIDTH))
    assert prompt_embeddings("random", torch.ones(1, WIDTH)).shape == (1, WIDTH)


def test_unknown_sources_and_unusable_tables_are_refused():
    with pytest.raises(UsageError, match="choose one of"):
        prompt_embeddings("words", torch.ones(2, 4))
    for table in (torch.zeros(2, 4), torch.full((2, 4), math.nan), torch.ones(4)):
        with pytest.raises(PromptError, match="plan again"):
            prompt_embeddings("text", table)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_fixed_volume_is_the_published_formula_voxel_by_voxel(shape):
    adapter = adapters(shape)["fixed_volume"]
    tau = adapter(torch.randn(2, CHANNELS, *shape))
    feature = (adapter.embeddings + adapter.learnable) @ adapter.project.weight.T
    assert feature.shape == (CLASSES, math.prod(shape))
    linear, norm, _ = adapter.tokens
    for number, position in enumerate(torch.cartesian_prod(*[torch.arange(size) for size in shape])):
        hidden = linear.weight @ feature[:, number] + linear.bias
        hidden = (hidden - hidden.mean()) / torch.sqrt(hidden.var(unbiased=False) + norm.eps)
        expected = torch.where(hidden > 0, hidden, 0.01 * hidden)
        for row in tau:
            torch.testing.assert_close(row[(slice(None), *position)], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_its_formula_voxel_by_voxel(shape):
    adapter = adapters(shape)["attention"]
    v = torch.randn(2, CHANNELS, *shape)
    tau = adapter(v)
    classes = (adapter.embeddings + adapter.learnable) @ adapter.project.weight.T
    query = adapter.query.weight.flatten(1)
    for row in range(2):
        for position in torch.cartesian_prod(*[torch.arange(size) for size in shape]):
            place = (slice(None), *position)
            scores = torch.stack(
                [(query @ v[row][place]) @ (adapter.key.weight @ vector) / CHANNELS**0.5 for vector in classes]
            )
            expected = sum(
                alpha * (adapter.value.weight @ vector)
                for alpha, vector in zip(scores.softmax(0), classes, strict=True)
            )
            torch.testing.assert_close(tau[row][place], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labeled_rows", [0, 1, 2])
def test_the_stop_gradient_changes_no_value(mode, labeled_rows):
    adapter, v = adapters()[mode], torch.randn(2, CHANNELS, 2, 3, 4)
    assert torch.equal(adapter(v, labeled_rows), adapter(v))


@pytest.mark.parametrize("mode", MODES)
def test_only_labelled_rows_train_the_prompt_feature(mode):
    adapter, v = adapters()[mode], torch.randn(3, CHANNELS, 2, 3, 4)
    prompt_feature = {"learnable", "project.weight"}

    def trained_by(rows):
        adapter.zero_grad(set_to_none=True)
        (adapter(v, 1)[rows] * torch.randn_like(v[rows])).sum().backward()
        return {name for name, p in adapter.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    everything = {name for name, _ in adapter.named_parameters()}
    assert trained_by(slice(1, 3)) == everything - prompt_feature
    assert trained_by(slice(0, 1)) == everything


@pytest.mark.parametrize("mode", MODES)
def test_with_the_stop_gradient_off_unlabelled_rows_train_everything(mode):
    adapter, v = adapters(stop_gradient=False)[mode], torch.randn(2, CHANNELS, 2, 3, 4)
    (adapter(v, 1)[1:] * torch.randn_like(v[1:])).sum().backward()
    assert adapter.learnable.grad.abs().max() > 0
    assert adapter.project.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("labeled_rows", [-1, 3])
def test_more_labelled_rows_than_images_are_refused(mode, labeled_rows):
    with pytest.raises(ValueError, match="batch size 2"):
        adapters()[mode](torch.randn(2, CHANNELS, 2, 3, 4), labeled_rows)


@pytest.mark.parametrize(("trained", "other"), [((4, 4, 4), (6, 4, 8)), ((4, 4), (6, 10))])
def test_the_fixed_volume_is_interpolated_at_another_size_and_untouched_at_its_own(trained, other):
    adapter = adapters(trained)["fixed_volume"]
    with torch.no_grad():
        # One class rises linearly along the first axis, so the interpolated feature is known away from the border.
        ramp = torch.arange(trained[0], dtype=torch.float32).reshape(-1, *[1] * (len(trained) - 1)).expand(trained)
        adapter.learnable.zero_()
        adapter.embeddings.zero_()[:, 0] = 1
        adapter.project.weight.zero_()[:, 0] = ramp.flatten()
    adapter.tokens = torch.nn.Identity()
    own = adapter(torch.zeros(1, CHANNELS, *trained))
    assert torch.equal(own[0, 0], ramp)
    resized = adapter(torch.zeros(1, CHANNELS, *other))
    assert resized.shape == (1, CLASSES, *other)
    positions = (torch.arange(other[0]) + 0.5) * trained[0] / other[0] - 0.5
    profile = resized[0, 0].flatten(1).mean(1)
    torch.testing.assert_close(profile, positions.clamp(0, trained[0] - 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_attention_takes_any_size_and_moves_with_the_image(shape):
    adapter = adapters(shape)["attention"]
    v = torch.randn(1, CHANNELS, *[size + 3 for size in shape])
    tau = adapter(v)
    crop = (slice(None), slice(None), *[slice(1, 1 + size) for size in shape])
    torch.testing.assert_close(adapter(v[crop]), tau[crop])
    torch.testing.assert_close(adapter(v.flip(2)), tau.flip(2))


def test_attention_does_not_depend_on_the_order_of_the_classes():
    adapter, v = adapters()["attention"], torch.randn(2, CHANNELS, 2, 3, 4)
    tau = adapter(v)
    with torch.no_grad():
        adapter.embeddings.copy_(adapter.embeddings.roll(1, 0))
        adapter.learnable.copy_(adapter.learnable.roll(1, 0))
    torch.testing.assert_close(adapter(v), tau)


def test_a_single_region_still_tells_positions_apart():
    for mode, adapter in adapters(classes=1).items():
        tau = adapter(torch.randn(1, CHANNELS, 2, 3, 4))
        assert tau.flatten(2).std(2).max() > 1e-4, mode


@pytest.mark.parametrize("mode", MODES)
def test_the_embeddings_are_saved_but_not_trained(mode):
    adapter = adapters()[mode]
    assert "embeddings" in adapter.state_dict()
    assert "embeddings" not in dict(adapter.named_parameters())
    assert adapter.learnable.shape == (CLASSES, WIDTH)
    assert adapter.learnable.std() < 0.02


def test_regions_have_weights_of_their_own_and_none_where_none_applies():
    torch.manual_seed(0)
    adapter = AttentionPrompts(torch.randn(2, WIDTH), CHANNELS, 3, exclusive=False)
    inside = torch.randn(CHANNELS)
    v = torch.stack([inside, -inside]).T[None, :, None, None]
    target = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # both regions, then neither
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(100):
        _, logits = adapter.attend(v)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[0, :, 0, 0], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    tau = adapter(v)[0, :, 0, 0]
    assert loss < 0.01
    assert tau[:, 1].norm() < 0.05 * tau[:, 0].norm()
