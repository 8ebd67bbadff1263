"""The data set repository of a drawn task: a parquet file for each split, and a card made from them.

Sizes, features, kinds of question and examples on the card are counted in the data. What the card says of each task,
its source and its licence is in the template.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import DatasetCard, DatasetCardData

from .drawn_data import DRAWN_DATA

if TYPE_CHECKING:
    from datasets import Dataset

TEMPLATE = Path(__file__).with_name("dataset_card_template.md")
DATA_FILES = ("data/*.parquet",)
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def dataset_folder(task: str, splits: Mapping[str, "Dataset"], folder: Path, name: str, command: str) -> Path:
    """
    Writes the repository's files: `data/<split>-00000-of-00001.parquet` and `README.md`.

    Args:
        task: which of the drawn tasks.
        splits: name of the split -> conversations with one image, from the task's `load_questions`.
        folder: to fill; it exists.
        name: repository id that the card's snippet loads.
        command: that made the data, as the card says it.
    """
    (folder / "data").mkdir()
    for split, data in splits.items():
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    some = next(iter(splits.values()))
    kinds = {split: Counter(data["kind"]) for split, data in splits.items()}
    examples = {
        row["kind"]: row for row in reversed(some.select_columns(["kind", "question", "answer"]).to_list()[:60])
    }
    card = DatasetCard.from_template(
        _metadata(task, splits, folder, name),
        template_path=str(TEMPLATE),
        task=task,
        name=name,
        command=command,
        splits=[{"name": split, "size": f"{len(data):,}", "kinds": kinds[split]} for split, data in splits.items()],
        kinds=[{"name": kind, **examples[kind]} for kind in sorted(kinds[next(iter(kinds))]) if kind in examples],
        side=some[0]["images"][0].width,
        example_split=list(splits)[-1],
    )
    card.save(folder / "README.md")
    return folder


def _metadata(task: str, splits: Mapping[str, "Dataset"], folder: Path, name: str) -> DatasetCardData:
    """By which `load_dataset` finds splits and features without reading the data."""
    files = {split: next(folder.glob(f"data/{split}-*.parquet")) for split in splits}
    features = next(iter(splits.values())).features
    sizes = {split: data.data.nbytes for split, data in splits.items()}
    num_rows = sum(len(data) for data in splits.values())
    data_files = [{"split": split, "path": f"data/{split}-*"} for split in splits]
    info: dict[str, Any] = {
        "features": features._to_yaml_list(),
        "splits": [
            {"name": split, "num_bytes": sizes[split], "num_examples": len(data)} for split, data in splits.items()
        ],
        "download_size": sum(path.stat().st_size for path in files.values()),
        "dataset_size": sum(sizes.values()),
    }
    return DatasetCardData(
        language=["en"],
        license=DRAWN_DATA[task].license,
        task_categories=["visual-question-answering", "image-text-to-text"],
        annotations_creators=["machine-generated"],
        language_creators=["machine-generated"],
        source_datasets=[DRAWN_DATA[task].source],
        size_categories=[next((size for limit, size in _SIZES if num_rows < limit), "1M<n<10M")],
        tags=["adavtp", task, "synthetic", "token-budget"],
        pretty_name=name.rpartition("/")[2],
        configs=[{"config_name": "default", "data_files": data_files}],
        dataset_info=info,
    )
