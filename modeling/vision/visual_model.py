"""Vision tower, budget token, reducers and projector as one model: from pixels to the visual tokens that are left.

There is no text model in it, so that whoever has the prompt elsewhere (a serving engine) uses it as `generate` does.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.schedule import BudgetOfUnits, BudgetSchedule
from ..budget.selection import Selection
from ..families.base import Units
from ..prompt import VisualEmbeddings
from ..reducers.bank import Step, require_trained_controller
from .budget_token import BudgetToken
from .encode import encode_image
from .features import NativeDial, Question, VisionFeatures, fingerprint
from .reduction import reduce_in_tower, reduce_tokens
from .tower import input_device


@dataclass
class VisualTokens:
    """
    What is left of the images when the reducers before the decoder are done.

    Attributes:
        features: the tokens.
        selection: which they are.
        is_projected: whether they are in the decoder's space already.
        decoder: the step of the stack that acts inside the decoder, or `None`.
        decoder_keep: `[num_units]`, the mean number of tokens over layers that it is to keep, or `None`.
    """

    features: VisionFeatures
    selection: Selection
    is_projected: bool
    decoder: Step | None
    decoder_keep: torch.Tensor | None


class VisualModel:
    """
    The visual half of a model, whose modules it uses and does not own. In training choices are sampled, with a
    gradient.

    Args:
        tower, projector, budget_token: of the model.
        config: its configuration.
        runs_everything: see [`PromptReductionMixin.runs_everything`].
    """

    def __init__(
        self,
        tower: PreTrainedModel,
        projector: nn.Module,
        budget_token: BudgetToken,
        config: AdaVTPConfig,
        runs_everything: bool,
    ) -> None:
        self.tower, self.projector, self.budget_token = tower, projector, budget_token
        self.config, self.runs_everything = config, runs_everything

    def encode_and_reduce(
        self,
        pixel_values: torch.Tensor,
        units: Units,
        schedule: BudgetSchedule,
        question: Question | None = None,
    ) -> VisualTokens:
        """
        Encodes the images and lets every reducer before the decoder choose.

        Args:
            pixel_values: `[num_images, channels, height, width]`.
            units: that they make.
            schedule: the stack and its budget.
            question: what the prompts ask about the units; by default nothing, whose mean embedding is zero.

        Raises:
            ValueError: if the images do not have the size that the model was made for, or a reducer cannot do what it
                is asked to.
        """
        steps, budget = schedule.steps, self.budget_of_units(schedule, units)
        needs = {need for step in steps for need in step.reducer.needs}
        num_keep, question = budget.of_step(steps[0], units.sizes), question or Question()
        features, selection = self._encode(pixel_values, schedule, units, num_keep, question.mean)
        # From here on all of it is where the placeholders are, wherever the parts of the model are.
        features, selection = features.to(units.token.device), selection.to(units.token.device)
        features.sample, features.unit = units.sample, torch.arange(len(units.sizes))
        features.grids = torch.tensor(units.grids) if units.grids else None
        features.frames = torch.tensor(units.frames) if units.frames else None
        features.question = question.mean if "question" in needs else None
        features.question_ids = question.ids if "question_ids" in needs else None
        features.question_tokens, features.is_question_token = question.tokens, question.is_token
        if "question_tokens" in needs and question.tokens is None:
            text_size = self.config.get_text_config().hidden_size
            features.question_tokens = features.patches.new_zeros(len(units.sizes), 0, text_size)
            features.is_question_token = torch.zeros_like(features.question_tokens[..., 0], dtype=torch.bool)
        features.pixel_values = pixel_values if "pixel_values" in needs else None
        features.native = self.native_dial() if "native" in needs else None
        features.fingerprint = self.fingerprints(pixel_values) if "fingerprint" in needs else None
        is_projected = False
        for number, step in enumerate(steps):
            entering = (features.positions >= 0).sum(dim=-1).cpu()
            if number > 0:
                num_keep = budget.of_step(step, entering)
                self._require_no_gates(selection, step)
            if step.reducer.stage in ("encoder", "decoder"):
                continue
            keeps_all = num_keep is not None and bool((num_keep >= entering).all())
            if not self.runs_everything and keeps_all and step.reducer.is_exact:
                continue
            if step.reducer.training or not keeps_all:
                require_trained_controller(step, self.config, step.reducer.training)
            if step.reducer.stage == "projector" and not is_projected:
                features, is_projected = self._projected(features, "tower_patches" in needs), True
            features, selection = self._reduced(step, features, selection, num_keep)
        if selection.is_soft and self.config.gradient_gates == "features":
            features, is_projected = self._weighed(features, selection, is_projected), True
        selection.sizes, selection.sample, selection.grids = units.sizes, units.sample, units.grids
        decoder = steps[-1] if steps[-1].reducer.stage == "decoder" else None
        return VisualTokens(features, selection, is_projected, decoder, num_keep if decoder else None)

    def budget_of_units(self, schedule: BudgetSchedule, units: Units) -> BudgetOfUnits:
        """
        What the budget leaves of each unit.

        Raises:
            ValueError: if the units of a prompt are to share by something that is not known of them.
        """
        if schedule.is_shared and schedule.unit_weights != "size":
            raise ValueError(
                f"`unit_weights` is {schedule.unit_weights!r}, and images of a {self.config.model_type!r} model are "
                "neither tiles nor frames; use 'size'."
            )
        return schedule.of_units(units.sample, units.sizes)

    def native_dial(self) -> NativeDial:
        """The dial that the model has of its own; asked only where [`Family.has_dial`] says that there is one."""
        raise NotImplementedError(f"{type(self).__name__} has no dial.")

    def fingerprints(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """A number for each image that depends on its pixels alone, `[num_units]` int64 on the CPU."""
        return torch.tensor([fingerprint(image) for image in pixel_values])

    def embeddings(self, tokens: VisualTokens, units: Units, in_place: bool) -> tuple[VisualEmbeddings, torch.Tensor]:
        """
        What stands at the placeholders of a prompt, in the decoder's space; `in_place`, whether every visual token of
        the whole images has its place, and those that left are zero.

        Returns:
            The embeddings of the filled placeholders, and for every placeholder whether it stays,
            `[num_placeholders]` bool.
        """
        features, is_unit_token = tokens.features, units.is_token.to(tokens.features.positions.device)
        is_left, stays = features.positions >= 0, tokens_left(features)
        embeds = features.patches.masked_fill(~is_left[..., None], 0.0)
        if in_place:
            placed = embeds.new_zeros(*stays.shape, embeds.shape[-1])
            embeds, is_left = placed.masked_scatter(stays[..., None], embeds[is_left]), is_unit_token
        column_stays = torch.ones_like(units.token, dtype=torch.bool)
        is_token = units.token >= 0
        column_stays = column_stays.masked_scatter(is_token, stays[is_unit_token])
        if self.config.keep_cls:
            embeds = torch.cat([features.cls, embeds], dim=1)
            is_left = nn.functional.pad(is_left, (1, 0), value=True)
        embeds = embeds if tokens.is_projected else self.projector(embeds).to(is_left.device)
        return VisualEmbeddings(embeds[is_left]), column_stays

    def keeps_whole_units(self, units: Units, schedule: BudgetSchedule) -> bool:
        """Whether every token comes to the decoder as the tower and the projector alone make it."""
        budget, asks_budget = schedule.of_units(units.sample, units.sizes), False
        for step in schedule.steps:
            num_keep = budget.of_step(step, units.sizes)
            asks_budget = asks_budget or "budget" in step.reducer.needs
            if step.reducer.stage != "decoder" and (num_keep is None or bool((num_keep < units.sizes).any())):
                return False
        return not self.runs_everything and not (asks_budget and self._patches_see_budget)

    @property
    def _patches_see_budget(self) -> bool:
        return self.config.budget_fusion == "encoder" and self.config.budget_attention == "mutual"

    def _all_stay(self, selection: Selection) -> bool:
        """Whether every token stays in the sequence, for the gradient of the choice."""
        return selection.is_soft or (selection.gates is not None and self.config.gradient_gates == "attention")

    def _require_no_gates(self, selection: Selection, step: Step) -> None:
        if selection.is_soft:
            raise ValueError(
                f"`controller_estimator` is 'differentiable_top_k' and {step.name!r} follows the controller, which "
                "drops nothing in training; train with controller_estimator='straight_through' and "
                "gradient_gates='features', or with the controller at the end of the stack."
            )
        if self._all_stay(selection):
            raise ValueError(
                f"`gradient_gates` is 'attention' and {step.name!r} follows a reducer whose choice is in training; "
                "train with gradient_gates='features', or with the reducer that learns at the end of the stack."
            )

    def _weighed(self, features: VisionFeatures, selection: Selection, is_projected: bool) -> VisionFeatures:
        """Each token as the decoder gets it, times its gate."""
        if not is_projected:
            features = self._projected(features, with_tower_patches=False)
        gates = selection.gates.gather(1, features.positions.clamp(min=0))
        return replace(features, patches=features.patches * gates[..., None].to(features.patches))

    def _reduced(
        self, step: Step, features: VisionFeatures, earlier: Selection, num_keep: torch.Tensor | None
    ) -> tuple[VisionFeatures, Selection]:
        """One step between tower and decoder."""
        left, selection = reduce_tokens(step.name, step.reducer, features, num_keep, self.runs_everything)
        if selection.features is None and earlier.features is not None:
            selection.features = left.patches
        selection.settings = selection.settings or earlier.settings
        losses = [loss for loss in (selection.loss, earlier.loss) if loss is not None]
        selection.loss = torch.stack(losses).sum() if losses else None
        return features if self._all_stay(selection) else left, selection

    def _encode(
        self,
        pixel_values: torch.Tensor,
        schedule: BudgetSchedule,
        units: Units,
        num_keep: torch.Tensor | None,
        question: torch.Tensor | None,
    ) -> tuple[VisionFeatures, Selection]:
        """The tower's tokens, reduced on the way if the first step acts there."""
        return self._run_tower(pixel_values, units.is_token, schedule, units, num_keep, question)

    def _acts_in_tower(self, schedule: BudgetSchedule, units: Units, num_keep: torch.Tensor | None) -> bool:
        """Whether tokens leave, or have gates, inside the tower."""
        if schedule.steps[0].reducer.stage != "encoder":
            return False
        return self.runs_everything or not bool((num_keep == units.sizes).all())

    def _run_tower(
        self,
        pixel_values: torch.Tensor,
        is_token: torch.Tensor,
        schedule: BudgetSchedule,
        units: Units,
        num_keep: torch.Tensor | None,
        question: torch.Tensor | None,
    ) -> tuple[VisionFeatures, Selection]:
        """As `_encode`; `is_token` `[num_units, patches of the tower]` bool on the CPU says which are tokens."""
        size = self.config.vision_config.image_size
        if tuple(pixel_values.shape[-2:]) != (size, size):
            raise ValueError(
                f"`pixel_values` has images of {tuple(pixel_values.shape[-2:])} pixels; this model's images have "
                f"{size} pixels a side."
            )
        steps, first = schedule.steps, schedule.steps[0].reducer
        attention_layers = wanted_layers(steps)
        told = self._told_of_budget(schedule, units, question, input_device(self.tower, pixel_values))
        if not self._acts_in_tower(schedule, units, num_keep):
            features = encode_image(
                self.tower,
                pixel_values,
                self.config,
                **told,
                attention_layers=attention_layers,
                received_layers=wanted_layers(steps, "received"),
            )
            # What the tower makes beyond a unit's own tokens is none of them.
            is_token = is_token.to(features.positions.device)
            size = is_token.shape[1]
            positions = features.positions[:, :size].masked_fill(~is_token, -1)
            features = replace(features, patches=features.patches[:, :size], positions=positions, num_patches=size)
            return features, Selection(is_token, positions)
        if attention_layers:
            raise ValueError(
                f"{steps[0].name!r} changes the tokens inside the tower, and another reducer of this stack reads the "
                "attention of the whole tower; use one of them."
            )
        return reduce_in_tower(self.tower, first, pixel_values, self.config, num_keep, is_token, **told)

    def _told_of_budget(
        self, schedule: BudgetSchedule, units: Units, question: torch.Tensor | None, device: torch.device
    ) -> dict[str, Any]:
        """What the budget token is made of, as [`encode_image`] takes it; nothing where the budget takes no part."""
        fraction, takes_part = self._budget_fraction(schedule, units)
        if not takes_part:
            return {}
        asked = self.budget_token.question_proj
        if asked is None:
            question = None
        elif question is None:
            question = torch.zeros(len(fraction), asked.in_features, dtype=asked.weight.dtype, device=device)
        return {"budget_token": self.budget_token, "budget": fraction.to(device), "question": question}

    def _budget_fraction(self, schedule: BudgetSchedule, units: Units) -> tuple[torch.Tensor | None, bool]:
        """
        The share of tokens `[num_units]` that the reducer which meets the budget leaves, and whether the budget takes
        part at all. In training it does whatever its value, and where every rank of a sharded model runs the same.
        """
        asking = [number for number, step in enumerate(schedule.steps) if "budget" in step.reducer.needs]
        if not asking:
            return None, False
        # Steps before it are taken to leave what they are told to; a rule of their own may differ a little.
        planned = self.budget_of_units(schedule, units)
        left = units.sizes
        for step in schedule.steps[: asking[0] + 1]:
            count = planned.of_step(step, left)
            left = left if count is None else count
        keeps_everything = not self.runs_everything and bool((left == units.sizes).all())
        fraction = (left.double() / units.sizes).float()
        return fraction, self._patches_see_budget or not keeps_everything

    def _projected(self, features: VisionFeatures, with_tower_patches: bool) -> VisionFeatures:
        """The tokens, and CLS, in the decoder's space."""
        cls = None if features.cls is None else self.projector(features.cls)
        patches, tower_patches = self.projector(features.patches), features.patches if with_tower_patches else None
        return replace(features, patches=patches, cls=cls, tower_patches=tower_patches).to(features.positions.device)


def wanted_layers(steps: list[Step], need: str = "attention") -> list[int]:
    """The tower layers whose attention a stack reads, or of which it needs how much each token receives."""
    reading = [step.reducer for step in steps if need in step.reducer.needs]
    return sorted({layer for reducer in reading for layer in reducer.attention_layers})


def tokens_left(features: VisionFeatures) -> torch.Tensor:
    """`[num_units, N]` bool, the places at which a token is left."""
    is_left = features.positions >= 0
    left = torch.zeros(len(is_left), features.num_patches + 1, dtype=torch.bool, device=is_left.device)
    return left.scatter(1, features.positions.masked_fill(~is_left, features.num_patches), True)[:, :-1]
