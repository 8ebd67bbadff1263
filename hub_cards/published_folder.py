"""What of a checkpoint's folder goes to the Hub, under which names.

A published folder has weights in safetensors form, configuration, processor, code, the record of the training, and a
card made from all of these; nothing else. Optimizer states, training arguments and other pickles stay where they are,
and are named, so that nobody takes them for published. `adavtp export`, `adavtp publish` and `Trainer.push_to_hub` all
make their folders here.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from ..modeling.hub.loading import damaged_file
from ..modeling.hub.own_files import failures_in_words, indexed_files, require_own_file, require_own_files
from ..modeling.hub.saving import CODE_FOLDER
from ..modeling.modeling_families import model_class_of
from .curve_picture import save_curve
from .licence import Origin
from .model_card import curve_names, model_card
from .reference_code import led_directly
from .sound_weights import require_sound_weights
from .training_record import CONVERSION, RECIPE, TrainingRecord

# Kind -> patterns of the names that published files have. The last two kinds are written anew each time.
KINDS: dict[str, tuple[str, ...]] = {
    "weights": ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    "configuration": ("config.json", "generation_config.json"),
    "processor": (
        *("processor_config.json", "preprocessor_config.json", "chat_template.jinja", "chat_template.json"),
        "additional_chat_templates/*.jinja",
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("tokenizer.model", "vocab.json", "merges.txt"),
    ),
    "code": (f"{CODE_FOLDER}/[a-z]*.py",),
    "licence": ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"),
    "conversion": (CONVERSION,),
    "record": (RECIPE, "training_log*.json", "evaluation*.json"),
    "card": ("README.md", "budget_curve*.png"),
}
# Names of earlier publications, which go with the next one: code lay beside the weights.
FORMER = ("*_adavtp.py",)
WRITTEN_ANEW = ("record", "card")
# What saving a loaded model would not write again.
CARRIED = ("licence", "conversion")
NEEDED = ("weights", "configuration", "processor", "code")
INDEX = "model.safetensors.index.json"


def files_by_kind(folder: Path) -> dict[str, list[Path]]:
    """The publishable files of a folder, kind by kind; a kind may have none."""
    return {
        kind: sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
        for kind, patterns in KINDS.items()
    }


def own_files_by_kind(folder: Path) -> dict[str, list[Path]]:
    """
    The publishable files of a checkpoint, kind by kind.

    Raises:
        ValueError: if one is a link to somewhere else.
    """
    files = files_by_kind(folder)
    for path in [path for paths in files.values() for path in paths]:
        require_own_file(path, folder)
    return files


def published_folder(
    checkpoint: str | Path,
    folder: Path,
    name: str,
    record: TrainingRecord,
    origin: Origin,
    place: Callable[[Path, Path], object] = os.symlink,
) -> list[str]:
    """
    Puts a saved checkpoint's files into a folder as they are published, with a card of its own.

    Args:
        checkpoint: folder of the checkpoint, which is only read.
        folder: to fill; it exists.
        name, record, origin: what the card says; see [`model_card`].
        place: puts a weight file (first argument, an absolute path) in its place (second); a link by default, since
            weights are large.

    Returns:
        Names in the checkpoint's folder that are not published.

    Raises:
        ValueError: if the checkpoint is not whole, is not of AdaVTP in safetensors form with its own code, has files
            that lie elsewhere, or weights that do not fit its configuration or are not finite.
    """
    checkpoint = Path(checkpoint).absolute()
    with failures_in_words("checkpoint", checkpoint):
        _require_whole(checkpoint, files_by_kind(checkpoint))
    require_own_files(checkpoint)
    require_sound_weights(checkpoint)
    files = own_files_by_kind(checkpoint)
    for kind, paths in files.items():
        for path in [] if kind in WRITTEN_ANEW else paths:
            (folder / path.relative_to(checkpoint)).parent.mkdir(exist_ok=True)
            (place if path.suffix == ".safetensors" else shutil.copyfile)(path, folder / path.relative_to(checkpoint))
    for path in [folder / "config.json", *folder.glob("processor_config.json")]:
        path.write_text(led_directly(path.read_text(encoding="utf-8")), encoding="utf-8")
    for path in folder.glob("tokenizer_config.json"):
        with failures_in_words("processor", checkpoint):
            path.write_text(padded_left(path.read_text(encoding="utf-8")), encoding="utf-8")
    add_card(folder, name, record, origin)
    known = {path.relative_to(checkpoint).parts[0] for paths in files.values() for path in paths}
    return sorted(path.name for path in checkpoint.iterdir() if path.name not in known)


def add_card(folder: Path, name: str, record: TrainingRecord, origin: Origin) -> None:
    """Writes the record's files, the pictures and the card into a folder that has model and processor."""
    record = record.copy_to(folder)
    for result, curve in zip(record.results, curve_names(record), strict=True):
        save_curve(result, folder / curve)
    model_card(folder, name, record, origin).save(folder / "README.md")


