"""What every reducer promises by itself: exactly K tokens, whatever shares the batch, and parameters with a meaning.

Those behind the tower are shown random images; those inside the tower have a file of their own beside this one, and
those inside the decoder theirs among the decoder's tests.
"""

import math
import re
from typing import Any

import pytest
import torch

from adavtp import TokenReducer
from adavtp.modeling.reducers.base import REDUCERS, build_reducer, reducer_parameters
from adavtp.modeling.vision.tower import TowerAttention
from tiny_features import features_of, one_image, tiny_features
from tiny_models import OF_LLAVA, tiny_config, tiny_text_config, tiny_vision_config

# AIM is two reducers, which are here by their own names.
BEHIND_THE_TOWER = sorted(name for name in OF_LLAVA - {"aim"} if REDUCERS[name].stage in ("vision", "projector"))
TOLERANCE = {torch.float32: {"atol": 1e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 2e-2}}
READS_CLS = ["cls_attention", "hired", "prumerge", "prumerge+", "scope", "vispruner", "visionzip"]


def reducer(name: str, **parameters: Any) -> TokenReducer:
    torch.manual_seed(0)
    return build_reducer(name, tiny_config(), **parameters).eval()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BEHIND_THE_TOWER)
def test_every_image_keeps_exactly_k_tokens_and_those_that_it_keeps_alone(name: str, dtype: torch.dtype) -> None:
    module = reducer(name).to(dtype)
    for num_tokens in (1, 9, 16):
        every_count = list(range(1, num_tokens + 1))
        for counts in [[count] * 3 for count in every_count] if module.one_count else [every_count]:
            features = tiny_features(len(counts), num_tokens, dtype)
            together = module(features, torch.tensor(counts))
            assert together.num_keep.tolist() == counts
            tokens = together.gather(features.patches)
            assert tokens.dtype == dtype and tokens.isfinite().all()
            for image, count in enumerate(counts):
                places = together.keep[image].nonzero()[:, 0].tolist()
                assert together.positions[image].tolist() == places + [-1] * (max(counts) - count)
                own = one_image(features, image)
                alone = module(own, torch.tensor([count]))
                assert torch.equal(alone.keep[0], together.keep[image])
                torch.testing.assert_close(alone.gather(own.patches)[0], tokens[image, :count], **TOLERANCE[dtype])


@pytest.mark.parametrize(
    "name", ["apet", "cdpruner", "cls_attention", "dart", "divprune", "hiprune", "hired", "query", "scope"]
)
def test_of_equal_tokens_the_earlier_stay(name: str) -> None:
    keys = torch.ones(1, 4, 8, 8)
    of_layer = TowerAttention(keys[:, :, 0], keys[:, :, 0], keys, received=keys[..., 0])
    attention = {0: of_layer, 1: of_layer}
    features = features_of(
        torch.ones(1, 8, 32), question=torch.eye(32)[:1], attention=attention, grids=torch.tensor([[2, 4]])
    )
    for count in range(1, 9):
        assert reducer(name)(features, torch.tensor([count])).positions.tolist() == [list(range(count))]


@pytest.mark.parametrize(
    ("feature_layer", "num_layers", "making", "above"),
    [(-2, 3, 1, 2), (-1, 3, 2, 2), (1, 3, 0, 1), ([1, -1], 3, 2, 2), (-2, 24, 22, 23)],
)
def test_attention_is_read_in_the_layer_that_made_the_features_or_the_one_above(
    feature_layer: int | list[int], num_layers: int, making: int, above: int
) -> None:
    config = tiny_config(vision_config=tiny_vision_config(num_layers=num_layers), vision_feature_layer=feature_layer)
    for name in ("cls_attention", "dart", "hired", "scope", "vispruner", "visionzip"):
        assert build_reducer(name, config).attention_layers == (making,)
    for name in ("aim_merge", "prumerge", "prumerge+"):
        assert build_reducer(name, config).attention_layers == (above,)


@pytest.mark.parametrize("name", READS_CLS)
def test_a_tower_without_cls_and_features_that_no_layer_made_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{re.escape(repr(name))}.*CLS"):
        build_reducer(name, tiny_config("siglip"))
    with pytest.raises(ValueError, match="`vision_feature_layer` is 0"):
        build_reducer(name, tiny_config(vision_feature_layer=0))


