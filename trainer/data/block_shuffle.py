"""A data set as a sequence of blocks of shuffled rows, which can begin at any block.

A shuffle buffer's content depends on everything that went through it, and is lost when a run stops. A block is read
whole and shuffled in itself, so what a run needs to go on is where the source stood when the block began. A data set
that is read by index is shuffled as a whole, and a block is a stretch of that order.
"""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from .budget_stream import mixed

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]


@dataclass
class Block:
    """Shuffled rows. Of a data set that is read by index, a row is read when it is asked for."""

    epoch: int
    first_row: int
    rows: list[Row] | Subset[Row]
    is_last: bool
    # State of a streamed source before and behind the block; `None` at its beginning, and for one read by index.
    source: dict[str, Any] | None = None
    source_after: dict[str, Any] | None = None


def indexed_blocks(
    rows: "datasets.Dataset", seed: int, epoch: int, block_size: int, page_size: int, first_row: int = 0
) -> Iterator[Block]:
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
    order = torch.randperm(len(rows), generator=generator_of(seed, epoch)).tolist()
    order = order[: len(order) // page_size * page_size]
    for first in range(first_row, len(order), block_size):
        block = Subset(rows, order[first : first + block_size])
        yield Block(epoch, first, block, is_last=first + block_size >= len(order))


class StreamedBlocks:
    """
    The blocks of an epoch of a streamed data set; arguments are those of [`indexed_blocks`], and the source's state at
    `first_row`.

    Reading a block at once would stop training for as long, so the next one is read page by page while the batches
    of this one are used.
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
        # A copy: workers would see one another's epoch through it.
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
