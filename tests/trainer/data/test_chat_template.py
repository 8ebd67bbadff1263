"""What a conversation becomes for training: the ids of the prompt, and targets where the assistant speaks."""

import copy
from typing import Any

import pytest
import torch

from adavtp import AdaVTPProcessor
from adavtp.trainer.data.chat_template import encode_conversation
from adavtp.trainer.data.image_tokens import image_tokens
from tiny_conversations import PROCESSORS, assistant, digit_processor, llava_processor, picture, target_texts, user
from tiny_models import NUM_PATCHES

# Case -> messages and what the assistant says in them.
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "one turn": ([user("what colour is the 7 ?", 1), assistant("red")], ["red"]),
    "three turns": (
        [
            user("which digit is red ?", 1),
            assistant("7"),
            user("is there a 3 ?"),
            assistant("yes"),
            user("how many digits are there ?"),
            assistant("4"),
        ],
        ["7", "yes", "4"],
    ),
    "two images in one turn": ([user("which digit is red ?", 2), assistant("7")], ["7"]),
    "an image in each of two turns": (
        [user("is there a 3 ?", 1), assistant("no"), user("is there a 7 ?", 1), assistant("yes")],
        ["no", "yes"],
    ),
    "text alone": ([user("is there a 3 ?"), assistant("no")], ["no"]),
    "a system prompt": (
        [{"role": "system", "content": [{"type": "text", "text": "red"}]}, user("is there a 3 ?", 1), assistant("no")],
        ["no"],
    ),
    "an answer of several words": (
        [user("which digit is the largest ?", 1), assistant("the red 7 , the blue 3")],
        ["the red 7 , the blue 3"],
    ),
    "an answer that repeats the question": (
        [user("is there a 3 ?", 1), assistant("is there a 3 ?")],
        ["is there a 3 ?"],
    ),
    "a question last": ([user("is there a 3 ?", 1), assistant("no"), user("is there a 7 ?")], ["no"]),
}


def num_images_of(messages: list[dict[str, Any]]) -> int:
    return sum(part["type"] == "image" for message in messages for part in message["content"])


@pytest.fixture(params=PROCESSORS, scope="module")
def processor(request: pytest.FixtureRequest) -> AdaVTPProcessor:
    return PROCESSORS[request.param]()


def is_llava(processor: AdaVTPProcessor) -> bool:
    return not processor.apply_chat_template([user("red")]).startswith("<s>")


def expected_targets(processor: AdaVTPProcessor, messages: list[dict[str, Any]], answers: list[str]) -> list[str]:
    """Every answer with the end that the template writes; and the very last one with an end in any case."""
    if not is_llava(processor):
        return [f"{answer} </s>" for answer in answers]
    ends = [""] * len(answers)
    if messages[-1]["role"] == "assistant":
        ends[-1] = "</s>"
    return [answer + end for answer, end in zip(answers, ends, strict=True)]


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_targets_are_what_the_assistant_says_and_nothing_else(processor: AdaVTPProcessor, case: str) -> None:
    messages, answers = CONVERSATIONS[case]
    encoded = encode_conversation(processor, messages, NUM_PATCHES)
    assert target_texts(processor, encoded.input_ids, encoded.labels) == expected_targets(processor, messages, answers)


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_the_ids_are_those_that_the_processor_makes_of_the_same_text_and_images(
    processor: AdaVTPProcessor, case: str
) -> None:
    messages, _ = CONVERSATIONS[case]
    images = [picture(index) for index in range(num_images_of(messages))]
    text = processor.apply_chat_template(messages)
    if is_llava(processor) and messages[-1]["role"] == "assistant":
        text = text.removesuffix(" ") + "</s>"
    of_processor = processor(images=images or None, text=text)["input_ids"][0]
    encoded = encode_conversation(processor, messages, NUM_PATCHES if images else 0)
    assert encoded.input_ids == list(of_processor)
    assert encoded.input_ids.count(processor.image_token_id) == NUM_PATCHES * len(images)
    assert encoded.input_ids.count(processor.tokenizer.bos_token_id) == 1


def test_the_ids_before_the_answer_are_those_of_the_prompt_at_inference(processor: AdaVTPProcessor) -> None:
    prompt = processor.of_questions(picture(), "which digit is red ?")["input_ids"][0].tolist()
    encoded = encode_conversation(processor, [user("which digit is red ?", 1), assistant("7")], NUM_PATCHES)
    first_target = next(index for index, label in enumerate(encoded.labels) if label != -100)
    assert encoded.input_ids[:first_target] == prompt


