"""The model families as a table: the units that a budget is for, and what can reduce them."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..modeling.families.adapters import ADAPTERS
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.modeling_families import model_class_of
from ..modeling.reducers.base import REDUCERS, STAGES


def family_table() -> list[dict[str, Any]]:
    """
    LLaVA and all families that have an adapter, as they are in their own default configuration.

    Returns:
        For each its `name` (the `model_type`), `class`, and what [`support`] says.
    """
    classes = {"adavtp": AdaVTPForConditionalGeneration} | {name: model_class_of(name) for name in sorted(ADAPTERS)}
    rows = []
    for name, model_class in classes.items():
        # Without memory for weights.
        with torch.device("meta"):
            known = support(model_class(model_class.config_class()))
        rows.append({"name": name, "class": model_class.__name__} | known)
    return rows


def support(model: PreTrainedModel) -> dict[str, Any]:
    """
    What a budget is for in a model's prompts, and what can act on it.

    Returns:
        `units`, what the visual tokens of a prompt come in; `stages`, at which registered reducers can act; `refused`,
        for the name of each that cannot, the reason.
    """
    reader = model.prompt_reader
    reasons = {name: reader.why_not(name) for name in sorted(REDUCERS)}
    stages = {REDUCERS[name].stage for name, reason in reasons.items() if reason is None}
    return {
        "units": list(reader.family.unit_names),
        "stages": sorted(stages, key=STAGES.index),
        "refused": {name: reason for name, reason in reasons.items() if reason is not None},
    }
