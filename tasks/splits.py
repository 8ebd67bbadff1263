"""Which random numbers draw an example of a task: those of its split, its seed and its place, and nothing else."""

import numpy as np

SPLITS: tuple[str, ...] = ("train", "validation", "test")


def random_numbers(split: str, index: int, seed: int, for_questions: bool = False) -> np.random.Generator:
    """
    What an example is drawn from, or its questions: a stream of their own, so that a new kind of question leaves the
    pictures as they are.

    Raises:
        ValueError: if the split is unknown, or a number is not whole or below 0.
    """
    numbers = [seed, split_number(split), index]
    require_at_least("index", index, 0)
    require_at_least("seed", seed, 0)
    return np.random.default_rng([*numbers, 1] if for_questions else numbers)


def split_number(split: str) -> int:
    """The split's place in `SPLITS`. Raises `ValueError` for an unknown one."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    return SPLITS.index(split)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number, which `True` is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def require_at_least(name: str, value: int, least: int) -> None:
    """Raises `ValueError` for what is no whole number from `least`."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} is {value!r}; allowed are whole numbers from {least}")
