"""AdaVTP: a LLaVA whose decoder sees as many visual tokens as the caller's budget allows.

The way of an image: the tower makes patch features, with the budget and the question beside them; a reducer keeps K of
them; the projector maps the kept ones into the decoder's space; they take the places of their placeholders in the
prompt, and the placeholders of dropped patches leave it. The decoder is any Llama-shaped text model, untouched.
"""

from dataclasses import dataclass, replace
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

from ..configuration.configuration_adavtp import AdaVTPConfig, reducer_entries
from .budget.schedule import BudgetOfStack, StackBudget, Step, reduce_in_tower, reduce_tokens, stack_steps
from .budget.selection import Selection
from .decoder.loop import decode
from .decoder.policy import DecoderPolicy, VisualTokenPolicy
from .decoder.pruned_cache import pending_policy, pruned_cache
from .generation_adavtp import AdaVTPGenerationMixin
from .hub.custom_reducers import OwnReducersMixin
from .hub.loading import CompleteLoadingMixin
from .hub.saving import SelfContainedMixin
from .prompt import Prompt, count_positions, images_per_sample, left_padded, without_first_labels
from .reducers.adaptive import VisionTokenController
from .reducers.base import TokenReducer, build_reducer
from .reducers.published import PUBLISHED_REDUCERS
from .reducers.token_fusion import ZeroLinear
from .vision.encode import BudgetToken, encode_image
from .vision.features import VisionFeatures

# LLaVA's files hold the parameter names of an older layout. transformers renames them while loading, but for classes
# outside its own package only where a mapping is registered under the class's name.
register_checkpoint_conversion_mapping(
    "AdaVTPForConditionalGeneration", get_checkpoint_conversion_mapping("llava"), overwrite=True
)
register_checkpoint_conversion_mapping("AdaVTPModel", get_checkpoint_conversion_mapping("LlavaModel"), overwrite=True)


ReducerSpec = str | dict[str, Any] | list[str | dict[str, Any]]


@dataclass
class Seen:
    """
    What is left of the images when the reducers before the decoder are done.

    Attributes:
        features: the tokens.
        selection: which patches they are.
        is_projected: whether they are in the decoder's space already.
        decoder: the step of the stack that acts inside the decoder, or `None`.
        decoder_keep: `[num_images]`, the mean number of tokens over layers that it is to keep, or `None`.
    """

    features: VisionFeatures
    selection: Selection
    is_projected: bool
    decoder: Step | None
    decoder_keep: torch.Tensor | None


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


class AdaVTPPreTrainedModel(CompleteLoadingMixin, OwnReducersMixin, SelfContainedMixin, PreTrainedModel):
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


