"""The processors: images as people have them, prompts in every form, and the digit scenes' own words."""

import base64
import functools
import io
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.modeling.processing_adavtp import inputs_of_questions
from adavtp.tasks.digit_scenes import VOCABULARY, ask_questions, draw_scene
from adavtp.tasks.digit_scenes.processor import build_digit_processor
from tiny_models import tiny_config, tiny_model
from tiny_processors import family_processor

NUM_PATCHES = 16
QUESTION = "what colour is the 7 ?"
PROMPT = f"<s>USER: <image> {QUESTION} ASSISTANT:"


@pytest.fixture(scope="module")
def processor() -> AdaVTPProcessor:
    return build_digit_processor(image_size=32, patch_size=8)


@pytest.fixture(scope="module")
def model(processor: AdaVTPProcessor) -> AdaVTPForConditionalGeneration:
    model = tiny_model(image_token_index=processor.image_token_id, seed=1)
    model.generation_config.max_new_tokens = 4
    model.processor = processor
    return model


def _picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _pixels(processor: AdaVTPProcessor, image: Any, **kwargs: Any) -> torch.Tensor:
    return processor(images=image, text=PROMPT, return_tensors="pt", **kwargs)["pixel_values"]


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "RGBX"])
def test_modes_that_hold_the_same_colours_give_the_same_pixels(mode: str, processor: AdaVTPProcessor) -> None:
    assert torch.equal(_pixels(processor, _picture().convert(mode)), _pixels(processor, _picture()))


