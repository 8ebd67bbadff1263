"""Where a folder is written: nothing of anybody else's is replaced, and it appears when it is whole."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def require_output_folder(
    output_dir: Path, earlier: str | None = None, is_earlier: Callable[[Path], bool] | None = None
) -> None:
    """
    Args:
        output_dir: where to write.
        earlier: what else may be there, in words, and is replaced.
        is_earlier: whether a folder has that.

    Raises:
        ValueError: if it has anything else.
    """
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return
    if is_earlier is None or not is_earlier(output_dir):
        also = "" if earlier is None else f", or one with {earlier}, which is brought up to date"
        raise ValueError(
            f"`output_dir` is {str(output_dir)!r}, which holds something else; expected is a new or an empty "
            f"folder{also}."
        )


@contextmanager
def folder_beside(output_dir: Path) -> Iterator[Path]:
    """A temporary folder in the same place, from which files move by renaming."""
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}-") as temporary:
        yield Path(temporary)
