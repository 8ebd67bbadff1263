"""What is counted without running anything is what torch counts while the model runs, in every part by itself."""

import pytest

from adavtp.evaluation.flops import count_flops
from adavtp.modeling.modeling_adavtp import ReducerSpec
from counted_flops import PARTS, assert_counted, parts_that_torch_counts, uneven_model
from tiny_models import tiny_batch

BEFORE_DECODER = [
    "adaptive",
    "random",
    "grid",
    "downsample",
    "tome",
    "token_fusion",
    "dynamicvit",
    "prumerge",
    "prumerge+",
    "visionzip",
    "hired",
    "cls_attention",
    "vispruner",
    "divprune",
    "cdpruner",
    "dart",
    "query",
    "pool",
    "resampler",
    "aim_merge",
]
IN_DECODER = ["fastv", "vtw", "pyramiddrop", "sparsevlm", "dart_layer", "depth", "head_threshold", "aim", "aim_prune"]
WITH_PARAMETERS = [
    {"name": "fastv", "layer": 3, "rows": "all"},
    {"name": "sparsevlm", "version": "v2"},
    {"name": "tome", "merge": "importance"},
    {"name": "prumerge", "attention": "per_head"},
    {"name": "cls_attention", "layer": 1},
    {"name": "vispruner", "important": 1.0},
    {"name": "pool", "kind": "max"},
    {"name": "visionzip", "contextual": 0.5},
    {"name": "pyramiddrop", "layers": [2, 3, 6], "ratios": [0.6, 0.4, 0.2]},
]
STACKS = [
    ["tome", "adaptive"],
    ["tome", "adaptive", "fastv"],
    ["adaptive", "divprune"],
    ["divprune", "pyramiddrop"],
    ["downsample", "resampler", "dart_layer"],
]

MODEL = uneven_model()


@pytest.mark.parametrize("budget", [0.6, 1.0])
@pytest.mark.parametrize("reducer", BEFORE_DECODER + IN_DECODER)
def test_every_reducer_costs_what_torch_counts(reducer: str, budget: float) -> None:
    assert_counted(MODEL, reducer, budget)


@pytest.mark.parametrize("reducer", BEFORE_DECODER + IN_DECODER)
def test_a_ragged_batch_costs_what_torch_counts(reducer: str) -> None:
    lengths = (4, 4, 4) if reducer == "sparsevlm" else (6, 11, 8)
    assert_counted(MODEL, reducer, [0.5, 0.75, 1.0], images=(1, 1, 1), lengths=lengths)


@pytest.mark.parametrize("reducer", ["adaptive", "tome", "divprune", "prumerge", "fastv", "aim"])
def test_prompts_with_several_images_and_with_none_cost_what_torch_counts(reducer: str) -> None:
    assert_counted(MODEL, reducer, [0.5, 0.75, 0.6], images=(2, 0, 1), lengths=(6, 11, 8))


@pytest.mark.parametrize("reducer", ["adaptive", "tome", "divprune", "prumerge", "fastv"])
def test_the_mask_form_costs_what_torch_counts(reducer: str) -> None:
    assert_counted(MODEL, reducer, [0.5, 0.7], images=(1, 1), lengths=(6, 11), selection_output="mask")


@pytest.mark.parametrize("reducer", WITH_PARAMETERS, ids=str)
def test_parameters_change_the_cost_as_torch_counts(reducer: ReducerSpec) -> None:
    assert_counted(MODEL, reducer, 0.55)


def test_cuts_at_which_nothing_leaves_yet_cost_nothing() -> None:
    assert_counted(MODEL, "aim_prune", 63)


@pytest.mark.parametrize("reducer", STACKS, ids=str)
def test_stacks_cost_what_torch_counts(reducer: ReducerSpec) -> None:
    assert_counted(MODEL, reducer, [0.5, 0.7], images=(1, 1), lengths=(6, 9))


@pytest.mark.parametrize("budgets", [{"tome": 0.7, "adaptive": 1.0}, {"tome": 1.0, "adaptive": 0.5}, {"tome": 40}])
def test_budgets_by_name_cost_what_torch_counts(budgets: dict[str, float]) -> None:
    assert_counted(MODEL, ["tome", "adaptive"], budgets)


@pytest.mark.parametrize("reducer", [*IN_DECODER, "aim_merge"])
def test_rules_that_look_at_no_image_cost_what_torch_counts(reducer: str) -> None:
    assert_counted(MODEL, reducer, None)


@pytest.mark.parametrize("reducer", ["prumerge", "prumerge+", "fastv", "aim", "sparsevlm"])
def test_a_selection_says_what_a_rule_of_its_own_did(reducer: str) -> None:
    batch = tiny_batch(MODEL.config, (1,), (4,))
    seen = parts_that_torch_counts(MODEL, **batch, reducer=reducer)
    generated = MODEL.generate(**batch, reducer=reducer, max_new_tokens=1, return_dict_in_generate=True)
    selection = generated["selection"]
    counted = count_flops(MODEL.config, 4, reducer=reducer, selection=selection, question_tokens=2)
    assert {part: getattr(counted, part) for part in PARTS} == pytest.approx(seen, rel=1e-3)
    layers = MODEL.config.text_config.num_hidden_layers
    depth = selection.keep * layers if selection.depth is None else selection.depth
    assert counted.mean_visual_tokens == pytest.approx(float(depth.sum()) / layers)


def test_a_floor_on_the_entropy_is_counted_from_the_selection() -> None:
    model = uneven_model(min_token_entropy=0.999)
    batch = tiny_batch(model.config, (1,), (4,))
    seen = parts_that_torch_counts(model, **batch, reducer="cls_attention", token_budget=0.05)
    selection = model.select_tokens(**batch, reducer="cls_attention", token_budget=0.05)
    counted = count_flops(model.config, 4, reducer="cls_attention", selection=selection)
    assert {part: getattr(counted, part) for part in PARTS} == pytest.approx(seen, rel=1e-3)
    with pytest.raises(ValueError, match="min_token_entropy"):
        count_flops(model.config, 4, reducer="cls_attention", token_budget=0.05)


def test_tiles_that_share_a_budget_are_counted_from_the_selection() -> None:
    batch, tiles = tiny_batch(MODEL.config, (3,), (6,)), {"name": "hired", "tile_grid": [1, 2]}
    seen = parts_that_torch_counts(MODEL, **batch, reducer=tiles, token_budget=0.3)
    selection = MODEL.select_tokens(**batch, reducer=tiles, token_budget=0.3)
    counted = count_flops(MODEL.config, 6, num_images=3, reducer=tiles, selection=selection)
    assert {part: getattr(counted, part) for part in PARTS} == pytest.approx(seen, rel=1e-3)
