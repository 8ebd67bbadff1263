"""What runs in the decoder, prompt by prompt and layer by layer: today, how many visual tokens each layer sees.

A plan is made before the decoder runs and is known on the host, so that nobody has to ask the device where something
leaves. What may be turned down there later (layers, heads, groups of MLP units) joins it as one more table with a row
for each prompt and a column for each layer.
"""

from dataclasses import dataclass

import torch


@dataclass
class DecoderPlan:
    """
    Which columns of a prompt are visual tokens, and how many of them each layer sees.

    Attributes:
        counts: `[batch, num_layers]` int64 on the CPU, never rising along a row.
        visual_index: `[batch, columns]` int64, the visual token that a column shows, counted through all units of the
            batch; -1 for every other column.
        last: `[batch]` int64, the column that asks: the last one before the answer.
        num_whole: `[batch]` int64, visual tokens of the whole images, where attention to what is left of them is
            rescaled; otherwise `None`.
    """

    counts: torch.Tensor
    visual_index: torch.Tensor
    last: torch.Tensor
    num_whole: torch.Tensor | None = None

    def is_visual(self, index: torch.Tensor) -> torch.Tensor:
        """Which of the columns that stood at `index` `[batch, n]` in the prompt, -1 for padding, are visual tokens."""
        length = self.visual_index.shape[1]
        # Assisted decoding puts its candidates behind the prompt.
        in_prompt = (index >= 0) & (index < length)
        return in_prompt & (self.visual_index.gather(1, index.clamp(0, length - 1)) >= 0)

    def expand(self, expand_size: int) -> "DecoderPlan":
        """Repeats every row, for beams and for several sequences per prompt."""
        tensors = (self.counts, self.visual_index, self.last, self.num_whole)
        return DecoderPlan(
            *(None if tensor is None else tensor.repeat_interleave(expand_size, dim=0) for tensor in tensors)
        )
