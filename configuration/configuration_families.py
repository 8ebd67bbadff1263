"""Configurations of the other families: each is the family's own with the fields that a token budget adds.

A folder keeps its family's `model_type`, so that stock transformers reads it as the family's. There is one class for
each family, made when it is asked for: `AdaVTPQwen2_5_VLConfig` is transformers' `Qwen2_5_VLConfig` with a budget.
"""

import types
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .configuration_adavtp import BudgetFields, with_value_errors

PREFIX = "AdaVTP"
# Towers whose first token gathers what the tower knows of an image.
_TOWERS_WITH_CLS = ("clip_vision_model", "dinov2", "internvl_vision")
# Families of whose towers, if they are of these kinds, we run the layers one by one where something acts inside.
_OPENED = ("gemma3", "llava_next", "llava_onevision", "paligemma")
_OPENED_TOWERS = ("clip_vision_model", "dinov2", "siglip_vision_model")


@dataclass(kw_only=True)
class FamilyFields(BudgetFields):
    """
    What a token budget adds to any family. The family encodes its images; budget and question meet what it made of
    them (`budget_fusion="post"`), and gates act on features.
    """

    keep_cls = False
    ranks_by_received = True

    budget_fusion: Literal["encoder", "post"] = "post"
    gradient_gates: Literal["attention", "features"] = "features"

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        if self.vision_config is None:
            # Gemma 4 may be without one; a budget is of what a tower sees.
            self.vision_config = self.sub_configs["vision_config"]()
        refused = [("gradient_gates", "attention", "features")]
        if not self.opens_tower:
            refused.append(("budget_fusion", "encoder", "post"))
        for name, value, other in refused:
            if getattr(self, name) == value:
                raise ValueError(f"`{name}` is {value!r}; a {self.model_type!r} model takes {other!r}.")
        if self.controller_head == "budget_token":
            raise ValueError(
                f"`controller_head` is 'budget_token', which scores as many places as every image has; images of a "
                f"{self.model_type!r} model differ in size. Use another, such as 'patch_budget'."
            )

    @property
    def opens_tower(self) -> bool:
        """Whether the budget may act inside the tower, and reducers if the family's adapter does not say why not."""
        return self.model_type in _OPENED and self.vision_config.model_type in _OPENED_TOWERS

    @property
    def has_cls(self) -> bool:
        """Whether the vision tower has a CLS token."""
        return self.vision_config.model_type in _TOWERS_WITH_CLS

    @property
    def num_patches(self) -> int:
        """Only for what has a weight for each place in an image: a `ValueError`, since images may differ in size."""
        raise ValueError(
            f"A {self.model_type!r} model's configuration names no one number of tokens for all images, and this "
            "reducer learns something for each place in an image; use another, such as 'adaptive'."
        )

    @property
    def visual_width(self) -> int:
        """Width of a visual token where reducers see it, in the decoder's space."""
        return self.get_text_config().hidden_size

    @property
    def budget_width(self) -> int:
        """Width of the vector that carries the budget, and of what the controller compares: the tower's."""
        return getattr(self.vision_config, "embed_dim", None) or self.vision_config.hidden_size

    @property
    def budget_heads(self) -> int:
        """Attention heads with which that vector reads the image."""
        return getattr(self.vision_config, "num_heads", None) or self.vision_config.num_attention_heads

    @property
    def num_tower_layers(self) -> int:
        """Layers of the vision tower."""
        return getattr(self.vision_config, "depth", None) or self.vision_config.num_hidden_layers


@cache
def family_config_class(stock: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The configuration class of a family: the stock one with a budget's fields."""
    attributes = {"__module__": __name__, "__doc__": f"[`{stock.__name__}`] with the fields of [`FamilyFields`]."}
    made = types.new_class(
        f"{PREFIX}{stock.__name__}", (FamilyFields, stock), {}, lambda space: space.update(attributes)
    )
    return with_value_errors(strict(made))


def __getattr__(name: str) -> type[PreTrainedConfig]:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedConfig):
        return family_config_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
