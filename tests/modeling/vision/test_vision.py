"""What the vision side promises: the tower's own features, a budget token that reads and does not disturb."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, ViTConfig

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration
from adavtp.modeling.vision.encode import VisionFeatures, encode_image
from layers_by_hand import linear, normalised
from tiny_models import IMAGE_SIZE, NUM_PATCHES, tiny_batch, tiny_config, tiny_model

TOWERS = ["clip", "siglip", "dinov2"]
FEATURE_LAYERS = [(-1, "eager"), (-2, "sdpa"), (0, "sdpa"), ([2, 0], "eager")]


def with_cls(vision: str) -> dict[str, str]:
    """Fields that keep every token of the tower, so that CLS can be compared too."""
    return {} if vision == "siglip" else {"vision_feature_select_strategy": "full"}


def layers_of(tower: PreTrainedModel) -> nn.ModuleList:
    return tower.encoder.layer if tower.config.model_type == "dinov2" else tower.encoder.layers


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def question_of(config: AdaVTPConfig, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, config.text_config.hidden_size, generator=torch.Generator().manual_seed(seed))


def with_budget(
    model: AdaVTPForConditionalGeneration, budgets: tuple[float, float] = (0.25, 0.75), question_seed: int = 0
) -> VisionFeatures:
    return encode_image(
        model.model.vision_tower,
        images(),
        model.config,
        budget_token=model.model.budget_token,
        budget=torch.tensor(budgets),
        question=question_of(model.config, question_seed).to(model.dtype),
    )


def sequence_into_layers(model: AdaVTPForConditionalGeneration) -> list[torch.Tensor]:
    """Runs the tower with a budget and returns what each layer was given."""
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        for layer in layers_of(model.model.vision_tower)
    ]
    with_budget(model)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize(("feature_layer", "attention"), FEATURE_LAYERS, ids=str)
@pytest.mark.parametrize("vision", TOWERS)
def test_features_are_the_stock_tower_s_hidden_states(
    vision: str, feature_layer: int | list[int], attention: str
) -> None:
    model = tiny_model(vision, vision_feature_layer=feature_layer, **with_cls(vision))
    tower = model.model.vision_tower
    tower.set_attn_implementation(attention)
    states = tower(images(), output_hidden_states=True).hidden_states
    wanted = [feature_layer] if isinstance(feature_layer, int) else feature_layer
    expected = torch.cat([states[index] for index in wanted], dim=-1)

    features = encode_image(tower, images(), model.config)
    ours = features.patches if features.cls is None else torch.cat([features.cls, features.patches], dim=1)
    assert (features.cls is None) == (vision == "siglip")
    assert features.budget is None
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("feature_layer", "layers_that_run"), [(-1, [0, 1, 2]), (-2, [0, 1]), (0, []), ([0, -2], [0, 1])]
)
@pytest.mark.parametrize("vision", TOWERS)
def test_layers_above_the_feature_layer_never_run(
    vision: str, feature_layer: int | list[int], layers_that_run: list[int]
) -> None:
    model = tiny_model(vision, vision_feature_layer=feature_layer)
    ran = []
    for index, layer in enumerate(layers_of(model.model.vision_tower)):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    for budget in (1.0, 0.4):
        ran.clear()
        model(**tiny_batch(model.config, [1]), token_budget=budget)
        assert ran == layers_that_run


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "position", "attention"), [("last", "learned", "eager"), ("first", "last_patch", "sdpa")]
)
@pytest.mark.parametrize("vision", TOWERS)
def test_a_read_only_budget_leaves_the_patches_alone(vision: str, place: str, position: str, attention: str) -> None:
    fields = {"budget_token_place": place, "budget_position": position, "vision_feature_layer": [-2, -1]}
    model = tiny_model(vision, **fields).double()
    model.model.vision_tower.set_attn_implementation(attention)
    alone = encode_image(model.model.vision_tower, images(), model.config)
    features = with_budget(model)
    torch.testing.assert_close(features.patches, alone.patches, atol=1e-12, rtol=0)
    if alone.cls is not None:
        torch.testing.assert_close(features.cls, alone.cls, atol=1e-12, rtol=0)
    assert features.budget.shape == (2, 32)


@torch.no_grad()
@pytest.mark.parametrize("place", ["last", "first"])
@pytest.mark.parametrize("vision", TOWERS)
def test_a_mutual_budget_changes_what_the_patches_say(vision: str, place: str) -> None:
    model = tiny_model(vision, budget_attention="mutual", budget_token_place=place)
    alone = encode_image(model.model.vision_tower, images(), model.config).patches
    low, high = with_budget(model, (0.1, 0.1)).patches, with_budget(model, (0.9, 0.9)).patches
    assert alone.shape == low.shape == high.shape
    for first, second in [(alone, low), (alone, high), (low, high)]:
        assert (first - second).abs().amax(dim=(1, 2)).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [{"budget_token_place": "first"}, {"budget_attention": "mutual", "budget_position": "last_patch"}],
    ids=str,
)
@pytest.mark.parametrize("vision", TOWERS)
def test_the_budget_that_comes_out_knows_budget_question_and_image(vision: str, fields: dict[str, str]) -> None:
    model = tiny_model(vision, **fields)
    out = with_budget(model, (0.25, 0.25)).budget
    assert (out[0] - out[1]).abs().max() > 1e-4
    assert (out - with_budget(model, (0.3, 0.3)).budget).abs().amax(dim=-1).min() > 1e-4
    assert (out - with_budget(model, (0.25, 0.25), question_seed=1).budget).abs().amax(dim=-1).min() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    ("place", "position", "budget_attention"),
    [("last", "learned", "mutual"), ("first", "last_patch", "mutual"), ("last", "last_patch", "read_only")],
)
@pytest.mark.parametrize("vision", TOWERS)
def test_one_more_token_enters_the_layers_at_its_promised_place_with_its_promised_position(
    vision: str, place: str, position: str, budget_attention: str
) -> None:
    model = tiny_model(
        vision,
        budget_token_place=place,
        budget_position=position,
        budget_attention=budget_attention,
        vision_feature_layer=-1,
    )
    tower, budget_token = model.model.vision_tower, model.model.budget_token
    seen = sequence_into_layers(model)
    num_tower_tokens = NUM_PATCHES + (vision != "siglip")
    assert [tuple(sequence.shape) for sequence in seen] == [(2, num_tower_tokens + 1, 32)] * 3

    if position == "learned":
        position_vector = budget_token.position_embedding.weight[0]
    elif vision == "dinov2":
        position_vector = tower.embeddings.position_embeddings[0, num_tower_tokens - 1]
    else:
        position_vector = tower.embeddings.position_embedding.weight[num_tower_tokens - 1]
    token = budget_token.budget_embedding(torch.tensor([0.25, 0.75]))
    token = token + question_of(model.config) @ budget_token.question_proj.weight.T + budget_token.question_proj.bias
    index = 0 if place == "first" else num_tower_tokens
    torch.testing.assert_close(seen[0][:, index], token + position_vector)

    tower_tokens = tower(images(), output_hidden_states=True).hidden_states[0]
    rest = seen[0][:, 1:] if place == "first" else seen[0][:, :-1]
    torch.testing.assert_close(rest, tower_tokens)

    if budget_attention == "mutual":
        # Nothing is hidden, so the stock layers on the same sequence say what comes out.
        sequence = seen[0]
        for layer in layers_of(tower):
            sequence = layer(sequence, None)
        features = with_budget(model)
        torch.testing.assert_close(features.budget, sequence[:, index])
        first_patch = (place == "first") + (vision != "siglip")
        torch.testing.assert_close(features.patches, sequence[:, first_patch : first_patch + NUM_PATCHES])


def test_a_position_that_is_not_learned_has_no_parameter() -> None:
    assert tiny_model(budget_position="last_patch").model.budget_token.position_embedding is None


def test_a_model_that_does_not_hear_the_question_has_no_parameter_for_it() -> None:
    model = tiny_model(question_aware=False)
    assert model.model.budget_token.question_proj is None
    with torch.no_grad():
        torch.testing.assert_close(with_budget(model).budget, with_budget(model, question_seed=1).budget)


@torch.no_grad()
@pytest.mark.parametrize("feature_layer", [-2, [-2, -1]], ids=str)
@pytest.mark.parametrize("vision", TOWERS)
def test_post_fusion_is_one_cross_attention_behind_an_untouched_tower(
    vision: str, feature_layer: int | list[int]
) -> None:
    model = tiny_model(vision, budget_fusion="post", vision_feature_layer=feature_layer)
    for parameter in model.model.budget_token.cross_attention.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    seen = sequence_into_layers(model)
    assert all(sequence.shape[1] == NUM_PATCHES + (vision != "siglip") for sequence in seen)

    features = with_budget(model)
    alone = encode_image(model.model.vision_tower, images(), model.config)
    assert torch.equal(features.patches, alone.patches)

    weights = model.model.budget_token.cross_attention
    token = model.model.budget_token(torch.tensor([0.25, 0.75]), question_of(model.config))
    for image in range(2):
        patches = normalised(alone.patches[image], weights.patch_norm)
        query = linear(normalised(token[image], weights.query_norm), weights.q_proj)
        key, value = linear(patches, weights.k_proj), linear(patches, weights.v_proj)
        read = []
        for head in range(4):
            part = slice(8 * head, 8 * head + 8)
            scores = torch.stack([query[part].dot(key[patch, part]) / 8**0.5 for patch in range(NUM_PATCHES)])
            shares = scores.exp() / scores.exp().sum()
            read.append(sum(shares[patch] * value[patch, part] for patch in range(NUM_PATCHES)))
        expected = token[image] + linear(torch.cat(read), weights.out_proj)
        torch.testing.assert_close(features.budget[image], expected, atol=1e-5, rtol=0)


def test_flash_attention_is_refused_where_it_would_show_the_budget_to_the_patches() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, [1])
    model.model.vision_tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError) as refusal:
        model(**batch, token_budget=0.4)
    for fragment in ["`budget_attention`", "'read_only'", "'flash_attention_2'", "sdpa", "'mutual'"]:
        assert fragment in str(refusal.value)
    model.model.vision_tower.config._attn_implementation = "sdpa"
    assert model(**batch, token_budget=0.4).selection.num_keep.tolist() == [6]


def test_an_unsupported_tower_is_refused() -> None:
    with pytest.raises(ValueError) as refusal:
        tiny_config(vision_config=ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4))
    for fragment in ["`vision_config.model_type`", "'vit'", "clip_vision_model", "siglip_vision_model", "dinov2"]:
        assert fragment in str(refusal.value)


# 64 x 16 pixels make as many patches as 32 x 32.
@pytest.mark.parametrize("vision", TOWERS)
def test_an_image_of_the_wrong_size_is_refused(vision: str) -> None:
    model = tiny_model(vision)
    batch = tiny_batch(model.config, [1])
    for size in ((48, 48), (16, 16), (64, 16)):
        with pytest.raises(ValueError) as refusal:
            model(**(batch | {"pixel_values": torch.randn(1, 3, *size)}), token_budget=0.4)
        for fragment in ["`pixel_values`", str(size), "32 pixels"]:
            assert fragment in str(refusal.value)
    assert model(**batch, token_budget=0.4).selection.num_keep.tolist() == [6]


@pytest.mark.parametrize("feature_layer", [4, -5, [-2, 7]], ids=str)
def test_a_feature_layer_that_the_tower_does_not_have_is_refused(feature_layer: Any) -> None:
    model = tiny_model(vision_feature_layer=feature_layer)
    with pytest.raises(ValueError) as refusal:
        model(**tiny_batch(model.config, [1]), token_budget=0.4)
    for fragment in ["`vision_feature_layer`", str(feature_layer), "-4 to 3"]:
        assert fragment in str(refusal.value)


@torch.no_grad()
def test_pixels_of_another_dtype_are_taken() -> None:
    model = tiny_model().to(torch.bfloat16)
    batch = tiny_batch(model.config, [1])
    assert model(**batch, token_budget=0.4).logits.dtype == torch.bfloat16