@pytest.mark.parametrize("mode", ["L", "LA", "La", "1", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB", "RGBa"])
def test_every_mode_is_read_as_the_colours_that_it_shows(mode: str, processor: AdaVTPProcessor) -> None:
    image = _picture().convert({"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, mode))
    shown = image.convert("RGB")
    assert torch.equal(_pixels(processor, image.convert(mode)), _pixels(processor, shown))


@pytest.mark.parametrize("transparency", [3, bytes([0, 100, 200])])
def test_a_palette_with_transparency_is_read_without_a_warning(
    transparency: int | bytes, processor: AdaVTPProcessor
) -> None:
    image = _picture().convert("P")
    shown = image.convert("RGB")
    image.info["transparency"] = transparency
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(_pixels(processor, image), _pixels(processor, shown))


@pytest.mark.parametrize("byte_order", ["I;16", "I;16B"])
def test_sixteen_bits_are_scaled_and_not_clipped(byte_order: str, processor: AdaVTPProcessor) -> None:
    grey = np.asarray(_picture().convert("L"))
    wide = (grey.astype(np.uint16) * 257).astype(">u2" if byte_order.endswith("B") else "<u2")
    image = Image.frombytes(byte_order, (32, 32), wide.tobytes())
    assert torch.equal(_pixels(processor, image), _pixels(processor, Image.fromarray(grey)))


def _as_tensor(dtype: torch.dtype = torch.uint8) -> Callable[[np.ndarray], torch.Tensor]:
    return lambda pixels: torch.tensor(pixels).permute(2, 0, 1).to(dtype)


ARRAYS = {
    "channels last": lambda pixels: pixels,
    "channels first": lambda pixels: pixels.transpose(2, 0, 1),
    "a view with negative strides": lambda pixels: pixels[::-1][::-1],
    "floats": lambda pixels: pixels.astype(np.float32),
    "whole numbers": lambda pixels: pixels.astype(np.int64),
    "a batch of one": lambda pixels: pixels[None],
    "a tensor": _as_tensor(),
    "a bfloat16 tensor": _as_tensor(torch.bfloat16),
    "a tensor, channels last": torch.tensor,
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_and_tensors_give_the_pixels_of_the_picture(form: str, processor: AdaVTPProcessor) -> None:
    array = ARRAYS[form](np.asarray(_picture()))
    assert torch.equal(_pixels(processor, array), _pixels(processor, _picture()))


@pytest.mark.parametrize("shape", [(32, 32), (1, 32, 32), (32, 32, 1)])
@pytest.mark.parametrize("to", [np.asarray, torch.tensor])
def test_grey_arrays_become_three_equal_channels(
    to: Callable, shape: tuple[int, ...], processor: AdaVTPProcessor
) -> None:
    grey = _picture().convert("L")
    assert torch.equal(_pixels(processor, to(np.array(grey).reshape(shape))), _pixels(processor, grey))


def test_scaled_arrays_pass_where_scaling_is_switched_off(processor: AdaVTPProcessor) -> None:
    scaled = np.asarray(_picture(), dtype=np.float32) / 255
    whole = {"do_resize": False, "do_center_crop": False}
    found, expected = _pixels(processor, scaled, do_rescale=False, **whole), _pixels(processor, _picture(), **whole)
    torch.testing.assert_close(found, expected)


def _sixteen_bits() -> Image.Image:
    wide = np.asarray(_picture().convert("L")).astype("<u2") * 257
    return Image.frombytes("I;16", (32, 32), wide.tobytes())


def _lying() -> Image.Image:
    image = _picture()
    image.getexif()[0x0112] = 6
    return image


def _see_through() -> Image.Image:
    image = _picture().convert("P")
    image.info["transparency"] = bytes(range(256))
    return image


# What a file may hold, and the colours that it shows.
FILES = {
    "RGB": (_picture, _picture),
    "sixteen bits": (_sixteen_bits, lambda: _picture().convert("L").convert("RGB")),
    "lying on its side": (_lying, lambda: _picture().transpose(Image.Transpose.ROTATE_270)),
    "a palette with transparency": (_see_through, lambda: _see_through().convert("RGBA").convert("RGB")),
    "grey": (lambda: _picture().convert("L"), lambda: _picture().convert("L").convert("RGB")),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder, and where a server shows it."""
    folder = tmp_path_factory.mktemp("served")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("kind", FILES)
def test_an_image_is_read_alike_whatever_way_it_comes_in(
    kind: str, processor: AdaVTPProcessor, served: tuple[Path, str]
) -> None:
    image, shown = (make() for make in FILES[kind])
    folder, address = served
    file = folder / f"{len(kind)}.png"
    image.save(file, exif=image.getexif())
    expected = _pixels(processor, shown)
    encoded = base64.b64encode(file.read_bytes()).decode()
    ways = {
        "object": image,
        "opened": Image.open(file),
        "path": file,
        "string": str(file),
        "base64": encoded,
        "data": f"data:image/png;base64,{encoded}",
        "address": f"{address}/{file.name}",
    }
    for way, given in ways.items():
        assert torch.equal(_pixels(processor, given), expected), way
    message = [{"role": "user", "content": [{"type": "image", "path": str(file)}, {"type": "text", "text": QUESTION}]}]
    inputs = processor.apply_chat_template(message, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected)


def test_a_single_pixel_is_an_image(processor: AdaVTPProcessor) -> None:
    assert _pixels(processor, Image.new("1", (1, 1))).shape == (1, 3, 32, 32)


PIXELS = np.asarray(_picture())

UNREADABLE = {
    "nothing": (None, "is a NoneType"),
    "a number": (3, "is a int"),
    "a dictionary": ({}, "is a dict"),
    "bytes": (b"abc", "is a bytes"),
    "no width": (Image.new("RGB", (0, 5)), r"has size \(0, 5\)"),
    "integers without a range": (Image.new("I", (4, 4)), "has pixel format 'I'"),
    "floats without a range": (Image.new("F", (4, 4)), "has pixel format 'F'"),
    "no file": ("nowhere/nothing.png", "is 'nowhere/nothing.png', from which no image can be loaded"),
    "a long text": ("x" * 5000, r"is 'x{100}\.\.\.', from which"),
    "a folder": (Path("."), "from which no image can be loaded"),
    "a server that is not there": ("http://127.0.0.1:9/a.png", "from which no image can be loaded"),
    "an empty array": (PIXELS[:0], r"has shape \(0, 32, 3\)"),
    "a row": (PIXELS[0, 0], r"has shape \(3,\)"),
    "four channels": (np.dstack([PIXELS, PIXELS[..., :1]]), r"has shape \(32, 32, 4\)"),
    "fractions": (PIXELS.astype(np.float32) / 255, "values from 0 to 1; expected .* or `do_rescale=False`"),
    "a mask": (PIXELS > 100, "is an array of bool"),
    "sixteen bits": (PIXELS.astype(np.uint16) * 257, "values from 0 to 65535"),
    "negative values": (PIXELS.astype(np.float32) - 300, "values from -300"),
    "NaN": (PIXELS * np.float32("nan"), "values from nan"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_an_image_that_cannot_be_read_is_refused_by_its_place(kind: str, processor: AdaVTPProcessor) -> None:
    image, message = UNREADABLE[kind]
    with pytest.raises(ValueError, match=rf"`images\[1\]` .*{message}"):
        processor(images=[_picture(), image], text=[PROMPT, PROMPT])


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"])
def test_a_file_that_is_cut_off_is_refused_by_its_place(
    file_format: str, opened: bool, processor: AdaVTPProcessor, tmp_path: Path
) -> None:
    buffer = io.BytesIO()
    _picture().save(buffer, file_format)
    file = tmp_path / "cut"
    file.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    image: Any = file
    if opened:
        try:
            image = Image.open(file)
        except OSError:
            pytest.skip("this format shows already when opened that it is cut off")
    with pytest.raises(ValueError, match=r"`images\[0\]` cannot be decoded"):
        processor(images=image, text=PROMPT)


# ---------------------------------------------------------------------------------------------------------------------
# Budgets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token_budget", "expected"), [(0.4, [0.4, 0.4]), ([0.25, 1.0], [0.25, 1.0]), (8, [8, 8]), ([2, 900], [2, 900])]
)
def test_a_budget_comes_out_once_for_each_prompt(
    token_budget: Any, expected: list[float], processor: AdaVTPProcessor
) -> None:
    features = processor(images=[_picture(), _picture(1)], text=[PROMPT, PROMPT], token_budget=token_budget)
    assert features["token_budget"].tolist() == expected


@pytest.mark.parametrize("token_budget", [1.5, -0.1, float("nan"), 1, True, "0.4", [0.4], [0.4, 0.5, 0.6], [0.4, 8]])
def test_a_budget_that_is_not_allowed_is_refused(token_budget: Any, processor: AdaVTPProcessor) -> None:
    with pytest.raises(ValueError, match="`token_budget`"):
        processor(images=[_picture(), _picture(1)], text=[PROMPT, PROMPT], token_budget=token_budget)


def test_images_alone_are_a_batch_of_their_own(processor: AdaVTPProcessor) -> None:
    features = processor(images=[_picture(), _picture(1)], token_budget=0.4, return_tensors="pt")
    assert features["token_budget"].tolist() == [0.4, 0.4]
    assert features["pixel_values"].shape == (2, 3, 32, 32)


def test_what_the_processor_returns_goes_into_the_model_as_it_is(
    processor: AdaVTPProcessor, model: AdaVTPForConditionalGeneration
) -> None:
    features = processor(images=_picture(), text=PROMPT, token_budget=0.4, return_tensors="pt")
    assert model(**features).selection.keep.sum() == 6
    assert (
        model.generate(**features).tolist()
        == model.generate(**processor(images=_picture(), text=PROMPT, return_tensors="pt"), token_budget=0.4).tolist()
    )


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------


def _rows(features: dict[str, torch.Tensor]) -> list[list[int]]:
    return [
        ids[mask.bool()].tolist() for ids, mask in zip(features["input_ids"], features["attention_mask"], strict=True)
    ]


def test_a_question_goes_into_the_chat_template(processor: AdaVTPProcessor) -> None:
    found, expected = processor.of_questions(_picture(), QUESTION), processor(images=_picture(), text=PROMPT)
    assert _rows(found) == expected["input_ids"]
    assert found["pixel_values"].shape == (1, 3, 32, 32)


def test_a_prompt_with_the_placeholder_in_it_is_used_as_it_is(processor: AdaVTPProcessor) -> None:
    (row,) = _rows(processor.of_questions(_picture(), "the <image> is"))
    assert processor.tokenizer.decode(row).replace("<image>", "").split() == ["the", "is"]


def test_one_prompt_is_asked_of_every_image(processor: AdaVTPProcessor) -> None:
    features = processor.of_questions([_picture(), _picture(1), _picture(2)], QUESTION)
    assert _rows(features) == _rows(processor.of_questions(_picture(), QUESTION)) * 3
    assert len(features["pixel_values"]) == 3


def test_prompts_of_several_lengths_are_padded_on_the_left(processor: AdaVTPProcessor) -> None:
    features = processor.of_questions([_picture(), _picture(1)], [QUESTION, "red ?"])
    assert features["attention_mask"][:, -1].tolist() == [1, 1]
    assert _rows(features)[1] == _rows(processor.of_questions(_picture(), "red ?"))[0]


def test_one_prompt_may_show_several_images_and_another_none(processor: AdaVTPProcessor) -> None:
    features = processor.of_questions([[_picture(), _picture(1)], None, []], [QUESTION] * 3)
    places = (features["input_ids"] == processor.image_token_id).sum(dim=1)
    assert places.tolist() == [2 * NUM_PATCHES, 0, 0]
    expected = torch.cat([_pixels(processor, _picture()), _pixels(processor, _picture(1))])
    assert torch.equal(features["pixel_values"], expected)


@pytest.mark.parametrize("prompts", [QUESTION, [QUESTION, QUESTION]])
def test_no_image_is_a_question_of_words(prompts: Any, processor: AdaVTPProcessor) -> None:
    features = processor.of_questions(None, prompts)
    assert "pixel_values" not in features
    assert len(features["input_ids"]) == (1 if prompts == QUESTION else 2)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        ([_picture()] * 3, [QUESTION] * 2, r"3 image\(s\) and `prompt` has 2 prompt\(s\)"),
        (_picture(), [QUESTION] * 2, r"1 image\(s\) and `prompt` has 2"),
        ([], QUESTION, r"0 image\(s\) and `prompt` has 1"),
        ([], [], r"0 image\(s\) and `prompt` has 0"),
        ([[_picture()] * 2, []], ["<image> a", "<image> a"], r"`images\[0\]` has 2 image\(s\) and `text\[0\]` has 1"),
        ([_picture()], ["<image> <image>"], r"`images\[0\]` has 1 image\(s\) and `text\[0\]` has 2"),
        (None, "<image> a", r"`images\[0\]` has 0 image\(s\) and `text\[0\]` has 1"),
    ],
)
def test_counts_that_do_not_match_are_refused(
    images: Any, prompts: Any, message: str, processor: AdaVTPProcessor
) -> None:
    with pytest.raises(ValueError, match=message):
        processor.of_questions(images, prompts)


def test_images_and_prompts_are_matched_prompt_by_prompt(processor: AdaVTPProcessor) -> None:
    with pytest.raises(ValueError, match=r"`images\[0\]` has 2 image\(s\) and `text\[0\]` has 1"):
        processor(images=[[_picture(), _picture()], []], text=[PROMPT, PROMPT])
    with pytest.raises(ValueError, match=r"lists for 1 prompt\(s\) and `text` has 2"):
        processor(images=[[_picture(), _picture()]], text=[PROMPT, PROMPT])


def test_a_question_without_a_chat_template_is_refused(processor: AdaVTPProcessor) -> None:
    bare = AdaVTPProcessor(
        processor.image_processor, processor.tokenizer, patch_size=8, vision_feature_select_strategy="default"
    )
    with pytest.raises(ValueError, match="`prompt` is .*the 7.* and this processor has no chat template"):
        bare.of_questions(_picture(), QUESTION)


def test_the_beginning_of_the_text_is_marked_once_whoever_marks_it(processor: AdaVTPProcessor) -> None:
    from tokenizers.processors import TemplateProcessing

    marking = build_digit_processor(image_size=32, patch_size=8)
    bos = (marking.tokenizer.bos_token, marking.tokenizer.bos_token_id)
    marking.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", special_tokens=[bos]
    )
    assert marking.tokenizer("red").input_ids[0] == bos[1]
    assert _rows(marking.of_questions(_picture(), QUESTION)) == _rows(processor.of_questions(_picture(), QUESTION))


# ---------------------------------------------------------------------------------------------------------------------
# generate(image, prompt)
# ---------------------------------------------------------------------------------------------------------------------


def test_one_image_and_one_prompt_give_one_answer(model: AdaVTPForConditionalGeneration, tmp_path: Path) -> None:
    _picture().save(tmp_path / "a.png")
    answers = {
        model.generate(image, QUESTION, token_budget=0.4)
        for image in (_picture(), np.asarray(_picture()), str(tmp_path / "a.png"), tmp_path / "a.png")
    }
    (answer,) = answers
    assert isinstance(answer, str) and answer
    assert model.generate(_picture(), prompt=QUESTION, token_budget=0.4) == answer


def test_lists_give_lists(model: AdaVTPForConditionalGeneration) -> None:
    one, other = (model.generate(_picture(seed), QUESTION, token_budget=0.4) for seed in (0, 1))
    assert model.generate([_picture()], QUESTION, token_budget=0.4) == [one]
    assert model.generate([_picture(), _picture(1)], QUESTION, token_budget=0.4) == [one, other]
    assert model.generate([_picture(), _picture(1)], [QUESTION] * 2, token_budget=0.4) == [one, other]
    assert model.generate(_picture(), [QUESTION], token_budget=[0.4]) == [one]


def test_each_question_may_have_its_own_budget(model: AdaVTPForConditionalGeneration) -> None:
    apart = [model.generate(_picture(), QUESTION, token_budget=budget) for budget in (0.2, 1.0)]
    assert model.generate([_picture(), _picture()], QUESTION, token_budget=[0.2, 1.0]) == apart


def test_several_images_in_one_prompt_and_none_at_all_are_answered(model: AdaVTPForConditionalGeneration) -> None:
    (answer,) = model.generate([[_picture(), _picture(1)]], [QUESTION], token_budget=0.4)
    assert isinstance(answer, str)
    assert isinstance(model.generate(None, QUESTION), str)


def test_an_image_without_a_prompt_is_refused(model: AdaVTPForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="`inputs` is a Image and there is no prompt"):
        model.generate(_picture())


def test_a_model_without_a_checkpoint_says_that_it_needs_a_processor() -> None:
    with pytest.raises(ValueError, match="set `model.processor"):
        tiny_model().generate(_picture(), QUESTION)


# ---------------------------------------------------------------------------------------------------------------------
# The digit scenes' processor
# ---------------------------------------------------------------------------------------------------------------------


def test_every_word_of_the_scenes_is_one_token(processor: AdaVTPProcessor) -> None:
    tokenizer = processor.tokenizer
    ids = [tokenizer(word).input_ids for word in VOCABULARY]
    assert all(len(word) == 1 for word in ids) and len({word[0] for word in ids}) == len(VOCABULARY)
    assert tokenizer.unk_token_id not in {word[0] for word in ids}
    for question in ask_questions(draw_scene("train", 0), np.random.default_rng(0)):
        tokens = tokenizer(f"{question.question} {question.answer}").input_ids
        assert tokenizer.decode(tokens) == f"{question.question} {question.answer}"


def test_spelling_is_forgiven_and_an_unknown_word_is_unknown(processor: AdaVTPProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer("What  COLOUR is the 7?").input_ids == tokenizer(QUESTION).input_ids
    assert tokenizer("what\ncolour is the 7?").input_ids == tokenizer(QUESTION).input_ids
    assert tokenizer.convert_ids_to_tokens(tokenizer("the zebra").input_ids) == ["the", "<unk>"]


def test_a_conversation_has_llavas_form_and_begins_once(processor: AdaVTPProcessor) -> None:
    conversation = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "how many digits are there ?"},
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == (f"<s>USER: <image> {QUESTION} ASSISTANT: red</s>USER: how many digits are there ? ASSISTANT:")
    one_answer = f"<s>USER: <image> {QUESTION} ASSISTANT: red</s>"
    assert processor.apply_chat_template(conversation[:2]) == one_answer
    assert processor.apply_chat_template([conversation[0], {"role": "assistant", "content": "red"}]) == one_answer
    for ids in (
        processor(images=_picture(), text=text)["input_ids"][0],
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", "image": _picture()}, {"type": "text", "text": "a"}]}],
            tokenize=True,
            return_dict=True,
        )["input_ids"][0],
    ):
        assert list(ids).count(processor.tokenizer.bos_token_id) == 1


def test_the_template_marks_what_the_assistant_says(processor: AdaVTPProcessor) -> None:
    conversation = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "red"}] * 2
    encoded = processor.tokenizer.apply_chat_template(
        conversation,
        chat_template=processor.chat_template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marked = [
        token for token, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_answer
    ]
    assert processor.tokenizer.convert_ids_to_tokens(marked) == ["red", "</s>"] * 2


def test_answers_are_read_without_special_tokens(processor: AdaVTPProcessor) -> None:
    ids = processor.tokenizer("USER: <image> the 7 ASSISTANT: red</s><pad>").input_ids
    assert processor.batch_decode([ids], skip_special_tokens=True) == ["the 7 red"]


def test_the_processor_comes_back_from_a_folder_as_it_was(processor: AdaVTPProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AdaVTPProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    for form in (PROMPT, "no such <image> words ,"):
        before, after = (part(images=_picture(), text=form, return_tensors="pt") for part in (processor, loaded))
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert loaded.chat_template == processor.chat_template
    assert loaded.tokenizer.padding_side == processor.tokenizer.padding_side
    assert _rows(loaded.of_questions(_picture(), QUESTION)) == _rows(processor.of_questions(_picture(), QUESTION))


def test_a_folder_that_leaves_the_patch_size_to_the_model_loads(processor: AdaVTPProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    fields = json.loads(file.read_text())
    older = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens")
    file.write_text(json.dumps({name: value for name, value in fields.items() if name not in older}))
    with pytest.raises(ValueError, match="`patch_size` is None"):
        AdaVTPProcessor.from_pretrained(tmp_path)(images=_picture(), text=PROMPT)
    tiny_config().save_pretrained(tmp_path)
    ids = AdaVTPProcessor.from_pretrained(tmp_path)(images=_picture(), text=PROMPT)["input_ids"]
    assert ids == processor(images=_picture(), text=PROMPT)["input_ids"]


def test_the_picture_is_scaled_and_cropped_to_the_models_square() -> None:
    features = build_digit_processor()(images=_picture(size=(120, 100)), text=PROMPT, return_tensors="pt")
    assert features["pixel_values"].shape == (1, 3, 96, 96)
    assert features["pixel_values"].min() >= -1 and features["pixel_values"].max() <= 1
    assert (features["input_ids"] == build_digit_processor().image_token_id).sum() == 144


@pytest.mark.parametrize(("image_size", "patch_size"), [(100, 8), (0, 8), (8, 16), (32, 0)])
def test_sizes_that_do_not_fit_are_refused(image_size: int, patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"`image_size` is {image_size} and `patch_size` is {patch_size}"):
        build_digit_processor(image_size, patch_size)


def test_saving_leaves_a_processor_as_it_was(processor: AdaVTPProcessor, tmp_path: Path) -> None:
    before = processor.to_dict()
    processor.save_pretrained(tmp_path)
    assert processor.to_dict() == before
    assert AdaVTPProcessor.from_pretrained(tmp_path).to_dict() == before


def test_a_conversation_goes_into_the_chat_template_once(processor: AdaVTPProcessor) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "which digit is red ?"}]}]
    asked = processor.of_questions(None, "which digit is red ?")["input_ids"]
    assert torch.equal(inputs_of_questions(processor, None, [turns])["input_ids"], asked)


@pytest.mark.parametrize("name", ["llava_next", "idefics3", "qwen2_5_vl"])
def test_a_question_to_another_family_is_what_its_own_chat_template_makes_of_it(name: str) -> None:
    processor = family_processor(name)
    images = [Image.new("RGB", (60, 40), "red"), Image.new("RGB", (30, 70), "blue")]
    made = inputs_of_questions(processor, [images, [images[0]]], ["which ?", "how many ?"])
    questions = [{"type": "text", "text": text} for text in ("which ?", "how many ?")]
    turns = [
        [{"role": "user", "content": [*({"type": "image", "image": image} for image in own), words]}]
        for own, words in zip([images, images[:1]], questions, strict=True)
    ]
    expected = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[key], expected[key]) for key in expected)
    # Turns say where images stand; the images themselves go beside them.
    conversation = [{"role": "user", "content": [{"type": "image"}, questions[1]]}]
    alone = inputs_of_questions(processor, [[images[0]]], [conversation])
    assert torch.equal(alone["input_ids"], inputs_of_questions(processor, images[0], "how many ?")["input_ids"])
    with pytest.raises(ValueError, match="places for 1 image"):
        inputs_of_questions(processor, [images], [conversation])
