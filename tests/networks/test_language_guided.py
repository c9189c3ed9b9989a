from __future__ import annotations

import copy

import pytest
import torch

from lgssl_nnunet.errors import PlansError, UsageError
from lgssl_nnunet.networks.language_guided import LanguageGuidedUNet, build_language_guided_unet, feature_shape

CLASSES = 3
GUIDED = ["fixed_volume", "attention"]
MODES = [*GUIDED, "none"]


@pytest.fixture
def build(make_plans):
    def build(configuration_manager, deep_supervision=False, plans=None, classes=CLASSES, **options):
        plans = plans or make_plans(classes)
        return build_language_guided_unet(plans, configuration_manager, 2, classes, deep_supervision, **options)

    return build


def images(configuration_manager, batch=2):
    return torch.randn(batch, 2, *configuration_manager.patch_size)


def open_gate(network):
    """Let the prompts through, which a fresh residual gate does not."""
    if network.fusion is not None and network.fusion.gamma is not None:
        torch.nn.init.constant_(network.fusion.gamma, 0.5)
    return network


@pytest.mark.parametrize("mode", MODES)
def test_both_decoders_give_the_planned_shapes(build, configuration_manager, mode):
    network = build(configuration_manager, prompt_mode=mode)
    expected = (2, CLASSES, *configuration_manager.patch_size)
    first, second, _ = network(images(configuration_manager), labeled_rows=1)
    assert first.shape == second.shape == expected
    assert not torch.equal(first, second)
    assert network(images(configuration_manager)).shape == expected


def test_an_image_alone_is_predicted_by_the_first_decoder(build, configuration_manager):
    network, x = open_gate(build(configuration_manager)), images(configuration_manager)
    assert torch.equal(network(x), network(x, labeled_rows=1)[0])


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_or_by_the_mean_of_both(build, configuration_manager, deep_supervision):
    network = open_gate(build(configuration_manager, deep_supervision, prediction="mean"))
    x = images(configuration_manager)
    predicted, (first, second, _) = network(x), network(x, labeled_rows=1)
    if not deep_supervision:
        predicted, first, second = [predicted], [first], [second]
    for mean, one, other in zip(predicted, first, second, strict=True):
        torch.testing.assert_close(mean, 0.5 * one + 0.5 * other)


def test_the_control_without_meaning_is_drawn_under_the_training_seed(build, configuration_3d, make_plans):
    drawn = []
    for seed in (0, 0, 1):
        plans = make_plans(CLASSES)
        plans.plans["lgssl"]["training"] = {"seed": seed}
        drawn.append(build(configuration_3d, plans=plans, prompt_source="random").prompts.embeddings)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_deep_supervision_switches_on_both_decoders_or_on_one(build, configuration_3d):
    network, x = build(configuration_3d, deep_supervision=True), images(configuration_3d)
    first, second, _ = network(x, labeled_rows=1)
    assert [scale.shape for scale in first] == [scale.shape for scale in second]
    assert first[0].shape[2:] == (16, 16, 16)
    assert first[1].shape[2:] == (8, 8, 8)
    network.decoder.deep_supervision = False
    assert torch.is_tensor(network(x))
    network.set_deep_supervision(True)
    assert isinstance(network(x), list)
    network.set_deep_supervision(False)
    assert all(torch.is_tensor(output) for output in network(x, labeled_rows=2)[:2])


def test_the_bottleneck_has_the_computed_shape(build, configuration_manager):
    network, shape = build(configuration_manager, prompt_mode="fixed_volume"), feature_shape(configuration_manager)
    assert network.encoder(images(configuration_manager))[-1].shape[2:] == shape
    assert network.prompts.project.weight.shape[0] == torch.tensor(shape).prod()
    assert network.selection(images(configuration_manager)).shape == (2, 1, *shape)


@pytest.mark.parametrize("mode", MODES)
def test_it_starts_as_the_plain_network_bit_for_bit(build, stock_network, configuration_manager, mode):
    torch.manual_seed(5)
    plain = stock_network(configuration_manager, 2, CLASSES, deep_supervision=False)
    torch.manual_seed(5)
    network, x = build(configuration_manager, prompt_mode=mode), images(configuration_manager)
    assert torch.equal(network(x), plain(x))


