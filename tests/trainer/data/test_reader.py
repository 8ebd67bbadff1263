"""What the reader makes of rows: encoded conversations with their images, or a rejection that says what to do."""

import contextlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from adavtp import AdaVTPProcessor
from adavtp.modeling.processing_adavtp import readable_images
from adavtp.trainer.data.chat_template import encode_conversation
from adavtp.trainer.data.reader import ConversationReader, RejectedSample
from tiny_conversations import (
    PROCESSORS,
    assistant,
    conversation_rows,
    digit_processor,
    llava_processor,
    picture,
    target_texts,
    user,
)
from tiny_models import IMAGE_SIZE, NUM_PATCHES

RED, BLUE = (220, 10, 10), (10, 10, 220)


@pytest.fixture(params=PROCESSORS, scope="module")
def processor(request: pytest.FixtureRequest) -> AdaVTPProcessor:
    return PROCESSORS[request.param]()


@pytest.fixture(scope="module")
def reader() -> ConversationReader:
    return ConversationReader(digit_processor())


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def stored(content: bytes | None = None, path: Path | str | None = None) -> dict[str, Any]:
    """An image as `datasets.Image(decode=False)` gives it."""
    return {"bytes": content, "path": None if path is None else str(path)}


def row(*images: Any, messages: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    messages = messages or [user("which digit is red ?", len(images)), assistant("7")]
    return {"id": "000000033471", "images": list(images), "messages": messages}


def rejection(reader: ConversationReader, given: dict[str, Any]) -> RejectedSample:
    with pytest.raises(RejectedSample) as caught:
        reader.read(given)
    assert caught.value.id == given["id"]
    assert given["id"] in str(caught.value)
    return caught.value


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_row_is_read_into_what_the_processor_makes_of_it_and_the_answers(
    processor: AdaVTPProcessor, num_images: int
) -> None:
    (given,) = conversation_rows(1, (num_images,))
    read = ConversationReader(processor).read(given | {"id": "a"})
    prompt = processor.of_questions([given["images"]], ["what colour is the 7 ?"])["input_ids"][0].tolist()
    assert read["id"] == "a"
    assert read["input_ids"][: len(prompt)] == prompt
    assert [text.strip() for text in target_texts(processor, read["input_ids"], read["labels"])] in (
        ["red </s>"],
        ["red</s>"],
    )
    assert [np.asarray(image).tolist() for image in read["images"]] == [
        np.asarray(image).tolist() for image in given["images"]
    ]


@pytest.mark.parametrize("images_per_row", [(0,), (1,), (3,)], ids=str)
def test_lengths_are_those_of_what_is_read_and_no_image_is_opened(
    processor: AdaVTPProcessor, images_per_row: tuple[int, ...]
) -> None:
    reader = ConversationReader(processor)
    for given in conversation_rows(8, images_per_row):
        ids = reader.read(given | {"id": "a"})["input_ids"]
        num_text_tokens = sum(token != processor.image_token_id for token in ids)
        missing = [stored(path="nowhere.jpg") for _ in given["images"]]
        assert reader.lengths(given | {"images": missing}) == (num_text_tokens, len(missing))
        assert len(ids) == num_text_tokens + len(missing) * NUM_PATCHES


def test_a_processor_whose_images_differ_in_size_is_refused() -> None:
    processor = digit_processor()
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, do_center_crop=False)
    with pytest.raises(ValueError, match="depends on the image"):
        ConversationReader(processor)


def test_images_keep_their_order_and_come_from_bytes_files_and_pil(reader: ConversationReader, tmp_path: Path) -> None:
    path = tmp_path / "blue.jpg"
    path.write_bytes(encoded(Image.new("RGB", (8, 8), BLUE), "JPEG", quality=95))
    given = row(stored(encoded(Image.new("RGB", (8, 8), RED))), stored(path=path), Image.new("RGB", (8, 8), RED))
    colours = [np.asarray(image)[4, 4] for image in reader.read(given)["images"]]
    for colour, expected in zip(colours, (RED, BLUE, RED), strict=True):
        assert np.abs(colour.astype(int) - expected).max() < 8


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "LA", "1", "I;16"])
def test_any_pixel_format_becomes_rgb_of_the_same_picture(reader: ConversationReader, mode: str) -> None:
    grey = Image.fromarray(np.tile(np.array([[0, 255]], np.uint8).repeat(8, 1), (16, 1)))
    image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    (read,) = reader.read(row(stored(encoded(image, "TIFF"))))["images"]
    assert (read.mode, read.size) == ("RGB", (16, 16))
    assert np.asarray(read)[8, 2].tolist() == [0, 0, 0]
    assert np.asarray(read)[8, 13].tolist() == [255, 255, 255]


