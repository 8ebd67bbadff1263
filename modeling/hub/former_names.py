"""What files were called in folders that were saved before names said where a file lies.

The reducers of a user that such a folder brings import from these. With the package installed they run by its classes,
so what stood in `tome_adavtp.py` then is asked of `modeling/reducers/tome.py` now.
"""

FORMER_FILES = {"own_reducers_adavtp.py": "OWN_REDUCERS"}

_REDUCERS = (
    *("aim", "cdpruner", "cls_attention", "controls", "dart", "depth", "divprune", "downsample", "dynamicvit"),
    *("fastv", "head_threshold", "hired", "pool", "prumerge", "pyramiddrop", "query", "resampler", "sparsevlm"),
    *("token_fusion", "tome", "visionzip", "vispruner", "vtw"),
)

FORMER_NAMES = {f"{name}_adavtp": f"reducers_{name}" for name in _REDUCERS} | {
    "budget_adavtp": "budget_token_budget",
    "decoder_reducers_adavtp": "decoder_reducer",
    "decoder_schedules_adavtp": "decoder_layer_counts",
    "encoder_reducers_adavtp": "vision_encoder_reducer",
    "published_reducers_adavtp": "reducers_published",
    "reducers_adavtp": "reducers_base",
    "sampling_adavtp": "budget_top_k",
    "selection_adavtp": "budget_selection",
    "tower_adavtp": "vision_tower",
    "vision_features_adavtp": "vision_features",
}