@pytest.mark.parametrize("gate_start", [0.0, 1.0, None])
@pytest.mark.parametrize("mode", GUIDED)
def test_prompts_learn_from_labelled_rows_only_and_the_rest_from_all(build, configuration_3d, mode, gate_start):
    network = open_gate(build(configuration_3d, prompt_mode=mode, gate_start=gate_start))
    x, prompt_feature = images(configuration_3d, 3), {"prompts.learnable", "prompts.project.weight"}

    def trained_by(rows):
        network.zero_grad(set_to_none=True)
        first, second, _ = network(x, labeled_rows=1)
        (first[rows].square().mean() + second[rows].square().mean()).backward()
        # Without the biases: in front of a normalisation their gradient is 0 up to rounding.
        named = [(name, p) for name, p in network.named_parameters() if not name.endswith("bias")]
        return {name for name, p in named if p.grad is not None and p.grad.abs().max() > 0}

    by_unlabelled, by_labelled = trained_by(slice(1, 3)), trained_by(slice(0, 1))
    assert not by_unlabelled & prompt_feature
    assert by_labelled == by_unlabelled | prompt_feature
    for part in ("encoder.", "decoder.", "further_decoders.0.", "fusion.shared", "fusion.select", "fusion.merge"):
        assert any(name.startswith(part) for name in by_unlabelled), part


