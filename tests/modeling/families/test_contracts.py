"""What a budget promises holds for every family: against the stock class, and against prompts pruned by hand."""

from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlavaNextProcessor, PreTrainedModel
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from adavtp import AdaVTPProcessor
from pruned_by_hand import HandPruned, language_inputs
from tiny_families import (
    FAMILIES,
    IN_DECODER,
    MIXTURES,
    QWEN,
    STATEFUL,
    VIDEO_FAMILIES,
    Writer,
    batch_of,
    budgeted,
    ragged_prompts,
    stock_model,
    with_budget,
)

REFERENCE = Path(__file__).parents[3] / "hub_cards/adavtp-digits"


class Operations(TorchDispatchMode):
    """Counts, by name, what torch does inside the `with`; a view does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.counts[str(func.overloadpacket)] += not func.is_view
        return func(*args, **kwargs or {})


def answers(name: str, prompts: list, side: str = "left", **arguments: object) -> list[list[int]]:
    batch = batch_of(name, prompts, side)
    written = budgeted(name).generate(**batch, max_new_tokens=4, do_sample=False, **arguments)
    return written[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES])
def test_at_full_budget_logits_are_the_stock_class_s_to_the_bit(name: str) -> None:
    # Without padding: behind it, some families' stock forward counts positions from the padding on.
    batch = batch_of(name, ragged_prompts(name)[1:2])
    with torch.no_grad():
        assert torch.equal(budgeted(name)(**batch, token_budget=1.0).logits, stock_model(name)(**batch).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_decoding_does_nothing_that_the_stock_class_does_not(name: str) -> None:
    batch = batch_of(name, [Writer(name).prompt()])

    def second_step(model: PreTrainedModel, **budget: float) -> Counter[str]:
        with torch.no_grad():
            cache = model(**batch, **budget, use_cache=True).past_key_values
            model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
            with Operations() as operations:
                model(input_ids=batch["input_ids"][:, -1:], past_key_values=cache)
        return operations.counts

    of_stock = second_step(stock_model(name))
    for token_budget in (1.0, 0.4):
        assert second_step(budgeted(name), token_budget=token_budget) <= of_stock


@torch.no_grad()
@pytest.mark.parametrize("reducer", ["grid", "fastv"])
def test_under_autocast_what_deepstack_adds_is_added_as_the_stock_class_adds_it(reducer: str) -> None:
    stock, model = deepcopy(stock_model("qwen3_vl")).float(), with_budget("qwen3_vl", reducers=[reducer]).float()
    prompt = Writer("qwen3_vl").prompt(images=((2, 2),), videos=((2, 2, 1),))
    batch = {
        key: value.float() if value.is_floating_point() else value
        for key, value in batch_of("qwen3_vl", [prompt]).items()
    }
    labels = torch.full_like(batch["input_ids"], -100)
    with torch.autocast("cpu", torch.bfloat16):
        expected = stock(**batch).logits
        for is_training in (True, False):
            # In training FastV acts inside the decoder also where nothing leaves.
            whole = model.train(is_training)(**batch, labels=labels, token_budget=1.0)
            assert torch.equal(whole.logits, expected)
        outputs = model(**batch, token_budget=0.75)
    selection = outputs.selection
    depth = None if selection.depth is None else selection.depth[selection.keep]
    by_hand = HandPruned("qwen3_vl", prompt, selection.keep[selection.is_token], depth=depth)
    close = {"atol": 0.25, "rtol": 0.0}
    torch.testing.assert_close(outputs.logits[0, -4:].double(), by_hand.head(by_hand.hidden()[-4:]), **close)


@pytest.mark.parametrize("name", [*FAMILIES, *MIXTURES])
def test_an_answer_is_the_stock_language_model_s_on_the_prompt_pruned_by_hand(name: str) -> None:
    prompt = ragged_prompts(name)[1]
    selection = budgeted(name).select_tokens(**batch_of(name, [prompt]), token_budget=0.4, reducer="divprune")
    assert selection.num_keep.tolist() == [max(1, size * 2 // 5) for size in selection.sizes.tolist()]
    by_hand = HandPruned(name, prompt, selection.keep[selection.is_token])
    arguments = {"token_budget": 0.4, "reducer": "divprune"}
    assert answers(name, [prompt], **arguments) == [by_hand.greedy()]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_that_were_merged_are_read_where_their_targets_stood(name: str) -> None:
    prompt = ragged_prompts(name)[0]
    batch = batch_of(name, [prompt])
    outputs = budgeted(name)(**batch, token_budget=0.5, reducer="pool")
    selection = outputs.selection
    merged = selection.features[selection.positions >= 0]
    by_hand = HandPruned(name, prompt, selection.keep[selection.is_token], merged)
    with torch.no_grad():
        expected = by_hand.head(by_hand.hidden()[-1:])
    assert torch.allclose(outputs.logits[0, -1:], expected, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_gives_what_its_prompts_give_alone(name: str, side: str) -> None:
    prompts, budgets = ragged_prompts(name), [0.4, 0.7, 1.0]
    together = answers(name, prompts, side, token_budget=budgets, reducer="cls_attention")
    pairs = zip(prompts, budgets, strict=True)
    alone = [answers(name, [prompt], token_budget=b, reducer="cls_attention")[0] for prompt, b in pairs]
    assert together == alone


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
def test_a_video_is_a_unit_or_its_frames_are_beside_images(name: str) -> None:
    images = ((2, 2),) if name != "glm4v" else ()
    prompt = Writer(name).prompt(images=images, videos=((3, 2, 2),))
    selection = budgeted(name).select_tokens(**batch_of(name, [prompt]), token_budget=0.5, reducer="grid")
    frames = [4, 4, 4] if name == "minicpmv4_6" else [12]
    assert selection.sizes.tolist()[-len(frames) :] == frames
    by_hand = HandPruned(name, prompt, selection.keep[selection.is_token])
    assert answers(name, [prompt], token_budget=0.5, reducer="grid") == [by_hand.greedy()]


def test_glm_does_not_take_images_and_videos_in_one_call() -> None:
    # Its stock class counts the placeholders of both against the features of each.
    batch = batch_of("glm4v", [Writer("glm4v").prompt(images=((2, 2),), videos=((3, 2, 2),))])
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        stock_model("glm4v")(**batch)
    with pytest.raises(ValueError, match="`pixel_values` and `pixel_values_videos` were given in one call"):
        budgeted("glm4v")(**batch, token_budget=0.5)


@pytest.mark.parametrize("name", QWEN)
def test_fewer_images_than_a_prompt_shows_are_an_error_in_words(name: str) -> None:
    prompt = Writer(name).prompt(images=((2, 2), (2, 2)))
    batch = batch_of(name, [prompt]) | {"pixel_values": prompt.images[0]["pixel_values"]}
    batch["image_grid_thw"] = batch["image_grid_thw"][:1]
    with pytest.raises(ValueError, match="`mm_token_type_ids` shows more images or videos than `image_grid_thw`"):
        budgeted(name)(**batch, token_budget=0.5)


@pytest.mark.parametrize("name", STATEFUL)
def test_where_a_decoder_keeps_a_state_turns_of_a_batch_are_right_or_refused(name: str) -> None:
    model, writer = budgeted(name), Writer(name)
    first = [writer.prompt(), writer.prompt(images=())]
    arguments = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    batch = batch_of(name, first)
    begun = model.generate(**batch, token_budget=0.4, reducer="grid", **arguments)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    later = [writer.words(4), writer.words(4)]

    def goes_on(cache: Any, new_mask: torch.Tensor) -> list[list[int]]:
        ids = torch.cat([begun.sequences, torch.tensor(later)], dim=1)
        given = {"input_ids": ids, "attention_mask": torch.cat([mask, new_mask], dim=1)}
        return model.generate(**given, past_key_values=cache, **arguments).sequences[:, ids.shape[1] :].tolist()

    ones = torch.ones(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="different lengths.*linear attention moves its state on.*by itself"):
        goes_on(deepcopy(begun.past_key_values), ones.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(0)))
    together = goes_on(begun.past_key_values, ones)
    for row, prompt in enumerate(first):
        cache = model.generate(**batch_of(name, [prompt]), token_budget=0.4, reducer="grid", **arguments)
        ids = torch.tensor([prompt.ids + begun.sequences[row, -3:].tolist() + later[row]])
        alone = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache.past_key_values, **arguments
        )
        assert alone.sequences[0, ids.shape[1] :].tolist() == together[row]


@pytest.mark.parametrize("name", FAMILIES)
def test_both_forms_of_training_have_one_loss_and_every_trained_part_a_gradient(name: str) -> None:
    model = with_budget(name).train()
    batch = batch_of(name, ragged_prompts(name)[:2])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :-4] = -100
    arguments, losses = {"labels": labels, "token_budget": 0.5, "reducer": "adaptive"}, {}
    for form in ("gather",) if name in STATEFUL else ("gather", "mask"):
        torch.manual_seed(0)
        losses[form] = model(**batch, **arguments, selection_output=form).loss
    if name in STATEFUL:
        with pytest.raises(ValueError, match="`selection_output` is 'mask'.*linear attention.*Use 'gather'"):
            model(**batch, **arguments, selection_output="mask")
    else:
        assert torch.allclose(losses["gather"], losses["mask"], atol=1e-6)
    losses["gather"].backward()
    for key, parameter in model.named_parameters():
        if key.startswith(("budget_token", "controller")):
            assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert model.controller.score.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", IN_DECODER)
def test_fastv_leaves_in_the_decoder_what_it_leaves_alone(name: str) -> None:
    prompts, arguments = ragged_prompts(name), {"reducer": {"name": "fastv", "layer": 2}}
    selection = budgeted(name)(**batch_of(name, prompts[:1]), token_budget=0.75, **arguments).selection
    asked = budgeted(name).select_tokens(**batch_of(name, prompts[:1]), token_budget=0.75, **arguments)
    assert torch.equal(asked.depth, selection.depth)
    depth = selection.depth[selection.is_token]
    assert set(depth.tolist()) == {2, 4} and depth.sum() == int(0.75 * len(depth)) * 4
    together = answers(name, prompts, token_budget=[0.75, 0.6, 1.0], **arguments)
    alone = [
        answers(name, [p], token_budget=b, **arguments)[0] for p, b in zip(prompts, (0.75, 0.6, 1.0), strict=True)
    ]
    assert together == alone
    assert together == answers(
        name, prompts, token_budget=[0.75, 0.6, 1.0], cache_implementation="static", **arguments
    )


def test_an_image_and_a_question_go_into_the_family_s_own_chat_template() -> None:
    processor_of_digits = AdaVTPProcessor.from_pretrained(REFERENCE)
    tokenizer = processor_of_digits.tokenizer
    model = with_budget("llava_next", image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    model.generation_config.suppress_tokens = None
    model.processor = LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 24},
            crop_size={"height": 24, "width": 24},
            image_grid_pinpoints=model.config.image_grid_pinpoints,
        ),
        tokenizer,
        patch_size=6,
        vision_feature_select_strategy="default",
        chat_template=processor_of_digits.chat_template,
        num_additional_image_tokens=1,
    )
    pictures = [Image.new("RGB", (40, 20), "red"), Image.effect_noise((24, 30), 80).convert("RGB")]
    arguments = {"token_budget": 0.5, "reducer": "grid", "max_new_tokens": 4, "do_sample": False}
    answers_of_both = model.generate(pictures, "what is it ?", **arguments)
    alone = [model.generate(picture, "what is it ?", **arguments) for picture in pictures]
    assert answers_of_both == alone and all(isinstance(answer, str) for answer in alone)
    turn = [{"type": "image"}, {"type": "text", "text": "what is it ?"}]
    text = model.processor.apply_chat_template([{"role": "user", "content": turn}], add_generation_prompt=True)
    inputs = model.processor(images=[pictures[0]], text=[text], add_special_tokens=False, return_tensors="pt")
    written = model.generate(**inputs, **arguments)[0, inputs["input_ids"].shape[1] :]
    assert alone[0] == tokenizer.decode(written, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_gaps_are_closed_where_positions_have_one_axis_and_refused_elsewhere(name: str) -> None:
    model, batch = with_budget(name, visual_position_ids="compact"), batch_of(name, ragged_prompts(name)[:1])
    arguments = {"token_budget": 0.4, "reducer": "grid"}
    if name == "qwen2_5_vl":
        with pytest.raises(ValueError, match="'compact', and this family's positions have axes"):
            model(**batch, **arguments)
        return
    selection = model.select_tokens(**batch, **arguments)
    by_hand = HandPruned(name, ragged_prompts(name)[0], selection.keep[selection.is_token])
    given = language_inputs(stock_model(name), batch)
    with torch.no_grad():
        embeds = given["inputs_embeds"][:, by_hand.keep]
        hidden = stock_model(name).get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
        expected = stock_model(name).lm_head(hidden[:, -1])
        assert torch.allclose(model(**batch, **arguments).logits[:, -1], expected, atol=1e-6)
