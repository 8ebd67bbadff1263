"""FLOPs worked out by hand, what they are made of, and what is refused."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from adavtp import AdaVTPConfig, Selection, TokenReducer, register_reducer
from adavtp.modeling.costs.decoder import keys_over_steps
from adavtp.modeling.costs.model_costs import Costs, ModelCosts
from adavtp.modeling.costs.presets import preset_config
from adavtp.modeling.decoder.execution_plan import UnitShares
from adavtp.modeling.reducers.base import REDUCERS
from adavtp.modeling.vision.features import VisionFeatures
from counted_flops import BytesAlive, uneven_model

LLAVA = preset_config("llava-1.5-7b")
D, M, LAYERS, VOCABULARY = 4096, 11008, 32, 32000


def count_flops(config: AdaVTPConfig, text_tokens: int, **asked: Any) -> Costs:
    return ModelCosts.of(config).of_prompt(text_tokens, **asked)


def layer_visual_tokens(config: AdaVTPConfig, *asked: Any, num_images: int = 1) -> list[int]:
    return list(ModelCosts.of(config).visual_tokens(*asked, num_images=num_images).of_layers)


def decoder_by_hand(lengths: list[int]) -> float:
    """Sum over layers of 2 n (4 d^2 + 3 d m) + 4 n^2 d, and the head on one position."""
    return sum(2 * n * (4 * D**2 + 3 * D * M) + 4 * n**2 * D for n in lengths) + 2 * D * VOCABULARY


def test_llava_by_hand() -> None:
    counted = count_flops(LLAVA, 60, reducer="grid", token_budget=144)
    n, width, inner = 577, 1024, 4096
    layer = 8 * n * width**2 + 4 * n**2 * width + 4 * n * width * inner
    assert counted.vision == 2 * 576 * 3 * 14 * 14 * width + 23 * layer
    assert counted.reducer == 0
    assert counted.projector == 2 * 144 * (width * D + D * D)
    assert counted.prefill == decoder_by_hand([204] * LAYERS)
    assert counted.decode_per_token == LAYERS * (2 * (4 * D**2 + 3 * D * M) + 4 * 205 * D) + 2 * D * VOCABULARY
    assert counted.kv_bytes == LAYERS * 204 * 2 * D * 2
    assert counted.mean_visual_tokens == 144


def test_a_decoder_stage_reducer_by_hand() -> None:
    counted = count_flops(LLAVA, 60, reducer={"name": "fastv", "layer": 2, "ratio": 0.5})
    assert counted.prefill == decoder_by_hand([636] * 2 + [348] * 30)
    assert counted.reducer == 2 * D * D + 2 * D * 636
    assert counted.mean_visual_tokens == pytest.approx(306)


def test_counting_makes_no_weights_and_keeps_no_cache() -> None:
    counting = ModelCosts(LLAVA)
    with BytesAlive() as alive:
        for reducer in ("adaptive", "pyramiddrop"):
            counting.of_prompt(60, reducer=reducer, token_budget=0.5)
    # The model has 28 GB of them, and the keys and values of a prompt are two thirds of a GB in float32.
    assert alive.peak < 150e6


def test_totals_add_up_token_by_token() -> None:
    counted = count_flops(LLAVA, 60, reducer="fastv", token_budget=0.5, new_tokens=4)
    prefilled = counted.vision + counted.reducer + counted.projector + counted.prefill
    grows = LAYERS * 4 * D
    assert counted.with_new_tokens(1) == counted.with_new_tokens(0) == prefilled
    assert counted.with_new_tokens(4) == pytest.approx(prefilled + 3 * counted.decode_per_token + (1 + 2) * grows)
    assert counted.total == counted.with_new_tokens(4)
    with pytest.raises(ValueError, match="new_tokens"):
        counted.with_new_tokens(-1)


@torch.inference_mode()
def test_counting_is_the_same_in_inference_mode() -> None:
    config = uneven_model().config
    for reducer in ("adaptive", "fastv"):
        inside = ModelCosts(config).of_prompt(9, reducer=reducer, token_budget=0.5)
        with torch.inference_mode(False):
            assert inside == ModelCosts(config).of_prompt(9, reducer=reducer, token_budget=0.5)


@pytest.mark.parametrize("window", [None, 3, 10, 12, 13, 20, 100])
def test_steps_attend_to_one_column_more_up_to_the_window(window: int | None) -> None:
    for steps in range(12):
        one_by_one = [10 + step if window is None else min(10 + step, window) for step in range(1, steps + 1)]
        assert keys_over_steps(10, steps, window) == sum(one_by_one)


def test_visual_tokens_of_layers_have_the_mean_that_the_budget_says() -> None:
    for reducer in ("fastv", "vtw", "pyramiddrop", "sparsevlm", "depth", "aim", "grid", ["tome", "fastv"]):
        seen = layer_visual_tokens(LLAVA, reducer, 345)
        assert len(seen) == LAYERS
        assert sum(seen) == 345 * LAYERS
    assert layer_visual_tokens(LLAVA, "fastv", 0.5)[:3] == [576, 576, 269]
    assert layer_visual_tokens(LLAVA, "full", num_images=2) == [1152] * LAYERS


def test_an_execution_plan_runs_a_share_of_each_layer() -> None:
    whole = count_flops(LLAVA, 60, reducer="full")
    half = count_flops(
        LLAVA, 60, reducer="full", plan=UnitShares((1.0,) * 16 + (0.0,) * 16, (1.0,) * 16 + (0.0,) * 16)
    )
    head = 2 * D * VOCABULARY
    assert half.prefill - head == (whole.prefill - head) / 2
    assert half.decode_per_token - head == (whole.decode_per_token - head) / 2
    assert half.kv_bytes == whole.kv_bytes / 2
    attention_only = count_flops(LLAVA, 60, reducer="full", plan=UnitShares((1.0,) * 32, (0.0,) * 32))
    assert whole.prefill - attention_only.prefill == LAYERS * 6 * 636 * D * M


def test_the_same_question_is_counted_once_and_a_changed_configuration_anew() -> None:
    config = uneven_model().config
    first = count_flops(config, 9, token_budget=0.5)
    assert ModelCosts.of(config) is ModelCosts.of(config)
    config.controller_choice = "spread"
    assert count_flops(config, 9, token_budget=0.5).reducer == first.reducer + 2 * 64 * 32 * 64
    config.reducers = ["grid"]
    assert count_flops(config, 9, token_budget=0.5).reducer == 0
    config.text_config.intermediate_size = 96
    assert count_flops(config, 9, token_budget=0.5).prefill < first.prefill


def test_a_tensor_of_budgets_is_read_in_its_own_precision() -> None:
    """0.6 is 0.6016 in bfloat16, and means 0.6 there; written out in float32 it means 0.6016."""
    budget = torch.tensor([0.6], dtype=torch.bfloat16)
    for given, kept in ((budget, 345), (budget.float(), 346), (torch.tensor([0.6]), 345)):
        assert count_flops(LLAVA, 60, reducer="grid", token_budget=given).mean_visual_tokens == kept


# ---------------------------------------------------------------- users' own reducers


class Averages(TokenReducer):
    """Ranks patches by their product with the image's mean: one product [n, W] @ [W, 1] of each image."""

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        mean = features.patches.mean(dim=1)
        scores = (features.patches @ mean[..., None])[..., 0]
        keep = torch.zeros_like(scores, dtype=torch.bool)
        keep.scatter_(1, scores.topk(int(num_keep[0])).indices, True)
        return Selection.from_keep(keep)


