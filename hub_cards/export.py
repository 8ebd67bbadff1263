"""From a training run's checkpoint to a folder for the Hub: weights, code, processor, card and what the card cites."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..evaluation.settings import UNTRAINED_REDUCER
from ..modeling.hub.loading import family_class, is_stock
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from .licence import origin_of
from .output_folder import folder_beside, require_output_folder
from .published_folder import CARRIED, FORMER, KINDS, add_card, has_budget, own_files_by_kind, require_no_adapter
from .sound_weights import require_finite
from .training_record import TrainingRecord, is_hub_id


def export_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    name: str | None = None,
    recipe: str | Path | None = None,
    training_logs: Sequence[str | Path] | None = None,
    evaluations: Sequence[str | Path] | None = None,
    base_model: str | None = None,
    license: str | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """
    Writes a folder that loads anywhere with `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

    Exporting a folder onto itself brings its code and its card up to date. Nothing in `output_dir` changes unless
    everything could be written.

    Args:
        checkpoint: folder or Hub repository with model and processor.
        output_dir: where to write: a new or empty folder, or one with an earlier export.
        name: what the card's snippet loads, such as the repository id; by default the name of `output_dir`.
        recipe: YAML file of the run; becomes `recipe.yaml`.
        training_logs: JSON files of the run's stages, in order; become `training_log_<number>_<stage>.json`.
        evaluations: JSON files with results; one becomes `evaluation.json`, several `evaluation_<number>.json`. See
            [`TrainingRecord`] for what is in them. Of these three, what is not given is taken from the checkpoint's
            folder where it is there.
        base_model, license: what the card says, where [`origin_of`] could not tell.
        trust_remote_code: whether code that the checkpoint brings may run, such as reducers of its own.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if `output_dir` holds something else, a file is not what it should be, or a weight is not finite.
        OSError: if there is no checkpoint, or a file does not exist.
    """
    checkpoint, output_dir = str(checkpoint), Path(output_dir)
    require_output_folder(output_dir, "an AdaVTP checkpoint", _is_checkpoint)
    require_no_adapter(checkpoint)
    record = TrainingRecord.found_in(checkpoint, recipe, training_logs, evaluations)
    origin = origin_of(checkpoint, record, base_model or (checkpoint if is_hub_id(checkpoint) else None), license)
    # A LLaVA gets a controller to train; what others may have without any training is what chooses there.
    chosen = {"reducer": UNTRAINED_REDUCER} if _is_stock_family(checkpoint) else {}
    model = AdaVTPForConditionalGeneration.from_pretrained(checkpoint, **chosen, trust_remote_code=trust_remote_code)
    require_finite(model.state_dict(), f"`checkpoint` is {checkpoint!r}, which")
    processor = model.processor
    with folder_beside(output_dir) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        found = own_files_by_kind(Path(checkpoint))
        for path in [path for kind in CARRIED for path in found[kind]]:
            shutil.copyfile(path, folder / path.name)
        add_card(folder, name or output_dir.resolve().name, record, origin)
        _move_into(folder, output_dir)
    return output_dir


def _is_stock_family(checkpoint: str) -> bool:
    return family_class(checkpoint, {}) is not None and is_stock(checkpoint)


def _is_checkpoint(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and has_budget(config)


def _move_into(folder: Path, output_dir: Path) -> None:
    """Moves every file, and removes those of an earlier export that have no successor."""
    for pattern in [*FORMER, *(pattern for patterns in KINDS.values() for pattern in patterns)]:
        for path in output_dir.glob(pattern):
            if not (folder / path.relative_to(output_dir)).exists():
                path.unlink()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        place = output_dir / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)
