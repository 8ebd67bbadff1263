"""What a checkpoint says of its scheduler: the learned choice of what runs in the decoder."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from transformers import PreTrainedConfig

_ADALLAVA = {"temperature": 5.0, "hears_selection": False}
# AdaLLaVA's two variants (arXiv 2503.10905). Half of the layers are the prefix, as everywhere by default.
PRESETS: dict[str, dict[str, Any]] = {
    "adallava-l": {"dials": ["depth"], **_ADALLAVA},
    "adallava-h": {"dials": ["width"], "block_size": 8, **_ADALLAVA},
}


@dataclass(frozen=True)
class SchedulerSettings:
    """
    The fields of `config.scheduler`.

    Args:
        dials: what it chooses: `"depth"`, whole layers; `"width"`, attention heads and groups of MLP channels.
        num_prefix_layers: the first layers, which always run and in which the compute token reads the prompt; half of
            the layers by default.
        num_mlp_groups: into how many groups the channels of an MLP fall, see [`usual_mlp_groups`] for the default.
        head: what makes logits of the compute token: `"linear"`, AdaLLaVA's, or `"mlp"`.
        temperature: of the gates' gradient, above 0; larger is smoother.
        block_size: 0 to choose heads and groups of channels one by one, over all layers together. A number n to choose
            blocks of n heads and n groups of one layer, as AdaLLaVA-H does with 8.
        sees_visual_tokens: whether the compute token sees the visual tokens that were kept, beside the text.
        hears_selection: whether what became of the visual tokens, how many and how they lie, joins the budgets in it.
    """

    dials: tuple[Literal["depth", "width"], ...]
    num_prefix_layers: int
    num_mlp_groups: int
    head: Literal["linear", "mlp"] = "linear"
    temperature: float = 1.0
    block_size: int = 0
    sees_visual_tokens: bool = True
    hears_selection: bool = True

    @classmethod
    def of_config(cls, scheduler: Any, text: PreTrainedConfig) -> "SchedulerSettings":
        """
        Args:
            scheduler: a preset's name; or a dictionary of the fields, in which `preset` may name what the others
                change.
            text: the text model's configuration.

        Raises:
            ValueError: if a field is not known, or has a value that is not allowed.
        """
        given = {"preset": scheduler} if isinstance(scheduler, str) else scheduler
        if not isinstance(given, dict):
            raise ValueError(
                f"`scheduler` is {scheduler!r}; allowed are a dictionary of its fields, None, and "
                f"{', '.join(map(repr, PRESETS))}."
            )
        preset = given.get("preset")
        if preset not in (None, *PRESETS):
            raise ValueError(f"`scheduler` has the preset {preset!r}; allowed are {', '.join(map(repr, PRESETS))}.")
        settings: dict[str, Any] = {
            "dials": ["depth", "width"],
            "num_prefix_layers": text.num_hidden_layers // 2,
            "num_mlp_groups": usual_mlp_groups(text),
        }
        own = {name: value for name, value in given.items() if name != "preset"}
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(own) - set(known))
        if unknown:
            raise ValueError(f"`scheduler` has the field {unknown[0]!r}; allowed are {', '.join(['preset', *known])}.")
        settings |= PRESETS.get(preset, {}) | own
        made = cls(**settings | {"dials": _dials(settings["dials"])})
        made._check(text)
        return made

    def _check(self, text: PreTrainedConfig) -> None:
        num_heads, has_sets = text.num_attention_heads, text.num_attention_heads != text.num_key_value_heads
        blocks = [0, *(size for size in range(1, num_heads + 1) if num_heads % size == 0 and not has_sets)]
        divides = type(self.num_mlp_groups) is int and self.num_mlp_groups > 0
        divides = divides and text.intermediate_size % self.num_mlp_groups == 0
        is_number = isinstance(self.temperature, int | float) and not isinstance(self.temperature, bool)
        layers = text.num_hidden_layers
        for name, is_allowed, allowed in (
            (
                "num_prefix_layers",
                type(self.num_prefix_layers) is int and 1 <= self.num_prefix_layers < layers,
                f"whole numbers from 1 to {layers - 1}, since this decoder has {layers} layers",
            ),
            ("num_mlp_groups", divides, f"numbers that divide the {text.intermediate_size} channels of an MLP"),
            ("head", self.head in ("linear", "mlp"), "'linear' and 'mlp'"),
            ("temperature", is_number and 0 < self.temperature < math.inf, "finite numbers above 0"),
            (
                "block_size",
                type(self.block_size) is int
                and self.block_size in blocks
                and (self.block_size == 0 or self.num_mlp_groups == num_heads),
                f"{', '.join(map(str, blocks))}; blocks are for decoders where heads share no keys, and there are as "
                f"many MLP groups as heads then ({num_heads})",
            ),
            ("sees_visual_tokens", isinstance(self.sees_visual_tokens, bool), "True and False"),
            ("hears_selection", isinstance(self.hears_selection, bool), "True and False"),
        ):
            if not is_allowed:
                raise ValueError(f"`scheduler` has {name}={getattr(self, name)!r}; allowed are {allowed}.")


def usual_mlp_groups(text: PreTrainedConfig) -> int:
    """Groups into which a text model's MLP channels fall: as many as it has heads, or the next fewer that can be."""
    return next(number for number in range(text.num_attention_heads, 0, -1) if text.intermediate_size % number == 0)


def _dials(dials: Any) -> tuple[str, ...]:
    known = ("depth", "width")
    is_list = isinstance(dials, list | tuple) and len(set(map(str, dials))) == len(dials) > 0
    if not is_list or not set(map(str, dials)) <= set(known):
        raise ValueError(f"`scheduler` has dials={dials!r}; allowed are ['depth'], ['width'] and ['depth', 'width'].")
    return tuple(dial for dial in known if dial in dials)
