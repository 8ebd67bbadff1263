"""Models whose weights take no memory, and products that take no time, for counting.

A weight is one number, read at every place of its shape. What a product with it would be is noise of the right shape,
so that everything behind it (ranking, matching, merging, the loops around them) runs as it does in earnest and costs
what it costs in earnest.
"""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedConfig, PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.schedule import BudgetSchedule
from ..families.llava import LLAVA
from ..modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling_families import model_class_of
from ..prompt_reduction import PromptReductionMixin
from ..vision.family_visual import FamilyVisual

# Torch's own table has attention for GPUs only; the same count for what runs on a CPU.
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
CPU_FORMULAS: dict[Any, Callable[..., int]] = {
    _CPU_ATTENTION: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value),
    _CPU_ATTENTION_BACKWARD: lambda grad, query, key, value, *_, **__: sdpa_backward_flop_count(
        grad, query, key, value
    ),
}
_NOISE, _LARGE = 2**20, 2**18


# Of tensors made in inference mode operations come whole, and not as the products that they are made of.
@torch.inference_mode(False)
def weightless_model(config: PreTrainedConfig, **changes: Any) -> PreTrainedModel:
    """
    A model whose weights take no memory, in evaluation mode.

    Args:
        config: the model's, of any family, which stays as it is.
        changes: of its fields.
    """
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    is_llava = isinstance(config, AdaVTPConfig)
    with torch.device("meta"):
        model = (AdaVTPForConditionalGeneration if is_llava else model_class_of(config.model_type))(config)
    make_weightless(model)
    # Words differ, so that a method which asks what each has to do with the images can tell one from another.
    table = model.get_input_embeddings().weight
    table.data = torch.arange(len(table), dtype=table.dtype)[:, None].expand(table.shape)
    return model.eval()


def make_weightless(model: nn.Module) -> None:
    """Gives a model on the meta device weights that take no memory."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    value = torch.full((), tensor.is_floating_point(), dtype=tensor.dtype).expand(tensor.shape)
                    held[name] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


class ProductsAreNoise(TorchDispatchMode):
    """
    Does not carry out products, whose results are noise.

    Args:
        every: all of them, and what else works number by number on many, as where nothing asks for values; by default
            only those with a weight of [`weightless_model`], and attention.
    """

    def __init__(self, every: bool = False) -> None:
        super().__init__()
        self.every, self.made = every, 0
        self.noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = operation.overloadpacket
        is_product = packet in flop_registry or packet in CPU_FORMULAS
        if not is_product and not (self.every and _is_large(operation, args)):
            return operation(*args, **kwargs)
        if is_product and not (self.every or packet in CPU_FORMULAS or any(map(_is_weight, args))):
            return operation(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        shapes = _shapes_of_results(operation, structure, tuple(map(_without_values, leaves)))
        return tree_map_only(torch.Tensor, self._result, shapes)

    def _result(self, shape: torch.Tensor) -> torch.Tensor:
        """Noise of a shape. Its rows overlap in memory, so that it takes none of its own."""
        *outer, width = shape.shape
        rows = torch.empty(outer, device="meta")
        step = (_NOISE // 2 - width) // max(rows.numel(), 1)
        # Two results in a row are not alike.
        self.made = (self.made + 7919) % (_NOISE // 2)
        strides = [step * stride for stride in rows.stride()]
        return self.noise.to(shape.dtype).as_strided(shape.shape, [*strides, 1], self.made)


class Shape(NamedTuple):
    """What a result's shape depends on of a tensor."""

    size: torch.Size
    dtype: torch.dtype


def _without_values(argument: Any) -> Any:
    return Shape(argument.shape, argument.dtype) if isinstance(argument, torch.Tensor) else argument


@lru_cache(maxsize=4096)
def _shapes_of_results(operation: Any, structure: TreeSpec, arguments: tuple) -> Any:
    """What an operation returns, on the meta device. Layers are alike, so it is asked for once."""
    leaves = [
        torch.empty(argument.size, dtype=argument.dtype, device="meta") if isinstance(argument, Shape) else argument
        for argument in arguments
    ]
    args, kwargs = tree_unflatten(leaves, structure)
    return operation(*args, **kwargs)


