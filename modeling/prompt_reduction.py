"""The one place where a budget acts on a prompt: images are encoded and the positions of the full prompt are known.

What leaves, leaves everything that has a column for each token, and the encoder's output; from there on the family's
own class reads an ordinary prompt with fewer placeholders and as many features.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput, logging

from ..configuration.configuration_adavtp import AdaVTPConfig
from .budget.schedule import BudgetSchedule, StackBudget
from .budget.selection import Selection
from .decoder.compute_scheduler import ComputeScheduler
from .decoder.compute_token import without_token
from .decoder.dials import DecoderDials, ReadPrompt, dials_of_compute, turns_by_itself, under_dials
from .decoder.loop import RUNNABLE, DecoderOutput, run_decoder
from .decoder.policy import DecoderPolicy, VisualTokenPolicy
from .decoder.pruned_cache import NewColumns, PrunedPrompt, pruned_cache
from .decoder.reducer import KeepsAllReducer
from .families.base import Family, Units, has_recurrent_layers
from .families.encoded import KINDS
from .families.llava import LLAVA
from .prompt import PreparedInputs, Prompt, is_before_answer, left_padded, without_first_labels
from .reducers.adaptive import VisionTokenController
from .reducers.bank import ReducerBank, ReducerSpec, Step, named
from .vision.budget_token import BudgetToken
from .vision.features import Question
from .vision.visual_model import VisualModel, VisualTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)


class PromptReductionMixin:
    """Teaches a family's model, in front of which it stands, to read fewer visual tokens than a prompt shows."""

    config: AdaVTPConfig
    family: Family = LLAVA
    # Whether parameters are spread over processes (FSDP, ZeRO-3). To be set by whoever spreads them.
    is_sharded: bool = False

    def add_budget_modules(self) -> None:
        """Gives the model what it has beyond its family's class: budget token, controller, scheduler and reducers."""
        self.budget_token = BudgetToken(self.config)
        self.controller = VisionTokenController(self.config)
        self.scheduler = None if self.config.scheduler is None else ComputeScheduler(self.config)
        self.reducers = nn.ModuleDict()
        self._reducers_of_calls: dict[tuple[Any, ...], nn.Module] = {}
        self.bank.add(self.config.reducers)
        in_use = {named(entry)[0] for entry in self.config.reducers}
        for entry in self.config.trained_reducers:
            if named(entry)[0] not in in_use:
                self.bank.add([entry])

    @property
    def bank(self) -> ReducerBank:
        """The reducers that this model has."""
        why_not = partial(self.family.why_not, self.config)
        return ReducerBank(self.config, self.controller, self.reducers, self._reducers_of_calls, why_not)

    def set_reducer(self, reducer: ReducerSpec, **parameters: Any) -> None:
        """See [`ReducerBank.set_reducer`]."""
        self.bank.set_reducer(reducer, **parameters)

    def steps(self, reducer: ReducerSpec | None = None) -> list[Step]:
        """See [`ReducerBank.steps`]; a `ValueError` if one of them cannot act on this family, with the reason."""
        return self.bank.steps(reducer)

    def why_not(self, reducer: ReducerSpec | None = None) -> str | None:
        """
        Why a reducer, or a stack (`None` is the configuration's), cannot act on this model, in the words of the error
        that a call would raise; `None` if it can. One that has weights to learn can, once it has them.
        """
        try:
            with torch.random.fork_rng(devices=[]):
                self.bank.steps(reducer, with_new_weights=True)
        except ValueError as error:
            return str(error)
        return None

    @property
    def prompt_decoder(self) -> "PreTrainedModel":
        """The text model."""
        return self.language_model

    @property
    def visual_model(self) -> VisualModel:
        """The visual half of the model."""
        return VisualModel(
            self.vision_tower, self.multi_modal_projector, self.budget_token, self.config, self.runs_everything
        )

    @property
    def runs_everything(self) -> bool:
        """
        Whether a batch runs the same modules whatever its budgets, and whether it has images: in training, and where
        parameters are spread over processes, which would wait for each other.
        """
        return self.training or self.is_sharded

    def images_in(self, arguments: dict[str, Any]) -> torch.Tensor | None:
        """The images among the arguments of a call, which are taken out of them; `None` if there are none."""
        pixel_values = arguments.pop("pixel_values", None)
        return None if pixel_values is None or len(pixel_values) == 0 else pixel_values

    def looked_at(
        self, input_ids: torch.Tensor, images: torch.Tensor, schedule: BudgetSchedule
    ) -> tuple[VisualModel, Units]:
        """What makes visual tokens of these images, and the units that they make of this batch of prompts."""
        return self.visual_model, self.units_of(input_ids, len(images))

    def refuse_placeholders(self, input_ids: torch.Tensor) -> None:
        """
        Raises:
            ValueError: if a prompt without images has placeholders.
        """
        self.units_of(input_ids, 0)

    def token_types_of(self, arguments: Mapping[str, Any], num_columns: int) -> dict[str, torch.Tensor]:
        """What the family has for every one of the last columns of a prompt, by argument."""
        return {}

    def with_own_positions(self, new: NewColumns, images: Any, arguments: Mapping[str, Any]) -> NewColumns:
        """Columns behind a cache with the positions that their own images give them."""
        return new

    def units_of(self, input_ids: torch.Tensor, num_images: int) -> Units:
        """
        The units that a batch of prompts shows.

        Args:
            input_ids: `[batch, sequence]`.
            num_images: images that go with them, in the order of their placeholders.

        Raises:
            ValueError: if placeholders and images do not agree.
        """
        return self.family.units(self.config, self.family.placeholders(self.config, input_ids), num_images)

    def ids_of_embeds(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Ids `[batch, sequence]` that tell which columns of `[batch, sequence, hidden_size]` are placeholders."""
        placeholder = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        is_placeholder = (inputs_embeds == self.get_input_embeddings()(placeholder)).all(dim=-1)
        return torch.where(is_placeholder, self.config.image_token_id, self._pad_token_id)

    def resolve_budget(
        self, token_budget: StackBudget | None, reducer: ReducerSpec | None, batch_size: int
    ) -> BudgetSchedule:
        """
        Reads a caller's budget.

        Args:
            token_budget, reducer: see [`AdaVTPForConditionalGeneration.forward`].
            batch_size: number of prompts.

        Raises:
            ValueError: if the budget or the reducer is not allowed.
        """
        steps = self.steps(reducer)
        has_own_rule = len({step.name for step in steps}) == 1 and (steps[0].divides or steps[0].reducer).has_own_rule
        if token_budget is None and not has_own_rule:
            token_budget = self.config.token_budget
        num_layers = self.config.text_config.num_hidden_layers
        return BudgetSchedule(token_budget, steps, batch_size, num_layers, self.config.unit_weights)

    def prepare_inputs(
        self,
        prompt: Prompt,
        images: Any,
        schedule: BudgetSchedule,
        selection_output: str | None = None,
        looked: tuple[VisualModel, Units] | None = None,
    ) -> PreparedInputs:
        """
        Encodes the images, chooses, and drops the columns of what was not chosen.

        Args:
            prompt: with one placeholder for each visual token and separator of each image. Its embeddings, if it has
                any, come back with the images in them.
            images: in the order of their placeholders, what [`images_in`] took from the arguments of a call.
            schedule: the stack and its budget.
            selection_output: `"gather"` or `"mask"`; by default the configuration's.
            looked: what [`looked_at`] said of this prompt, these images and this stack, where it was asked before.

        Raises:
            ValueError: if placeholders and images do not agree, or a reducer cannot do what it is asked to.
        """
        selection_output = self.checked_output(selection_output)
        placeholders = self.family.placeholders(self.config, prompt.input_ids)
        visual, units = looked or self.looked_at(prompt.input_ids, images, schedule)
        question = self._questions(schedule.steps, prompt, placeholders, units)
        tokens = visual.encode_and_reduce(images, units, schedule, question)
        selection = tokens.selection
        gates_attention = selection.gates is not None and self.config.gradient_gates == "attention"
        # Hidden columns would leave in the decoder, and with them the labels that stand at them.
        acts_in_decoder = tokens.decoder is not None or self.config.visual_attention == "rescaled"
        is_hidden = selection_output == "mask" and not acts_in_decoder and not gates_attention
        embeddings, stays = visual.embeddings(tokens, units, in_place=is_hidden)
        keep = torch.ones_like(placeholders).masked_scatter(placeholders, stays)
        visual_index = torch.full_like(prompt.input_ids, -1).masked_scatter(placeholders, units.token)
        position_ids, labels = prompt.position_ids, prompt.labels
        if self.config.visual_position_ids == "compact":
            if position_ids.dim() > 2:
                raise ValueError(
                    "`visual_position_ids` is 'compact', and this family's positions have axes of rows and columns, "
                    "where no gap can be closed; use 'original'."
                )
            seen = keep if not gates_attention else self._at_columns(selection.keep, placeholders, units, True)
            position_ids = (position_ids - (~seen).long().cumsum(dim=-1)).clamp(min=0)
        if labels is not None:
            labels = without_first_labels(labels, prompt.attention_mask)
        prompt = replace(prompt, position_ids=position_ids, labels=labels, visual_index=visual_index)
        if gates_attention:
            _check_attention_takes_gates(self.prompt_decoder, prompt.input_ids.shape[1])
            gates = self._at_columns(selection.gates, placeholders, units, 1.0)
            if not bool(keep.all()):
                gates, prompt = gates.gather(1, left_padded(keep)), prompt.without(keep, self._pad_token_id)
            prompt = prompt.gating(gates, self.prompt_decoder.dtype)
        elif not bool(keep.all()):
            if is_hidden:
                _check_decoder_takes_hidden_columns(self.prompt_decoder, prompt.input_ids.shape[1])
                prompt = prompt.hiding(~keep)
            else:
                is_real = keep if prompt.attention_mask.dim() == 4 else keep & prompt.attention_mask.bool()
                prompt = prompt.without(is_real, self._pad_token_id)
        if prompt.inputs_embeds is not None:
            at_placeholders = self.family.placeholders(self.config, prompt.input_ids)[..., None]
            features = embeddings.features.to(prompt.inputs_embeds.device, prompt.inputs_embeds.dtype)
            prompt = replace(prompt, inputs_embeds=prompt.inputs_embeds.masked_scatter(at_placeholders, features))
        if acts_in_decoder:
            selection.depth = selection.keep * self.config.text_config.num_hidden_layers
        return PreparedInputs(prompt, embeddings, selection, self._decoder_policy(tokens, prompt, units))

    def split_compute(
        self,
        token_budget: StackBudget | None,
        dials: DecoderDials,
        reducer: ReducerSpec | None,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: Any,
        past_key_values: Cache | None = None,
    ) -> tuple[StackBudget | None, DecoderDials]:
        """
        A call's token budget and dials, where it has a compute budget what that comes to.

        Args:
            token_budget, dials, reducer: of the call.
            inputs: ids `[batch, sequence]`, or embeddings, of the whole prompt.
            attention_mask: `[batch, sequence]`, or `None`.
            images: in the order of their placeholders, or `None`.
            past_key_values: which must not hold anything.

        Raises:
            ValueError: if another budget is given as well, the decoder's cost is not known, or the budget cannot be
                reached.
        """
        if dials.compute_budget is None:
            if dials.allocation is not None:
                raise ValueError(
                    f"`allocation` is {dials.allocation!r} without a `compute_budget`; it says how that is shared."
                )
            return token_budget, dials
        for name, value in {"token_budget": token_budget, **vars(dials)}.items():
            if value is not None and name not in ("compute_budget", "allocation", "scheduler"):
                raise ValueError(f"`compute_budget` and `{name}` were both given; the first says the second.")
        if past_key_values is not None and int(past_key_values.get_seq_length()) > 0:
            raise ValueError(
                "`compute_budget` was given with a `past_key_values` that holds tokens; it is for a prompt that is "
                "read whole. Say `token_budget` for the images of a later turn."
            )
        kind = self.config.get_text_config().model_type
        if kind not in RUNNABLE:
            raise ValueError(
                f"`compute_budget` is {dials.compute_budget!r}; what a decoder costs is known of the kinds "
                f"{', '.join(RUNNABLE)}, and this one is {kind!r}. Use `token_budget`."
            )
        steps, sizes = self.steps(reducer), [[] for _ in inputs]
        if images is not None:
            input_ids = inputs if inputs.dim() == 2 else self.ids_of_embeds(inputs)
            units = self.looked_at(input_ids, images, self.resolve_budget(1.0, reducer, len(input_ids)))[1]
            for prompt, size in zip(units.sample.tolist(), units.sizes.tolist(), strict=True):
                sizes[prompt].append(size)
        lengths = [inputs.shape[1]] * len(inputs) if attention_mask is None else attention_mask.sum(dim=-1).tolist()
        num_others = [length - sum(own) for length, own in zip(lengths, sizes, strict=True)]
        acting = steps[-1].reducer if steps[-1].reducer.stage == "decoder" else None
        return dials_of_compute(dials, self.config, self.scheduler, num_others, sizes, acting)

    def under_dials(
        self,
        policy: DecoderPolicy | None,
        dials: DecoderDials,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        past_key_values: Cache | None,
        prepared: PreparedInputs | None = None,
    ) -> DecoderPolicy | None:
        """
        What decides inside the decoder, where a call or the configuration leaves out units of it.

        Args:
            policy: what decides without.
            dials: of the call.
            inputs: ids `[batch, columns]`, or embeddings, of what is about to be read.
            attention_mask, labels: as the decoder gets them, `[batch, columns]` or `None`.
            past_key_values: which may have been filled under a plan already.
            prepared: the prompt and its images, if it has any.

        Raises:
            ValueError: if a plan or a budget is not allowed, nothing can choose, or the cache was filled otherwise.
        """
        learns = self.scheduler is not None and self.scheduler.learns
        if not (dials.are_turned or turns_by_itself(self.config) or learns):
            return policy
        ids, is_visual = (inputs if inputs.dim() == 2 else None), None
        if attention_mask is None:
            attention_mask = torch.ones(inputs.shape[:2], dtype=torch.long, device=inputs.device)
        if attention_mask.dim() != 2:
            raise ValueError(
                "What runs in the decoder is chosen with an `attention_mask` of shape [batch, sequence] and no gates "
                f"inside attention, and here the mask has shape {tuple(attention_mask.shape)} and `gradient_gates` is "
                f"{self.config.gradient_gates!r}; use gradient_gates='features'."
            )
        if prepared is not None and prepared.prompt.visual_index is not None:
            is_visual = prepared.prompt.visual_index >= 0
        new = attention_mask[:, -inputs.shape[1] :]
        prompt = ReadPrompt(is_before_answer(new, labels), is_visual, ids, prepared and prepared.selection)
        return under_dials(policy, dials, self.config, self.scheduler, prompt, past_key_values)

    def run_layers(
        self,
        policy: DecoderPolicy | None,
        encoded: Mapping[str, ModelOutput] | None,
        selection: Selection | None,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> DecoderOutput:
        """
        Our loop over the decoder's layers, where they see different columns.

        Args:
            policy: what leaves inside the decoder; without one nothing does.
            encoded: what stands at the placeholders, by kind, as the family's forward takes it.
            selection: what was chosen before the decoder, which is told how many layers saw each token; by default
                what the cache says of the prompt that fills it.
            input_ids, inputs_embeds: `[batch, columns]`, and what they are read as.
            past_key_values, kwargs: see [`run_decoder`].
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        deepstack = []
        for number, kind in enumerate(KINDS):
            if encoded is None or kind not in encoded:
                continue
            places = (self.family.kinds(self.config, input_ids) == number)[..., None]
            features = torch.cat([entry.flatten(0, -2) for entry in encoded[kind].pooler_output]).to(inputs_embeds)
            inputs_embeds = inputs_embeds.masked_scatter(places, features)
            layers = getattr(encoded[kind], "deepstack_features", None) or []
            none = torch.zeros_like(inputs_embeds)
            added = [none.masked_scatter(places, torch.cat(layer).to(inputs_embeds)) for layer in layers]
            deepstack = [sum(parts) for parts in zip(deepstack, added, strict=True)] if deepstack else added
        outputs = run_decoder(
            self.prompt_decoder,
            inputs_embeds=inputs_embeds,
            past_key_values=past_key_values,
            policy=policy,
            compact=self.config.visual_position_ids == "compact",
            deepstack=deepstack,
            blocks=None if policy is None else self.family.blocks(self.config, input_ids),
            is_sharded=self.is_sharded,
            **kwargs,
        )
        if policy is not None and policy.schedule is not None:
            without_token(outputs, policy.schedule.scheduler.settings.num_prefix_layers)
        if selection is None and (waiting := pruned_cache(past_key_values).prompt) is not None:
            # In `generate` the prompt was pruned before this call.
            selection = waiting.selection
        if policy is not None and selection is not None:
            selection.depth = policy.depth_of_tokens(selection.is_token, outputs.depth)
        return outputs

    @property
    def _pad_token_id(self) -> int:
        """An id that is no placeholder's."""
        placeholders = [getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video")]
        return next(number for number in range(3) if number not in placeholders)

    def padded_on_the_left(self, prompt: Prompt) -> Prompt:
        """A prompt in whose rows padding stands in front: an answer that goes on behind padding is another one."""
        if prompt.attention_mask.dim() != 2 or bool(prompt.attention_mask[:, -1].all()):
            return prompt
        return prompt.without(prompt.attention_mask.bool(), self._pad_token_id)

    def pruned_prompt(self, new: NewColumns, prepared: PreparedInputs, num_ids: int) -> PrunedPrompt | None:
        """
        What the model reads in place of a caller's columns, and what a cache that it fills then stands for; `None`
        where a mask over all pairs of columns stands in for a prompt's.

        Args:
            new: the columns as the caller has them.
            prepared: as the model reads them.
            num_ids: columns of the caller's `input_ids`.
        """
        if prepared.prompt.attention_mask.dim() != 2:
            return None
        num_features = self.family.placeholders(self.config, prepared.prompt.input_ids).sum(dim=-1)
        is_compact = self.config.visual_position_ids == "compact"
        counted = prepared.prompt.position_ids if is_compact else new.position_ids
        return PrunedPrompt.of(new, prepared, num_features, num_ids, self.family.next_positions(counted))

    def features_of_images(self, pixel_values: torch.Tensor, schedule: BudgetSchedule) -> list[torch.Tensor]:
        """What the decoder gets of each image, asked nothing: a list of `[K, text_hidden_size]`."""
        units = self._units_of_images(len(pixel_values), pixel_values.device)
        tokens = self.visual_model.encode_and_reduce(pixel_values, units, schedule)
        embeddings, stays = self.visual_model.embeddings(tokens, units, in_place=False)
        return list(embeddings.features.split(stays.view(len(pixel_values), -1).sum(dim=-1).tolist()))

    def keeps_whole_images(self, num_images: int, schedule: BudgetSchedule) -> bool:
        """Whether the decoder gets of images what the tower and the projector alone make of them."""
        return self.visual_model.keeps_whole_units(self._units_of_images(num_images), schedule)

    def _units_of_images(self, num_images: int, device: torch.device | None = None) -> Units:
        """The units of prompts that are an image each, and nothing else."""
        size = self.family.tokens_per_image(self.config) + int(self.config.keep_cls)
        placeholders = torch.ones(num_images, size, dtype=torch.bool, device=device)
        return self.family.units(self.config, placeholders, num_images)

    def checked_output(self, selection_output: str | None) -> str:
        """The form in which dropped tokens are gone: what was asked for, or the configuration's."""
        selection_output = self.config.selection_output if selection_output is None else selection_output
        if selection_output not in ("gather", "mask"):
            raise ValueError(f"`selection_output` is {selection_output!r}; allowed are 'gather' and 'mask'.")
        return selection_output

    def refuse_other_features(self, arguments: Mapping[str, Any]) -> None:
        """
        Raises:
            ValueError: if a call asks for features of the tower that are not those of the configuration, which the
                budget token and reducers read too.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            value = arguments.get(name)
            if value is not None and value != getattr(self.config, name):
                raise ValueError(
                    f"`{name}` is {value!r}, and this model reads {getattr(self.config, name)!r}; a call cannot "
                    "change it. Set it in the configuration before the model is built."
                )

    @staticmethod
    def refuse_budget_of_encoded(token_budget: StackBudget | None, reducer: ReducerSpec | None) -> None:
        """
        Raises:
            ValueError: if a budget or a reducer is given for images that come encoded, of which nothing is dropped.
        """
        for name, value in (("token_budget", token_budget), ("reducer", reducer)):
            if value is not None:
                raise ValueError(
                    f"`{name}` is {value!r} and `mm_encoder_outputs` was given, whose features are encoded and "
                    "reduced already. Pass pixels to have some of their tokens dropped."
                )

    @staticmethod
    def check_images_are_new(mm_encoder_outputs: Any, past_key_values: Cache | None = None) -> None:
        """
        Raises:
            ValueError: if images are given and come encoded as well, or with a cache that holds tokens already.
        """
        if mm_encoder_outputs is not None:
            raise ValueError(
                "`pixel_values` and `mm_encoder_outputs` were both given; the second are the features of the first, "
                "encoded already. Pass one of them."
            )
        if past_key_values is not None and int(past_key_values.get_seq_length()) > 0:
            raise ValueError(
                "`pixel_values` was given with a `past_key_values` that already holds tokens; to show an image in a "
                "later turn call `generate`, which knows which columns the cache holds. (PEFT's prefix tuning fills "
                "a cache; use LoRA or IA3.)"
            )

    def check_labels_of_choice(self, prompt: Prompt, schedule: BudgetSchedule, prepared: PreparedInputs) -> None:
        """
        Warns if a prompt's labels leave no question to choose by.

        Raises:
            ValueError: if in training a choice was made by a question that may hold its answer, or learns from a loss
                that the caller does not see.
        """
        if prompt.column is not None and self.training and prepared.selection.loss is not None:
            names = ", ".join(repr(name) for name in schedule.names)
            raise ValueError(
                f"`caller_targets` was given, and {names} learns from a loss of its own, which is added to the "
                "model's only with `labels`. TRL's trainers compute the loss themselves; use AdaVTPTrainer."
            )
        in_decoder = prepared.policy is not None
        of_question = {"question", "question_ids", "question_tokens"}
        asks = in_decoder or not self._needs(schedule.steps).isdisjoint(of_question)
        # Where everything stays, nothing was chosen.
        if not self.training or not asks or (not in_decoder and bool(prepared.selection.keep.all())):
            return
        if prompt.labels is None:
            raise ValueError(
                "`labels` is None in training, and what is kept depends on the question, which cannot be told from "
                "the answer without them. Pass `labels`; or, for a loss of your own, `caller_targets`, which are -100 "
                "everywhere if no text is an answer."
            )
        is_question = self._is_question(prompt, self.family.placeholders(self.config, prompt.input_ids))
        if not bool(is_question.any(dim=-1).all()):
            logger.warning_once(
                "`labels` has a prompt whose first token of text is a target, so that no question is left to choose "
                "visual tokens by. Set the labels of what asks to -100; TRL does for columns `prompt` and "
                "`completion`, and with assistant_only_loss=True."
            )

    def _is_question(self, prompt: Prompt, placeholders: torch.Tensor) -> torch.Tensor:
        """`[batch, sequence]` bool: the text that asks, up to the first token that is a target."""
        mask = prompt.attention_mask
        is_real = mask if mask.dim() == 2 else torch.ones_like(prompt.input_ids)
        return ~placeholders & is_before_answer(is_real, prompt.labels)

    def zero_of_text(
        self,
        input_ids: torch.Tensor,
        past_key_values: Cache | None,
        token_budget: StackBudget | None,
        reducer: ReducerSpec | None,
    ) -> torch.Tensor | None:
        """
        Of a call without images: zero that looked at a blank one, where it has to look; a placeholder, or what is no
        budget, is refused.
        """
        if past_key_values is None and not torch.compiler.is_compiling():
            # A graph cannot ask for one.
            self.refuse_placeholders(input_ids)
        has_to_look = self.runs_everything
        if token_budget is None and reducer is None and not has_to_look:
            return None
        schedule = self.resolve_budget(token_budget, reducer, len(input_ids))
        if not has_to_look or (past_key_values is not None and int(past_key_values.get_seq_length()) > 0):
            return None
        return self.zero_of_a_blank_image(input_ids, schedule)

    def zero_of_a_blank_image(self, input_ids: torch.Tensor, schedule: BudgetSchedule) -> torch.Tensor:
        """
        Zero, computed by looking at a blank image in the first prompt. A batch without images then runs the modules
        that a batch with images runs, in their order: where parameters are sharded, ranks whose modules differ wait
        for each other forever.
        """
        visual, units, images = self.look_at_blank(input_ids.device, schedule)
        none = torch.zeros_like(input_ids[:1], dtype=torch.bool)
        prompt = Prompt(input_ids[:1], torch.ones_like(input_ids[:1]), input_ids[:1])
        question = self._questions(schedule.steps, prompt, none, units)
        tokens = visual.encode_and_reduce(images, units, schedule, question)
        embeddings = visual.embeddings(tokens, units, in_place=True)[0]
        used = [embeddings.features, *embeddings.deepstack, tokens.selection.gates, tokens.selection.loss]
        return 0.0 * sum(value.sum().to(self.prompt_decoder.dtype) for value in used if value is not None)

    def look_at_blank(self, device: torch.device, schedule: BudgetSchedule) -> tuple[VisualModel, Units, Any]:
        """The visual half of the model looking at a blank image, the units of that, and the image."""
        vision, size = self.config.vision_config, self.family.tokens_per_image(self.config)
        pixels = torch.zeros(1, vision.num_channels, vision.image_size, vision.image_size, device=device)
        one = torch.zeros(1, dtype=torch.long)
        return self.visual_model, Units(one, one + size, [], torch.arange(size, device=device)), pixels

    def _questions(self, steps: list[Step], prompt: Prompt, placeholders: torch.Tensor, units: Units) -> Question:
        """The text that asks about each unit, up to the first token that is a target."""
        needs, question = self._needs(steps), Question()
        is_text, sample = self._is_question(prompt, placeholders), units.sample.to(placeholders.device)
        embeds = prompt.inputs_embeds
        if embeds is None and not needs.isdisjoint({"question", "question_tokens"}):
            embeds = self.get_input_embeddings()(prompt.input_ids)
        if "question" in needs:
            weight = is_text.to(embeds)
            mean = (embeds * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)
            question.mean = mean.to(sample.device)[sample]
        if "question_tokens" in needs:
            index = left_padded(is_text).to(embeds.device)
            tokens = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
            question.tokens = tokens.to(sample.device)[sample]
            question.is_token = is_text.gather(1, index.to(is_text.device))[sample]
        if "question_ids" in needs:
            if prompt.inputs_embeds is not None:
                names = ", ".join(step.name for step in steps if "question_ids" in step.reducer.needs)
                raise ValueError(
                    f"`inputs_embeds` was given in place of `input_ids`, and {names} reads the question's ids; pass "
                    "`input_ids`, or choose another reducer."
                )
            question.ids = prompt.input_ids.masked_fill(~is_text, -1)[sample]
        return question

    def _needs(self, steps: list[Step]) -> set[str]:
        """What the reducers of a stack have to be given; those that get the budget token hear what it hears."""
        needs = {need for step in steps for need in step.reducer.needs}
        return needs | {"question"} if self.config.question_aware and "budget" in needs else needs

    def _at_columns(
        self, of_tokens: torch.Tensor, placeholders: torch.Tensor, units: Units, other: float | bool
    ) -> torch.Tensor:
        """Values `[num_units, largest N]` of visual tokens in their columns `[batch, sequence]`; `other` elsewhere."""
        flat = of_tokens[units.is_token.to(of_tokens.device)]
        at_placeholders = torch.where(units.token >= 0, flat[units.token], other)
        return torch.full_like(placeholders, other, dtype=flat.dtype).masked_scatter(placeholders, at_placeholders)

    def _decoder_policy(self, tokens: VisualTokens, prompt: Prompt, units: Units) -> VisualTokenPolicy | None:
        """
        What a decoder-stage reducer of the stack does with a prompt, and what is left of it is rescaled by; `None` if
        the decoder runs as it is.
        """
        name, reducer, num_keep, num_whole = "visual_attention='rescaled'", KeepsAllReducer(self.config), None, None
        if tokens.decoder is not None:
            name, reducer = tokens.decoder.name, tokens.decoder.reducer
        if self.config.visual_attention == "rescaled":
            if (reason := self.family.why_not(self.config, reducer)) is not None:
                raise ValueError(f"`visual_attention` is 'rescaled': {reason}")
            num_whole = torch.zeros(len(prompt.input_ids), dtype=torch.long)
            num_whole.index_add_(0, units.sample, units.sizes)
        elif tokens.decoder is None:
            return None
        if tokens.decoder_keep is not None:
            num_keep = torch.zeros(len(prompt.input_ids), dtype=torch.long)
            num_keep.index_add_(0, units.sample, tokens.decoder_keep)
        is_flat = prompt.attention_mask.dim() == 2
        return VisualTokenPolicy.of_prompt(
            name,
            reducer,
            prompt.visual_index,
            is_before_answer(prompt.attention_mask, prompt.labels) if is_flat else None,
            num_keep,
            self.config.text_config.num_hidden_layers,
            always=self.training,
            num_whole=num_whole,
        )


def _check_decoder_takes_hidden_columns(language_model: "PreTrainedModel", length: int) -> None:
    """A window counts columns, so that hidden ones would take the places of others; a state fades at every column."""
    if has_recurrent_layers(language_model.config):
        raise ValueError(
            "`selection_output` is 'mask', which leaves dropped tokens in the sequence, and this decoder's linear "
            "attention moves its state on at every column, hidden or not. Use 'gather'."
        )
    window = getattr(language_model.config, "sliding_window", None)
    if window is not None and window < length:
        raise ValueError(
            f"`selection_output` is 'mask', which leaves dropped tokens in the sequence, and this decoder attends to "
            f"the last {window} columns of {length}, dropped ones counted. Use 'gather', or shorter prompts."
        )


def _check_attention_takes_gates(language_model: "PreTrainedModel", length: int) -> None:
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
    layer = language_model.layers[0]
    checkpoint = layer._gradient_checkpointing_func if getattr(layer, "gradient_checkpointing", False) else None
    if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
        raise ValueError(
            "`gradient_gates` is 'attention' and gradient checkpointing has use_reentrant=True, which loses the "
            "gradient of whatever is no hidden state. Use use_reentrant=False, or gradient_gates='features'."
        )
