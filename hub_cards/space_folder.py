"""The Space of a checkpoint: the page in `space/`, told which checkpoint answers.

The page names its checkpoint in one place, the `models` of its README.md, where the Hub reads it too. So a Space for
another checkpoint is a copy of the folder with another line there, and with examples that suit it.
"""

import json
import shutil
from pathlib import Path

from huggingface_hub import RepoCard

from ..modeling.hub.own_files import require_own_file
from .output_folder import require_output_folder
from .publish import require_repository_id

SPACE = Path(__file__).with_name("space")

_FILES = ("app.py", "looking.py", "reading.py", "requirements.txt", "README.md")
# By which a Space of this kind is known, earlier ones too.
_MARKS = ("app.py", "looking.py", "requirements.txt", "README.md")
_QUESTIONS = "questions.json"


def space_folder(output_dir: str | Path, repo_id: str, examples: str | Path | None = SPACE / "examples") -> Path:
    """
    Writes the folder of a Space, ready to upload.

    Args:
        output_dir: where to write: a new or empty folder, or one with an earlier Space of this kind, which is brought
            up to date.
        repo_id: the checkpoint's repository on the Hub, `owner/name`.
        examples: folder with images and a `questions.json` that holds pairs of an image's file name and a question;
            by default pages. `None` for a page without examples. Those of an earlier Space are replaced,
            unless it is their own folder that is named.

    Returns:
        `output_dir`.

    Raises:
        ValueError: if `output_dir` holds something else, `repo_id` is none, or `examples` is not such a folder.
    """
    output_dir = Path(output_dir)
    require_output_folder(
        output_dir, "a Space of this kind", lambda folder: all((folder / name).is_file() for name in _MARKS)
    )
    require_repository_id(repo_id)
    names = [] if examples is None else _example_files(Path(examples))
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in _FILES:
        shutil.copyfile(SPACE / name, output_dir / name)
    _put_examples(output_dir / "examples", None if examples is None else Path(examples), names)
    card = RepoCard.load(output_dir / "README.md", ignore_metadata_errors=False)
    card.data["title"], card.data["models"] = f"AdaVTP: {repo_id.rpartition('/')[2]}", [repo_id]
    card.save(output_dir / "README.md")
    return output_dir


def _put_examples(folder: Path, examples: Path | None, names: list[str]) -> None:
    if examples is not None and examples.resolve() == folder.resolve():
        return
    shutil.rmtree(folder, ignore_errors=True)
    if examples is not None:
        folder.mkdir()
        for name in names:
            shutil.copyfile(examples / name, folder / name)


def _example_files(examples: Path) -> list[str]:
    """The names of the files that make up the examples."""
    try:
        pairs = json.loads((examples / _QUESTIONS).read_text(encoding="utf-8"))
        for image, question in pairs:
            if not isinstance(image, str) or not isinstance(question, str) or Path(image).name != image:
                raise ValueError(
                    f"{[image, question]!r} is not the name of a file in the folder itself and a question"
                )
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(
            f"`examples` is {str(examples)!r}; expected is a folder with a {_QUESTIONS} of pairs such as "
            f'["cat.png", "Is there a cat?"]: {error}'
        ) from error
    for image, _ in pairs:
        require_own_file(examples / image, examples)
    if missing := [image for image, _ in pairs if not (examples / image).is_file()]:
        raise ValueError(f"`examples` is {str(examples)!r}, in which {missing[0]!r} of {_QUESTIONS} is missing.")
    return [_QUESTIONS, *dict.fromkeys(image for image, _ in pairs)]
