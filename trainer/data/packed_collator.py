"""Many questions about one image in one sequence.

Encoding an image is most of the cost of a short question about it, so several questions share one: the prompt's head
with the image comes first, and behind it stand the questions with their answers, each in a block of its own. A block
sees the head and itself, no other block, and its positions continue the head's: every block is exactly the
conversation that it would be alone. Blocks that saw each other would let the model read answers off earlier ones, and
it would stop looking.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ...modeling.processing_adavtp import AdaVTPProcessor
from .budget_stream import BudgetStream
from .chat_template import IGNORED, encode_conversation
from .image_tokens import image_tokens


@dataclass
class PackedQuestionCollator:
    """
    Batches rows of a drawn task: the caption, where there is one, as answer to no question, then the row's questions.

    The caption's block is the first, and nothing but it comes before the first target, so a question-aware model
    chooses patches for someone who wants to know everything. Without a caption it chooses them for the first question.

    Attributes:
        processor: tokenizer, image processor and chat template.
        budgets: where a batch's token budgets come from; without it none is set.
    """

    processor: AdaVTPProcessor
    budgets: BudgetStream | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """
        Args:
            rows: with `image`, `questions` and `answers`, and perhaps `caption`.

        Returns:
            `input_ids`, `labels` and `position_ids` `[batch, sequence]`, `attention_mask`
            `[batch, 1, sequence, sequence]` bool, `pixel_values`, and `token_budget` `[batch]`.
        """
        pixel_values = self.processor.image_processor([row["image"] for row in rows], return_tensors="pt")[
            "pixel_values"
        ]
        num_image_tokens = image_tokens(self.processor, pixel_values).num_placeholders
        packed = [self._pack(row, num_image_tokens) for row in rows]
        length = max(len(sample["input_ids"]) for sample in packed)
        pad_id = self.processor.tokenizer.pad_token_id

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([sample[name] + [fill] * (length - len(sample[name])) for sample in packed])

        block = padded("block", -1)
        sees = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        attention_mask = sees & torch.ones(length, length, dtype=torch.bool).tril() & (block >= 0)[:, None, :]
        batch = {
            "input_ids": padded("input_ids", pad_id),
            "labels": padded("labels", IGNORED),
            "position_ids": padded("position_ids", 0),
            # A padding row attends to itself alone: a row that attends to nothing has no softmax.
            "attention_mask": (attention_mask | torch.eye(length, dtype=torch.bool))[:, None],
            "pixel_values": pixel_values,
        }
        if self.budgets is not None:
            batch["token_budget"] = self.budgets.next(len(rows))
        return batch

    def _pack(self, row: dict[str, Any], num_image_tokens: int) -> dict[str, list[int]]:
        captioned = [("", row["caption"])] if "caption" in row else []
        conversations = [
            encode_conversation(self.processor, _messages(question, answer), num_image_tokens)
            for question, answer in [*captioned, *zip(row["questions"], row["answers"], strict=True)]
        ]
        image_token = self.processor.image_token_id
        head_length = len(conversations[0].input_ids) - conversations[0].input_ids[::-1].index(image_token)
        head = conversations[0].input_ids[:head_length]
        packed = {
            "input_ids": list(head),
            "labels": [IGNORED] * head_length,
            "position_ids": list(range(head_length)),
            "block": [0] * head_length,
        }
        for number, conversation in enumerate(conversations, start=1):
            if conversation.input_ids[:head_length] != head:
                raise ValueError("The chat template puts text before the image that differs between questions.")
            length = len(conversation.input_ids) - head_length
            packed["input_ids"] += conversation.input_ids[head_length:]
            packed["labels"] += conversation.labels[head_length:]
            packed["position_ids"] += range(head_length, head_length + length)
            packed["block"] += [number] * length
        return packed


def _messages(question: str, answer: str) -> list[dict[str, Any]]:
    content = [{"type": "image"}] + ([{"type": "text", "text": question}] if question else [])
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
