"""From conversations with images to batches with a token budget.

Two steps: a row becomes token ids, targets and images; rows become a batch, padded. The first is done here for rows
as they stand in a data set, and has been done for those of a [`ConversationStream`].
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import ProcessorMixin

from ...modeling.processing_adavtp import AdaVTPProcessor, readable_images
from ...tasks.stored_videos import shown_clip
from .budget_stream import BudgetStream
from .chat_template import (
    IGNORED,
    ConversationText,
    EncodedConversation,
    conversation_text,
    encode_conversation,
)
from .image_tokens import image_tokens
from .processed import processed_batch

RELEVANCE = "patch_relevance"
"""Column of rows, and part of a batch, that says what each patch is worth to the answer."""


@dataclass
class BudgetCollator:
    """
    Batches conversational data in the Hugging Face form, and draws the batch's token budgets where rows have none.

    Attributes:
        processor: tokenizer, image processor and chat template; of AdaVTP, or of another family.
        budget_range, per, seed: see [`BudgetStream`].

    Raises:
        ValueError: if the range is empty or leaves [0, 1], or `per` is neither.
    """

    processor: ProcessorMixin
    budget_range: tuple[float, float] = (0.2, 1.0)
    per: Literal["batch", "sample"] = "batch"
    seed: int = 0
    budgets: BudgetStream = field(init=False)

    def __post_init__(self) -> None:
        self.budgets = BudgetStream(self.budget_range, self.per, self.seed)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """
        Args:
            rows: with `messages`, and `images` and `videos`, decoded, in the order of the messages' entries of these
                types; or read, as a [`ConversationReader`] gives them, with the same images and videos. A video is
                what [`shown_clip`] takes: a list of frames, an array, or one of these with `fps`. Perhaps with
                `patch_relevance`, for each image what each of its patches is worth to the answer, with the sum 1.
                Other columns are ignored.

        Returns:
            `input_ids`, `attention_mask` and `labels` `[batch, sequence]`, padded on the right, with labels -100
            except on the assistant's turns; `token_budget` `[batch]`, the rows' own if they have any; and if the batch
            has images `pixel_values` `[num_images, channels, height, width]`, or whatever else the family's processor
            makes of them. Of rows with `patch_relevance` also that, with the fields of [`Relevance`], and of a
            stream's rows `rejected`, a list, and `stream_position`, the last row's: these are not for the model.

        Raises:
            ValueError: if a row has another number of images or videos than it shows, or the name of one in its
                place, or see [`encode_conversation`] and [`processed_batch`].
        """
        images = [image for row in rows for image in row.get("images") or []]
        if named := next((image for image in images if isinstance(image, str | Path)), None):
            # Rows come from data sets, whose paths and URLs are not to be followed unseen.
            raise ValueError(
                f"`images` of a row has {str(named)[:100]!r}; expected are decoded images. `load_conversations` reads "
                "data sets that name files."
            )
        batch = self._of_llava(rows, images) if isinstance(self.processor, AdaVTPProcessor) else self._of_family(rows)
        if "token_budget" in rows[0]:
            batch["token_budget"] = torch.tensor([row["token_budget"] for row in rows], dtype=torch.float32)
        else:
            batch["token_budget"] = self.budgets.next(len(rows))
        if RELEVANCE in rows[0]:
            batch[RELEVANCE] = _noted_relevance(rows, (batch["labels"] != IGNORED).sum(dim=1))
        if "stream_position" in rows[-1]:
            batch["rejected"] = [rejected for row in rows for rejected in row["rejected"]]
            batch["stream_position"] = rows[-1]["stream_position"]
        return batch

    def _of_family(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the family's processor makes of whole conversations."""
        conversations = [
            ConversationText(row["text"], row["turns"])
            if "turns" in row
            else conversation_text(self.processor, row["messages"])
            for row in rows
        ]
        images = [readable_images(row["images"]) if row.get("images") else [] for row in rows]
        try:
            videos = [[shown_clip(video) for video in row.get("videos") or []] for row in rows]
        except ValueError as error:
            raise ValueError(f"`videos` of a row: {error}.") from error
        return processed_batch(self.processor, conversations, images, videos)

    def _of_llava(self, rows: list[dict[str, Any]], images: list[Any]) -> dict[str, torch.Tensor]:
        """An image is as many tokens as any other, so that nobody has to see it to encode a conversation."""
        batch, num_image_tokens = {}, 0
        if any(row.get("videos") for row in rows):
            raise ValueError("`videos` of a row are given, and LLaVA reads images; show frames as images.")
        if images:
            pixel_values = self.processor.image_processor(readable_images(images), return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixel_values
            num_image_tokens = image_tokens(self.processor, pixel_values).num_placeholders
        encoded = [self._encoded(row, num_image_tokens) for row in rows]
        return batch | _padded(encoded, self.processor.tokenizer.pad_token_id)

    def _encoded(self, row: dict[str, Any], num_image_tokens: int) -> EncodedConversation:
        if "input_ids" in row:
            encoded = EncodedConversation(row["input_ids"], row["labels"])
        else:
            encoded = encode_conversation(self.processor, row["messages"], num_image_tokens)
        # A row with an image too many beside a row with one too few would pass for right: the sums agree.
        num_given, num_placeholders = (
            len(row.get("images") or []),
            encoded.input_ids.count(self.processor.image_token_id),
        )
        if num_placeholders != num_given * num_image_tokens:
            shown = f"`messages`, which are {row['messages']!r}," if "messages" in row else "`input_ids`"
            raise ValueError(
                f"{shown} shows {num_placeholders / max(num_image_tokens, 1):g} image(s) and `images` has "
                f"{num_given}; every image needs one entry of type 'image' in its row's messages."
            )
        return encoded


def _noted_relevance(rows: list[dict[str, Any]], num_targets: torch.Tensor) -> dict[str, torch.Tensor]:
    images = [torch.as_tensor(image, dtype=torch.float32) for row in rows for image in row[RELEVANCE]]
    num_images = torch.tensor([len(row[RELEVANCE]) for row in rows])
    return {
        "of_patches": pad_sequence(images, batch_first=True) if images else torch.zeros(0, 0),
        "num_targets": num_targets.repeat_interleave(num_images),
    }


def _padded(rows: list[EncodedConversation], pad_id: int) -> dict[str, torch.Tensor]:
    shape = (len(rows), max(len(row.input_ids) for row in rows))
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORED),
    }
    for index, (input_ids, labels) in enumerate(rows):
        batch["input_ids"][index, : len(input_ids)] = torch.tensor(input_ids)
        batch["attention_mask"][index, : len(input_ids)] = 1
        batch["labels"][index, : len(labels)] = torch.tensor(labels)
    return batch
