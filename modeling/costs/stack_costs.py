"""What it costs to look at images and to choose from them, for one stack of reducers.

The model's own code runs once for each budget and each size of images, up to where the last choice is made.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.utils import ModelOutput

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.schedule import StackBudget
from ..budget.selection import Selection
from ..decoder.reducer import DecoderReducer
from ..families.llava import LLAVA
from ..reducers.aim import merged_count
from ..reducers.base import ScoringReducer
from .counting import flops_by_part, visual_modules, weights_on_parabola
from .weightless import (
    Looks,
    ProductsAreNoise,
    family_prompt,
    looks_of,
    noise_prompts,
    weightless_model,
    with_budget_in,
)

# Height and width of each image of a prompt in pixels; LLaVA's images have one size, `None`.
ImageSizes = tuple[tuple[int, int] | None, ...]
# Nothing is chosen and everything is kept. At the full budget a reducer is not asked, and the one that stands for it
# reads nothing, so that nothing is prepared for it either.
FULL, NEVER_ASKED = "full", "grid"
# Prompts of so many text tokens are run; what a reducer that reads text spends on others lies on the parabola.
_TEXTS = (8, 16, 32)


@dataclass(frozen=True)
class VisualTokens:
    """
    The visual tokens of a prompt in numbers.

    Attributes:
        sizes: of each unit, N.
        num_keep: of each unit, those that reach the decoder.
        of_layers: of all units together, those that each decoder layer sees.
        others: separators, which stay.
    """

    sizes: tuple[int, ...]
    num_keep: tuple[int, ...]
    of_layers: tuple[int, ...]
    others: int = 0

    @classmethod
    def chosen(cls, selection: Selection | None, num_layers: int, others: int = 0) -> "VisualTokens":
        """Tokens never come back, so layer l saw those whose depth is more than l."""
        if selection is None:
            return cls((), (), (0,) * num_layers)
        num_keep, sizes = tuple(selection.num_keep.tolist()), tuple(selection.sizes.tolist())
        if selection.depth is None:
            return cls(sizes, num_keep, (sum(num_keep),) * num_layers, others)
        ends = torch.bincount(selection.depth.cpu().flatten(), minlength=num_layers + 1)
        return cls(sizes, num_keep, tuple((ends.sum() - ends.cumsum(dim=0)[:num_layers]).tolist()), others)

    def falls_before(self, layer: int) -> bool:
        """Whether a decoder layer, 1 or above, sees fewer than the one below."""
        return self.of_layers[layer] < self.of_layers[layer - 1]

    @property
    def mean(self) -> float:
        """Of a unit, that a decoder layer sees: mean over layers and units; 0 without any."""
        return sum(self.of_layers) / (len(self.of_layers) * len(self.sizes)) if self.sizes else 0.0


class _Reached(Exception):  # noqa: N818
    """The layer before which everything was chosen."""


class StackCosts:
    """
    What choosing costs, for one stack of reducers.

    Args:
        config: the model's.
        entries: of the stack, as the configuration holds them.
        encoded: what the family made of images of each size, and what was spent on it; for all stacks together.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        entries: list[str | dict[str, Any]],
        encoded: dict[ImageSizes, tuple[ModelOutput, Counter]],
    ) -> None:
        self.config, self.is_llava, self._encoded = config, isinstance(config, AdaVTPConfig), encoded
        # A floor on the entropy adds tokens to noise; how many it adds to an image is what a selection says.
        self.model = weightless_model(
            config,
            reducers=entries,
            trained_reducers=[],
            min_token_entropy=0.0,
            selection_output="gather",
            **({"image_token_id": 0} if self.is_llava else {}),
        )
        self.inner = with_budget_in(self.model)
        self.steps = self.inner.steps()
        self._looks: dict[ImageSizes, Looks] = {}
        self.decoder = self.steps[-1] if self.steps[-1].reducer.stage == "decoder" else None
        self.before = self.steps[: len(self.steps) - (self.decoder is not None)]
        self._runs: dict[Any, Counter] = {}
        self._plans: dict[Any, VisualTokens] = {}
        self._asked: dict[Any, set[int]] = {}
        if self.decoder is not None:
            _leave_out_what_is_not_read(self.model.get_decoder().layers, self.decoder.reducer)

    def looks(self, images: ImageSizes) -> Looks:
        """What such images are to the model."""
        if images not in self._looks:
            if self.is_llava:
                sizes = (LLAVA.tokens_per_image(self.config),) * len(images)
                self._looks[images] = Looks(sizes, len(images) * int(self.config.keep_cls), {})
            else:
                self._looks[images] = looks_of(self.model, images) if images else Looks((), 0, {})
        return self._looks[images]

    def planned(self, token_budget: StackBudget | None, images: ImageSizes) -> VisualTokens:
        """How many tokens go where, by the model's own rules."""
        key = (written(token_budget), images)
        if key not in self._plans:
            self._plans[key] = self._planned(token_budget, images)
        return self._plans[key]

    def _planned(self, token_budget: StackBudget | None, images: ImageSizes) -> VisualTokens:
        num_layers = self.config.get_text_config().num_hidden_layers
        schedule, looks = self.inner.resolve_budget(token_budget, None, 1), self.looks(images)
        sizes = torch.tensor(looks.sizes, dtype=torch.long)
        budget = schedule.of_units(torch.zeros_like(sizes), sizes)
        entering = sizes
        for step in self.before:
            entering = self._leaving(step, entering, budget.of_step(step, entering))
        visual, of_layers = int(entering.sum()), None
        if self.decoder is not None and visual:
            mean = budget.of_step(self.decoder, entering)
            keep = None if mean is None else int(mean.sum())
            if (keep is None or keep < visual) and self.decoder.reducer.adapts:
                raise _not_known(self.decoder.name, "each prompt has a schedule of its own, by what is seen of it")
            if keep is None or keep < visual:
                of_layers = tuple(self.decoder.reducer.layer_counts(visual, keep, num_layers))
        of_layers = of_layers or (visual,) * num_layers
        return VisualTokens(looks.sizes, tuple(entering.tolist()), of_layers, looks.others)

    def _leaving(self, step: Any, entering: torch.Tensor, wanted: torch.Tensor | None) -> torch.Tensor:
        reducer, reason = step.reducer, None
        if wanted is None and hasattr(reducer, "share"):
            return torch.tensor([merged_count(tokens, reducer.share) for tokens in entering.tolist()]).long()
        if wanted is None:
            reason = "`token_budget` is None, and its own rule looks at the image"
        elif bool((wanted < entering).any()):
            if isinstance(reducer, ScoringReducer) and self.config.min_token_entropy > 0:
                reason = f"`min_token_entropy` is {self.config.min_token_entropy}, which may add some"
            elif reducer.redistributes and len(entering) > 1:
                reason = "it moves tokens between the images of a prompt"
        if reason is None:
            return wanted
        raise _not_known(step.name, reason)

    def spent(
        self, token_budget: StackBudget | None, images: ImageSizes, text_tokens: int, tokens: VisualTokens
    ) -> Counter:
        """The tower, the projector, and under `None` what choosing costs."""
        if not images:
            return Counter()
        leaves_inside = self.decoder is not None and tokens.of_layers[-1] < tokens.of_layers[0]
        is_rescaled = self.config.visual_attention == "rescaled"
        reads_words = any("question_tokens" in step.reducer.needs for step in self.before)
        if not leaves_inside and not is_rescaled and not reads_words:
            return self._run(token_budget, images, _TEXTS[0], 0)
        stop = self.decoder.reducer.cuts(len(tokens.of_layers))[-1] if leaves_inside else 0
        if is_rescaled:
            # Wherever columns leave, attention among those that are left is rescaled anew.
            falls = (layer for layer in range(1, len(tokens.of_layers)) if tokens.falls_before(layer))
            stop = max(stop, *falls, 0)
        asked = (written(token_budget), images)
        return self._on_parabola(asked, text_tokens, _TEXTS, lambda text: self._run(token_budget, images, text, stop))

    def _on_parabola(self, asked: Any, place: int, places: Sequence[int], run: Callable[[int], Counter]) -> Counter:
        """Run for the first places that are asked for; for all others what choosing costs lies on the parabola."""
        counted = self._asked.setdefault(asked, set())
        if place in counted or len(counted) < len(places) - 1:
            counted.add(place)
            return run(place)
        runs = [run(number) for number in places]
        weighted = zip(weights_on_parabola(place, places), runs, strict=True)
        return Counter({**runs[0], None: float(sum(weight * run[None] for weight, run in weighted))})

    def spent_on(
        self, tokens: VisualTokens, token_budget: StackBudget | None, text_tokens: int, images: ImageSizes
    ) -> Counter:
        """The same where the numbers of tokens are given."""
        if not tokens.sizes:
            return Counter()
        if tokens.sizes != (expected := self.looks(images).sizes):
            raise ValueError(
                f"`selection` is of {list(tokens.sizes)} visual tokens, and images of the size that is counted have "
                f"{list(expected)}; pass the `image_size` that they were of."
            )
        try:
            as_planned = self.planned(token_budget, images)
        except ValueError:
            as_planned = None
        if tokens == as_planned or (not self.is_llava and token_budget is not None):
            return self.spent(token_budget, images, text_tokens, tokens)
        names = list(dict.fromkeys(step.name for step in self.before))
        if len(names) > 1 and token_budget is None:
            raise ValueError(
                "`selection` says what a stack left, and not what its first reducers did; pass the `token_budget` too."
            )
        together = any(step.reducer.redistributes for step in self.before)
        if len(names) > 1 or (together and token_budget is not None):
            return self._with_projected(self.spent(token_budget, images, text_tokens, tokens), tokens)
        if not self.is_llava:
            # How many tokens stay of one image and of another changes little in what it costs to choose them.
            return self.spent({"prompt": sum(tokens.num_keep)}, images, text_tokens, tokens)
        whole: Counter = Counter()
        for size, keep in zip(tokens.sizes, tokens.num_keep, strict=True):
            whole += self._of_kept(size, keep, tokens, text_tokens)
        return self._with_projected(whole, tokens)

    def _of_kept(self, size: int, keep: int, tokens: VisualTokens, text_tokens: int) -> Counter:
        """A unit of which so many tokens stay: run for the first few numbers, others lie on the parabola."""
        names = {step.name for step in self.before}

        def run(number: int) -> Counter:
            budget = 1.0 if number >= size else 0.0 if number == 1 else number
            if self.decoder is not None and self.decoder.name not in names:
                # Beside that of the reducer before the decoder, the mean that was left inside it.
                budget = {**dict.fromkeys(names, budget), self.decoder.name: max(round(tokens.mean), 2)}
            return self.spent(budget, (None,), text_tokens, tokens)

        if self.decoder is not None:
            return run(keep)
        return self._on_parabola(size, keep, (size // 4, size // 2, 3 * size // 4), run)

    def _with_projected(self, spent: Counter, tokens: VisualTokens) -> Counter:
        """The projector gets rows as long as the longest, unless tokens are chosen behind it."""
        if any(step.reducer.stage == "projector" for step in self.before):
            return spent
        one = self._run(1.0, (None,), _TEXTS[0], 0)["projector"] / (tokens.sizes[0] + int(self.config.keep_cls))
        rows = len(tokens.sizes) * (max(tokens.num_keep) + int(self.config.keep_cls))
        return Counter({**spent, "projector": round(rows * one)})

    def _run(self, token_budget: StackBudget | None, images: ImageSizes, text_tokens: int, stop: int) -> Counter:
        """The model on a prompt, up to the decoder layer before which the last choice is made."""
        key = (written(token_budget), images, text_tokens, stop)
        if key not in self._runs:
            if self.is_llava:
                inputs = noise_prompts(self.config, [text_tokens], [len(images)])
                self._runs[key] = self._counted(inputs, token_budget, stop)
            else:
                inputs = family_prompt(self.model, self.looks(images), text_tokens)
                with self._encoded_once(images, token_budget) as spent:
                    self._runs[key] = self._counted(inputs, token_budget, stop) + spent
        return self._runs[key]

    def _counted(self, inputs: dict[str, Any], token_budget: StackBudget | None, stop: int) -> Counter:
        layers = self.model.get_decoder().layers
        parts = visual_modules(self.model) | {"prefill": list(layers)}

        def run() -> None:
            with contextlib.suppress(_Reached):
                self.inner(**inputs, token_budget=token_budget)

        hook = layers[stop].register_forward_pre_hook(_stop)
        try:
            return flops_by_part(run, parts, blind=("vision", "projector"))[1]
        except ValueError:
            raise
        except Exception as error:
            names = ", ".join(dict.fromkeys(step.name for step in self.steps))
            raise ValueError(
                f"`reducer` is {names!r}, and running it on noise to count it failed ({error!r})."
            ) from error
        finally:
            hook.remove()

    @contextlib.contextmanager
    def _encoded_once(self, images: ImageSizes, token_budget: StackBudget | None) -> Iterator[Counter]:
        """
        Lets a family encode images of each size once, for all stacks that read nothing inside the tower. Yields what
        was spent on it before, if it was.
        """
        reads = any(step.reducer.stage == "encoder" or "attention" in step.reducer.needs for step in self.before)
        if reads or self.config.budget_fusion == "encoder" or isinstance(token_budget, Mapping):
            yield Counter()
            return
        if images not in self._encoded:
            model = self.model

            def run() -> ModelOutput:
                return model.encoded("image", self.looks(images).inputs)

            made, spent = flops_by_part(run, visual_modules(model), blind=("vision", "projector"))
            # Of the real tensors some would take memory.
            self._encoded[images] = ProductsAreNoise().instead_of(made), spent
        made, spent = self._encoded[images]
        self.model.encoded = lambda *_: made
        try:
            yield spent
        finally:
            del self.model.encoded


def _not_known(name: str, reason: str) -> ValueError:
    return ValueError(
        f"How many tokens {name!r} keeps is not known before it has run: {reason}. Pass a `token_budget`, or the "
        "`selection` of what it kept."
    )


def _stop(*_: Any) -> None:
    raise _Reached


def written(token_budget: StackBudget | None) -> str:
    """A budget as a key."""
    if isinstance(token_budget, torch.Tensor):
        return f"{token_budget.dtype} {token_budget.tolist()}"
    return repr(token_budget)


def _leave_out_what_is_not_read(layers: nn.ModuleList, reducer: DecoderReducer) -> None:
    """Leaves of decoder layers those before a cut, whose keys a reducer may read, without their MLPs."""
    cuts = reducer.cuts(len(layers))
    for number, layer in enumerate(layers):
        if number + 1 in cuts:
            # Nothing that scores looks at what MLPs make of noise.
            layer.mlp = nn.Identity()
        else:
            layer.forward = partial(_pass_through, number)


def _pass_through(number: int, hidden_states: torch.Tensor, past_key_values: Cache | None, **_: Any) -> torch.Tensor:
    """In a decoder layer's place; its cache has as many columns, and nothing in them."""
    if past_key_values is not None:
        nothing = hidden_states.new_zeros(1, 1, hidden_states.shape[1], 1)
        past_key_values.update(nothing, nothing, number)
    return hidden_states
