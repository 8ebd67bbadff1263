"""What follows a prompt, generated or scored, against steps taken one by one; and how settings are written."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import PreTrainedModel

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.evaluation.continuations import generate_continuations, score_continuations
from adavtp.evaluation.settings import Setting
from repository import DIGITS, ROOT
from tiny_processors import family_model, family_processor

SCENE = ROOT / "docs" / "scene.png"
SETTINGS = [Setting("adaptive", 0.4), Setting("fastv", 0.4), Setting(["tome", "adaptive"], 29), Setting("full")]
NUM_PATCHES = 144


@pytest.fixture(scope="module")
def model() -> AdaVTPForConditionalGeneration:
    return AdaVTPForConditionalGeneration.from_pretrained(DIGITS).eval()


@pytest.fixture(scope="module")
def processor() -> AdaVTPProcessor:
    return AdaVTPProcessor.from_pretrained(DIGITS)


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    return Image.open(SCENE).convert("RGB")


def prompt_of(question: str, num_images: int = 1) -> str:
    return "<s>USER:" + " <image>" * num_images + f" {question} ASSISTANT:"


def steps_forced(
    model: AdaVTPForConditionalGeneration, inputs: dict[str, torch.Tensor], setting: Setting, ids: list[int]
) -> tuple[float, bool]:
    """The log-probability of some tokens, and whether each is the likeliest, from a generation made to say them."""
    length = inputs["input_ids"].shape[1]
    forced: Callable[..., list[int]] = lambda _, sequence: [ids[len(sequence) - length]]  # noqa: E731
    outputs = model.generate(
        **inputs,
        **setting.arguments(),
        max_new_tokens=len(ids),
        prefix_allowed_tokens_fn=forced,
        output_logits=True,
        return_dict_in_generate=True,
        do_sample=False,
    )
    assert outputs.sequences[0, length:].tolist() == ids
    logits = [step[0].double() for step in outputs.logits]
    total = sum(float(row[token]) - math.log(float(row.exp().sum())) for row, token in zip(logits, ids, strict=True))
    return total, all(int(row.argmax()) == token for row, token in zip(logits, ids, strict=True))


@contextmanager
def columns_of_logits(model: PreTrainedModel) -> Iterator[list[int]]:
    """For every run of the model's head inside the `with`, of how many columns of a prompt it made logits."""
    made: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda _, args, logits: made.append(logits.shape[1]))
    yield made
    handle.remove()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: f"{setting.label}-{setting.budget}")
def test_a_scored_continuation_has_the_log_probability_of_saying_it_step_by_step(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, scene: Image.Image, setting: Setting
) -> None:
    questions = ["which digit is red ?", "how many digits are there ?", "is there a 7 ?", "is there a 7 ?"]
    continuations = [" yes", " 4 of red 7", " no above", " no </s>"]
    images = [[scene], [scene, scene], [scene], []]
    prompts = [prompt_of(question, len(own)) for question, own in zip(questions, images, strict=True)]
    with columns_of_logits(model) as made:
        scored = score_continuations(model, processor, prompts, continuations, images, setting)
    # Of the longest continuation, four tokens, and of the one before it.
    assert made == [5]
    for prompt, continuation, own, one in zip(prompts, continuations, images, scored, strict=True):
        inputs = processor(images=[own] if own else None, text=[prompt], return_tensors="pt")
        ids = processor.tokenizer(continuation, add_special_tokens=False).input_ids
        expected, is_greedy = steps_forced(model, inputs, setting, ids)
        assert one.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert one.is_greedy == is_greedy


def test_what_the_model_says_itself_is_greedy(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, scene: Image.Image
) -> None:
    prompts = [prompt_of("which digit is red ?")]
    (own,) = generate_continuations(model, processor, prompts, [[scene]], SETTINGS[0], max_new_tokens=4)
    other = "blue" if own.text != "blue" else "red"
    said, not_said = (
        score_continuations(model, processor, prompts, [f" {text}"], [[scene]], SETTINGS[0])[0]
        for text in (own.text, other)
    )
    assert said.is_greedy and not not_said.is_greedy
    assert said.log_likelihood > not_said.log_likelihood


