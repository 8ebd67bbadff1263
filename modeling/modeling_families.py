"""The budget on other families: each class is the family's own with two mixins in front of it.

`AdaVTPQwen2_5_VLForConditionalGeneration` is transformers' `Qwen2_5_VLForConditionalGeneration`, which sees a prompt
with fewer placeholders and as many features. There is one class for each family, made when it is asked for by
its name; what is particular about the family is said by its adapter.
"""

import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoProcessor,
    Cache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import ModelOutput, can_return_tuple

from ..configuration.configuration_families import PREFIX, family_config_class
from .budget.schedule import BudgetSchedule, StackBudget
from .budget.selection import Selection
from .budget.token_budget import TokenBudget
from .decoder.dials import DIALS, DecoderDials
from .decoder.execution_plan import ExecutionPlan
from .decoder.policy import DecoderPolicy
from .decoder.pruned_cache import NewColumns, behind_cache, has_layer_columns, pending_policy, pruned_cache
from .families.adapters import adapter_of
from .families.base import Units
from .families.encoded import KINDS, EncodingFamily
from .generation_adavtp import AdaVTPGenerationMixin
from .hub.custom_reducers import CustomReducersMixin
from .hub.loading import CompleteLoadingMixin
from .hub.saving import CODE_FOLDER, SelfContainedMixin, own_class, without_auto_class
from .prompt import (
    PreparedInputs,
    Prompt,
    check_columns,
    labels_of_logits,
    of_columns,
    rows_to_keep,
    without_first_labels,
)
from .prompt_reduction import PromptReductionMixin
from .reducers.bank import ReducerSpec
from .reducers.published import PUBLISHED_REDUCERS
from .vision.family_visual import FamilyVisual, OpenedVisual
from .vision.visual_model import VisualModel

TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
_OWN_ARGUMENTS = ("token_budget", "reducer", "selection_output", *DIALS)


