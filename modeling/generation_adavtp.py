"""`generate` with a token budget.

The prompt is pruned once, before the decoding loop: images are encoded, tokens chosen, and the loop gets the shorter
prompt as `inputs_embeds` with its mask and positions. `input_ids` stays the full prompt, so that whatever counts or
matches ids (maximum lengths, penalties, prompt lookup, streamers) works as ever, and every generation mode sees an
ordinary prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.image_utils import ImageInput
from transformers.masking_utils import create_masks_for_generate
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput

from .budget.schedule import StackBudget
from .budget.token_budget import TokenBudget, budget_values, num_tokens_to_keep
from .decoder.loop import layer_masks
from .decoder.policy import DecoderPolicy
from .decoder.pruned_cache import (
    NewColumns,
    PrunedHistory,
    leave_on,
    new_columns,
    pruned_cache,
    with_prompt,
)
from .prompt import Prompt

if TYPE_CHECKING:
    from transformers.generation.utils import GenerateOutput


@dataclass
class BudgetState:
    """
    What a budget processor may look at.

    Attributes:
        step: number of tokens generated so far; 0 before prefill.
        num_visual_tokens: visual tokens of one image before reduction, N.
        num_images: `[batch]` int64, images in each prompt.
        prompt_length: `[batch]` int64, tokens in each prompt, placeholders and no padding counted.
        pixel_values: `[sum of num_images, channels, height, width]`.
    """

    step: int
    num_visual_tokens: int
    num_images: torch.LongTensor
    prompt_length: torch.LongTensor
    pixel_values: torch.Tensor


class BudgetProcessor:
    """
    Says the budget of each sample before a generation step, as a `LogitsProcessor` says its scores. Subclass it, or
    pass any callable with the same arguments to `generate(..., budget_processor=[...])`.
    """

    def __call__(self, input_ids: torch.LongTensor, budget: torch.Tensor, state: BudgetState) -> TokenBudget:
        """
        Args:
            input_ids: `[batch, sequence]`, the prompts.
            budget: `[batch]`, float64 ratios or int64 counts: what the caller, or the processor before, asked for.
            state: step, images and sizes.

        Returns:
            The budget to use: one value, or one per sample.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define __call__(input_ids, budget, state).")


class BudgetProcessorList(list[Callable[[torch.LongTensor, torch.Tensor, BudgetState], TokenBudget]]):
    """Budget processors that are asked one after another, each given the budget of the one before."""

    def __call__(self, input_ids: torch.LongTensor, budget: TokenBudget, state: BudgetState) -> torch.Tensor:
        """
        Returns:
            `[batch]`, ratios or int64 counts.

        Raises:
            ValueError: if a processor returns something that is no budget; the message names the processor.
        """
        budget = budget_values(budget, len(input_ids))
        for processor in self:
            returned = processor(input_ids, budget, state)
            try:
                num_tokens_to_keep(returned, state.num_visual_tokens, len(input_ids))
            except ValueError as error:
                name = getattr(processor, "__name__", type(processor).__name__)
                raise ValueError(f"Budget processor {name} returned {returned!r}: {error}") from error
            budget = budget_values(returned, len(input_ids))
        return budget

    @classmethod
    def of_argument(cls, budget_processor: Sequence[Callable] | None) -> "BudgetProcessorList":
        """
        The list behind the `budget_processor` argument of `generate`.

        Raises:
            ValueError: if it is not a list or tuple of callables.
        """
        processors = [] if budget_processor is None else budget_processor
        if not isinstance(processors, list | tuple) or not all(map(callable, processors)):
            raise ValueError(
                f"`budget_processor` is {budget_processor!r}; it has to be a list of callables, "
                "`budget_processor=[processor]`."
            )
        return cls(processors)