# In a model whose decoder has eight layers, and whose tower runs two of three.
REFUSED: dict[str, dict[str, list[Any]]] = {
    "aim": {"order": ["random"], "slope": [-1]},
    "aim_merge": {"order": ["random"], "share": [0.0, 1.5]},
    "aim_prune": {"layer": [0, 8], "slope": [0.0, 1.5]},
    "apet": {"basis": [0, -1, 2.5, True]},
    "apet_layer": {"layer": [0, 8], "basis": [0], "merge": [1]},
    "autoprune": {"k0": [0, -1.0, math.inf, "1"], "gamma": [-0.1, math.nan, True]},
    "cdpruner": {"theta": [-0.1, 1.0, math.nan]},
    "cls_attention": {"layer": [-1, 3, 0.5, "1"]},
    "dart": {"pivots": [0, -1, 2.5, True]},
    "dart_layer": {"layer": [0, 8, 1.5], "keep": [-1], "image_pivots": [0], "text_pivots": [-1, 2.0]},
    "depth": {"layer": [0, 8], "first_drop": [-0.1, 1.1], "further_drop": [-1, 2]},
    "downsample": {"interpolation": ["nearest"]},
    "dynamicvit": {
        "cuts": [[1, 0], [0, 0], [0, 2], [-1], [], [0.5], [True], 1],
        "ratio_loss_weight": [-1.0, math.nan, "2"],
        "order": ["descending"],
    },
    "fastv": {"layer": [0, 8, "2", True], "ratio": [-0.1, 1.1], "rows": ["first"]},
    "head_threshold": {"layer": [0, 8], "percentile": [-1, 100.5]},
    "hiprune": {"alpha": [-0.1, 1.1, math.nan], "layer": [-1, 2, 0.5, True]},
    "hired": {"tile_grid": [(2,), (0, 2), "22", (2.0, 2)], "alpha": [1.5, -0.5], "share": ["sum"]},
    "pool": {"kind": ["median"]},
    "priortr": {"layer": [0, 8, 1.5], "rows": ["all"], "keep": [-1]},
    "progressive": {"decay": [-1, math.inf, math.nan, "1", True]},
    "prumerge": {"attention": ["mean"], "average": ["yes", 1], "neighbours": [-1, 2.5], "order": ["random"]},
    "prumerge+": {"attention": ["mean"], "important": [1.5, -0.5]},
    "pyramiddrop": {
        "layers": [[3, 2, 5], [1, 2], 3],
        "ratios": [[0.5, 0.6, 0.1], [1.0, 0.5, 0.1], [0.5, 0.2, 0.0], [0.5], [], 0.5],
    },
    "query": {"temperature": [0.0, -1.0, math.inf, math.nan]},
    "random_layer": {"layer": [0, 8], "ratio": [-0.1, 1.1], "seed": [-1, 0.5]},
    "resampler": {"num_layers": [0], "num_heads": [3, 0]},
    "scope": {"alpha": [-0.5, math.inf, math.nan, "1", True]},
    "sparsevlm": {"version": ["v3"], "tokens": [100], "merge": ["max"], "order": ["random"], "num_heads": [0, 1.5]},
    "token_fusion": {"norm_preserving": [1], "proportional_attention": [None], "order": ["best"]},
    "tome": {"merge": ["mean"], "proportional_attention": ["yes"], "order": ["score"]},
    "visionzip": {"contextual": [1.1, -0.1], "average": [1], "order": ["cls"]},
    "vispruner": {"important": [-0.1, 1.1, math.nan]},
    "vtw": {"layer": [0, 8, 2.0]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_that_means_nothing_is_refused_with_what_is_allowed(name: str) -> None:
    config = tiny_config(text_config=tiny_text_config(num_layers=8))
    for parameter, values in REFUSED[name].items():
        for value in values:
            named = f"`{parameter}` is {re.escape(repr(value))}"
            with pytest.raises(ValueError, match=f"{named}.*(allow|must|at least|there are)"):
                build_reducer(name, config, **{parameter: value})


def test_every_reducer_that_takes_parameters_is_among_those_that_refuse_some() -> None:
    assert {name for name in REDUCERS if reducer_parameters(name)} - {"random"} == set(REFUSED)