def test_a_photograph_is_turned_upright(reader: ConversationReader) -> None:
    lying = Image.new("RGB", (16, 8), RED)
    lying.paste(BLUE, (8, 0, 16, 8))
    exif = Image.Exif()
    # 6: the top of what is stored is the right side of what was seen.
    exif[0x0112] = 6
    (read,) = reader.read(row(stored(encoded(lying, "PNG", exif=exif.tobytes()))))["images"]
    assert read.size == (8, 16)
    assert np.asarray(read)[2, 4].tolist() == list(RED)
    assert np.asarray(read)[13, 4].tolist() == list(BLUE)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.parametrize("exif", [b"Exif\x00\x00not a TIFF file", b"Exif\x00\x00MM\x00*"])
def test_metadata_that_cannot_be_read_do_not_cost_the_image(
    form: str, exif: bytes, reader: ConversationReader
) -> None:
    plain, marked = (encoded(picture(), form, **more) for more in ({}, {"exif": exif}))
    expected = Image.open(io.BytesIO(plain)).convert("RGB")
    (read,) = reader.read(row(stored(marked)))["images"]
    # As whoever has turned it, or tried to, hands it on.
    again = Image.open(io.BytesIO(marked))
    with contextlib.suppress(Exception):
        again = ImageOps.exif_transpose(again)
    for image in (read, *readable_images([again, again])):
        assert np.array_equal(image, expected)


WHOLE_JPEG = encoded(picture(size=(64, 64)), "JPEG")
WHOLE_PNG = encoded(picture(size=(64, 64)))

