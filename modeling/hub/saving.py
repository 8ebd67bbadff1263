"""A saved folder that carries its own code.

`save_pretrained` writes the Python files that a checkpoint needs into `adavtp_code/`, and an `auto_map` that tells
`AutoModel.from_pretrained(folder, trust_remote_code=True)` where to look, so that the folder loads where this package
is not installed. A model loaded from such a folder runs from those files, and saving it writes them again. They lie
flat in one folder because transformers looks for what a file imports relatively beside that file.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CODE_FOLDER = "adavtp_code"

AUTO_MAP = {
    "AutoConfig": f"{CODE_FOLDER}/configuration_adavtp.AdaVTPConfig",
    "AutoModel": f"{CODE_FOLDER}/modeling_adavtp.AdaVTPForConditionalGeneration",
    "AutoModelForImageTextToText": f"{CODE_FOLDER}/modeling_adavtp.AdaVTPForConditionalGeneration",
    "AutoModelForMultimodalLM": f"{CODE_FOLDER}/modeling_adavtp.AdaVTPForConditionalGeneration",
    "AutoProcessor": f"{CODE_FOLDER}/processing_adavtp.AdaVTPProcessor",
}

_RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)(\.+)([\w.]*)(\s+import\s)", re.MULTILINE)

# In the package this is `modeling/hub/saving.py`, two folders below the one with all rooms; in a saved folder all
# files lie beside it.
_FILE = Path(__file__).resolve()
_DEPTH = 2 if _FILE.stem == "saving" else 0
_ROOT = _FILE.parents[_DEPTH]
PACKAGE = __name__.rsplit(".", _DEPTH + 1)[0]


def code_paths(entry: Path) -> dict[str, Path]:
    """The file `entry` of this package or folder and all that it imports relatively, directly or not, by flat name."""
    waiting, paths = [entry.resolve()], {}
    while waiting:
        path = waiting.pop()
        if flat_name(path) not in paths:
            paths[flat_name(path)] = path
            waiting += [
                _imported(match, path) for match in _RELATIVE_IMPORT.finditer(path.read_text(encoding="utf-8"))
            ]
    return dict(sorted(paths.items()))


def code_files(entry: Path) -> dict[str, str]:
    """The code of `code_paths` by file name, as it stands in a saved folder: relative imports name flat modules."""

    def flat(path: Path) -> str:
        return _RELATIVE_IMPORT.sub(
            lambda match: f"{match[1]}.{flat_name(_imported(match, path))}{match[4]}", path.read_text(encoding="utf-8")
        )

    return {f"{name}.py": flat(path) for name, path in code_paths(entry).items()}


def flat_name(path: Path) -> str:
    """What a file's module is called in a saved folder: `reducers_tome` for `modeling/reducers/tome.py`."""
    parts = _parts(path)
    return "_".join(parts[1:] or parts)


def module_name(path: Path) -> str:
    """What a file's module is called in this process."""
    return ".".join((PACKAGE, *_parts(path)))


def _parts(path: Path) -> tuple[str, ...]:
    return path.resolve().relative_to(_ROOT).with_suffix("").parts


def _imported(match: re.Match, path: Path) -> Path:
    """The file that a relative import in `path` names."""
    return path.parents[len(match[2]) - 1].joinpath(*match[3].split(".")).with_suffix(".py")


def own_class(cls: type) -> type:
    """
    The class whose code a folder carries: `cls`, or its nearest base class among the files that `AUTO_MAP` names.

    A subclass made on the spot, as sharding (FSDP) and notebooks do, has no file that could go into a folder.
    """
    modules = {Path(reference.partition(".")[0]).name for reference in AUTO_MAP.values()} | {"modeling_families"}
    return next(base for base in cls.__mro__ if base.__module__.rpartition(".")[2] in modules)


def save_code(cls: type, folder: Path) -> None:
    """Writes the file that defines `cls` (see `own_class`), and those it needs, into `adavtp_code/` of `folder`."""
    code = folder / CODE_FOLDER
    code.mkdir(parents=True, exist_ok=True)
    for name, text in code_files(Path(sys.modules[own_class(cls).__module__].__file__)).items():
        (code / name).write_text(text, encoding="utf-8")
    # An upload of what has changed goes by the folder's time, which files that are written anew leave as it was.
    os.utime(code)


@contextmanager
def without_auto_class(cls: type) -> Iterator[None]:
    """Keeps transformers from saving code its own way, which looks for every imported file in the same folder."""
    own = cls.__dict__.get("_auto_class")
    cls._auto_class = None
    try:
        yield
    finally:
        cls._auto_class = own


class SelfContainedMixin:
    """Gives a model class a `save_pretrained` whose folder stands alone."""

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """
        Saves weights (safetensors), configuration and code. See [`PreTrainedModel.save_pretrained`] for the arguments.

        The weights keep the names that the model has in memory, which stock LLaVA reads as well; in the older names
        that transformers writes for LLaVA by default, `Trainer` could not resume from them.
        """
        kwargs.setdefault("save_original_format", False)
        self.config.auto_map = self.auto_map()
        if getattr(getattr(self, "generation_config", None), "token_budget", None) is not None:
            # Marked as derived from the model's configuration, it would be read without fields that are only ours.
            self.generation_config._from_model_config = False
        with without_auto_class(type(self)), without_auto_class(type(self.config)):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            self.save_code(Path(save_directory))

    def auto_map(self) -> dict[str, str]:
        """Where `AutoModel` and its kind find the classes in a saved folder."""
        return AUTO_MAP | {"AutoModel": f"{CODE_FOLDER}/modeling_adavtp.{own_class(type(self)).__name__}"}

    def save_code(self, folder: Path) -> None:
        """Writes the model's code into `folder`."""
        save_code(type(self), folder)

    def _upload_modified_files(self, working_dir: str | Path, *args: Any, **kwargs: Any) -> Any:
        # With `push_to_hub=True` transformers uploads the folder before the code would be written.
        self.save_code(Path(working_dir))
        return super()._upload_modified_files(working_dir, *args, **kwargs)
