"""AdaVTP: a LLaVA whose decoder sees as many visual tokens as the caller's budget allows.

The way of an image: the tower makes patch features, with the budget and the question beside them; a reducer keeps K of
them; the projector maps the kept ones into the decoder's space. The placeholders of dropped patches leave the prompt,
and the family's own forward reads what is left. The decoder is any Llama-shaped text model, untouched.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from os import PathLike
from types import MethodType
from typing import Any, Unpack

import torch
from torch import nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.configuration_adavtp import AdaVTPConfig
from .budget.schedule import StackBudget
from .budget.selection import Selection
from .budget.token_budget import TokenBudget
from .decoder.dials import DecoderDials
from .decoder.execution_plan import ExecutionPlan
from .decoder.policy import DecoderPolicy
from .decoder.pruned_cache import NewColumns, behind_cache, has_layer_columns, pending_policy, pruned_cache
from .families.base import Family
from .generation_adavtp import AdaVTPGenerationMixin
from .hub.custom_reducers import CustomReducersMixin
from .hub.loading import CompleteLoadingMixin, family_class
from .hub.saving import SelfContainedMixin
from .prompt import (
    Prompt,
    additive_mask,
    at_columns,
    check_columns,
    count_positions,
    labels_of_logits,
    of_columns,
    rows_to_keep,
    without_first_labels,
)
from .prompt_reduction import PromptReductionMixin
from .reducers.bank import ReducerSpec
from .reducers.published import PUBLISHED_REDUCERS
from .reducers.token_fusion import ZeroLinear

# LLaVA's files hold the parameter names of an older layout. transformers renames them while loading, but for classes
# outside its own package only where a mapping is registered under the class's name.
register_checkpoint_conversion_mapping(
    "AdaVTPForConditionalGeneration", get_checkpoint_conversion_mapping("llava"), overwrite=True
)
register_checkpoint_conversion_mapping("AdaVTPModel", get_checkpoint_conversion_mapping("LlavaModel"), overwrite=True)


@dataclass
class AdaVTPModelOutputWithPast(LlavaModelOutputWithPast):
    """
    Output of [`AdaVTPModel`].

    Attributes:
        selection: the visual tokens that were kept, or `None` for a text-only batch.
        labels: `[batch, kept_sequence]`, the labels that were passed without those of dropped columns, aligned with
            the hidden states.
    """

    selection: Selection | None = None
    labels: torch.LongTensor | None = None


@dataclass
class AdaVTPCausalLMOutputWithPast(LlavaCausalLMOutputWithPast):
    """
    Output of [`AdaVTPForConditionalGeneration`].

    Attributes:
        selection: the visual tokens that were kept, or `None` for a text-only batch.
        labels: `[batch, kept_sequence]`, the labels that were passed without those of dropped columns, aligned with
            the logits.
    """

    selection: Selection | None = None
    labels: torch.LongTensor | None = None


class AdaVTPPreTrainedModel(CompleteLoadingMixin, CustomReducersMixin, SelfContainedMixin, PreTrainedModel):
    """What both model classes share: configuration, loading, and saving with the code beside the weights."""

    config: AdaVTPConfig
    config_class = AdaVTPConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self) -> None:
        """transformers names all layers of a tower's family that stay in one piece; sharding wants those in use."""
        super().post_init()
        self._no_split_modules = set(self._no_split_modules) & {type(module).__name__ for module in self.modules()}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear):
            module.reset_parameters()