def _is_large(operation: Any, args: tuple) -> bool:
    """Whether an operation works number by number on many numbers, or would copy the gradient of a weight."""
    tensors = [argument for argument in args if isinstance(argument, torch.Tensor)]
    if operation._schema.is_mutable or not any(tensor.numel() > _LARGE for tensor in tensors):
        return False
    if not all(tensor.is_floating_point() for tensor in tensors):
        return False
    if operation is torch.ops.aten.clone.default:
        node = torch._C._current_autograd_node()
        return node is not None and "AccumulateGrad" in node.name()
    return torch.Tag.pointwise in operation.tags


def _is_weight(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.numel() > 1 and not any(argument.stride())


def with_budget_in(model: PreTrainedModel) -> PromptReductionMixin:
    """The module of a model that has the budget: LLaVA's below its head, of other families the whole."""
    return model if isinstance(model, PromptReductionMixin) else model.model


@dataclass(frozen=True)
class Looks:
    """
    What images of one size are to a family.

    Attributes:
        sizes: visual tokens of each unit that they come in.
        others: placeholders that are no visual tokens, such as newlines.
        inputs: pixels, grids and sizes, as its encoder takes them.
        number: of images.
    """

    sizes: tuple[int, ...]
    others: int
    inputs: dict[str, torch.Tensor]
    number: int = 1


def looks_of(model: PreTrainedModel, image_size: tuple[int, int], number: int) -> Looks:
    """What a weightless model of a family makes of so many images of a height and a width, in one prompt."""
    inputs = model.family.image_inputs(model.config, *image_size, number)
    # Nobody has to be shown attention where nothing is chosen.
    nothing = BudgetSchedule(1.0, [], 1, model.config.get_text_config().num_hidden_layers)
    with torch.inference_mode(False), torch.no_grad(), ProductsAreNoise():
        units = FamilyVisual(model, None, inputs, nothing).units
    return Looks(tuple(units.sizes.tolist()), int((units.token < 0).sum()), inputs, number)


def family_prompt(model: PreTrainedModel, looks: Looks | None, text_tokens: int) -> dict[str, torch.Tensor]:
    """A prompt of a family: images, or none, with a word between two, and the other words behind them."""
    placeholder = model.config.image_token_id
    special = {placeholder, getattr(model.config, "video_token_id", None)}
    word, other = [number for number in range(4) if number not in special][:2]
    words = [(word, other)[number % 2] for number in range(text_tokens)]
    num_images, row = 0 if looks is None else looks.number, []
    for number in range(num_images):
        # Families tell images apart by what stands between them.
        row += words[number - 1 : number] if number else []
        row += [placeholder] * ((sum(looks.sizes) + looks.others) // num_images)
    ids = torch.tensor([row + words[max(num_images - 1, 0) :]])
    named = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    named |= dict.fromkeys(("mm_token_type_ids", "token_type_ids"), (ids == placeholder).long())
    taken = inspect.signature(model.forward).parameters
    inputs = {name: columns for name, columns in named.items() if name in taken}
    return inputs if looks is None else inputs | looks.inputs


def noise_prompts(config: AdaVTPConfig, text_tokens: Sequence[int], num_images: Sequence[int]) -> dict[str, Any]:
    """Prompts of images and, behind them, words, filled up to the longest; a placeholder's id is 0."""
    vision, size = config.vision_config, LLAVA.tokens_per_image(config) + int(config.keep_cls)
    rows = [
        [0] * size * images + [1 + word % 2 for word in range(text)]
        for images, text in zip(num_images, text_tokens, strict=True)
    ]
    longest, side = max(map(len, rows)), vision.image_size
    inputs = {
        "input_ids": torch.tensor([row + [1] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
    }
    images = {"pixel_values": torch.zeros(sum(num_images), vision.num_channels, side, side)}
    return inputs | images if sum(num_images) else inputs
