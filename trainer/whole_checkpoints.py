"""Checkpoints of training that are whole, or are not taken for checkpoints.

A checkpoint is many files, written by several processes, and a run can end between any two of them. So the folder is
marked twice: with a file that says it is being written, before the first of the others, and, when every process has
written its part, with the list of all files and their sizes. The list is written last, in one piece. What has it, and
has the files that it names, is whole.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..modeling.hub.own_files import require_own_files

BEING_WRITTEN = "checkpoint_is_being_written"
FILE_LIST = "whole_checkpoint.json"

logger = logging.get_logger(__name__)


def begin_checkpoint(folder: str | Path) -> None:
    """Makes an empty folder that says it is being written. What an earlier run left there is removed."""
    folder = Path(folder)
    if folder.exists():
        _discard(folder)
    folder.mkdir(parents=True)
    (folder / BEING_WRITTEN).touch()
    _flush(folder)


def finish_checkpoint(folder: str | Path) -> None:
    """Says that a checkpoint is whole. To be called by one process when all have written their parts."""
    folder, marks = Path(folder), (BEING_WRITTEN, FILE_LIST, f".{FILE_LIST}")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in marks)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    for name in files:
        _flush(folder / name)
    unnamed = folder / f".{FILE_LIST}"
    unnamed.write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
    _flush(unnamed)
    unnamed.replace(folder / FILE_LIST)
    (folder / BEING_WRITTEN).unlink(missing_ok=True)
    _flush(folder)


def what_is_missing(folder: str | Path) -> str | None:
    """
    Why a folder is not a whole checkpoint; `None` if it is one.

    Checkpoints of older versions, and of `Trainer` itself, have neither mark. They are taken for whole if they have
    the file that is written last there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if not (folder / FILE_LIST).is_file():
        if (folder / BEING_WRITTEN).is_file():
            return "the run ended while it was being written"
        return None if (folder / TRAINER_STATE_NAME).is_file() else f"it has no {TRAINER_STATE_NAME}"
    try:
        files = dict(json.loads((folder / FILE_LIST).read_text(encoding="utf-8"))["files"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        return f"its {FILE_LIST} is no list of its files ({type(error).__name__})"
    for name, size in files.items():
        if not (folder / name).is_file():
            return f"its file {name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"its file {name} has {found} bytes and had {size} when it was written"
    return None


def require_whole(folder: str | Path) -> None:
    """Raises `ValueError` for a folder that is no whole checkpoint, or has files elsewhere; it says which."""
    if reason := what_is_missing(folder):
        raise ValueError(
            f"`resume_from_checkpoint` is {str(folder)!r}, which is not a whole checkpoint: {reason}. Name "
            "another, or pass True for the last whole one."
        )
    require_own_files(folder)


def last_whole_checkpoint(folder: str | Path) -> str | None:
    """The whole checkpoint of the highest step in a run's folder. Later ones are passed over with a warning each."""
    for step, path in sorted(_checkpoints_in(folder), reverse=True):
        reason = what_is_missing(path)
        if reason is None:
            return str(path)
        logger.warning(f"{path} of step {step} is passed over, it is not a whole checkpoint: {reason}.")
    return None


def rotate_whole_checkpoints(folder: str | Path, limit: int | None, protected: Collection[str | Path] = ()) -> None:
    """
    Deletes checkpoints of a run until `limit` are left (`None` or 0: all stay): what is not whole first, then the
    oldest, and in no case one that is `protected`.
    """
    if not limit or limit < 0:
        return
    protected = {Path(path).resolve() for path in protected}
    paths = [path for _, path in _checkpoints_in(folder)]
    # By time and not by step: a run that was begun anew in the same folder is the newer one.
    paths.sort(key=lambda path: (what_is_missing(path) is None, path.stat().st_mtime_ns))
    free = [path for path in paths if path.resolve() not in protected]
    num_staying = max(limit, len(paths) - len(free))
    for path in free[: max(0, len(paths) - num_staying)]:
        _discard(path)


class WholeCheckpointsMixin:
    """
    Gives a `Trainer` class checkpoints that are whole or passed over. It stands before `Trainer`.

    Several machines need a file system that all of them see, or `save_on_each_node`.
    """

    _asked: dict[str, Any] = {}

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        See `Trainer`.

        Args:
            resume_from_checkpoint: a checkpoint, or `True` for the last whole one in `args.output_dir`.

        Raises:
            ValueError: if the checkpoint is not whole, or there is none; or if `args.save_only_model` is set, whose
                checkpoints have no optimizer to go on with.
        """
        if resume_from_checkpoint and self.args.save_only_model:
            raise ValueError(
                f"`resume_from_checkpoint` is {str(resume_from_checkpoint)!r} and `save_only_model` is True; "
                "such checkpoints have no state of the optimizer, so the run would end with other weights. Set it to "
                "False, or load the checkpoint's model and begin anew."
            )
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_whole_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"`resume_from_checkpoint` is True, and there is no whole checkpoint in {self.args.output_dir!r}; "
                    "pass None to begin."
                )
        elif resume_from_checkpoint:
            require_whole(resume_from_checkpoint)
            resume_from_checkpoint = str(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """See `Trainer`. A run that ended behind its last checkpoint has no step left to do; `Trainer` alone would
        take one more before it looks how many there are to be."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """See `Trainer`. Older checkpoints go, and this one is uploaded, when it is whole and not before."""
        run_folder = Path(self._get_output_dir(trial=trial))
        folder = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()
        with self._arguments(save_total_limit=None, push_to_hub=False) as self._asked:
            super()._save_checkpoint(model, trial)
        self._asked = {}
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(folder)
            best = self.state.best_model_checkpoint
            rotate_whole_checkpoints(run_folder, self.args.save_total_limit, [folder] + [best] * (best is not None))
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """See `Trainer`. The arguments are saved as they were given."""
        with self._arguments(**self._asked):
            super()._save(*args, **kwargs)

    @contextmanager
    def _arguments(self, **values: Any) -> Iterator[dict[str, Any]]:
        """Other training arguments for a while; yields those that they replace."""
        replaced = {name: getattr(self.args, name) for name in values}
        vars(self.args).update(values)
        try:
            yield replaced
        finally:
            vars(self.args).update(replaced)


def _checkpoints_in(folder: str | Path) -> Iterator[tuple[int, Path]]:
    """Step and folder of everything that looks like a checkpoint."""
    for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            yield int(step), path


def _discard(folder: Path) -> None:
    # What a checkpoint is known by goes first: a process that ends on the way leaves nothing that looks whole.
    (folder / FILE_LIST).unlink(missing_ok=True)
    (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _flush(path: Path) -> None:
    """Waits until a file, or the list of a folder's files, is on the disk and not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
