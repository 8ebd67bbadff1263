"""Counted FLOPs are torch's for every tower, decoder, controller and place of the budget, part by part."""

import pytest

from counted_flops import assert_counted, uneven_model

WITHOUT_CLS = [
    "adaptive",
    "downsample",
    "tome",
    "token_fusion",
    "dynamicvit",
    "divprune",
    "dart",
    "pool",
    "resampler",
    "aim_merge",
]


@pytest.mark.parametrize("vision", ["siglip", "dinov2"])
@pytest.mark.parametrize("reducer", [*WITHOUT_CLS, "fastv"])
def test_every_tower_costs_what_torch_counts(vision: str, reducer: str) -> None:
    assert_counted(uneven_model(vision), reducer, [0.5, 0.7], images=(1, 1), lengths=(6, 11))


@pytest.mark.parametrize("reducer", ["prumerge", "visionzip", "vispruner", "cls_attention"])
def test_cls_methods_on_dinov2_cost_what_torch_counts(reducer: str) -> None:
    assert_counted(uneven_model("dinov2"), reducer, 0.5)


def test_a_gated_mlp_in_the_tower_costs_what_torch_counts() -> None:
    assert_counted(uneven_model("dinov2", vision_fields={"use_swiglu_ffn": True, "mlp_ratio": 4}), "tome", 0.5)


WINDOWS = {"mistral": {"sliding_window": 20}, "qwen2": {"use_sliding_window": True, "sliding_window": 20}}


@pytest.mark.parametrize("fields", [{}, WINDOWS], ids=["whole", "windows"])
@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_decoder_costs_what_torch_counts(text: str, fields: dict) -> None:
    model = uneven_model(text=text, text_fields=fields.get(text, {}))
    for reducer in ("grid", "fastv", "pyramiddrop", "aim_prune", "dart_layer", "sparsevlm", "vtw"):
        assert_counted(model, reducer, 0.5)


@pytest.mark.parametrize("head", ["budget_token", "patch", "patch_budget", "dot"])
@pytest.mark.parametrize(
    "budget_fields",
    [
        {"budget_fusion": "encoder", "budget_attention": "read_only"},
        {"budget_fusion": "encoder", "budget_attention": "mutual", "budget_token_place": "first"},
        {"budget_fusion": "post"},
    ],
    ids=["read-only", "mutual", "option B"],
)
def test_every_controller_costs_what_torch_counts(head: str, budget_fields: dict[str, str]) -> None:
    for choice, question_aware in (("best", True), ("spread", False)):
        model = uneven_model(
            controller_head=head, controller_choice=choice, question_aware=question_aware, **budget_fields
        )
        assert_counted(model, "adaptive", 1.0)
        assert_counted(model, "adaptive", [0.4, 1.0], images=(1, 1), lengths=(6, 8))
        assert_counted(model, ["tome", "adaptive"], 0.4)


@pytest.mark.parametrize("reducer", ["adaptive", "tome", "visionzip", "divprune", "query", "fastv", "aim"])
def test_a_kept_cls_costs_what_torch_counts(reducer: str) -> None:
    model = uneven_model(vision_feature_select_strategy="full")
    assert_counted(model, reducer, [0.5, 0.7], images=(1, 2), lengths=(6, 11))
    assert_counted(model, reducer, 0.5, selection_output="mask")


@pytest.mark.parametrize(
    "reducer", ["adaptive", "prumerge", "visionzip", "vispruner", "pool", "resampler", "aim_merge"]
)
def test_several_feature_layers_cost_what_torch_counts(reducer: str) -> None:
    assert_counted(uneven_model(vision_feature_layer=[-2, -4]), reducer, 0.5)


def test_eager_attention_costs_what_torch_counts() -> None:
    model = uneven_model(attn_implementation="eager")
    assert_counted(model, "aim", [0.5, 0.7], images=(1, 1), lengths=(6, 11))
