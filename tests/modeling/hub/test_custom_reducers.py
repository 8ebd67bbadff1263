"""A reducer that a user writes goes where the model goes: through training, saving, and loading without its script."""

import contextlib
import importlib
import json
import re
import runpy
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText

from adavtp import (
    AdaVTPForConditionalGeneration,
    AdaVTPProcessor,
    AdaVTPTrainer,
    AdaVTPTrainingArguments,
    BudgetCollator,
    TokenReducer,
    register_reducer,
)
from adavtp.hub_cards.export import export_checkpoint
from adavtp.modeling.hub.custom_reducers import custom_reducers_source
from adavtp.modeling.reducers import custom
from adavtp.modeling.reducers.base import REDUCERS
from adavtp.tasks.digit_scenes import draw_scene
from load_without_package import answers, loaded_elsewhere
from repository import ROOT
from tiny_conversations import conversation_rows, digit_model, digit_processor
from tiny_models import tiny_batch, tiny_model
from without_package import run_elsewhere

README = ROOT / "README.md"
CUSTOM = "adavtp_code/reducers_custom.py"

MINE = """
    from adavtp import ScoringReducer, register_reducer

    @register_reducer("mine")
    class Mine(ScoringReducer):
        def scores(self, features):
            return features.patches[..., 0]
"""


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is gone behind it."""
    before = dict(REDUCERS)
    yield
    REDUCERS.clear()
    REDUCERS.update(before)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    """Writes a user's modules into a folder and imports the first; they are gone behind the test."""
    monkeypatch.syspath_prepend(tmp_path / "project")
    written = []

    def written_and_imported(**modules: str) -> ModuleType:
        for name, text in modules.items():
            file = tmp_path / "project" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(textwrap.dedent(text))
            written.append(name.replace("__", "."))
        importlib.invalidate_caches()
        return importlib.import_module(written[0])

    yield written_and_imported
    for name in list(sys.modules):
        if name.partition(".")[0] in {name.partition(".")[0] for name in written}:
            del sys.modules[name]


def _run_as_main(file: Path, *arguments: Any) -> None:
    """Runs a script in this process, where for that time it is `__main__`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        runpy.run_path(str(file), run_name="__main__")


def _readme_block() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "@register_reducer" in block]
    return block


def _readme_class() -> str:
    """The part of the README's block that imports and defines."""
    return _readme_block().partition("\nmodel = ")[0]


def _selected(model: AdaVTPForConditionalGeneration) -> list[list[int]]:
    return model.select_tokens(**tiny_batch(model.config), token_budget=0.4).positions.tolist()


def _loads(folder: Path, **kwargs: Any) -> AdaVTPForConditionalGeneration:
    return AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# The README's reducer
# ---------------------------------------------------------------------------------------------------------------------

# What stands before the block in the README: a checkpoint and an image.
BEFORE = """
from tiny_conversations import digit_model, digit_processor
from adavtp.tasks.digit_scenes import draw_scene

print("the script runs")
checkpoint, image, processor = "checkpoint", draw_scene("test", 0).image, digit_processor()
start = digit_model(processor, seed=1)
start.generation_config.max_new_tokens = 6
start.save_pretrained(checkpoint)
processor.save_pretrained(checkpoint)
"""
AFTER = """
processor.save_pretrained("my-model")
image.save("my-model/image.png")
assert model.generate(image, "How many entries are there?", token_budget=0.4) == answer
"""


@pytest.fixture(scope="module")
def script_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's block leaves behind, run as a script."""
    cwd, before = tmp_path_factory.mktemp("script"), dict(REDUCERS)
    call = '\nmodel.set_reducer("outliers", temperature=0.5)\n'
    assert call in _readme_block()
    weights = '\ntorch.manual_seed(0)\ntorch.nn.init.normal_(model.model.reducers["outliers"].weight)\n'
    (cwd / "script.py").write_text(BEFORE + _readme_block().replace(call, call + weights) + AFTER)
    with contextlib.chdir(cwd):
        _run_as_main(cwd / "script.py")
    (cwd / "script.py").unlink()
    REDUCERS.clear()
    REDUCERS.update(before)
    return cwd / "my-model"


