"""What runs in the decoder: which columns each layer sees."""

from dataclasses import dataclass, replace

import torch

from .reducer import DecoderReducer


@dataclass
class DecoderPlan:
    """
    Which columns of a prompt are visual tokens, and how many of them each layer sees.

    Attributes:
        reducer: the decoder-stage reducer that chooses.
        counts: `[batch, num_layers]` int64.
        patches: `[batch, columns]` int64, for a visual token the patch it shows, counted through all images of the
            batch (image * N + patch); -1 for every other column.
        last: `[batch]` int64, the column that asks: the last one before the answer.
    """

    reducer: DecoderReducer
    counts: torch.Tensor
    patches: torch.Tensor
    last: torch.Tensor

    def expand(self, expand_size: int) -> "DecoderPlan":
        """Repeats every row, for beams and for several sequences per prompt."""
        rows = (tensor.repeat_interleave(expand_size, dim=0) for tensor in (self.counts, self.patches, self.last))
        return DecoderPlan(self.reducer, *rows)

    def with_columns(self, num_columns: int) -> "DecoderPlan":
        """The plan for a prompt that further text columns follow."""
        more = num_columns - self.patches.shape[1]
        return replace(self, patches=torch.nn.functional.pad(self.patches, (0, more), value=-1))