class AdaVTPModel(PromptReductionMixin, AdaVTPPreTrainedModel, LlavaModel):
    """
    Vision tower, reducer, projector and text model, without a language-modelling head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__(config)
        self.add_budget_modules()
        self.post_init()

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor | BaseModelOutputWithPooling,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        The visual features that the decoder gets of images without a question.

        Args:
            pixel_values: `[num_images, channels, height, width]`; or what this method returned, which it passes on:
                the family's forward asks here for the features of images that were chosen from already.
            token_budget, reducer: see [`AdaVTPForConditionalGeneration.forward`]; one budget, or one per image.
            kwargs: as in [`LlavaModel.get_image_features`]; `output_hidden_states` and `output_attentions` are those
                of the tower for the whole images.

        Returns:
            `BaseModelOutputWithPooling` with `pooler_output`, a list of `[K, text_hidden_size]` for each image. Where
            all tokens are kept it is what [`LlavaModel`] returns; otherwise the tower's own states are in it only if
            they were asked for.

        Raises:
            ValueError: if the budget or the reducer is not allowed, or other features of the tower are asked for than
                those that tokens are chosen by.
        """
        if isinstance(pixel_values, BaseModelOutputWithPooling):
            return pixel_values
        schedule = self.resolve_budget(token_budget, reducer, len(pixel_values))
        if self.keeps_whole_images(len(pixel_values), schedule):
            return super().get_image_features(pixel_values, **kwargs, return_dict=True)
        self.refuse_other_features(kwargs)
        fields, asked = self.config.vision_config, ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name, getattr(fields, name, False)) for name in asked):
            outputs = super().get_image_features(pixel_values, **kwargs, return_dict=True)
        else:
            outputs = BaseModelOutputWithPooling()
        outputs.pooler_output = self.features_of_images(pixel_values, schedule)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_budget: StackBudget | None = None,
        selection_output: str | None = None,
        reducer: ReducerSpec | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        caller_targets: torch.LongTensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AdaVTPModelOutputWithPast:
        """See [`AdaVTPForConditionalGeneration.forward`]; returns hidden states in place of logits."""
        dials, prepared = DecoderDials.taken_from(kwargs), None
        if pixel_values is not None and len(pixel_values) == 0:
            pixel_values = None
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` has to be given.")
        if pixel_values is not None and input_ids is None:
            input_ids = self.ids_of_embeds(inputs_embeds)
        if input_ids is not None:
            check_columns(input_ids, labels, position_ids, caller_targets)
        if pixel_values is not None:
            self.check_images_are_new(mm_encoder_outputs, past_key_values)
        self.refuse_other_features(kwargs)
        encoded = None if mm_encoder_outputs is None else mm_encoder_outputs.get("image")
        if encoded is not None:
            self.refuse_budget_of_encoded(token_budget, reducer)
        given = inputs_embeds if input_ids is None else input_ids
        columns = (given, attention_mask, pixel_values, past_key_values)
        token_budget, dials = self.split_compute(token_budget, dials, reducer, *columns)
        policy, selection, pruned, column = pending_policy(past_key_values), None, None, None
        if pixel_values is not None:
            schedule = self.resolve_budget(token_budget, reducer, len(input_ids))
            new = NewColumns.of_prompt(input_ids, attention_mask, position_ids)
            prompt = Prompt(input_ids, new.attention_mask, new.position_ids, labels, inputs_embeds=inputs_embeds)
            if labels is None and caller_targets is not None:
                prompt = prompt.with_caller_targets(caller_targets)
            prepared = self.prepare_inputs(prompt, pixel_values, schedule, selection_output)
            self.check_labels_of_choice(prompt, schedule, prepared)
            input_ids, attention_mask = prepared.prompt.input_ids, prepared.prompt.attention_mask
            position_ids, labels = prepared.prompt.position_ids, prepared.prompt.labels
            column, inputs_embeds = prepared.prompt.column, prepared.prompt.inputs_embeds
            encoded = prepared.visual.encoder_outputs()["image"]
            selection, policy = prepared.selection, prepared.policy
            pruned = self.pruned_prompt(new, prepared, new.num_columns)
        else:
            self.checked_output(selection_output)
            if input_ids is not None and encoded is None:
                zero = self.zero_of_text(input_ids, past_key_values, token_budget, reducer)
                inputs_embeds = None if zero is None else self.get_input_embeddings()(input_ids) + zero
                attention_mask, position_ids = behind_cache(
                    self.config, input_ids, attention_mask, position_ids, past_key_values
                )
            if labels is not None and attention_mask is not None:
                labels = without_first_labels(labels, attention_mask)
        given = input_ids if input_ids is not None else inputs_embeds
        # `generate` has decided before the prompt that is pending.
        if dials.are_turned or policy is None or prepared is not None:
            policy = self.under_dials(policy, dials, given, attention_mask, labels, past_key_values, prepared)
        # Embeddings of a prompt with images hold the images' already.
        to_place = None if pixel_values is not None and inputs_embeds is not None else encoded
        outputs = self._decode(
            policy,
            to_place,
            selection,
            input_ids,
            inputs_embeds,
            past_key_values,
            attention_mask,
            position_ids=position_ids,
            **kwargs,
        )
        if pruned is not None and outputs.past_key_values is not None:
            pruned_cache(outputs.past_key_values).prompt = pruned.on_cache()
        hidden_states, column_index = outputs.last_hidden_state, getattr(outputs, "column_index", None)
        if column_index is not None:
            labels, column = of_columns(labels, column_index, -100), of_columns(column, column_index, -1)
        if column is not None:
            hidden_states, labels = at_columns(hidden_states, column, new.input_ids.shape[1]), None
        return AdaVTPModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if encoded is None else torch.cat(encoded.pooler_output),
            selection=selection,
            labels=labels,
        )

    def _decode(
        self,
        policy: DecoderPolicy | None,
        encoded: BaseModelOutputWithPooling | None,
        selection: Selection | None,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        past_key_values: Cache | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """The family's own forward; or, where layers see different columns, our loop over them."""
        kwargs["past_key_values"] = past_key_values
        if policy is not None or has_layer_columns(past_key_values):
            of_kinds = None if encoded is None else {"image": encoded}
            kwargs["attention_mask"] = attention_mask
            return self.run_layers(policy, of_kinds, selection, input_ids, inputs_embeds, **kwargs)
        return super().forward(
            input_ids=input_ids if inputs_embeds is None else None,
            pixel_values=encoded,
            inputs_embeds=inputs_embeds,
            attention_mask=additive_mask(attention_mask, self.language_model.dtype),
            **kwargs,
        )


def _telling_targets(forward: Callable[..., Any]) -> Callable[..., Any]:
    """
    A forward that others put in front of a model's own. Those of TRL's trainers take `labels` out of the call, ask the
    model below for hidden states and compute the loss from these; what chooses has to hear of the labels nevertheless.
    """

    @wraps(forward)
    def telling_targets(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("labels") is not None:
            kwargs.setdefault("caller_targets", kwargs["labels"])
        return forward(model, *args, **kwargs)

    return telling_targets


class AdaVTPForConditionalGeneration(AdaVTPPreTrainedModel, AdaVTPGenerationMixin, LlavaForConditionalGeneration):
    """
    A LLaVA with a token budget: `model.generate(**inputs, token_budget=0.4)`.

    Args:
        config: the model's configuration.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *model_args: Any, **kwargs: Any
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """
        Loads a model from a folder or the Hub; from a checkpoint of another family than LLaVA its own class with a
        budget. See [`CompleteLoadingMixin.from_pretrained`].
        """
        family = family_class(pretrained_model_name_or_path, kwargs) if cls.__module__ == __name__ else None
        if family is not None:
            return family.from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)

    def __init__(self, config: AdaVTPConfig) -> None:
        # LlavaForConditionalGeneration's own would build a LlavaModel first, a whole model for nothing.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = AdaVTPModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "forward" and getattr(value, "__self__", None) is self:
            value = MethodType(_telling_targets(value.__func__), self)
        super().__setattr__(name, value)

    def set_reducer(self, reducer: ReducerSpec, **parameters: Any) -> None:
        """See [`AdaVTPModel.set_reducer`]."""
        self.model.set_reducer(reducer, **parameters)

    @torch.no_grad()
    def select_tokens(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
    ) -> Selection:
        """
        Chooses the visual tokens that `forward` and `generate` would keep. The decoder runs only if a reducer acts
        inside it.

        Args:
            input_ids: `[batch, sequence]`.
            pixel_values: `[num_images, channels, height, width]`.
            attention_mask: `[batch, sequence]`.
            labels: `[batch, sequence]`; where given, text from the first label on is not part of the question.
            token_budget, reducer: see `forward`.

        Returns:
            `Selection` for every image; with `depth` where a reducer acts inside the decoder.

        Raises:
            ValueError: if the budget is not allowed, or placeholders and images do not agree.
        """
        if self.model.steps(reducer)[-1].reducer.stage == "decoder":
            return self.model(
                input_ids,
                pixel_values,
                attention_mask,
                # Without labels no text is an answer.
                labels=torch.full_like(input_ids, -100) if labels is None else labels,
                token_budget=token_budget,
                reducer=reducer,
            ).selection
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        schedule = self.model.resolve_budget(token_budget, reducer, len(input_ids))
        prompt = Prompt(input_ids, attention_mask, count_positions(attention_mask), labels)
        return self.model.prepare_inputs(prompt, pixel_values, schedule).selection

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """See [`AdaVTPModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, token_budget, reducer, **kwargs)

    @property
    def family(self) -> Family:
        """What is particular about the model's family."""
        return self.model.family

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        token_budget: StackBudget | None = None,
        selection_output: str | None = None,
        reducer: ReducerSpec | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        caller_targets: torch.LongTensor | None = None,
        plan: ExecutionPlan | None = None,
        depth_budget: TokenBudget | None = None,
        width_budget: TokenBudget | None = None,
        scheduler: str | None = None,
        compute_budget: float | Sequence[float] | torch.Tensor | None = None,
        allocation: str | Mapping[str, float] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> AdaVTPCausalLMOutputWithPast:
        """
        Args:
            input_ids: `[batch, sequence]`, with one placeholder per visual token of each image.
            pixel_values: `[num_images, channels, height, width]`, in the order of their placeholders.
            attention_mask: `[batch, sequence]`; or `[batch, 1, sequence, sequence]` bool, true where a row may attend
                to a column, together with `position_ids`.
            position_ids: `[batch, sequence]`; by default counted from the attention mask.
            past_key_values: cache of earlier tokens, for text.
            inputs_embeds: `[batch, sequence, text_hidden_size]` in place of `input_ids`, for text.
            labels: `[batch, sequence]`, -100 where there is no target.
            logits_to_keep: compute logits of only the last so many positions, or of these positions. With `labels`, a
                number makes the loss that of the last so many.
            token_budget: a float in [0, 1] (fraction of each image's patches that are kept), an int >= 2 (their
                number), or one such value per sample; for a stack of reducers also a dictionary with a budget for
                each by name, of the tokens that it gets. `None`: the reducer's own rule where it has one, else the
                configuration's budget. For reducers inside the decoder it is the mean over decoder layers.
            reducer: what selects in this call, in the form of `set_reducer`; by default the configuration's.
            selection_output: `"gather"` (dropped columns leave the sequence, which gets shorter) or `"mask"` (they
                stay, hidden); by default the configuration's.
            mm_encoder_outputs: `{"image": output}` in place of `pixel_values`: features that are encoded and reduced
                already, as [`get_image_features`] returns them, for as many placeholders.
            caller_targets: `[batch, sequence]`, labels of a loss that the caller computes from what this returns. In
                place of `labels` they tell the question from the answer; and the last hidden states and logits come
                in the columns of `input_ids`, where these targets stand. A dropped column has those of the last kept
                one before it.
            plan: which layers, heads and groups of MLP channels of the decoder run, for each prompt or for all. Behind
                a cache it is that of the prompt that filled it.
            depth_budget: a float in [0, 1] (fraction of the decoder's layers that run), an int >= 2 (their number), or
                one such value per sample; by default the configuration's. The first layers always run.
            width_budget: a float in [0, 1] (fraction of the attention heads and MLP channels of these layers that
                run), an int >= 2 (heads of a layer, on average), or one such value per sample; by default the
                configuration's.
            scheduler: what chooses under these two: `"even"`, `"first"` or `"random"`, rules that need no training; by
                default the model's own scheduler.
            compute_budget: in place of all three budgets, a float in [0, 1], or one per sample: the fraction of the
                FLOPs with which the full model would read the prompt. It is never exceeded.
            allocation: how the dials share it, `"tokens"`, `"depth+width"`, `"proportional"`, `{"depth": 0.7}`; see
                `compute_allocation` in the configuration, whose value is the default.

        Returns:
            `AdaVTPCausalLMOutputWithPast`; the sequence length of logits and labels is that of the kept columns, or
            with `caller_targets` that of `input_ids`.

        Raises:
            ValueError: if an argument is not allowed; the message names it, its value and what is allowed.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            token_budget=token_budget,
            selection_output=selection_output,
            reducer=reducer,
            mm_encoder_outputs=mm_encoder_outputs,
            caller_targets=caller_targets,
            plan=plan,
            depth_budget=depth_budget,
            width_budget=width_budget,
            scheduler=scheduler,
            compute_budget=compute_budget,
            allocation=allocation,
            **kwargs,
        )
        logits = self.lm_head(rows_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss, outputs.labels = None, labels_of_logits(outputs.labels, logits_to_keep)
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=outputs.labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
            if self.training and outputs.selection is not None and outputs.selection.loss is not None:
                loss = loss + outputs.selection.loss.to(loss.dtype)
        return AdaVTPCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            selection=outputs.selection,
            labels=outputs.labels,
        )


__all__ = ["PUBLISHED_REDUCERS", "AdaVTPForConditionalGeneration", "AdaVTPModel", "AdaVTPPreTrainedModel"]
