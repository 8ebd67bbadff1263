"""What a batch for training holds: conversations padded, images in order, budgets in range."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from adavtp import AdaVTPProcessor, BudgetCollator
from adavtp.tasks.digit_scenes import load_digit_questions
from adavtp.trainer.data.budget_stream import BudgetStream
from tiny_conversations import (
    PROCESSORS,
    assistant,
    conversation_rows,
    digit_model,
    digit_processor,
    llava_processor,
    picture,
    user,
)
from tiny_models import NUM_PATCHES

FULL = (1.0, 1.0)


@pytest.fixture(params=PROCESSORS, scope="module")
def processor(request: pytest.FixtureRequest) -> AdaVTPProcessor:
    return PROCESSORS[request.param]()


@pytest.mark.parametrize("images_per_row", [(1,), (0,), (1, 0, 2)], ids=str)
def test_a_batch_is_its_rows_padded_on_the_right(processor: AdaVTPProcessor, images_per_row: tuple[int, ...]) -> None:
    rows = conversation_rows(4, images_per_row)
    collator = BudgetCollator(processor)
    batch = collator(rows)
    for index, row in enumerate(rows):
        alone = collator([row])
        length = alone["input_ids"].shape[1]
        for name, fill in (("input_ids", processor.tokenizer.pad_token_id), ("attention_mask", 0), ("labels", -100)):
            assert batch[name][index, :length].tolist() == alone[name][0].tolist()
            assert set(batch[name][index, length:].tolist()) <= {fill}
        assert alone["attention_mask"].all()
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_images_come_in_the_order_of_the_rows() -> None:
    processor = digit_processor()
    rows = conversation_rows(4, (1, 0, 2))
    # Of which one is no photograph.
    rows[0]["images"] = [picture().convert("P")]
    batch = BudgetCollator(processor)(rows)
    images = [image for row in rows for image in row["images"]]
    expected = processor(images=images, text="<image>" * 4, return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=-1).tolist() == [
        NUM_PATCHES * len(row["images"]) for row in rows
    ]


def test_a_batch_without_images_has_no_pixels() -> None:
    batch = BudgetCollator(digit_processor())(conversation_rows(2, (0,)))
    assert "pixel_values" not in batch
    row = {"messages": conversation_rows(1, (0,))[0]["messages"]}
    for images in ({}, {"images": None}, {"images": []}):
        assert "pixel_values" not in BudgetCollator(digit_processor())([row | images])


def test_rows_of_a_data_set_are_the_rows_written_by_hand(tmp_path: Path) -> None:
    data = load_digit_questions("train", 3, cache_dir=tmp_path)
    collator = BudgetCollator(digit_processor(), FULL)
    by_hand = [
        {"images": row["images"], "messages": [user(row["question"], 1), assistant(row["answer"])]} for row in data
    ]
    batch, expected = collator(list(data)), collator(by_hand)
    assert data[0]["messages"][0]["content"][0]["text"] is None
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(batch[name], value), name


@pytest.mark.parametrize(
    ("shown", "given"), [((1,), (0,)), ((0,), (1,)), ((1, 1), (2, 0)), ((2, 0), (1, 1)), ((1, 1), (1, 2))], ids=str
)
def test_a_row_whose_images_are_not_those_of_its_messages_is_an_error(
    shown: Sequence[int], given: Sequence[int]
) -> None:
    rows = [
        {"images": [picture(n) for n in range(num)], "messages": [user("is there a 3 ?", places), assistant("no")]}
        for places, num in zip(shown, given, strict=True)
    ]
    with pytest.raises(ValueError, match="image"):
        BudgetCollator(digit_processor())(rows)


def encoded(processor: AdaVTPProcessor, rows: list[dict[str, Any]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """The rows as a stream gives them, each encoded by the collator alone."""
    samples = []
    for number, (row, budget) in enumerate(zip(rows, budgets, strict=True)):
        alone = BudgetCollator(processor)([row])
        ids, labels = alone["input_ids"][0].tolist(), alone["labels"][0].tolist()
        sample = {"id": f"row {number}", "input_ids": ids, "labels": labels, "images": row["images"]}
        samples.append(
            sample | {"token_budget": budget, "rejected": [{"id": f"lost {number}", "reason": "", "kind": ""}]}
        )
    samples[-1]["stream_position"] = {"epoch": 3}
    return samples


def test_encoded_rows_make_the_batch_of_their_conversations_with_their_own_budgets(processor: AdaVTPProcessor) -> None:
    rows, budgets = conversation_rows(4, (1, 0, 2)), [0.25, 1.0, 0.5, 0.375]
    expected = BudgetCollator(processor)(rows)
    batch = BudgetCollator(processor)(encoded(processor, rows, budgets))
    for name in ("input_ids", "attention_mask", "labels", "pixel_values"):
        assert torch.equal(batch[name], expected[name]), name
    assert batch["token_budget"].dtype == torch.float32 and batch["token_budget"].tolist() == budgets
    assert [rejected["id"] for rejected in batch["rejected"]] == [f"lost {number}" for number in range(4)]
    assert batch["stream_position"] == {"epoch": 3}
    assert not {"rejected", "stream_position"} & expected.keys()


def test_an_encoded_row_with_images_of_another_number_is_an_error() -> None:
    samples = encoded(digit_processor(), conversation_rows(2), [1.0, 1.0])
    samples[0]["images"], samples[1]["images"] = [], samples[1]["images"] * 2
    with pytest.raises(ValueError, match="shows 1 image"):
        BudgetCollator(digit_processor())(samples)


def test_padding_does_not_change_a_row_s_loss() -> None:
    processor = digit_processor()
    model, collator = digit_model(processor), BudgetCollator(processor, FULL)
    rows = conversation_rows(3, (1, 0, 2))
    with torch.no_grad():
        batch = collator(rows)
        num_targets = (batch["labels"] != -100).sum(dim=-1)
        losses = torch.stack([model(**collator([row])).loss for row in rows])
        assert torch.allclose(model(**batch).loss, (losses * num_targets).sum() / num_targets.sum(), atol=1e-5)


# Budgets


def budgets_of(stream: BudgetStream, num_batches: int = 50, batch_size: int = 4) -> torch.Tensor:
    return torch.stack([stream.next(batch_size) for _ in range(num_batches)])


@pytest.mark.parametrize("per", ["batch", "sample"])
@pytest.mark.parametrize("budget_range", [(0.0, 1.0), (0.2, 1.0), (0.7, 0.7), (0.0, 0.0), (1.0, 1.0), (0.3, 0.4)])
def test_budgets_lie_in_their_range_and_fill_it(budget_range: tuple[float, float], per: str) -> None:
    low, high = torch.tensor(budget_range)
    budgets = budgets_of(BudgetStream(budget_range, per))
    assert budgets.dtype == torch.float32
    assert (budgets >= low).all() and (budgets <= high).all()
    assert budgets.min() <= low + 0.1 * (high - low) and budgets.max() >= high - 0.1 * (high - low)


def test_budgets_are_one_per_batch_or_one_per_sample() -> None:
    per_batch, per_sample = (budgets_of(BudgetStream(per=per)) for per in ("batch", "sample"))
    assert (per_batch == per_batch[:, :1]).all()
    assert len(per_batch[:, 0].unique()) == len(per_batch)
    assert len(per_sample.unique()) == per_sample.numel()


@pytest.mark.parametrize("per", ["batch", "sample"])
def test_budgets_follow_from_the_seed_and_the_number_alone(per: str) -> None:
    stream, same, other = (BudgetStream(per=per, seed=seed) for seed in (0, 0, 1))
    budgets_of(stream, num_batches=3)
    torch.rand(5)
    assert torch.equal(stream.of_batch(3, 12, 4), same.of_batch(3, 12, 4))
    assert not torch.equal(stream.of_batch(3, 12, 4), other.of_batch(3, 12, 4))
    assert len(stream.numbered(range(1000)).unique()) > 990


def test_two_processes_see_the_budgets_that_one_sees() -> None:
    per_sample, per_batch = BudgetStream(per="sample"), BudgetStream(per="batch")
    for batch in range(5):
        halves = [per_sample.of_batch(batch, 4 * batch + 2 * process, 2) for process in range(2)]
        assert torch.equal(torch.cat(halves), per_sample.of_batch(batch, 4 * batch, 4))
        halves = [per_batch.of_batch(batch, 4 * batch + 2 * process, 2) for process in range(2)]
        assert torch.equal(torch.cat(halves), per_batch.of_batch(batch, 4 * batch, 4))


@pytest.mark.parametrize("seed", [0, 7])
def test_budgets_are_spread_evenly_and_neighbours_have_nothing_in_common(seed: int) -> None:
    budgets = BudgetStream((0.0, 1.0), "sample", seed).numbered(range(20_000)).double()
    # Ten bins with 2000 budgets each, give or take four standard deviations.
    assert (torch.histc(budgets, 10, 0, 1) - 2000).abs().max() < 4 * (20_000 * 0.1 * 0.9) ** 0.5
    for distance in (1, 2, 8, 64):
        pair = torch.stack([budgets[:-distance], budgets[distance:]])
        assert torch.corrcoef(pair)[0, 1].abs() < 4 / len(budgets) ** 0.5


def test_drawing_budgets_leaves_torch_s_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    BudgetStream().next(4)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"budget_range": (0.5, 0.2)},
        {"budget_range": (-0.1, 0.5)},
        {"budget_range": (0.2, 1.1)},
        {"budget_range": (float("nan"), 1.0)},
        {"budget_range": (0.2,)},
        {"budget_range": (0.2, 0.4, 0.6)},
        {"per": "token"},
    ],
    ids=str,
)
def test_ranges_that_make_no_sense_are_errors(arguments: dict[str, Any]) -> None:
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        BudgetStream(**arguments)
    with pytest.raises(ValueError, match=name):
        BudgetCollator(digit_processor(), **arguments)


def test_batches_come_through_the_workers_of_a_data_loader() -> None:
    rows, processor = conversation_rows(12, (1, 0, 2)), llava_processor()

    def batches(num_workers: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(seed)
        collator = BudgetCollator(processor, per="sample")
        return list(DataLoader(rows, batch_size=2, collate_fn=collator, num_workers=num_workers))

    here, there, again = batches(0), batches(2), batches(2)
    for batch, expected in zip(there, here, strict=True):
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch if name != "token_budget")
    drawn = torch.cat([batch["token_budget"] for batch in there])
    assert torch.equal(drawn, torch.cat([batch["token_budget"] for batch in again]))
    # Every worker has a copy of the stream; the copies must not all draw the same.
    assert len(drawn.unique()) == len(rows)
    assert drawn.min() >= 0.2 and drawn.max() <= 1.0


@pytest.mark.parametrize("image", ["/etc/hostname", "http://localhost:1/a.png", Path("a.png")], ids=str)
def test_an_image_that_is_only_named_is_not_looked_for(image: Any) -> None:
    (row,) = conversation_rows(1)
    with pytest.raises(ValueError, match="expected are decoded images"):
        BudgetCollator(digit_processor())([row | {"images": [image]}])
