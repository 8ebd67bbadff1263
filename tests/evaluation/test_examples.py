"""Examples from rows in the conversational form, in every kind of file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage

from adavtp.evaluation.data.examples import ConversationExamples, EvaluationData, Example
from adavtp.evaluation.data.names import read_data


def picture(colour: int) -> PILImage.Image:
    return PILImage.new("RGB", (8, 8), (colour, 2 * colour, 0))


def conversation(question: str, answer: str, num_images: int = 1) -> list[dict[str, Any]]:
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


ROWS = [
    {"id": "a", "images": ["1.png"], "messages": conversation("What?", "That."), "category": "things"},
    {"id": "b", "images": ["2.png"], "messages": conversation("Who?", "He."), "category": "people"},
    {"id": "c", "images": ["1.png", "2.png"], "messages": conversation("Same?", "No.", 2), "category": "things"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (1, 2):
        picture(number).save(tmp_path / f"{number}.png")
    return tmp_path


def as_json(folder: Path) -> str:
    (folder / "rows.json").write_text(json.dumps(ROWS))
    return str(folder / "rows.json")


def as_json_lines(folder: Path) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(folder / "rows.jsonl")


def data_set(folder: Path) -> Dataset:
    message = {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
    features = Features(
        {"id": Value("string"), "images": List(Image()), "messages": List(message), "category": Value("string")}
    )
    stored = {name: {"bytes": (folder / name).read_bytes(), "path": None} for name in ("1.png", "2.png")}
    rows = [row | {"images": [stored[name] for name in row["images"]]} for row in ROWS]
    return Dataset.from_list(rows, features=features)


def as_parquet(folder: Path) -> str:
    data_set(folder).to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def as_saved(folder: Path) -> str:
    data_set(folder).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_saved_splits(folder: Path) -> str:
    DatasetDict(test=data_set(folder), train=data_set(folder).select([0])).save_to_disk(folder / "saved")
    return str(folder / "saved")


def as_repository(folder: Path) -> str:
    (folder / "repository" / "data").mkdir(parents=True)
    data_set(folder).to_parquet(folder / "repository" / "data" / "test-00000-of-00001.parquet")
    return str(folder / "repository")


@pytest.mark.parametrize("write", [as_json, as_json_lines, as_parquet, as_saved, as_saved_splits, as_repository])
def test_every_kind_of_file_holds_the_same_examples(folder: Path, write: Callable[[Path], str]) -> None:
    examples = read_data(write(folder)).examples
    told = [(example.id, example.question, example.answers, example.category) for example in examples]
    assert told == [
        ("a", "What?", ["That."], "things"),
        ("b", "Who?", ["He."], "people"),
        ("c", "Same?", ["No."], "things"),
    ]
    shown = [
        [image if isinstance(image, PILImage.Image) else PILImage.open(image) for image in example.images]
        for example in examples
    ]
    pixels = [[image.convert("RGB").getpixel((0, 0)) for image in images] for images in shown]
    assert pixels == [[(1, 2, 0)], [(2, 4, 0)], [(1, 2, 0), (2, 4, 0)]]
    assert all(example.messages is None for example in examples)


def test_prompt_and_completion_are_a_question_and_its_answer() -> None:
    messages = conversation("What?", "That.")
    plain = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    rows = [
        {"images": [picture(1)], "prompt": messages[:1], "completion": messages[1:]},
        {"images": [picture(1)], "prompt": "What?", "completion": " That."},
        {
            "image": picture(1),
            "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}],
        },
        {"messages": plain[:1], "answers": ["That.", "this"], "choices": ["x", "y"]},
    ]
    examples = list(ConversationExamples(rows))
    assert [(example.question, example.answers) for example in examples] == [
        ("What?", ["That."]),
        ("What?", ["That."]),
        ("What?", ["That."]),
        ("What?", ["That.", "this"]),
    ]
    assert [len(example.images) for example in examples] == [1, 1, 1, 0]
    assert [example.id for example in examples] == ["0", "1", "2", "3"]
    assert examples[3].choices == ["x", "y"]


def test_earlier_turns_and_text_before_the_image_are_asked_as_they_are() -> None:
    earlier = [{"role": "system", "content": "Be brief."}, *conversation("What?", "That.")]
    later = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    text_first = [{"type": "text", "text": "Look:"}, {"type": "image"}]
    rows = [
        {"images": [picture(1)], "messages": earlier + later},
        {"images": [picture(1)], "messages": [{"role": "user", "content": text_first}, later[1]]},
    ]
    turns, first = ConversationExamples(rows)
    assert (turns.question, turns.answers) == ("Why?", ["So."])
    assert [message["role"] for message in turns.messages] == ["system", "user", "assistant", "user"]
    assert turns.messages[-1]["content"] == [{"type": "text", "text": "Why?"}]
    assert first.messages == [{"role": "user", "content": text_first}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["none.png"], "messages": conversation("What?", "That.")}, "none.png"),
        ({"images": [], "messages": conversation("What?", "That.")}, "0 image"),
        ({"images": [picture(1)] * 2, "messages": conversation("What?", "That.")}, "2 image"),
        ({"images": [picture(1)], "messages": conversation("What?", "That.")[:1]}, "assistant"),
        ({"images": [picture(1)], "messages": conversation("What?", "That.")[1:]}, "user"),
        ({"question": "What?", "answer": "That."}, "messages"),
        ({"messages": conversation("What?", "That.", 0) + conversation("Why?", "So.", 0)}, "several turns"),
    ],
)
def test_a_row_in_another_form_is_refused_by_its_id(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match="q7") as error:
        ConversationExamples([row | {"id": "q7"}])[0]
    assert reason in str(error.value)


TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "That."}]


@pytest.mark.parametrize(
    "row",
    [
        {"image": "1.png", "messages": TURNS},
        {
            "image": "1.png",
            "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "That."}],
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "1.png"}}]}, TURNS[1]]},
        {"messages": [{"role": "user", "content": [{"type": "image", "path": "1.png"}]}, TURNS[1]]},
    ],
)
def test_the_forms_of_training_are_the_forms_of_evaluation(folder: Path, row: dict[str, Any]) -> None:
    (example,) = ConversationExamples([row], folder)
    assert (example.images, example.answers) == ([folder / "1.png"], ["That."])


def test_a_system_prompt_is_asked_and_what_is_not_read_is_refused(folder: Path) -> None:
    row = {"image": "1.png", "messages": TURNS}
    (example,) = ConversationExamples([row | {"system": "Be brief."}], folder)
    assert example.messages[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    for change in ({"video": "a.mp4"}, {"messages": [{"role": "user", "content": "<img>1.png</img>"}, TURNS[1]]}):
        with pytest.raises(ValueError, match="Example 0 .* cannot be read"):
            ConversationExamples([row | change], folder)[0]


@pytest.mark.parametrize("write", [as_json, as_parquet, as_saved, as_repository])
@pytest.mark.parametrize("way", ["absolute", "above", "link"])
def test_images_outside_the_folder_are_refused_unless_paths_are_trusted(
    tmp_path: Path, write: Callable[[Path], str], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture(1).save(tmp_path / "secret.png")
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    name = {"absolute": str(tmp_path / "secret.png"), "above": "../secret.png", "link": "link.png"}[way]
    row = {"id": "q7", "images": [name], "messages": TURNS}
    monkeypatch.setattr("test_examples.ROWS", [row])
    monkeypatch.setattr("test_examples.data_set", lambda folder: Dataset.from_list([row]))
    data = write(folder)
    with pytest.raises(ValueError, match="'q7'.* leads out of"):
        read_data(data, images=folder).examples[0]
    (example,) = read_data(data, images=folder, trust_image_paths=True).examples
    assert example.images == [folder / name]


@pytest.mark.parametrize(
    "change",
    [
        *({"images": images} for images in ([5], [{"path": 5}], [True], ["a\0"], ["http://localhost:1/a.png"], ["."])),
        *(
            {"messages": messages}
            for messages in ("x", [], [1], [{"content": "x"}], [{"role": ["user"], "content": "x"}])
        ),
        *({"answers": answers} for answers in ("x", 5, [1], {"a": 1})),
        *({"choices": 5}, {"category": [1]}, {"prompt": 5}, {"prompt": "x", "completion": {"a": 1}}),
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_is_one_sentence_that_names_the_row(folder: Path, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="^Example 'q7' \\(row 0\\) "):
        ConversationExamples([{"id": "q7", "images": ["1.png"], "messages": TURNS} | change], folder)[0]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.csv", "a,b", "files that can be read"),
        ("rows.json", "{", "not JSON"),
        ("rows.json", "[]", "list of objects"),
        ("rows.jsonl", "{}\n{", "not JSONL"),
    ],
)
def test_a_file_in_another_form_is_refused(tmp_path: Path, name: str, content: str, reason: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=reason):
        read_data(str(tmp_path / name))


def test_a_missing_split_and_unknown_data_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="test, train"):
        read_data(as_saved_splits(folder), "validation")
    with pytest.raises(ValueError, match="pages, digit-scenes, vqav2:FOLDER"):
        read_data(str(folder / "nothing"))


EXAMPLE = {"id": "a", "question": "What?", "answers": ["That."], "category": None, "choices": None}


@pytest.mark.parametrize(
    "change",
    [
        {"id": "b"},
        {"question": "Who?"},
        {"answers": ["This."]},
        {"category": "things"},
        {"choices": ["That.", "This."]},
        {"images": [picture(2)]},
        {"images": []},
        {"messages": [{"role": "user", "content": "What?"}]},
    ],
)
def test_data_that_differ_in_anything_have_another_hash(change: dict[str, Any]) -> None:
    def hash_of(fields: dict[str, Any]) -> str:
        return EvaluationData("x", "test", [Example(**fields)]).hash()

    same = EXAMPLE | {"images": [picture(1)]}
    assert hash_of(same) == hash_of(EXAMPLE | {"images": [picture(1)]})
    assert hash_of(same) != hash_of(same | change)


def test_the_hash_knows_files_by_name_and_size_wherever_they_are(folder: Path, tmp_path: Path) -> None:
    def hash_of(path: Path) -> str:
        return EvaluationData("x", "test", [Example(**EXAMPLE, images=[path])]).hash()

    (tmp_path / "elsewhere").mkdir()
    copy = tmp_path / "elsewhere" / "1.png"
    copy.write_bytes((folder / "1.png").read_bytes())
    assert hash_of(copy) == hash_of(folder / "1.png")
    copy.write_bytes(copy.read_bytes() + b"x")
    assert hash_of(copy) != hash_of(folder / "1.png")


def test_the_first_examples_are_the_same_without_looking_at_others(folder: Path) -> None:
    rows = [ROWS[0], ROWS[1], {"id": "broken"}]
    data = EvaluationData("x", "test", ConversationExamples(rows, folder)).first(2)
    assert [example.id for example in data.examples] == ["a", "b"] == [example.id for example in data.examples[:5]]
    assert len(data.first(None).examples) == 2 and len(data.first(9).examples) == 2