class FamilyReductionMixin(PromptReductionMixin):
    """Drops visual tokens from what a family's own encoder made, before its own forward reads them."""

    family: EncodingFamily

    @property
    def prompt_decoder(self) -> PreTrainedModel:
        """The family's text model."""
        return self.get_decoder()

    @property
    def prompt_reader(self) -> "FamilyReductionMixin":
        """See [`AdaVTPGenerationMixin.prompt_reader`]."""
        return self

    def images_in(self, arguments: dict[str, Any]) -> dict[str, Any] | None:
        """Pixels, grids and sizes among the arguments of a call, taken out of them; `None` if there are no images."""
        given = [pixels for pixels in KINDS.values() if arguments.get(pixels) is not None and len(arguments[pixels])]
        if not given:
            return None
        if len(given) > 1 and self.family.shares_placeholder:
            raise ValueError(
                f"`{'` and `'.join(given)}` were given in one call, and a {self.config.model_type!r} model shows both "
                "by the same placeholder token, so that it cannot tell which is where. Pass them in different calls."
            )
        names = [name for kind in KINDS for name in self._encoder_arguments(kind)]
        names += [name for name in ("second_per_grid_ts",) if name in arguments]
        return {name: arguments.pop(name) for name in dict.fromkeys(names) if arguments.get(name) is not None}

    def encoded(self, kind: str, images: Mapping[str, Any]) -> ModelOutput:
        """What the family's encoder makes of the images, or the videos, of a call."""
        arguments = {name: images[name] for name in self._encoder_arguments(kind) if name in images}
        return getattr(self.base_model, f"get_{kind}_features")(**arguments, return_dict=True)

    def looked_at(
        self, input_ids: torch.Tensor, images: Mapping[str, Any], schedule: BudgetSchedule
    ) -> tuple[VisualModel, Units]:
        """See [`PromptReductionMixin.looked_at`]."""
        kinds = self.family.kinds(self.config, input_ids)
        if self.family.shares_placeholder and images.get(KINDS["image"]) is None:
            kinds = kinds.clamp(max=0) + (kinds >= 0).long()
        visual_class = self._visual_class(schedule)
        if visual_class is OpenedVisual:
            super().refuse_other_features(images)
        visual = visual_class(self, kinds, images, schedule)
        return visual, visual.units

    def _visual_class(self, schedule: BudgetSchedule) -> type[FamilyVisual]:
        """What looks at images: our run of the tower where something acts inside it, and else the family's own."""
        meets_in_tower = self.config.budget_fusion == "encoder" and "budget" in self._needs(schedule.steps)
        is_opened = schedule.steps[0].reducer.stage == "encoder" or meets_in_tower
        return OpenedVisual if is_opened else FamilyVisual

    def look_at_blank(
        self, device: torch.device, schedule: BudgetSchedule
    ) -> tuple[VisualModel, Units, dict[str, Any]]:
        """See [`PromptReductionMixin.look_at_blank`]: at the smallest image that the family knows."""
        images = self.blank_image(device)
        visual = self._visual_class(schedule)(self, None, images, schedule)
        return visual, visual.units, images

    def blank_image(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The smallest image that the family knows, as its encoder takes it."""
        images = {name: value.to(device) for name, value in self.family.image_inputs(self.config, [(1, 1)]).items()}
        return images | {"pixel_values": images["pixel_values"].to(self.dtype)}

    def refuse_placeholders(self, input_ids: torch.Tensor) -> None:
        """See [`PromptReductionMixin.refuse_placeholders`]."""
        count = int(self.family.placeholders(self.config, input_ids).sum())
        if count:
            raise ValueError(
                f"`input_ids` has {count} placeholder tokens of images or videos and none were given; pass their "
                "pixels, as the processor returns them."
            )

    def ids_of_embeds(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """
        Raises:
            ValueError: always; positions and grids of a family's images are told by ids.
        """
        raise ValueError(
            f"`inputs_embeds` was given with images to a {self.config.model_type!r} model, whose images are placed by "
            "the placeholder tokens in `input_ids`; pass that."
        )

    def refuse_other_features(self, arguments: Mapping[str, Any]) -> None:
        """What the family's encoder is asked for, it makes."""

    def token_types_of(self, arguments: Mapping[str, Any], num_columns: int) -> dict[str, torch.Tensor]:
        """See [`PromptReductionMixin.token_types_of`]."""
        given = {name: arguments[name] for name in TOKEN_TYPES if arguments.get(name) is not None}
        return {name: columns[:, -num_columns:] for name, columns in given.items()}

    def with_own_positions(
        self, new: NewColumns, images: Mapping[str, Any] | None, arguments: Mapping[str, Any]
    ) -> NewColumns:
        """See [`PromptReductionMixin.with_own_positions`]."""
        given = dict(images or {}) | self.token_types_of(arguments, new.input_ids.shape[1])
        own = self.family.positions(self, new.input_ids, new.attention_mask, given)
        begin = new.begin
        if begin.dim() < own.dim() - 1:
            begin = begin.expand(own.shape[:-1])
        position_ids = (begin[..., None] + own).masked_fill(new.attention_mask == 0, 0)
        return replace(new, position_ids=position_ids, begin=begin)

    def _encoder_arguments(self, kind: str) -> tuple[str, ...]:
        return _arguments_of(type(self.base_model), f"get_{kind}_features")


@cache
def _arguments_of(model_class: type[PreTrainedModel], encoder: str) -> tuple[str, ...]:
    """What a method takes that encodes images or videos; nothing where there is none."""
    names = inspect.signature(getattr(model_class, encoder)).parameters if hasattr(model_class, encoder) else ()
    return tuple(name for name in names if name not in ("self", "kwargs", "return_dict"))


class FamilyGenerationMixin(AdaVTPGenerationMixin):
    """Teaches a family's `generate` to prune the prompt, and to be called with an image and a question."""

    processor_class = AutoProcessor

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """Behind a cache positions are counted anew once it is known what the cache stands for."""
        cache = model_kwargs.get("past_key_values")
        if cache is not None and int(cache.get_seq_length()) > 0:
            return GenerationMixin._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)


