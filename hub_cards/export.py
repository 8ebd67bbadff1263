"""From a training run's checkpoint to a folder for the Hub: weights, code, processor, card and what the card cites."""

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration
from ..modeling.processing_adavtp import AdaVTPProcessor
from .model_card import LOG_FIELDS, model_card, read_record

RECIPE = "recipe.yaml"


def export_checkpoint(
    checkpoint: str | Path,
    output_dir: str | Path,
    name: str | None = None,
    recipe: str | Path | None = None,
    training_logs: Sequence[str | Path] | None = None,
    evaluations: Sequence[str | Path] | None = None,
) -> Path:
    """
    Writes a folder that loads anywhere with `AutoModel.from_pretrained(folder, trust_remote_code=True)`.

    Exporting a folder onto itself brings its code and its card up to date. Nothing in `output_dir` changes unless
    everything could be written.

    Args:
        checkpoint: folder or Hub repository with model and processor. The code of reducers that it brings is run.
        output_dir: where to write: a new or empty folder, or one with an earlier export.
        name: what the card's snippet loads, such as the repository id; by default the name of `output_dir`.
        recipe: YAML file of the run; becomes `recipe.yaml`.
        training_logs: JSON files of the run's stages, in order; become `training_log_<number>_<stage>.json`.
        evaluations: JSON files with results; one becomes `evaluation.json`, several `evaluation_<number>.json`. See
            [`model_card`] for what is in them. Of these three, what is not given is taken from the checkpoint's folder
            where it is there.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if `output_dir` holds something else, or a file is not what it should be.
        OSError: if there is no checkpoint, or a file does not exist.
    """
    checkpoint, output_dir = str(checkpoint), Path(output_dir)
    _check_output(output_dir)
    found = Path(checkpoint)
    if recipe is None and (found / RECIPE).is_file():
        recipe = found / RECIPE
    training_logs = sorted(found.glob("training_log*.json")) if training_logs is None else training_logs
    evaluations = sorted(found.glob("evaluation*.json")) if evaluations is None else evaluations
    model = AdaVTPForConditionalGeneration.from_pretrained(checkpoint, trust_remote_code=True)
    processor = AdaVTPProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, so that the files move into place by renaming.
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        folder = Path(temporary)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        sources = _copy_sources(folder, recipe, training_logs, evaluations)
        model_card(model, processor, name or output_dir.resolve().name, *sources).save(folder / "README.md")
        _move_into(folder, output_dir)
    return output_dir


def _check_output(output_dir: Path) -> None:
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    config = output_dir / "config.json"
    if not config.is_file() or json.loads(config.read_text(encoding="utf-8")).get("model_type") != "adavtp":
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which holds something else; expected is a new or an empty folder, "
            "or one with an AdaVTP checkpoint, which is replaced."
        )


def _copy_sources(
    folder: Path, recipe: str | Path | None, training_logs: Sequence[str | Path], evaluations: Sequence[str | Path]
) -> tuple[Path | None, list[Path], list[Path]]:
    """Copies what the card cites into the folder under the names it has there."""
    stages = [read_record(path, LOG_FIELDS)["stage"]["name"] for path in training_logs]
    log_names = [f"training_log_{number:02}_{stage}.json" for number, stage in enumerate(stages, start=1)]
    evaluation_names = [f"evaluation_{number:02}.json" for number in range(1, len(evaluations) + 1)]
    if len(evaluations) == 1:
        evaluation_names = ["evaluation.json"]
    return (
        None if recipe is None else Path(shutil.copyfile(recipe, folder / RECIPE)),
        [Path(shutil.copyfile(a, folder / b)) for a, b in zip(training_logs, log_names, strict=True)],
        [Path(shutil.copyfile(a, folder / b)) for a, b in zip(evaluations, evaluation_names, strict=True)],
    )


def _move_into(folder: Path, output_dir: Path) -> None:
    """Moves every file, and removes those of an earlier export that have no successor."""
    output_dir.mkdir(exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    outdated = ("*_adavtp.py", "model*.safetensors*", "training_log*.json", "evaluation*.json")
    for path in [path for pattern in outdated for path in output_dir.glob(pattern)]:
        if path.name not in names:
            path.unlink()
    for path in folder.iterdir():
        path.replace(output_dir / path.name)
