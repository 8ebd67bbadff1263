"""The data of a recipe's stage that names `sources`: a stream to train on, and checked rows to evaluate on.

```yaml
data:
  sources:
    - {path: llava_v1_5_mix665k.json, images: images, weight: 0.9}
    - {path: org/more-conversations, streaming: true, weight: 0.1}
  max_length: 2048
```
"""

from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset

from ..modeling.processing_adavtp import AdaVTPProcessor
from .conversation_reader import ConversationReader
from .conversation_stream import ConversationStream, measured_lengths
from .training_arguments import AdaVTPTrainingArguments

if TYPE_CHECKING:
    import datasets


class EncodedRows(Dataset):
    """
    Conversations to evaluate on, encoded when they are asked for. One that cannot be read is an error: an evaluation
    that leaves rows out measures something else.

    Args:
        rows: as [`load_conversations`] gives them, read by index.
        reader: turns a row into tokens and images.
    """

    def __init__(self, rows: "datasets.Dataset", reader: ConversationReader) -> None:
        self.rows, self.reader = rows, reader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Raises `RejectedSample` for a row that cannot be read."""
        read = self.reader.read(self.rows[index])
        return {"id": read.id, "input_ids": read.input_ids, "labels": read.labels, "images": read.images}


def training_stream(
    processor: AdaVTPProcessor, data: dict[str, Any], budgets: dict[str, Any], arguments: AdaVTPTrainingArguments
) -> ConversationStream:
    """
    The stream that a stage trains on.

    Args:
        processor: of the model.
        data: `sources`, see [`load_conversations`]; `max_length`, see [`ConversationReader`]; `group_by_length` and
            `block_size`, see [`ConversationStream`].
        budgets: arguments of [`BudgetStream`]; its seed is that of the order, too.
        arguments: of the training.

    Raises:
        ValueError: if a source cannot be read, or the rows do not fill a batch.
    """
    from .conversation_sources import load_conversations

    reader = ConversationReader(processor, data.get("max_length"))
    of_stream = {name: data[name] for name in ("group_by_length", "block_size") if name in data}
    rows = load_conversations(data["sources"], budgets["seed"])
    if not hasattr(rows, "load_state_dict") and data.get("group_by_length", True):
        of_stream["lengths"] = measured_lengths(rows, reader, max(arguments.dataloader_num_workers, 1))
    return ConversationStream(
        rows,
        reader,
        arguments.train_batch_size,
        num_processes=arguments.world_size,
        process_index=arguments.process_index,
        **budgets | of_stream,
    )


def evaluation_rows(processor: AdaVTPProcessor, data: dict[str, Any], seed: int) -> EncodedRows:
    """
    The rows that a stage evaluates on.

    Args:
        processor: of the model.
        data: `sources` and `max_length`, as for training; not streamed.
        seed: of the mixture of sources.

    Raises:
        ValueError: if a source is streamed, or cannot be read.
    """
    from .conversation_sources import load_conversations

    rows = load_conversations(data["sources"], seed)
    if hasattr(rows, "load_state_dict"):
        raise ValueError("`eval_data`: a source is streamed; an evaluation needs rows with a length.")
    return EncodedRows(rows, ConversationReader(processor, data.get("max_length")))
