"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, GLM-4V: grids of merged patches, and rotary positions on several axes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..prompt import count_positions
from .encoded import JOINS_PATCHES, EncodingFamily, KindUnits


class QwenVLFamily(EncodingFamily):
    """
    An image or a video is a unit of t x h x w tokens, and a token is made of the patches of a square.

    Positions are `[4, batch, sequence]`: of text, time, row and column.
    """

    reads_videos = True
    why_not_in_tower = JOINS_PATCHES
    why_not_in_decoder = None
    projector_in_tower = ("merger", "deepstack_merger_list")

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """See [`EncodingFamily.image_inputs`]: rows of patches, and their grid."""
        vision = config.vision_config
        sides = (torch.tensor(sizes) // vision.patch_size).clamp(min=vision.spatial_merge_size)
        numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = torch.ones(int(sides.prod(dim=-1).sum()), numbers)
        return {"pixel_values": patches, "image_grid_thw": torch.nn.functional.pad(sides, (1, 0), value=1)}

    def image_sizes(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[tuple[int, int]]:
        """See [`EncodingFamily.image_sizes`]."""
        patch = config.vision_config.patch_size
        return [(height * patch, width * patch) for _, height, width in inputs["image_grid_thw"].tolist()]

    unit_names = ("image", "video")

    def units(self, model: PreTrainedModel, kind: str, output: ModelOutput, inputs: Mapping[str, Any]) -> KindUnits:
        """See [`EncodingFamily.units`]."""
        merge = model.config.vision_config.spatial_merge_size
        grids = [(t, h // merge, w // merge) for t, h, w in inputs[f"{kind}_grid_thw"].tolist()]
        return KindUnits(grids, torch.zeros(sum(t * h * w for t, h, w in grids), dtype=torch.bool))

    def pictures(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """See [`Family.pictures`]: patches of a token come one behind the other, each twice, as two frames."""
        vision, sizes = model.config.vision_config, inputs["image_grid_thw"]
        side, patch = vision.spatial_merge_size, vision.patch_size
        pictures = []
        for rows, (_, height, width) in zip(self.pixels(model, "image", inputs, 0), sizes.tolist(), strict=True):
            patches = rows.view(height // side, width // side, side, side, vision.in_channels, -1, patch, patch)
            picture = patches[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
            pictures.append(picture.reshape(-1, height * patch, width * patch))
        return pictures

    def positions(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        inputs: Mapping[str, Any],
    ) -> torch.Tensor:
        """See [`EncodingFamily.positions`]."""
        text = count_positions(attention_mask)
        types = inputs.get("mm_token_type_ids")
        if types is None or not bool(types.any()):
            return text.expand(4, *text.shape)
        given = {name: value for name, value in inputs.items() if "grid" in name and name != "second_per_grid_ts"}
        if inputs.get("second_per_grid_ts") is not None:
            given["second_per_grid_ts"] = inputs["second_per_grid_ts"]
        try:
            axes, _ = model.base_model.get_rope_index(
                input_ids, mm_token_type_ids=types, attention_mask=attention_mask, **given
            )
        except StopIteration as error:
            raise ValueError(
                "`mm_token_type_ids` shows more images or videos than `image_grid_thw` and `video_grid_thw` have; the "
                "processor writes them for each other."
            ) from error
        return torch.cat([text[None], axes])

    def next_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """See [`Family.next_positions`]: behind an image all axes go on at the same position."""
        if position_ids.dim() == 2:
            return super().next_positions(position_ids)
        text, axes = position_ids[0], position_ids[1:]
        behind = axes.amax(dim=(0, -1)) + 1
        return torch.cat([text.amax(dim=-1)[None] + 1, behind.expand(len(axes), -1)])

    def attention_module(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """See [`EncodingFamily.attention_module`]."""
        return self.tower(model).blocks[layer].attn

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]: patches of a token stand side by side."""
        return values.unflatten(0, (-1, model.config.vision_config.spatial_merge_size**2)).mean(dim=1)


class Qwen2_5_VLFamily(QwenVLFamily):
    """The tower's layers see patches in the order of their windows, and only some see whole images."""

    def attention_module(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """See [`EncodingFamily.attention_module`]: of the last layer up to this one that sees whole images."""
        tower = self.tower(model)
        whole = [index for index in tower.fullatt_block_indexes if index <= layer]
        return tower.blocks[max(whole, default=min(tower.fullatt_block_indexes))].attn

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """See [`EncodingFamily.pooled`]."""
        # Only this family has it, and only where it is used is it there.
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_window_index

        tower = self.tower(model)
        index, _ = get_vision_window_index(
            inputs[f"{kind}_grid_thw"],
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        return super().pooled(model, kind, values, inputs)[index.argsort().to(values.device)]


class Glm4vFamily(QwenVLFamily):
    """Frames of a video are shown by placeholders of images."""

    shares_placeholder = True
    projector_in_tower = ("downsample", "merger")
    why_not_in_decoder = "it acts inside the decoder, whose layers turn queries and keys in another way than the loop."

    def kinds(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
        """See [`Family.kinds`]."""
        return (input_ids == config.image_token_id).long() - 1


QWEN_VL, QWEN2_5_VL, GLM4V = QwenVLFamily(), Qwen2_5_VLFamily(), Glm4vFamily()
