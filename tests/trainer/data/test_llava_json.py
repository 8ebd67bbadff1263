"""LLaVA's instruction files: what a record becomes, that none is lost, and that a file is read once and in pieces."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pytest

from adavtp.trainer.data import llava_json
from adavtp.trainer.data.llava_json import load_llava_instruct, read_records


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` for this test alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def turn(speaker: str, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def record(question: str = "<image>\nWhat is this?", **fields: Any) -> dict[str, Any]:
    """A record as mix665k has them."""
    return {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [turn("human", question), turn("gpt", "A bus.")],
    } | fields


def written(folder: Path, content: Any, name: str = "file.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def rows_of(folder: Path, *records: Any) -> list[dict[str, Any]]:
    return list(load_llava_instruct(written(folder, list(records))))


def parts(*texts: str | None) -> list[dict[str, str | None]]:
    """Texts as parts of a message, `None` for an image."""
    return [{"type": "image" if text is None else "text", "text": text} for text in texts]


def test_a_record_becomes_a_row_with_the_image_in_the_folder_and_undecoded(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    row = load_llava_instruct(written(tmp_path, [record()]), tmp_path / "images")[0]
    assert row == {
        "id": "000000033471",
        "images": [{"bytes": None, "path": str(tmp_path / "images/coco/train2017/000000033471.jpg")}],
        "videos": [],
        "image_folder": str(tmp_path / "images"),
        "messages": [
            {"role": "user", "content": parts(None, "What is this?")},
            {"role": "assistant", "content": parts("A bus.")},
        ],
        "problem": None,
    }


@pytest.mark.parametrize(
    ("question", "content"),
    [
        ("<image>\nWhat is this?", parts(None, "What is this?")),
        ("What is this?\n<image>", parts("What is this?", None)),
        ("<image>What is this?", parts(None, "What is this?")),
        ("Compare <image> with <image>.", parts("Compare ", None, " with ", None, ".")),
        ("<image>\n<image>\nWhich is older?", parts(None, None, "Which is older?")),
        ("<image>", parts(None)),
        ("What is this?\nAnswer briefly.", parts("What is this?\nAnswer briefly.")),
        ("", parts("")),
    ],
)
def test_an_image_stands_where_its_placeholder_stands(
    tmp_path: Path, question: str, content: list[dict[str, str | None]]
) -> None:
    (row,) = rows_of(tmp_path, record(question))
    assert row["messages"][0]["content"] == content


def test_text_alone_several_images_and_a_system_prompt_are_read(tmp_path: Path) -> None:
    text, several, system = rows_of(
        tmp_path,
        {"id": 7, "conversations": [turn("human", "Hello."), turn("gpt", "Hello.")]},
        record(image=["a.jpg", "b.jpg"]),
        record(conversations=[turn("system", "Be brief."), *record()["conversations"]]),
    )
    assert (text["id"], text["images"]) == ("7", [])
    assert [Path(image["path"]).name for image in several["images"]] == ["a.jpg", "b.jpg"]
    assert [message["role"] for message in system["messages"]] == ["system", "user", "assistant"]


def test_records_that_have_messages_already_are_read_too(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": parts("This:", None)}, {"role": "assistant", "content": "A bus."}]
    (row,) = rows_of(tmp_path, {"messages": messages, "images": ["a.jpg"]})
    assert row["id"] == "file.json:0"
    assert row["messages"] == [messages[0], {"role": "assistant", "content": parts("A bus.")}]


UNREADABLE: dict[str, tuple[Any, str]] = {
    "not an object": (["human", "gpt"], "expected is an object"),
    "no turns": ({"id": "no turns"}, "the record has the fields"),
    "no list of turns": (record(conversations="Hello."), "`conversations` is 'Hello.'"),
    "an empty list of turns": (record(conversations=[]), "`conversations` is \\[\\]"),
    "turns that are strings": (record(conversations=["Hello."]), "`conversations` is \\['Hello.'\\]"),
    "an unknown speaker": (record(conversations=[turn("bing", "Hello.")]), "a turn is by 'bing'"),
    "a turn without words": (record(conversations=[turn("human", None)]), "a turn says None"),
    "an image that is a number": (record(image=7), "an image is 7"),
    "half of a surrogate pair": (record("A bus \ud83d."), "is no Unicode text"),
    "an unknown part": (
        {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
        "types 'image' and 'image_url'",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_record_that_cannot_be_read_is_a_row_that_says_why(tmp_path: Path, case: str) -> None:
    broken, problem = UNREADABLE[case]
    rows = rows_of(tmp_path, record(), broken, record())
    assert [row["problem"] is None for row in rows] == [True, False, True]
    assert rows[1]["id"] == (broken.get("id", "file.json:1") if isinstance(broken, dict) else "file.json:1")
    assert rows[1]["messages"] == []
    with pytest.raises(ValueError, match=problem):
        raise ValueError(rows[1]["problem"])


def test_a_broken_line_is_a_row_with_the_line_number_and_the_others_are_read(tmp_path: Path) -> None:
    lines = [json.dumps(record()), "", json.dumps(record())[:40], json.dumps(record(id="last"))]
    rows = list(load_llava_instruct(written(tmp_path, "\ufeff" + "\n".join(lines), "file.jsonl")))
    assert [row["id"] for row in rows] == ["000000033471", "file.jsonl:3", "last"]
    assert [bool(row["problem"]) for row in rows] == [False, True, False]


def test_bytes_that_are_no_text_cost_their_own_record_alone(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(json.dumps([record("caf@"), record()]).encode().replace(b"@", b"\xe9"))
    assert [row["problem"] is None for row in load_llava_instruct(path)] == [False, True]


@pytest.mark.parametrize("first", ["{oops", "[" * 100_000 + "}", '{"id": ' + "[" * 100_000], ids=lambda text: text[:8])
def test_a_line_that_is_no_json_costs_itself_alone_wherever_it_stands(tmp_path: Path, first: str) -> None:
    lines = [json.dumps(record()), first, json.dumps(record())]
    for order in (lines, [first.replace("[", "{"), *lines[::2]]):
        rows = list(load_llava_instruct(written(tmp_path, "\n".join(order), "file.jsonl")))
        assert sorted(row["problem"] is None for row in rows) == [False, True, True]


def test_a_number_that_python_does_not_read_costs_nothing(tmp_path: Path) -> None:
    content = json.dumps([record(), record(id=-1)]).replace("-1", "9" * 5000)
    rows = list(load_llava_instruct(written(tmp_path, content)))
    assert [row["id"] for row in rows] == ["000000033471", "9" * 5000]
    with pytest.raises(ValueError, match="item 1 is nested too deeply"):
        load_llava_instruct(written(tmp_path, content.replace("9" * 5000, "[" * 100_000)))


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_a_list_is_read_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(llava_json, "CHUNK", chunk)
    records = [record('She said: "[{\\"}]", \u00e9, \U0001f600'), {}, [], 12, "a, b]", None, record()]
    for separators, indent in (((",", ":"), None), ((", ", ": "), 2)):
        path = written(tmp_path, "\ufeff \n" + json.dumps(records, separators=separators, indent=indent))
        assert [item for _, item in read_records(path)] == records


@pytest.mark.parametrize("chunk", [5, 2**20])
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is empty"),
        (" [ ] ", "a list without records"),
        ("hello", "neither a JSON list"),
        ('{"a":\n1}', "neither a JSON list"),
        ('[{"id": 1}', "after item 0"),
        ('[{"id": 1} {"id": 2}]', "after item 0"),
        ('[{"id": 1}, {"id": 2', "item 1"),
        ('[{"id": 1}, {"id" 2}, {"id": 3}]', "item 1: Expecting ':' delimiter .line 1, column 19."),
        ('\ufeff\n [\n{"id": 1},\n\n {"id": 2,\n  "x": y}]', "item 1: .*line 6, column 8"),
        ('[\n{"id": 1}\n  {"id": 2}]', "after item 0 there is .*line 3, column 3"),
        ('[{"id": 1}]\n \n[{"id": 2}]', "stands behind a list of 1"),
    ],
)
def test_a_file_that_is_not_json_is_refused_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, problem: str, chunk: int
) -> None:
    monkeypatch.setattr(llava_json, "CHUNK", chunk)
    with pytest.raises(ValueError, match=problem):
        load_llava_instruct(written(tmp_path, content))


def test_a_missing_file_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_llava_instruct(tmp_path / "file.json")
    with pytest.raises(ValueError, match="no such folder"):
        load_llava_instruct(written(tmp_path, [record()]), tmp_path / "images")


def test_a_file_is_built_once_and_anew_when_its_content_changes(tmp_path: Path, cache: Path) -> None:
    def built() -> set[Path]:
        return set(cache.rglob("*.arrow"))

    path = written(tmp_path, [record(id="first")])
    load_llava_instruct(path)
    first = built()
    path.touch()
    assert load_llava_instruct(path)["id"][:] == ["first"]
    assert built() == first
    # The same length and so, with a coarse clock, the same outside.
    written(tmp_path, [record(id="other")])
    assert load_llava_instruct(path)["id"][:] == ["other"]
    assert len(built()) == 2


def test_the_rows_of_a_large_file_are_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_json, "CHUNK", 2**14)
    path = written(tmp_path, [record(f"{number} " + "word " * 1000) for number in range(1000)])
    tracemalloc.start()
    num_records = sum(1 for _ in read_records(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_records == 1000
    assert peak < path.stat().st_size / 20
    assert load_llava_instruct(path).cache_files
