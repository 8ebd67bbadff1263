"""Sources of conversations: the same rows from every format, mixed by weight, and resumed at the very next row."""

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, Features, IterableDataset, List, Value
from PIL import Image

from adavtp.trainer.data.reader import ConversationReader, RejectedSample
from adavtp.trainer.data.sources import load_conversations
from tiny_conversations import digit_processor

TEXT, IMAGE = Value("string"), datasets.Image(decode=False)
COMMON_FEATURES = Features(
    {
        "id": TEXT,
        "images": List(IMAGE),
        "videos": List({"bytes": Value("binary"), "path": TEXT, "frames": List(IMAGE), "fps": Value("float64")}),
        "image_folder": TEXT,
        "messages": List({"role": TEXT, "content": List({"type": TEXT, "text": TEXT})}),
        "problem": TEXT,
    }
)
TURNS = List({"from": TEXT, "value": TEXT})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of `datasets` for this test alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    # `datasets` waits five seconds whenever a mixture with a parquet stream is closed.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def conversation(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\nWhich is {number}?"}, {"from": "gpt", "value": str(number)}]


def messages(number: int, num_images: int = 1) -> list[dict[str, Any]]:
    """The conversation in the common form."""
    shown = [{"type": "image", "text": None}] * num_images
    return [
        {"role": "user", "content": [*shown, {"type": "text", "text": f"Which is {number}?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": str(number)}]},
    ]


def llava_table(numbers: Iterable[int], **columns: Any) -> Dataset:
    """LLaVA's form in columns, with the image's bytes."""
    numbers = list(numbers)
    content = {
        "id": [f"p{number}" for number in numbers],
        "image": [{"bytes": png(number), "path": None} for number in numbers],
        "conversations": [conversation(number) for number in numbers],
    } | columns
    return Dataset.from_dict(
        content, Features({"id": TEXT, "image": datasets.Image(), "conversations": TURNS}) if not columns else None
    )


def parquet_folder(folder: Path, numbers: Iterable[int] = range(5)) -> Path:
    """Two files of LLaVA's form."""
    folder.mkdir()
    table = llava_table(numbers)
    half = len(table) // 2
    table.select(range(half)).to_parquet(folder / "train-0.parquet")
    table.select(range(half, len(table))).to_parquet(folder / "train-1.parquet")
    return folder


