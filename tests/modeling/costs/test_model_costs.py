"""What is counted without weights is what torch counts while a real model runs, in every part by itself."""

import pytest
import torch

from adavtp import AdaVTPForConditionalGeneration, Selection
from adavtp.modeling.budget.schedule import StackBudget
from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.modeling_adavtp import ReducerSpec
from counted_flops import (
    all_that_torch_counts,
    assert_counted,
    parts_of,
    parts_that_torch_counts,
    prompt_of,
    uneven_model,
)

READ_THE_TOWER = ["adaptive", "tome", "token_fusion", "dynamicvit", "dart", "aim_merge", "hiprune"]
READ_FEATURES = ["downsample", "divprune", "pool", "resampler", "random", "grid", "cdpruner", "query", "apet"]
READ_CLS = ["prumerge", "prumerge+", "visionzip", "hired", "cls_attention", "vispruner", "scope"]
IN_DECODER = ["fastv", "vtw", "pyramiddrop", "dart_layer", "depth", "head_threshold", "aim", "aim_prune", "priortr"]
IN_DECODER += ["apet_layer"]
WITH_PARAMETERS = [
    {"name": "fastv", "layer": 3, "rows": "all"},
    {"name": "random_layer", "layer": 3},
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

LEARNED = ["downsample", "dynamicvit", "resampler", "token_fusion"]


def model_with_weights(vision: str = "clip") -> AdaVTPForConditionalGeneration:
    """It has the weights of every reducer that learns."""
    model = uneven_model(vision)
    for name in LEARNED:
        model.set_reducer(name)
    model.set_reducer("adaptive")
    return model


MODEL = model_with_weights()


@pytest.mark.parametrize(
    "reducer", READ_THE_TOWER + READ_FEATURES + READ_CLS + IN_DECODER + STACKS + WITH_PARAMETERS, ids=str
)
def test_every_reducer_and_stack_costs_what_torch_counts(reducer: ReducerSpec) -> None:
    assert_counted(MODEL, reducer, 0.6)


@pytest.mark.parametrize("reducer", ["adaptive", "tome", "prumerge", "aim", ["tome", "adaptive", "fastv"]], ids=str)
def test_prompts_that_leave_nothing_to_choose_cost_what_torch_counts(reducer: ReducerSpec) -> None:
    assert_counted(MODEL, reducer, 1.0)
    assert_counted(MODEL, reducer, 0.5, num_images=0)


@pytest.mark.parametrize("reducer", ["adaptive", "tome", "divprune", "prumerge", "fastv", "aim"])
def test_prompts_with_several_images_cost_what_torch_counts(reducer: str) -> None:
    assert_counted(MODEL, reducer, 0.55, num_images=2)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_of_the_words_half_rate_in_sparsevlm(version: str) -> None:
    # Which words do is their meaning's to say; of two, one.
    assert_counted(MODEL, {"name": "sparsevlm", "version": version}, 0.55, text_tokens=2)


def test_cuts_at_which_nothing_leaves_yet_cost_nothing() -> None:
    assert_counted(MODEL, "aim_prune", 63)


@pytest.mark.parametrize("budgets", [{"tome": 0.7, "adaptive": 1.0}, {"tome": 1.0, "adaptive": 0.5}, {"tome": 40}])
def test_budgets_by_name_cost_what_torch_counts(budgets: dict[str, float]) -> None:
    assert_counted(MODEL, ["tome", "adaptive"], budgets)


@pytest.mark.parametrize("reducer", [*IN_DECODER, "aim_merge"])
def test_rules_that_look_at_no_image_cost_what_torch_counts(reducer: str) -> None:
    assert_counted(MODEL, reducer, None)


@pytest.mark.parametrize("reducer", ["fastv", "aim_prune", "pyramiddrop", ["tome", "adaptive", "fastv"]], ids=str)
def test_any_length_of_text_costs_what_torch_counts(reducer: ReducerSpec) -> None:
    for text_tokens in (5, 9, 27, 61):
        assert_counted(MODEL, reducer, 0.5, text_tokens=text_tokens)


# ---------------------------------------------------------------- from what was kept


@pytest.mark.parametrize("reducer", ["prumerge", "prumerge+", "fastv", "aim"])
def test_a_selection_says_what_a_rule_of_its_own_did(reducer: str) -> None:
    batch = prompt_of(MODEL, 1, 6)
    seen = parts_that_torch_counts(MODEL, **batch, reducer=reducer)
    generated = MODEL.generate(**batch, reducer=reducer, max_new_tokens=1, return_dict_in_generate=True)
    selection = generated["selection"]
    counted = ModelCosts.of(MODEL.config).of_selection(selection, 6, reducer=reducer)
    assert parts_of(counted) == pytest.approx(seen, rel=1e-3)
    layers = MODEL.config.text_config.num_hidden_layers
    depth = selection.keep * layers if selection.depth is None else selection.depth
    assert counted.mean_visual_tokens == pytest.approx(float(depth.sum()) / layers)


def test_any_number_of_kept_tokens_costs_what_a_budget_of_as_many_does() -> None:
    costs, patches = ModelCosts.of(MODEL.config), torch.arange(MODEL.family.tokens_per_image(MODEL.config))[None]
    for keep in (9, 21, 40, 63):
        kept = costs.of_selection(Selection.from_keep(patches < keep), 6, reducer="prumerge")
        told = costs.of_prompt(6, reducer="prumerge", token_budget=keep)
        assert parts_of(kept) == pytest.approx(parts_of(told), rel=1e-3)


def test_a_floor_on_the_entropy_is_counted_from_the_selection() -> None:
    model = uneven_model(min_token_entropy=0.999)
    batch, asked = prompt_of(model, 1, 6), {"reducer": "cls_attention", "token_budget": 0.05}
    seen = parts_that_torch_counts(model, **batch, **asked)
    selection = model.select_tokens(**batch, **asked)
    costs = ModelCosts.of(model.config)
    assert parts_of(costs.of_selection(selection, 6, **asked)) == pytest.approx(seen, rel=1e-3)
    with pytest.raises(ValueError, match="min_token_entropy"):
        costs.of_prompt(6, **asked)


def test_tiles_that_share_a_budget_are_counted_from_the_selection() -> None:
    batch, tiles = prompt_of(MODEL, 3, 6), {"name": "hired", "tile_grid": [1, 2]}
    seen = parts_that_torch_counts(MODEL, **batch, reducer=tiles, token_budget=0.3)
    selection = MODEL.select_tokens(**batch, reducer=tiles, token_budget=0.3)
    counted = ModelCosts.of(MODEL.config).of_selection(selection, 6, reducer=tiles, token_budget=0.3)
    assert parts_of(counted) == pytest.approx(seen, rel=1e-3)


# ---------------------------------------------------------------- every model


@pytest.mark.parametrize(
    ("vision", "reducers"), [("siglip", [*READ_THE_TOWER, "fastv"]), ("dinov2", READ_THE_TOWER + READ_CLS)]
)
def test_every_tower_costs_what_torch_counts(vision: str, reducers: list[str]) -> None:
    model = model_with_weights(vision)
    for reducer in reducers:
        assert_counted(model, reducer, 0.55)


def test_a_gated_mlp_in_the_tower_costs_what_torch_counts() -> None:
    assert_counted(uneven_model("dinov2", vision_fields={"use_swiglu_ffn": True, "mlp_ratio": 4}), "tome", 0.5)


WINDOWS = {
    "mistral": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3},
}


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_decoder_costs_what_torch_counts(text: str) -> None:
    model = uneven_model(text=text, text_fields=WINDOWS.get(text, {}))
    for reducer in ("grid", "fastv", "pyramiddrop", "dart_layer"):
        assert_counted(model, reducer, 0.5)


