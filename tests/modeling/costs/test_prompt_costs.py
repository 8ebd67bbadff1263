"""What prompts of a batch cost: whose images are whose, how many tokens were new, and what is not known."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from PIL import Image

from adavtp import AdaVTPConfig, Selection, TokenReducer, VisionFeatures, register_reducer
from adavtp.evaluation.continuations import continued
from adavtp.evaluation.prompt_costs import CountedFlops, num_new_tokens, prompt_costs, selections_of_prompts
from adavtp.evaluation.settings import Setting
from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.families.adapters import adapter_of
from adavtp.modeling.processing_adavtp import inputs_of_questions
from adavtp.modeling.reducers.base import REDUCERS
from counted_flops import all_that_torch_counts
from repository import DIGITS
from tiny_families import FAMILIES, Writer, batch_of, budgeted, family_config, ragged_prompts
from tiny_processors import family_model, family_processor

END, PADDING = 2, 0


@pytest.mark.parametrize(
    ("row", "ends", "padding", "length"),
    [
        ([5, 6, 7, 8], END, None, 4),
        ([5, 6, END, PADDING], END, None, 3),
        ([5, END, 6, END], END, None, 2),
        ([END, PADDING, PADDING, PADDING], END, None, 1),
        ([5, 9, 6, END], [END, 9], None, 2),
        ([5, END, 6, 7], None, None, 4),
        # A word like any other, unless rows may end without the end of text.
        ([5, PADDING, 6, 7], END, None, 4),
        ([5, 6, PADDING, PADDING], END, PADDING, 2),
        ([5, END, PADDING, PADDING], END, PADDING, 2),
        ([5, END, END, END], END, END, 2),
    ],
)
def test_new_tokens_are_those_up_to_the_end(
    row: list[int], ends: int | list[int] | None, padding: int | None, length: int
) -> None:
    others = [[5, 6, 7, 8], row, [END, 5, 5, 5]]
    assert num_new_tokens(torch.tensor(others), ends, padding)[1] == length


@pytest.fixture
def config() -> AdaVTPConfig:
    return AdaVTPConfig.from_pretrained(DIGITS)


def kept_of_each(config: AdaVTPConfig, *num_keep: int) -> Selection:
    patches = torch.arange(config.num_patches)
    return Selection.from_keep(patches < torch.tensor(num_keep)[:, None])


def prompts_of(config: AdaVTPConfig, text_tokens: list[int], num_images: list[int]) -> dict[str, torch.Tensor]:
    """Placeholders and words, padded on the left."""
    rows = [
        [config.image_token_id] * config.num_patches * images + [config.image_token_id + 1] * text
        for text, images in zip(text_tokens, num_images, strict=True)
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([[config.image_token_id + 1] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def test_every_prompt_pays_for_its_own_images_and_words(config: AdaVTPConfig) -> None:
    setting = Setting("adaptive", 0.4)
    kept = kept_of_each(config, 40, 50, 60)
    kept.sample = torch.tensor([0, 2, 2])
    selections = selections_of_prompts(kept, 3)
    inputs = prompts_of(config, [10, 12, 14], [1, 0, 2])
    costs = prompt_costs(CountedFlops(config, setting), inputs, selections, [3, 1, 2], 0.6)
    assert [cost.num_keep for cost in costs] == [(40,), (), (50, 60)]
    assert [cost.visual_tokens for cost in costs] == [40.0, 0.0, 55.0]
    assert [cost.seen_tokens for cost in costs] == [50.0, 12.0, 124.0]
    assert [cost.text_tokens for cost in costs] == [10, 12, 14]
    assert [cost.milliseconds for cost in costs] == pytest.approx([200.0] * 3)
    given = {"token_budget": 0.4, "reducer": "adaptive"}
    counted = ModelCosts.of(config)
    both = counted.of_selection(kept_of_each(config, 50, 60), 14, **given)
    none = counted.of_prompt(12, **given, num_images=0)
    assert (costs[2].flops, costs[1].flops) == (both.with_new_tokens(2), none.with_new_tokens(1))


def test_a_batch_without_images_has_no_selection() -> None:
    assert selections_of_prompts(None, 2) == [None, None]


class CannotRun(TokenReducer):
    """A user's reducer that cannot be run to be counted."""

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        raise NotImplementedError


