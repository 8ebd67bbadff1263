"""Folders that were exported when code lay flat beside the weights still load, and answer as they did."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModel, AutoProcessor

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor, TokenReducer
from adavtp.modeling.reducers.base import REDUCERS
from former_folders import FORMER_FOLDERS, require_former_answers, unpack_former_folders
from without_package import run_without_package


@pytest.fixture(scope="module")
def former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_former_folders(tmp_path_factory.mktemp("former"))


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    yield
    REDUCERS.pop("mine", None)


def test_they_answer_as_then_by_their_own_code_where_the_package_is_absent(former: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from transformers import AutoModel, AutoProcessor
from former_folders import require_former_answers
for name in {FORMER_FOLDERS}:
    folder = Path({str(former)!r}, name)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    require_former_answers(folder, model, AutoProcessor.from_pretrained(folder, trust_remote_code=True))
    print(type(model).__module__.partition(".")[0])
"""
    assert run_without_package(code, tmp_path).split() == ["transformers_modules"] * 2


@pytest.mark.parametrize("name", FORMER_FOLDERS)
def test_they_answer_as_then_by_the_package_and_are_saved_in_the_present_form(
    name: str, former: Path, tmp_path: Path
) -> None:
    model = AutoModel.from_pretrained(former / name, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(former / name, trust_remote_code=True)
    assert (type(model), type(processor)) == (AdaVTPForConditionalGeneration, AdaVTPProcessor)
    assert all(isinstance(reducer, TokenReducer) for reducer in model.model.reducers.values())
    require_former_answers(former / name, model, processor)
    model.save_pretrained(tmp_path)
    REDUCERS.pop("mine", None)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    require_former_answers(former / name, loaded, processor)
    text = (tmp_path / "adavtp_code" / "reducers_custom.py").read_text()
    assert ("class Mine(TokenReducer):" in text) == (name == "custom") and "_adavtp import Token" not in text
