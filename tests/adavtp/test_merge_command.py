"""`adavtp merge` makes a checkpoint like any other, or says why it cannot and leaves nothing behind."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

from adavtp import AdaVTPForConditionalGeneration, AdaVTPProcessor
from adavtp.command_line import app
from adavtp.commands.console import load_checkpoint
from adavtp.trainer.adapter_folders import save_beside_adapter
from tiny_adapters import adapted_model, adapter_trainer, base_checkpoint, trained_adapter
from tiny_conversations import picture
from tiny_models import tiny_text_config
from tiny_processors import family_folder

QUESTION = "which digit is red ?"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, `base`, and its `adapter`."""
    folder = tmp_path_factory.mktemp("place")
    trained_adapter(folder / "adapter", base_checkpoint(folder / "base"))
    return folder


def merge(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def refused(*arguments: str | Path) -> str:
    """What the command says, on one line, when it is refused."""
    result = merge(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.replace("│", " ").split())


def test_another_family_s_adapter_makes_a_checkpoint_of_its_family_that_commands_take(tmp_path: Path) -> None:
    base = family_folder("idefics3", tmp_path / "base")
    adapted = adapted_model(base)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    adapted.save_pretrained(tmp_path / "adapter")
    save_beside_adapter(adapted, tmp_path / "adapter")
    result = merge(tmp_path / "adapter", tmp_path / "merged", "--base", base)
    assert result.exit_code == 0, result.output
    asked = {"token_budget": 0.5, "reducer": "grid"}
    model, processor = load_checkpoint(str(tmp_path / "merged"))
    inputs = model.inputs_of_questions(picture(1), QUESTION)
    expected = adapted.eval().base_model.model(**inputs, **asked).logits
    torch.testing.assert_close(model(**inputs, **asked).logits, expected, atol=1e-4, rtol=1e-3)
    plain = AdaVTPForConditionalGeneration.from_pretrained(base)(**inputs, **asked).logits
    assert not torch.allclose(plain, expected, atol=1e-3)
    assert type(processor).__name__ == "Idefics3Processor"


def copy_of_adapter(place: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(place / "adapter", folder, ignore=shutil.ignore_patterns("run"))
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_the_merged_checkpoint_is_like_its_base_and_answers_as_the_adapted_model(place: Path, tmp_path: Path) -> None:
    result = merge(place / "adapter", tmp_path / "merged")
    assert result.exit_code == 0 and "MB of weights" in " ".join(result.output.split()), result.output
    base, merged = (
        {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
        for folder in (place / "base", tmp_path / "merged")
    )
    assert base == merged - {"training_log.json"}, "with the code and without a trace of PEFT"
    model = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == model.state_dict().keys()
    adapted = PeftModel.from_pretrained(
        AdaVTPForConditionalGeneration.from_pretrained(place / "base"), place / "adapter"
    ).eval()
    inputs = AdaVTPProcessor.from_pretrained(tmp_path / "merged").of_questions(picture(0), QUESTION)
    with torch.no_grad():
        for budget in (1.0, 0.4):
            expected = adapted(**inputs, token_budget=budget).logits
            assert torch.allclose(model(**inputs, token_budget=budget).logits, expected, atol=1e-5)
    answers = [m.generate(picture(0), QUESTION, token_budget=0.4, max_new_tokens=6) for m in (model, adapted)]
    assert answers[0] == answers[1]


def test_the_base_may_be_named_from_here_from_the_adapter_or_by_hand(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    merged = []
    for name, base, option in (
        ("from here", "base", []),
        ("from the adapter", "../../base", []),
        ("from above the adapter", f"{tmp_path.name}/base", []),
        ("by hand", "gone", ["--base", "base"]),
    ):
        adapter = copy_of_adapter(place, tmp_path / name / "adapter", base_model_name_or_path=base)
        result = merge(adapter, tmp_path / name / "merged", *option)
        assert result.exit_code == 0, result.output
        merged.append(load_file(tmp_path / name / "merged" / "model.safetensors"))
    assert all(torch.equal(value, other[name]) for other in merged[1:] for name, value in merged[0].items())


def test_a_base_that_is_gone_is_an_error_that_says_how_to_name_it(place: Path, tmp_path: Path) -> None:
    adapter = copy_of_adapter(place, tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "gone"))
    message = refused(adapter, tmp_path / "merged")
    assert "gone" in message and "--base" in message
    nameless = copy_of_adapter(place, tmp_path / "nameless", base_model_name_or_path=None)
    assert "--base" in refused(nameless, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "nameless"}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ({"hidden_size": 64}, "hidden_size"),
        # The adapter's layers are all there, and one more.
        ({"num_layers": 3}, "num_hidden_layers"),
        ({"text": "qwen2"}, "model_type"),
    ],
)
def test_an_adapter_of_another_model_is_an_error(
    place: Path, tmp_path: Path, text: dict[str, Any], named: str
) -> None:
    vocabulary = len(AdaVTPProcessor.from_pretrained(place / "base").tokenizer)
    other = base_checkpoint(tmp_path / "other", text_config=tiny_text_config(**text, vocab_size=vocabulary))
    message = refused(place / "adapter", tmp_path / "merged", "--base", other)
    assert "does not fit" in message and named in message
    assert not (tmp_path / "merged").exists()


def test_an_adapter_that_peft_wrote_alone_is_refused_where_its_weights_do_not_fit(place: Path, tmp_path: Path) -> None:
    adapter = copy_of_adapter(place, tmp_path / "adapter")
    (adapter / "adavtp_config.json").unlink()
    vocabulary = len(AdaVTPProcessor.from_pretrained(place / "base").tokenizer)
    text = tiny_text_config(hidden_size=64, vocab_size=vocabulary)
    other = base_checkpoint(tmp_path / "other", text_config=text)
    assert "does not fit" in refused(adapter, tmp_path / "merged", "--base", other)
    assert merge(adapter, tmp_path / "merged").exit_code == 0


def test_nothing_is_merged_into_a_folder_with_something_in_it(place: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("mine")
    assert "output_dir" in refused(place / "adapter", tmp_path / "merged")
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["mine.txt"]


def test_what_is_no_whole_adapter_is_an_error(place: Path, tmp_path: Path) -> None:
    assert "adapter_config.json" in refused(place / "base", tmp_path / "merged")
    cut = copy_of_adapter(place, tmp_path / "cut")
    weights = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(weights[:-100])
    assert "not whole" in refused(cut, tmp_path / "merged")
    fewer = copy_of_adapter(place, tmp_path / "fewer")
    weights = load_file(fewer / "adapter_model.safetensors")
    # PEFT would only warn, and leave it at its first value.
    del weights[next(name for name in weights if name.endswith(".lora_B.weight"))]
    save_file(weights, fewer / "adapter_model.safetensors")
    assert "does not fit" in refused(fewer, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_weights_that_are_no_numbers_are_not_merged(place: Path, tmp_path: Path) -> None:
    diverged = copy_of_adapter(place, tmp_path / "diverged")
    weights = load_file(diverged / "adapter_model.safetensors")
    next(tensor for name, tensor in sorted(weights.items()) if "lora_B" in name)[0] = torch.nan
    save_file(weights, diverged / "adapter_model.safetensors", metadata={"format": "pt"})
    assert "has 1 weight(s) with values that are NaN or infinite" in refused(diverged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_llava_base_will_do_if_the_adapter_brings_the_rest(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "base", tmp_path / "llava")
    config = json.loads((tmp_path / "llava" / "config.json").read_text()) | {"model_type": "llava"}
    (tmp_path / "llava" / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "llava" / "model.safetensors")
    of_llava = {
        name: value for name, value in weights.items() if "budget_token" not in name and "controller" not in name
    }
    save_file(of_llava, tmp_path / "llava" / "model.safetensors", metadata={"format": "pt"})
    assert merge(place / "adapter", tmp_path / "merged", "--base", tmp_path / "llava").exit_code == 0
    assert merge(place / "adapter", tmp_path / "expected").exit_code == 0
    merged, expected = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected")]
    assert merged.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in merged.items())

    decoder_alone = adapted_model(tmp_path / "llava", ["decoder"])
    adapter_trainer(tmp_path / "run", decoder_alone, train_parts=["decoder"]).save_model(str(tmp_path / "decoder"))
    assert "adavtp convert" in refused(tmp_path / "decoder", tmp_path / "not merged")
