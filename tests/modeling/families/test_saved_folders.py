"""Folders of every family: made from a stock checkpoint, with their own code, and still the family's own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from adavtp import AdaVTPForConditionalGeneration
from tiny_families import FAMILIES, Writer, batch_of, stock_model
from without_package import run_without_package

WITHOUT_PACKAGE = """
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM
for name, batch in torch.load("batches.pt").items():
    model = AutoModelForImageTextToText.from_pretrained(f"{name}/ours", trust_remote_code=True, dtype=torch.float64)
    model.save_pretrained(f"{name}/again")
    for auto in (AutoModel, AutoModelForMultimodalLM):
        again = auto.from_pretrained(f"{name}/again", trust_remote_code=True, dtype=torch.float64)
        assert type(again) is not type(model) and type(again).__name__ == type(model).__name__, name
        with torch.no_grad():
            logits = [loaded(**batch, token_budget=0.4).logits for loaded in (model, again)]
        torch.testing.assert_close(*logits)
    torch.save(logits[1], f"{name}/logits.pt")
"""
# Their files have names that no longer are those in memory.
OLDER_NAMES = set(FAMILIES) - {"qwen3_vl", "qwen3_5", "glm4v", "idefics3", "smolvlm", "gemma4", "minicpmv4_6"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of each family `stock`, `ours` made from it and, by a process without the package, `again` made from that."""
    place = tmp_path_factory.mktemp("families")
    batches = {name: batch_of(name, [Writer(name).prompt()]) for name in FAMILIES}
    for name in FAMILIES:
        stock_model(name).save_pretrained(place / name / "stock")
        model = AdaVTPForConditionalGeneration.from_pretrained(place / name / "stock", dtype=torch.float64)
        # As if somebody had trained the controller, whose numbers are saved and loaded like all others.
        model.config.untrained_controller = False
        model.save_pretrained(place / name / "ours")
        with torch.no_grad():
            torch.save(model(**batches[name], token_budget=0.4).logits, place / name / "expected.pt")
    torch.save(batches, place / "batches.pt")
    run_without_package(WITHOUT_PACKAGE, place)
    return place


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stock_checkpoint_of_any_age_gives_all_its_weights(place: Path, name: str) -> None:
    older = load_file(place / name / "stock/model.safetensors")
    assert (set(older) != set(stock_model(name).state_dict())) == (name in OLDER_NAMES)
    ours = load_file(place / name / "ours/model.safetensors")
    for key, weight in stock_model(name).state_dict().items():
        assert torch.equal(ours[key], weight), key


@pytest.mark.parametrize("name", FAMILIES)
def test_where_the_package_is_not_a_folder_loads_saves_and_loads_again(place: Path, name: str) -> None:
    torch.testing.assert_close(torch.load(place / name / "logits.pt"), torch.load(place / name / "expected.pt"))


@pytest.mark.parametrize("folder", ["ours", "again"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_stock_class_loads_a_folder_with_the_same_weights(place: Path, name: str, folder: str) -> None:
    stock = AutoModelForImageTextToText.from_pretrained(place / name / folder, dtype=torch.float64)
    assert type(stock) is type(stock_model(name))
    for key, weight in stock_model(name).state_dict().items():
        assert torch.equal(stock.state_dict()[key], weight), key
