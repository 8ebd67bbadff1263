"""`Trainer.push_to_hub`, with the folder and the card that `adavtp publish` makes of what the trainer saved.

Saving writes the processor and a training log beside the model, so that a saved folder can say how it came about.
Publishing then takes from such a folder what belongs on the Hub: no optimizer state, no pickled arguments.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress, logging

from ..hub_cards.licence import Origin, origin_of
from ..hub_cards.publish import MODEL_FILES, require_licence, upload
from ..hub_cards.published_folder import published_folder
from ..hub_cards.training_record import TrainingRecord, is_hub_id
from .losses import adavtp_model_of

TRAINING_LOG = "training_log.json"
LAST_CHECKPOINT = "last-checkpoint"

logger = logging.get_logger(__name__)

# One after the other, so that no commit meets another.
_UPLOADS = ThreadPoolExecutor(max_workers=1, thread_name_prefix="push-to-hub")


class HubPushMixin:
    """Gives a `Trainer` class saved folders that can be published, and publishes them. It stands before `Trainer`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See `Trainer`. Writes the processor and the training log beside the model."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            processor = getattr(self.data_collator, "processor", None)
            if self.processing_class is None and hasattr(processor, "save_pretrained"):
                processor.save_pretrained(folder)
            if self.state.log_history:
                (folder / TRAINING_LOG).write_text(json.dumps(self._training_log(), indent=1), encoding="utf-8")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """
        See `Trainer`.

        Raises:
            ValueError: if `args.push_to_hub` is set and the licence is not known, or the model has adapters: now, and
                not when it has been trained.
        """
        if self.args.push_to_hub:
            self._require_whole_model()
            require_licence(self._origin(), "`hub_license` in the training arguments")
        super().init_hf_repo(token=token, private=private)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        license: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Saves the model in `args.output_dir` and publishes it as `args.hub_model_id`, as `adavtp publish` does.

        Args:
            commit_message: of the commit.
            blocking: whether to wait until all is uploaded.
            token: by default `args.hub_token`, or the one that was logged in with.
            revision: branch; by default `args.hub_revision`.
            private: whether a new repository is private; by default `args.hub_private_repo`.
            license: of the model, such as `"llama2"`; by default that of the model it was made from.
            kwargs: for `Trainer`'s own card, which is not written here; each has to be `None`.

        Returns:
            The commit, or a future that will have it; `None` on processes that do not upload.

        Raises:
            ValueError: if the licence is not known, the model has adapters, the saved folder is not whole, or an
                argument has no meaning here.
            HubRefused: if the Hub does not take it.
        """
        if given := {name: value for name, value in kwargs.items() if value is not None}:
            raise ValueError(
                f"`push_to_hub` got {given}; the card is made from the folder's files and takes `license`."
            )
        # On every process, so that all of them stop here or none.
        self._require_whole_model()
        origin = self._origin(license)
        require_licence(origin, "`push_to_hub(license=...)`, or `hub_license` in the training arguments")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        private = self.args.hub_private_repo if private is None else private
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._publish(
            *(Path(self.args.output_dir), origin, commit_message),
            **{"token": token, "revision": revision or self.args.hub_revision, "private": private},
            in_background=not blocking,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """See `Trainer`: what `args.hub_strategy` asks for when a checkpoint was saved."""
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        of_strategy = {
            HubStrategy.CHECKPOINT: LAST_CHECKPOINT,
            HubStrategy.ALL_CHECKPOINTS: Path(checkpoint_folder).name,
        }
        try:
            job = self._publish(
                *(Path(checkpoint_folder), self._origin(), f"Training in progress, step {self.state.global_step}"),
                **{"token": self.args.hub_token, "revision": self.args.hub_revision},
                private=self.args.hub_private_repo,
                in_background=True,
                whole_as=of_strategy.get(strategy),
            )
        except ValueError as error:
            # Sharded checkpoints (FSDP) have no weights that could be published. Training goes on without.
            logger.warning(f"{checkpoint_folder} is not pushed: {error}")
            return
        self.push_in_progress = PushInProgress([job])

    def _publish(
        self,
        saved: Path,
        origin: Origin,
        message: str | None,
        in_background: bool,
        whole_as: str | None = None,
        **how: Any,
    ) -> CommitInfo | Future[CommitInfo]:
        """
        Publishes a saved folder.

        Args:
            saved: the folder.
            origin: base model and licence.
            message: of the commit.
            in_background: whether training goes on during the upload.
            whole_as: folder of the repository that the saved one goes to as it is as well, to resume from.
            how: see [`upload`].
        """
        record = TrainingRecord.found_in(saved)
        with ExitStack() as stack:
            # Beside it: a second name for every file, which stays when the checkpoint is deleted during the upload.
            temporary = TemporaryDirectory(dir=self.args.output_dir, prefix="_publishing-")
            folder = Path(stack.enter_context(temporary))
            published_folder(saved, folder, self.hub_model_id, record, origin, place=_link_or_copy)
            if whole_as is not None:
                shutil.copytree(saved, folder / whole_as, copy_function=_link_or_copy)
            until_uploaded = stack.pop_all()

        def send() -> CommitInfo:
            with until_uploaded:
                replaced = (*MODEL_FILES, f"{LAST_CHECKPOINT}/*")
                return upload(folder, self.hub_model_id, message or "Model", replaced=replaced, **how).commit

        return _UPLOADS.submit(_with_its_failure_logged, send) if in_background else send()

    def _require_whole_model(self) -> None:
        if hasattr(self.accelerator.unwrap_model(self.model), "get_base_model"):
            raise ValueError(
                "The model has adapters, which nobody could load by their repository id alone: save them, merge them "
                "with `adavtp merge`, and publish what comes of it with `adavtp publish`."
            )

    def _origin(self, license: str | None = None) -> Origin:
        """What the model was loaded from, and under which licence that is, as far as it is known."""
        began = adavtp_model_of(self.model).config.name_or_path
        license = license or getattr(self.args, "hub_license", None)
        if not began or Path(began).resolve() == Path(self.args.output_dir).resolve():
            return Origin(None, license)
        return origin_of(began, TrainingRecord(), began if is_hub_id(began) else None, license)

    def _training_log(self) -> dict[str, Any]:
        """What a model card says of the training, in the form of a recipe's stage."""
        origin, budgets = self._origin(), getattr(self.data_collator, "budgets", self.train_dataset)
        named = ("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "train_parts")
        stage = {
            "name": Path(self.args.output_dir).resolve().name,
            "kind": "conversations",
            "data": _data_of(self.train_dataset),
            "budgets": {
                name: getattr(budgets, name) for name in ("budget_range", "per") if getattr(budgets, name, None)
            },
            "training": {"max_steps": self.state.global_step} | {name: getattr(self.args, name) for name in named},
        }
        log = [entry for entry in self.state.log_history if "loss" in entry or "eval_loss" in entry]
        return {"stage": stage, "base_model": origin.base_model, "license": origin.license, "log": log}


def _data_of(dataset: Any) -> dict[str, Any]:
    """The Hub's name of a data set that was downloaded from there, and its split; empty for any other."""
    rows = getattr(dataset, "rows", dataset)
    urls = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    for url in urls:
        user, slash, rest = str(url).removeprefix("hf://datasets/").partition("/")
        if str(url).startswith("hf://datasets/") and slash:
            return {"path": f"{user}/{rest.partition('@')[0]}", "split": str(rows.split)}
    return {}


def _with_its_failure_logged(send: Callable[[], CommitInfo]) -> CommitInfo:
    """Nobody waits for what is uploaded during training, so what goes wrong there is said here."""
    try:
        return send()
    except Exception as error:
        logger.warning(f"A push to the Hub failed: {error}")
        raise


def _link_or_copy(source: Path | str, target: Path | str) -> None:
    try:
        os.link(source, target)
    except OSError:
        # Some file systems have no second names.
        shutil.copyfile(source, target)
