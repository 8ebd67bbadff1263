"""Relevance that is computed once, before training, and noted beside the rows.

What a patch is worth to an answer is said by a model that sees all of them. While only a controller trains, that model
stays the same: computing it anew in every step and every epoch, or for every controller that is compared, is most of
what these cost. `datasets` keeps it beside rows that lie on a disk, by them and by the weights that it is of.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import datasets
import torch
from datasets import List, Value
from torch import nn
from torch.utils.data import Dataset

from ..modeling.parts import parts_of_names
from .data.collator import RELEVANCE
from .losses import visual_relevance
from .trained_parts import adavtp_model_of, model_with_head

# Raise it whenever a change alters what relevance is: otherwise the cache would give that of the old code.
_RECIPE = 2
_FEATURES = datasets.Features({RELEVANCE: List(List(Value("float16")))})


class RowsWithRelevance(Dataset):
    """Rows, and beside each what was noted for it."""

    def __init__(self, rows: datasets.Dataset, noted: datasets.Dataset) -> None:
        self.rows, self.noted = rows, noted.with_format("numpy")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] | self.noted[index]


def with_relevance(
    rows: datasets.Dataset, model: nn.Module, collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
) -> RowsWithRelevance:
    """
    Rows with `patch_relevance` as a column, by the model as it is now.

    Args:
        rows: conversations of one question each, with images.
        model: see [`visual_relevance`].
        collator: makes a batch of them, a [`BudgetCollator`].

    Raises:
        ValueError: if the rows are no `datasets.Dataset`.
    """
    if not isinstance(rows, datasets.Dataset):
        raise ValueError(
            f"`relevance_once` is True and `train_dataset` is a {type(rows).__name__}; relevance is noted for "
            "the rows of a `datasets.Dataset`."
        )

    def relevance_of(_: dict[str, Any], index: int) -> dict[str, Any]:
        # A row alone, so that all images are its own.
        inputs = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in collator([rows[index]]).items()
        }
        if adavtp_model_of(model).images_in(dict(inputs)) is None:
            return {RELEVANCE: []}
        return {RELEVANCE: visual_relevance(model, inputs).of_patches.tolist()}

    noted = rows.with_format(None).map(
        relevance_of,
        with_indices=True,
        remove_columns=rows.column_names,
        features=_FEATURES,
        new_fingerprint=_fingerprint(rows, model),
        desc="Noting relevance",
    )
    return RowsWithRelevance(rows, noted)


def _fingerprint(rows: datasets.Dataset, model: nn.Module) -> str:
    """Of rows and of the weights that relevance depends on: a controller that only listens is none of them."""
    whole = model_with_head(model)
    part_of = parts_of_names(whole)
    listens = getattr(whole.config, "budget_attention", None) == "read_only"
    digest = hashlib.sha256(f"{_RECIPE} {rows._fingerprint}".encode())
    for name, tensor in sorted(whole.state_dict().items()):
        if not (listens and part_of(name) == "controller"):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