def test_a_batch_of_none_one_and_two_images_is_continued_as_each_prompt_alone(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor, scene: Image.Image
) -> None:
    images = [[scene], [], [scene, scene], [scene]]
    questions = ["which digit is red ?", "is there a 7 ?", "how many digits are there ?", "what colour is the 3 ?"]
    prompts = [prompt_of(question, len(own)) for question, own in zip(questions, images, strict=True)]
    together = generate_continuations(model, processor, prompts, images, SETTINGS[0], max_new_tokens=4)
    for prompt, own, one in zip(prompts, images, together, strict=True):
        inputs = processor(images=[own] if own else None, text=[prompt], return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        ids = model.generate(**inputs, token_budget=0.4, max_new_tokens=4, do_sample=False)[0, length:].tolist()
        assert one.text == processor.decode(ids, skip_special_tokens=True)
        # floor(0.4 * 144) = 57
        assert one.cost.num_keep == (57,) * len(own)
        assert one.cost.visual_tokens == (57.0 if own else 0.0)
        assert one.cost.text_tokens == length - NUM_PATCHES * len(own)
        assert one.cost.new_tokens == len(ids)


def test_a_stop_string_ends_a_continuation_and_its_decoding(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor
) -> None:
    # The word after "are" is forced, so that the continuation is known.
    words = processor.tokenizer("4 of red 7 above", add_special_tokens=False).input_ids
    prompt = prompt_of("how many digits are there ?", 0)
    length = len(processor.tokenizer(prompt).input_ids)
    forced: dict[str, Any] = {"prefix_allowed_tokens_fn": lambda _, ids: [words[len(ids) - length]]}
    (whole,) = generate_continuations(model, processor, [prompt], [[]], SETTINGS[0], max_new_tokens=5, **forced)
    (cut,) = generate_continuations(
        model, processor, [prompt], [[]], SETTINGS[0], ["yes", "red"], max_new_tokens=5, **forced
    )
    assert whole.text == "4 of red 7 above" and whole.cost.new_tokens == 5
    assert cut.text == "4 of " and cut.cost.new_tokens == 3
    assert cut.cost.flops < whole.cost.flops


def test_a_continuation_without_a_token_is_refused(
    model: AdaVTPForConditionalGeneration, processor: AdaVTPProcessor
) -> None:
    with pytest.raises(ValueError, match="no token of its own"):
        score_continuations(model, processor, [prompt_of("is there a 7 ?", 0)], [" "], [[]], SETTINGS[0])


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "qwen2_5_vl"])
@pytest.mark.parametrize("setting", [Setting("grid", 0.4), Setting({"name": "fastv", "layer": 1}, 0.75)])
def test_other_families_score_and_continue_each_prompt_of_a_batch_as_alone(
    name: str, setting: Setting, scene: Image.Image
) -> None:
    processor = family_processor(name)
    model = family_model(name, processor).eval()
    images = [[scene], [], [scene, scene.resize((30, 40))]]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * len(own) + [{"type": "text", "text": "how many ?"}]}],
            add_generation_prompt=True,
        )
        for own in images
    ]
    said = [" red", " 7", " there are two"]
    with columns_of_logits(model) as made:
        scored = score_continuations(model, processor, prompts, said, images, setting)
    # Of the longest continuation, and of the token before it.
    assert made == [1 + max(len(processor.tokenizer(text, add_special_tokens=False).input_ids) for text in said)]
    continued = generate_continuations(model, processor, prompts, images, setting, max_new_tokens=3, do_sample=False)
    for number, (prompt, answer, shown) in enumerate(zip(prompts, said, images, strict=True)):
        (alone,) = score_continuations(model, processor, [prompt], [answer], [shown], setting)
        assert scored[number].log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)
        (one,) = generate_continuations(
            model, processor, [prompt], [shown], setting, max_new_tokens=3, do_sample=False
        )
        assert (continued[number].text, continued[number].cost.num_keep) == (one.text, one.cost.num_keep)
        assert continued[number].cost.seen_tokens == pytest.approx(one.cost.seen_tokens)
