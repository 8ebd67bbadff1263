"""The registered reducers as a table, and which of them a checkpoint can be asked for."""

from typing import Any

import torch

from ..configuration.configuration_adavtp import AdaVTPConfig, reducer_entries
from ..modeling.families.adapters import adapter_of
from ..modeling.families.llava import LLAVA
from ..modeling.modeling_adavtp import ReducerSpec
from ..modeling.reducers.base import REDUCERS, STAGES, reducer_parameters
from .settings import CONTROLLER, parts_of_label

# These look at nothing; a method that chooses has to be better than the best of them.
CONTROLS = ("random", "grid", "downsample", "native")


def is_control(reducer: str) -> bool:
    """Whether a reducer, as it is written on the command line, is one that looks at nothing."""
    return reducer.partition(":")[0] in CONTROLS


def reducer_table() -> list[dict[str, Any]]:
    """
    All registered reducers, by stage and name, as they are on a LLaVA-1.5 configuration.

    Returns:
        For each `name`, `stage`, `trained`, `own_rule`, `needs` (names of [`VisionFeatures`]' fields), `parameters`
        (with defaults), `paper`, and `part_of`: the composite reducer that it is a part of, or `None`.
    """
    config = AdaVTPConfig()
    # Without memory for weights.
    with torch.device("meta"):
        built = {name: reducer(config) for name, reducer in REDUCERS.items()}
    part_of = {type(part): name for name, reducer in built.items() for part in getattr(reducer, "parts", [])}
    rows = [
        {
            "name": name,
            "stage": " + ".join(dict.fromkeys(part.stage for part in getattr(reducer, "parts", [reducer]))),
            "trained": reducer.trained,
            "own_rule": reducer.has_own_rule,
            "needs": sorted({need for part in getattr(reducer, "parts", [reducer]) for need in part.needs}),
            "parameters": reducer_parameters(name),
            "paper": reducer.paper,
            "part_of": part_of.get(type(reducer)),
        }
        for name, reducer in built.items()
    ]
    return sorted(rows, key=lambda row: (STAGES.index(REDUCERS[row["name"]].stage), row["name"]))


def known_of_label(label: str, rows: list[dict[str, Any]], column: str) -> str:
    """What [`reducer_table`] says of a reducer, or of each in a stack; nothing of those it lacks."""
    known = {row["name"]: row[column] for row in rows}
    names = [part.partition(":")[0] for part in parts_of_label(label)]
    return " + ".join(dict.fromkeys(known[name] for name in names if known.get(name)))


def reducers_to_compare(config: AdaVTPConfig) -> list[ReducerSpec]:
    """
    All registered reducers but those that are parts of another or that the family cannot have, the controller first.
    Reducers whose weights are in the checkpoint come with the parameters that they were trained with.
    """
    family = LLAVA if isinstance(config, AdaVTPConfig) else adapter_of(config)
    names = [row["name"] for row in reducer_table() if row["part_of"] is None]
    names = [name for name in names if family.why_not(config, REDUCERS[name]) is None]
    return [as_trained(config, name) for name in sorted(names, key=lambda name: name != CONTROLLER)]


def as_trained(config: AdaVTPConfig, reducer: ReducerSpec) -> ReducerSpec:
    """The same reducers; one that is only named and has weights in the checkpoint gets the parameters it has there."""
    own = {
        entry if isinstance(entry, str) else entry["name"]: entry
        for entry in [*config.reducers, *config.trained_reducers]
    }
    entries = [own.get(entry, entry) if isinstance(entry, str) else entry for entry in reducer_entries(reducer)]
    return entries if len(entries) > 1 else entries[0]
