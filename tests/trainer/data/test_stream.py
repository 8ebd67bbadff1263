"""What a stream promises: an order and budgets that follow from the position, and equal lengths after reduction."""

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import DataLoader

from adavtp.trainer.data.group_by_length import length_groups
from adavtp.trainer.data.reader import ConversationReader
from adavtp.trainer.data.stream import ConversationStream, measured_lengths
from tiny_conversations import assistant, digit_processor, llava_processor, user
from tiny_models import NUM_PATCHES
from tiny_streams import SOURCES, source, stored_rows, tiny_stream

Sample = dict[str, Any]


def seen(samples: list[Sample]) -> list[tuple[str, float]]:
    return [(sample["id"], sample["token_budget"]) for sample in samples]


def batches_of(samples: list[Sample], size: int = 4) -> list[list[Sample]]:
    assert len(samples) % size == 0
    return [samples[start : start + size] for start in range(0, len(samples), size)]


def as_in_a_file(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


# Order


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("group_by_length", [True, False])
def test_an_epoch_has_every_row_once_but_those_that_do_not_fill_a_batch(kind: str, group_by_length: bool) -> None:
    stream = tiny_stream(source(kind, stored_rows(23)), group_by_length=group_by_length)
    epochs = [list(stream) for _ in range(6)]
    for epoch in epochs:
        assert len(epoch) == len({sample["id"] for sample in epoch}) == 20
    assert len({tuple(seen(epoch)) for epoch in epochs}) == 6
    # Which rows are left out is chance, so that none is always.
    assert len({sample["id"] for epoch in epochs for sample in epoch}) == 23


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_the_same_seed_gives_the_same_stream_and_another_one_another(kind: str, per: str) -> None:
    rows = source(kind, stored_rows(16))
    first, same, other = (list(tiny_stream(rows, per=per, seed=seed)) for seed in (1, 1, 2))
    assert seen(first) == seen(same)
    assert [sample["id"] for sample in first] != [sample["id"] for sample in other]
    assert {budget for _, budget in seen(first)}.isdisjoint(budget for _, budget in seen(other))


@pytest.mark.parametrize("kind", SOURCES)
def test_the_number_of_workers_changes_nothing(kind: str) -> None:
    rows = source(kind, stored_rows(23))
    stream = tiny_stream(rows)
    # Three epochs of five batches: workers cross the ends of epochs at different batches.
    expected = seen([sample for _ in range(3) for sample in stream])
    for num_workers in (1, 2):
        loader = DataLoader(tiny_stream(rows).endless(1, 0), batch_size=4, num_workers=num_workers, collate_fn=list)
        assert seen([sample for batch in itertools.islice(loader, 15) for sample in batch]) == expected


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_one_process_with_four_samples_and_two_with_two_share_their_batches(kind: str, per: str) -> None:
    rows = source(kind, stored_rows(30))
    alone = tiny_stream(rows, per=per)
    shares = [tiny_stream(rows, per=per, batch_size=2).endless(2, process) for process in range(2)]
    parts = [batches_of(list(itertools.islice(share, 28)), 2) for share in shares]
    together = [sample for first, second in zip(*parts, strict=True) for sample in (*first, *second)]
    assert seen(together) == seen([*alone, *alone])


def test_streams_over_the_same_data_set_do_not_disturb_one_another() -> None:
    rows = source("streamed", stored_rows(32))
    undisturbed = list(tiny_stream(rows))
    one, other = tiny_stream(rows), tiny_stream(rows)
    other.load_state_dict(other.state_dict() | {"epoch": 1})
    samples = []
    for number, sample in enumerate(one):
        samples.append(sample)
        if number in (1, 11):
            list(other)
    assert [s.get("stream_position") for s in samples] == [s.get("stream_position") for s in undisturbed]
    assert seen(samples) == seen(undisturbed)


def test_a_process_reads_its_own_rows_alone() -> None:
    class Counting(ConversationReader):
        num_read = 0

        def read(self, row: Sample) -> Any:
            self.num_read += 1
            return super().read(row)

    reader = Counting(digit_processor())
    samples = list(tiny_stream(source("indexed", stored_rows(24)), reader, num_processes=3, process_index=1))
    assert len(samples) == reader.num_read == 8


def test_a_sample_is_what_the_reader_makes_of_its_row() -> None:
    rows, reader = stored_rows(4), ConversationReader(llava_processor())
    for sample in tiny_stream(source("streamed", rows), reader):
        read = reader.read(rows[int(sample["id"].removeprefix("row "))])
        assert (sample["id"], sample["input_ids"], sample["labels"]) == (read["id"], read["input_ids"], read["labels"])
        assert [image.tobytes() for image in sample["images"]] == [image.tobytes() for image in read["images"]]
        assert sample["rejected"] == []


# Budgets


def test_budgets_lie_in_their_range_one_for_each_sample_or_batch() -> None:
    rows = source("indexed", stored_rows(24))
    per_sample = list(tiny_stream(rows, budget_range=(0.3, 0.5)))
    assert len({budget for _, budget in seen(per_sample)}) == 24
    assert all(0.3 <= budget <= 0.5 for _, budget in seen(per_sample))
    per_batch = batches_of(list(tiny_stream(rows, per="batch")))
    assert [len({sample["token_budget"] for sample in batch}) for batch in per_batch] == [1] * 6
    assert len({batch[0]["token_budget"] for batch in per_batch}) == 6


def test_epochs_have_budgets_of_their_own() -> None:
    stream = tiny_stream(source("indexed", stored_rows(8)))
    first, second = (dict(seen(list(stream))) for _ in range(2))
    assert set(first.values()).isdisjoint(second.values())


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_grouping_by_length_does_not_change_how_budgets_are_distributed(per: str) -> None:
    rows = source("indexed", stored_rows(24))
    grouped, plain = (tiny_stream(rows, per=per, group_by_length=group, block_size=24) for group in (True, False))
    assert sorted(budget for _, budget in seen(list(grouped))) == sorted(budget for _, budget in seen(list(plain)))


# Groups


def tokens_by_hand(sample: Sample, budget: float) -> int:
    """Text tokens, and of each image's 16 patches the budget's share."""
    num_images = len(sample["images"])
    kept = max(1, math.floor(budget * NUM_PATCHES))
    return len(sample["input_ids"]) - num_images * NUM_PATCHES + num_images * kept


@pytest.mark.parametrize("kind", SOURCES)
def test_a_block_sorted_by_its_lengths_after_reduction_is_cut_into_batches(kind: str) -> None:
    samples = list(tiny_stream(source(kind, stored_rows(32)), block_size=16))
    for start in (0, 16):
        block = samples[start : start + 16]
        ascending = sorted(tokens_by_hand(sample, sample["token_budget"]) for sample in block)
        expected = [ascending[first : first + 4] for first in range(0, 16, 4)]
        batches = [sorted(tokens_by_hand(s, s["token_budget"]) for s in batch) for batch in batches_of(block)]
        assert sorted(batches) == sorted(expected)


def test_batches_come_in_random_order() -> None:
    stream = tiny_stream(source("indexed", stored_rows(32)), block_size=32)
    firsts = [[len(batch[0]["input_ids"]) for batch in batches_of(list(stream))] for _ in range(4)]
    assert all(lengths not in (sorted(lengths), sorted(lengths, reverse=True)) for lengths in firsts)
    assert len(set(map(tuple, firsts))) > 1


def test_with_one_budget_for_a_batch_its_samples_are_neighbours_at_that_budget() -> None:
    left = list(tiny_stream(source("indexed", stored_rows(32)), per="batch", block_size=32))
    for batch in batches_of(left.copy()):
        budget = batch[0]["token_budget"]
        ascending = sorted(tokens_by_hand(sample, budget) for sample in left)
        parts = [ascending[first : first + 4] for first in range(0, len(left), 4)]
        assert sorted(tokens_by_hand(sample, budget) for sample in batch) in parts
        left = [sample for sample in left if sample not in batch]


def test_groups_worked_out_by_hand() -> None:
    # Text tokens of four samples, the second and third with an image of 10 tokens; two batches, at budgets 1 and 0.1.
    text, images = torch.tensor([12, 1, 5, 30]), torch.tensor([0, 1, 1, 0])
    whole, reduced = text + images * 10, text + images
    assert whole.tolist() == [12, 11, 15, 30] and reduced.tolist() == [12, 2, 6, 30]
    groups = {}
    for seed in range(20):
        first, second = length_groups(torch.stack([whole, reduced]), 2, torch.Generator().manual_seed(seed))
        groups[tuple(sorted(first))] = sorted(second)
    # At budget 1 samples 1 and 0 are the short ones, and 2 and 3 are left; or the other way round.
    assert groups == {(0, 1): [2, 3], (2, 3): [0, 1]}
    alike = length_groups(torch.stack([reduced, reduced]), 2, torch.Generator().manual_seed(0))
    assert sorted(map(sorted, alike)) == [[0, 3], [1, 2]]


def test_more_rows_than_a_mega_batch_are_grouped_stretch_by_stretch() -> None:
    tokens = torch.arange(200).flip(0).expand(100, 200)
    groups = length_groups(tokens, 2, torch.Generator().manual_seed(0))
    assert sorted(index for group in groups for index in group) == list(range(200))
    assert all(abs(first - second) == 1 for first, second in groups)
    assert all(index < 100 for group in groups[:50] for index in group)


def test_lengths_measured_before_are_those_measured_on_the_way() -> None:
    rows = stored_rows(24)
    rows[5]["images"] = []
    data, reader = source("indexed", rows), ConversationReader(digit_processor())
    lengths = measured_lengths(data, reader)
    # <s> USER: question ASSISTANT: answer </s>: five tokens and the question's.
    by_hand = [[5 + 1 + index * 5 % 7, (1, 0, 2)[index % 3]] for index in range(24)]
    assert lengths.tolist() == by_hand[:5] + [[-1, -1]] + by_hand[6:]
    given, measured = tiny_stream(data, reader, lengths=lengths), tiny_stream(data, reader)
    assert seen(list(given)) == seen(list(measured))


# Going on


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("per", ["batch", "sample"])
def test_a_stream_goes_on_from_every_batch(kind: str, per: str) -> None:
    rows = source(kind, stored_rows(22))
    whole = [sample for _, sample in zip(range(40), tiny_stream(rows, per=per).endless(1, 0), strict=False)]
    for batch in range(1, 10):
        stream = tiny_stream(rows, per=per).endless(1, 0)
        stream.load_state_dict(as_in_a_file(whole[4 * batch - 1]["stream_position"]))
        assert seen(list(itertools.islice(stream, 40 - 4 * batch))) == seen(whole[4 * batch :])


@pytest.mark.parametrize("kind", SOURCES)
def test_its_state_is_the_position_of_the_batch_that_it_gave_last(kind: str) -> None:
    stream = tiny_stream(source(kind, stored_rows(22)))
    for number, sample in enumerate(stream, start=1):
        if number % 4 == 0:
            assert stream.state_dict() == sample["stream_position"]
        else:
            assert "stream_position" not in sample
    assert stream.state_dict()["epoch"] == 1 and stream.state_dict()["batch"] == 0


def test_two_processes_go_on_where_one_stood() -> None:
    rows = source("streamed", stored_rows(22))
    whole = list(tiny_stream(rows))
    second = tiny_stream(rows, batch_size=2).endless(2, 1)
    second.load_state_dict(whole[11]["stream_position"])
    assert seen(list(itertools.islice(second, 2))) == seen(whole[14:16])


def test_rows_before_the_block_are_not_read_again() -> None:
    rows, read = stored_rows(40), []

    def shards(numbers: list[int]) -> Iterator[Sample]:
        for number in numbers:
            read.append(number)
            yield rows[number]

    # A row to a shard: `datasets` goes to a shard at once, and through it row by row.
    streamed = datasets.IterableDataset.from_generator(shards, gen_kwargs={"numbers": list(range(40))})
    whole = list(tiny_stream(streamed))
    # The twentieth sample is in the third block of eight; the twenty-fourth is that block's last.
    for number, first in ((20, 16), (24, 24)):
        read.clear()
        stream = tiny_stream(streamed)
        stream.load_state_dict(whole[number - 1]["stream_position"])
        assert seen(list(stream)) == seen(whole[number:])
        # It stands at the end of the shard before.
        assert sorted(read) == list(range(first - 1, 40))


def test_of_rows_read_by_index_only_those_that_are_needed_are_read() -> None:
    class Counting(list):
        def __getitem__(self, index: int) -> Sample:
            read.append(index)
            return super().__getitem__(index)

    read, rows, reader = [], Counting(stored_rows(24)), ConversationReader(digit_processor())
    lengths = torch.tensor([reader.lengths(row) for row in list(rows)])
    whole = list(tiny_stream(rows, reader, lengths=lengths))
    read.clear()
    stream = tiny_stream(rows, reader, lengths=lengths)
    stream.load_state_dict(whole[11]["stream_position"])
    assert seen(list(stream)) == seen(whole[12:])
    assert len(read) == len(set(read)) == 12


def test_the_next_block_is_read_while_this_one_is_used() -> None:
    read = []

    def rows() -> Iterator[Sample]:
        for row in stored_rows(64):
            read.append(row["id"])
            yield row

    stream = tiny_stream(datasets.IterableDataset.from_generator(rows), batch_size=2, block_size=16)
    num_read = []
    for number, _ in enumerate(stream):
        if number % 2 == 0:
            num_read.append(len(read))
    # A page of two rows with each batch, once the first block is there.
    steps = [after - before for before, after in itertools.pairwise(num_read)]
    assert num_read[0] == 18 and max(steps) <= 4


@pytest.mark.parametrize(
    "changed",
    [{"seed": 2}, {"per": "batch"}, {"budget_range": (0.1, 1.0)}, {"batch_size": 2}, {"group_by_length": False}],
    ids=str,
)
def test_a_position_in_another_stream_is_an_error(changed: dict[str, Any]) -> None:
    rows = source("indexed", stored_rows(16))
    state = list(tiny_stream(rows))[3]["stream_position"]
    with pytest.raises(ValueError, match="batch_size" if "batch_size" in changed else next(iter(changed))):
        tiny_stream(rows, **changed).load_state_dict(state)
    with pytest.raises(ValueError, match="num_rows"):
        tiny_stream(source("indexed", stored_rows(17))).load_state_dict(state)


# Rows that cannot be read


BROKEN = {
    "image": lambda row: row["images"][0].update(bytes=b"no image"),
    "conversation": lambda row: row["images"].clear(),
    "length": lambda row: row.update(messages=[user("red " * 400, 1), assistant("yes")]),
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("what", BROKEN)
def test_a_rejected_row_is_replaced_by_one_of_its_block_and_reported(kind: str, what: str) -> None:
    rows = stored_rows(32, (1,))
    sound = list(tiny_stream(source(kind, rows), ConversationReader(digit_processor(), max_length=200)))
    for index in (3, 20):
        BROKEN[what](rows[index])
    stream = tiny_stream(source(kind, rows), ConversationReader(digit_processor(), max_length=200))
    samples = list(stream)
    reported = [rejected for sample in samples for rejected in sample["rejected"]]
    assert sorted(rejected["id"] for rejected in reported) == ["row 20", "row 3"]
    assert {rejected["kind"] for rejected in reported} == {what} and all(r["reason"] for r in reported)
    for start in range(0, 32, 8):
        block = samples[start : start + 8]
        readable = {sample["id"] for sample in block} | {r["id"] for sample in block for r in sample["rejected"]}
        assert readable == {sample["id"] for sample in sound[start : start + 8]}
    assert sorted(budget for _, budget in seen(samples)) == sorted(budget for _, budget in seen(sound))


@pytest.mark.parametrize("kind", SOURCES)
def test_processes_agree_on_what_replaces_a_rejected_row(kind: str) -> None:
    rows = stored_rows(32)
    for index in (0, 5, 9, 12, 15, 20, 21):
        rows[index] |= {"problem": "it is broken"}
    data = source(kind, rows)
    alone = list(tiny_stream(data))
    parts = [
        batches_of(list(tiny_stream(data, batch_size=2, num_processes=2, process_index=process)), 2)
        for process in range(2)
    ]
    together = [sample for first, second in zip(*parts, strict=True) for sample in (*first, *second)]
    assert seen(together) == seen(alone)
    assert [s["rejected"] for s in together] == [s["rejected"] for s in alone]
    assert sum(len(sample["rejected"]) for sample in alone) == 7


def test_rejected_rows_are_not_all_replaced_by_the_same_one() -> None:
    rows = stored_rows(32)
    for index in range(16):
        rows[index] |= {"problem": "it is broken"}
    samples = list(tiny_stream(source("indexed", rows), block_size=32))
    instead = [sample["id"] for sample in samples if sample["rejected"]]
    assert len(instead) == 16 and len(set(instead)) >= 6


@pytest.mark.parametrize("kind", SOURCES)
def test_a_block_without_a_row_that_can_be_read_is_an_error(kind: str) -> None:
    rows = [row | {"problem": "it is broken"} for row in stored_rows(8)]
    with pytest.raises(ValueError, match=r"none of the 8 rows.*it is broken"):
        list(tiny_stream(source(kind, rows)))


# What cannot be


@pytest.mark.parametrize("kind", SOURCES)
def test_fewer_rows_than_a_batch_are_an_error(kind: str) -> None:
    with pytest.raises(ValueError, match="`rows` has 6 row"):
        list(tiny_stream(source(kind, stored_rows(6)), batch_size=4, num_processes=2))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"block_size": 0}, "block_size"),
        ({"process_index": 1}, "process_index"),
        ({"lengths": torch.zeros(3, 2)}, "lengths"),
    ],
    ids=str,
)
def test_arguments_that_are_not_allowed_are_errors(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        tiny_stream(source("indexed", stored_rows(8)), **arguments)


def test_a_stream_is_as_long_as_a_process_s_share() -> None:
    assert len(tiny_stream(source("indexed", stored_rows(23)), batch_size=2, num_processes=2)) == 10
    for stream in (tiny_stream(source("streamed", stored_rows(23))), endless(23)):
        with pytest.raises(TypeError):
            len(stream)


def endless(num_rows: int) -> ConversationStream:
    return tiny_stream(source("indexed", stored_rows(num_rows))).endless(1, 0)