def padded_left(tokenizer_config: str) -> str:
    """The text of a tokenizer_config.json that says to pad on the left, from whose last column `generate` goes on."""
    fields = json.loads(tokenizer_config)
    if not isinstance(fields, dict) or fields.get("padding_side") == "left":
        return tokenizer_config
    return json.dumps(fields | {"padding_side": "left"}, indent=2, ensure_ascii=False) + "\n"


def model_type_in(config: Path) -> str | None:
    """
    What a config.json says the model is.

    Raises:
        ValueError: if it is no JSON object.
    """
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(config)!r} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{str(config)!r} holds a {type(fields).__name__}; expected is a JSON object.")
    return fields.get("model_type")


def has_budget(config: Path) -> bool:
    """
    Whether a config.json is of a model of ours, LLaVA's or of another family, which keeps its family's model type.

    Raises:
        ValueError: if it is no JSON object.
    """
    led_to = json.loads(config.read_text(encoding="utf-8")).get("auto_map") if model_type_in(config) else None
    is_of_family = isinstance(led_to, dict) and f"{CODE_FOLDER}/modeling_families." in str(led_to.get("AutoModel"))
    return model_type_in(config) == "adavtp" or is_of_family


def require_no_adapter(checkpoint: str | Path) -> None:
    """`ValueError` if a folder has an adapter, which is no checkpoint without its base."""
    if (Path(checkpoint) / "adapter_config.json").is_file():
        raise ValueError(
            f"`checkpoint` is {str(checkpoint)!r}, an adapter; `adavtp merge` makes a whole checkpoint of it and its "
            "base."
        )


def _way_from(kind: str | None) -> str:
    """How a checkpoint of ours is made of a model of another kind, where there is a way."""
    if kind is None:
        return ""
    if kind == "llava":
        return "; `adavtp convert` makes a checkpoint of it"
    try:
        model_class_of(kind)
    except ValueError as error:
        return f". {str(error).removesuffix('.')}"
    return " or one of another family with its code; `adavtp export` makes a checkpoint of it"


def _require_whole(checkpoint: Path, files: dict[str, list[Path]]) -> None:
    """That the folder has what a model needs to be loaded anywhere."""
    if not checkpoint.is_dir():
        raise ValueError(f"`checkpoint` is {str(checkpoint)!r}, which is not a folder.")
    require_no_adapter(checkpoint)
    named = f"`checkpoint` is {str(checkpoint)!r}, which has"
    config = checkpoint / "config.json"
    kind = model_type_in(config) if config.is_file() else None
    if kind is None or not has_budget(config):
        found = f"a {kind!r} model" if kind else "no config.json"
        raise ValueError(f"{named} {found}; expected is an 'adavtp' model{_way_from(kind)}.")
    missing = [kind for kind in NEEDED if not files[kind]]
    if (checkpoint / INDEX).is_file():
        shards = indexed_files(checkpoint / INDEX).values()
        missing += sorted(shard for shard in set(shards) if not (checkpoint / shard).is_file())
    if damage := damaged_file(checkpoint):
        raise ValueError(damage)
    if missing:
        raise ValueError(
            f"{named} no {', '.join(missing)}; a published folder needs weights in safetensors form "
            f"({', '.join(KINDS['weights'])}), configuration, processor and code, as `save_pretrained` of model and "
            "processor, and `adavtp export`, write them."
        )