class AdaVTPModel(AdaVTPPreTrainedModel, LlavaModel):
    """
    Vision tower, reducer, projector and text model, without a language-modelling head.

    Args:
        config: the model's configuration.

    Attributes:
        is_sharded: whether parameters are spread over processes (FSDP, ZeRO-3). To be set by whoever spreads them: a
            batch without images then runs the modules of one with images in evaluation too, as in training it always
            does.
    """

    is_sharded = False

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__(config)
        self.budget_token = BudgetToken(config)
        self.controller = VisionTokenController(config)
        self.reducers = nn.ModuleDict()
        in_use = {_name_of(entry) for entry in config.reducers}
        self.stack([*config.reducers, *(entry for entry in config.trained_reducers if _name_of(entry) not in in_use)])
        self.post_init()

    def set_reducer(self, reducer: ReducerSpec, **parameters: Any) -> None:
        """
        Chooses what selects the visual tokens from now on.

        Args:
            reducer: a registered reducer's name; a dictionary of `"name"` and parameters; or a list of these, a stack
                in which each reducer gets what the one before left. `"adaptive"` is the model's own controller.
            parameters: of the reducer, where it is one name.

        Raises:
            ValueError: if a name or a parameter is not known, or the order of the stack is not that of its stages.
        """
        if parameters and not isinstance(reducer, str):
            raise ValueError(
                f"Parameters {sorted(parameters)} were given with `reducer` {reducer!r}, which is no name."
            )
        entries = reducer_entries({"name": reducer, **parameters} if parameters else reducer)
        stack = self.stack(entries)
        stack_steps(stack)
        given = {name: getattr(module, "parameters_given", {}) for name, module in stack.items()}
        self.config.reducers = [{"name": name, **given[name]} if given[name] else name for name in stack]

    def stack(self, entries: list[str | dict[str, Any]]) -> dict[str, TokenReducer]:
        """The modules of the reducers that are written down in `entries`, by name; those that are missing are made."""
        stack = {}
        for entry in entries:
            given = {"name": entry} if isinstance(entry, str) else dict(entry)
            name = given.pop("name")
            if name == "adaptive" and given:
                raise ValueError(
                    f"Reducer 'adaptive' takes no parameters, got {sorted(given)}; it has the configuration's."
                )
            stack[name] = self.controller if name == "adaptive" else self._built(name, given)
        return stack

    def _built(self, name: str, parameters: dict[str, Any]) -> TokenReducer:
        is_known = name in self.reducers
        known = self.reducers[name] if is_known else None
        # A name alone is what is there already, where that has learned something.
        if is_known and (known.parameters_given == parameters or (not parameters and known.state_dict())):
            return known
        reducer = build_reducer(name, self.config, **parameters).to(device=self.device, dtype=self.dtype)
        reducer.parameters_given = parameters
        if is_known and known.state_dict():
            try:
                # The parameters themselves and not copies, so that an optimizer which has them goes on training them.
                frozen = {key for key, parameter in known.named_parameters() if not parameter.requires_grad}
                for key, parameter in reducer.named_parameters():
                    parameter.requires_grad_(key not in frozen)
                reducer.load_state_dict(known.state_dict(keep_vars=True), assign=True)
            except RuntimeError as error:
                raise ValueError(
                    f"Reducer {name!r} has weights that were made for the parameters {known.parameters_given}, and "
                    f"they do not fit {parameters}."
                ) from error
        self.reducers[name] = reducer.train(self.training)
        if reducer.state_dict():
            # What has weights is saved, so the configuration has to say that it is there.
            others = [entry for entry in self.config.trained_reducers if _name_of(entry) != name]
            self.config.trained_reducers = [*others, {"name": name, **parameters} if parameters else name]
        return self.reducers[name]

    def steps(self, reducer: ReducerSpec | None = None) -> list[Step]:
        """What a stack does one after another; `None` stands for the configuration's."""
        return stack_steps(self.stack(self.config.reducers if reducer is None else reducer_entries(reducer)))

    def budget_of(self, token_budget: StackBudget | None, steps: list[Step], batch_size: int) -> BudgetOfStack:
        """
        How many tokens the steps leave.

        Args:
            token_budget: see [`AdaVTPForConditionalGeneration.forward`].
            steps: of the stack.
            batch_size: number of prompts.

        Raises:
            ValueError: if the budget is not allowed.
        """
        own_rule = len({step.name for step in steps}) == 1 and (steps[0].divides or steps[0].reducer).has_own_rule
        if token_budget is None and not own_rule:
            token_budget = self.config.token_budget
        num_layers = self.config.text_config.num_hidden_layers
        return BudgetOfStack(token_budget, steps, self.config.num_patches, batch_size, num_layers)

    def look(
        self,
        pixel_values: torch.Tensor,
        steps: list[Step],
        budget: BudgetOfStack,
        sample: torch.Tensor,
        question: torch.Tensor | None,
        question_ids: torch.Tensor | None = None,
    ) -> "Seen":
        """
        Looks at the images and lets every reducer before the decoder choose.

        Args:
            pixel_values: `[num_images, channels, height, width]`.
            steps: of the stack.
            budget: how many tokens each step leaves.
            sample: `[num_images]` int64, the prompt that shows each image.
            question: `[num_images, text_hidden_size]`, the mean embedding of the prompt's text.
            question_ids: `[num_images, sequence]`, its ids, -1 in other columns.

        Raises:
            ValueError: if the images do not have the size that the model was made for, or a reducer cannot do what it
                is asked to.
        """
        self._check_images(pixel_values)
        num_patches = self.config.num_patches
        entering = torch.full((len(pixel_values),), num_patches)
        counts = [budget.of_step(steps[0], entering, sample)]
        features, selection = self._encode(pixel_values, steps, budget, counts[0], sample, question)
        needs = {need for step in steps for need in step.reducer.needs}
        features.sample = sample
        features.question = question if "question" in needs else None
        features.question_ids = question_ids if "question_ids" in needs else None
        features.pixel_values = pixel_values if "pixel_values" in needs else None
        projected = False
        for number, step in enumerate(steps):
            entering = (features.positions >= 0).sum(dim=-1).cpu()
            if number > 0:
                counts.append(budget.of_step(step, entering, sample))
            if step.reducer.stage in ("encoder", "decoder"):
                continue
            self._require_no_gates(selection, step)
            if not self.training and counts[-1] is not None and bool((counts[-1] >= entering).all()):
                continue
            if step.reducer.stage == "projector" and not projected:
                features, projected = self._projected(features, "tower_patches" in needs), True
            left, chosen = reduce_tokens(step.name, step.reducer, features, counts[-1])
            if chosen.features is None and selection.features is not None:
                chosen.features = left.patches
            chosen.loss = _sum_of_losses(chosen.loss, selection.loss)
            selection = chosen
            gates_attention = chosen.gates is not None and self.config.gradient_gates == "attention"
            # With gates inside attention, every token that came here stays in the sequence.
            features = features if gates_attention else left
        decoder = steps[-1] if steps[-1].reducer.stage == "decoder" else None
        return Seen(features, selection, projected, decoder, counts[-1] if decoder else None)

    def _check_images(self, pixel_values: torch.Tensor) -> None:
        num_patches, image_size = self.config.num_patches, self.config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) != (image_size, image_size):
            raise ValueError(
                f"`pixel_values` has images of {tuple(pixel_values.shape[-2:])} pixels; this model's images have "
                f"{image_size} pixels a side and make {num_patches} patches."
            )

    def _require_no_gates(self, selection: Selection, step: Step) -> None:
        if selection.gates is not None and self.config.gradient_gates == "attention":
            raise ValueError(
                f"`gradient_gates` is 'attention' and {step.name!r} follows a reducer whose choice is in training; "
                "train with gradient_gates='features', or with the reducer that learns at the end of the stack."
            )

    def _encode(
        self,
        pixel_values: torch.Tensor,
        steps: list[Step],
        budget: BudgetOfStack,
        num_keep: torch.Tensor | None,
        sample: torch.Tensor,
        question: torch.Tensor | None,
    ) -> tuple[VisionFeatures, Selection]:
        """The tower's tokens, reduced on the way if the first step acts there."""
        num_patches, first = self.config.num_patches, steps[0].reducer
        fraction, meets_budget = self._budget_fraction(steps, budget, num_keep, sample)
        attention_layers = sorted(
            {layer for step in steps if "attention" in step.reducer.needs for layer in step.reducer.attention_layers}
        )
        arguments = {
            "budget_token": self.budget_token if meets_budget else None,
            "budget": fraction,
            "question": question if self.config.question_aware else None,
        }
        if first.stage != "encoder" or (not self.training and bool((num_keep == num_patches).all())):
            features = encode_image(
                self.vision_tower, pixel_values, self.config, **arguments, attention_layers=attention_layers
            )
            return features, Selection.everything(len(features.patches), num_patches, features.patches.device)
        if attention_layers:
            raise ValueError(
                f"{steps[0].name!r} changes the tokens inside the tower, and another reducer of this stack reads the "
                "attention of the whole tower; use one of them."
            )
        return reduce_in_tower(self.vision_tower, first, pixel_values, self.config, num_keep, **arguments)

    def _budget_fraction(
        self, steps: list[Step], budget: BudgetOfStack, num_keep: torch.Tensor | None, sample: torch.Tensor
    ) -> tuple[torch.Tensor | None, bool]:
        """
        The share of tokens `[num_images]` that the reducer which meets the budget leaves, and whether the budget takes
        part at all. In training it does whatever its value, so that every rank of a sharded model runs the same.
        """
        asking = [number for number, step in enumerate(steps) if "budget" in step.reducer.needs]
        if not asking:
            return None, False
        # Steps before it are taken to leave what they are told to; a rule of their own may differ a little.
        planned, left = budget.anew(), torch.full_like(sample, self.config.num_patches).cpu()
        for number, step in enumerate(steps[: asking[0] + 1]):
            count = num_keep if number == 0 else planned.of_step(step, left, sample)
            left = left if count is None else count
        patches_see_budget = self.config.budget_fusion == "encoder" and self.config.budget_attention == "mutual"
        keeps_everything = not self.training and bool((left == self.config.num_patches).all())
        fraction = (left.double() / self.config.num_patches).float().to(self.device)
        return fraction, patches_see_budget or not keeps_everything

    def _projected(self, features: VisionFeatures, with_tower_patches: bool) -> VisionFeatures:
        """The tokens, and CLS, in the decoder's space."""
        cls = None if features.cls is None else self.multi_modal_projector(features.cls)
        patches = self.multi_modal_projector(features.patches)
        return replace(
            features, patches=patches, cls=cls, tower_patches=features.patches if with_tower_patches else None
        )

    def prepare_prompt(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        token_budget: StackBudget | None = None,
        selection_output: str | None = None,
        reducer: ReducerSpec | None = None,
    ) -> tuple[Prompt, Selection, DecoderPolicy | None]:
        """
        Builds the decoder's input from prompts and images: encode, select, project, splice, drop.

        Args:
            input_ids: `[batch, sequence]`, with one placeholder per visual token of each image.
            pixel_values: `[num_images, channels, height, width]`, in the order of their placeholders.
            attention_mask: `[batch, sequence]`, or `[batch, 1, sequence, sequence]` bool with `position_ids`.
            position_ids: `[batch, sequence]`; by default counted from the attention mask.
            labels: `[batch, sequence]`.
            token_budget, reducer: see [`AdaVTPForConditionalGeneration.forward`].
            selection_output: `"gather"` or `"mask"`; by default the configuration's.

        Returns:
            The prompt as the decoder gets it, the selection, and what the decoder is to drop on its way.

        Raises:
            ValueError: if the budget is not allowed, or placeholders and images do not agree.
        """
        config = self.config
        selection_output = _checked_output(selection_output, config)
        num_images = images_per_sample(input_ids, config.image_token_id, config.num_image_tokens, len(pixel_values))
        steps = self.steps(reducer)
        budget = self.budget_of(token_budget, steps, len(input_ids))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        _check_mask(attention_mask, input_ids.shape)
        inputs_embeds = self.get_input_embeddings()(input_ids)
        sample = torch.arange(len(input_ids)).repeat_interleave(num_images.cpu())
        question, question_ids = self._questions(steps, input_ids, inputs_embeds, attention_mask, labels, sample)
        seen = self.look(pixel_values, steps, budget, sample, question, question_ids)
        selection = seen.selection
        gates_attention = selection.gates is not None and config.gradient_gates == "attention"
        # Hidden columns would leave in the decoder, and with them the labels that stand at them.
        output = "all" if gates_attention else "gather" if seen.decoder is not None else selection_output
        visual, column_is_kept, patches = self._visual_embeds(seen, output)
        placeholder = input_ids == config.image_token_id
        keep = torch.ones_like(placeholder).masked_scatter(placeholder, column_is_kept)
        filled = placeholder & keep if output != "mask" else placeholder
        inputs_embeds = inputs_embeds.masked_scatter(filled[..., None], visual.to(inputs_embeds.dtype))

        if position_ids is None:
            if attention_mask.dim() != 2:
                raise ValueError("`position_ids` is None, which is allowed only with a 2-D `attention_mask`.")
            position_ids = count_positions(attention_mask)
        if config.visual_position_ids == "compact":
            stays = keep
            if gates_attention:
                stays = torch.ones_like(keep).masked_scatter(placeholder, self._with_cls(selection.keep).flatten())
            position_ids = position_ids - (~stays).long().cumsum(dim=-1)
            position_ids = position_ids.clamp(min=0)
        if labels is not None:
            labels = without_first_labels(labels, attention_mask)
        shown = torch.full_like(input_ids, -1).masked_scatter(placeholder, patches)
        prompt = Prompt(inputs_embeds, attention_mask, position_ids.expand(len(input_ids), -1), labels, shown)
        if output == "mask" and not bool(keep.all()):
            prompt = prompt.hiding(~keep)
        elif output == "all":
            _check_attention_takes_gates(self.language_model, input_ids.shape[1])
            gates = self._column_gates(selection, placeholder)
            if not bool(keep.all()):
                gates, prompt = gates.gather(1, left_padded(keep)), prompt.without(keep)
            prompt = prompt.gating(gates)
        elif not bool(keep.all()):
            is_real = keep if attention_mask.dim() == 4 else keep & attention_mask.bool()
            prompt = prompt.without(is_real)
        if seen.decoder is not None:
            selection.depth = selection.keep * config.text_config.num_hidden_layers
        return prompt, selection, self._policy(seen, prompt, sample)

    def _questions(
        self,
        steps: list[Step],
        input_ids: torch.Tensor,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None,
        sample: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """
        The text that asks about each image, up to the first token that is a target: its mean embedding
        `[num_images, text_hidden_size]` and its ids `[num_images, sequence]`, each if somebody wants it.
        """
        needs = {need for step in steps for need in step.reducer.needs}
        needs_mean = "question" in needs or (self.config.question_aware and "budget" in needs)
        is_text = input_ids != self.config.image_token_id
        if attention_mask.dim() == 2:
            is_text = is_text & attention_mask.bool()
        if labels is not None:
            is_text = is_text & ((labels != -100).cumsum(dim=-1) == 0)
        weight, sample = is_text.to(text_embeds.dtype), sample.to(input_ids.device)
        mean, ids = None, None
        if needs_mean:
            mean = (text_embeds * weight[..., None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)
            mean = mean[sample]
        if "question_ids" in needs:
            ids = input_ids.masked_fill(~is_text, -1)[sample]
        return mean, ids

    def _policy(self, seen: "Seen", prompt: Prompt, sample: torch.Tensor) -> VisualTokenPolicy | None:
        """What a decoder-stage reducer of the stack does with a prompt, or `None` if nothing leaves in the decoder."""
        if seen.decoder is None:
            return None
        num_keep = None
        if seen.decoder_keep is not None:
            num_keep = torch.zeros(len(prompt.patches), dtype=torch.long)
            num_keep.index_add_(0, sample.cpu(), seen.decoder_keep.cpu())
        return VisualTokenPolicy.of_prompt(
            seen.decoder.name,
            seen.decoder.reducer,
            prompt,
            num_keep,
            self.config.text_config.num_hidden_layers,
            always=self.training,
        )

    def _nothing_from_a_blank_image(
        self, inputs_embeds: torch.Tensor, token_budget: StackBudget | None, reducer: ReducerSpec | None
    ) -> torch.Tensor:
        """
        Zero, computed by looking at a blank image in the first prompt. A batch without images then runs the modules
        that a batch with images runs: where parameters are sharded, ranks whose modules differ wait for each other
        forever.
        """
        vision_config = self.config.vision_config
        size = (1, vision_config.num_channels, vision_config.image_size, vision_config.image_size)
        steps = self.steps(reducer)
        budget = self.budget_of(token_budget, steps, len(inputs_embeds))
        sample = torch.zeros(1, dtype=torch.long)
        question = inputs_embeds[:1].mean(dim=1)
        ids = torch.full((1, 1), -1, device=inputs_embeds.device)
        seen = self.look(torch.zeros(size, device=inputs_embeds.device), steps, budget, sample, question, ids)
        visual, _, _ = self._visual_embeds(seen, "mask")
        used = [visual.sum(), seen.selection.gates, seen.selection.loss]
        return 0.0 * sum(value.sum().to(inputs_embeds.dtype) for value in used if value is not None)

    def _column_gates(self, selection: Selection, placeholder: torch.Tensor) -> torch.Tensor:
        """The gates of the visual tokens in their columns, 1 for CLS and for text, `[batch, sequence]`."""
        gates = self._with_cls(selection.gates)
        return torch.ones_like(placeholder, dtype=gates.dtype).masked_scatter(placeholder, gates)

    def _with_cls(self, of_patches: torch.Tensor) -> torch.Tensor:
        """A mask or gates `[num_images, num_patches]` with a one for CLS in front, where it is kept."""
        if not self.config.keep_cls:
            return of_patches
        return torch.cat([torch.ones_like(of_patches[:, :1]), of_patches], dim=1)

    def _visual_embeds(self, seen: "Seen", output: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        The tokens that were left, in the decoder's space: as they are (`"gather"`, `"all"`) or in their places among
        all patches with the others zero (`"mask"`).

        Returns:
            The visual embeddings `[filled_placeholders, text_hidden_size]` in the order of their placeholders; for
            every placeholder whether its column stays, and the patch it shows (-1 for CLS), counted through all
            images, both `[num_images * num_image_tokens]`.
        """
        features = seen.features
        num_images, num_patches = len(features.positions), self.config.num_patches
        is_filled = features.positions >= 0
        keep = torch.zeros(num_images, num_patches + 1, dtype=torch.bool, device=is_filled.device)
        keep = keep.scatter(1, features.positions.masked_fill(~is_filled, num_patches), True)[:, :num_patches]
        tokens = features.patches.masked_fill(~is_filled[..., None], 0.0)
        if output == "mask":
            placed = tokens.new_zeros(num_images, num_patches, tokens.shape[-1])
            tokens, is_filled = placed.masked_scatter(keep[..., None], tokens[is_filled]), torch.ones_like(keep)
        patches = torch.arange(num_images * num_patches, device=keep.device).view(num_images, num_patches)
        if self.config.keep_cls:
            tokens = torch.cat([features.cls, tokens], dim=1)
            is_filled, keep = self._with_cls(is_filled), self._with_cls(keep)
            patches = nn.functional.pad(patches, (1, 0), value=-1)
        embeds = tokens if seen.is_projected else self.multi_modal_projector(tokens)
        return embeds[is_filled], keep.flatten(), patches.flatten()

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
        selection, policy = None, pending_policy(past_key_values)
        if pixel_values is not None:
            prompt, selection, policy = self.prepare_prompt(
                input_ids, pixel_values, attention_mask, position_ids, labels, token_budget, selection_output, reducer
            )
            # Without a mask, transformers would take gaps between positions for the ends of packed sequences.
            inputs_embeds, attention_mask = prompt.inputs_embeds, prompt.attention_mask
            position_ids, labels = prompt.position_ids, prompt.labels
        elif inputs_embeds is None:
            if token_budget is not None:
                self.budget_of(token_budget, self.steps(reducer), len(input_ids))
            if past_key_values is None or past_key_values.get_seq_length() == 0:
                images_per_sample(input_ids, self.config.image_token_id, self.config.num_image_tokens, 0)
            inputs_embeds = self.get_input_embeddings()(input_ids)
            _checked_output(selection_output, self.config)
            is_new = past_key_values is None or past_key_values.get_seq_length() == 0
            if is_new and (self.training or self.is_sharded):
                inputs_embeds = inputs_embeds + self._nothing_from_a_blank_image(inputs_embeds, token_budget, reducer)

        if selection is None and labels is not None and attention_mask is not None:
            labels = without_first_labels(labels, attention_mask)

        outputs = decode(
            self.language_model,
            inputs_embeds,
            _decoder_mask(attention_mask, inputs_embeds.dtype),
            position_ids,
            past_key_values,
            policy,
            compact=self.config.visual_position_ids == "compact",
            **kwargs,
        )
        if policy is not None:
            if labels is not None:
                is_column = outputs.column_index >= 0
                labels = labels.gather(1, outputs.column_index.clamp(min=0)).masked_fill(~is_column, -100)
            # In `generate` the prompt was pruned before this call, and its selection waits on the cache.
            chosen = pruned_cache(past_key_values).prompt.selection if selection is None else selection
            chosen.depth = policy.depth(outputs.depth, chosen.keep)
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


def _name_of(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else entry["name"]


def _sum_of_losses(*losses: torch.Tensor | None) -> torch.Tensor | None:
    given = [loss for loss in losses if loss is not None]
    return torch.stack(given).sum() if given else None


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
                input_ids, pixel_values, attention_mask, labels=labels, token_budget=token_budget, reducer=reducer
            ).selection
        return self.model.prepare_prompt(
            input_ids, pixel_values, attention_mask, labels=labels, token_budget=token_budget, reducer=reducer
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
        token_budget: StackBudget | None = None,
        selection_output: str | None = None,
        reducer: ReducerSpec | None = None,
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
                number), or one such value per sample; for a stack of reducers also a dictionary with a budget for
                each by name, of the tokens that it gets. `None`: the reducer's own rule where it has one, else the
                configuration's budget. For reducers inside the decoder it is the mean over decoder layers.
            reducer: what selects in this call, in the form of `set_reducer`; by default the configuration's.
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
            reducer=reducer,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, rows, :])
        loss = None
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
            selection=outputs.selection,
            labels=outputs.labels,
        )


__all__ = ["PUBLISHED_REDUCERS", "AdaVTPForConditionalGeneration", "AdaVTPModel", "AdaVTPPreTrainedModel"]
