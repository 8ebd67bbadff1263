"""Under which licence a model may be published: that of what it was made from.

Weights inherit the terms of the weights they began as. So the licence is what somebody says, or what the base model's
own card says, and never a guess: where nothing says it, it is not known, and nothing is published.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard
from yaml import YAMLError

from .training_record import TrainingRecord, is_hub_id

# Licences of the language models that these come from: Vicuna 1.5 from Llama 2, and Mistral-7B-Instruct-v0.2.
OF_BASE_MODELS = {
    "llava-hf/llava-1.5-7b-hf": "llama2",
    "llava-hf/llava-1.5-13b-hf": "llama2",
    "llava-hf/llava-v1.6-vicuna-7b-hf": "llama2",
    "llava-hf/llava-v1.6-vicuna-13b-hf": "llama2",
    "llava-hf/llava-v1.6-mistral-7b-hf": "apache-2.0",
    "liuhaotian/llava-v1.5-7b": "llama2",
    "liuhaotian/llava-v1.5-13b": "llama2",
    "liuhaotian/llava-v1.6-vicuna-7b": "llama2",
    "liuhaotian/llava-v1.6-vicuna-13b": "llama2",
    "liuhaotian/llava-v1.6-mistral-7b": "apache-2.0",
}
OF_DRAWN_TASKS = "apache-2.0"
_IN_THE_HUBS_SPELLING = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class Origin:
    """
    The model on the Hub that training, or conversion, began with, and a licence in the Hub's spelling, such as
    `"llama2"`. `None` for a model from nothing, or where it is not known.
    """

    base_model: str | None
    license: str | None


def origin_of(
    folder: str | Path,
    record: TrainingRecord,
    base_model: str | None = None,
    license: str | None = None,
    passed: frozenset[Path] = frozenset(),
) -> Origin:
    """
    Where a checkpoint comes from, and what it may be published under.

    Said in so many words goes first, then what the folder's card says, then where the record's base model comes from:
    in the same way, where that is a folder; a well-known repository has a licence here. Last comes what a trainer
    wrote down. What learned a drawn task alone, from nothing, is ours.

    Args:
        folder: of the checkpoint.
        record: of its training.
        base_model, license: what the user says.
        passed: folders that the search came through, which are not asked again.

    Raises:
        ValueError: if `base_model` is no repository's id, or `license` not in the Hub's spelling.
    """
    if base_model is not None and not is_hub_id(base_model):
        raise ValueError(f"`base_model` is {base_model!r}; expected is a repository's id on the Hub, 'owner/name'.")
    if license is not None and not _IN_THE_HUBS_SPELLING.fullmatch(license):
        raise ValueError(f"`license` is {license!r}; expected is the Hub's spelling, such as llama2 or apache-2.0.")
    card, passed = _origin_on_card(folder), passed | {Path(folder).resolve()}
    began = base_model or card.base_model or record.base_model
    source = Origin(None, None)
    if is_hub_id(began):
        source = Origin(began, OF_BASE_MODELS.get(began))
    elif began is not None and Path(began).resolve() not in passed:
        source = origin_of(began, TrainingRecord.found_in(began), passed=passed)
    elif began is None and record.drawn_task is not None:
        source = Origin(None, OF_DRAWN_TASKS)
    return Origin(source.base_model, license or card.license or source.license or record.license)


def _origin_on_card(folder: str | Path) -> Origin:
    """What the metadata of a folder's README.md says."""
    path = Path(folder) / "README.md"
    if not path.is_file():
        return Origin(None, None)
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except YAMLError as error:
        raise ValueError(f"The metadata of {str(path)!r} are not YAML: {error}") from error
    base = data.get("base_model")
    base = base[0] if isinstance(base, list) and len(base) == 1 else base
    return Origin(base if is_hub_id(base) else None, data.get("license"))
