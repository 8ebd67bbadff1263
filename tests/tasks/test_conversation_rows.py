"""Records as people have them: what is read of them, and what would be learned as something else and is refused."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adavtp.tasks.conversation_rows import common_row, row_features, tar_row


def png(colour: tuple[int, int, int] = (220, 10, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


DATA = base64.b64encode(png()).decode()
DATA_URL = f"data:image/png;base64,{DATA}"
ANSWER = {"role": "assistant", "content": "A bus."}
# The common form of what is asked and answered in all of the records here.
ASKED = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]
ANSWERED = {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}
IN_FOLDER, EMBEDDED = {"bytes": None, "path": "/data/a.png"}, {"bytes": png(), "path": None}


def llava(**fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A bus."}]
    return {"id": "a", "image": "a.png", "conversations": turns} | fields


def asking(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Messages of which the first has these parts and the question behind them."""
    return {
        "messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What is this?"}]}, ANSWER]
    } | fields


# One conversation about one image, as other libraries write it, and where the image is.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LLaVA": (llava(), IN_FOLDER),
    "LLaVA with a list": (llava(image=["a.png"]), IN_FOLDER),
    "LLaVA with an image of datasets'": (llava(image={"bytes": png(), "path": "a.png"}), EMBEDDED | {"path": "a.png"}),
    "LLaVA with a data URL": (llava(image=DATA_URL), EMBEDDED),
    "LLaVA with images beside an empty image": (llava(image="", images=["a.png"]), IN_FOLDER),
    "LLaVA with an image beside empty images": (llava(images=[]), IN_FOLDER),
    "LLaVA with both, the same": (llava(images=["a.png"]), IN_FOLDER),
    "LLaVA with metadata": (llava(source="coco", height=3, metadata={"video": 1}, scores=[1]), IN_FOLDER),
    "LLaVA with fields that say nothing": (
        llava(video=None, audios=[], tools="[]", weight=1.0, system="", history=[], messages=None),
        IN_FOLDER,
    ),
    "OpenAI, an object with a data URL": (
        asking({"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}}),
        EMBEDDED,
    ),
    "OpenAI, a data URL": (asking({"type": "image_url", "image_url": DATA_URL}), EMBEDDED),
    "OpenAI, an object with a path": (asking({"type": "image_url", "image_url": {"url": "a.png"}}), IN_FOLDER),
    "OpenAI, weights of 1": (
        asking({"type": "image_url", "image_url": "a.png"}) | {"weight": 1},
        IN_FOLDER,
    ),
    "transformers, path": (asking({"type": "image", "path": "a.png"}), IN_FOLDER),
    "transformers, url": (asking({"type": "image", "url": "a.png"}), IN_FOLDER),
    "transformers, image": (asking({"type": "image", "image": "a.png"}), IN_FOLDER),
    "transformers, base64": (asking({"type": "image", "base64": DATA}), EMBEDDED),
    "transformers, base64 as a data URL": (asking({"type": "image", "base64": DATA_URL}), EMBEDDED),
    "datasets' empty fields": (
        asking({"type": "image", "path": "a.png", "text": None, "image_url": None, "audio": None}),
        IN_FOLDER,
    ),
    "the same image in both places": (asking({"type": "image", "path": "a.png"}, images=["a.png"]), IN_FOLDER),
    "TRL": (asking({"type": "image"}, images=["a.png"]), IN_FOLDER),
    "TRL, numbered": (asking({"type": "image", "index": 0}, images=["a.png"]), IN_FOLDER),
    "TRL, without a place": (
        {"messages": [{"role": "user", "content": "What is this?"}, ANSWER], "image": "a.png"},
        IN_FOLDER,
    ),
    "LLaMA-Factory, ShareGPT": (llava(image=None, images=["a.png"], videos=[], tools="", system=None), IN_FOLDER),
    "a data set of both forms of turns": (
        {
            "images": ["a.png"],
            "messages": [
                {"from": None, "role": "user", "value": None, "content": "<image>What is this?"},
                ANSWER | {"tool_calls": None, "name": "bot"},
            ],
        },
        IN_FOLDER,
    ),
    "ms-swift, query and response": (
        {"query": "<image>What is this?", "response": "A bus.", "images": ["a.png"], "history": [], "system": None},
        IN_FOLDER,
    ),
    "ms-swift, without a place": ({"query": "What is this?", "response": "A bus.", "images": "a.png"}, IN_FOLDER),
    "TRL, prompt and completion": (
        {"prompt": asking({"type": "image"})["messages"][:1], "completion": [ANSWER], "images": ["a.png"]},
        IN_FOLDER,
    ),
    "messages with a query beside them": (
        {"messages": [{"role": "user", "content": "<image>What is this?"}, ANSWER], "query": 3, "response": "x"}
        | {"image": "a.png"},
        IN_FOLDER,
    ),
    "the Cauldron": (
        {"texts": [{"user": "What is this?", "assistant": "A bus.", "source": "vqa"}], "images": ["a.png"]},
        IN_FOLDER,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_is_the_same_in_every_form_that_people_have(form: str) -> None:
    record, image = FORMS[form]
    row = common_row(record, "a", "/data")
    assert row["problem"] is None
    assert row["messages"] == [{"role": "user", "content": ASKED}, ANSWERED]
    assert row["images"] == [image]


@pytest.mark.parametrize("field", ["system", "system_prompt", "system_message"])
def test_a_system_prompt_beside_the_turns_is_the_first_turn(field: str) -> None:
    row = common_row(llava(**{field: "Be brief."}), "a", "/data")
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert row["messages"] == [system, {"role": "user", "content": ASKED}, ANSWERED]
    repeated = llava(
        **{field: "Be brief."}, conversations=[{"from": "system", "value": "Be brief."}, *llava()["conversations"]]
    )
    assert common_row(repeated, "a", "/data")["messages"] == row["messages"]
    developer = {"messages": [{"role": "developer", "content": "Be brief."}, *asking({"type": "image"})["messages"]]}
    assert common_row(developer | {"image": "a.png"}, "a", "/data")["messages"] == row["messages"]


def turns(question: Any, answer: Any = "A bus.", **fields: Any) -> dict[str, Any]:
    return llava(conversations=[{"from": "human", "value": question}, {"from": "gpt", "value": answer}], **fields)


REFUSED: dict[str, tuple[Any, str]] = {
    "two videos": (llava(video="a.mp4", videos=["b.mp4"]), "`videos` \\['b.mp4'\\] and `video`"),
    "a video's address": (llava(video_url="http://a.mp4"), "`video_url`"),
    "a video that is a number": (llava(video=7), "a video is 7; expected is a path"),
    "a video's times that are no number": (llava(video={"frames": ["a.png"], "fps": "2"}), "a video has `fps` '2'"),
    "audio": (llava(audio="a.wav"), "`audio`"),
    "audios": (llava(audios=[{"path": "a.wav"}]), "`audios`"),
    "tools": (llava(tools='[{"name": "f"}]'), "`tools`"),
    "a record's weight": (llava(weight=0), "`weight` 0"),
    "earlier turns": (llava(history=[["a", "b"]]), "`history`"),
    "a worse answer": (asking(rejected="A car."), "`rejected`"),
    "a thumb down": (llava(kto_tag=False), "`kto_tag`"),
    "a system prompt that is a list": (llava(system=["Be brief."]), "`system` is \\['Be brief.'\\]; expected is text"),
    "two system prompts": (llava(system="A", system_prompt="B"), "another system prompt"),
    "a system prompt and another turn": (
        llava(system="A", conversations=[{"from": "system", "value": "B"}, *llava()["conversations"]]),
        "another system prompt",
    ),
    "two images": (llava(images=["b.png"]), "`images` \\['b.png'\\] and `image`"),
    "two forms of turns": (llava(messages=asking({"type": "image"})["messages"]), "`messages` and `conversations`"),
    "Qwen's image": (
        turns("<img>a.png</img>\nWhat is this?"),
        "a turn says '<img>a.png</img>'; understood in a turn that is text are <image>",
    ),
    "Swift's video": (turns("<video>a.mp4</video>What is this?"), "<video>a.mp4</video>"),
    "a sound's place": (turns("What is this?<audio>"), "'<audio>'"),
    "Qwen's tokens": (
        turns("<|vision_start|><|image_pad|><|vision_end|>What?"),
        "<|vision_start|>".replace("|", "\\|"),
    ),
    "Phi's tokens": (turns("<|image_1|>\nWhat is this?"), "image_1"),
    "numbered places": (turns("<image_1>What is this?"), "<image_1>"),
    "a place in a system prompt": (llava(system="<img>a.png</img>"), "<img>a.png</img>"),
    "a place in a part": (asking({"type": "text", "text": "<video>"}), "'<video>'"),
    "boxes": (turns("<image>Where is <ref-object>?"), "<ref-object>"),
    "a function call": (
        llava(conversations=[{"from": "function_call", "value": "{}"}]),
        "a turn is by 'function_call'",
    ),
    "an observation": (llava(conversations=[{"from": "observation", "value": "{}"}]), "a turn is by 'observation'"),
    "a role that is a list": (llava(conversations=[{"from": ["human"], "value": "a"}]), "a turn is by \\['human'\\]"),
    "a role that is an object": (llava(conversations=[{"from": {}, "value": "a"}]), "a turn is by {}"),
    "two roles": (
        llava(conversations=[{"from": "human", "role": "assistant", "value": "a"}]),
        "`from` 'human' and `role`",
    ),
    "two texts": (llava(conversations=[{"from": "human", "value": "a", "content": "b"}]), "`value` 'a' and `content`"),
    "a turn's weight": (
        asking({"type": "image"}, image="a.png") | {"messages": [ANSWER | {"weight": 0}]},
        "a turn has `weight` 0",
    ),
    "a turn without loss": ({"messages": [ANSWER | {"loss": False}]}, "a turn has `loss` False"),
    "a turn's tool calls": ({"messages": [ANSWER | {"tool_calls": [{"id": "1"}]}]}, "`tool_calls`"),
    "a turn's thoughts": ({"messages": [ANSWER | {"reasoning_content": "Hm."}]}, "`reasoning_content`"),
    "a turn's images": ({"messages": [{"role": "user", "content": "a", "images": ["a.png"]}]}, "`images`"),
    "a turn that is a number": (turns(7), "a turn says 7"),
    "a turn that is a list of words": (turns(["a"]), "a turn says \\['a'\\]"),
    "an image's part with a video": (asking({"type": "image", "video": "a.mp4"}), "`video` 'a.mp4'"),
    "a part of a video": (asking({"type": "video", "video": "a.mp4", "video_start": 2.0}), "`video_start` 2.0"),
    "a video's part with its own times": (asking({"type": "video", "video": "a.mp4", "fps": 2.0}), "`fps` 2.0"),
    "a sound's part": (asking({"type": "input_audio", "input_audio": {"data": ""}}), "`input_audio`"),
    "Anthropic's part": (asking({"type": "image", "source": {"type": "base64"}}), "`source`"),
    "a text part with an image": (asking({"type": "text", "text": "a", "path": "a.png"}), "a part of a message is"),
    "an image part with text": (asking({"type": "image", "text": "a"}), "a part of a message is"),
    "an image part with two images": (asking({"type": "image", "path": "a.png", "url": "b.png"}), "at most one"),
    "OpenAI's part without an image": (asking({"type": "image_url"}), "without its image"),
    "a number that is not the image's": (asking({"type": "image", "index": 1}, image="a.png"), "the image number 0"),
    "images in some of the parts": (
        asking({"type": "image", "path": "a.png"}, {"type": "image"}),
        "2 image\\(s\\), 1 of them",
    ),
    "other images in the parts": (asking({"type": "image", "path": "a.png"}, image="b.png"), "has 1 beside them"),
    "a part without a type": (asking({"text": "a"}), "a part of a message is"),
    "a part of a strange type": (asking({"type": ["image"]}), "a part of a message is"),
    "a path that is a number": (llava(image={"path": 5}), "an image is {'path': 5}; expected are a path that is text"),
    "a path that is a list": (llava(image={"path": ["a.png"]}), "expected are a path that is text"),
    "bytes that are text": (llava(image={"bytes": "iVBOR"}), "expected are a path that is text, or bytes"),
    "an image that is an object": (llava(image={"file_name": "a.png"}), "expected is a path or an encoded image"),
    "an image that is a list of lists": (llava(image=[["a.png"]]), "an image is \\['a.png'\\]"),
    "an image that is nothing among others": (llava(image=["a.png", None]), "an image is None"),
    "an image that is true": (llava(image=True), "an image is True"),
    "a data URL that is none": (llava(image="data:image/png;base64,@@"), "expected is a data URL"),
    "a data URL of text": (llava(image="data:image/svg+xml,<svg/>"), "expected is a data URL"),
    "a path of half characters": (llava(image="\ud83d.png"), "is no Unicode text"),
    "an id of half characters": (llava(id="\ud83d"), "is no Unicode text"),
    "turns that are an object": (llava(conversations={"from": "human"}), "`conversations` is"),
    "a query with earlier turns": ({"query": "a", "response": "b", "history": [["c", "d"]]}, "`history`"),
    "a query without its response": ({"query": "a", "response": None}, "the record has the fields"),
    "a response that is a number": ({"query": "a", "response": 5}, "a turn says 5"),
    "a prompt and a completion that are texts": (
        {"prompt": "USER: a ASSISTANT:", "completion": "b"},
        "`prompt` is 'USER: a ASSISTANT:' and `completion` 'b'; understood are lists of messages",
    ),
    "a prompt with an answer": (
        {"prompt": [{"role": "user", "content": "a"}, ANSWER], "completion": [ANSWER]},
        "none in the former",
    ),
    "a completion of the user's": (
        {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "user", "content": "b"}]},
        "all in the latter",
    ),
    "a completion that is empty": ({"prompt": [{"role": "user", "content": "a"}], "completion": []}, "all in the"),
    "a prompt of words": ({"prompt": ["a"], "completion": [ANSWER]}, "all in the latter"),
    "fields that are numbers": ({1: "a", "b": 2}, "the record has the fields"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_learned_as_something_else_is_a_problem_and_fits_the_columns(case: str) -> None:
    record, problem = REFUSED[case]
    row = common_row(record, "file.json:3", "/data")
    assert (row["messages"], row["images"]) == ([], [])
    with pytest.raises(ValueError, match=problem):
        raise ValueError(row["problem"])
    # One row must not cost all others.
    assert row_features().encode_example(row)["id"] == row["id"]


# One conversation about one video, and what the video is.
FILE = {"bytes": None, "path": "/data/a.mp4", "frames": [], "fps": None}
FRAMES = {"bytes": None, "path": None, "frames": [IN_FOLDER, EMBEDDED], "fps": None}
VIDEOS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LLaVA": (turns("<video>\nWhat is this?", image=None, video="a.mp4"), FILE),
    "LLaVA by the image's placeholder": (llava(image=None, video="a.mp4"), FILE),
    "LLaVA with a list": (turns("<video>What is this?", image=None, videos=["a.mp4"]), FILE),
    "LLaVA with a file of datasets'": (
        turns("<video>What is this?", image=None, video={"bytes": b"1", "path": "a.mp4"}),
        FILE | {"bytes": b"1", "path": "a.mp4"},
    ),
    "transformers, path": (asking({"type": "video", "path": "a.mp4"}), FILE),
    "transformers, video": (asking({"type": "video", "video": "a.mp4"}), FILE),
    "OpenAI": (asking({"type": "video_url", "video_url": {"url": "a.mp4"}}), FILE),
    "Swift": ({"messages": [{"role": "user", "content": "<video>What is this?"}, ANSWER], "videos": ["a.mp4"]}, FILE),
    "without a place": ({"messages": [{"role": "user", "content": "What is this?"}, ANSWER], "video": "a.mp4"}, FILE),
    "frames": (asking({"type": "video"}, videos=[["a.png", DATA_URL]]), FRAMES),
    "frames with their times": (
        asking({"type": "video"}, videos=[{"frames": ["a.png", DATA_URL], "fps": 2}]),
        FRAMES | {"fps": 2.0},
    ),
}


@pytest.mark.parametrize("form", VIDEOS)
def test_a_conversation_about_a_video_is_the_same_in_all_forms(form: str) -> None:
    record, video = VIDEOS[form]
    row = common_row(record, "a", "/data")
    asked = [{"type": "video", "text": None}, {"type": "text", "text": "What is this?"}]
    assert (row["problem"], row["images"], row["videos"]) == (None, [], [video])
    assert row["messages"] == [{"role": "user", "content": asked}, ANSWERED]
    assert row_features().encode_example(row)["videos"][0]["path"] == video["path"]


def test_videos_and_images_stand_where_the_text_says() -> None:
    record = turns("<image>before <video> between <image>", images=["a.png", "b.png"], image=None, videos=["a.mp4"])
    row = common_row(record, "a", "/data")
    kinds = [part["type"] for part in row["messages"][0]["content"]]
    assert kinds == ["image", "text", "video", "text", "image"]
    assert (len(row["images"]), row["videos"]) == (2, [FILE])


def test_a_tar_s_videos_are_told_by_their_endings() -> None:
    said = json.dumps(asking({"type": "image"}, {"type": "video"}))
    members = [{"name": "json", "content": said.encode()}, {"name": "0.png", "content": png()}]
    row = tar_row("k", [*members, {"name": "1.MP4", "content": b"1"}])
    assert row["images"] == [EMBEDDED] and row["videos"] == [FILE | {"bytes": b"1", "path": None}]


def test_what_only_looks_like_a_place_is_text() -> None:
    html = "<video controls><source src='a.mp4'></video> and <video>\n<source></video> and <img src='a.png'> and <img>"
    row = common_row(turns(f"<image>{html}", "<video>"), "a", "/data")
    assert row["problem"] is None
    assert row["messages"][0]["content"][1]["text"] == html


@pytest.mark.parametrize("id", [None, "", True, 1.5, ["a"], {}])
def test_an_id_that_is_none_is_the_record_s_place(id: Any) -> None:
    assert common_row(llava(id=id), "file.json:3", "/data")["id"] == "file.json:3"
    assert common_row(llava(id="\u56fe\u50cf-7"), "x", "/data")["id"] == "\u56fe\u50cf-7"


def test_a_tar_s_images_are_its_members_whatever_the_parts_say() -> None:
    said = json.dumps(asking({"type": "image", "path": "/etc/a.png"}))
    members = [{"name": "json", "content": said.encode()}, {"name": "png", "content": png()}]
    assert tar_row("k", members)["images"] == [EMBEDDED]
    assert tar_row("k", members[:1])["images"] == []


def test_the_folder_stands_in_the_row_unless_paths_are_trusted(tmp_path: Path) -> None:
    assert common_row(llava(), "a", tmp_path)["image_folder"] == str(tmp_path)
    assert common_row(llava(), "a", tmp_path, trust_image_paths=True)["image_folder"] is None
    assert common_row(llava(image="/x/a.png"), "a", tmp_path)["images"] == [{"bytes": None, "path": "/x/a.png"}]
