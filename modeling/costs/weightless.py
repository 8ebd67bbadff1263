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
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedConfig, PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..families.encoded import KINDS, units_of_kinds
from ..families.llava import LLAVA
from ..modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling_families import model_class_of
from ..prompt_reduction import PromptReductionMixin

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
# Of operations whose values say what shape comes out.
_SAYS_SHAPES = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}


# Of tensors made in inference mode operations come whole, and not as the products that they are made of.
@torch.inference_mode(False)
def weightless_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """
    A model whose weights take no memory, in evaluation mode.

    Args:
        config: the model's, of any family, which stays as it is.
        dtype: of the weights.
        changes: of its fields.
    """
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    model = meta_model(config).to(dtype)
    make_weightless(model)
    if hasattr(model, "set_experts_implementation"):
        # One by one: torch's counter knows no product of all experts at once.
        model.set_experts_implementation("eager")
    # Words differ, so that a method which asks what each has to do with the images can tell one from another.
    table = model.get_input_embeddings().weight
    table.data = torch.arange(len(table), dtype=table.dtype)[:, None].expand(table.shape)
    return model.eval()


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of any family that has shapes and no weights."""
    is_llava = isinstance(config, AdaVTPConfig)
    with torch.device("meta"):
        return (AdaVTPForConditionalGeneration if is_llava else model_class_of(config.model_type))(config)


def make_weightless(model: nn.Module) -> None:
    """Gives a model on the meta device weights that take no memory."""
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    value = torch.full((), tensor.is_floating_point(), dtype=tensor.dtype).expand(tensor.shape)
                    held[name] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value


def keep_frozen_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes weights of a weightless model that want no gradient be of another precision."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and not weight.requires_grad:
                value = weight.data[(0,) * weight.dim()].to(dtype).expand(weight.shape)
                module._parameters[name] = nn.Parameter(value, requires_grad=False)


class ProductsAreNoise(TorchDispatchMode):
    """
    Does not carry out products, whose results are noise.

    Args:
        every: says whether all of them are now, and whatever else works on many numbers, as where nothing asks for
            values; by default only those with a weight of [`weightless_model`], and attention.
    """

    def __init__(self, every: Callable[[], bool] = lambda: False) -> None:
        super().__init__()
        self.every, self.made = every, 0
        noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0))
        self.noise = {torch.float32: noise}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        packet = operation.overloadpacket
        is_product = packet in flop_registry or packet in CPU_FORMULAS
        if packet is torch.ops.aten._to_copy and _is_weight(args[0]):
            # Of another precision it takes no memory either.
            return operation(args[0][(0,) * args[0].dim()], **kwargs).expand(args[0].shape)
        if packet is torch.ops.aten.view and self.is_noise(args[0]):
            try:
                return operation(*args, **kwargs)
            except RuntimeError:
                # Rows of others can be put in one, and those of noise not.
                shape = operation(torch.empty(args[0].shape, dtype=args[0].dtype, device="meta"), *args[1:])
                return self._result(shape, args[0].storage_offset() % (_NOISE // 2))
        every = self.every()
        if not is_product and not (every and _is_large(operation, args)):
            return operation(*args, **kwargs)
        if is_product and not (every or packet in CPU_FORMULAS or any(map(_is_weight, args))):
            return operation(*args, **kwargs)
        leaves, structure = tree_flatten((args, kwargs))
        shapes = _shapes_of_results(operation, structure, tuple(map(_without_values, leaves)))
        if not is_product and not all(
            shape.is_floating_point() for shape in tree_leaves(shapes) if isinstance(shape, torch.Tensor)
        ):
            # What was compared or ranked.
            return operation(*args, **kwargs)
        return tree_map_only(torch.Tensor, self._result, shapes)

    def is_noise(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor lies in the memory of all noise."""
        noise = self.noise.get(tensor.dtype)
        return noise is not None and tensor.untyped_storage().data_ptr() == noise.untyped_storage().data_ptr()

    def instead_of(self, made: Any) -> Any:
        """A structure of tensors with noise in place of each that is not of whole numbers."""
        shapes = tree_map_only(
            torch.Tensor, lambda tensor: tensor.to("meta") if tensor.is_floating_point() else tensor, made
        )
        return tree_map_only(torch.Tensor, lambda shape: self._result(shape) if shape.is_meta else shape, shapes)

    def _result(self, shape: torch.Tensor, place: int | None = None) -> torch.Tensor:
        """Noise of a shape, anew or from a place. Its rows overlap in memory, so that it takes none of its own."""
        if shape.dtype not in self.noise:
            self.noise[shape.dtype] = self.noise[torch.float32].to(shape.dtype)
        if place is None:
            # Two results in a row are not alike.
            place = self.made = (self.made + 7919) % (_NOISE // 2)
        if shape.dim() == 0:
            return self.noise[shape.dtype][place]
        *outer, width = shape.shape
        rows = torch.empty(outer, device="meta")
        step = (_NOISE // 2 - width) // max(rows.numel(), 1)
        strides = [step * stride for stride in rows.stride()]
        return self.noise[shape.dtype].as_strided(shape.shape, [*strides, 1], place)


class Shape(NamedTuple):
    """What a result's shape depends on of a tensor."""

    size: torch.Size
    dtype: torch.dtype


def _without_values(argument: Any) -> Any:
    if isinstance(argument, torch.device):
        # What is asked to go to a device would need values.
        return torch.device("meta")
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
    """Whether an operation makes new numbers of many."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    if operation._schema.is_mutable or operation.is_view or _SAYS_SHAPES & set(operation.tags):
        return False
    return any(tensor.numel() > _LARGE and tensor.is_floating_point() for tensor in tensors)


def _is_weight(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.numel() > 1 and not any(argument.stride())


def with_budget_in(model: PreTrainedModel) -> PromptReductionMixin:
    """The module of a model that has the budget: LLaVA's below its head, of other families the whole."""
    return model if isinstance(model, PromptReductionMixin) else model.model


@dataclass(frozen=True)
class Looks:
    """
    What the images of a prompt are to a family.

    Attributes:
        sizes: visual tokens of each unit that they come in.
        others: placeholders that are no visual tokens, such as newlines.
        inputs: pixels, grids and sizes, as its encoder takes them.
        columns: placeholders of each image.
    """

    sizes: tuple[int, ...]
    others: int
    inputs: dict[str, torch.Tensor]
    columns: tuple[int, ...] = ()


def looks_of(model: PreTrainedModel, image_sizes: Sequence[tuple[int, int]]) -> Looks:
    """What a weightless model of a family makes of images of such heights and widths, in one prompt."""
    family = model.family
    inputs = family.image_inputs(model.config, image_sizes)
    with torch.inference_mode(False), torch.no_grad(), ProductsAreNoise():
        is_said = family.image_sizes(model.config, inputs) is not None
        found = family.units(model, "image", None if is_said else model.encoded("image", inputs), inputs)
    total, number = len(found.is_separator), len(image_sizes)
    columns = (total // number,) * number
    if len(set(image_sizes)) > 1:
        # Alone an image may be cut in other tiles.
        columns = tuple(looks_of(model, [size] * 2).columns[0] for size in image_sizes)
    units = units_of_kinds(torch.zeros(1, total, dtype=torch.long), {"image": found})
    return Looks(tuple(units.sizes.tolist()), int(found.is_separator.sum()), inputs, columns)


def family_prompt(model: PreTrainedModel, looks: Looks | None, *text_tokens: int) -> dict[str, torch.Tensor]:
    """
    Prompts of a family: each of the same images, or of none, with a word between two, and of its other words behind
    them, filled up to the longest.
    """
    placeholder = model.config.image_token_id
    special = {placeholder, getattr(model.config, "video_token_id", None)}
    word, other = [number for number in range(4) if number not in special][:2]
    columns, rows = () if looks is None else looks.columns, []
    for count in text_tokens:
        words, row = [(word, other)[number % 2] for number in range(count)], []
        for number, own in enumerate(columns):
            # Families tell images apart by what stands between them.
            row += words[number - 1 : number] if number else []
            row += [placeholder] * own
        rows.append(row + words[max(len(columns) - 1, 0) :])
    longest = max(map(len, rows))
    ids = torch.tensor([row + [word] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    named = {"input_ids": ids, "attention_mask": mask}
    named |= dict.fromkeys(("mm_token_type_ids", "token_type_ids"), (ids == placeholder).long())
    taken = inspect.signature(model.forward).parameters
    inputs = {name: columns for name, columns in named.items() if name in taken}
    for name, values in ({} if looks is None else looks.inputs).items():
        axis = model.family.images_axis if name == KINDS["image"] else 0
        inputs[name] = torch.cat([values] * len(rows), dim=axis)
    return inputs


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
