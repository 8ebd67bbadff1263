"""The seam between a family and everything else: units of any size in a prompt, and budgets that they share."""

from collections.abc import Iterator

import pytest
import torch
from transformers import LlavaModel

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.budget.token_budget import shared_by_units
from adavtp.modeling.families.base import Units
from adavtp.modeling.families.llava import LlavaFamily
from tiny_models import IMAGE_TOKEN_ID, NUM_PATCHES, alone, targets, tiny_batch, tiny_model

# Rows and columns of the tokens of each image, which are the first of its patches; a separator stands behind each row.
GRIDS = [(4, 4), (2, 3), (3, 4), (1, 4)]
IMAGES = [2, 0, 1, 1]


class TilesOfManySizes(LlavaFamily):
    """A family whose units differ in size, with a separator (the embedding of CLS) in front of each."""

    def __init__(self, grids: list[tuple[int, int]]) -> None:
        self.grids = grids

    def units(self, config: object, placeholders: torch.Tensor, num_images: int) -> Units:
        sizes = torch.tensor([rows * columns for rows, columns in self.grids])
        begins = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        token = [index for u in range(num_images) for index in (-1, *range(int(begins[u]), int(begins[u + 1])))]
        ends = (sizes + 1).cumsum(0)
        columns = placeholders.sum(dim=-1).cumsum(0)
        sample = torch.tensor([int((columns < end).sum()) for end in ends.tolist()])
        return Units(sample, sizes, self.grids, torch.tensor(token))


