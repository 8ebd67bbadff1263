"""Every reducer on the same questions at the same budgets, with intervals.

What was measured is a JSON file that grows batch by batch: a comparison that was interrupted goes on where it stopped,
and one that is asked for more measures only that.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from ..configuration.configuration_adavtp import AdaVTPConfig, reducer_entries
from ..modeling.budget.token_budget import num_tokens_to_keep
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec
from ..modeling.processing_adavtp import AdaVTPProcessor
from ..modeling.reducers.base import REDUCERS, STAGES, TokenReducer, reducer_parameters
from ..modeling.vision.tower import tower_layers
from .accuracy import (
    NUM_LOOKED_AT,
    answer_batch,
    circumstances,
    is_right,
    mean_visual_tokens,
    refusal,
    wilson_interval,
)
from .settings import FULL_BUDGET, reducer_label

COMPARED_WITH = "adaptive"
EVERYTHING = "everything"

NUM_RESAMPLES = 10_000

# Bytes; shards of large models are not read whole.
_HASHED_AT_ONCE = 2**24
SEED = 0


def reducer_table() -> list[dict[str, Any]]:
    """
    All registered reducers, by stage and name, as they are on a LLaVA-1.5 configuration.

    Returns:
        For each `name`, `stage`, `trained`, `own_rule`, `needs` (names of [`VisionFeatures`]' fields), `parameters`
        (with defaults), `paper`, and `part_of`: the composite reducer that it is a part of, or `None`.
    """
    built = {name: _outline(name) for name in REDUCERS}
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


def _outline(name: str) -> TokenReducer:
    """A reducer without memory for its weights."""
    with torch.device("meta"):
        return REDUCERS[name](AdaVTPConfig())


def reducers_to_compare(config: AdaVTPConfig) -> list[ReducerSpec]:
    """
    All registered reducers but those that are parts of another, `"adaptive"` first. Reducers whose weights are in the
    checkpoint come with the parameters that they were trained with.
    """
    own = _entries_with_weights(config)
    names = [row["name"] for row in reducer_table() if row["part_of"] is None]
    names.sort(key=lambda name: name != COMPARED_WITH)
    return [own.get(name, name) for name in names]


def _entries_with_weights(config: AdaVTPConfig) -> dict[str, ReducerSpec]:
    entries = [COMPARED_WITH, *config.reducers, *config.trained_reducers]
    return {entry if isinstance(entry, str) else entry["name"]: entry for entry in entries}


def as_trained(config: AdaVTPConfig, reducer: ReducerSpec) -> ReducerSpec:
    """The same reducers; one that is only named and has weights in the checkpoint gets the parameters it has there."""
    own = _entries_with_weights(config)
    entries = [own.get(entry, entry) if isinstance(entry, str) else entry for entry in reducer_entries(reducer)]
    return entries if len(entries) > 1 else entries[0]


def missing_weights(config: AdaVTPConfig, reducer: ReducerSpec) -> str | None:
    """That a reducer has to be trained and the checkpoint of this configuration has no weights for it, or `None`."""
    names = [entry if isinstance(entry, str) else entry["name"] for entry in reducer_entries(reducer)]
    for name in names:
        if name in REDUCERS and REDUCERS[name].trained and name not in _entries_with_weights(config):
            return f"{name!r} has to be trained, and this checkpoint has no weights for it."
    return None


def reason_not_to_measure(
    model: AdaVTPForConditionalGeneration, inputs: dict[str, torch.Tensor], reducer: ReducerSpec, budget: float
) -> str | None:
    """
    Why a reducer is not measured at a budget, or `None` if it can be: it lacks weights, the model lacks what it needs,
    or it cannot meet the budget.

    Args:
        model: in evaluation mode.
        inputs: of one question.
        reducer, budget: what chooses, and the fraction kept.

    Raises:
        ValueError: if there is no such reducer.
    """
    names = [entry if isinstance(entry, str) else entry["name"] for entry in reducer_entries(reducer)]
    if unknown := [name for name in names if name not in REDUCERS]:
        raise ValueError(f"`reducer` is {unknown[0]!r}; registered reducers: {', '.join(sorted(REDUCERS))}.")
    if reason := missing_weights(model.config, reducer):
        return reason
    try:
        return refusal(model, inputs, reducer, budget)
    except ValueError as error:
        return str(error)


@contextmanager
def remembering_tower(tower: PreTrainedModel) -> Iterator[None]:
    """
    While it lasts, every part of a vision tower that gets the very tensor that it got last returns what it returned
    then, so that reducers behind the tower share one pass through it. Nothing else changes.

    Args:
        tower: a CLIP, SigLIP or DINOv2 vision model, in evaluation mode.
    """
    parts = [tower.embeddings, *tower_layers(tower)]
    if hasattr(tower, "pre_layrnorm"):
        parts.append(tower.pre_layrnorm)
    for part in parts:
        part.forward = _remembering(part.forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


def _remembering(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    last: dict[str, Any] = {}

    @wraps(forward)
    def remembered(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A mask means that a budget token goes along, which every setting has its own of.
        if kwargs or any(argument is not None for argument in args):
            return forward(hidden_states, *args, **kwargs)
        if last.get("given") is not hidden_states:
            last["returned"] = forward(hidden_states, *args)
            last["given"] = hidden_states
        return last["returned"]

    return remembered


def checkpoint_hash(checkpoint: str | Path) -> str:
    """SHA-256 of a checkpoint's configuration and weights; a folder's, or those of a Hub repository in the cache."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(checkpoint), local_files_only=True))
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(_HASHED_AT_ONCE):
                digest.update(block)
    return digest.hexdigest()


def compare_reducers(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    questions: Dataset,
    budgets: Sequence[float],
    reducers: Sequence[ReducerSpec],
    path: Path,
    checkpoint: str,
    about: dict[str, Any],
    batch_size: int = 100,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> dict[str, Any]:
    """
    Answers every question at every budget with every reducer, and once with everything kept.

    Args:
        model: in evaluation mode.
        processor: the model's.
        questions: with the columns `images`, `question`, `answer` and `kind`, one image per question.
        budgets: fractions in [0, 1).
        reducers: see [`answer_questions`].
        path: of the JSON file that holds what was measured, for this call and for later ones.
        checkpoint: the hash of the model's files, see [`checkpoint_hash`]. A file of another checkpoint, or of other
            questions, is begun anew.
        about: what else the file is to say.
        batch_size: questions answered together.
        progress: wraps the loop over batches, for a progress bar.

    Returns:
        The record that is in the file, see [`with_statistics`].
    """
    of = {"checkpoint_hash": checkpoint, "questions_hash": _questions_hash(questions), "num_questions": len(questions)}
    stacks = {EVERYTHING: COMPARED_WITH} | {reducer_label(reducer): reducer for reducer in reducers}
    record = _begun(path, of) | about | circumstances()
    record["num_patches"] = model.config.num_patches
    record["num_layers"] = model.config.text_config.num_hidden_layers
    record |= {"budgets": list(budgets), "reducers": list(stacks)[1:]}
    record |= {"stages": stages(reducers), "papers": papers(reducers)}
    with remembering_tower(model.model.vision_tower):
        asked = _asked_rows(model, processor, questions, stacks, record)
        for start in progress(range(0, len(questions), batch_size)):
            end = min(start + batch_size, len(questions))
            todo = [row for row in asked if not row["refused"] and len(row["right"]) < end]
            if todo:
                started = time.perf_counter()
                _answer(model, processor, questions, start, end, todo, stacks)
                record["seconds"] += time.perf_counter() - started
                _write(record, path)
    record = with_statistics(record, questions["kind"])
    _write(record, path)
    return record


def _write(record: dict[str, Any], path: Path) -> None:
    """Through a second file, so that an interruption leaves a whole one."""
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(record, indent=1))
    partial.replace(path)


def _begun(path: Path, of: dict[str, Any]) -> dict[str, Any]:
    """What is in the file, if it is a measurement of the same."""
    if path.exists():
        record = json.loads(path.read_text())
        if "settings" in record and all(record.get(key) == value for key, value in of.items()):
            return record
    return of | {"seconds": 0.0, "settings": []}


def _questions_hash(questions: Dataset) -> str:
    digest = hashlib.sha256()
    for question, answer in zip(questions["question"], questions["answer"], strict=True):
        digest.update(f"{question}\n{answer}\n".encode())
    return digest.hexdigest()


def _inputs(processor: AdaVTPProcessor, batch: dict[str, list[Any]]) -> Any:
    return processor.of_questions([images[0] for images in batch["images"]], batch["question"])


def _asked_rows(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    questions: Dataset,
    stacks: dict[str, ReducerSpec],
    record: dict[str, Any],
) -> list[dict[str, Any]]:
    """The rows of the record that are asked for; those that are missing are put into it, without answers."""
    settings = [(EVERYTHING, FULL_BUDGET)]
    settings += [(label, budget) for label in record["reducers"] for budget in record["budgets"]]
    known = {(row["reducer"], row["budget"]): row for row in record["settings"]}
    first = _inputs(processor, questions[:1]).to(model.device)
    looked_at = _inputs(processor, questions[:NUM_LOOKED_AT]).to(model.device)
    for label, budget in settings:
        # A refusal is cheap to ask for again, and the reducer may have been mended.
        if known.get((label, budget), {}).get("right"):
            continue
        reason = reason_not_to_measure(model, first, stacks[label], budget)
        known[label, budget] = {
            "reducer": label,
            "budget": budget,
            "num_keep": int(num_tokens_to_keep(budget, model.config.num_patches, 1)),
            "refused": reason,
            "visual_tokens": None if reason else mean_visual_tokens(model, looked_at, stacks[label], budget),
            "right": "",
        }
    record["settings"] = list(known.values())
    return [known[setting] for setting in settings]


def _answer(
    model: AdaVTPForConditionalGeneration,
    processor: AdaVTPProcessor,
    questions: Dataset,
    start: int,
    end: int,
    todo: list[dict[str, Any]],
    stacks: dict[str, ReducerSpec],
) -> None:
    """Questions `start` to `end` for every row of `todo` that has not answered them; images are prepared once."""
    batch = questions[start:end]
    inputs = _inputs(processor, batch).to(model.device)
    for row in todo:
        given = answer_batch(model, processor, inputs, stacks[row["reducer"]], row["budget"])
        marks = "".join("01"[is_right(*pair)] for pair in zip(given, batch["answer"], strict=True))
        # An interrupted run with another batch size may have left a part of this batch answered.
        row["right"] = row["right"][:start] + marks


def stages(reducers: Sequence[ReducerSpec]) -> dict[str, str]:
    """The stage of every reducer, or the stages of a stack, by its label."""
    known = {row["name"]: row["stage"] for row in reducer_table()}
    return {reducer_label(reducer): " + ".join(_each(reducer, known)) for reducer in reducers}


def papers(reducers: Sequence[ReducerSpec]) -> dict[str, str]:
    """Where every reducer was published, or those of a stack, by its label; empty for our own."""
    known = {row["name"]: row["paper"] for row in reducer_table()}
    return {reducer_label(reducer): ", ".join(_each(reducer, known)) for reducer in reducers}


def _each(reducer: ReducerSpec, known: dict[str, str]) -> list[str]:
    names = [entry if isinstance(entry, str) else entry["name"] for entry in reducer_entries(reducer)]
    return list(dict.fromkeys(known[name] for name in names if known.get(name)))


def with_statistics(record: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """
    The record with what follows from its answers.

    Args:
        record: with `num_questions` and `settings`, of which each has `right`, a 0 or 1 for every question.
        kinds: the kind of each question.

    Returns:
        The record; every setting that has answered all questions has also `accuracy`, its 95% Wilson interval
        `accuracy_low` and `accuracy_high`, `accuracy_by_kind`, and, where [`COMPARED_WITH`] has answered them at the
        same budget, `difference`, `difference_low` and `difference_high`: its accuracy minus that one's on the same
        questions, with a 95% interval by paired bootstrap.
    """
    whole = [row for row in record["settings"] if len(row["right"]) == record["num_questions"]]
    right = {(row["reducer"], row["budget"]): _as_array(row["right"]) for row in whole}
    kinds = np.array(kinds)
    for row in whole:
        own, other = right[row["reducer"], row["budget"]], right.get((COMPARED_WITH, row["budget"]))
        row["accuracy"] = float(own.mean())
        row["accuracy_low"], row["accuracy_high"] = wilson_interval(int(own.sum()), len(own))
        row["accuracy_by_kind"] = {str(kind): float(own[kinds == kind].mean()) for kind in np.unique(kinds)}
        if other is not None and row["reducer"] != COMPARED_WITH:
            row["difference"] = float(own.mean() - other.mean())
            row["difference_low"], row["difference_high"] = paired_bootstrap(own, other)
    return record


def _as_array(right: str) -> np.ndarray:
    return np.frombuffer(right.encode(), dtype=np.uint8) == ord("1")


def paired_bootstrap(own: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """
    A 95% interval of the difference of two accuracies on the same questions, by drawing questions anew.

    A question adds 1, 0 or -1 to the difference, so drawing questions with replacement is drawing how often each of
    the three comes: a multinomial of their shares.

    Args:
        own, other: `[num_questions]` bool, right answers.

    Returns:
        The 2.5 and 97.5 percentiles of `own.mean() - other.mean()` over 10,000 draws with a fixed seed.
    """
    num_questions = len(own)
    shares = np.array([(own & ~other).mean(), (other & ~own).mean(), (own == other).mean()])
    draws = np.random.default_rng(SEED).multinomial(num_questions, shares / shares.sum(), size=NUM_RESAMPLES)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / num_questions, [2.5, 97.5])
    return float(low), float(high)