def tar_file(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def tar_folder(folder: Path, num_samples: int = 8) -> Path:
    """Two shards of LLaVA's form."""
    for shard in range(2):
        members = {}
        for number in range(shard * num_samples // 2, (shard + 1) * num_samples // 2):
            members[f"w{number}.png"] = png(number)
            members[f"w{number}.json"] = json.dumps({"conversations": conversation(number)}).encode()
        tar_file(folder / f"shard-{shard}.tar", members)
    return folder


def json_file(path: Path, num_records: int = 4, **fields: Any) -> Path:
    records = [
        {"id": f"j{number}", "image": f"{number}.png", "conversations": conversation(number)} | fields
        for number in range(num_records)
    ]
    path.write_text(json.dumps(records))
    return path


def ids(rows: Any) -> list[str]:
    return [row["id"] for row in rows]


def source(path: Any, **fields: Any) -> dict[str, Any]:
    return {"path": str(path), **fields}


# ---------------------------------------------------------------------------------------------------------------------
# One source
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_of_llavas_form_gives_common_rows_with_images_as_they_were_stored(
    tmp_path: Path, streaming: bool
) -> None:
    rows = load_conversations([source(parquet_folder(tmp_path / "data"), streaming=streaming)])
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert rows.features == COMMON_FEATURES
    assert list(rows) == [
        {
            "id": f"p{number}",
            "images": [{"bytes": png(number), "path": None}],
            "videos": [],
            "image_folder": str(tmp_path / "data"),
            "messages": messages(number),
            "problem": None,
        }
        for number in range(5)
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_tar_shards_give_common_rows(tmp_path: Path, streaming: bool) -> None:
    rows = load_conversations([source(tar_folder(tmp_path / "data") / "shard-*.tar", streaming=streaming)])
    assert isinstance(rows, IterableDataset if streaming else Dataset)
    assert rows.features == COMMON_FEATURES
    assert [(row["id"], row["images"][0]["bytes"], row["messages"]) for row in rows] == [
        (f"w{number}", png(number), messages(number)) for number in range(8)
    ]


def test_images_of_a_tars_sample_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    content = {f"k.{number}.{'jpg' if number == 2 else 'png'}": png(number) for number in (10, 2, 0, 11, 1)}
    said = {"id": 7, "image": "not this", "conversations": conversation(0)}
    (row,) = load_conversations(
        [source(tar_file(tmp_path / "a.tar", content | {"k.json": json.dumps(said).encode()}))]
    )
    assert row["id"] == "7"
    assert [image["bytes"] for image in row["images"]] == [png(number) for number in (0, 1, 2, 10, 11)]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_tar_that_was_cut_off_is_refused_and_not_read_up_to_there(tmp_path: Path, streaming: bool) -> None:
    whole = tar_file(tmp_path / "a.tar", {f"k{number}.txt": b"It is red." for number in range(3)})
    # Behind the first sample, in the middle of the next one's header: Python's tarfile takes that for the end.
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: 1024 + 100])
    with pytest.raises(ValueError, match="cut.tar' does not end as a tar does"):
        load_conversations([source(cut, streaming=streaming)])


def test_a_source_that_cannot_be_read_is_named_with_the_cause(tmp_path: Path) -> None:
    # A member that says it is longer than the archive, which ends as it should.
    header = tarfile.TarInfo("k.json")
    header.size = 10**6
    (tmp_path / "a.tar").write_bytes(header.tobuf() + bytes(2048))
    with pytest.raises(ValueError, match=r"`sources\[0\]`, '.*a.tar', cannot be read: unexpected end of data"):
        load_conversations([source(tmp_path / "a.tar")])


def test_a_text_beside_an_image_in_a_tar_is_what_the_assistant_says_of_it(tmp_path: Path) -> None:
    (row,) = load_conversations([source(tar_file(tmp_path / "a.tar", {"k.png": png(0), "k.txt": b"A red square."}))])
    assert (row["id"], row["problem"]) == ("k", None)
    assert row["messages"] == [
        {"role": "user", "content": [{"type": "image", "text": None}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A red square."}]},
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_of_a_tar_need_not_be_alike_and_a_broken_one_is_a_row_that_says_why(
    tmp_path: Path, streaming: bool
) -> None:
    said = json.dumps({"conversations": conversation(0)}).encode()
    hello = {"id": 7, "conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}]}
    members = {
        "whole.png": png(0),
        "whole.json": said,
        "text.json": json.dumps(hello).encode(),
        "cut.png": png(0),
        "cut.json": said[:20],
        "neither.png": png(0),
        "bytes.png": png(0),
        "bytes.txt": b"caf\xe9",
        "more.0.png": png(1),
        "more.1.png": png(2),
        "more.json": said,
    }
    rows = list(load_conversations([source(tar_file(tmp_path / "a.tar", members), streaming=streaming)]))
    assert ids(rows) == ["whole", "7", "cut", "neither", "bytes", "more"]
    assert [len(row["images"]) for row in rows if row["problem"] is None] == [1, 0, 2]
    problems = [row["problem"] for row in rows if row["problem"]]
    for problem, reason in zip(
        problems, ("'json' is no JSON", "members \\['png'\\], and neither", "no UTF-8"), strict=True
    ):
        assert re.search(reason, problem)
    with pytest.raises(RejectedSample, match="the messages show 1 image\\(s\\) and the row has 2"):
        ConversationReader(digit_processor()).read(rows[-1])


COLUMNS: dict[str, dict[str, Any]] = {
    "messages of parts": {"messages": messages(3, num_images=2), "images": [0, 1]},
    "messages with placeholders in the words": {
        "messages": [
            {"role": "user", "content": "<image><image>\nWhich is 3?"},
            {"role": "assistant", "content": "3"},
        ],
        "images": [0, 1],
    },
    "messages that do not say where the images are": {
        "messages": [{"role": "user", "content": "Which is 3?"}, {"role": "assistant", "content": "3"}],
        "images": [0, 1],
    },
    "conversations with several images": {
        "conversations": [
            {"from": "human", "value": "<image>\n<image>\nWhich is 3?"},
            {"from": "gpt", "value": "3"},
        ],
        "images": [0, 1],
    },
    "pairs of texts": {"texts": [{"user": "Which is 3?", "assistant": "3", "source": "vqa"}], "images": [0, 1]},
}


@pytest.mark.parametrize("case", COLUMNS)
def test_the_form_is_recognised_by_the_columns(tmp_path: Path, case: str) -> None:
    columns = COLUMNS[case] | {"images": [{"bytes": png(number), "path": None} for number in (0, 1)], "other": 1.5}
    table = Dataset.from_list([columns]).cast_column("images", List(datasets.Image()))
    table.to_parquet(tmp_path / "a.parquet")
    path = tmp_path / "a.parquet"
    for streaming in (False, True):
        (row,) = load_conversations([source(path, streaming=streaming)])
        assert row["id"] == f"{path}:0"
        assert row["messages"] == messages(3, num_images=2)
        assert [image["bytes"] for image in row["images"]] == [png(0), png(1)]


def test_a_saved_data_set_with_paths_is_read_from_the_folder_of_images(tmp_path: Path) -> None:
    llava_table(range(2), image=["a/0.png", None]).save_to_disk(str(tmp_path / "saved"))
    rows = load_conversations([source(tmp_path / "saved", images=str(tmp_path))])
    assert [row["images"] for row in rows] == [[{"bytes": None, "path": str(tmp_path / "a/0.png")}], []]


def test_what_load_dataset_takes_is_taken_with_its_split(tmp_path: Path) -> None:
    (tmp_path / "repository/data").mkdir(parents=True)
    for split, number in (("train", 0), ("test", 1)):
        llava_table([number]).to_parquet(tmp_path / f"repository/data/{split}-00000-of-00001.parquet")
    path = tmp_path / "repository"
    assert ids(load_conversations([source(path)])) == ["p0"]
    assert ids(load_conversations([source(path, split="test", streaming=True)])) == ["p1"]


def test_llavas_own_file_and_digit_scenes_are_sources_too(tmp_path: Path) -> None:
    assert ids(load_conversations([source(json_file(tmp_path / "a.json"))])) == ["j0", "j1", "j2", "j3"]
    scenes = load_conversations([source("digit-scenes", split="train", num_questions=2)])
    assert scenes.features == COMMON_FEATURES
    assert ids(scenes) == ["digit-scenes:0", "digit-scenes:1"]
    reader = ConversationReader(digit_processor())
    assert [len(reader.read(row)["images"]) for row in scenes] == [1, 1]


def test_broken_images_pass_through_every_source_and_are_the_readers_to_reject(tmp_path: Path) -> None:
    broken = png(0)[:40]
    table = llava_table(range(1)).cast_column("image", datasets.Image(decode=False))
    table = table.map(lambda row: {"image": {"bytes": broken, "path": None}}, features=table.features)
    table.to_parquet(tmp_path / "a.parquet")
    said = json.dumps({"conversations": conversation(0)}).encode()
    tar_file(tmp_path / "a.tar", {"k.png": broken, "k.json": said})
    json_file(tmp_path / "a.json", 1)
    reader = ConversationReader(digit_processor())
    for name in ("a.parquet", "a.tar", "a.json"):
        for streaming in (False, True) if name != "a.json" else (False,):
            fields = {"streaming": True} if streaming else {}
            (row,) = load_conversations([source(tmp_path / name, **fields)])
            with pytest.raises(RejectedSample, match="images\\[0\\]"):
                reader.read(row)


@pytest.mark.parametrize("kind", ["json", "parquet", "saved", "pattern"])
@pytest.mark.parametrize("name", ["{outside}/secret.png", "../secret.png", "link.png"])
def test_an_image_outside_its_folder_is_rejected_unless_paths_are_trusted(
    tmp_path: Path, kind: str, name: str
) -> None:
    (tmp_path / "secret.png").write_bytes(png(0))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "own.png").write_bytes(png(0))
    names = [name.format(outside=tmp_path), "own.png", str(folder / "own.png")]
    records = [{"id": f"r{n}", "image": own, "conversations": conversation(n)} for n, own in enumerate(names)]
    path = folder / "a.json"
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "saved":
        Dataset.from_list(records).save_to_disk(folder / "saved")
        path = folder / "saved"
    else:
        Dataset.from_list(records).to_parquet(folder / "a.parquet")
        path = folder / ("*.parquet" if kind == "pattern" else "a.parquet")
    images = {"images": str(folder)} if kind == "saved" else {}
    reader = ConversationReader(digit_processor())
    refused, *own = load_conversations([source(path, **images)])
    assert [len(reader.read(row)["images"]) for row in own] == [1, 1]
    with pytest.raises(RejectedSample, match="'r0': images\\[0\\] .*leads out of .*`trust_image_paths`"):
        reader.read(refused)
    trusted = load_conversations([source(path, trust_image_paths=True, **images)])
    assert [len(reader.read(row)["images"]) for row in trusted] == [1, 1, 1]


@pytest.mark.parametrize(
    "fields", [{"images": 5}, {"trust_image_paths": "yes"}, {"streaming": "yes"}, {"format": 3}], ids=str
)
def test_a_field_of_a_source_that_is_of_another_type_is_one_sentence(tmp_path: Path, fields: dict[str, Any]) -> None:
    parquet_folder(tmp_path / "data")
    with pytest.raises(ValueError, match="`sources\\[0\\]`: .*`"):
        load_conversations([source(tmp_path / "data", **fields)])


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures
# ---------------------------------------------------------------------------------------------------------------------


def several(folder: Path, streaming: bool, weights: tuple[float | None, float | None]) -> list[dict[str, Any]]:
    """A source of parquet with 5 rows and one of tars with 8."""
    if not (folder / "parquet").exists():
        parquet_folder(folder / "parquet")
        tar_folder(folder / "tars")
    sources = [source(folder / name, streaming=streaming) for name in ("parquet", "tars")]
    return [
        entry | ({} if weight is None else {"weight": weight}) for entry, weight in zip(sources, weights, strict=True)
    ]


def test_without_weights_every_row_comes_exactly_once_and_sources_are_mixed(tmp_path: Path) -> None:
    mixed = ids(load_conversations(several(tmp_path, False, (None, None)), seed=1))
    assert sorted(mixed) == sorted([f"p{n}" for n in range(5)] + [f"w{n}" for n in range(8)])
    assert [id for id in mixed if id[0] == "p"] == [f"p{n}" for n in range(5)]
    assert mixed != sorted(mixed)
    assert mixed == ids(load_conversations(several(tmp_path, False, (None, None)), seed=1))
    assert mixed != ids(load_conversations(several(tmp_path, False, (None, None)), seed=2))


@pytest.mark.parametrize("streaming", [False, True])
def test_with_weights_no_row_is_left_out_and_a_small_source_is_repeated(tmp_path: Path, streaming: bool) -> None:
    mixed = ids(load_conversations(several(tmp_path, streaming, (4.0, 1.0)), seed=0))
    counts = Counter(mixed)
    assert set(mixed) == {f"p{n}" for n in range(5)} | {f"w{n}" for n in range(8)}
    assert mixed[-1] == "w7"
    assert all(counts[f"w{n}"] == 1 for n in range(8))
    assert counts["p0"] > 2
    # Repeated from the beginning, in order.
    assert [id for id in mixed if id[0] == "p"] == [f"p{n % 5}" for n in range(sum(id[0] == "p" for id in mixed))]


def test_rows_are_drawn_in_the_proportion_of_the_weights(tmp_path: Path) -> None:
    json_file(tmp_path / "a.json", 400, id="a")
    json_file(tmp_path / "b.json", 400, id="b")
    sources = [source(tmp_path / "a.json", weight=30), source(tmp_path / "b.json", weight=10)]
    drawn = ids(load_conversations(sources))[:400]
    # Four standard deviations of a binomial distribution.
    assert abs(drawn.count("a") - 300) < 4 * (400 * 0.75 * 0.25) ** 0.5


def test_a_stream_and_a_file_make_a_stream_of_the_same_rows_as_two_files(tmp_path: Path) -> None:
    parquet_folder(tmp_path / "parquet")
    sources = [source(tmp_path / "parquet", weight=1.0), source(json_file(tmp_path / "a.json"), weight=1.0)]
    map_style = load_conversations(sources, seed=5)
    stream = load_conversations([sources[0] | {"streaming": True}, sources[1]], seed=5)
    assert isinstance(map_style, Dataset)
    assert isinstance(stream, IterableDataset)
    assert list(stream) == list(map_style)


@pytest.mark.parametrize("with_ids", [True, False])
def test_a_resumed_mixture_goes_on_with_the_row_that_it_would_have_given(tmp_path: Path, with_ids: bool) -> None:
    sources = several(tmp_path, True, (3.0, 1.0))
    if not with_ids:
        table = Dataset.from_parquet([str(path) for path in sorted((tmp_path / "parquet").iterdir())])
        table.remove_columns("id").to_parquet(tmp_path / "parquet/train-0.parquet")
        (tmp_path / "parquet/train-1.parquet").unlink()
    sources.append(source(json_file(tmp_path / "a.json"), weight=1.0))
    uninterrupted = list(load_conversations(sources, seed=3))
    repeats = len(uninterrupted) - len({row["id"] for row in uninterrupted})
    assert repeats > 3
    stopped, resumed = load_conversations(sources, seed=3), load_conversations(sources, seed=3)
    start = stopped.state_dict()
    for num_seen in range(0 if with_ids else 1, len(uninterrupted) + 1, 2):
        stopped.load_state_dict(start)
        seen = list(islice(stopped, num_seen))
        resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
        assert seen + list(resumed) == uninterrupted


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_unknown_columns_are_named_beside_those_that_are_understood(tmp_path: Path) -> None:
    Dataset.from_dict({"question": ["a"], "picture": ["b"]}).to_parquet(tmp_path / "a.parquet")
    for streaming in (False, True):
        with pytest.raises(ValueError, match="columns \\['question', 'picture'\\]; understood are 'conversations'"):
            load_conversations([source(tmp_path / "a.parquet", streaming=streaming)])


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"shuffle": True}, "unknown fields \\['shuffle'\\]; allowed are path, format, weight, images, trust"),
        ({"split": "train"}, "a 'parquet' source has unknown fields \\['split'\\]"),
        ({"format": "csv"}, "`format` is 'csv'; allowed are 'digit-scenes', 'pages', 'json'"),
        ({"weight": 0}, "`weight` is 0; allowed are numbers above 0"),
        ({"weight": -1.0}, "`weight` is -1.0"),
        ({"weight": float("nan")}, "`weight` is nan"),
        ({"weight": "1"}, "`weight` is '1'"),
    ],
)
def test_a_field_that_is_unknown_or_not_allowed_is_refused(
    tmp_path: Path, fields: dict[str, Any], problem: str
) -> None:
    first, second = source(json_file(tmp_path / "a.json"), weight=1.0), source(parquet_folder(tmp_path / "data"))
    with pytest.raises(ValueError, match=rf"`sources\[1\]`: .*{problem}"):
        load_conversations([first, second | {"weight": 1.0} | fields])


def test_weights_are_for_all_or_none_and_a_stream_in_a_mixture_needs_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sources\\[1\\]`: `weight` is None"):
        load_conversations(several(tmp_path, False, (1.0, None)))
    with pytest.raises(ValueError, match="size of a streamed source is not known; give each source a `weight`"):
        load_conversations(several(tmp_path, True, (None, None)))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`sources` is empty"):
        load_conversations([])
    with pytest.raises(ValueError, match="expected is a dictionary with a `path`"):
        load_conversations([{"weight": 1.0}])
    for name in ("*.parquet", "shards/*.tar", "a.json"):
        with pytest.raises(ValueError, match=r"`sources\[0\]`: .*there is no"):
            load_conversations([source(tmp_path / name)])
    with pytest.raises(ValueError, match="`sources\\[0\\]`: .*no data"):
        load_conversations([source(parquet_folder(tmp_path / "data"), format="hub", split="train[:0]")])
    datasets.DatasetDict({"train": llava_table(range(1))}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match="has the splits train; pass one's own folder"):
        load_conversations([source(tmp_path / "splits")])
