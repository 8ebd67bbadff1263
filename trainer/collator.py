"""From conversations with images to batches with a token budget."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..modeling.processing_adavtp import AdaVTPProcessor, readable_images
from .budget_stream import BudgetStream
from .conversation import IGNORED, encode_conversation, placeholders_per_image


@dataclass
class BudgetCollator:
    """
    Batches conversational data in the Hugging Face form and draws the batch's token budgets.

    Attributes:
        processor: tokenizer, image processor and chat template.
        budget_range: lowest and highest budget, as fractions in [0, 1].
        per: `"batch"` draws one budget for all samples of a batch, `"sample"` one for each.
        seed: of the budgets.

    Raises:
        ValueError: if the range is empty or leaves [0, 1], or `per` is neither.
    """

    processor: AdaVTPProcessor
    budget_range: tuple[float, float] = (0.2, 1.0)
    per: Literal["batch", "sample"] = "batch"
    seed: int = 0
    budgets: BudgetStream = field(init=False)

    def __post_init__(self) -> None:
        self.budgets = BudgetStream(self.budget_range, self.per, self.seed)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: with `messages`, and `images` in the order of the messages' image entries; other columns are ignored.

        Returns:
            `input_ids`, `attention_mask` and `labels` `[batch, sequence]`, padded on the right, with labels -100
            except on the assistant's turns; `token_budget` `[batch]`; and `pixel_values`
            `[num_images, channels, height, width]` if the batch has images.

        Raises:
            ValueError: if a row's messages show another number of images than it has, or see [`encode_conversation`].
        """
        images = [image for row in rows for image in row.get("images") or []]
        batch, num_image_tokens = {}, 0
        if images:
            pixel_values = self.processor.image_processor(readable_images(images), return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixel_values
            num_image_tokens = placeholders_per_image(self.processor, pixel_values)
        conversations = [encode_conversation(self.processor, row["messages"], num_image_tokens) for row in rows]
        for row, conversation in zip(rows, conversations, strict=True):
            self._check_images(row, conversation.input_ids, num_image_tokens)
        length = max(len(conversation.input_ids) for conversation in conversations)
        pad_id = self.processor.tokenizer.pad_token_id

        def padded(sequences: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([sequence + [fill] * (length - len(sequence)) for sequence in sequences])

        return batch | {
            "input_ids": padded([conversation.input_ids for conversation in conversations], pad_id),
            "attention_mask": padded([[1] * len(conversation.input_ids) for conversation in conversations], 0),
            "labels": padded([conversation.labels for conversation in conversations], IGNORED),
            "token_budget": self.budgets.next(len(rows)),
        }

    def _check_images(self, row: dict[str, Any], input_ids: list[int], num_image_tokens: int) -> None:
        """A row with an image too many beside a row with one too few would pass for right: the sums agree."""
        num_given = len(row.get("images") or [])
        num_shown = input_ids.count(self.processor.image_token_id) // max(num_image_tokens, 1)
        if num_shown != num_given:
            raise ValueError(
                f"`messages` shows {num_shown} image(s) and `images` has {num_given}; every image needs one entry of "
                f"type 'image' in its row's messages, which are {row['messages']!r}."
            )
