"""A family whose own encoder makes the visual tokens of a prompt, and which takes them back as encoder outputs.

That is the seam of transformers 5: `get_image_features` and `get_video_features` encode, `mm_encoder_outputs` takes
what they made, and a placeholder stands in the prompt for every row of it. An adapter says what the rows are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..decoder.loop import RUNNABLE
from ..prompt import count_positions
from ..reducers.base import TokenReducer
from .base import Family, Units, has_recurrent_layers

KINDS = {"image": "pixel_values", "video": "pixel_values_videos"}
JOINS_PATCHES = (
    "it acts inside the vision tower, behind which this family makes one token of all patches of a square, by their "
    "mean, a pixel shuffle or a merger: once some of them have left, there is none to make. Use a reducer behind it."
)


@dataclass
class KindUnits:
    """
    The units of one kind, images or videos, in the order of their placeholders.

    Attributes:
        grids: frames, rows and columns in which the tokens of each unit stand.
        is_separator: `[rows of the encoder's output]` bool on the CPU; separators are no visual tokens.
        unit: `[number of visual tokens]` int64, the unit of each; by default units stand one behind the other.
        parts: see [`Units`].
    """

    grids: list[tuple[int, int, int]]
    is_separator: torch.Tensor
    unit: torch.Tensor | None = None
    parts: dict[int, torch.Tensor] = field(default_factory=dict)


class EncodingFamily(Family):
    """
    The default adapter: every entry of the encoder's output is a unit, a square grid of tokens without separators, and
    a token is a patch. A family overrides what is not so.

    Attributes:
        first_position: the position of a prompt's first token where the family's forward counts.
        shares_placeholder: whether videos have the placeholders of images.
        knows_tiles: whether the inputs of a call say which part of a picture each tile shows.
        reads_last_norm: whether the features of a tower's last layer, -1, are read behind the norm that follows it.
        images_axis: of pixels, along which images of different prompts stand one behind the other.
        projector_in_tower: modules of the tower that join patches into tokens of the decoder's width, by name.
        why_not_in_tower: why reducers cannot act inside the vision tower; `None` where they can.
        why_not_in_decoder: why the loop over decoder layers cannot stand in for the family's own, which may do more
            with embeddings than to put features in the places of placeholders; `None` where it can.
    """

    first_position: int = 0
    shares_placeholder: bool = False
    knows_tiles: bool = False
    reads_last_norm: bool = False
    images_axis: int = 0
    projector_in_tower: tuple[str, ...] = ()
    why_not_in_tower: str | None = (
        "it acts inside the vision tower, and what this family's encoder makes of a tower's patches is not known."
    )
    why_not_in_decoder: str | None = "it acts inside the decoder, whose inputs are not known for this family."

    def kinds(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
        """See [`Family.kinds`]."""
        kinds = torch.full_like(input_ids, -1)
        for number, kind in enumerate(KINDS):
            if (token := getattr(config, f"{kind}_token_id", None)) is not None:
                kinds = kinds.masked_fill(input_ids == token, number)
        return kinds

    def placeholders(self, config: PreTrainedConfig, input_ids: torch.Tensor) -> torch.Tensor:
        """See [`Family.placeholders`]."""
        return self.kinds(config, input_ids) >= 0

    def units(self, model: PreTrainedModel, kind: str, output: ModelOutput, inputs: Mapping[str, Any]) -> KindUnits:
        """
        The units of one kind.

        Args:
            model: with a head.
            kind: `"image"` or `"video"`.
            output: of the family's encoder; `pooler_output` has an entry for each image, `[rows, hidden_size]`. For
                images, a family with a dial or whose tower is opened answers without.
            inputs: of the call: pixels, grids, sizes.
        """
        sizes = [entry.reshape(-1, entry.shape[-1]).shape[0] for entry in output.pooler_output]
        return KindUnits([square_or_row(size) for size in sizes], torch.zeros(sum(sizes), dtype=torch.bool))

    def image_inputs(self, config: PreTrainedConfig, sizes: Sequence[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """
        What the family's processor makes of grey images, given sizes in pixels that it leaves as they are; of one that
        is smaller than the smallest, an image of that size.

        Args:
            config: the model's.
            sizes: height and width of each image, all in one prompt: multiples of the side of a token, or where images
                are cut into tiles, of a tile.

        Returns:
            The arguments of the family's `get_image_features`. Pixels are not 0, which fills up prompts in some.
        """
        side = config.vision_config.image_size
        return {"pixel_values": torch.ones(len(sizes), 3, side, side)}

    def image_sizes(self, config: PreTrainedConfig, inputs: Mapping[str, Any]) -> list[tuple[int, int]] | None:
        """
        The reverse of [`EncodingFamily.image_inputs`]: height and width in pixels of every image of a call; `None` if
        the inputs do not say them. Where they do, the sizes say the units: `units` answers without an output.
        """
        return None

    def pixels(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], num_units: int
    ) -> list[torch.Tensor]:
        """The pixels of each unit of a kind, in whatever shape."""
        pixels, grids = inputs[KINDS[kind]], inputs.get(f"{kind}_grid_thw")
        return list(pixels if grids is None else pixels.split(grids.prod(dim=-1).tolist()))

    def pictures(self, model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        """See [`Family.pictures`]."""
        return self.pixels(model, "image", inputs, len(inputs[KINDS["image"]]))

    def positions(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        inputs: Mapping[str, Any],
    ) -> torch.Tensor:
        """Positions `[..., batch, sequence]` of a prompt by itself, from 0, as `generate` counts them."""
        return count_positions(attention_mask)

    def why_not(self, config: PreTrainedConfig, reducer: TokenReducer | type[TokenReducer]) -> str | None:
        """See [`Family.why_not`]."""
        if reducer.stage == "encoder":
            if self.why_not_in_tower is not None:
                return self.why_not_in_tower
            if not config.opens_tower:
                kind = config.vision_config.model_type
                return f"it acts inside the vision tower, and a {kind!r} tower's layers are not taken apart here."
        if reducer.stage == "decoder":
            if has_recurrent_layers(config):
                return (
                    "it acts inside the decoder, whose linear attention keeps a state of all that it has read: a "
                    "token that leaves behind such a layer has left its trace. Use a reducer before the decoder."
                )
            if self.why_not_in_decoder is not None:
                return self.why_not_in_decoder
            if (kind := config.get_text_config().model_type) not in RUNNABLE:
                return (
                    f"it acts inside the decoder, which is possible for the kinds {', '.join(RUNNABLE)}, and this one "
                    f"is {kind!r}."
                )
        if getattr(reducer, "tile_grid", None) is not None:
            by = "attention" if self.knows_tiles else "novelty"
            return (
                "`tile_grid` tells apart the tiles of prompts that do not say which they are, and this family's units "
                f"are known; share with token_budget={{'prompt': n, 'unit_weights': '{by}'}}."
            )
        unknown = sorted({"pixel_values", "tower_patches"} & set(reducer.needs))
        if unknown:
            return f"it reads {' and '.join(unknown)}, which this family's encoder does not show."
        if getattr(reducer, "attention", None) == "single_head":
            return (
                "`attention` is 'single_head', which compares CLS's query with the keys of all heads at once, and "
                "this family shows attention head by head; use attention='per_head'."
            )
        return super().why_not(config, reducer)

    # What a tower's attention says, in terms of tokens.

    def tower(self, model: PreTrainedModel) -> nn.Module:
        """The vision tower."""
        return model.get_encoder(modality="image")

    def attention_module(self, model: PreTrainedModel, layer: int) -> nn.Module:
        """The attention of the tower's layer `layer`, from 0."""
        layer_of_tower = layers_of(self.tower(model))[layer]
        return next(m for m in layer_of_tower.modules() if type(m).__name__.endswith("Attention"))

    def pooled(
        self, model: PreTrainedModel, kind: str, values: torch.Tensor, inputs: Mapping[str, Any]
    ) -> torch.Tensor:
        """
        Values of patches as values of tokens, sent the way that the family sends features.

        Args:
            model: with a head.
            kind: of the units.
            values: `[num_patches, channels]`, in the order in which the tower's layer had them.
            inputs: of the call.

        Returns:
            `[rows of the encoder's output, channels]`; whatever for separators.
        """
        return values

    def images_of_attention(
        self, model: PreTrainedModel, kind: str, query: torch.Tensor, key: torch.Tensor, inputs: Mapping[str, Any]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One call of the tower's attention as calls for images that do not see each other."""
        return [(query, key)]

    # What our own run of a tower needs, in families whose configuration says `opens_tower`.

    def projected(self, model: PreTrainedModel, patches: torch.Tensor) -> torch.Tensor:
        """
        Patches `[num_units, num_patches, width]` of the feature layer, of which some may have left, as tokens in the
        decoder's space.
        """
        return model.base_model.multi_modal_projector(patches)

    def packed(self, model: PreTrainedModel, tokens: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """What stands at the placeholders of whole units, of `projected` ones; whatever for separators."""
        return tokens.flatten(0, 1)

    def patches_of_units(self, model: PreTrainedModel, inputs: Mapping[str, Any], every: torch.Tensor) -> torch.Tensor:
        """
        Of each unit the patches that are tokens, `[num_units, patches of the tower]` bool; `every` is true everywhere.

        Raises:
            ValueError: if tokens are not patches, because the family makes these images smaller behind its tower.
        """
        return every

    def separator(self, model: PreTrainedModel) -> torch.Tensor | None:
        """What stands at separators, `[hidden_size]`."""
        return getattr(model.base_model, "image_newline", None)

    # The dial that a family may have of its own.

    def native_settings(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any]
    ) -> list[dict[str, tuple[int, int, int]]]:
        """
        What the model itself could make of each unit of a kind: by setting of its dial the frames, rows and columns of
        the tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} has no dial.")

    def encoded_natively(
        self, model: PreTrainedModel, kind: str, inputs: Mapping[str, Any], setting: str, units: list[int]
    ) -> list[torch.Tensor]:
        """The tokens `[num_tokens, hidden_size]` that one setting makes of some units of a kind, each by itself."""
        raise NotImplementedError(f"{type(self).__name__} has no dial.")


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of a vision tower or of a text model, from the bottom: its longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def num_tiles(height: int, width: int, tile_height: int, tile_width: int) -> int:
    """Tiles of an image, with the view of the whole that stands beside several."""
    tiles = max(height // tile_height, 1) * max(width // tile_width, 1)
    return tiles + (tiles > 1)


def square_or_row(size: int) -> tuple[int, int, int]:
    """The grid of so many tokens: a square where they make one, and a row elsewhere."""
    side = round(size**0.5)
    return (1, side, side) if side * side == size else (1, 1, size)


def means_of_squares(values: torch.Tensor, sizes: list[tuple[int, int]], side: int) -> torch.Tensor:
    """
    Values `[num_patches, channels]` of images with so many rows and columns of patches, as the means of squares of
    `side` patches a side, `[num_squares, channels]`.
    """
    pooled = []
    for own, (height, width) in zip(values.split([h * w for h, w in sizes]), sizes, strict=True):
        image = own.T.reshape(1, -1, height, width)
        pooled.append(nn.functional.avg_pool2d(image, side).flatten(2)[0].T)
    return torch.cat(pooled)


def units_of_kinds(kinds: torch.Tensor, found: Mapping[str, KindUnits]) -> Units:
    """
    The units of a batch, in the order of their first placeholders.

    Args:
        kinds: `[batch, sequence]`, see [`EncodingFamily.kinds`].
        found: the units of each kind that there is.

    Raises:
        ValueError: if a kind has other than as many placeholders as its encoder made rows.
    """
    is_placeholder, at = kinds >= 0, kinds.cpu()
    where = (at >= 0).nonzero()
    of_place = at[at >= 0]
    token, unit_of = torch.full_like(of_place, -1), torch.full_like(of_place, -1)
    grids, parts, number = [], {}, 0
    for index, kind in enumerate(KINDS):
        places = (of_place == index).nonzero()[:, 0]
        own = found.get(kind)
        rows = 0 if own is None else len(own.is_separator)
        if len(places) != rows:
            raise ValueError(
                f"`input_ids` has {len(places)} {kind} placeholder tokens, and the {kind}s that were given need "
                f"{rows}; the processor writes as many as are needed."
            )
        if own is None:
            continue
        sizes = torch.tensor([frames * height * width for frames, height, width in own.grids])
        of_token = torch.arange(len(sizes)).repeat_interleave(sizes) if own.unit is None else own.unit
        unit_of[places[~own.is_separator]] = of_token + number
        parts |= {whole + number: tile + number for whole, tile in own.parts.items()}
        grids += own.grids
        number += len(sizes)
    is_token = unit_of >= 0
    first = torch.full((number,), len(unit_of)).scatter_reduce(0, unit_of[is_token], is_token.nonzero()[:, 0], "amin")
    order = first.argsort()
    place = order.argsort()
    unit_of[is_token] = place[unit_of[is_token]]
    # Tokens are counted unit by unit; within one they stand in the order of their placeholders.
    by_unit = unit_of.masked_fill(~is_token, number).argsort(stable=True)[: int(is_token.sum())]
    token[by_unit] = torch.arange(len(by_unit))
    grids = [grids[index] for index in order.tolist()]
    return Units(
        sample=where[first[order], 0],
        sizes=torch.tensor([frames * height * width for frames, height, width in grids]),
        grids=[(frames * height, width) for frames, height, width in grids],
        token=token.to(is_placeholder.device),
        frames=[frames for frames, _, _ in grids],
        parts={int(place[whole]): place[tile] for whole, tile in parts.items()},
        order=order,
    )
