"""Timing that survives a noisy machine: callables take turns, and what is compared ran side by side."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


@dataclass(frozen=True)
class Spread:
    """
    Repeated measurements of one quantity.

    Attributes:
        median, lower_quartile, upper_quartile: of the repeats.
        repeats: every repeat, in the order of measurement.
    """

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: list[float]

    @classmethod
    def of(cls, repeats: list[float]) -> "Spread":
        """Summarises one or more repeats."""
        if len(repeats) == 1:
            return cls(repeats[0], repeats[0], repeats[0], repeats)
        lower, median, upper = statistics.quantiles(repeats, n=4, method="inclusive")
        return cls(median, lower, upper, repeats)

    def shown(self, factor: float = 1.0, digits: int = 1) -> str:
        """Median and quartiles as text, each times `factor`."""
        median, lower, upper = (
            f"{value * factor:.{digits}f}" for value in (self.median, self.lower_quartile, self.upper_quartile)
        )
        return f"{median} ({lower} to {upper})"


def interleaved_medians(
    callables: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int = 1,
    clock: str = "wall",
    device: torch.device | str = "cpu",
) -> dict[str, Spread]:
    """
    Times callables in rounds: each round calls every one of them once, in an order that is shuffled anew, so that a
    machine that slows down slows all of them down, and that none always follows the same other one, whose memory it
    would get.

    Args:
        callables: name -> what is timed.
        repeats: rounds that are measured, 1 or more.
        warm_up: rounds before these.
        clock: `"wall"`, or `"process"`: seconds that the processor spent on this process, all threads together, which
            other processes hardly change; it does not see work on a GPU.
        device: where the work runs. A GPU is waited for before and after every call.

    Returns:
        Name -> seconds.

    Raises:
        ValueError: if `repeats` is below 1, or `clock` is not allowed, or is not allowed with this device.
    """
    if repeats < 1:
        raise ValueError(f"`repeats` is {repeats}; it must be 1 or more.")
    on_gpu = torch.device(device).type == "cuda"
    if clock not in CLOCKS or (on_gpu and clock != "wall"):
        raise ValueError(f"`clock` is {clock!r}; allowed are {', '.join(CLOCKS)}, and on a GPU only 'wall'.")
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    names, seconds, order = list(callables), {name: [] for name in callables}, random.Random(0)
    for number in range(warm_up + repeats):
        for name in order.sample(names, len(names)):
            wait()
            start = CLOCKS[clock]()
            callables[name]()
            wait()
            if number >= warm_up:
                seconds[name].append(CLOCKS[clock]() - start)
    return {name: Spread.of(values) for name, values in seconds.items()}


def paired_ratio(numerator: Spread, denominator: Spread) -> Spread:
    """The ratio of two timings round by round; its median is steadier than the ratio of the medians."""
    pairs = zip(numerator.repeats, denominator.repeats, strict=True)
    return Spread.of([above / below for above, below in pairs])
