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
    """

    counts: torch.Tensor
    visual_index: torch.Tensor
    last: torch.Tensor

    def expand(self, expand_size: int) -> "DecoderPlan":
        """Repeats every row, for beams and for several sequences per prompt."""
        rows = (tensor.repeat_interleave(expand_size, dim=0) for tensor in (self.counts, self.visual_index, self.last))
        return DecoderPlan(*rows)