class FamilyModelMixin(
    CompleteLoadingMixin, CustomReducersMixin, SelfContainedMixin, FamilyReductionMixin, FamilyGenerationMixin
):
    """
    A family's model with a budget. Stands before the family's class.

    Args:
        config: the family's configuration with a budget's fields.

    Attributes:
        makes_last_logits: whether the family's forward makes the logits of the last columns alone if it is asked to.
    """

    makes_last_logits = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.add_budget_modules()
        self.post_init()

    @cached_property
    def family(self) -> EncodingFamily:
        """What is particular about the family."""
        return adapter_of(self.config)

    def auto_map(self) -> dict[str, str]:
        """See [`SelfContainedMixin.auto_map`]; the processor is the family's."""
        model = f"{CODE_FOLDER}/modeling_families.{own_class(type(self)).__name__}"
        configuration = f"{CODE_FOLDER}/configuration_families.{self.config_class.__name__}"
        kinds = ("AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
        return {"AutoConfig": configuration, **dict.fromkeys(kinds, model)}

    def save_code(self, folder: Path) -> None:
        """Writes the model's code into `folder`, and the family's own name where engines look for one."""
        super().save_code(folder)
        self.config.architectures = [own_class(type(self)).__name__.removeprefix(PREFIX)]
        with without_auto_class(type(self.config)):
            self.config.save_pretrained(folder)

    @torch.no_grad()
    def select_tokens(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
        **inputs: Any,
    ) -> Any:
        """
        Chooses the visual tokens that `forward` and `generate` would keep. The decoder runs only if a reducer acts
        inside it.

        Args:
            input_ids, attention_mask, labels: see `forward`.
            token_budget, reducer: see `forward`.
            inputs: pixels, grids, sizes and token types, as the processor returns them.

        Returns:
            `Selection` for every unit; with `depth` where a reducer acts inside the decoder.
        """
        if self.steps(reducer)[-1].reducer.stage == "decoder":
            # Without labels no text is an answer.
            inputs["labels"] = torch.full_like(input_ids, -100) if labels is None else labels
            inputs |= {"attention_mask": attention_mask, "token_budget": token_budget, "reducer": reducer}
            return self(input_ids=input_ids, **inputs, logits_to_keep=1).selection
        images = self.images_in(inputs)
        prompt = self._prompt(input_ids, attention_mask, None, labels, images, inputs)[1]
        return self.prepare_inputs(
            prompt, images, self.resolve_budget(token_budget, reducer, len(input_ids))
        ).selection

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
        selection_output: str | None = None,
        plan: ExecutionPlan | None = None,
        depth_budget: TokenBudget | None = None,
        width_budget: TokenBudget | None = None,
        scheduler: str | None = None,
        compute_budget: float | Sequence[float] | torch.Tensor | None = None,
        allocation: str | Mapping[str, float] | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """
        The family's own forward, with nine arguments more.

        Args:
            token_budget: a float in [0, 1] (fraction of each unit's visual tokens that are kept), an int >= 2 (their
                number), one such value per sample, `{"prompt": n}` (a number for all units of a prompt), or for a
                stack of reducers a dictionary with a budget for each by name.
            reducer: what selects in this call, in the form of `set_reducer`; by default the configuration's.
            selection_output: `"gather"` (dropped columns leave the sequence) or `"mask"` (they stay, hidden).
            plan: which layers, heads and groups of MLP channels of the decoder run, for each prompt or for all. Behind
                a cache it is that of the prompt that filled it.
            depth_budget, width_budget, scheduler, compute_budget, allocation: see
                [`AdaVTPForConditionalGeneration.forward`].
            inputs: whatever else the family's forward takes. With `labels`, a number as `logits_to_keep` makes the
                loss that of the last so many columns.

        Returns:
            The family's output, with `selection`, the visual tokens that were kept, and `labels`, those of the kept
            columns whose logits were made.

        Raises:
            ValueError: if an argument is not allowed; the message names it, its value and what is allowed.
        """
        if input_ids is not None:
            check_columns(input_ids, labels, position_ids)
        dials = DecoderDials(plan, depth_budget, width_budget, scheduler, compute_budget, allocation)
        images = self.images_in(inputs)
        ids = (
            self.ids_of_embeds(inputs_embeds) if input_ids is None and dials.compute_budget is not None else input_ids
        )
        token_budget, dials = self.split_compute(
            token_budget, dials, reducer, ids, attention_mask, images, past_key_values
        )
        if images is None:
            self.checked_output(selection_output)
            return self._forward_of_text(
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                inputs_embeds,
                labels,
                token_budget,
                reducer,
                dials,
                inputs,
            )
        if input_ids is None:
            input_ids = self.ids_of_embeds(inputs_embeds)
        self.check_images_are_new(inputs.get("mm_encoder_outputs"), past_key_values)
        schedule = self.resolve_budget(token_budget, reducer, len(input_ids))
        new, prompt = self._prompt(input_ids, attention_mask, position_ids, labels, images, inputs)
        prepared = self.prepare_inputs(prompt, images, schedule, selection_output)
        self.check_labels_of_choice(prompt, schedule, prepared)
        columns = (prepared.prompt.input_ids, prepared.prompt.attention_mask, prepared.prompt.labels)
        prepared.policy = self.under_dials(prepared.policy, dials, *columns, past_key_values, prepared)
        outputs = self._forward_of_prepared(prepared, past_key_values, inputs)
        pruned = self.pruned_prompt(new, prepared, new.num_columns)
        if outputs.past_key_values is not None and pruned is not None:
            pruned_cache(outputs.past_key_values).prompt = pruned.on_cache()
        return outputs

    def _forward_of_prepared(
        self, prepared: PreparedInputs, past_key_values: Cache | None, inputs: dict[str, Any]
    ) -> ModelOutput:
        """The family's own forward of a pruned prompt, or our loop where more is to leave in the decoder."""
        columns = {
            "input_ids": prepared.prompt.input_ids,
            "attention_mask": prepared.prompt.attention_mask,
            "position_ids": self._as_family_counts(prepared.prompt.position_ids),
            "labels": prepared.prompt.labels,
        }
        inputs = {name: value for name, value in inputs.items() if name not in TOKEN_TYPES}
        encoded = prepared.visual.encoder_outputs(self.family.takes_tensor)
        if prepared.policy is not None:
            outputs, columns["labels"] = self._forward_of_layers(
                prepared.policy, encoded, prepared.selection, past_key_values=past_key_values, **columns, **inputs
            )
        else:
            columns["labels"] = self._labels_of_logits(columns["labels"], inputs)
            outputs = super().forward(
                **columns,
                past_key_values=past_key_values,
                mm_encoder_outputs=encoded,
                **prepared.prompt.token_types,
                **inputs,
                return_dict=True,
            )
        if self.training and outputs.get("loss") is not None and prepared.selection.loss is not None:
            outputs["loss"] = outputs.loss + prepared.selection.loss.to(outputs.loss.dtype)
        outputs["selection"], outputs["labels"] = prepared.selection, columns["labels"]
        return outputs

    def _forward_of_layers(
        self,
        policy: DecoderPolicy | None,
        encoded: dict[str, ModelOutput] | None,
        selection: Selection | None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> tuple[ModelOutput, torch.Tensor | None]:
        """What the family's own forward gives, where layers see different columns; and the labels of those left."""
        outputs, loss = self.run_layers(policy, encoded, selection, **inputs), None
        logits = self.lm_head(rows_to_keep(outputs.last_hidden_state, logits_to_keep))
        if labels is not None:
            if outputs.column_index is not None:
                labels = of_columns(labels, outputs.column_index, -100)
            labels = labels_of_logits(labels, logits_to_keep)
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.get_text_config().vocab_size, **inputs
            )
        made = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return made, labels

    def _prompt(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        labels: torch.LongTensor | None,
        images: Mapping[str, Any],
        inputs: Mapping[str, Any],
    ) -> tuple[NewColumns, Prompt]:
        """A prompt's columns as a caller has them, and as what drops some of them takes them."""
        token_types = self.token_types_of(inputs, input_ids.shape[1])
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if position_ids is None:
            position_ids = self.family.positions(self, input_ids, attention_mask, {**images, **token_types})
        else:
            position_ids = position_ids - self.family.first_position
        new = NewColumns.of_prompt(input_ids, attention_mask, position_ids)
        prompt = Prompt(input_ids, new.attention_mask, new.position_ids, labels, token_types=token_types)
        return new, prompt

    def _labels_of_logits(self, labels: torch.Tensor | None, inputs: Mapping[str, Any]) -> torch.Tensor | None:
        """Labels of the columns whose logits the family's own forward makes."""
        return labels_of_logits(labels, inputs.get("logits_to_keep", 0)) if self.makes_last_logits else labels

    def _as_family_counts(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions from 0 as positions from the family's first."""
        # In a step of decoding every operation counts.
        return position_ids + self.family.first_position if self.family.first_position else position_ids

    def _forward_of_text(
        self,
        input_ids: torch.LongTensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.LongTensor | None,
        past_key_values: Cache | None,
        inputs_embeds: torch.Tensor | None,
        labels: torch.LongTensor | None,
        token_budget: StackBudget | None,
        reducer: ReducerSpec | None,
        dials: DecoderDials,
        inputs: dict[str, Any],
    ) -> ModelOutput:
        """The family's own forward of text, or of what was encoded and pruned already."""
        zero = None
        if input_ids is not None and inputs.get("mm_encoder_outputs") is None:
            zero = self.zero_of_text(input_ids, past_key_values, token_budget, reducer)
            attention_mask, counted = behind_cache(
                self.config, input_ids, attention_mask, position_ids, past_key_values
            )
            if position_ids is None and counted is not None:
                position_ids = self._as_family_counts(counted)
        elif inputs.get("mm_encoder_outputs") is not None:
            self.refuse_budget_of_encoded(token_budget, reducer)
        if labels is not None and attention_mask is not None:
            labels = without_first_labels(labels, attention_mask)
        policy, given = pending_policy(past_key_values), input_ids if input_ids is not None else inputs_embeds
        # `generate` has decided before the prompt that is pending.
        if dials.are_turned or policy is None:
            policy = self.under_dials(policy, dials, given, attention_mask, labels, past_key_values)
        if policy is not None or has_layer_columns(past_key_values):
            encoded = inputs.pop("mm_encoder_outputs", None)
            for name in TOKEN_TYPES:
                inputs.pop(name, None)
            return self._forward_of_layers(
                policy,
                encoded,
                None,
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                labels=labels,
                **inputs,
            )[0]
        labels = self._labels_of_logits(labels, inputs)
        outputs = super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **inputs,
            return_dict=True,
        )
        if zero is not None:
            learned = "logits" if labels is None else "loss"
            outputs[learned] = outputs[learned] + zero.to(outputs[learned])
        outputs["labels"] = labels
        return outputs


@cache
def family_model_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """
    The class of a family's model with a budget.

    Args:
        stock: the family's `...ForConditionalGeneration`.

    Raises:
        ValueError: if it does not take `mm_encoder_outputs`, which is where pruned features go in.
    """
    known = inspect.signature(stock.forward).parameters
    if "mm_encoder_outputs" not in known:
        raise ValueError(
            f"{stock.__name__} of transformers {transformers.__version__} does not take `mm_encoder_outputs`, through "
            "which a token budget acts. Use transformers 5.18 or newer, or a family that takes it."
        )
    config_class = family_config_class(stock.config_class)
    name = f"{PREFIX}{stock.__name__}"
    attributes = {
        "__module__": __name__,
        "__doc__": f"[`{stock.__name__}`] with a token budget: `model.generate(**inputs, token_budget=0.4)`.",
        "__annotations__": {"config": config_class},
        "config_class": config_class,
        "readable_model_types": (config_class.model_type,),
        "forward": _named_forward(stock),
        "makes_last_logits": "logits_to_keep" in known,
    }
    # LLaVA-like files hold names of an older layout, which are mapped by the name of the class.
    mapping = get_checkpoint_conversion_mapping(stock.__name__) or get_checkpoint_conversion_mapping(
        stock.config_class.model_type
    )
    if mapping is not None:
        register_checkpoint_conversion_mapping(name, mapping, overwrite=True)
    return types.new_class(name, (FamilyModelMixin, stock), {}, lambda space: space.update(attributes))


def _named_forward(stock: type[PreTrainedModel]) -> Callable[..., Any]:
    """A forward that names what the family's names and what is ours: `generate` and `Trainer` read the names."""

    def forward(self: FamilyModelMixin, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs |= dict(zip(list(inspect.signature(stock.forward).parameters)[1:], args, strict=False))
        return FamilyModelMixin.forward(self, **kwargs)

    signature = inspect.signature(stock.forward)
    named = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in _OWN_ARGUMENTS]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = inspect.Signature([*named, *own, rest])
    forward.__doc__ = FamilyModelMixin.forward.__doc__
    return forward


def model_class_of(model_type: str) -> type[PreTrainedModel]:
    """
    The class with a budget for checkpoints of a `model_type`.

    Raises:
        ValueError: if transformers has no model of it that reads images and text.
    """
    stock = getattr(transformers, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, ""), None)
    if stock is None:
        raise ValueError(
            f"`model_type` is {model_type!r}, and transformers {transformers.__version__} has no model of it that "
            "reads images and text; allowed are 'adavtp', 'llava', and models that take `mm_encoder_outputs`."
        )
    return family_model_class(stock)


def __getattr__(name: str) -> type[PreTrainedModel]:
    stock = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(stock, type) and issubclass(stock, PreTrainedModel):
        return family_model_class(stock)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["PUBLISHED_REDUCERS"]
