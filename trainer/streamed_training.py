"""`transformers.Trainer` over a [`ConversationStream`]: what the stream decides, nothing else decides again.

The stream gives each process its own samples, so no library shards it. It is one endless epoch to `Trainer`:
gradients are accumulated across the end of an epoch of the data, and every step has all of its batches. Batches carry
the stream's position behind them, so a checkpoint has that of the last batch that was trained on, however many were
fetched ahead; a resumed run reads on from there.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .data.rejected_samples import RejectedSamples
from .data.stream import ConversationStream


class StreamProgress(TrainerCallback, ExportableState):
    """
    How far a run is in its stream. It travels in `trainer_state.json`, so a whole checkpoint has it.

    Attributes:
        position: the stream's state behind the last batch that was trained on.
        num_rejected: samples that were left out, in all processes.
    """

    def __init__(self) -> None:
        self.position: dict[str, Any] | None = None
        self.num_rejected = 0
        self._epoch = 0
        self._rejected: RejectedSamples | None = None

    def state(self) -> dict[str, Any]:
        """See `ExportableState`."""
        return {"args": {}, "attributes": {"position": self.position, "num_rejected": self.num_rejected}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the stream where the checkpoint says."""
        stream = kwargs["train_dataloader"].dataset
        self._rejected = RejectedSamples(args.output_dir, args.world_size, args.process_index)
        self._rejected.begin(state.global_step)
        if state.global_step == 0:
            self.position, self.num_rejected = stream.state_dict(), 0
            self._epoch = self.position["epoch"]
            return
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is None:
            raise ValueError(
                f"`resume_from_checkpoint`: the checkpoint of step {state.global_step} has no position in a stream, "
                "because its run trained on a plain data set. Go on with that data set."
            )
        self.position, self.num_rejected = saved["attributes"]["position"], saved["attributes"]["num_rejected"]
        self._epoch = self.position["epoch"]
        stream.load_state_dict(self.position)

    def advance(self, batches: list[dict[str, Any]], step: int) -> int:
        """Takes out of a step's batches where the stream stands behind them, and how many rows this process rejected,
        which it returns."""
        rejected = [sample for batch in batches for sample in batch.pop("rejected")]
        self.position = [batch.pop("stream_position") for batch in batches][-1]
        self._rejected.add(rejected, step)
        return len(rejected)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Counts epochs of the data, and does at their ends what the arguments ask for at an epoch's end."""
        num_batches = kwargs["train_dataloader"].dataset.num_batches
        before, self._epoch = self._epoch, self.position["epoch"]
        # Of a streamed data set nobody knows which part of an epoch a batch is.
        state.epoch = self._epoch + (self.position["batch"] / num_batches if num_batches else 0.0)
        # At the end of the run `Trainer` does the same.
        if self._epoch > before and state.global_step < state.max_steps:
            control.should_log |= args.logging_strategy == "epoch"
            control.should_save |= args.save_strategy == "epoch"
            control.should_evaluate |= args.eval_strategy == "epoch" and args.eval_delay <= state.epoch


class StreamedTraining(Trainer):
    """
    A `Trainer` whose training data may be a [`ConversationStream`]; with others it does what `Trainer` does.

    Rows that the stream rejected are listed in the run's folder and counted in every entry of the log, as
    `rejected_samples`. `num_train_epochs` counts epochs of the data, and batches that do not fill a last step are left
    out; of a streamed data set `max_steps` has to say how long to train.

    Args:
        args: see `Trainer`; `ignore_data_skip` is set, because the stream goes on by itself.
        kwargs: see `Trainer`.

    Raises:
        ValueError: if the stream's batches have another size than `args` says, its epochs do not fill a step, or
            `args` divides a sample over processes. When a run is resumed: if its stream was another one.
    """

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, **kwargs: Any) -> None:
        super().__init__(model=model, args=args, **kwargs)
        if isinstance(self.train_dataset, ConversationStream):
            self.args.ignore_data_skip = True
            self.add_callback(StreamProgress())

    @property
    def stream_progress(self) -> StreamProgress | None:
        """`None` where the training data is no stream."""
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, StreamProgress)), None)

    def get_train_dataloader(self) -> DataLoader:
        """See `Trainer`. A stream's loader gives this process's batches, and is not shared out again."""
        stream, args = self.train_dataset, self.args
        if not isinstance(stream, ConversationStream):
            return super().get_train_dataloader()
        if stream.batch_size != self._train_batch_size:
            raise ValueError(
                f"`train_dataset` makes batches of {stream.batch_size} and `args` asks for {self._train_batch_size} "
                "in each process; give the stream `batch_size=args.train_batch_size`."
            )
        if (
            self.get_total_train_batch_size(args)
            != stream.batch_size * args.gradient_accumulation_steps * args.world_size
        ):
            raise ValueError(
                "`args` divides a sample over processes (tensor, context or sequence parallelism); a stream gives "
                "each process samples of its own."
            )
        return DataLoader(
            stream.endless(args.world_size, args.process_index),
            batch_size=stream.batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            # Workers get their seeds from here, and not from the numbers that a checkpoint puts back.
            generator=torch.Generator().manual_seed(args.seed),
        )

    def set_initial_training_values(self, args: TrainingArguments, dataloader: DataLoader) -> tuple[Any, ...]:
        """See `Trainer`. Of a stream with a length, the number of steps follows from the number of epochs."""
        stream = dataloader.dataset
        if not isinstance(stream, ConversationStream):
            return super().set_initial_training_values(args, dataloader)
        if args.max_steps <= 0:
            num_batches = math.floor(args.num_train_epochs * stream.num_batches)
            args = copy.copy(args)
            args.max_steps = num_batches // args.gradient_accumulation_steps
            if args.max_steps < 1:
                raise ValueError(
                    f"`train_dataset` has {num_batches} batch(es) in {args.num_train_epochs} epoch(s) and "
                    f"`gradient_accumulation_steps` is {args.gradient_accumulation_steps}; that is less than a step."
                )
        _, *others = super().set_initial_training_values(args, dataloader)
        return 1, *others

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """See `Trainer`. Takes out of a step's batches what is not for the model: position and rejected samples."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        progress = self.stream_progress
        if progress is not None and batches:
            num_rejected = progress.advance(batches, self.state.global_step + 1)
            progress.num_rejected += self._over_processes(num_rejected, device)
        return batches, num_items

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer`. Adds how many samples were rejected so far, in all processes."""
        if self.stream_progress is not None:
            logs["rejected_samples"] = self.stream_progress.num_rejected
        super().log(logs, start_time)

    def _over_processes(self, number: int, device: torch.device) -> int:
        if self.args.world_size == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=device)).sum())
