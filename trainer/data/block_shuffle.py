"""A data set as a sequence of blocks of shuffled rows, which can begin at any block.

A shuffle buffer's content depends on everything that went through it, and is lost when a run stops. A block is read
whole and shuffled in itself, so what a run needs to go on is where the source stood when the block began. A data set
that is read by index is shuffled as a whole, and a block is a stretch of that order.
"""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .budget_stream import mixed

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]


@dataclass
class Block:
    """
    Attributes:
        epoch: which time the data set is gone through, from 0.
        first_row: number in the epoch of the first row.
        rows: shuffled; of a data set that is read by index, a row is read when it is asked for.
        is_last: whether the epoch ends with it.
        source: state of a streamed source before the block; `None` at its beginning, and for one read by index.
        source_after: the same behind the block.
    """

    epoch: int
    first_row: int
    rows: Sequence[Row]
    is_last: bool
    source: dict[str, Any] | None = None
    source_after: dict[str, Any] | None = None


class IndexedRows(Sequence[Row]):
    """Rows of a data set in an order, each read when it is asked for. `indices` are theirs in the data set."""

    def __init__(self, rows: "datasets.Dataset", indices: torch.Tensor) -> None:
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Row:
        return self.rows[int(self.indices[index])]


class IndexedBlocks:
    """
    The blocks of an epoch of a data set that is read by index.

    Args:
        rows: with a length and rows by index.
        seed: of the order.
        epoch: has an order of its own.
        block_size: rows of a block, a multiple of `page_size`; the last one has those that are left.
        page_size: rows that belong together. Those that do not fill a page at the end are left out.
        first_row: number of the first row of the block to begin with.
    """

    def __init__(
        self, rows: "datasets.Dataset", seed: int, epoch: int, block_size: int, page_size: int, first_row: int = 0
    ) -> None:
        self.rows, self.seed, self.epoch, self.block_size = rows, seed, epoch, block_size
        self.page_size, self.first_row = page_size, first_row

    def __iter__(self) -> Iterator[Block]:
        order = torch.randperm(len(self.rows), generator=generator_of(self.seed, self.epoch))
        order = order[: len(order) // self.page_size * self.page_size]
        for first in range(self.first_row, len(order), self.block_size):
            rows = IndexedRows(self.rows, order[first : first + self.block_size])
            yield Block(self.epoch, first, rows, is_last=first + self.block_size >= len(order))

    def read_ahead(self) -> bool:
        """Nothing is read before it is asked for: `False`."""
        return False


class StreamedBlocks:
    """
    The blocks of an epoch of a streamed data set.

    Reading a block at once would stop training for as long, so the next one is read page by page while the batches
    of this one are used.

    Args:
        rows: a `datasets.IterableDataset`. It is not touched: workers would see one another's epoch through it.
        epoch: as for `set_epoch`.
        page_size: rows that are read at once.
        source: the source's state at `first_row`; `None` for its beginning.
        seed, block_size, first_row: as in [`IndexedBlocks`].
    """

    def __init__(
        self,
        rows: "datasets.IterableDataset",
        seed: int,
        epoch: int,
        block_size: int,
        page_size: int,
        first_row: int = 0,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.seed, self.epoch, self.page_size, self.first_row = seed, epoch, page_size, first_row
        self._pages_per_block = block_size // page_size
        self._rows = deepcopy(rows)
        self._rows.set_epoch(epoch)
        if source is not None:
            self._rows.load_state_dict(source)
        # In pages, because iterating row by row gives each worker of a data loader other rows.
        self._iterator = self._rows.iter(batch_size=page_size)
        self._next_source, self._has_ended = source, False
        self._pages: list[tuple[dict[str, Any] | None, list[Row]]] = []

    def read_ahead(self) -> bool:
        """Reads a page of the next block. `False` if that block is whole and the page behind it is known, too."""
        if self._has_ended or len(self._pages) > self._pages_per_block:
            return False
        page = next(self._iterator, {})
        rows = [dict(zip(page, values, strict=True)) for values in zip(*page.values(), strict=True)]
        self._has_ended = len(rows) < self.page_size
        if rows:
            self._pages.append((self._next_source, rows))
            self._next_source = self._rows.state_dict()
        return not self._has_ended

    def __iter__(self) -> Iterator[Block]:
        first = self.first_row
        while True:
            while self.read_ahead():
                pass
            pages, self._pages = self._pages[: self._pages_per_block], self._pages[self._pages_per_block :]
            if self._pages and len(self._pages[0][1]) < self.page_size:
                # Too few for a batch: beside others they have a chance to be in one.
                pages, self._pages = pages + self._pages, []
            if not pages:
                return
            read = [row for _, rows in pages for row in rows]
            order = torch.randperm(len(read), generator=generator_of(self.seed, self.epoch, first)).tolist()
            after = self._pages[0][0] if self._pages else None
            yield Block(self.epoch, first, [read[i] for i in order], not self._pages, pages[0][0], after)
            first += len(read)


def generator_of(*numbers: int) -> torch.Generator:
    """Random numbers that follow from these alone."""
    return torch.Generator().manual_seed(mixed(*numbers))