BROKEN_IMAGES: dict[str, tuple[Any, str]] = {
    "a JPEG cut off": (stored(WHOLE_JPEG[: len(WHOLE_JPEG) // 2]), "cannot be decoded: image file is truncated"),
    "a PNG cut off": (stored(WHOLE_PNG[: len(WHOLE_PNG) // 2]), "cannot be decoded"),
    "a PNG with a wrong byte": (
        stored(WHOLE_PNG[:60] + b"\x00" + WHOLE_PNG[61:]),
        "images\\[0\\]: cannot be decoded: ",
    ),
    "a header alone": (stored(WHOLE_JPEG[:10]), "cannot be decoded: Truncated"),
    "a page of HTML": (
        stored(b"<html>404</html>"),
        "images\\[0\\]: it is of no image format that Pillow knows$",
    ),
    "no bytes": (stored(b""), "the file is empty"),
    "nothing at all": (stored(), "neither bytes nor a path"),
    "a missing file": (
        stored(path="coco/a.jpg"),
        "images\\[0\\] \\(coco/a.jpg\\): there is no such file; see that `im",
    ),
    "a pixel format without a range": (stored(encoded(Image.new("F", (4, 4)), "TIFF")), "pixel format 'F'"),
    "no image": (7, "images\\[0\\]: is a int; expected"),
}


@pytest.mark.parametrize("case", BROKEN_IMAGES)
def test_a_broken_image_is_a_rejection_that_says_which_and_why(reader: ConversationReader, case: str) -> None:
    image, reason = BROKEN_IMAGES[case]
    rejected = rejection(reader, row(image))
    assert rejected.kind == "image"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(rejected.reason)
    whole = stored(WHOLE_PNG)
    assert "images[1]" in rejection(reader, row(whole, image)).reason


def test_an_image_of_too_many_pixels_to_be_meant_is_rejected(
    reader: ConversationReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    assert "decompression bomb" in rejection(reader, row(stored(WHOLE_PNG))).reason


def test_an_image_that_leaves_its_row_s_folder_is_rejected(reader: ConversationReader, tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(WHOLE_PNG)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/link.png").symlink_to(path)
    for name in (str(path), "images/../secret.png", "images/link.png"):
        given = row(stored(path=tmp_path / name))
        assert len(reader.read(given | {"image_folder": str(tmp_path)})["images"]) == 1
        assert "leads out of" in rejection(reader, given | {"image_folder": str(tmp_path / "images")}).reason


def test_a_file_that_is_cut_off_or_empty_is_named(reader: ConversationReader, tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    for content in (WHOLE_JPEG[:300], b""):
        path.write_bytes(content)
        assert str(path) in rejection(reader, row(stored(path=path))).reason


def test_more_tokens_than_allowed_at_full_budget_are_rejected_before_images_are_opened() -> None:
    processor = digit_processor()
    given = row(stored(WHOLE_PNG))
    length = len(ConversationReader(processor).read(given)["input_ids"])
    assert len(ConversationReader(processor, max_length=length).read(given)["input_ids"]) == length
    rejected = rejection(ConversationReader(processor, max_length=length - 1), row(stored()))
    assert rejected.kind == "length"
    assert rejected.reason == f"{length} tokens, 16 of them visual, are more than `max_length`, {length - 1}"
    with pytest.raises(RejectedSample, match="are more than"):
        ConversationReader(processor, max_length=length - 1).lengths(given)
    with pytest.raises(ValueError, match="`max_length` is 0"):
        ConversationReader(processor, max_length=0)


QUESTION, ANSWER = user("is there a 3 ?"), assistant("no")
BROKEN_CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no messages": ([], "there are no messages"),
    "the assistant first": ([ANSWER, QUESTION], "the turns are assistant, user; user and assistant take turns"),
    "the user twice": ([QUESTION, QUESTION, ANSWER], "the turns are user, user, assistant"),
    "the assistant twice": ([QUESTION, ANSWER, ANSWER], "the turns are user, assistant, assistant"),
    "a system prompt in the middle": ([QUESTION, {**ANSWER, "role": "system"}, ANSWER], "the turns are user, system"),
    "an unknown role": ([QUESTION, {**ANSWER, "role": "tool"}], "the turns are user, tool"),
    "no answer": ([QUESTION], "nothing to learn"),
    "an empty answer": ([QUESTION, assistant(" ")], "turn of the assistant's is empty"),
    "many turns of one": ([QUESTION] * 1000, "the turns are (user, ){8}...; user and"),
    "an image too many": ([user("is there a 3 ?", 1), ANSWER], "the messages show 1 image\\(s\\) and the row has 0"),
    "an image in the answer": (
        [QUESTION, {"role": "assistant", "content": [{"type": "image"}]}],
        "an image is shown by assistant",
    ),
    "a placeholder among the words": (
        [user("is there a <image> ?"), ANSWER],
        "the chat template shows 1 image\\(s\\) and the row has 0",
    ),
}


@pytest.mark.parametrize("case", BROKEN_CONVERSATIONS)
def test_a_conversation_that_is_none_is_rejected_by_both_ways_of_looking_at_it(
    reader: ConversationReader, case: str
) -> None:
    messages, reason = BROKEN_CONVERSATIONS[case]
    rejected = rejection(reader, {"id": "a", "images": [], "messages": messages})
    assert rejected.kind == "conversation"
    with pytest.raises(ValueError, match=reason):
        raise ValueError(rejected.reason)
    with pytest.raises(RejectedSample, match=reason):
        reader.lengths({"id": "a", "images": [], "messages": messages})


def test_an_image_that_no_message_shows_is_rejected(reader: ConversationReader) -> None:
    given = row(stored(WHOLE_PNG), messages=[QUESTION, ANSWER])
    assert rejection(reader, given).reason == "the messages show 0 image(s) and the row has 1"


def test_what_the_source_could_not_read_is_the_reason(reader: ConversationReader) -> None:
    given = {"id": "file.jsonl:3", "images": [], "messages": [], "problem": "the line is no JSON"}
    assert rejection(reader, given).reason == "the line is no JSON"


def test_a_conversation_that_the_template_refuses_is_rejected() -> None:
    processor = llava_processor()
    processor.chat_template = "{{ raise_exception('no system prompts here') }}"
    assert (
        "no system prompts here" in rejection(ConversationReader(processor), row(messages=[QUESTION, ANSWER])).reason
    )


def test_a_rejection_reaches_the_main_process_whole(reader: ConversationReader) -> None:
    rejected = rejection(reader, row(stored()))
    copy = pickle.loads(pickle.dumps(rejected))
    assert (copy.id, copy.reason, copy.kind, str(copy)) == (
        rejected.id,
        rejected.reason,
        rejected.kind,
        str(rejected),
    )


@pytest.mark.parametrize("num_turns", [1, 5, 40])
def test_a_conversation_is_tokenized_once_however_many_turns_it_has(
    monkeypatch: pytest.MonkeyPatch, num_turns: int
) -> None:
    processor, characters = llava_processor(), []
    of_tokenizer = type(processor.tokenizer).__call__

    def counted(tokenizer: Any, text: str, **options: Any) -> Any:
        characters.append(len(text))
        return of_tokenizer(tokenizer, text, **options)

    monkeypatch.setattr(type(processor.tokenizer), "__call__", counted)
    messages = [user("is there a 3 ?", 1), assistant("no")] + [QUESTION, ANSWER] * (num_turns - 1)
    encoded = encode_conversation(processor, messages, 576)
    assert encoded.input_ids.count(processor.image_token_id) == 576
    # Nor are the placeholders text that has to be taken apart again.
    assert characters == [len(processor.apply_chat_template(messages).rstrip() + "</s>")]


def test_no_placeholder_is_a_target(processor: AdaVTPProcessor) -> None:
    shown = {"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "red"}]}
    encoded = encode_conversation(processor, [QUESTION, shown], NUM_PATCHES)
    assert encoded.input_ids.count(processor.image_token_id) == NUM_PATCHES
    assert processor.image_token_id not in encoded.labels
