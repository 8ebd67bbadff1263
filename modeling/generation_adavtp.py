"""`generate` with a token budget.

The prompt is pruned once, before the decoding loop: images are encoded, tokens chosen, and placeholders of dropped
tokens leave the prompt that the model reads. `input_ids` of the loop stays the caller's, so that whatever counts or
matches ids (maximum lengths, penalties, prompt lookup, streamers, stopping criteria) works as ever, and the model sees
an ordinary prompt with fewer placeholders and as many features.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature, Cache, GenerationConfig, GenerationMixin, PreTrainedConfig
from transformers.image_utils import ImageInput
from transformers.masking_utils import create_masks_for_generate
from transformers.processing_utils import ProcessorMixin
from transformers.utils import ModelOutput

from .budget.schedule import StackBudget
from .budget.selection import Selection
from .budget.token_budget import TokenBudget, budget_values, num_tokens_to_keep
from .decoder.dials import DecoderDials
from .decoder.execution_plan import ExecutionPlan
from .decoder.loop import layer_masks
from .decoder.policy import NothingLeaves
from .decoder.pruned_cache import (
    NewColumns,
    PrunedCache,
    PrunedPrompt,
    has_layer_columns,
    new_columns,
    pruned_cache,
    require_no_gaps,
)
from .evaluation_mode import evaluating
from .families.base import Units
from .families.encoded import KINDS
from .processing_adavtp import AdaVTPProcessor, inputs_of_questions
from .prompt import PreparedInputs, Prompt, check_columns
from .reducers.bank import ImpossibleReducerError, MissingWeightsError, ReducerSpec
from .vision.shown_image import shares_of_units, shown_images

if TYPE_CHECKING:
    from transformers.generation.utils import GenerateOutput
    from transformers.image_utils import PIL

    from .prompt_reduction import PromptReductionMixin


@dataclass
class BudgetState:
    """
    What a budget processor may look at.

    Attributes:
        step: number of tokens generated so far; 0 before prefill.
        num_visual_tokens: visual tokens of the largest unit (image, tile, frame or video) before reduction, N.
        num_images: `[batch]` int64, units in each prompt; of LLaVA, images.
        prompt_length: `[batch]` int64, tokens in each prompt, placeholders and no padding counted.
        pixel_values: of the images, as the family's processor returns them: of LLaVA `[sum of num_images, channels,
            height, width]`. `None` where the prompts show nothing but videos.
    """

    step: int
    num_visual_tokens: int
    num_images: torch.LongTensor
    prompt_length: torch.LongTensor
    pixel_values: torch.Tensor | None


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
    """
    Teaches `generate` to prune the prompt, and to be called with an image and a question.

    Attributes:
        processor_class: whose `from_pretrained` loads the processor that belongs to the model.
        trusts_remote_code: whether code beside the checkpoint may run.
    """

    processor_class: type = AdaVTPProcessor
    _processor: ProcessorMixin | None = None
    trusts_remote_code = False

    @property
    def prompt_reader(self) -> "PromptReductionMixin":
        """The module that drops visual tokens from prompts."""
        return self.model

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
            self._processor = self.processor_class.from_pretrained(
                self.name_or_path, trust_remote_code=self.trusts_remote_code
            )
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
            plan ([`ExecutionPlan`]): which units of the decoder run, in prefill and in every step; see
                [`whole_plan`]. Steps under a plan are not compiled.
            depth_budget, width_budget (`float`, `int`, or one per sample), scheduler (`str`): how many units of the
                decoder run, and what chooses them; see `forward`.
            compute_budget (`float`, or one per sample), allocation (`str` or `dict`): one budget for all dials, and
                how they share it; see `forward`.
            budget_processor (`list` of callables): see [`BudgetProcessor`]; asked once, before prefill.

        Returns:
            What `GenerationMixin.generate` returns, and with `return_dict_in_generate=True` also `selection`, the
            [`Selection`] of the prompts' images, and `plan`, the [`ExecutionPlan`] of what ran, `None` if everything
            did; in the second form a string, or a list of strings if images or
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
            input_ids = kwargs.get("input_ids", inputs)
            if input_ids is not None:
                check_columns(input_ids)
            # Whoever prunes the prompt leaves it here.
            pruned: list[PrunedPrompt] = []
            if not self._has_other_preparation(input_ids):
                kwargs["pruned_prompt"] = pruned
            outputs = super().generate(inputs, generation_config, *args, **kwargs)
            if isinstance(outputs, ModelOutput):
                outputs["selection"] = pruned[0].selection if pruned else None
                planned = pruned_cache(outputs.get("past_key_values")).planned
                outputs["plan"] = None if planned is None else planned.plan
            return outputs
        if kwargs.get("return_dict_in_generate"):
            raise ValueError(
                "`return_dict_in_generate` is True, but `generate(image, prompt)` returns text; for scores and caches "
                "pass `**model.processor(images=..., text=...)`."
            )
        model_inputs = self.inputs_of_questions(inputs, prompt).to(self._input_device)
        generated = super().generate(None, generation_config, *args, **model_inputs, **kwargs)
        answers = self.processor.batch_decode(
            generated[:, model_inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        answers = [answer.strip() for answer in answers]
        is_single = isinstance(prompt, str) and not isinstance(inputs, list | tuple) and len(answers) == 1
        return answers[0] if is_single else answers

    def whole_plan(self, batch_size: int = 1, num_mlp_groups: int | None = None) -> ExecutionPlan:
        """
        The plan by which everything in the decoder runs, to take out of it what shall not:
        `plan.layers[:, 5] = False`. See [`ExecutionPlan`].

        Args:
            batch_size: number of prompts; 1 for a plan that is every prompt's.
            num_mlp_groups: in how many groups the channels of an MLP are; by default as many as there are heads, or
                the next fewer that can be.
        """
        return ExecutionPlan.whole(self.config, batch_size, num_mlp_groups)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """
        See `GenerationMixin.generate_batch`: continuous batching, which takes ids and no images.

        Raises:
            ValueError: if a prompt has image placeholders.
        """
        for number, ids in enumerate(inputs):
            if bool(self.family.placeholders(self.config, torch.tensor(ids)[None]).any()):
                raise ValueError(
                    f"`inputs[{number}]` has image placeholders, and continuous batching (`generate_batch`, "
                    "cache_implementation='paged') takes no images. Use `generate` with another cache."
                )
        return super().generate_batch(inputs, *args, **kwargs)

    def unreachable(
        self,
        input_ids: torch.LongTensor,
        token_budget: StackBudget | None = None,
        reducer: ReducerSpec | None = None,
        **inputs: Any,
    ) -> str | None:
        """
        Why these inputs cannot be answered at a budget, or `None` if they can: the family cannot have a reducer, the
        checkpoint has no weights for one that has to be trained, or it cannot go as low.

        Args:
            input_ids, inputs: see `select_tokens`.
            token_budget, reducer: see `forward`; other budgets of it are among `inputs`.

        Raises:
            ValueError: if there is no such reducer, or the budget is none.
        """
        reader, dials = self.prompt_reader, DecoderDials.taken_from(inputs)
        try:
            columns = (input_ids, inputs.get("attention_mask"), reader.images_in(dict(inputs)))
            token_budget = reader.split_compute(token_budget, dials, reducer, *columns)[0]
        except ValueError as error:
            return str(error)
        try:
            self.prompt_reader.resolve_budget(token_budget, reducer, len(input_ids))
        except (MissingWeightsError, ImpossibleReducerError) as error:
            return str(error)
        try:
            self.select_tokens(input_ids, token_budget=token_budget, reducer=reducer, **inputs)
        except ValueError as error:
            return str(error)
        return None

    def _has_other_preparation(self, input_ids: torch.Tensor | None) -> bool:
        """
        Whether somebody put a `prepare_inputs_for_generation` before ours, as PEFT's prompt learning does.

        Raises:
            ValueError: if so, and the prompt shows images.
        """
        if getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", self) is self:
            return False
        if input_ids is not None and bool(self.family.placeholders(self.config, input_ids).any()):
            raise ValueError(
                "`input_ids` has image placeholders, and PEFT's prompt learning (prompt tuning, prefix tuning, "
                "P-tuning) puts tokens of its own before a prompt that this model shortens. Use LoRA or IA3."
            )
        return True

    def inputs_of_questions(self, images: Any, prompts: str | Sequence[str | list[dict[str, Any]]]) -> BatchFeature:
        """Inputs for `generate`, by the model's own processor; see [`processing_adavtp.inputs_of_questions`]."""
        return inputs_of_questions(self.processor, images, prompts)

    def picture_of_kept(
        self,
        image: ImageInput,
        prompt: str | list[dict[str, Any]],
        selection: Selection,
        least_height: int = 1,
        most_height: int | None = None,
    ) -> "PIL.Image.Image":
        """
        An image with what was not kept of it dark: the brighter, the more decoder layers see it. Tiles lie in their
        places, a view of the whole beside them.

        Args:
            image: of a prompt that shows one.
            prompt: that shows it, see [`inputs_of_questions`].
            selection: what was kept, as `select_tokens` and `generate` hand it back.
            least_height, most_height: in pixels, see [`ShownImage.drawn`].

        Raises:
            ValueError: if `selection` is of another prompt.
        """
        (shown,) = shown_images(self, self.processor, [image], prompt)
        shares = shares_of_units(selection, self.config.get_text_config().num_hidden_layers)
        return shown.drawn(shares, least_height, most_height)

    @property
    def _input_device(self) -> torch.device | int | str:
        """Where inputs go: to the weights, or where these are offloaded, to where they are when they are used."""
        if self.device.type != "meta":
            return self.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return next((device for device in devices if device is not None), "cpu")

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, *args: Any, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # `None` asks for the default; left there, it would take the place of the one in the generation config.
        kwargs = {key: value for key, value in kwargs.items() if key != "token_budget" or value is not None}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, *args, **kwargs)
        # `GenerationConfig` takes any name and keeps its value, so a default in generation_config.json is there. Only
        # for images: pipelines call this as well, without inputs, and would hand a budget to the processor.
        default = getattr(generation_config, "token_budget", None)
        if default is not None and any(model_kwargs.get(pixels) is not None for pixels in KINDS.values()):
            model_kwargs.setdefault("token_budget", default)
        return generation_config, model_kwargs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        # PEFT puts a `prepare_inputs_for_generation` of its own in the place of ours, whose names are not in it.
        own = ("pruned_prompt", "budget_processor")
        super()._validate_model_kwargs({name: value for name, value in model_kwargs.items() if name not in own})

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
        call = model_kwargs.pop("pruned_prompt", None)
        # In training a choice is drawn, and hides what it drops; here it is made, and what it drops leaves.
        with evaluating(self.prompt_reader):
            model_kwargs, pruned = self._prune_prompt(input_ids, model_kwargs)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if pruned.prompt is not None:
            if call is not None:
                call.append(pruned.prompt)
            model_kwargs["pruned_prompt"] = pruned.prompt.expand(expand_size)
        if pruned.policy is not None:
            model_kwargs["decoder_policy"] = pruned.policy.expand(expand_size)
        return input_ids, model_kwargs

    def _prune_prompt(
        self, input_ids: torch.LongTensor, model_kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], PrunedCache]:
        """Takes images and budget out of `model_kwargs`; what the model reads in place of the caller's prompt."""
        reader = self.prompt_reader
        images = reader.images_in(model_kwargs)
        token_budget, reducer, processors, selection_output = (
            model_kwargs.pop(name, None)
            for name in ("token_budget", "reducer", "budget_processor", "selection_output")
        )
        dials = DecoderDials.taken_from(model_kwargs)
        reader.refuse_other_features(model_kwargs)
        processors = BudgetProcessorList.of_argument(processors)
        _require_gather(selection_output)
        cache = model_kwargs.get("past_key_values")
        # A static cache counts in a tensor, which would be unreadable in error messages.
        past_length = 0 if cache is None else int(cache.get_seq_length())
        earlier = pruned_cache(cache).prompt if past_length else None
        is_text = images is None and earlier is None
        embeds, encoded = model_kwargs.get("inputs_embeds"), model_kwargs.get("mm_encoder_outputs")
        if images is not None:
            reader.check_images_are_new(encoded)
        ids = input_ids if embeds is None else reader.ids_of_embeds(embeds)
        columns = (ids, model_kwargs.get("attention_mask"), images, cache)
        token_budget, dials = reader.split_compute(token_budget, dials, reducer, *columns)
        schedule = reader.resolve_budget(token_budget, reducer, len(input_ids))
        if encoded is not None:
            reader.refuse_budget_of_encoded(token_budget, reducer)
            # Expanding for beams, transformers would change the caller's.
            model_kwargs["mm_encoder_outputs"] = {name: copy(output) for name, output in encoded.items()}
        if is_text and past_length == 0 and input_ids.shape[1] > 0 and embeds is None and not encoded:
            # A placeholder without an image is refused.
            reader.refuse_placeholders(input_ids)
        if is_text and (past_length or not _ends_in_padding(model_kwargs.get("attention_mask"))):
            given = input_ids if embeds is None else embeds
            policy = reader.under_dials(None, dials, given, model_kwargs.get("attention_mask"), None, cache)
            return model_kwargs, PrunedCache(policy=policy)
        if embeds is not None and past_length:
            raise ValueError(
                "`inputs_embeds` was given with a `past_key_values` that holds an image, or with an image for a later "
                "turn; which columns of the conversation are new is told by `input_ids`, so pass that."
            )
        new = new_columns(ids, model_kwargs, past_length, earlier)
        new = reader.with_own_positions(new, images, model_kwargs) if past_length else new
        require_no_gaps(self.config, new)
        token_types = reader.token_types_of(model_kwargs, new.input_ids.shape[1])
        prompt = Prompt(
            new.input_ids, new.attention_mask, new.position_ids, token_types=token_types, inputs_embeds=embeds
        )
        prepared = PreparedInputs(reader.padded_on_the_left(prompt))
        if images is not None:
            looked = reader.looked_at(prepared.prompt.input_ids, images, schedule)
            if processors:
                state = _budget_state(new, images, looked[1])
                token_budget = processors(new.input_ids, self._one_budget(token_budget), state)
                schedule = reader.resolve_budget(token_budget, reducer, len(input_ids))
            # The mask form is for training; in a cache its hidden columns would cost what they cost unpruned.
            prepared = reader.prepare_inputs(prepared.prompt, images, schedule, "gather", looked)
        if embeds is not None:
            model_kwargs["inputs_embeds"] = prepared.prompt.inputs_embeds
        pruned = reader.pruned_prompt(new, prepared, input_ids.shape[1])
        prompt = prepared.prompt
        policy = reader.under_dials(
            prepared.policy, dials, prompt.input_ids, prompt.attention_mask, None, cache, prepared
        )
        return model_kwargs, PrunedCache(pruned, policy=policy)

    def _one_budget(self, token_budget: StackBudget | None) -> TokenBudget:
        """What budget processors start from."""
        if isinstance(token_budget, Mapping):
            raise ValueError(
                f"`token_budget` is {token_budget!r} and `budget_processor` was given; a processor is asked about one "
                "budget, so pass one for the whole stack."
            )
        return self.config.token_budget if token_budget is None else token_budget

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        prompt, policy = model_kwargs.get("pruned_prompt"), model_kwargs.pop("decoder_policy", None)
        if prompt is not None:
            if generation_config.prefill_chunk_size is not None:
                raise ValueError(
                    f"`prefill_chunk_size` is {generation_config.prefill_chunk_size}; a prompt with images is "
                    "prefilled whole. Leave it out, and lower `token_budget` to shorten the prompt."
                )
            max_cache_length -= prompt.num_columns - prompt.mask.shape[1]
        # What leaves inside the decoder, and what runs there, is remembered on the cache.
        generation_config.use_cache = generation_config.use_cache or policy is not None
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if cache is not None:
            # Also where there is none: a cache may be reset and used again, and must not keep an old prompt.
            pruned_cache(cache).prompt = None if prompt is None else prompt.on_cache()
            # Also forgets what layers held where the cache was reset.
            if has_layer_columns(cache) and policy is None and prompt is not None and prompt.visual is not None:
                policy = NothingLeaves()
            pruned_cache(cache).policy = policy
            if pruned_cache(cache).planned is not None or (policy is not None and policy.leaves_out_units):
                # What runs is made for this request, and would be compiled anew for each.
                generation_config.disable_compile = True

    def create_masks_for_generate(
        self,
        config: PreTrainedConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Any:
        """
        See [`transformers.masking_utils.create_masks_for_generate`], which makes the decoder's mask ahead of a forward
        that may be compiled. Where layers hold different columns each has its own; in prefill the loop makes them.
        Elsewhere a family's own stands.
        """
        if pruned_cache(past_key_values).policy is not None:
            return attention_mask
        masks = layer_masks(config.get_text_config(), inputs_embeds, attention_mask, past_key_values)
        if masks is not None:
            return masks
        of_family = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
        return of_family(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Images are encoded where the prompt is pruned, since what is kept may depend on both."""
        return model_kwargs

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        # An assistant model reads the caller's ids; the pruned prompt is not its own.
        model_kwargs, assistant = dict(kwargs["model_kwargs"]), kwargs.get("assistant_model")
        if model_kwargs.pop("pruned_prompt", None) is not None:
            _require_text_assistant(kwargs["generation_config"], assistant)
        if assistant is not None:
            # Positions and token types are a family's own.
            known = set(inspect.signature(assistant.forward).parameters) - {"position_ids"}
            model_kwargs = {name: value for name, value in model_kwargs.items() if name in known}
        return super()._get_candidate_generator(*args, **kwargs | {"model_kwargs": model_kwargs})

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        pruned_prompt: PrunedPrompt | list[PrunedPrompt] | None = None,
        budget_processor: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """
        See [`GenerationMixin.prepare_inputs_for_generation`]. The loop counts in the caller's ids; the model reads the
        pruned prompt and what was generated (or is a candidate in assisted decoding) behind it.
        """
        pruned = pruned_prompt
        if pruned is not None:
            answer = input_ids[:, pruned.num_ids :]
            position_ids = pruned.positions_with(answer.shape[1])
            if is_first_iteration or past_key_values is None:
                input_ids, next_sequence_length = torch.cat([pruned.input_ids, answer], dim=1), None
                if inputs_embeds is not None:
                    inputs_embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(answer)], dim=1)
                position_ids = torch.cat([pruned.position_ids, position_ids], dim=-1)
                kinds = self.family.kinds(self.config, answer)
                embed, as_tensor = self.get_input_embeddings(), self.family.takes_tensor
                encoded = pruned.encoder_outputs(answer, kinds, embed, as_tensor)
                kwargs |= {} if encoded is None else {"mm_encoder_outputs": encoded}
                for name, columns in pruned.token_types.items():
                    # Gemma 3 reads them by the place in the whole sequence.
                    columns = torch.nn.functional.pad(columns, (pruned.mask.shape[1] - columns.shape[1], 0))
                    behind = torch.full_like(answer, self.family.token_type_of_answers, dtype=columns.dtype)
                    kwargs[name] = torch.cat([columns, behind], dim=1)
            else:
                input_ids = answer
            attention_mask = pruned.mask_with(answer.shape[1], needs_mask=past_key_values is None)
            kwargs["position_ids"] = position_ids
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )


def _ends_in_padding(attention_mask: torch.Tensor | None) -> bool:
    return attention_mask is not None and attention_mask.dim() == 2 and not bool(attention_mask[:, -1].all())


def _budget_state(new: NewColumns, images: Any, units: Units) -> BudgetState:
    return BudgetState(
        step=0,
        num_visual_tokens=int(units.sizes.max()),
        num_images=torch.bincount(units.sample, minlength=len(new.input_ids)).to(new.input_ids.device),
        prompt_length=new.attention_mask.sum(dim=-1),
        pixel_values=images if isinstance(images, torch.Tensor) else images.get(KINDS["image"]),
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
