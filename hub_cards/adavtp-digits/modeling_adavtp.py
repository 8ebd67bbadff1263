"""AdaVTP: a LLaVA whose decoder sees as many visual tokens as the caller's budget allows.

The way of an image: the tower makes patch features, with the budget and the question beside them; a reducer keeps K of
them; the projector maps the kept ones into the decoder's space; they take the places of their placeholders in the
prompt, and the placeholders of dropped patches leave it. The decoder is any Llama-shaped text model, untouched.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache, LlavaForConditionalGeneration, LlavaModel, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast, LlavaModelOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_adavtp import AdaVTPConfig
from .budget_adavtp import TokenBudget, num_tokens_to_keep
from .controller_adavtp import VisionTokenController
from .generation_adavtp import AdaVTPGenerationMixin
from .loading_adavtp import CompleteLoadingMixin
from .reducers_adavtp import TokenReducer, build_reducer
from .selection_adavtp import Prompt, Selection, count_positions, images_per_sample, without_first_labels
from .self_contained_adavtp import SelfContainedMixin
from .vision_adavtp import BudgetToken, VisionFeatures, encode_image

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


class AdaVTPPreTrainedModel(CompleteLoadingMixin, SelfContainedMixin, PreTrainedModel):
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


class AdaVTPModel(AdaVTPPreTrainedModel, LlavaModel):
    """
    Vision tower, reducer, projector and text model, without a language-modelling head.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__(config)
        self.budget_token = BudgetToken(config)
        self.controller = VisionTokenController(config)
        self.reducers = nn.ModuleDict()
        self.set_reducer(config.reducer)
        self.post_init()

    def set_reducer(self, name: str) -> None:
        """
        Chooses what selects the visual tokens from now on.

        Args:
            name: a registered reducer; `"adaptive"` is the model's own controller.

        Raises:
            ValueError: if no reducer has the name.
        """
        if name != "adaptive" and name not in self.reducers:
            reducer = build_reducer(name, self.config).to(device=self.device, dtype=self.dtype)
            self.reducers[name] = reducer.train(self.training)
        self.config.reducer = name

    @property
    def reducer(self) -> TokenReducer:
        """The reducer that selects the visual tokens."""
        return self.controller if self.config.reducer == "adaptive" else self.reducers[self.config.reducer]

    def select(
        self, pixel_values: torch.Tensor, num_keep: torch.Tensor, question: torch.Tensor | None
    ) -> tuple[VisionFeatures, Selection]:
        """
        Looks at the images and chooses tokens.

        Args:
            pixel_values: `[num_images, channels, height, width]`.
            num_keep: `[num_images]` int64, tokens to keep of each image.
            question: `[num_images, text_hidden_size]` or `None` if the model is not question-aware.

        Returns:
            Features of all patches, and the selection.

        Raises:
            ValueError: if the images do not have the size that the model was made for.
        """
        num_patches, image_size = self.config.num_patches, self.config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) != (image_size, image_size):
            raise ValueError(
                f"`pixel_values` has images of {tuple(pixel_values.shape[-2:])} pixels; this model's images have "
                f"{image_size} pixels a side and make {num_patches} patches."
            )
        # In training the same modules run whatever the budget, so that every rank of a sharded model runs the same.
        keeps_everything = not self.training and bool((num_keep == num_patches).all())
        patches_see_budget = self.config.budget_fusion == "encoder" and self.config.budget_attention == "mutual"
        meets_budget = "budget" in self.reducer.needs and (not keeps_everything or patches_see_budget)
        features = encode_image(
            self.vision_tower,
            pixel_values,
            self.config,
            budget_token=self.budget_token if meets_budget else None,
            budget=(num_keep.double() / num_patches).float().to(self.device),
            question=question,
        )
        if keeps_everything:
            return features, Selection.everything(len(features.patches), num_patches, features.patches.device)
        needed = {"pixel_values": pixel_values} if "pixel_values" in self.reducer.needs else {}
        return features, self.reducer(features, num_keep.to(features.patches.device), **needed)

    def _questions(
        self,
        input_ids: torch.Tensor,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Mean embedding `[batch, text_hidden_size]` of each prompt's text, up to the first token that is a target."""
        if not self.config.question_aware:
            return None
        is_text = input_ids != self.config.image_token_id
        if attention_mask.dim() == 2:
            is_text = is_text & attention_mask.bool()
        if labels is not None:
            is_text = is_text & ((labels != -100).cumsum(dim=-1) == 0)
        weight = is_text.to(text_embeds.dtype)
        return (text_embeds * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)

    def prepare_prompt(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        token_budget: TokenBudget | None = None,
        selection_output: str | None = None,
    ) -> tuple[Prompt, Selection]:
        """
        Builds the decoder's input from prompts and images: encode, select, project, splice, drop.

        Args:
            input_ids: `[batch, sequence]`, with one placeholder per visual token of each image.
            pixel_values: `[num_images, channels, height, width]`, in the order of their placeholders.
            attention_mask: `[batch, sequence]`, or `[batch, 1, sequence, sequence]` bool with `position_ids`.
            position_ids: `[batch, sequence]`; by default counted from the attention mask.
            labels: `[batch, sequence]`.
            token_budget: see [`AdaVTPForConditionalGeneration.forward`].
            selection_output: `"gather"` or `"mask"`; by default the configuration's.

        Returns:
            The prompt as the decoder gets it, and the selection.

        Raises:
            ValueError: if the budget is not allowed, or placeholders and images do not agree.
        """
        config = self.config
        selection_output = _checked_output(selection_output, config)
        num_images = images_per_sample(input_ids, config.image_token_id, config.num_image_tokens, len(pixel_values))
        num_keep = self._num_keep(token_budget, len(input_ids)).to(num_images.device)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _check_mask(attention_mask, input_ids.shape)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        question = self._questions(input_ids, inputs_embeds, attention_mask, labels)
        features, selection = self.select(
            pixel_values,
            num_keep.repeat_interleave(num_images),
            None if question is None else question.repeat_interleave(num_images, dim=0),
        )
        gates_attention = selection.gates is not None and config.gradient_gates == "attention"
        output = "all" if gates_attention else selection_output
        visual, column_is_kept = self._project(features, selection, output)
        placeholder = input_ids == config.image_token_id
        keep = torch.ones_like(placeholder).masked_scatter(placeholder, column_is_kept)
        filled = placeholder & keep if output == "gather" else placeholder
        inputs_embeds = inputs_embeds.masked_scatter(filled[..., None], visual.to(inputs_embeds.dtype))

        if position_ids is None:
            if attention_mask.dim() != 2:
                raise ValueError("`position_ids` is None, which is allowed only with a 2-D `attention_mask`.")
            position_ids = count_positions(attention_mask)
        if config.visual_position_ids == "compact":
            position_ids = position_ids - (~keep).long().cumsum(dim=-1)
            position_ids = position_ids.clamp(min=0)
        if labels is not None:
            labels = without_first_labels(labels, attention_mask)
        prompt = Prompt(inputs_embeds, attention_mask, position_ids.expand(len(input_ids), -1), labels)
        if output == "all":
            _check_attention_takes_gates(self.language_model, input_ids.shape[1])
            return prompt.gating(self._column_gates(selection, placeholder)), selection
        if bool(keep.all()):
            return prompt, selection
        if output == "mask":
            return prompt.hiding(~keep), selection
        is_real = keep if attention_mask.dim() == 4 else keep & attention_mask.bool()
        return prompt.without(is_real), selection

    def _nothing_from_a_blank_image(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """
        Zero, computed by looking at a blank image. A batch without images then runs the modules that a batch with
        images runs: where parameters are sharded, ranks whose modules differ wait for each other forever.
        """
        vision_config = self.config.vision_config
        size = (1, vision_config.num_channels, vision_config.image_size, vision_config.image_size)
        num_keep = torch.full((1,), (self.config.num_patches + 1) // 2)
        question = inputs_embeds[:1].mean(dim=1) if self.config.question_aware else None
        features, selection = self.select(torch.zeros(size, device=inputs_embeds.device), num_keep, question)
        visual, _ = self._project(features, selection, "mask")
        return 0.0 * visual.sum().to(inputs_embeds.dtype)

    def _num_keep(self, token_budget: TokenBudget | None, batch_size: int) -> torch.Tensor:
        token_budget = self.config.token_budget if token_budget is None else token_budget
        return num_tokens_to_keep(token_budget, self.config.num_patches, batch_size)

    def _column_gates(self, selection: Selection, placeholder: torch.Tensor) -> torch.Tensor:
        """The gates of the visual tokens in their columns, 1 for CLS and for text, `[batch, sequence]`."""
        gates = selection.gates
        if self.config.keep_cls:
            gates = torch.cat([torch.ones_like(gates[:, :1]), gates], dim=1)
        return torch.ones_like(placeholder, dtype=gates.dtype).masked_scatter(placeholder, gates)

    def _project(
        self, features: VisionFeatures, selection: Selection, output: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Maps features into the decoder's space: the selected ones (`"gather"`), all places with the others zero
        (`"mask"`), or all of them (`"all"`).

        Returns:
            The visual embeddings `[filled_placeholders, text_hidden_size]` in the order of their placeholders, and for
            every placeholder whether its column stays, `[num_images * num_image_tokens]`.
        """
        take = {"gather": selection.gather, "mask": selection.mask, "all": lambda patches: patches}[output]
        kept = take(features.patches)
        is_filled = selection.positions >= 0 if output == "gather" else torch.ones_like(selection.keep)
        keep = selection.keep
        if self.config.keep_cls:
            kept = torch.cat([features.cls, kept], dim=1)
            always = torch.ones_like(keep[:, :1])
            is_filled, keep = torch.cat([always, is_filled], dim=1), torch.cat([always, keep], dim=1)
        return self.multi_modal_projector(kept)[is_filled], keep.flatten()

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
        token_budget: TokenBudget | None = None,
        selection_output: str | None = None,
        **kwargs: Any,
    ) -> AdaVTPModelOutputWithPast:
        """See [`AdaVTPForConditionalGeneration.forward`]; returns hidden states in place of logits."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Exactly one of `input_ids` and `inputs_embeds` has to be given.")
        if pixel_values is not None and input_ids is None:
            raise ValueError(
                "`pixel_values` was given with `inputs_embeds`; images are placed by the placeholder tokens in "
                "`input_ids`, so pass that, or put the visual embeddings into `inputs_embeds` and leave images out."
            )
        if pixel_values is not None and past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                "`pixel_values` was given with a `past_key_values` that already holds tokens; to show an image in a "
                "later turn call `generate`, which knows which columns the cache holds."
            )
        selection = None
        if pixel_values is not None:
            prompt, selection = self.prepare_prompt(
                input_ids, pixel_values, attention_mask, position_ids, labels, token_budget, selection_output
            )
            # Without a mask, transformers would take gaps between positions for the ends of packed sequences.
            inputs_embeds, attention_mask = prompt.inputs_embeds, prompt.attention_mask
            position_ids, labels = prompt.position_ids, prompt.labels
        elif inputs_embeds is None:
            if token_budget is not None:
                self._num_keep(token_budget, len(input_ids))
            if past_key_values is None or past_key_values.get_seq_length() == 0:
                images_per_sample(input_ids, self.config.image_token_id, self.config.num_image_tokens, 0)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if _checked_output(selection_output, self.config) == "mask" and self.training:
                inputs_embeds = inputs_embeds + self._nothing_from_a_blank_image(inputs_embeds)

        if selection is None and labels is not None and attention_mask is not None:
            labels = without_first_labels(labels, attention_mask)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=_decoder_mask(attention_mask, inputs_embeds.dtype),
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        return AdaVTPModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            selection=selection,
            labels=labels,
        )


def _check_attention_takes_gates(language_model: PreTrainedModel, length: int) -> None:
    """Gates are a bias on the logits: not every attention takes one, and with one transformers forgets its window."""
    config = language_model.config
    window = getattr(config, "sliding_window", None)
    implementation = config._attn_implementation
    if implementation not in ("eager", "sdpa") or (window is not None and window < length):
        raise ValueError(
            "`gradient_gates` is 'attention', which needs a text model with 'eager' or 'sdpa' attention and no window "
            f"shorter than the prompt; here attention is {implementation!r}, its window {window} and the prompt "
            f"{length} tokens. Use gradient_gates='features', or another attention."
        )


def _checked_output(selection_output: str | None, config: AdaVTPConfig) -> str:
    selection_output = config.selection_output if selection_output is None else selection_output
    if selection_output not in ("gather", "mask"):
        raise ValueError(f"`selection_output` is {selection_output!r}; allowed are 'gather' and 'mask'.")
    return selection_output


def _check_mask(attention_mask: torch.Tensor, shape: torch.Size) -> None:
    batch, sequence = shape
    is_square = attention_mask.shape == (batch, 1, sequence, sequence) and attention_mask.dtype == torch.bool
    if attention_mask.shape != shape and not is_square:
        raise ValueError(
            f"`attention_mask` is {attention_mask.dtype} of shape {tuple(attention_mask.shape)}; allowed are "
            f"{tuple(shape)}, the shape of `input_ids`, and torch.bool of shape {(batch, 1, sequence, sequence)}."
        )


def _decoder_mask(attention_mask: Any, dtype: torch.dtype) -> Any:
    """A mask as text models take it: 4-D bool becomes additive, all else stays as it is."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 4 or attention_mask.dtype != torch.bool:
        return attention_mask
    additive = torch.zeros(attention_mask.shape, dtype=dtype, device=attention_mask.device)
    return additive.masked_fill(~attention_mask, torch.finfo(dtype).min)


class AdaVTPForConditionalGeneration(AdaVTPPreTrainedModel, AdaVTPGenerationMixin, LlavaForConditionalGeneration):
    """
    A LLaVA with a token budget: `model.generate(**inputs, token_budget=0.4)`.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: AdaVTPConfig) -> None:
        # LlavaForConditionalGeneration's own would build a LlavaModel first, a whole model for nothing.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = AdaVTPModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def set_reducer(self, name: str) -> None:
        """See [`AdaVTPModel.set_reducer`]."""
        self.model.set_reducer(name)

    @torch.no_grad()
    def select_tokens(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        token_budget: TokenBudget | None = None,
    ) -> Selection:
        """
        Chooses the visual tokens that `forward` and `generate` would keep, without running the decoder.

        Args:
            input_ids: `[batch, sequence]`.
            pixel_values: `[num_images, channels, height, width]`.
            attention_mask: `[batch, sequence]`.
            labels: `[batch, sequence]`; where given, text from the first label on is not part of the question.
            token_budget: see `forward`.

        Returns:
            `Selection` for every image.

        Raises:
            ValueError: if the budget is not allowed, or placeholders and images do not agree.
        """
        return self.model.prepare_prompt(
            input_ids, pixel_values, attention_mask, labels=labels, token_budget=token_budget
        )[1]

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
        token_budget: TokenBudget | None = None,
        selection_output: str | None = None,
        **kwargs: Any,
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
            logits_to_keep: compute logits of only the last so many positions, or of these positions.
            token_budget: a float in [0, 1] (fraction of each image's patches that are kept), an int >= 2 (their
                number), or one such value per sample; by default the configuration's.
            selection_output: `"gather"` (dropped columns leave the sequence, which gets shorter) or `"mask"` (they
                stay, hidden); by default the configuration's.

        Returns:
            `AdaVTPCausalLMOutputWithPast`; the sequence length of logits and labels is that of the kept columns.

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
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows, :])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=outputs.labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return AdaVTPCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            selection=outputs.selection,
            labels=outputs.labels,
        )


__all__ = ["AdaVTPForConditionalGeneration", "AdaVTPModel", "AdaVTPPreTrainedModel"]
