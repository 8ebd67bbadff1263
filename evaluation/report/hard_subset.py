"""
The hard subset: the questions for which a smaller picture is not enough.

Many questions about a picture are answered as well when all of it is shown smaller, whatever a method chooses. Where
choosing matters shows on those that the control `downsample` answers wrongly with as many tokens (VTC-Bench, arXiv
2510.07143, which of these keeps only those that the model with all tokens answers right; here that is a row).
"""

from typing import Any

from ..metric_modules import SCORED_TOGETHER
from ..reducer_table import is_control
from ..settings import FULL
from ..statistics import correct, mean_interval
from .joined import Measured, everything_kept_by
from .paired import Key, Paired

SMALLER_PICTURE = "downsample"

# A score below this is a wrong answer, where a metric knows half-right ones.
RIGHT_FROM = 0.5


def hard_subsets(measured: Measured, against: str | None) -> list[dict[str, Any]]:
    """
    The hard subset at each number K of kept tokens, ascending, JSON-ready; none where a score says nothing of right
    and wrong.

    Returns:
        For each `num_keep` and `by`, the setting of `downsample` whose wrong answers it has (`reducer`, `num_keep` and
        the mean `visual_tokens` that layers saw), with the same K or else with the nearest below, or `None` if there
        is none. With one, `num_examples`, their `share` of all with its interval (`low`, `high`), `best_control` (of
        the others), and `settings`: everything kept and each other reducer with this K, with the mean `score` on the
        subset, its interval, and the differences to `against`, to the best `control` and to `full`.
    """
    if measured.header["metric"] in SCORED_TOGETHER:
        return []
    counts = sorted({num_keep for reducer, num_keep in measured.settings if reducer != FULL})
    subsets = [{"num_keep": num_keep} | _subset(measured, num_keep, against) for num_keep in counts]
    for name in ("against", "control", "full"):
        correct([row[name] for subset in subsets for row in subset.get("settings", []) if name in row])
    return subsets


def _subset(measured: Measured, num_keep: int | float, against: str | None) -> dict[str, Any]:
    by = _smaller_picture(measured, num_keep)
    if by is None:
        return {"by": None}
    is_wrong = measured.paired.scores[by] < RIGHT_FROM
    low, high = mean_interval(is_wrong.astype(float), is_wrong)
    seen = measured.settings[by].column("visual_tokens")
    # A question without a picture has no visual tokens, whatever the budget.
    seen = seen[seen > 0] if seen.any() else seen
    about = {
        "by": {"reducer": by[0], "num_keep": by[1], "visual_tokens": float(seen.mean())},
        "num_examples": int(is_wrong.sum()),
        "share": float(is_wrong.mean()),
        "low": low,
        "high": high,
    }
    everything = everything_kept_by(measured.header)
    keys = [key for key in measured.settings if key == everything or (key[1] == num_keep and key != by)]
    if not keys or not is_wrong.any():
        return about | {"best_control": None, "settings": []}
    return about | _on_subset(measured.paired.only(is_wrong, keys), num_keep, against, everything)


def _smaller_picture(measured: Measured, num_keep: int | float) -> Key | None:
    """`downsample` with this K or else the nearest below; fractions and numbers of tokens are not compared."""
    keys = [key for key in measured.settings if key[0].partition(":")[0] == SMALLER_PICTURE and "," not in key[0]]
    keys = [key for key in keys if type(key[1]) is type(num_keep) and key[1] <= num_keep]
    # As it is by default, before one with parameters.
    return max(keys, key=lambda key: (key[1], key[0] == SMALLER_PICTURE), default=None)


def _on_subset(paired: Paired, num_keep: int | float, against: str | None, everything: Key) -> dict[str, Any]:
    rows = [{"reducer": reducer, "num_keep": keep} | paired.mean((reducer, keep)) for reducer, keep in paired.scores]
    controls = [row for row in rows if is_control(row["reducer"])]
    best = max(controls, key=lambda row: row["score"], default={"reducer": None})["reducer"]
    reduced = [row for row in rows if row["reducer"] != FULL]
    paired.compare(reduced, "against", lambda key: (against, num_keep))
    paired.compare([row for row in reduced if row not in controls], "control", lambda key: (best, num_keep))
    paired.compare(reduced, "full", lambda key: everything)
    return {"best_control": best, "settings": rows}
