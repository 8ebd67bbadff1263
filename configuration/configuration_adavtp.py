"""What an AdaVTP checkpoint says about itself: its family's configuration, and what a token budget adds."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import LlavaConfig

from .scheduler_settings import SchedulerSettings

VISION_TOWERS_WITH_CLS = {"clip_vision_model": True, "siglip_vision_model": False, "dinov2": True}


ConfigClass = TypeVar("ConfigClass", bound=type)


def with_value_errors(config_class: ConfigClass) -> ConfigClass:
    """Makes a value that a strict field refuses a `ValueError`, as it is everywhere else, here and on assignment."""
    set_checked = config_class.__setattr__

    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            set_checked(self, name, value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"`{name}` is {value!r}. {error.__cause__}.") from error

    config_class.__setattr__ = __setattr__
    return config_class


def reducer_entries(reducers: Any) -> list[str | dict[str, Any]]:
    """
    Reducers as they are written down: names, and dictionaries of a name and parameters.

    Args:
        reducers: one such entry, or a list of them.

    Raises:
        ValueError: if it is something else, or a name comes twice.
    """
    entries = [reducers] if isinstance(reducers, str | dict) else reducers
    if not isinstance(entries, list | tuple) or not all(
        isinstance(entry, str) or (isinstance(entry, dict) and isinstance(entry.get("name"), str)) for entry in entries
    ):
        raise ValueError(
            f"`reducers` is {reducers!r}; allowed are a name, a dictionary with 'name' and parameters, or a list of "
            "these."
        )
    names = [entry if isinstance(entry, str) else entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        raise ValueError(f"`reducers` is {reducers!r}; a reducer can act once.")
    # A dictionary without parameters says no more than its name.
    return [
        entry if isinstance(entry, str) or len(entry) > 1 else name for entry, name in zip(entries, names, strict=True)
    ]


def chosen_entries(reducers: Any) -> list[str | dict[str, Any]]:
    """What is to reduce, see [`reducer_entries`]; there is always something."""
    entries = reducer_entries(reducers)
    if not entries:
        raise ValueError("`reducer` is an empty list; name a reducer, and for all tokens say token_budget=1.0.")
    return entries


@dataclass(kw_only=True)
class BudgetFields:
    r"""
    The fields that a token budget adds to a family's configuration, in front of which this class stands.

    Args:
        token_budget (`float` or `int`, *optional*, defaults to 1.0):
            The budget where a call names none: a float in [0, 1] is the fraction of an image's visual tokens that the
            decoder sees, an int >= 2 is a number of tokens.
        depth_budget (`float` or `int`, *optional*, defaults to 1.0):
            The share, or with an int the number, of the decoder's layers that run where a call does not say.
        width_budget (`float` or `int`, *optional*, defaults to 1.0):
            The share of attention heads and MLP channels that run in these layers where a call does not say; as an
            int, a number of heads.
        compute_allocation (`str` or `dict`, *optional*, defaults to `"proportional"`):
            How the dials share a compute budget where a call does not say: `"tokens"`, `"depth"`, `"width"` or several
            with a plus between them are turned to the same share, `"proportional"` are all that can be turned;
            `{"depth": 0.7, "width": 0.8}` fixes these two, and tokens are what is left.
        scheduler (`dict` or `str`, *optional*):
            What chooses the decoder's units under these two budgets: the fields of [`SchedulerSettings`], or a preset,
            `"adallava-l"` or `"adallava-h"`. `None`: the model has no scheduler.
        untrained_scheduler (`bool`, *optional*, defaults to `False`):
            Whether the scheduler still has the random weights that it began with. It then refuses to choose, except
            in training.
        unit_weights (`"size"`, `"attention"` or `"novelty"`, *optional*, defaults to `"size"`):
            By what images, tiles and frames share the tokens of `token_budget={"prompt": n}` where it does not say.
            `"size"`: their numbers of tokens. `"attention"`: half of a picture's tokens for the whole view, the rest
            for its tiles by how many of the whole view's most attended tokens lie in each (HiRED, arXiv 2408.10945).
            `"novelty"`: what is not in the frame before.
        reducers (`list`, *optional*, defaults to `["adaptive"]`):
            The registered reducers that choose the tokens, one after another: names, or dictionaries of a name and
            parameters, `{"name": "fastv", "layer": 2}`. `"adaptive"` is the learned controller. `reducer="fastv"` says
            the same as `reducers=["fastv"]`.
        trained_reducers (`list`, *optional*, defaults to `[]`):
            Further reducers whose weights are in this checkpoint and can be chosen without being `reducers`, in the
            same form.
        min_token_entropy (`float`, *optional*, defaults to 0.0):
            For reducers that score tokens: while the entropy of the kept tokens' scores is below this share of its
            maximum, further tokens are kept, beyond the budget. From 0 (off) to 1.
        budget_fusion (`"encoder"` or `"post"`, *optional*, defaults to `"encoder"`):
            Where budget and image meet. `"encoder"`: a budget token goes through the vision tower's layers beside the
            patches. `"post"`: the tower is untouched and one cross-attention with the budget as query follows it.
        budget_attention (`"read_only"` or `"mutual"`, *optional*, defaults to `"read_only"`):
            Only for `budget_fusion="encoder"`. `"read_only"`: the budget token sees every token and none sees it, so
            patch features stay those of the tower alone. `"mutual"`: every token sees every token.
        budget_token_place (`"last"` or `"first"`, *optional*, defaults to `"last"`):
            Where in the tower's sequence the budget token stands.
        budget_position (`"learned"` or `"last_patch"`, *optional*, defaults to `"learned"`):
            The budget token's position vector: one of its own, or the last patch's reused.
        question_aware (`bool`, *optional*, defaults to `True`):
            Whether the mean embedding of the prompt's text joins the budget embedding.
        question_norm (`bool`, *optional*, defaults to `False`):
            Whether that mean is normalised (LayerNorm without weights) before it joins. The mean embeddings of two
            questions differ by about a hundredth of what a tower's hidden states measure, so that without it the
            choice learns to depend on the question only slowly. `False` is what checkpoints from before the field
            were trained with.
        controller_head (`str`, *optional*, defaults to `"patch_budget"`):
            How the controller scores a patch, one of `"budget_token"`, `"patch"`, `"patch_budget"`, `"dot"`,
            `"late_interaction"`, `"cross_attention"`. The first four know of the question what the budget token does,
            if `question_aware`; the last two read it word by word, whether the budget token does or not.
        controller_choice (`"best"`, `"spread"` or `"mmr"`, *optional*, defaults to `"best"`):
            What a controller that is not in training keeps. `"best"`: the K best scores. `"spread"`: of a larger
            number of good scores those that are most unlike each other. `"mmr"`: one after another the token whose
            score, less its likeness to what is kept, is largest (maximal marginal relevance).
        controller_mmr_lambda (`float`, *optional*, defaults to 0.5):
            Only for `controller_choice="mmr"`: from 0, likeness alone, to 1, the score alone.
        controller_estimator (`"straight_through"` or `"differentiable_top_k"`, *optional*, defaults to
            `"straight_through"`):
            How the choice gets its gradient in training. `"straight_through"`: K tokens are drawn by their scores, and
            the gates of the choice are 0 or 1 forward and soft backward. `"differentiable_top_k"`: nothing is drawn
            and no token leaves; gates between 0 and 1, whose sum is K, weigh them all, and a term of the loss, whose
            weight [`AdaVTPTrainer`] raises during training, makes the gates decide (VisionSelector,
            arXiv 2510.16598).
        controller_temperature (`float`, *optional*, defaults to 1.0):
            Temperature of the gates of the choice: of their gradient, and with `"differentiable_top_k"` of their
            values. Larger is smoother.
        untrained_controller (`bool`, *optional*, defaults to `False`):
            Whether the controller still has the random weights that it began with, as it does where a checkpoint has
            none for it, until it is trained. It then refuses to choose, except in training.
        gradient_gates (`"attention"` or `"features"`, *optional*, defaults to `"attention"`):
            Where the gates of the choice act in training, and so what its gradient asks. `"attention"`: a gate
            multiplies the attention that its token gets in every decoder layer, as in DynamicViT (arXiv 2106.02034);
            the gradient says what a kept token is worth and what a dropped one would have been. All tokens stay in
            the sequence for it. `"features"`: a gate moves its token's feature towards the image's mean feature, in
            whichever form `selection_output` says; the gradient knows nothing of dropped tokens. A gate between 0
            and 1 multiplies what the decoder gets of its token, and all stay.
        selection_output (`"gather"` or `"mask"`, *optional*, defaults to `"gather"`):
            `"gather"`: dropped tokens leave the sequence. `"mask"`: they stay, zeroed and hidden from attention, so
            that shapes and the order of execution do not depend on the budget.
        visual_position_ids (`"original"` or `"compact"`, *optional*, defaults to `"original"`):
            `"original"`: every surviving token keeps the rotary position it has in the full prompt. `"compact"`:
            positions are counted again without the dropped tokens.
        visual_attention (`"plain"` or `"rescaled"`, *optional*, defaults to `"plain"`):
            `"rescaled"`: while a prompt is read of which visual tokens were dropped, attention to those that are left
            is raised by how many they stand for and by how far away they are (RESTORE, arXiv 2606.01711), whatever
            the reducer. It needs a decoder in which reducers can act, and `"eager"` or `"sdpa"` attention.

    Raises:
        ValueError: if a field has a value that is not allowed.
    """

    # What `transformers.Trainer` leaves out of a model's predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "image_hidden_states",
        "selection",
        "labels",
    ]

    # Whether a tower without CLS ranks its tokens by the attention that they receive, and whether reducers may run the
    # tower's layers.
    ranks_by_received = False
    opens_tower = True

    token_budget: float | int = 1.0
    depth_budget: float | int = 1.0
    width_budget: float | int = 1.0
    compute_allocation: Any = "proportional"
    scheduler: Any = None
    untrained_scheduler: bool = False
    unit_weights: Literal["size", "attention", "novelty"] = "size"
    reducers: list[Any] | None = None
    trained_reducers: list[Any] | None = None
    min_token_entropy: float | int = 0.0
    budget_fusion: Literal["encoder", "post"] = "encoder"
    budget_attention: Literal["read_only", "mutual"] = "read_only"
    budget_token_place: Literal["last", "first"] = "last"
    budget_position: Literal["learned", "last_patch"] = "learned"
    question_aware: bool = True
    question_norm: bool = False
    controller_head: Literal["budget_token", "patch", "patch_budget", "dot", "late_interaction", "cross_attention"] = (
        "patch_budget"
    )
    controller_choice: Literal["best", "spread", "mmr"] = "best"
    controller_mmr_lambda: float | int = 0.5
    controller_estimator: Literal["straight_through", "differentiable_top_k"] = "straight_through"
    controller_temperature: float | int = 1.0
    untrained_controller: bool = False
    gradient_gates: Literal["attention", "features"] = "attention"
    selection_output: Literal["gather", "mask"] = "gather"
    visual_position_ids: Literal["original", "compact"] = "original"
    visual_attention: Literal["plain", "rescaled"] = "plain"

    def __post_init__(self, **kwargs: Any) -> None:
        reducer = kwargs.pop("reducer", None)
        super().__post_init__(**kwargs)
        if reducer is not None:
            if self.reducers not in (None, chosen_entries(reducer)):
                raise ValueError(f"`reducer` is {reducer!r} and `reducers` is {self.reducers!r}; give one of them.")
            self.reducers = chosen_entries(reducer)
        self.reducers = chosen_entries(["adaptive"] if self.reducers is None else self.reducers)
        self.trained_reducers = reducer_entries(self.trained_reducers or [])
        for share in ("min_token_entropy", "controller_mmr_lambda"):
            if not 0.0 <= getattr(self, share) <= 1.0:
                raise ValueError(f"`{share}` is {getattr(self, share)}; allowed are 0 to 1.")
        if not 0 < self.controller_temperature < math.inf:
            raise ValueError(
                f"`controller_temperature` is {self.controller_temperature}; it must be above 0 and finite."
            )
        for dial, units in (
            ("token_budget", "visual tokens that are kept"),
            ("depth_budget", "layers that run"),
            ("width_budget", "heads and MLP channels that run"),
        ):
            budget = getattr(self, dial)
            if not (0.0 <= budget <= 1.0 if isinstance(budget, float) else budget >= 2):
                raise ValueError(
                    f"`{dial}` is {budget!r}; allowed are a float in [0, 1], the fraction of {units}, and an int >= "
                    "2, their number."
                )
        if self.scheduler is not None:
            SchedulerSettings.of_config(self.scheduler, self.get_text_config())

    @property
    def reducer(self) -> str:
        """The reducers' names, joined by ", "."""
        return ", ".join(entry["name"] if isinstance(entry, dict) else entry for entry in self.reducers)

    @reducer.setter
    def reducer(self, reducer: str | dict[str, Any] | list[Any]) -> None:
        self.reducers = chosen_entries(reducer)


