"""The package as a whole: its public names, and who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

import adavtp
from repository import ROOT

PUBLIC_NAMES = [
    "AdaVTPConfig",
    "AdaVTPModel",
    "AdaVTPForConditionalGeneration",
    "AdaVTPProcessor",
    "BudgetEmbedding",
    "VisionTokenController",
    "Selection",
    "TokenReducer",
    "register_reducer",
    "BudgetProcessor",
    "BudgetProcessorList",
    "BudgetCollator",
    "AdaVTPTrainer",
    "AdaVTPTrainingArguments",
]

# Room -> the rooms below it that it may import.
ROOMS = {
    "configuration": set(),
    "modeling": {"configuration"},
    "tasks": {"modeling", "configuration"},
    "hub_cards": {"modeling", "configuration", "evaluation"},
    # `push_to_hub` of a trainer makes the folder that `adavtp publish` makes.
    "trainer": {"modeling", "configuration", "tasks", "hub_cards"},
    "evaluation": {"modeling", "configuration", "tasks"},
    "adavtp": {"configuration", "modeling", "tasks", "trainer", "evaluation", "hub_cards"},
}

# What travels with a checkpoint to machines where AdaVTP is not installed may need only what is there for any LLaVA.
# Of huggingface_hub only what transformers' own configurations are made of.
STRICT_DATACLASSES = {"huggingface_hub.dataclasses", "huggingface_hub.errors"}
THIRD_PARTY = {"modeling": {"torch", "transformers"}, "configuration": {"transformers", "huggingface_hub"}}

# The Space is a program of its own, whose files lie beside each other on the Hub.
SPACE = ROOT / "hub_cards" / "space"


def room_files(room: str) -> list[Path]:
    # The front door's folder holds links to the other rooms.
    own = [*(ROOT / room).glob("*.py"), *(ROOT / room / "commands").glob("*.py")]
    files = own if room == "adavtp" else (ROOT / room).glob("**/*.py")
    return sorted(file for file in files if SPACE not in file.parents and "adavtp_code" not in file.parts)


def imports(file: Path) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def absolute_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules that an import statement names absolutely."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.level == 0 else []


def module_of(file: Path) -> tuple[str, ...]:
    """`modeling/reducers/tome.py` as its module is named within the package: `("modeling", "reducers", "tome")`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "adavtp" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_modules(node: ast.ImportFrom, file: Path) -> list[tuple[str, ...]]:
    """What a relative import reaches, each name as if it were a module."""
    own = module_of(file)
    depth = node.level - (file.name == "__init__.py")
    assert depth <= len(own), f"{ast.unparse(node)} leaves the package"
    base = own[: len(own) - depth] + tuple((node.module or "").split(".")) * bool(node.module)
    return [(*base, alias.name) for alias in node.names]


def imported_files(file: Path) -> set[Path]:
    """The package's files that a file imports while it is loaded."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.level:
            for module in imported_modules(node, file):
                for parts in (module, module[:-1]):
                    place = ROOT.joinpath(*parts) if parts and parts[0] in ROOMS else ROOT.joinpath("adavtp", *parts)
                    found |= {path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()}
    return found - {file}


def test_public_names_are_there() -> None:
    assert set(PUBLIC_NAMES) <= set(adavtp.__all__)
    assert [name for name in adavtp.__all__ if not hasattr(adavtp, name)] == []


@pytest.mark.parametrize("room", THIRD_PARTY)
def test_travelling_code_needs_only_what_llava_needs(room: str) -> None:
    for file in room_files(room):
        for node in imports(file):
            for module in absolute_modules(node):
                top = module.split(".")[0]
                assert top in sys.stdlib_module_names | THIRD_PARTY[room], f"{file.name} imports {module}"
                assert top != "huggingface_hub" or module in STRICT_DATACLASSES, f"{file.name} imports {module}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_rooms_below(room: str) -> None:
    files = room_files(room)
    assert files
    for file in files:
        for node in imports(file):
            # Absolute imports of the package itself would not survive the move to a checkpoint's flat folder.
            assert all(
                module.split(".")[0] not in {"adavtp", "tests", "benchmarks"} for module in absolute_modules(node)
            )
            if isinstance(node, ast.ImportFrom) and node.level:
                reached = {module[0] for module in imported_modules(node, file)} & set(ROOMS) - {room}
                assert reached <= ROOMS[room], f"{file.relative_to(ROOT)}: {ast.unparse(node)}"


def test_no_files_import_each_other() -> None:
    left = {file: imported_files(file) for room in ROOMS for file in room_files(room)}
    # A file that imports nothing that is left is on the ground; taking the ground away again and again leaves circles.
    while ground := {file for file, imported in left.items() if not imported & left.keys()}:
        left = {file: imported for file, imported in left.items() if file not in ground}
    assert sorted(str(file.relative_to(ROOT)) for file in left) == []
