"""The package as a whole: its public names, and who may import whom."""

import ast
import subprocess
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
    "hub_cards": {"modeling", "configuration"},
    # `push_to_hub` of a trainer makes the folder that `adavtp publish` makes.
    "trainer": {"modeling", "configuration", "hub_cards"},
    "evaluation": {"modeling", "configuration"},
    "adavtp": {"configuration", "modeling", "trainer", "evaluation", "hub_cards"},
}

# What travels with a checkpoint to machines where AdaVTP is not installed may need only what is there for any LLaVA.
# Of huggingface_hub only what transformers' own configurations are made of.
STRICT_DATACLASSES = {"huggingface_hub.dataclasses", "huggingface_hub.errors"}
THIRD_PARTY = {"modeling": {"torch", "transformers"}, "configuration": {"transformers", "huggingface_hub"}}


def room_files(room: str) -> list[Path]:
    return sorted((ROOT / room).glob("*.py"))


def imports(file: Path) -> list[ast.Import | ast.ImportFrom]:
    tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def absolute_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Modules that an import statement names absolutely."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if node.level == 0 else []


def imported_rooms(node: ast.ImportFrom, room: str) -> set[str]:
    """
    Rooms that a relative import reaches. In a room, one dot is the room and two dots are the package; in the front
    door, whose folder is the package itself, one dot is the package.
    """
    dots_of_package = 1 if room == "adavtp" else 2
    assert node.level <= dots_of_package, f"{ast.unparse(node)} leaves the package"
    if node.level < dots_of_package:
        return set()
    first_names = [node.module.split(".")[0]] if node.module else [alias.name for alias in node.names]
    # In the front door a name that is no room is one of its own modules.
    return set(first_names) & set(ROOMS) if room == "adavtp" else set(first_names)


@pytest.mark.parametrize("name", PUBLIC_NAMES)
def test_public_name(name: str) -> None:
    assert name in adavtp.__all__
    assert hasattr(adavtp, name)


def test_all_names_exist() -> None:
    assert [name for name in adavtp.__all__ if not hasattr(adavtp, name)] == []


def test_import_leaves_optional_packages_alone() -> None:
    code = (
        "import sys, adavtp\n"
        "print(sorted({'deepspeed', 'lmms_eval', 'matplotlib'} & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
    for file in room_files(room):
        for node in imports(file):
            # Absolute imports of the package itself would not survive the move to a checkpoint's flat folder.
            assert all(
                module.split(".")[0] not in {"adavtp", "tests", "benchmarks"} for module in absolute_modules(node)
            )
            if isinstance(node, ast.ImportFrom) and node.level:
                assert imported_rooms(node, room) <= ROOMS[room], f"{room}/{file.name}: {ast.unparse(node)}"
