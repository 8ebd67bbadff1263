"""What an import costs: no part of the package loads what only another part needs, nor does without what it names."""

import subprocess
import sys

import pytest

from repository import ROOT

# Packages that one part of this one needs and the others do not.
HEAVY = {
    "bitsandbytes",
    "gradio",
    "datasets",
    "deepspeed",
    "evaluate",
    "lmms_eval",
    "matplotlib",
    "pandas",
    "peft",
    "playwright",
    "pyarrow",
    "rich",
    "sklearn",
    "typer",
}

# Module -> what it may load of these.
ALLOWED = {
    "adavtp": set(),
    "adavtp.configuration": set(),
    "adavtp.modeling": set(),
    "adavtp.trainer": set(),
    "adavtp.trainer.data.reader": set(),
    "adavtp.trainer.data.sources": set(),
    "adavtp.evaluation": set(),
    "adavtp.hub_cards": set(),
    "adavtp.hub_cards.publish": set(),
    "adavtp.hub_cards.dataset_card": set(),
    "adavtp.hub_cards.conversion.convert": set(),
    "adavtp.evaluation.settings": set(),
    "adavtp.evaluation.measurements": set(),
    "adavtp.modeling.costs.model_costs": set(),
    "adavtp.evaluation.runs": set(),
    "adavtp.evaluation.answering": set(),
    "adavtp.evaluation.continuations": set(),
    "adavtp.commands.measure": {"rich", "typer"},
    "adavtp.command_line": {"rich", "typer"},
}

# Modules are imported one after another in one process, lightest first, so that each is charged with what it adds.
IMPORT = """
import importlib, sys
heavy, modules = {heavy!r}, {modules!r}
for name in modules:
    before = set(sys.modules)
    importlib.import_module(name)
    added = {{module.split(".")[0] for module in set(sys.modules) - before}}
    print(name, *sorted(added & heavy))
"""

# As on a machine that was set up for running models and not for this package: as if these were not installed.
WITHOUT = """
import sys
class Absent:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {names!r} else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Absent(finder) for finder in sys.meta_path]
"""

MEASURE = """
print("measured:")
try:
    import datasets
except ModuleNotFoundError as error:
    print("hidden:", error.name)
sys.path.insert(0, "benchmarks")
import latency
arguments = "--preset tiny --reducers full fastv --budgets 0.75 --new-tokens 2 --repeats 1 --warmup 0"
latency.main(arguments.split())
"""


def output_of(code: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def printed() -> str:
    """
    What one process prints that imports the modules, hides the heavy packages from then on, and measures. None of
    what it imported has loaded one of them, or the first test fails; so nothing that measures can have one.
    """
    hidden = WITHOUT.format(names=HEAVY - {"rich", "typer"})
    return output_of(IMPORT.format(heavy=HEAVY, modules=list(ALLOWED)) + hidden + MEASURE)


@pytest.fixture(scope="module")
def loaded(printed: str) -> dict[str, set[str]]:
    """Module -> what it loads of the heavy packages."""
    lines = printed.partition("measured:")[0].splitlines()
    return {line.split()[0]: set(line.split()[1:]) for line in lines}


def test_modules_load_no_more_than_they_need(loaded: dict[str, set[str]]) -> None:
    assert loaded.keys() == ALLOWED.keys()
    assert {module: more for module, names in loaded.items() if (more := names - ALLOWED[module])} == {}


def test_measuring_needs_no_more_than_torch_and_transformers_and_a_terminal(printed: str) -> None:
    measured = printed.partition("measured:")[2]
    assert "hidden: datasets" in measured
    assert "fastv" in measured and "tokens/s" in measured