@pytest.mark.parametrize("mode", MODES)
def test_unlabelled_rows_do_not_change_the_supervised_gradient(build, configuration_3d, mode):
    network, x = open_gate(build(configuration_3d, prompt_mode=mode)), images(configuration_3d, 4)

    def gradients(batch):
        network.zero_grad()
        first, second, _ = network(batch, labeled_rows=2)
        (first[:2].square().mean() + second[:2].square().mean()).backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    for together, alone in zip(gradients(x), gradients(x[:2]), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_permuting_the_classes_permutes_the_prediction(build, configuration_3d, mode):
    network, x, order = open_gate(build(configuration_3d, prompt_mode=mode)), images(configuration_3d), [2, 0, 1]
    permuted = copy.deepcopy(network)
    with torch.no_grad():
        for decoder in (permuted.decoder, permuted.further_decoders[0]):
            for head in decoder.seg_layers:
                head.weight.copy_(head.weight[order])
                head.bias.copy_(head.bias[order])
        if mode != "none":
            permuted.prompts.embeddings.copy_(permuted.prompts.embeddings[order])
            permuted.prompts.learnable.copy_(permuted.prompts.learnable[order])
        if mode == "fixed_volume":
            weight = permuted.prompts.tokens[0].weight
            weight.copy_(weight[:, order])
    for before, after in zip(network(x, labeled_rows=1)[:2], permuted(x, labeled_rows=1)[:2], strict=True):
        torch.testing.assert_close(after, before[:, order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_another_patch_size_is_predicted(build, configuration_3d, mode):
    network = open_gate(build(configuration_3d, prompt_mode=mode))
    assert network(torch.randn(1, 2, 24, 16, 20)).shape == (1, CLASSES, 24, 16, 20)


def test_attention_weights_fit_a_network_planned_for_another_patch(build, make_configuration, configuration_3d):
    larger = build(make_configuration((24, 16, 20)), prompt_mode="attention")
    larger.load_state_dict(build(configuration_3d, prompt_mode="attention").state_dict())


@pytest.mark.parametrize("mode", GUIDED)
def test_a_checkpoint_predicts_without_the_planned_embeddings(build, configuration_3d, make_plans, mode):
    network, x = open_gate(build(configuration_3d, prompt_mode=mode)), images(configuration_3d)
    other_plans = make_plans()
    other_plans.plans["lgssl"]["text"]["embeddings"] = torch.ones(CLASSES, 12).tolist()
    other = build(configuration_3d, plans=other_plans, prompt_mode=mode)
    other.load_state_dict(network.state_dict())
    assert torch.equal(other(x), network(x))


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_predicts_the_same_and_shares_its_own_encoder(build, configuration_manager, mode):
    network, x = open_gate(build(configuration_manager, prompt_mode=mode)), images(configuration_manager)
    clone = copy.deepcopy(network)
    assert torch.equal(clone(x), network(x))
    assert clone.decoder.encoder is clone.encoder
    assert clone.encoder is not network.encoder


def test_keys_are_the_stock_networks_plus_its_own_and_no_parameter_twice(build, stock_network, configuration_manager):
    network, stock = build(configuration_manager), set(stock_network(configuration_manager, 2).state_dict())
    added = {name.split(".")[0] for name in set(network.state_dict()) - stock}
    assert stock <= set(network.state_dict())
    assert added == {"further_decoders", "prompts", "fusion"}
    assert not any(name.startswith("further_decoders.0.encoder") for name in network.state_dict())
    parameters = list(network.parameters())
    assert len({id(parameter) for parameter in parameters}) == len(parameters)


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_is_trained(build, configuration_3d, mode):
    network = open_gate(build(configuration_3d, deep_supervision=True, prompt_mode=mode))
    first, second, _ = network(images(configuration_3d), labeled_rows=1)
    sum(scale.square().mean() for scale in [*first, *second]).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


def test_dropout_is_drawn_for_each_decoder_and_only_in_training(build, configuration_3d):
    network, x = build(configuration_3d, dropout=0.5), images(configuration_3d)
    seen = []
    for decoder in (network.decoder, network.further_decoders[0]):
        decoder.register_forward_pre_hook(lambda _, skips: seen.append(skips[0]))
    network.train()(x, labeled_rows=1)
    first, second = (skips[-1].flatten(2).abs().sum(2) == 0 for skips in seen)
    assert first.any()
    assert second.any()
    assert not torch.equal(first, second)
    assert all(torch.equal(*pair) for pair in zip(seen[0][:-1], seen[1][:-1], strict=True))
    seen.clear()
    network.eval()(x, labeled_rows=1)
    assert torch.equal(seen[0][-1], seen[1][-1])


def test_a_single_voxel_bottleneck_trains(build, make_configuration):
    # No normalisation in the encoder either: nnU-Net's own instance norm refuses a single voxel in training.
    configuration_manager = make_configuration((4, 4, 4))
    architecture = configuration_manager.network_arch_init_kwargs
    architecture["norm_op"] = None
    for mode in GUIDED:
        network = open_gate(build(configuration_manager, prompt_mode=mode)).train()
        first, second, _ = network(images(configuration_manager), labeled_rows=1)
        (first.mean() + second.mean()).backward()
        assert network.selection(images(configuration_manager)).shape == (2, 1, 1, 1, 1)


@pytest.mark.parametrize("mode", GUIDED)
def test_a_single_region_trains_its_prompt(build, configuration_3d, mode):
    network = open_gate(build(configuration_3d, classes=1, prompt_mode=mode))
    network(images(configuration_3d), labeled_rows=2)[0].square().mean().backward()
    assert network.prompts.learnable.grad.abs().max() > 0


def test_plans_of_regions_make_the_attention_weigh_each_by_itself(build, configuration_3d, make_plans):
    regions = make_plans()
    regions.plans["lgssl"]["text"]["regions"] = True
    assert not build(configuration_3d, plans=regions).prompts.exclusive
    assert build(configuration_3d).prompts.exclusive
    assert not build(configuration_3d, classes=1).prompts.exclusive


def test_the_published_form_is_one_choice_of_options(build, configuration_3d):
    network = build(
        configuration_3d,
        prompt_mode="fixed_volume",
        gate_start=None,
        affine_norm=False,
        dropout=0.5,
        faithful_decoder=True,
    )
    assert network.fusion.gamma is None
    assert network.fusion.merge_norm.weight is None
    x = images(configuration_3d)
    assert network(x, labeled_rows=1)[1].shape == (2, CLASSES, 16, 16, 16)


def test_the_map_of_a_network_without_prompts_is_refused(build, configuration_3d):
    with pytest.raises(ValueError, match="no selection map"):
        build(configuration_3d, prompt_mode="none").selection(images(configuration_3d))


def test_plans_without_fitting_embeddings_are_refused(build, configuration_3d, make_plans):
    for plans in (make_plans(CLASSES + 1), make_plans(0)):
        with pytest.raises(PlansError, match="for 3 output channels"):
            build(configuration_3d, plans=plans)
    bare = make_plans()
    del bare.plans["lgssl"]
    with pytest.raises(PlansError, match="lgssl_plan_and_preprocess"):
        build(configuration_3d, plans=bare)
    assert isinstance(build(configuration_3d, plans=bare, prompt_mode="none"), LanguageGuidedUNet)


def test_unfitting_options_patches_and_architectures_are_refused(build, make_configuration):
    with pytest.raises(UsageError, match="fixed_volume, attention, none"):
        build(make_configuration(), prompt_mode="words")
    with pytest.raises(PlansError, match="multiple"):
        build(make_configuration((16, 18, 16)), prompt_mode="fixed_volume")
    other = make_configuration()
    other.configuration["architecture"]["network_class_name"] = (
        "dynamic_network_architectures.architectures.unet.ResidualUNet"
    )
    architecture = other.network_arch_init_kwargs
    architecture["n_blocks_per_stage"] = architecture.pop("n_conv_per_stage")
    with pytest.raises(PlansError, match="no U-Net with an nnU-Net decoder"):
        build(other)


# ------------------------------------------------------------------------------------------------------- further stages


@pytest.mark.parametrize("mode", GUIDED)
def test_text_is_fused_into_as_many_of_the_deepest_stages_as_asked(build, configuration_manager, mode):
    network = build(configuration_manager, prompt_mode=mode, gate_start=1.0, tvsf_stages=2)
    x, seen = images(configuration_manager), []
    network.decoder.register_forward_pre_hook(lambda _, skips: seen.append(skips[0]))
    network.eval()(x)
    skips = network.encoder(x)
    changed = [not torch.equal(*pair) for pair in zip(seen[0], skips, strict=True)]
    assert changed == [False] * (len(skips) - 2) + [True, True]
    prompts, fusion = network.further_stages[0].prompts, network.further_stages[0].fusion
    torch.testing.assert_close(seen[0][-2], fusion(skips[-2], prompts(skips[-2]))[0])


def test_each_stage_has_a_class_map_of_its_own_size_and_the_prompts_learn_from_labelled_rows(build, configuration_3d):
    network, x = build(configuration_3d, gate_start=1.0, tvsf_stages=2), images(configuration_3d, 3)
    first, _, language = network(x, labeled_rows=1)
    skips = network.encoder(x)
    assert torch.equal(language.image_feature, skips[-1])
    assert torch.equal(language.prompt_feature, network.prompts.prompt_feature())
    for logits, skip in zip(language.class_logits, skips[:-3:-1], strict=True):
        assert logits.shape == (3, CLASSES, *skip.shape[2:])
    first[1:].square().mean().backward()
    assert network.further_stages[0].prompts.learnable.grad.abs().max() == 0
    assert network.further_stages[0].fusion.merge.weight.grad.abs().max() > 0


def test_the_class_map_weighs_the_prompts(build, configuration_3d):
    network, x = build(configuration_3d), images(configuration_3d)
    logits = network(x, labeled_rows=2)[2].class_logits[0]
    value = network.prompts.value(network.prompts.prompt_feature())
    tau = torch.einsum("bcxyz,cd->bdxyz", logits.softmax(dim=1), value)
    torch.testing.assert_close(network.prompts(network.encoder(x)[-1]), tau)


def test_only_attention_has_a_class_map_and_no_text_has_nothing(build, configuration_3d):
    assert build(configuration_3d, prompt_mode="fixed_volume")(images(configuration_3d), 1)[2].class_logits == []
    assert build(configuration_3d, prompt_mode="none")(images(configuration_3d), 1)[2] is None


def test_one_stage_draws_the_same_weights_as_two_do_for_it(build, configuration_3d):
    networks = []
    for stages in (1, 2):
        torch.manual_seed(3)
        networks.append(build(configuration_3d, tvsf_stages=stages).state_dict())
    assert set(networks[1]) - set(networks[0])
    assert all(torch.equal(tensor, networks[1][name]) for name, tensor in networks[0].items())


def test_more_stages_than_the_network_has_are_refused(build, configuration_3d):
    stages = len(configuration_3d.pool_op_kernel_sizes)
    build(configuration_3d, tvsf_stages=stages)
    with pytest.raises(UsageError, match=f"tvsf_stages={stages + 1}: the planned network has {stages} stages"):
        build(configuration_3d, tvsf_stages=stages + 1)


def test_learned_prompts_have_no_embedding_and_start_at_an_embeddings_size(build, configuration_3d):
    prompts = build(configuration_3d, prompt_source="learned").prompts
    assert not prompts.embeddings.any()
    assert 0.5 < prompts.learnable.std() < 1.5
    assert build(configuration_3d, prompt_source="text").prompts.learnable.std() < 0.02
