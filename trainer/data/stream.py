"""Conversations in the order in which a run trains on them, with their budgets: the same on any number of machines.

An epoch is a sequence of blocks. A block's rows are shuffled, get budgets, and are put together into global batches of
samples that are about equally long after reduction; each process reads its own part of each. All of that follows
from the seed, the epoch and the position, so every process and every worker of a data loader makes the same plan
without asking another, and a run goes on from any batch: a position is the source's state where the block begins, and
the number of batches since.
"""

from collections.abc import Iterator
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.utils.data import IterableDataset, Subset, get_worker_info

from .block_shuffle import Block, Row, StreamedBlocks, generator_of, indexed_blocks
from .budget_stream import BudgetStream, mixed
from .group_by_length import length_groups
from .reader import ConversationReader, RejectedSample

if TYPE_CHECKING:
    import datasets

START: dict[str, Any] = {"epoch": 0, "batch": 0, "block": 0, "source": None}


@dataclass
class BlockPlan:
    """What becomes of a block: of each global batch, which of the block's rows are its samples, and their budgets."""

    block: Block
    batches: list[list[int]]
    budgets: list[list[float]]


class ConversationStream(IterableDataset):
    """
    A stream of encoded conversations with token budgets.

    Iterating goes on from where the stream stands to the end of the epoch; the next iteration is the next epoch. Rows
    that do not fill a global batch at an epoch's end are left out of it, so all processes have equally many batches.
    A data set that is read by index is shuffled as a whole; of a streamed one, each block is shuffled in itself.

    A budget belongs to a row, or to a batch, before rows are put together by length, so what is put together does not
    change how budgets are distributed.

    Args:
        rows: conversations, as [`load_conversations`] gives them. Each worker of each process reads the whole of a
            streamed data set, images undecoded, and keeps two blocks of it in memory.
        reader: turns a row into tokens and images.
        batch_size: samples of one process's batch.
        budget_range, per: of the budgets, see [`BudgetStream`]; a batch is a global one.
        seed: of the order and of the budgets.
        group_by_length: whether a batch's samples are about equally long after reduction.
        block_size: rows of a block, rounded up to whole global batches.
        num_processes: processes that share a global batch.
        process_index: which of them this is.
        lengths: `[num_rows, 2]`, text tokens and images of each row, as [`measured_lengths`] gives them. Without them
            each worker of each process measures a block when it comes.

    Raises:
        ValueError: if the rows do not fill one global batch, or a size or number is not allowed. While iterating: if
            no row of a block can be read, or a streamed source has less than a global batch.
    """

    def __init__(
        self,
        rows: "datasets.Dataset | datasets.IterableDataset",
        reader: ConversationReader,
        batch_size: int,
        budget_range: tuple[float, float] = (0.2, 1.0),
        per: Literal["batch", "sample"] = "batch",
        seed: int = 0,
        group_by_length: bool = True,
        block_size: int = 2048,
        num_processes: int = 1,
        process_index: int = 0,
        lengths: torch.Tensor | None = None,
    ) -> None:
        if batch_size < 1 or block_size < 1:
            raise ValueError(f"`batch_size` is {batch_size} and `block_size` is {block_size}; both are at least 1.")
        self.rows, self.reader, self.batch_size, self.seed = rows, reader, batch_size, seed
        self.budgets = BudgetStream(budget_range, per, seed)
        self.group_by_length, self.block_size, self.lengths = group_by_length, block_size, lengths
        self.is_streamed = hasattr(rows, "load_state_dict")
        self.is_endless = False
        self._share(num_processes, process_index)
        if lengths is not None and (self.is_streamed or tuple(lengths.shape) != (len(rows), 2)):
            raise ValueError(
                f"`lengths` has shape {tuple(lengths.shape)}; it is [num_rows, 2], for a data set with a length."
            )
        self._position = START

    @property
    def global_batch_size(self) -> int:
        """Samples of all processes' batches."""
        return self.batch_size * self.num_processes

    @property
    def num_batches(self) -> int | None:
        """Global batches of an epoch; `None` for a streamed data set, of which nobody knows."""
        return None if self.is_streamed else len(self.rows) // self.global_batch_size

    def __len__(self) -> int:
        """Samples of an epoch for this process. Raises `TypeError` if nobody knows, or the stream is endless."""
        if self.num_batches is None or self.is_endless:
            raise TypeError("A stream over a streamed data set has no length, and one without end has none.")
        return self.num_batches * self.batch_size

    def endless(self, num_processes: int, process_index: int) -> "ConversationStream":
        """A copy for one of several processes that stands where this one does and goes on from epoch to epoch."""
        stream = copy(self)
        stream._share(num_processes, process_index)
        stream.is_endless = True
        return stream

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: behind the batch of which it gave the last sample. Fit for JSON."""
        return deepcopy(self._position) | {"settings": self._settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Puts the stream where another one stood; nothing before the block that stands there is read again.

        Args:
            state: from `state_dict`, or the `stream_position` of a sample. Of any number of processes whose global
                batches were as large.

        Raises:
            ValueError: if the other one had another order or other budgets.
        """
        saved, own = state["settings"], self._settings()
        if differing := [name for name in own if own[name] != saved.get(name)]:
            shown = "; ".join(f"`{name}` was {saved.get(name)} and is {own[name]}" for name in differing)
            raise ValueError(f"The stream that stood there was another one: {shown}. Go on with the same settings.")
        self._position = {name: deepcopy(state[name]) for name in START}

    def __iter__(self) -> Iterator[Row]:
        """
        Yields:
            Samples: what [`ConversationReader.read`] makes of a row, `token_budget` (float), and
            `rejected`: `{"id", "reason"}` of a row that could not be read and in whose place the sample stands. The
            last sample of a batch has `stream_position` too, the state behind that batch.
        """
        worker = get_worker_info()
        num_workers, index = (1, 0) if worker is None else (worker.num_workers, worker.id)
        own = range(self.process_index * self.batch_size, (self.process_index + 1) * self.batch_size)
        # A data loader takes one batch from each worker in turn.
        for turn, (plan, batch) in enumerate(self._planned_batches()):
            if turn % num_workers == index:
                samples = [self._sample(plan, batch, place) for place in own]
                self._position = self._position_behind(plan, batch)
                samples[-1]["stream_position"] = self.state_dict()
                yield from samples

    def _share(self, num_processes: int, process_index: int) -> None:
        if not 0 <= process_index < num_processes:
            raise ValueError(f"`process_index` is {process_index}; of {num_processes} it is 0 to {num_processes - 1}.")
        self.num_processes, self.process_index = num_processes, process_index
        if not self.is_streamed:
            self._require_a_batch(len(self.rows))

    def _require_a_batch(self, num_rows: int) -> None:
        if num_rows < self.global_batch_size:
            raise ValueError(
                f"`rows` has {num_rows} row(s); a batch of {self.batch_size} in each of {self.num_processes} "
                f"process(es) takes {self.global_batch_size}."
            )

    def _settings(self) -> dict[str, Any]:
        """What order and budgets follow from, besides the position."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "budget_range": list(self.budgets.budget_range),
            "per": self.budgets.per,
            "group_by_length": self.group_by_length,
            "batches_per_block": self._batches_per_block(),
            "num_rows": None if self.is_streamed else len(self.rows),
        }

    def _batches_per_block(self) -> int:
        return -(-self.block_size // self.global_batch_size)

    def _position_behind(self, plan: BlockPlan, batch: int) -> dict[str, Any]:
        block, batches = plan.block, len(plan.batches)
        first = block.first_row // self.global_batch_size
        here = {"epoch": block.epoch, "batch": first + batch + 1}
        if batch + 1 < batches:
            return here | {"block": first, "source": block.source}
        if not block.is_last:
            return here | {"block": first + batches, "source": block.source_after}
        return START | {"epoch": block.epoch + 1}

    def _planned_batches(self) -> Iterator[tuple[BlockPlan, int]]:
        """From where the stream stands: the plan of a block, and the number in it of the batch whose turn it is."""
        position = self._position
        while True:
            blocks, num_rows = self._blocks(position), 0
            for block in blocks:
                plan, num_rows = self._plan(block), num_rows + len(block.rows)
                first = position["batch"] - block.first_row // self.global_batch_size
                for batch in range(max(first, 0), len(plan.batches)):
                    yield plan, batch
                    if self.is_streamed:
                        blocks.read_ahead()
            self._require_a_batch(num_rows)
            if not self.is_endless:
                return
            position = START | {"epoch": position["epoch"] + 1}

    def _blocks(self, position: dict[str, Any]) -> Iterator[Block] | StreamedBlocks:
        page_size = self.global_batch_size
        first_row, block_size = position["block"] * page_size, self._batches_per_block() * page_size
        where = (self.rows, self.seed, position["epoch"], block_size, page_size, first_row)
        return StreamedBlocks(*where, position["source"]) if self.is_streamed else indexed_blocks(*where)

    def _plan(self, block: Block) -> BlockPlan:
        size = self.global_batch_size
        num_batches = len(block.rows) // size
        num_samples, first_batch = num_batches * size, block.first_row // size
        stream = BudgetStream(self.budgets.budget_range, self.budgets.per, mixed(self.seed, block.epoch))
        if stream.per == "batch":
            drawn = stream.numbered(range(first_batch, first_batch + num_batches))[:, None]
        else:
            drawn = stream.numbered(range(block.first_row, block.first_row + num_samples))[None]
        if self.group_by_length and num_batches:
            generator = generator_of(self.seed, block.epoch, first_batch, 1)
            tokens = self._tokens(block, drawn).expand(num_batches, num_samples)
            batches = length_groups(tokens, size, generator)
        else:
            batches = torch.arange(num_samples).view(num_batches, size).tolist()
        # [num_batches, num_samples]: the budget that a sample has in a batch.
        budgets = drawn.expand(num_batches, num_samples)
        return BlockPlan(block, batches, [budgets[batch, own].tolist() for batch, own in enumerate(batches)])

    def _tokens(self, block: Block, budgets: torch.Tensor) -> torch.Tensor:
        """How long samples are in the decoder at their budgets, `[num_batches or 1, num_samples]`."""
        num_samples = len(block.rows) // self.global_batch_size * self.global_batch_size
        if self.lengths is not None and isinstance(block.rows, Subset):
            lengths = self.lengths[block.rows.indices[:num_samples]]
        else:
            lengths = torch.tensor([_lengths_of(self.reader, block.rows[index]) for index in range(num_samples)])
        # What cannot be measured will be replaced. As long as its neighbour, it does not stand with its like.
        is_measured = lengths[:, 0] >= 0
        neighbour = torch.arange(num_samples).where(is_measured, torch.tensor(-1)).cummax(dim=0).values
        return self.reader.lengths_at(lengths[neighbour].clamp(min=0), budgets)

    def _sample(self, plan: BlockPlan, batch: int, place: int) -> Row:
        """The sample in a place: the row that was planned, or another one of the block if that cannot be read."""
        rejected: list[Row] = []
        for index in self._candidates(plan, batch, place):
            try:
                read = self.reader.read(plan.block.rows[index])
            except RejectedSample as error:
                rejected.append({"id": error.id, "reason": error.reason, "kind": error.kind})
                continue
            # Others that were tried are reported where their own place is.
            return read | {"token_budget": plan.budgets[batch][place], "rejected": rejected[:1]}
        raise ValueError(
            f"`rows`: none of the {len(rejected)} rows from number {plan.block.first_row} of epoch {plan.block.epoch} "
            f"on can be read, the first because: {rejected[0]['reason']} (id {rejected[0]['id']!r})."
        )

    def _candidates(self, plan: BlockPlan, batch: int, place: int) -> Iterator[int]:
        """The planned row; then, in random order, the other rows of its batch, which are as long, and of its block."""
        own = plan.batches[batch]
        yield own[place]
        generator = generator_of(self.seed, plan.block.epoch, plan.block.first_row, 2, own[place])
        others = [index for number, rows in enumerate(plan.batches) if number != batch for index in rows]
        for rows in (own[:place] + own[place + 1 :], others):
            for index in torch.randperm(len(rows), generator=generator).tolist():
                yield rows[index]


def measured_lengths(rows: "datasets.Dataset", reader: ConversationReader, num_processes: int = 1) -> torch.Tensor:
    """
    Lengths of all rows, before a run, so that its workers need not each measure them.

    `datasets` keeps the result on disk beside the data set and measures again when rows, tokenizer or template change.

    Args:
        rows: conversations.
        reader: as for the stream.
        num_processes: processes that measure.

    Returns:
        `[num_rows, 2]` int64, see [`ConversationReader.lengths`]; -1 for a row that cannot be understood.
    """
    measured = rows.map(
        lambda row: {"lengths": _lengths_of(reader, row)},
        remove_columns=rows.column_names,
        num_proc=num_processes if num_processes > 1 else None,
        desc="Measuring conversations",
    )
    # As a list: one by one, hundreds of thousands of numbers take minutes.
    return torch.tensor(measured["lengths"][:])


def _lengths_of(reader: ConversationReader, row: Row) -> tuple[int, int]:
    """See [`ConversationReader.lengths`]; (-1, -1) of a row that cannot be understood, which will be rejected."""
    try:
        return reader.lengths(row)
    except RejectedSample:
        return -1, -1