def test_a_template_that_writes_bos_before_a_tokenizer_that_adds_it_gives_one() -> None:
    processor = llava_processor()
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    encoded = encode_conversation(processor, [user("is there a 3 ?", 1), assistant("no")], NUM_PATCHES)
    without = encode_conversation(llava_processor(), [user("is there a 3 ?", 1), assistant("no")], NUM_PATCHES)
    assert encoded.input_ids.count(processor.tokenizer.bos_token_id) == 1
    assert target_texts(processor, encoded.input_ids, encoded.labels) == ["no</s>"]
    assert encoded.labels[-2:] == without.labels[-2:]


def test_a_tokenizer_without_bos_gets_none() -> None:
    processor = digit_processor()
    processor.chat_template = processor.chat_template.replace("{{ bos_token }}", "")
    processor.tokenizer.bos_token = None
    encoded = encode_conversation(processor, [user("is there a 3 ?", 1), assistant("no")], NUM_PATCHES)
    assert processor.tokenizer.decode(encoded.input_ids).startswith("USER:")
    assert target_texts(processor, encoded.input_ids, encoded.labels) == ["no </s>"]


def test_a_string_as_content_is_the_same_as_one_text(processor: AdaVTPProcessor) -> None:
    parts = [user("is there a 3 ?"), assistant("no")]
    strings = [{"role": "user", "content": "is there a 3 ?"}, {"role": "assistant", "content": "no"}]
    assert encode_conversation(processor, strings, 0) == encode_conversation(processor, parts, 0)


def test_fields_that_a_data_set_fills_with_none_change_nothing(processor: AdaVTPProcessor) -> None:
    parts = [user("is there a 3 ?", 1), assistant("no")]
    filled = [
        {
            "role": message["role"],
            "content": [{"type": part["type"], "text": part.get("text"), "url": None} for part in message["content"]],
            "name": None,
        }
        for message in parts
    ]
    assert encode_conversation(processor, filled, NUM_PATCHES) == encode_conversation(processor, parts, NUM_PATCHES)


def test_an_empty_answer_is_an_end(processor: AdaVTPProcessor) -> None:
    encoded = encode_conversation(processor, [user("is there a 3 ?", 1), assistant("")], NUM_PATCHES)
    assert encoded.labels[-1] == processor.tokenizer.eos_token_id
    assert [label for label in encoded.labels[:-1] if label != -100] == []


@pytest.mark.parametrize(
    ("messages", "message"),
    [([], "begins with a message of the user"), ([assistant("no")], "begins with a message of the user")],
)
def test_a_conversation_begins_with_the_user(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_conversation(digit_processor(), messages, NUM_PATCHES)


def test_an_image_without_placeholders_is_an_error_and_does_not_vanish(processor: AdaVTPProcessor) -> None:
    with pytest.raises(ValueError, match="shows an image"):
        encode_conversation(processor, [user("is there a 3 ?", 1), assistant("no")], 0)


def test_a_template_that_rewrites_earlier_turns_is_an_error() -> None:
    processor = digit_processor()
    processor.chat_template = "{{ messages | length }}" + processor.chat_template
    messages = CONVERSATIONS["three turns"][0]
    with pytest.raises(ValueError, match="only appends"):
        encode_conversation(processor, messages, NUM_PATCHES)


@pytest.mark.parametrize(("strategy", "additional"), [("default", 1), ("full", 1), ("full", 0)])
def test_placeholders_are_counted_as_the_processor_counts_them(strategy: str, additional: int) -> None:
    processor = digit_processor()
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = strategy, additional
    inputs = processor(images=picture(), text="<s>USER: <image>", return_tensors="pt")
    pixel_values: torch.Tensor = inputs["pixel_values"]
    in_prompt = int((inputs["input_ids"] == processor.image_token_id).sum())
    assert image_tokens(processor, pixel_values).num_placeholders == in_prompt


def test_a_system_prompt_that_the_template_leaves_out_is_an_error(processor: AdaVTPProcessor) -> None:
    messages = [{"role": "system", "content": " be brief "}, user("is there a 3 ?"), assistant("no")]
    ids = encode_conversation(processor, messages, 0).input_ids
    assert len(ids) > len(encode_conversation(processor, messages[1:], 0).input_ids)
    silent = copy.copy(processor)
    silent.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content[0].text }} {% endfor %}"
    with pytest.raises(ValueError, match="does not print the system prompt ' be brief '"):
        encode_conversation(silent, messages, 0)