def batch_of_tiles(model: AdaVTPForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Prompts with two, no, one and one image, of which every unit has its own number of placeholders."""
    batch = tiny_batch(model.config, IMAGES, lengths=[7, 5, 6, 6])
    rows, unit = [], 0
    for row, num_images in enumerate(IMAGES):
        ids = alone(batch, row, IMAGES)["input_ids"][0].tolist()
        text = [token for token in ids if token != IMAGE_TOKEN_ID]
        prompt = text[:2]
        for image in range(num_images):
            rows_columns = GRIDS[unit + image]
            prompt += [IMAGE_TOKEN_ID] * (1 + rows_columns[0] * rows_columns[1]) + text[2 + image : 3 + image]
        rows.append(prompt + text[2 + num_images :])
        unit += num_images
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": batch["pixel_values"]}


@pytest.fixture
def model() -> Iterator[AdaVTPForConditionalGeneration]:
    model = tiny_model(vision_feature_select_strategy="full", trained_reducers=["resampler"])
    model.generation_config.eos_token_id = None
    model.model.family = TilesOfManySizes(GRIDS)
    return model


def stock_logits(
    model: AdaVTPForConditionalGeneration, batch: dict[str, torch.Tensor], keep: list[list[int]], row: int
) -> torch.Tensor:
    """Logits of one prompt: the stock parts read its text, separators and kept tokens at their positions."""
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2]
    features = model.model.multi_modal_projector(states)
    unit, embeds, positions = sum(IMAGES[:row]), [], []
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
    place = 0
    for position, token in enumerate(ids):
        if token != IMAGE_TOKEN_ID:
            embed = model.get_input_embeddings().weight[token]
        else:
            number, place = place, place + 1
            own = unit
            if place > GRIDS[unit][0] * GRIDS[unit][1]:
                unit, place = unit + 1, 0
            if number > 0 and number - 1 not in keep[own]:
                continue
            embed = features[own, number]
        embeds.append(embed)
        positions.append(position)
    hidden = model.model.language_model(
        inputs_embeds=torch.stack(embeds)[None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.long),
        position_ids=torch.tensor([positions]),
    ).last_hidden_state
    return model.lm_head(hidden)[0]


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["adaptive", "random", "divprune", "grid", "cls_attention"])
@pytest.mark.parametrize("token_budget", [1.0, 0.5, [0.25, 1.0, 3, 0.0], {"prompt": 9}], ids=str)
def test_units_of_different_size_keep_their_own_share(
    model: AdaVTPForConditionalGeneration, token_budget: object, reducer: str
) -> None:
    if isinstance(token_budget, list):
        token_budget = [0.25, 1.0, 0.5, 0.0]
    batch = batch_of_tiles(model)
    output = model(**batch, token_budget=token_budget, reducer=reducer)
    expected = {
        "1.0": [16, 6, 12, 4],
        "0.5": [8, 3, 6, 2],
        "[0.25, 1.0, 0.5, 0.0]": [4, 1, 6, 1],
        "{'prompt': 9}": [7, 2, 9, 4],
    }[str(token_budget)]
    assert output.selection.sizes.tolist() == [16, 6, 12, 4]
    assert output.selection.num_keep.tolist() == expected
    keep = [row.nonzero()[:, 0].tolist() for row in output.selection.keep]
    for row in range(len(IMAGES)):
        logits = stock_logits(model, batch, keep, row)
        torch.testing.assert_close(output.logits[row, -len(logits) :], logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["adaptive", "fastv", "pool", "resampler", "prumerge", "visionzip"])
def test_a_batch_of_many_sizes_gives_what_its_samples_give_alone(
    model: AdaVTPForConditionalGeneration, reducer: str
) -> None:
    batch = batch_of_tiles(model)
    options = {"token_budget": 0.75, "reducer": reducer, "max_new_tokens": 4, "do_sample": False}
    together = model.generate(**batch, **options)[:, -4:]
    for row in range(len(IMAGES)):
        first = sum(IMAGES[:row])
        model.model.family = TilesOfManySizes(GRIDS[first : first + IMAGES[row]])
        sample = alone(batch, row, IMAGES)
        assert model.generate(**sample, **options)[0, -4:].tolist() == together[row].tolist()


def test_training_on_many_sizes_reaches_every_kept_token(model: AdaVTPForConditionalGeneration) -> None:
    model.train()
    batch = batch_of_tiles(model)
    for form in ("gather", "mask"):
        model.config.gradient_gates = "features"
        torch.manual_seed(0)
        loss = model(**batch, labels=targets(batch), token_budget=0.5, selection_output=form).loss
        loss.backward()
        gradient = model.model.controller.score.weight.grad
        assert gradient.isfinite().all() and (gradient != 0).any()


@pytest.mark.parametrize("total", range(3, 60))
def test_a_larger_budget_for_a_prompt_takes_from_no_unit(total: int) -> None:
    sizes, sample = torch.tensor([16, 6, 30]), torch.zeros(3, dtype=torch.long)
    now, more = (shared_by_units(torch.tensor([n]), sample, sizes) for n in (total, total + 1))
    assert int(now.sum()) == min(total, 52)
    assert (now >= 1).all() and (now <= sizes).all() and (more >= now).all()


def test_a_prompt_with_more_images_than_tokens_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="2 tokens for a whole prompt, and prompt 0 shows 3 images"):
        model(**tiny_batch(model.config, [3]), token_budget={"prompt": 2})
    with pytest.raises(ValueError, match=r"`token_budget` is \{'prompt': 0.5\}"):
        model(**tiny_batch(model.config, [3]), token_budget={"prompt": 0.5})


@torch.no_grad()
@pytest.mark.parametrize("token_budget", [1.0, 0.4, [0.25, 3 / 4]], ids=str)
def test_image_features_are_those_that_the_decoder_gets(token_budget: object) -> None:
    model = tiny_model(question_aware=False)
    batch = tiny_batch(model.config, [1, 1])
    features = model.get_image_features(batch["pixel_values"], token_budget=token_budget).pooler_output
    output = model(**batch, token_budget=token_budget)
    assert [len(rows) for rows in features] == output.selection.num_keep.tolist()
    torch.testing.assert_close(torch.cat(features), output.image_hidden_states)
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    stock = model.model.multi_modal_projector(states)
    assert stock.shape[1] == NUM_PATCHES
    torch.testing.assert_close(torch.cat(features), stock[output.selection.keep])


@torch.no_grad()
@pytest.mark.parametrize("asked", [{}, {"output_hidden_states": True, "output_attentions": True}], ids=["", "asked"])
def test_whole_images_have_the_stock_classs_features_in_its_output(asked: dict[str, bool]) -> None:
    model = tiny_model(attn_implementation="eager")
    model.set_attn_implementation("eager")
    pixels = tiny_batch(model.config, [1, 1])["pixel_values"]
    stock = LlavaModel.get_image_features(model.model, pixels, **asked, return_dict=True)
    for ours in (model.get_image_features(pixels, **asked), model.model.get_image_features(pixels, **asked)):
        assert type(ours) is type(stock) and ours.keys() == stock.keys()
        torch.testing.assert_close(dict(ours), dict(stock), rtol=0, atol=0)
    as_tuple = model.get_image_features(pixels, **asked, return_dict=False)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], stock.last_hidden_state)


@torch.no_grad()
def test_the_towers_states_come_with_chosen_features_where_they_are_asked_for() -> None:
    model = tiny_model()
    pixels = tiny_batch(model.config, [1, 1])["pixel_values"]
    plain = model.get_image_features(pixels, token_budget=0.4)
    assert plain.hidden_states is None
    asked = model.get_image_features(pixels, token_budget=0.4, output_hidden_states=True)
    assert len(asked.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    torch.testing.assert_close(asked.pooler_output, plain.pooler_output)


def test_chosen_features_of_another_layer_are_refused() -> None:
    model = tiny_model()
    pixels = tiny_batch(model.config, [1])["pixel_values"]
    with pytest.raises(ValueError, match="`vision_feature_layer` is 1, and this model reads -2"):
        model.get_image_features(pixels, token_budget=0.4, vision_feature_layer=1)
