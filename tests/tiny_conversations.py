"""Conversations about small pictures, and processors and models that understand them."""

import string
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from tiny_models import IMAGE_SIZE, PATCH_SIZE, tiny_model, tiny_text_config
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.trainer.digit_processor import build_digit_processor

# The template in the folder llava-hf/llava-1.5-7b-hf. It writes neither BOS nor EOS, and a space behind every turn.
LLAVA_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

QUESTIONS = ["what colour is the 7 ?", "which digit is red ?", "how many digits are there ?", "is there a 3 ?"]
ANSWERS = ["red", "7", "4", "yes"]


def digit_processor() -> AdaVTPProcessor:
    """The reference model's processor, for images of `IMAGE_SIZE`."""
    return build_digit_processor(IMAGE_SIZE, PATCH_SIZE)


def llava_processor() -> AdaVTPProcessor:
    """LLaVA-1.5's chat template, with a tokenizer of the kind that Llama has: subwords, and BOS before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # Words are split before they are merged, so that no token reaches over a space, as Llama's do not.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=True)
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    text = ["USER: \n red ASSISTANT: 7 , the blue 3 USER: what ASSISTANT: yes USER:", *QUESTIONS, *ANSWERS]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=list(string.printable))
    tokenizer.train_from_iterator(text * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return AdaVTPProcessor(
        CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
            padding_side="left",
        ),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=LLAVA_CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


PROCESSORS = {"digits": digit_processor, "llava": llava_processor}


def digit_model(processor: AdaVTPProcessor, seed: int = 0, **adavtp_fields: Any) -> AdaVTPForConditionalGeneration:
    """A tiny model over the processor's vocabulary."""
    fields = {
        "text_config": tiny_text_config(vocab_size=len(processor.tokenizer)),
        "image_token_index": processor.image_token_id,
        "tie_word_embeddings": False,
    }
    return tiny_model(seed=seed, **(fields | adavtp_fields))


def picture(seed: int = 0, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    """Coloured noise."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def user(text: str, num_images: int = 0) -> dict[str, Any]:
    """The user's message: images, then text."""
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    """The assistant's message."""
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def conversation_rows(num_rows: int, images_per_row: Sequence[int] = (1,)) -> list[dict[str, Any]]:
    """Rows of one question and its answer; how many images they show goes through `images_per_row` again and again."""
    rows = []
    for index in range(num_rows):
        num_images, kind = images_per_row[index % len(images_per_row)], index % len(QUESTIONS)
        messages = [user(QUESTIONS[kind], num_images), assistant(ANSWERS[(kind + index // 4) % len(ANSWERS)])]
        rows.append({"images": [picture(10 * index + n) for n in range(num_images)], "messages": messages})
    return rows


def scene_rows(num_rows: int) -> list[dict[str, Any]]:
    """Rows as `load_digit_scenes` has them, with more questions in each row than in the one before."""
    captions = ["red 7 , blue 3", "white 1 , green 2 , cyan 9"]
    return [
        {
            "image": picture(index),
            "caption": captions[index % 2],
            "questions": QUESTIONS[: 2 + index],
            "answers": ANSWERS[: 2 + index],
        }
        for index in range(num_rows)
    ]


def target_texts(processor: AdaVTPProcessor, input_ids: list[int], labels: list[int]) -> list[str]:
    """What each unbroken run of targets says."""
    runs, previous = [], False
    for token, label in zip(input_ids, labels, strict=True):
        assert label in (token, -100)
        if label != -100:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = label != -100
    return [processor.tokenizer.decode(run) for run in runs]