@pytest.fixture(scope="module")
def elsewhere(script_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What that folder does in a process that can import neither the package nor the script."""
    output = tmp_path_factory.mktemp("elsewhere")
    digit_processor().save_pretrained(output / "processor")
    return loaded_elsewhere(script_folder, script_folder, output / "processor", output)


def test_the_readme_s_reducer_has_under_20_lines() -> None:
    definition = _readme_class().partition("@register_reducer")[2]
    assert len(definition.strip().splitlines()) < 20
    assert len(_readme_class().strip().splitlines()) < 20, "with its imports"


def test_the_readme_s_reducer_leaves_its_script_in_a_file_of_its_own(script_folder: Path) -> None:
    text = (script_folder / CUSTOM).read_text()
    assert "class OutlierReducer(TokenReducer):" in text
    assert "from .reducers_base import TokenReducer\nfrom .reducers_base import register_reducer\n" in text
    assert "digit_model" not in text and "print" not in text


def test_the_readme_s_reducer_works_where_neither_package_nor_script_is(
    script_folder: Path, elsewhere: dict[str, Any]
) -> None:
    assert elsewhere["reducer"] == "outliers"
    model = _loads(script_folder)
    model.processor = AdaVTPProcessor.from_pretrained(script_folder, trust_remote_code=True)
    here = answers(model, model.processor, draw_scene("test", 0).image)
    assert elsewhere["auto_model"] == elsewhere["image_text_to_text"] == elsewhere["again"] == here
    assert here["text"], "an empty answer would prove nothing"


def test_saving_again_without_the_package_writes_the_same_file(script_folder: Path, elsewhere: dict[str, Any]) -> None:
    assert (elsewhere["folder"] / CUSTOM).read_text() == (script_folder / CUSTOM).read_text()


def test_trained_weights_of_the_readme_s_reducer_are_loaded(script_folder: Path) -> None:
    torch.manual_seed(0)
    wanted = torch.nn.init.normal_(torch.empty(32))
    reducer = _loads(script_folder).model.reducers["outliers"]
    assert torch.equal(reducer.weight, wanted) and reducer.temperature == 0.5
    assert isinstance(reducer, TokenReducer)


def test_the_trainer_trains_the_readme_s_reducer(tmp_path: Path, make: Callable[..., ModuleType]) -> None:
    make(outliers=_readme_class())
    processor = digit_processor()
    model = digit_model(processor)
    model.set_reducer("outliers")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"max_steps": 2, "save_steps": 2, "learning_rate": 0.1, "report_to": [], "use_cpu": True}
    trainer = AdaVTPTrainer(
        model,
        AdaVTPTrainingArguments(str(tmp_path), train_parts=["controller"], disable_tqdm=True, **arguments),
        train_dataset=conversation_rows(4),
        data_collator=BudgetCollator(processor, (0.2, 0.6)),
        processing_class=processor,
    )
    trainer.train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"model.reducers.outliers.weight"}
    del REDUCERS["outliers"]
    loaded = _loads(tmp_path / "checkpoint-2")
    assert torch.equal(loaded.model.reducers["outliers"].weight, model.model.reducers["outliers"].weight)
    inputs = processor.of_questions(draw_scene("test", 0).image, "which digit is red ?")
    kept = [each.eval().select_tokens(**inputs, token_budget=0.4).positions.tolist() for each in (loaded, model)]
    assert kept[0] == kept[1]


# ---------------------------------------------------------------------------------------------------------------------
# Where the package is installed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mine_folder(tmp_path: Path, make: Callable[..., ModuleType]) -> Path:
    """A folder with a reducer that nobody has registered any more."""
    make(mine=MINE)
    tiny_model(reducer="mine").save_pretrained(tmp_path / "model")
    del REDUCERS["mine"]
    return tmp_path / "model"


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForImageTextToText, AdaVTPForConditionalGeneration], ids=lambda c: c.__name__
)
def test_a_trusted_folder_brings_its_reducer_to_the_package(auto_class: Any, mine_folder: Path) -> None:
    model = auto_class.from_pretrained(str(mine_folder), trust_remote_code=True)
    assert type(model) is AdaVTPForConditionalGeneration
    assert isinstance(model.model.reducers["mine"], TokenReducer)
    assert _selected(model) == _selected(tiny_model(reducer="mine"))


@pytest.mark.parametrize("trust", [False, None])
def test_a_folder_that_is_not_trusted_runs_no_code_and_says_what_to_do(trust: bool | None, mine_folder: Path) -> None:
    with (mine_folder / CUSTOM).open("a") as file:
        file.write("raise RuntimeError('this code ran')\n")
    with pytest.raises(ValueError, match="names the reducer.s. 'mine'.*trust_remote_code=True.*or import the module"):
        AutoModel.from_pretrained(mine_folder, trust_remote_code=trust)
    with pytest.raises(ValueError, match="cannot be read .RuntimeError: this code ran"):
        _loads(mine_folder)


def test_a_folder_s_code_stays_out_where_another_reducer_is_asked_for(mine_folder: Path) -> None:
    assert AdaVTPForConditionalGeneration.from_pretrained(mine_folder, reducer="grid").config.reducer == "grid"


def test_a_registered_reducer_needs_no_trust(mine_folder: Path) -> None:
    importlib.reload(sys.modules["mine"])
    assert AutoModel.from_pretrained(mine_folder).config.reducer == "mine"


def test_a_folder_without_the_file_says_what_to_do(mine_folder: Path) -> None:
    (mine_folder / CUSTOM).unlink()
    with pytest.raises(ValueError, match="names the reducer.s. 'mine'.*import the module that registers them"):
        _loads(mine_folder)


def test_a_class_of_another_name_keeps_its_place(mine_folder: Path) -> None:
    @register_reducer("mine")
    class Other(TokenReducer):
        __qualname__ = "Other"

    for _ in range(2):
        with pytest.raises(ValueError, match="'mine', which Other holds already"):
            _loads(mine_folder)
    assert REDUCERS["mine"] is Other


def test_a_class_of_the_same_name_gives_way_to_the_folder_s(mine_folder: Path) -> None:
    old = importlib.reload(sys.modules["mine"]).Mine
    assert type(_loads(mine_folder).model.reducers["mine"]) is REDUCERS["mine"] is not old


def test_a_model_that_runs_its_folder_s_code_says_why_it_does_not_know_the_package_s_reducers(
    mine_folder: Path, tmp_path: Path
) -> None:
    code = f"""
from transformers import AutoModel
model = AutoModel.from_pretrained({str(mine_folder)!r}, trust_remote_code=True)
from adavtp import TokenReducer, register_reducer
register_reducer("later")(type("Later", (TokenReducer,), {{}}))
try:
    model.set_reducer("later")
except ValueError as error:
    print(error)
"""
    assert "import adavtp before the model is loaded" in run_elsewhere(code, tmp_path)


def test_two_folders_that_bring_one_name_keep_each_its_own(tmp_path: Path, make: Callable[..., ModuleType]) -> None:
    for sign in ("", "-"):
        make(**{f"mine{len(sign)}": MINE.replace("features.patches[", f"{sign}features.patches[")})
        importlib.import_module(f"mine{len(sign)}")
        tiny_model(reducer="mine").save_pretrained(tmp_path / f"model{sign}")
    first, second = _loads(tmp_path / "model"), _loads(tmp_path / "model-")
    again = _loads(tmp_path / "model")
    assert _selected(first) == _selected(again) != _selected(second)
    second.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CUSTOM).read_text() == (tmp_path / "model-" / CUSTOM).read_text()


def test_a_reducer_whose_weights_stay_in_the_checkpoint_goes_with_it(
    tmp_path: Path, make: Callable[..., ModuleType]
) -> None:
    make(outliers=_readme_class())
    model = tiny_model()
    model.set_reducer("outliers")
    torch.nn.init.normal_(model.model.reducers["outliers"].weight)
    selected = _selected(model)
    model.set_reducer("adaptive")
    model.save_pretrained(tmp_path / "model")
    del REDUCERS["outliers"]
    loaded = _loads(tmp_path / "model")
    loaded.set_reducer("outliers")
    assert _selected(loaded) == selected


def test_an_export_brings_the_reducer_along(mine_folder: Path, tmp_path: Path) -> None:
    digit_processor().save_pretrained(mine_folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        export_checkpoint(mine_folder, tmp_path / "exported")
    folder = export_checkpoint(mine_folder, tmp_path / "exported", trust_remote_code=True)
    assert (folder / CUSTOM).read_text() == (mine_folder / CUSTOM).read_text()


def test_a_class_made_on_the_spot_saves_the_class_it_is_made_from(
    tmp_path: Path, make: Callable[..., ModuleType]
) -> None:
    reducer_class = make(mine=MINE).Mine
    model = tiny_model(reducer="mine")
    # As FSDP does with the classes of the modules that it shards.
    sharded = type("FSDPMine", (reducer_class,), {"__module__": "torch.distributed.fsdp"})
    model.model.reducers["mine"].__class__ = sharded
    model.save_pretrained(tmp_path / "model")
    assert _selected(_loads(tmp_path / "model")) == _selected(model)


def test_without_a_reducer_of_the_user_the_file_is_the_package_s(mine_folder: Path, tmp_path: Path) -> None:
    model = _loads(mine_folder)
    model.set_reducer("grid")
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CUSTOM).read_text() == Path(custom.__file__).read_text()


# ---------------------------------------------------------------------------------------------------------------------
# What of a module goes along
# ---------------------------------------------------------------------------------------------------------------------

SOURCES = {
    "a class registered by a call": {
        "mine": """
            import adavtp

            class Mine(adavtp.ScoringReducer):
                def scores(self, features: adavtp.VisionFeatures):
                    return features.patches[..., 1]

            adavtp.register_reducer("mine")(Mine)
        """
    },
    "base classes, functions, values and imports, each because another needs it": {
        "mine": """
            from __future__ import annotations

            import math
            import torch.nn.functional
            from typing import TYPE_CHECKING
            from adavtp.modeling.reducers import base as reducers

            if TYPE_CHECKING:
                import nothing_of_that_name

            try:
                from nothing_of_that_name import sharpness
            except ImportError:
                sharpness = None

            raise_on_import = print  # not used
            FIRST, SECOND = 1, 2
            TABLE = torch.linspace(-1.0, 1.0, 32)
            TABLE += FIRST
            Base = reducers.ScoringReducer

            def weight(x, k=SECOND):
                return scaled(x) * math.sqrt(k)

            def scaled(x: nothing_of_that_name.Tensor):
                return torch.nn.functional.softplus(x * TABLE, beta=1.0 if sharpness is None else 2.0)

            class Middle(Base):
                ä = "ä"; factor = weight(torch.ones(32))

            @reducers.register_reducer("mine")
            class Mine(Middle):
                def scores(self, features):
                    from adavtp import Selection as S, TokenReducer
                    assert S.from_keep and TokenReducer and self.ä == "ä"
                    return (weight(features.patches) * self.factor).sum(-1)
        """
    },
    "modules of the same project": {
        "mine": """
            from adavtp import *
            from helpers_of_mine import Scorer, direction as axis
            import project_of_mine.layers

            @register_reducer("mine")
            class Mine(Scorer):
                def __init__(self, config):
                    super().__init__(config)
                    self.layer = project_of_mine.layers.Score()

                def scores(self, features):
                    return self.layer(features.patches) * axis()
        """,
        "helpers_of_mine": """
            from adavtp import ScoringReducer

            SIGN = -1.0

            class Scorer(ScoringReducer):
                kind = "scorer"

            def direction():
                return SIGN

            if __name__ == "__main__":
                SIGN = 5.0
        """,
        "project_of_mine____init__": "",
        "project_of_mine__layers": """
            from torch import nn
            from .inner import width

            class Score(nn.Module):
                def forward(self, x):
                    return x[..., : width()].sum(-1)
        """,
        "project_of_mine__inner": """
            def width():
                return 7
        """,
    },
    "modules that import each other": {
        "mine": """
            from adavtp import ScoringReducer, register_reducer

            SIGN = -1.0

            from theirs import signed as turned

            @register_reducer("mine")
            class Mine(ScoringReducer):
                def scores(self, features):
                    return turned(features.patches[..., 0])
        """,
        "theirs": """
            from mine import SIGN

            def signed(x, sign=SIGN):
                return sign * x
        """,
    },
    "a class of a published method": {
        "mine": """
            from adavtp import AdaVTPConfig, register_reducer
            from adavtp.modeling.reducers.divprune import DivPruneReducer

            @register_reducer("mine")
            class Mine(DivPruneReducer):
                def __init__(self, config: AdaVTPConfig) -> None:
                    super().__init__(config)
        """
    },
}


@pytest.mark.parametrize("modules", SOURCES.values(), ids=SOURCES)
def test_what_a_class_uses_goes_along_and_works_without_its_module(
    modules: dict[str, str], tmp_path: Path, make: Callable[..., ModuleType]
) -> None:
    make(**modules)
    model = tiny_model(reducer="mine")
    selected = _selected(model)
    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "project")
    for name in modules:
        sys.modules.pop(name.replace("__", "."), None)
    del REDUCERS["mine"]
    loaded = _loads(tmp_path / "model")
    assert _selected(loaded) == selected != _selected(tiny_model(reducer="grid"))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CUSTOM).read_text() == (tmp_path / "model" / CUSTOM).read_text()
    text = (tmp_path / "model" / CUSTOM).read_text()
    assert "raise_on_import" not in text and "__main__" not in text


SCRIPT = """
import sys
import torch
from adavtp import ScoringReducer, register_reducer
from tiny_models import tiny_model

LONG = [1, 2,
        3]
SHARE = float(sys.argv[1])
FLOOR = -float("inf")
NAMES = {name.upper() for name in ("a", "b")}
half = lambda x: x / 2
try:
    from nothing_of_that_name import sharpness
except ImportError:
    sharpness = half
for STEP in range(4):
    LONG.append(STEP) if STEP == 9 else None

@register_reducer("mine")
class Mine(ScoringReducer):
    def scores(self, features):
        assert FLOOR < 0 and NAMES == {"A", "B"} and LONG == [1, 2, 3] and STEP == 3
        return sharpness(features.patches[..., 0]) * SHARE

if __name__ == "__main__":
    tiny_model(reducer="mine").save_pretrained(sys.argv[2])
"""


def test_values_of_a_script_go_along_as_they_are_when_it_saves(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    _run_as_main(tmp_path / "script.py", "-0.25", tmp_path / "model")
    text = (tmp_path / "model" / CUSTOM).read_text()
    assert "SHARE = -0.25\n" in text and "LONG = [1, 2, 3]\n" in text and "sys" not in text
    assert "    from nothing_of_that_name import sharpness\n" in text
    model = _loads(tmp_path / "model")
    assert _selected(model) != _selected(tiny_model(reducer="grid"))
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / CUSTOM).read_text() == text


# A notebook is a main module without a file, whose cells IPython compiles under names that `linecache` knows.
NOTEBOOK = """
import json, linecache, sys
cells = json.loads(open(sys.argv[1]).read())
del __file__
for cell in cells:
    name = f"/tmp/ipykernel_1/{cells.index(cell)}.py"  # A cell that runs again has the name that it had.
    linecache.cache[name] = (len(cell), None, cell.splitlines(keepends=True), name)
    exec(compile(cell, name, "exec"), globals())
"""


def test_classes_of_a_notebook_s_cells_go_along_in_their_last_form(tmp_path: Path) -> None:
    mine = textwrap.dedent(MINE).replace("(ScoringReducer)", "(Base)")
    old, last = (mine.replace("features.patches[..., 0]", call) for call in ("old()", "self.helped(features)"))
    base = "class Base(ScoringReducer):\n    def helped(self, features):\n        return {}"
    cells = [
        "import torch\nfrom adavtp import ScoringReducer, register_reducer",
        base.format("old()"),
        last,
        old,
        "def helper(features):\n    return torch.relu(features.patches[..., 0])",
        base.format("helper(features)"),
        last,
        f"from tiny_models import tiny_model\ntiny_model(reducer='mine').save_pretrained({str(tmp_path / 'model')!r})",
    ]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    _run_as_main(tmp_path / "notebook.py", tmp_path / "cells.json")
    text = (tmp_path / "model" / CUSTOM).read_text()
    assert text.count("class Mine") == text.count("class Base") == 1 and "old()" not in text
    assert "return helper(features)\n" in text and "def helper" in text
    assert _loads(tmp_path / "model").config.reducer == "mine"


# ---------------------------------------------------------------------------------------------------------------------
# What cannot go along
# ---------------------------------------------------------------------------------------------------------------------

ERRORS = {
    "a value that the script makes": (
        "table = torch.ones(32)",
        "(features.patches * table).sum(-1)",
        "it uses 'table', which is a Tensor that .*script.py makes when it runs",
    ),
    "a model": ("model = tiny_model()", "model(features)", "it uses 'model', which is a AdaVTPForConditional"),
    "the class of the model": (
        "from adavtp import AdaVTPModel",
        "AdaVTPModel(features)",
        "it uses adavtp.AdaVTPModel, which is not among the files that travel",
    ),
    "the package itself": ("import adavtp", "print(adavtp)", "it uses the module 'adavtp' itself"),
    "an import of the project inside": (
        "",
        "__import__('json')\n        from tiny_models import tiny_model",
        "it has `from tiny_models import tiny_model` inside",
    ),
}


@pytest.mark.parametrize(("line", "scores", "message"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_go_along_is_an_error_that_names_it(line: str, scores: str, message: str, tmp_path: Path) -> None:
    script = SCRIPT.replace("SHARE = float(sys.argv[1])", line)
    (tmp_path / "script.py").write_text(script.replace("sharpness(features.patches[..., 0]) * SHARE", scores))
    with pytest.raises(ValueError, match=rf"Reducer 'mine' \(Mine\).*{message}.*a module file of its own"):
        _run_as_main(tmp_path / "script.py", "1.0", tmp_path / "model")
    # A long training is not lost for it.
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == tiny_model().state_dict().keys()


def test_a_class_without_source_is_an_error_that_names_it() -> None:
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(textwrap.dedent(MINE), names)
    with pytest.raises(ValueError, match="Reducer 'mine'.*the source of Mine in 'nowhere' is not available"):
        custom_reducers_source({"mine": names["Mine"]})


def test_a_class_inside_a_function_is_an_error_that_names_it() -> None:
    class Mine(TokenReducer):
        pass

    with pytest.raises(ValueError, match="Mine is defined inside a function"):
        custom_reducers_source({"mine": Mine})


def test_a_published_reducer_s_name_is_not_taken_over(make: Callable[..., ModuleType]) -> None:
    module = make(mine=MINE.replace('"mine"', '"random"').replace("class Mine", "class RandomReducer"))
    with pytest.raises(ValueError, match="AdaVTP has a reducer of that class name"):
        custom_reducers_source({"random": module.RandomReducer})


def test_one_name_with_two_meanings_is_an_error_that_names_it(make: Callable[..., ModuleType]) -> None:
    scores = "\n\n    def scale(): return {0}\n"
    first = make(mine=MINE.replace("[..., 0]", "[..., 0] * scale()") + scores.format(1))
    make(theirs=MINE.replace("[..., 0]", "[..., 0] * scale()").replace("ine", "y") + scores.format(2))
    theirs = importlib.import_module("theirs")
    with pytest.raises(ValueError, match="'scale' means both theirs.scale and mine.scale; rename one"):
        custom_reducers_source({"mine": first.Mine, "my": theirs.My})