HEADS = ["budget_token", "patch", "patch_budget", "dot", "late_interaction", "cross_attention"]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "budget_fields",
    [
        {"budget_attention": "read_only"},
        {"budget_attention": "mutual", "budget_token_place": "first"},
        {"budget_fusion": "post"},
    ],
    ids=["read-only", "mutual", "option B"],
)
def test_every_controller_costs_what_torch_counts(head: str, budget_fields: dict[str, str]) -> None:
    # Each choice with several heads, and with and without the question.
    number = HEADS.index(head) + len(budget_fields)
    model = uneven_model(
        controller_head=head,
        controller_choice=["best", "spread", "mmr"][number % 3],
        question_aware=head in ("budget_token", "dot", "cross_attention"),
        **budget_fields,
    )
    assert_counted(model, "adaptive", 1.0)
    assert_counted(model, ["tome", "adaptive"], 0.4)
    # Of several lengths, the later ones by the earlier: some heads read the question word by word.
    for text_tokens in (9, 20, 31):
        assert_counted(model, "adaptive", 0.4, text_tokens=text_tokens)


@pytest.mark.parametrize("fields", [{"vision_feature_select_strategy": "full"}, {"vision_feature_layer": [-2, -4]}])
def test_a_kept_cls_and_several_feature_layers_cost_what_torch_counts(fields: dict) -> None:
    model = uneven_model(**fields)
    for reducer in ("adaptive", "visionzip", "query", "aim_merge"):
        assert_counted(model, reducer, 0.6, num_images=2)


def test_eager_attention_costs_what_torch_counts() -> None:
    assert_counted(uneven_model(attn_implementation="eager"), "aim", 0.6)


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize(
    ("text", "fields", "reducer"),
    [
        ("llama", {}, ["tome", "adaptive", "fastv"]),
        ("llama", {}, "vtw"),
        ("mistral", WINDOWS["mistral"], "pyramiddrop"),
        ("qwen2", WINDOWS["qwen2"], "grid"),
        ("qwen2", WINDOWS["qwen2"], "fastv"),
        ("qwen3", {}, "aim"),
    ],
    ids=str,
)
def test_generation_costs_what_torch_counts_and_caches_as_many_bytes(
    text: str, fields: dict, reducer: ReducerSpec
) -> None:
    model = uneven_model(text=text, text_fields=fields)
    batch, budget = prompt_of(model, 1, 6), 0.5

    def generate(number: int, budget: StackBudget = budget) -> dict:
        asked = {"token_budget": budget, "reducer": reducer, "max_new_tokens": number}
        return model.generate(**batch, **asked, do_sample=False, eos_token_id=None, return_dict_in_generate=True)

    costs = ModelCosts.of(model.config)
    counted = costs.of_prompt(6, token_budget=budget, reducer=reducer, dtype=torch.float32)
    seen = {number: all_that_torch_counts(lambda number=number: generate(number)) for number in (1, 2, 4)}
    assert {number: counted.with_new_tokens(number) for number in seen} == pytest.approx(seen, rel=1e-6)
    assert counted.decode_per_token == pytest.approx(seen[2] - seen[1], rel=1e-6)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in generate(1).past_key_values.layers)
    assert counted.kv_bytes == held
    assert 2 * costs.of_prompt(6, token_budget=budget, reducer=reducer, dtype="bfloat16").kv_bytes == held