@pytest.fixture
def registered() -> Iterator[Callable]:
    before = dict(REDUCERS)
    yield register_reducer
    REDUCERS.clear()
    REDUCERS.update(before)


def test_a_users_reducer_is_run_once_to_count_it(registered: Callable) -> None:
    registered("averages")(type("Averages", (Averages,), {}))
    config = uneven_model().config
    assert count_flops(config, 9, reducer="averages", token_budget=0.5).reducer == 2 * 64 * 32


def test_users_reducers_are_run_wherever_they_act(registered: Callable) -> None:
    registered("reads_attention")(type("ReadsAttention", (Averages,), {"needs": ("attention",)}))
    registered("my_fastv")(type("MyFastV", (REDUCERS["fastv"],), {}))
    registered("my_tome")(type("MyToMe", (REDUCERS["tome"],), {}))
    config = uneven_model().config
    for mine, known in (("my_fastv", "fastv"), ("my_tome", "tome")):
        both = [count_flops(config, 9, reducer=name, token_budget=0.5) for name in (mine, known)]
        assert both[0] == both[1]
    rows = count_flops(config, 9, reducer="reads_attention", token_budget=0.5).reducer
    # Keys of CLS and 64 patches, CLS's query, and the mean against all patches.
    assert rows == 2 * 65 * 32 * 32 + 2 * 32 * 32 + 2 * 64 * 32


def test_a_users_reducer_that_cannot_run_is_said_to(registered: Callable) -> None:
    registered("broken")(type("Broken", (TokenReducer,), {}))
    with pytest.raises(ValueError, match=r"'broken', and running it .* failed \(NotImplementedError"):
        count_flops(uneven_model().config, 9, reducer="broken", token_budget=0.5)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"reducer": "fastv", "token_budget": 0.01}, "token_budget"),
        ({"reducer": "grid", "token_budget": 1.5}, "token_budget"),
        ({"reducer": "nobody", "token_budget": 0.5}, "nobody"),
        ({"reducer": "prumerge"}, "selection"),
        ({"new_tokens": 0}, "new_tokens"),
        ({"dtype": "float99"}, "dtype"),
        ({"num_images": -1}, "num_images"),
        ({"plan": UnitShares((1.0,), (1.0,))}, "plan"),
        ({"reducer": {"name": "hired", "tile_grid": [1, 1]}, "token_budget": 0.5, "num_images": 2}, "selection"),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_refused_with_a_reason(asked: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_flops(LLAVA, 60, **asked)


def test_a_plan_holds_shares() -> None:
    with pytest.raises(ValueError, match="shares from 0 to 1"):
        UnitShares((1.5,), (1.0,))


def test_text_alone_costs_no_look() -> None:
    counted = count_flops(AdaVTPConfig.from_dict(LLAVA.to_dict()), 60, num_images=0, reducer="fastv", token_budget=0.5)
    assert (counted.vision, counted.reducer, counted.projector, counted.mean_visual_tokens) == (0, 0, 0, 0)
    assert counted.prefill == decoder_by_hand([60] * LAYERS)