@with_value_errors
@strict
class AdaVTPConfig(BudgetFields, LlavaConfig):
    r"""
    Configuration of an AdaVTP model. Every field of [`LlavaConfig`] keeps its name and meaning, so the configuration
    of a LLaVA-1.5-format checkpoint is a valid AdaVTP configuration. What a budget adds is said in [`BudgetFields`].

    Args:
        keep_cls (`bool`, *optional*):
            Whether the tower's CLS token stands in front of the kept patches. It needs a tower with a CLS token and
            `vision_feature_select_strategy="full"`, which is also what makes the processor leave room for it; by
            default it follows from these two.

    Raises:
        ValueError: if a field has a value that is not allowed, or the vision tower is not a supported one.
    """

    model_type = "adavtp"

    keep_cls: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # A LLaVA folder's own model_type would become an instance attribute that hides the class's.
        kwargs.pop("model_type", None)
        super().__post_init__(**kwargs)
        has_cls = VISION_TOWERS_WITH_CLS.get(self.vision_config.model_type)
        if has_cls is None:
            raise ValueError(
                f"`vision_config.model_type` is {self.vision_config.model_type!r}; supported vision towers: "
                f"{', '.join(VISION_TOWERS_WITH_CLS)}."
            )
        cls_is_a_visual_token = has_cls and self.vision_feature_select_strategy == "full"
        if not has_cls and self.vision_feature_select_strategy == "default":
            raise ValueError(
                "`vision_feature_select_strategy` is 'default', which cuts off a CLS token, but a "
                f"{self.vision_config.model_type!r} tower has none; use 'full'."
            )
        if self.keep_cls is None:
            self.keep_cls = cls_is_a_visual_token
        if self.keep_cls != cls_is_a_visual_token:
            raise ValueError(
                f"`keep_cls` is {self.keep_cls}, `vision_feature_select_strategy` is "
                f"{self.vision_feature_select_strategy!r} and the tower has {'a' if has_cls else 'no'} CLS token; "
                "keep_cls=True needs a CLS token and 'full', keep_cls=False needs 'default' or a tower without CLS."
            )

    @property
    def has_cls(self) -> bool:
        """Whether the vision tower has a CLS token."""
        return VISION_TOWERS_WITH_CLS[self.vision_config.model_type]

    @property
    def visual_width(self) -> int:
        """Width of a visual token where reducers see it: the tower's, times the number of feature layers."""
        layers = self.vision_feature_layer
        return self.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers))

    @property
    def budget_width(self) -> int:
        """Width of the vector that carries the budget, and of what the controller compares."""
        return self.vision_config.hidden_size

    @property
    def budget_heads(self) -> int:
        """Attention heads with which that vector reads the image."""
        return self.vision_config.num_attention_heads

    @property
    def num_tower_layers(self) -> int:
        """Layers of the vision tower."""
        return self.vision_config.num_hidden_layers

    @property
    def num_patches(self) -> int:
        """Patches of one image, N: what a token budget is a fraction of."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def num_image_tokens(self) -> int:
        """Placeholder tokens of one image in a prompt: its patches, and CLS where it is kept."""
        return self.num_patches + int(self.keep_cls)


__all__ = ["AdaVTPConfig"]
