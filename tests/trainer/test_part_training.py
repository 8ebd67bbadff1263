"""Tower, projector and decoder by themselves: what each is shown, and that what is left belongs to one model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from adavtp import AdaVTPForConditionalGeneration
from adavtp.tasks.pages import PATCH_LABELS, PATCH_ROLES, PATCH_WORDS, load_pages
from adavtp.tasks.pages.processor import build_page_processor
from adavtp.trainer.data.budget_stream import BudgetStream
from adavtp.trainer.data.chat_template import IGNORED
from adavtp.trainer.data.packed_collator import PackedQuestionCollator
from adavtp.trainer.decoder_pretraining import (
    ShownReader,
    ToldImageCollator,
    ToldPageCollator,
    ToldPatches,
    ToldProjector,
    ToldReader,
    told_embeddings,
)
from adavtp.trainer.looking_around import HEADS, look_around
from adavtp.trainer.looking_back import OFFSETS, look_back
from adavtp.trainer.recipes.recipe import Recipe, Stage
from adavtp.trainer.recipes.run import run_recipe
from adavtp.trainer.recipes.starting_model import new_model
from adavtp.trainer.tower_pretraining import PatchLabelCollator, PatchLabeller

VISION = {"model_type": "clip_vision_model", "image_size": 192, "patch_size": 8, "hidden_size": 128}
VISION |= {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "hidden_act": "gelu"}
TEXT = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 1024, "tie_word_embeddings": True}
MODEL = {
    "task": "pages",
    "look_around": True,
    "vision_config": VISION,
    "text_config": TEXT,
    "vision_feature_layer": -1,
}
MODEL |= {"vision_feature_select_strategy": "default"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return list(load_pages("train", 4, cache_dir=tmp_path_factory.mktemp("pages"), num_questions=5))


@pytest.fixture
def model() -> AdaVTPForConditionalGeneration:
    torch.manual_seed(0)
    return new_model(MODEL)[0]


@pytest.fixture(scope="module")
def told() -> ToldPatches:
    return ToldPatches(build_page_processor(), PATCH_WORDS, PATCH_ROLES)


def test_heads_of_a_new_tower_look_where_they_are_said_to(model: AdaVTPForConditionalGeneration) -> None:
    tower = model.model.vision_tower
    positions = tower.embeddings.position_embedding.weight[1:]
    row, column = 10, 7
    for layer in tower.encoder.layers:
        attention = layer.self_attn
        for number, (down, right) in enumerate(HEADS):
            of_head = slice(16 * number, 16 * number + 16)
            query = positions[row * 24 + column] @ attention.q_proj.weight[of_head].T
            logits = (positions @ attention.k_proj.weight[of_head].T @ query).view(24, 24)
            if down is None:
                assert logits.mean(dim=0).argmax() == column + right
            elif right is None:
                assert logits.mean(dim=1).argmax() == row + down
            else:
                assert divmod(int(logits.argmax()), 24) == (row + down, column + right)


def test_a_tower_without_enough_heads_cannot_look_around(model: AdaVTPForConditionalGeneration) -> None:
    tower = model.model.vision_tower
    tower.config.num_attention_heads = 4
    with pytest.raises(ValueError, match="the tower has 4 heads of 32, 128 together; allowed are 7 heads and more"):
        look_around(tower)


def decoder_that_looks_back(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    text = {"hidden_size": 128, "num_attention_heads": 8, "head_dim": 32, "attention_bias": True, "vocab_size": 200}
    text |= {"num_hidden_layers": 2, "intermediate_size": 64, "rope_parameters": {"rope_type": "default"}}
    text["rope_parameters"]["rope_theta"] = 1e6
    decoder = LlamaModel(LlamaConfig(**text | changes, attn_implementation="eager")).eval()
    look_back(decoder)
    return decoder


def test_heads_of_a_new_decoder_look_back_find_what_is_alike_and_copy_it() -> None:
    decoder = decoder_that_looks_back()
    ids = torch.randperm(200)[:150]
    # The last token was there once before, and so was the one that is three columns back.
    ids[[20, 90]] = ids[[149, 146]]
    with torch.no_grad():
        outputs = decoder(ids[None], output_attentions=True, output_hidden_states=True)
    (first, *_), states = outputs.attentions, outputs.hidden_states
    for number, offset in enumerate(OFFSETS):
        assert (first[0, number].argmax(dim=-1)[offset:] == torch.arange(150 - offset)).all()
    for head in first[0, len(OFFSETS) :, -1]:
        assert set(head.topk(2).indices.tolist()) == {20, 149}
    # Behind a layer it is like the words that it looked at, among all 200.
    words = nn.functional.normalize(decoder.get_input_embeddings().weight, dim=-1)
    likeness = nn.functional.normalize(states[1][0, -1], dim=-1) @ words.T
    assert set(ids[-5:].tolist()) <= set(likeness.topk(10).indices.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": False}, "`attention_bias` False"),
        ({"num_attention_heads": 4}, "`num_attention_heads` 4"),
        ({"num_key_value_heads": 2}, "`num_key_value_heads` 2"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}}, "of 16 rotary frequencies 0 are below"),
    ],
)
def test_a_decoder_without_such_heads_cannot_look_back(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_that_looks_back(**changes)


def test_a_tower_that_sees_all_patches_at_their_places_sees_the_image(
    model: AdaVTPForConditionalGeneration, rows: list[dict], told: ToldPatches
) -> None:
    batch = PatchLabelCollator(told.processor.image_processor, tuple(PATCH_LABELS))(rows)
    labeller = PatchLabeller(model.model.vision_tower, PATCH_LABELS).eval()
    whole = labeller(**batch)
    labeller.num_patches = 576
    # A page without a table has no columns to be right about.
    torch.testing.assert_close(labeller(**batch), whole, equal_nan=True)


def test_a_tower_sees_first_the_patches_of_which_there_is_most_to_tell(
    model: AdaVTPForConditionalGeneration, rows: list[dict], told: ToldPatches
) -> None:
    batch = PatchLabelCollator(told.processor.image_processor, tuple(PATCH_LABELS))(rows)
    much = sum((batch[name] != classes - 1).int() for name, classes in PATCH_LABELS.items())
    labeller = PatchLabeller(model.model.vision_tower, PATCH_LABELS, num_patches=40)
    seen = []
    labeller._features_of = lambda pixel_values, places: (
        seen.append(places),
        torch.zeros(len(places), places.shape[1], VISION["hidden_size"]),
    )[1]
    labeller(**batch)
    for places, own in zip(seen[0], much, strict=True):
        assert (places.diff() > 0).all()
        assert own[places].min() >= own.sort(descending=True).values[39]


def test_a_told_patch_is_the_sum_of_its_words(rows: list[dict], told: ToldPatches) -> None:
    tokenizer = told.processor.tokenizer
    words = told.of_rows(rows)
    assert words.shape == (4, 576, len(PATCH_WORDS))
    for row, own in zip(rows, words, strict=True):
        for patch in (*row["answer_patches"][0], row["patch_glyphs"].index(PATCH_LABELS["patch_glyphs"] - 1)):
            named = [
                (PATCH_ROLES[name], of[row[name][patch]])
                for name, of in PATCH_WORDS.items()
                if row[name][patch] != PATCH_LABELS[name] - 1
            ]
            told_words = [divmod(number, len(tokenizer)) for number in own[patch].tolist() if number >= 0]
            roles, ids = zip(*told_words, strict=True)
            expected = named or [(0, tokenizer.unk_token)]
            assert list(zip(roles, tokenizer.convert_ids_to_tokens(ids), strict=True)) == expected


def test_a_word_of_another_role_is_turned_around() -> None:
    embedding = nn.Embedding(5, 8)
    told = told_embeddings(embedding, torch.tensor([3, 5 + 4, 10 + 3, -1]))
    three, four = embedding.weight[3], embedding.weight[4]
    torch.testing.assert_close(told, three + four.roll(2) + three.roll(4))


def test_a_told_page_of_all_patches_is_the_packed_batch(rows: list[dict], told: ToldPatches) -> None:
    packed = PackedQuestionCollator(told.processor)(rows)
    batch = ToldPageCollator(told, BudgetStream((1.0, 1.0)))(rows)
    assert torch.equal(batch.pop("patch_words"), told.of_rows(rows))
    packed.pop("pixel_values")
    torch.testing.assert_close(batch, packed)


def test_few_patches_that_are_shown_tell_every_answer_that_is_asked(rows: list[dict], told: ToldPatches) -> None:
    batch, words = ToldPageCollator(told, BudgetStream((0.05, 0.05)))(rows), told.of_rows(rows)
    tokenizer, image = told.processor.tokenizer, told.processor.image_token_id
    for number, row in enumerate(rows):
        places = batch["position_ids"][number][batch["input_ids"][number] == image] - 2
        assert len(places) == int(0.05 * 576)
        assert torch.equal(batch["patch_words"][number], words[number, places])
        targets = batch["labels"][number][batch["labels"][number] != IGNORED]
        answers = tokenizer.decode(targets, skip_special_tokens=False).split("</s>")[:-1]
        needed = {row["answers"].index(answer.strip()): None for answer in answers}
        assert needed
        for question in needed:
            assert set(row["answer_patches"][question]) <= set(places.tolist())


def test_of_every_second_page_all_that_could_be_asked_for_is_shown(told: ToldPatches, tmp_path: Path) -> None:
    pages = load_pages("train", 24, cache_dir=tmp_path, num_questions=1)
    batch, is_whole = ToldPageCollator(told, BudgetStream((0.25, 0.25)))(list(pages)), []
    for number, row in enumerate(pages):
        places = batch["position_ids"][number][batch["input_ids"][number] == told.processor.image_token_id] - 2
        of_lines = {place for place, label in enumerate(row["patch_lines_first"]) if label < 10}
        is_whole.append(of_lines <= set(places.tolist()))
    assert 6 < sum(is_whole) < 18


def test_a_block_of_a_told_page_is_the_question_alone(
    model: AdaVTPForConditionalGeneration, rows: list[dict], told: ToldPatches
) -> None:
    reader, collator = ToldReader(model).eval(), ToldPageCollator(told, BudgetStream((0.2, 0.2)))
    (row,) = rows[:1]
    together, num_targets, alone = reader(**collator([row]))["loss"], 0, 0.0
    shown = collator([row])
    block_ends = (shown["labels"][0] == told.processor.tokenizer.eos_token_id).nonzero()[:, 0].tolist()
    head = int((shown["input_ids"][0] == told.processor.image_token_id).nonzero()[-1]) + 1
    for start, end in zip([head, *(end + 1 for end in block_ends[:-1])], [end + 1 for end in block_ends], strict=True):
        columns = [*range(head), *range(start, end)]
        one = {name: shown[name][:, columns] for name in ("input_ids", "labels", "position_ids")}
        length = len(columns)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        loss = reader(**one, attention_mask=mask, patch_words=shown["patch_words"])["loss"]
        count = int((one["labels"] != IGNORED).sum())
        alone, num_targets = alone + float(loss) * count, num_targets + count
    assert float(together) == pytest.approx(alone / num_targets, rel=1e-5)


def test_tower_and_projector_learn_to_tell(
    model: AdaVTPForConditionalGeneration, rows: list[dict], told: ToldPatches
) -> None:
    projector, batch = ToldProjector(model), ToldImageCollator(told)(rows)
    projector(**batch)["loss"].backward()
    learns = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {"vision_tower", "multi_modal_projector"}


def test_a_page_of_which_every_patch_is_shown_is_what_the_model_sees(
    model: AdaVTPForConditionalGeneration, rows: list[dict], told: ToldPatches
) -> None:
    shown = ToldPageCollator(told, BudgetStream((1.0, 1.0)), with_pictures=True)(rows)
    loss = ShownReader(model)(**shown)["loss"]
    whole = model(**PackedQuestionCollator(told.processor)(rows), token_budget=1.0)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    learns = {name.split(".")[1] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {"language_model", "multi_modal_projector"}


def test_a_recipe_trains_parts_one_after_another(tmp_path: Path) -> None:
    data = {
        "path": "pages",
        "split": "train",
        "num_pages": 4,
        "num_questions": 3,
        "cache_dir": str(tmp_path / "cache"),
    }
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 1}
    kinds = ("patch_labels", "told_questions", "told_patches", "shown_questions", "packed_questions")
    stages = [Stage(kind, kind, data, training=dict(training)) for kind in kinds]
    stages[0].num_patches = 60
    stages[1].budgets = {"budget_range": [0.1, 0.2]}
    stages[3].budgets = {"budget_range": [0.1, 0.2]}
    stages[4].reducer = "random"
    folder = run_recipe(Recipe(MODEL, stages), tmp_path / "run")
    before = None
    trained = {
        "patch_labels": {"vision_tower"},
        "told_questions": {"language_model"},
        "told_patches": {"vision_tower", "multi_modal_projector"},
        "shown_questions": {"language_model", "multi_modal_projector"},
    }
    for kind in kinds:
        own = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "run" / kind).state_dict()
        if before is not None and kind in trained:
            changed = {name.split(".")[1] for name, value in own.items() if not torch.equal(value, before[name])}
            assert changed - {"weight"} == trained[kind]
        before = own
    assert folder == tmp_path / "run" / kinds[-1]


def test_parts_are_told_by_words_that_a_task_has() -> None:
    stage = Stage("read", "told_questions", {"split": "train", "num_scenes": 2})
    with pytest.raises(ValueError, match="'digit-scenes' has no words for what its patches show"):
        run_recipe(Recipe(MODEL | {"task": "digit-scenes"}, [stage]), Path("nowhere"))


def test_only_a_tower_sees_some_patches() -> None:
    with pytest.raises(ValueError, match="`num_patches` is 9; a stage of kind 'patch_labels' may have a number"):
        Stage("read", "told_questions", num_patches=9)
