"""The control of families that can make fewer visual tokens by themselves: their own dial, at its nearest setting.

Gemma 4 was trained to read an image as 70 to 1,120 tokens, MiniCPM-V 4.6 to merge 4 or 16 patches to one. Whoever
wants fewer tokens of such a model can simply ask it for fewer. A method that looks at content is worth something where
it beats this.
"""

import torch

from ..budget.selection import Selection
from ..vision.features import VisionFeatures
from .base import TokenReducer, register_reducer
from .downsample import patches_under_cells

AS_GIVEN = "as given"


@register_reducer("native")
class NativeReducer(TokenReducer):
    """
    Lets the family encode each unit at the setting of its own dial whose number of tokens is nearest to the budget, of
    two equally near the smaller; a unit stays as it was given where that is nearest. `Selection.settings` says which
    it was, and `Selection.num_keep` how many tokens it made: a dial has few settings, so these are seldom exactly K.

    A token stands where the centre of its cell is in the whole unit. With `config.visual_position_ids = "compact"`
    positions have no gaps, and the answer is that of the family's own class at this setting. The whole unit is encoded
    as well; to save that, give the processor the setting.
    """

    needs = ("native",)
    is_exact = False

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        (rows, columns), num_tokens = features.grid, features.patches.shape[1]
        if num_tokens != rows * columns:
            raise ValueError(
                f"Reducer 'native' needs the whole grid of {rows} x {columns} tokens and got {num_tokens} tokens; it "
                "has to come first."
            )
        units, settings = features.unit.tolist(), []
        for unit, wanted in zip(units, num_keep.tolist(), strict=True):
            counts = {name: h * w for name, (h, w) in features.native.grids[unit].items() if h * w < num_tokens}
            counts[AS_GIVEN] = num_tokens
            settings.append(min((abs(count - wanted), count, name) for name, count in counts.items())[2])
        tokens, places = [None] * len(units), [torch.arange(num_tokens)] * len(units)
        for setting in dict.fromkeys(settings):
            index = [number for number, own in enumerate(settings) if own == setting]
            if setting == AS_GIVEN:
                made = list(features.patches[index])
            else:
                made = features.native.encode(setting, [units[number] for number in index])
            for number, own in zip(index, made, strict=True):
                tokens[number] = own.to(features.patches)
                if setting != AS_GIVEN:
                    grid = features.native.grids[units[number]][setting]
                    places[number] = patches_under_cells(*grid, (rows, columns))
        padded = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        positions = torch.nn.utils.rnn.pad_sequence(places, batch_first=True, padding_value=-1)
        selection = Selection.from_tokens(padded, positions.to(padded.device), num_tokens)
        selection.settings = settings
        return selection