@pytest.fixture
def uncounted() -> Iterator[str]:
    register_reducer("cannot_run")(CannotRun)
    yield "cannot_run"
    del REDUCERS["cannot_run"]


def test_an_unknown_cost_is_an_error_or_said_to_be_unknown(config: AdaVTPConfig, uncounted: str) -> None:
    setting, selection = Setting(uncounted, 0.5), kept_of_each(config, 72)
    with pytest.raises(ValueError, match="cannot_run"):
        CountedFlops(config, setting).of(9, selection)
    inputs = prompts_of(config, [9], [1])
    (cost,) = prompt_costs(CountedFlops(config, setting, may_be_unknown=True), inputs, [selection], [1], 0.1)
    assert cost.flops is None and cost.num_keep == (72,)


@pytest.mark.parametrize("setting", [Setting("grid", 0.4), Setting({"name": "fastv", "layer": 1}, 0.75)])
@pytest.mark.parametrize("name", ["idefics3", "internvl"])
def test_tiles_cost_what_the_image_costs_that_they_are_of(name: str, setting: Setting) -> None:
    processor = family_processor(name)
    model = family_model(name, processor).eval()
    inputs = inputs_of_questions(processor, Image.new("RGB", (96, 96), "white"), "how many ?")
    (answer,) = continued(model, processor, inputs, CountedFlops(model.config, setting), max_new_tokens=1)
    # The processor makes 2 x 2 tiles of 48 pixels a side of it, and a view of the whole.
    assert answer.cost.num_images == 5 and answer.cost.visual_tokens < 5 * 16
    whole = ModelCosts.of(model.config, (96, 96)).of_prompt(answer.cost.text_tokens, **setting.arguments())
    assert answer.cost.flops == whole.total
    assert answer.cost.seen_tokens == pytest.approx(sum(whole.layer_tokens) / len(whole.layer_tokens))


@pytest.mark.parametrize("name", [name for name in FAMILIES if adapter_of(family_config(name)).units_differ])
def test_what_a_processor_returns_says_the_sizes_that_it_was_given(name: str) -> None:
    config, sizes = family_config(name), [(48, 32), (32, 64)]
    family = adapter_of(config)
    assert family.image_sizes(config, family.image_inputs(config, sizes)) == sizes


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "mistral3", "gemma4"])
def test_prompts_of_images_that_differ_cost_what_torch_counts_of_each_alone(name: str) -> None:
    model, prompts, setting = budgeted(name), ragged_prompts(name), Setting("divprune", 0.5)
    inputs = batch_of(name, prompts)
    selections = selections_of_prompts(model(**inputs, **setting.arguments()).selection, len(prompts))
    costs = prompt_costs(CountedFlops(model.config, setting), inputs, selections, [1] * len(prompts), 0.1)
    for prompt, cost in zip(prompts, costs, strict=True):
        alone = batch_of(name, [prompt])
        run = partial(
            model, **alone, **(setting.arguments() if prompt.images else {}), logits_to_keep=1, use_cache=True
        )
        assert cost.flops == pytest.approx(all_that_torch_counts(run), rel=1e-2)


def test_prompts_of_videos_are_not_counted() -> None:
    model, prompts = (
        budgeted("qwen2_5_vl"),
        [Writer("qwen2_5_vl").prompt(videos=[(2, 2, 2)]), Writer("qwen2_5_vl").prompt()],
    )
    inputs, setting = batch_of("qwen2_5_vl", prompts), Setting("divprune", 0.5)
    selections = selections_of_prompts(model(**inputs, **setting.arguments()).selection, 2)
    costs = prompt_costs(CountedFlops(model.config, setting), inputs, selections, [1, 1], 0.1)
    assert costs[0].flops is None and costs[1].flops > 0
