"""Runs of several trained variants as one run, in which a variant stands where a reducer would.

A report compares reducers on one checkpoint. Variants are checkpoints of their own, asked the same questions at the
same budgets; under their names they are compared in the same way.
"""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .runs import PICTURES, Run


def join_variants(runs: Mapping[str, Run], folder: str | Path, about: Mapping[str, Any]) -> Run:
    """
    Writes the run that several variants' runs are together.

    Args:
        runs: of each variant, by its name; each has one reducer, which chose in that variant.
        folder: for the joined run; what is there of an earlier one is replaced.
        about: what the header says in place of what the variants' headers do: above all the checkpoint that all of
            them started from, `checkpoint` and `checkpoint_hash`.

    Raises:
        ValueError: if a run has several reducers, or the runs are not of the same questions.
    """
    first = next(iter(runs.values()))
    header = first.header | dict(about) | {"settings": [], "unreachable": []}
    for name, run in runs.items():
        reducers = {setting["reducer"] for setting in run.header["settings"]}
        if len(reducers) > 1:
            raise ValueError(f"The run of variant {name!r} has the reducers {sorted(reducers)}; it has to have one.")
        for field in ("data_hash", "metric", "num_examples", "num_patches", "num_layers"):
            if run.header[field] != header[field]:
                raise ValueError(
                    f"The run of variant {name!r} has {field} {run.header[field]!r}, another has {header[field]!r}; "
                    "variants are compared on the same questions."
                )
        for entries in ("settings", "unreachable"):
            header[entries] = header[entries] + [entry | {"reducer": name} for entry in run.header[entries]]
    for seconds in ("seconds", "model_seconds", "evaluation_seconds"):
        header[seconds] = sum(run.header[seconds] for run in runs.values())
    shutil.rmtree(folder, ignore_errors=True)
    joined = Run(folder, header)
    joined.write_header()
    shutil.copytree(first.folder / PICTURES, joined.folder / PICTURES)
    joined.write(replace(answer, reducer=name) for name, run in runs.items() for answer in run.answers())
    return joined
