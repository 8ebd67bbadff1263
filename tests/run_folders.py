"""Run folders, made by hand: every score, cost and picture is what the test says, and nothing is evaluated."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

NUM_PATCHES, NUM_LAYERS = 16, 4
FULL_FLOPS = 2e9

Scores = Mapping[tuple[str, float | int], Sequence[float]]


def num_keep_of(budget: float | int) -> int:
    return budget if isinstance(budget, int) else max(1, int(budget * NUM_PATCHES))


def flops_of(reducer: str, budget: float | int) -> float:
    """Half of it is there whatever is kept, the other half grows with what is kept."""
    return FULL_FLOPS * (0.5 + 0.5 * num_keep_of(budget) / NUM_PATCHES)


def write_run(
    folder: Path,
    scores: Scores,
    *,
    checkpoint: str = "first",
    data: str = "questions",
    metric: str = "exact_match",
    categories: Sequence[str | None] | None = None,
    questions: Sequence[str] | None = None,
    shown: int = 0,
    unreachable: Sequence[Mapping[str, Any]] = (),
    measurements: Sequence[Mapping[str, Any]] = (),
    flops: Callable[[str, float | int], float] = flops_of,
    tokens_off_by: Callable[[str, float | int, int], float] = lambda reducer, budget, index: 0.0,
) -> Path:
    """
    Writes a run.

    Args:
        folder: to write.
        scores: for each reducer and budget one score for each example; the prediction is "yes" where it is above 0.
        checkpoint, data: names; their hashes follow from them.
        metric: the metric's name.
        categories, questions: of the examples.
        shown: number of examples with pictures.
        unreachable, measurements: of the header.
        flops: of a reducer at a budget.
        tokens_off_by: how far off the budget the tokens are that layers saw, for reducer, budget and example.
    """
    num_examples = len(next(iter(scores.values()), []))
    categories = categories or [None] * num_examples
    questions = questions or [f"Is this number {index}?" for index in range(num_examples)]
    (folder / "pictures").mkdir(parents=True)
    lines, kept = [], []
    for (reducer, budget), own in scores.items():
        for index, score in enumerate(own):
            num_keep = num_keep_of(budget)
            lines.append(
                {"index": index, "id": f"q{index}", "reducer": reducer, "budget": budget, "question": questions[index]}
                | {"answers": ["yes"], "prediction": "yes" if score > 0 else "no", "score": float(score)}
                | {"category": categories[index], "num_keep": num_keep}
                | {"visual_tokens": num_keep + tokens_off_by(reducer, budget, index)}
                | {"flops": flops(reducer, budget), "new_tokens": 2, "ms": 10.0 * num_keep + index % 3}
            )
            if index < shown:
                seen = [NUM_LAYERS if patch < num_keep else 0 for patch in range(NUM_PATCHES)]
                kept.append({"index": index, "reducer": reducer, "budget": budget, "layers_seen": seen})
    settings = [{"reducer": name, "budget": budget, "num_keep": num_keep_of(budget)} for name, budget in scores]
    header = {
        "command": f"adavtp evaluate {checkpoint} --data {data}",
        "checkpoint": checkpoint,
        "checkpoint_hash": f"hash of {checkpoint}",
        "data": data,
        "data_hash": f"hash of {data}",
        "num_examples": num_examples,
        "metric": metric,
        "max_new_tokens": 4,
        "settings": settings,
        "unreachable": list(unreachable),
        "num_patches": NUM_PATCHES,
        "num_layers": NUM_LAYERS,
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "machine": "x86_64, 1 threads",
        "seconds": 120.0,
        "model_seconds": 100.0,
        "evaluation_seconds": 3.0,
        "shown": shown,
    }
    if measurements:
        header["measurements"] = list(measurements)
    (folder / "run.json").write_text(json.dumps(header))
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "pictures" / "kept.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    for index in range(shown):
        picture = Image.new("RGB", (32, 32), (40 * index % 256, 120, 200))
        picture.save(folder / "pictures" / f"{index}.png")
    return folder


def measurement(reducer: str, budget: float, time_to_first_token_ms: float) -> dict[str, Any]:
    """What `measure` says of a setting."""
    first, speed = time_to_first_token_ms, 1000 / time_to_first_token_ms
    return {
        "reducer": reducer,
        "budget": budget,
        "batch_size": 8,
        "device": "cpu",
        "time_to_first_token_ms": first,
        "time_to_first_token_ms_low": 0.9 * first,
        "time_to_first_token_ms_high": 1.1 * first,
        "tokens_per_second": speed,
        "tokens_per_second_low": 0.9 * speed,
        "tokens_per_second_high": 1.1 * speed,
        "peak_memory_bytes": 25_000_000,
        "kv_bytes": 3_300_000,
    }
