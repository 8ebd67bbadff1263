"""Measured cost: time to first token, decoding speed, peak memory, and bytes of keys and values.

What `modeling/costs` counts is read off a clock here. Every number comes from the real `generate`, made to run an
exact number of steps. Settings take turns in an order that is shuffled anew for every repeat, so that a machine that
slows down slows all of them down; what is reported is the median of the repeats with its quartiles, and ratios are
taken repeat by repeat. Memory does not scatter, and is taken in runs of their own that no clock sees.
"""

import gc
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Cache, StoppingCriteria
from transformers.utils import ModelOutput

from ..modeling.budget.schedule import StackBudget
from ..modeling.evaluation_mode import evaluating
from ..modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec
from .settings import FULL, Setting


@dataclass(frozen=True)
class Measurement:
    """
    What one setting costs, for one batch of prompts.

    Of every time and speed there is the median over repeats, and with `_low` and `_high` the lower and upper quartile.
    Ratios are to the setting `"full"` in the same repeat, and `None` where that was not among the settings.

    Attributes:
        reducer, budget: the setting; the reducer as it is written on the command line.
        batch_size: prompts that were answered together.
        new_tokens: tokens generated for each.
        repeats: how many were timed.
        device, dtype: what the model ran on and in.
        time_to_first_token_ms: from `pixel_values` and `input_ids` on the device to the first token: tower, reducer,
            projector, prefill, and the choice of the likeliest word.
        tokens_per_second: of the whole batch, over all tokens but the first.
        time_to_first_token_ratio: below 1 is faster than full.
        tokens_per_second_ratio: above 1 is faster than full.
        weight_bytes: parameters and buffers of the model.
        peak_memory_bytes: the most that was in use at one time beyond what was before, so without weights and inputs.
        kv_bytes: keys and values of all layers once the prompt is in the cache.
        kv_bytes_per_layer: the same, of each layer.
        kv_bytes_at_end: when the last token is chosen, whose own keys and values were never needed.
    """

    reducer: str
    budget: StackBudget | None
    batch_size: int
    new_tokens: int
    repeats: int
    device: str
    dtype: str
    time_to_first_token_ms: float
    time_to_first_token_ms_low: float
    time_to_first_token_ms_high: float
    tokens_per_second: float
    tokens_per_second_low: float
    tokens_per_second_high: float
    time_to_first_token_ratio: float | None
    time_to_first_token_ratio_low: float | None
    time_to_first_token_ratio_high: float | None
    tokens_per_second_ratio: float | None
    tokens_per_second_ratio_low: float | None
    tokens_per_second_ratio_high: float | None
    weight_bytes: int
    peak_memory_bytes: int
    kv_bytes: int
    kv_bytes_per_layer: list[int]
    kv_bytes_at_end: int


def as_rows(measurements: Iterable[Measurement]) -> list[dict[str, Any]]:
    """Measurements as JSON-ready dictionaries, in their order."""
    return [asdict(measurement) for measurement in measurements]


