"""Batches of samples that are about equally long, so that little of a batch is padding.

What counts is the length in the decoder, after reduction: text + images * K(budget). A long prompt at a small budget
is a short one. A shuffled stretch of rows, a mega-batch, is sorted by it and cut into batches, and the batches are
shuffled; over many mega-batches any two rows may meet. Where a whole batch has one budget, the order of lengths
depends on the batch: rows without images pass others as the budget rises.
"""

import torch

# As many as in transformers' grouping by length: enough to find rows of a length, few enough to keep mixing them.
BATCHES_IN_MEGA_BATCH = 50


def length_groups(tokens: torch.Tensor, batch_size: int, generator: torch.Generator) -> list[list[int]]:
    """
    Divides samples into batches of about equal lengths.

    Args:
        tokens: `[num_batches, num_batches * batch_size]`; how long each sample is in each of the batches. Rows differ
            where batches have budgets of their own.
        batch_size: samples of a batch.
        generator: of the order of batches.

    Returns:
        `num_batches` lists of `batch_size` samples; every sample is in one of them.
    """
    groups = []
    for first in range(0, len(tokens), BATCHES_IN_MEGA_BATCH):
        batches = range(first, min(first + BATCHES_IN_MEGA_BATCH, len(tokens)))
        left = torch.arange(batches.start * batch_size, batches.stop * batch_size)
        for batch in batches:
            # Any part of those that are left, and not the next one: whole batches come in random order.
            part = int(torch.randint(len(left) // batch_size, (), generator=generator)) * batch_size
            by_length = left[tokens[batch, left].argsort(stable=True)]
            groups.append(by_length[part : part + batch_size].tolist())
            left = torch.cat([by_length[:part], by_length[part + batch_size :]])
    return groups