class AdaVTPGenerationMixin(GenerationMixin):
    """Teaches `generate` to prune the prompt, and to be called with an image and a question."""

    _processor: ProcessorMixin | None = None

    @property
    def processor(self) -> ProcessorMixin:
        """
        The processor saved beside the checkpoint, loaded when it is first needed. It can be set.

        Raises:
            ValueError: if the model was not loaded from a checkpoint and no processor was set.
        """
        if self._processor is None:
            if not self.name_or_path:
                raise ValueError(
                    "`generate(image, prompt)` needs a processor and this model was not loaded from a checkpoint that "
                    "has one; set `model.processor = AdaVTPProcessor(...)` or pass `input_ids` and `pixel_values`."
                )
            from .processing_adavtp import AdaVTPProcessor

            self._processor = AdaVTPProcessor.from_pretrained(self.name_or_path, trust_remote_code=True)
        return self._processor

    @processor.setter
    def processor(self, processor: ProcessorMixin) -> None:
        self._processor = processor

    def generate(
        self,
        inputs: torch.Tensor | ImageInput | Sequence[ImageInput | Sequence[ImageInput]] | None = None,
        generation_config: GenerationConfig | str | Sequence[str] | None = None,
        *args: Any,
        prompt: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> "GenerateOutput | torch.LongTensor | str | list[str]":
        """
        Generates, in one of two forms.

        `generate(input_ids=..., pixel_values=..., token_budget=0.4, ...)` is [`GenerationMixin.generate`] with two
        arguments more. `generate(image, prompt, token_budget=0.4, ...)` takes images and questions and returns
        answers.

        Args:
            inputs: input ids as a tensor; or an image (PIL, array or path), a list with an image, or a list of
                images, for each prompt. One prompt for several images is asked of each.
            generation_config: a `GenerationConfig`; or the prompt, a string or a list of strings.
            prompt: the same by name. A prompt without the image placeholder is put into the chat template.
            token_budget (`float`, `int`, one per sample, or a dictionary for a stack): see `forward`.
            reducer (`str`, `dict` or `list`): what selects in this call; see `forward`.
            budget_processor (`list` of callables): see [`BudgetProcessor`]; asked once, before prefill.

        Returns:
            What `GenerationMixin.generate` returns, and with `return_dict_in_generate=True` also `selection`, the
            [`Selection`] of the prompts' images; in the second form a string, or a list of strings if images or
            prompts came as a list.

        Raises:
            ValueError: if arguments are not allowed or do not go together; the message says what to do instead.
        """
        if isinstance(generation_config, str | list | tuple):
            prompt, generation_config = generation_config, None
        if prompt is None:
            if inputs is not None and not isinstance(inputs, torch.Tensor):
                raise ValueError(
                    f"`inputs` is a {type(inputs).__name__} and there is no prompt; call `generate(image, prompt)` or "
                    "pass tensors."
                )
            return self._with_selection(super().generate(inputs, generation_config, *args, **kwargs))
        if kwargs.get("return_dict_in_generate"):
            raise ValueError(
                "`return_dict_in_generate` is True, but `generate(image, prompt)` returns text; for scores and caches "
                "pass `**model.processor(images=..., text=...)`."
            )
        model_inputs = self.processor.of_questions(inputs, prompt).to(self.device)
        generated = super().generate(None, generation_config, *args, **model_inputs, **kwargs)
        answers = self.processor.batch_decode(
            generated[:, model_inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answers = [answer.strip() for answer in answers]
        is_single = isinstance(prompt, str) and not isinstance(inputs, list | tuple) and len(answers) == 1
        return answers[0] if is_single else answers

    @staticmethod
    def _with_selection(outputs: "GenerateOutput | torch.LongTensor") -> "GenerateOutput | torch.LongTensor":
        if isinstance(outputs, ModelOutput):
            history = pruned_cache(outputs.past_key_values).prompt
            outputs["selection"] = None if history is None else history.selection
        return outputs

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # `None` asks for the default; left there, it would take the place of the one in the generation config.
        kwargs = {key: value for key, value in kwargs.items() if key != "token_budget" or value is not None}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        # `GenerationConfig` takes any name and keeps its value, so a default in generation_config.json is there. Only
        # for images: pipelines call this as well, without inputs, and would hand a budget to the processor.
        default = getattr(generation_config, "token_budget", None)
        if default is not None and model_kwargs.get("pixel_values") is not None:
            model_kwargs.setdefault("token_budget", default)
        return generation_config, model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """
        Prunes the prompt, then expands it. Of the steps that every supported version of transformers takes before the
        decoding loop, this is the one that sees ids, mask and positions together while there is one row per prompt.
        """
        model_kwargs, history, policy = self._prune_prompt(input_ids, model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if history is not None:
            model_kwargs["pruned_history"] = history.expand(expand_size)
            model_kwargs["decoder_policy"] = None if policy is None else policy.expand(expand_size)
        return input_ids, model_kwargs

    def _prune_prompt(
        self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], PrunedHistory | None, DecoderPolicy | None]:
        """Replaces images, budget, mask and positions in `model_kwargs` by the embeddings of the pruned prompt."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        token_budget = model_kwargs.pop("token_budget", None)
        reducer = model_kwargs.pop("reducer", None)
        self.model.budget_of(token_budget, self.model.steps(reducer), len(input_ids))
        processors = BudgetProcessorList.of_argument(model_kwargs.pop("budget_processor", None))
        _require_gather(model_kwargs.pop("selection_output", None))
        cache = model_kwargs.get("past_key_values")
        # A static cache counts in a tensor, which would be unreadable in error messages.
        past_length = 0 if cache is None else int(cache.get_seq_length())
        history = pruned_cache(cache).prompt if past_length else None
        if pixel_values is None and history is None:
            return model_kwargs, None, None
        if model_kwargs.get("inputs_embeds") is not None:
            raise ValueError(
                "`inputs_embeds` was given with images, in this turn or an earlier one; images are placed by the "
                "placeholder tokens in `input_ids`, so pass that."
            )
        new = new_columns(input_ids, model_kwargs, past_length, history)
        if history is not None and self.config.visual_position_ids == "compact":
            new.position_ids = new.position_ids - history.num_dropped[:, None]
        policy, selection = None, None
        if pixel_values is None:
            embeds = self.get_input_embeddings()(new.input_ids)
            prompt = Prompt(embeds, new.attention_mask, new.position_ids)
        else:
            if processors:
                token_budget = processors(
                    new.input_ids, self._one_budget(token_budget), self._budget_state(new, pixel_values)
                )
            prompt, selection, policy = self.model.prepare_prompt(
                new.input_ids,
                pixel_values.to(self.device),
                new.attention_mask,
                new.position_ids,
                token_budget=token_budget,
                reducer=reducer,
                # The mask form is for training; in a cache its hidden columns would cost what they cost unpruned.
                selection_output="gather",
            )
        model_kwargs, history = with_prompt(model_kwargs, prompt, new)
        history.selection = selection
        return model_kwargs, history, policy

    def _one_budget(self, token_budget: StackBudget | None) -> TokenBudget:
        """What budget processors start from."""
        if isinstance(token_budget, Mapping):
            raise ValueError(
                f"`token_budget` is {token_budget!r} and `budget_processor` was given; a processor is asked about one "
                "budget, so pass one for the whole stack."
            )
        return self.config.token_budget if token_budget is None else token_budget

    def _budget_state(self, new: NewColumns, pixel_values: torch.Tensor) -> BudgetState:
        return BudgetState(
            step=0,
            num_visual_tokens=self.config.num_patches,
            num_images=(new.input_ids == self.config.image_token_id).sum(dim=-1) // self.config.num_image_tokens,
            prompt_length=new.attention_mask.sum(dim=-1),
            pixel_values=pixel_values,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        history = model_kwargs.pop("pruned_history", None)
        policy = model_kwargs.pop("decoder_policy", None)
        if history is not None:
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(
                    f"`prefill_chunk_size` is {generation_config.prefill_chunk_size}; a prompt with images is "
                    "prefilled whole. Leave it out, and lower `token_budget` to shorten the prompt."
                )
            # transformers does the same for any `inputs_embeds`: without a cache it would feed them at every step.
            generation_config.use_cache = True
            max_cache_length -= history.num_columns - history.mask.shape[1]
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            leave_on(cache, history, policy)

    @staticmethod
    def create_masks_for_generate(
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Any:
        """
        See [`transformers.masking_utils.create_masks_for_generate`], which makes the decoder's mask ahead of a forward
        that may be compiled. Where layers hold different columns there is no one mask, and the loop makes each.
        """
        if pruned_cache(past_key_values).policy is not None:
            return attention_mask
        masks = layer_masks(config.get_text_config(), inputs_embeds, attention_mask, past_key_values)
        if masks is not None:
            return masks
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        # Processors match `input_ids`, so the mask that they get has to be that of the full prompt.
        model_kwargs = kwargs.get("model_kwargs") or {}
        history = pruned_cache(model_kwargs.get("past_key_values")).prompt
        if history is not None:
            kwargs["model_kwargs"] = model_kwargs | {"attention_mask": history.full_mask}
        return super()._get_logits_processor(*args, **kwargs)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        # An assistant model reads the ids; the pruned prompt is not its own.
        of_the_prompt = ("inputs_embeds", "attention_mask", "position_ids")
        model_kwargs = kwargs["model_kwargs"]
        if model_kwargs.get("inputs_embeds") is not None:
            _require_text_assistant(kwargs["generation_config"], kwargs.get("assistant_model"))
            kwargs["model_kwargs"] = {key: model_kwargs[key] for key in model_kwargs if key not in of_the_prompt}
        return super()._get_candidate_generator(*args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        budget_processor: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        See [`GenerationMixin.prepare_inputs_for_generation`]. At the first step of assisted decoding the candidate
        tokens are only in `input_ids`; their embeddings join the pruned prompt's.
        """
        history = pruned_cache(past_key_values).prompt
        if history is not None and attention_mask is not None:
            # Assisted decoding stretches or cuts the mask to the length of `input_ids`, which is not the cache's.
            attention_mask = history.mask_of(kwargs["position_ids"].shape[-1])
        if inputs_embeds is not None and is_first_iteration:
            position_ids = kwargs.get("position_ids")
            num_candidates = 0 if position_ids is None else position_ids.shape[-1] - inputs_embeds.shape[1]
            if num_candidates > 0:
                candidates = self.get_input_embeddings()(input_ids[:, -num_candidates:])
                inputs_embeds = torch.cat([inputs_embeds, candidates], dim=1)
            past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
            if next_sequence_length is None and past_length:
                next_sequence_length = inputs_embeds.shape[1] - past_length
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


def _require_gather(selection_output: str | None) -> None:
    if selection_output not in (None, "gather"):
        raise ValueError(
            f"`selection_output` is {selection_output!r}; `generate` always drops tokens from the sequence, which is "
            "'gather'. Leave it out, and use 'mask' in `forward`, for training."
        )


def _require_text_assistant(generation_config: GenerationConfig, assistant_model: Any) -> None:
    """An assistant gets ids and no images, so one that has to see them cannot help."""
    if generation_config.assistant_early_exit is not None:
        raise ValueError(
            f"`assistant_early_exit` is {generation_config.assistant_early_exit}, which makes the model its own "
            "assistant, without the prompt's images. Use `prompt_lookup_num_tokens`, or a text-only `assistant_model`."
        )
    if "image" in getattr(assistant_model, "input_modalities", ()):
        raise ValueError(
            f"`assistant_model` is a {type(assistant_model).__name__}, and an assistant does not get the prompt's "
            "images. Use a text-only one, or `prompt_lookup_num_tokens`."
        )
