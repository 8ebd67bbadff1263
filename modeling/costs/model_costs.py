"""What a prompt with images costs, part by part, counted by torch without a weight in memory.

The model's own code runs once for each reducer and budget, up to where the last choice is made; what the decoder then
costs follows from its polynomials, and is worked out for thousands of prompts in the time of one run.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from ...configuration.configuration_adavtp import AdaVTPConfig, chosen_entries
from ..budget.schedule import StackBudget
from ..budget.selection import Selection
from ..decoder.execution_plan import ExecutionPlan, UnitShares
from ..families.adapters import adapter_of
from ..families.encoded import KINDS
from ..modeling_adavtp import ReducerSpec
from ..reducers.base import REDUCERS
from .counting import remembered
from .decoder import DecodeCost, DecoderCost
from .stack_costs import FULL, NEVER_ASKED, ImageSizes, StackCosts, VisualTokens, written
from .weightless import Looks, weightless_model


@dataclass(frozen=True)
class Costs:
    """
    What one prompt costs, in FLOPs.

    Attributes:
        vision: the vision tower, up to the feature layer.
        reducer: choosing and merging, wherever it happens, and the budget's embedding.
        projector: on the tokens that reach it.
        prefill: the decoder on the whole prompt, and the head on its last position.
        decode_per_token: the decoder on the first token behind the prompt; later ones attend to more, see `decode`.
        kv_bytes: keys and values of the prompt in the cache, in bytes.
        mean_visual_tokens: that a decoder layer sees of an image in prefill, mean over layers and images.
        new_tokens: tokens that are generated, 1 or more; prefill makes the first.
        layer_tokens: for each decoder layer the columns of the sequence in prefill.
        convention: by which all of it was counted.
        decode: the steps behind the prefill.
    """

    vision: float
    reducer: float
    projector: float
    prefill: float
    decode_per_token: float
    kv_bytes: float
    mean_visual_tokens: float
    new_tokens: int = 1
    layer_tokens: tuple[int, ...] = ()
    convention: str = "adavtp"
    decode: DecodeCost | None = field(default=None, repr=False)

    @property
    def total(self) -> float:
        """Everything, up to and with `new_tokens` generated tokens."""
        return self.with_new_tokens(self.new_tokens)

    def with_new_tokens(self, number: int) -> float:
        """
        Everything up to and with the `number`-th generated token. Prefill makes the first, and each further one takes
        a step over a cache that has grown.

        Args:
            number: 1 or more; 0 for a prompt that is read and not answered costs the same as 1.

        Raises:
            ValueError: if it is negative.
        """
        if number < 0:
            raise ValueError(f"`new_tokens` is {number}; allowed are whole numbers from 0.")
        before = self.vision + self.reducer + self.projector + self.prefill
        return before + (0.0 if self.decode is None else self.decode.steps(max(number - 1, 0)))

    def as_dict(self) -> dict[str, Any]:
        """Parts, settings and `total`, as JSON can hold them."""
        values = asdict(replace(self, decode=None))
        del values["decode"]
        return {**values, "layer_tokens": list(self.layer_tokens), "total": self.total}


class ModelCosts:
    """
    The costs of one model, whatever is asked of it. [`ModelCosts.of`] gives the same object for the same model, which
    remembers what it has counted.

    Args:
        config: the model's, of any family.
        image_size: the usual one, height and width in pixels as the family's processor leaves them; `None` for
            LLaVA, whose images have one size, or where every prompt's are said.

    Raises:
        ValueError: if it is given to LLaVA.
    """

    def __init__(self, config: PreTrainedConfig, image_size: tuple[int, int] | None = None) -> None:
        self.config, self.image_size = config, image_size
        self.is_llava = isinstance(config, AdaVTPConfig)
        if self.is_llava and image_size is not None:
            raise ValueError(f"`image_size` is {image_size}, and all images of a LLaVA model have its tower's size.")
        self._stacks: dict[Any, StackCosts] = {}
        self._prompts: dict[Any, Costs] = {}
        self._encoded: dict[ImageSizes, tuple[ModelOutput, Counter]] = {}

    @staticmethod
    def of(config: PreTrainedConfig, image_size: tuple[int, int] | None = None) -> "ModelCosts":
        """Of a configuration as it is now; it may be changed afterwards."""
        return _model_costs(config, image_size)

    @cached_property
    def decoder(self) -> DecoderCost:
        """What each layer costs."""
        return DecoderCost.of(weightless_model(self.config, reducers=[NEVER_ASKED], trained_reducers=[]))

    def of_prompt(
        self,
        text_tokens: int,
        *,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
        num_images: int = 1,
        new_tokens: int = 1,
        dtype: torch.dtype | str | None = None,
        plan: ExecutionPlan | UnitShares | None = None,
    ) -> Costs:
        """
        The FLOPs of one prompt, alone and without padding, as `generate` executes it.

        Args:
            text_tokens: of the prompt, placeholders of images not among them; they stand behind the images.
            token_budget, reducer: see [`AdaVTPForConditionalGeneration.forward`]; the reducer `"full"` keeps
                everything.
            num_images: in the prompt, of the usual size.
            new_tokens: that are generated, for `total`.
            dtype: of the cache, a torch dtype or its name; by default the configuration's, or else float32.
            plan: the decoder's units that run; by default all.

        Raises:
            ValueError: if an argument is not allowed, a budget cannot be reached, or only the image can say how many
                tokens stay; the message says what to do.
        """
        if min(text_tokens, num_images) < 0:
            raise ValueError(
                f"`text_tokens` is {text_tokens} and `num_images` {num_images}; allowed are whole numbers from 0."
            )
        if type(new_tokens) is not int or new_tokens < 1:
            raise ValueError(f"`new_tokens` is {new_tokens!r}; allowed are whole numbers from 1.")
        tokens = self.visual_tokens(reducer, token_budget, num_images)
        stack, budget = self._stack(reducer, token_budget)
        spent = stack.spent(budget, self._usual(num_images), text_tokens, tokens)
        return self._costs(text_tokens, tokens, spent, new_tokens, dtype, plan)

    def of_selection(
        self,
        selection: Selection | None,
        text_tokens: int,
        *,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
        image_sizes: ImageSizes | None = None,
        plan: UnitShares | None = None,
    ) -> Costs:
        """
        The FLOPs of one prompt whose visual tokens have been chosen, also by a rule that only the image could answer.

        Args:
            selection: of the prompt's images, or `None` if it has none.
            text_tokens: see [`ModelCosts.of_prompt`].
            token_budget, reducer: with which it was made.
            image_sizes: of its images, see [`ModelCosts`]; by default as many of the usual size as have its units.
            plan: the decoder's units that run; by default all.

        Raises:
            ValueError: see [`ModelCosts.of_prompt`].
        """
        stack, budget = self._stack(reducer, token_budget)
        if image_sizes is None:
            num_units = 0 if selection is None else len(selection.sizes)
            image_sizes = self._usual(num_units and -(-num_units // len(self.looks(self._usual(1)).sizes)))
        others = self.looks(image_sizes).others
        tokens = VisualTokens.chosen(selection, self.config.get_text_config().num_hidden_layers, others)
        key = (stack, written(budget), tokens, text_tokens, image_sizes, plan)
        if key not in self._prompts:
            spent = stack.spent_on(tokens, budget, text_tokens, image_sizes)
            self._prompts[key] = self._costs(text_tokens, tokens, spent, plan=plan)
        return self._prompts[key]

    def looks(self, image_sizes: ImageSizes) -> Looks:
        """What such images of one prompt are to the model: units and their tokens."""
        stack, _ = self._stack(NEVER_ASKED, 1.0)
        return stack.looks(image_sizes)

    def image_sizes_of(self, inputs: Mapping[str, Any]) -> list[ImageSizes | None]:
        """
        The images of each prompt of a batch, told by how many placeholders stand in its row; `None` of prompts that
        show videos, and of all if the inputs do not say sizes.

        Args:
            inputs: `input_ids`, pixels, grids and sizes, as the processor returns them.

        Raises:
            ValueError: if the images are not those of so many placeholders.
        """
        family, ids = adapter_of(self.config), inputs["input_ids"]
        given = {kind for kind, pixels in KINDS.items() if inputs.get(pixels) is not None}
        found = family.image_sizes(self.config, inputs) if "image" in given else []
        if found is None or ("video" in given and family.shares_placeholder):
            return [None] * len(ids)
        rows: list[ImageSizes | None] = []
        for kinds in family.kinds(self.config, ids):
            own, number = (), int((kinds == 0).sum())
            # Alone an image may be cut in other tiles than among others.
            while found and (not own or sum(self.looks(own).columns) != number) and number:
                own = (*own, found.pop(0))
            if own and (columns := sum(self.looks(own).columns)) != number:
                raise ValueError(
                    f"`input_ids` has {number} placeholders of images in a row, and images of {list(own)} pixels have "
                    f"{columns}."
                )
            rows.append(None if bool((kinds == 1).any()) else own)
        return rows

    def visual_tokens(
        self, reducer: ReducerSpec | None = None, token_budget: StackBudget | None = None, num_images: int = 1
    ) -> VisualTokens:
        """How many visual tokens go where; nothing runs. See [`ModelCosts.of_prompt`]."""
        stack, budget = self._stack(reducer, token_budget)
        return stack.planned(budget, self._usual(num_images))

    def _usual(self, num_images: int) -> ImageSizes:
        """So many images of the usual size."""
        if num_images and not self.is_llava:
            require_size(self.config, self.image_size)
        return (self.image_size,) * num_images

    def columns(self, text_tokens: int, tokens: VisualTokens) -> tuple[int, ...]:
        """The columns of a prompt in each decoder layer: text, separators (CLS, newlines), and the visual tokens that
        it sees."""
        return tuple(text_tokens + tokens.others + seen for seen in tokens.of_layers)

    def bytes_per_number(self, dtype: torch.dtype | str | None) -> int:
        """
        Of a cache.

        Raises:
            ValueError: if `dtype` is none of torch's.
        """
        wanted = dtype or getattr(self.config, "dtype", None) or torch.float32
        found = getattr(torch, wanted, None) if isinstance(wanted, str) else wanted
        if not isinstance(found, torch.dtype):
            raise ValueError(f"`dtype` is {dtype!r}; allowed are torch's dtypes and their names, such as 'bfloat16'.")
        return found.itemsize

    def _stack(
        self, reducer: ReducerSpec | None, token_budget: StackBudget | None
    ) -> tuple["StackCosts", StackBudget | None]:
        if reducer == FULL:
            reducer, token_budget = NEVER_ASKED, 1.0
        entries = self.config.reducers if reducer is None else chosen_entries(reducer)
        names = [entry if isinstance(entry, str) else entry.get("name") for entry in entries]
        # A class may be registered anew under its name, as in a notebook.
        key = (json.dumps(entries, default=repr, sort_keys=True), *(REDUCERS.get(name) for name in names))
        if key not in self._stacks:
            self._stacks[key] = StackCosts(self.config, entries, self._encoded)
        return self._stacks[key], token_budget

    def _costs(
        self,
        text_tokens: int,
        tokens: VisualTokens,
        spent: Counter,
        new_tokens: int = 1,
        dtype: torch.dtype | str | None = None,
        plan: ExecutionPlan | UnitShares | None = None,
    ) -> Costs:
        columns = self.columns(text_tokens, tokens)
        decode = self.decoder.decode(columns, plan)
        return Costs(
            vision=spent["vision"],
            reducer=spent[None],
            projector=spent["projector"],
            prefill=self.decoder.prefill(columns, plan),
            decode_per_token=decode.steps(1),
            kv_bytes=float(self.decoder.kv_numbers(columns, plan) * self.bytes_per_number(dtype)),
            mean_visual_tokens=tokens.mean,
            new_tokens=new_tokens,
            layer_tokens=columns,
            decode=decode,
        )


_model_costs = remembered(ModelCosts)


def require_size(config: PreTrainedConfig, image_size: tuple[int, int] | None) -> tuple[int, int]:
    """
    Raises:
        ValueError: if the size is missing of a family's images, which differ.
    """
    if image_size is None:
        raise ValueError(
            f"`image_size` is None for a {config.model_type!r} model, whose images differ; say height and width in "
            "pixels."
        )
    return image_size