class StepClock(StoppingCriteria):
    """
    Notes when `generate` has chosen each token, and never asks it to stop.

    On a GPU the notes are events in its own queue of work, so that they say when it had done the step and not when it
    was told to; elsewhere they are readings of the process's clock. The first note is the start.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._wait()
        self.ticks = [self._now()]

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """See [`StoppingCriteria`]; called once a token has been chosen for every row."""
        self.ticks.append(self._now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def seconds(self) -> list[float]:
        """From the start to each token."""
        self._wait()
        start, *ticks = self.ticks
        if self.device.type == "cuda":
            return [start.elapsed_time(tick) / 1000 for tick in ticks]
        return [tick - start for tick in ticks]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def measure(
    model: AdaVTPForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    settings: Sequence[Setting | tuple[ReducerSpec, StackBudget | None]],
    new_tokens: int = 32,
    repeats: int = 7,
    warmup: int = 1,
    seed: int = 0,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> list[Measurement]:
    """
    Measures settings side by side. The model is left as it was: its mode, its reducers and its configuration.

    Args:
        model: on one device, CPU or CUDA.
        inputs: `input_ids` and `attention_mask` `[batch, sequence]` and what else the processor makes, on the model's
            device.
        settings: pairs of a reducer and a budget, among them `("full", 1.0)` if ratios are wanted.
        new_tokens: generated for each prompt whatever the model says, 2 or more.
        repeats: rounds that are timed, 1 or more.
        warmup: rounds before these, 0 or more.
        seed: of the order of settings in each round.
        progress: wraps the loop over rounds, for a progress bar.

    Returns:
        One for each setting, in the order of `settings`.

    Raises:
        ValueError: if an argument is not allowed, a reducer cannot meet its budget, or the model's generation config
            makes it stop early.
    """
    settings = [Setting(*setting) for setting in settings]
    _check(model, settings, new_tokens, repeats, warmup)
    timings: list[list[Timing]] = [[] for _ in settings]
    order = random.Random(seed)
    with evaluating(model), torch.no_grad():
        memories = [measure_memory(model, inputs, setting, new_tokens) for setting in settings]
        for number in progress(range(warmup + repeats)):
            with garbage_kept():
                for place in order.sample(range(len(settings)), len(settings)):
                    timing = time_generation(model, inputs, settings[place], new_tokens)
                    if number >= warmup:
                        timings[place].append(timing)
    labels = [setting.label for setting in settings]
    full = timings[labels.index(FULL)] if FULL in labels else None
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    common = {
        "batch_size": len(inputs["input_ids"]),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "device": device,
        "dtype": str(model.dtype).removeprefix("torch."),
        "weight_bytes": sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]),
    }
    return [
        Measurement(reducer=label, budget=setting.budget, **common, **memory, **summary_of_repeats(own, full))
        for label, setting, memory, own in zip(labels, settings, memories, timings, strict=True)
    ]


def _check(
    model: AdaVTPForConditionalGeneration, settings: list[Setting], new_tokens: int, repeats: int, warmup: int
) -> None:
    if model.device.type not in ("cpu", "cuda"):
        raise ValueError(f"`model` is on {model.device}; allowed are CPU and CUDA, whose clocks are known here.")
    if not settings:
        raise ValueError("`settings` is empty; it has to have one pair of reducer and budget or more.")
    least = {"new_tokens": (new_tokens, 2), "repeats": (repeats, 1), "warmup": (warmup, 0)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"`{name}` is {value}; it must be {smallest} or more.")


class Timing(NamedTuple):
    """One run: seconds to the first token, and tokens per second of the whole batch over all tokens but the first."""

    first_token: float
    speed: float


def time_generation(
    model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor], setting: Setting, new_tokens: int
) -> Timing:
    """Times one run; arguments and errors as of [`measure`]."""
    # A reducer that differs from the last one of its name in its parameters is made anew, which is no part of a run.
    model.prompt_reader.steps(setting.arguments()["reducer"])
    clock = StepClock(model.device)
    generate_exactly(model, inputs, setting, new_tokens, stopping_criteria=[clock])
    seconds = clock.seconds()
    batch_size = len(inputs["input_ids"])
    return Timing(seconds[0], (new_tokens - 1) * batch_size / (seconds[-1] - seconds[0]))


def generate_exactly(
    model: AdaVTPForConditionalGeneration,
    inputs: Mapping[str, torch.Tensor],
    setting: Setting,
    new_tokens: int,
    **arguments: Any,
) -> ModelOutput:
    """
    Greedy generation of an exact number of tokens, 1 or more for each prompt, the end-of-sequence token ruled out
    until then. Other `arguments` are those of `generate`.

    Raises:
        ValueError: if generation stopped early.
    """
    output = model.generate(
        **inputs,
        **setting.arguments(),
        **arguments,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
    )
    made = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    if made != new_tokens:
        raise ValueError(
            f"`new_tokens` is {new_tokens}, but generation stopped after {made}; take what stops it, such as "
            "`stop_strings` or `max_time`, out of the model's generation config."
        )
    return output


def measure_memory(
    model: AdaVTPForConditionalGeneration, inputs: Mapping[str, torch.Tensor], setting: Setting, new_tokens: int
) -> dict[str, Any]:
    """
    The memory of one setting, by the names of [`Measurement`]'s fields: keys and values from the cache of a run of one
    token, whose last step is the prefill; the peak, and the keys and values at the end, from a run of all.
    """
    after_prefill = cache_bytes(generate_exactly(model, inputs, setting, 1).past_key_values)
    peak, output = peak_memory(lambda: generate_exactly(model, inputs, setting, new_tokens), model.device)
    return {
        "peak_memory_bytes": peak,
        "kv_bytes": sum(after_prefill),
        "kv_bytes_per_layer": after_prefill,
        "kv_bytes_at_end": sum(cache_bytes(output.past_key_values)),
    }


def cache_bytes(cache: Cache) -> list[int]:
    """Of each layer, with the padding of ragged batches, and in a static cache with the room that is still empty."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]


def peak_memory(call: Callable[[], Any], device: torch.device) -> tuple[int, Any]:
    """
    The most memory that a call has in use at one time beyond what was in use before.

    It counts what torch's allocator hands out: tensors, and what operators need on the way. It does not count what a
    library sets aside for itself, nor what the allocator keeps for later, so that it does not depend on what ran
    before. On a GPU the allocator's own peak is read; on a CPU the profiler's record of every allocation is added up.

    Returns:
        Bytes, and what the call returned.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before, result
    # The profiler writes to the terminal whenever it starts and stops, unless it was told to be quiet before it did.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as recorded:
        result = call()
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    in_use, most = 0, 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        in_use += change.nbytes()
        most = max(most, in_use)
    return most, result


def summary_of_repeats(own: list[Timing], full: list[Timing] | None) -> dict[str, float | None]:
    """Medians and quartiles by the names of [`Measurement`]'s fields."""
    pairs = [] if full is None else list(zip(own, full, strict=True))
    repeats = {
        "time_to_first_token_ms": [1000 * timing.first_token for timing in own],
        "tokens_per_second": [timing.speed for timing in own],
        "time_to_first_token_ratio": [mine.first_token / its.first_token for mine, its in pairs],
        "tokens_per_second_ratio": [mine.speed / its.speed for mine, its in pairs],
    }
    summary = {}
    for name, values in repeats.items():
        quartiles = np.quantile(values, [0.25, 0.5, 0.75]).tolist() if values else [None] * 3
        summary |= dict(zip((f"{name}_low", name, f"{name}_high"), quartiles, strict=True))
    return summary


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Collects Python's garbage, and then none until the end."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
