"""What LLaVA's training leaves without a language model becomes, with its base, what both are together."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from adavtp import AdaVTPForConditionalGeneration
from adavtp.command_line import app
from adavtp.hub_cards.conversion.convert import convert_checkpoint
from llava_folders import Trained, lora_folder, original_folder, projector_folder, transformers_folder

FOLDERS: dict[str, Callable[[Path], Trained]] = {
    "a projector": projector_folder,
    "LoRA": lora_folder,
    "LoRA in safetensors": lambda path: lora_folder(path, ".safetensors"),
    "LoRA scaled by the root of its rank": lambda path: lora_folder(path, use_rslora=True),
}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("kind", FOLDERS)
def test_base_and_what_was_trained_on_it_are_one_checkpoint(kind: str, tmp_path: Path) -> None:
    source = FOLDERS[kind](tmp_path / "source")
    done = convert_checkpoint(source.path, tmp_path / "out", base=source.base)
    assert (done.source, done.base, done.dtype) == ("source", "source-base", "float16")
    written = weights_of(tmp_path / "out")
    for name, value in source.tensors.items():
        kept = written[name][: len(value)]
        # In float32 or float64, a sum may round to the next of float16.
        assert kept.dtype == value.dtype and torch.allclose(kept.float(), value.float(), rtol=2**-10, atol=0), name
    model = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.float16
    assert str(tmp_path) not in (tmp_path / "out" / "conversion.json").read_text()


def test_lora_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    source = lora_folder(tmp_path / "source")
    convert_checkpoint(source.path, tmp_path / "out", base=source.base)
    llm = AutoModelForCausalLM.from_pretrained(source.base, use_safetensors=False, dtype=torch.float16)
    merged = PeftModel.from_pretrained(llm, source.path).merge_and_unload().state_dict()
    written = weights_of(tmp_path / "out")
    for name, value in merged.items():
        ours = written[name.replace("model.", "model.language_model.", 1)][: len(value)]
        assert torch.allclose(ours.float(), value.float(), rtol=2**-9, atol=2**-12), name


def test_a_llava_as_base_gives_its_projector_up(tmp_path: Path) -> None:
    source = projector_folder(tmp_path / "source")
    base = original_folder(tmp_path / "base", "1.6", image_aspect_ratio="pad", model_type="llava_llama")
    trained = {name: value + 1 for name, value in torch.load(source.path / "mm_projector.bin").items()}
    torch.save(trained, source.path / "mm_projector.bin")
    done = convert_checkpoint(source.path, tmp_path / "out", base=base.path)
    written = weights_of(tmp_path / "out")
    for number, name in ((0, "linear_1"), (2, "linear_2")):
        for part in ("weight", "bias"):
            expected = trained[f"model.mm_projector.{number}.{part}"]
            assert torch.equal(written[f"model.multi_modal_projector.{name}.{part}"], expected)
    assert {item.name for item in done.dropped_tensors} >= set(trained)


def test_the_command_takes_a_base(tmp_path: Path) -> None:
    source = lora_folder(tmp_path / "source")
    run = [str(source.path), str(tmp_path / "out")]
    without = CliRunner().invoke(app, ["convert", *run])
    assert without.exit_code == 2 and "lmsys/vicuna-7b-v1.5" in " ".join(without.output.split()), without.output
    said = CliRunner().invoke(app, ["convert", *run, "--base", str(source.base)], env={"COLUMNS": "160"})
    assert said.exit_code == 0 and "source on source-base" in said.output, said.output


class Armed:
    """A pickle that runs code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.trace,))


def _settings(**settings: Any) -> Callable[[Trained], None]:
    def change(source: Trained) -> None:
        file = source.path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Trained], None]:
    def apply(source: Trained) -> None:
        tensors = torch.load(source.path / "adapter_model.bin")
        change(tensors)
        torch.save(tensors, source.path / "adapter_model.bin")

    return apply


def _code_in(name: str) -> Callable[[Trained], None]:
    def change(source: Trained) -> None:
        (source.path / name).write_bytes(pickle.dumps({"x": Armed(source.path / "ran")}))

    return change


def _another_base(source: Trained) -> None:
    shutil.rmtree(source.base)
    transformers_folder(source.base)


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
REFUSED: dict[str, tuple[Callable[[Trained], Any], str]] = {
    "weights of another kind": (_settings(use_dora=True), "`use_dora` is True"),
    "another method": (_settings(peft_type="LOHA"), "`peft_type` is 'LOHA'"),
    "a base that training changed": (_settings(init_lora_weights="pissa"), "`init_lora_weights` is 'pissa'"),
    "a rank that is not the weights'": (_settings(r=8), "rank 8 .*which has rank 4"),
    "a rank that is none": (_settings(r=None), "rank None"),
    "an alpha in words": (_settings(lora_alpha="16"), "alpha '16'"),
    "half of a pair": (_tensors(lambda all_: all_.pop(f"{LAYER}.lora_B.weight")), "without a `lora_B`"),
    "a pair that does not fit": (
        _tensors(lambda all_: all_.update({f"{LAYER}.lora_B.weight": torch.ones(3, 4)})),
        "q_proj.weight` of shape \\(3, 32\\).*is \\(32, 32\\)",
    ),
    "a layer that is not there": (
        _tensors(lambda all_: all_.update({f"x.lora_{part}.weight": torch.ones(4, 4) for part in "AB"})),
        "adapter has weights for `x.weight`.*has no place",
    ),
    "no configuration of the adapter": (
        lambda source: (source.path / "adapter_config.json").unlink(),
        "has no adapter_c",
    ),
    "code in the adapter": (_code_in("adapter_model.bin"), "cannot be read as a pickle of tensors"),
    "code beside it": (_code_in("non_lora_trainables.bin"), "cannot be read as a pickle of tensors"),
    "no projector": (lambda source: (source.path / "non_lora_trainables.bin").unlink(), "lacks 4 tensor.*projector"),
    "a base of another format": (_another_base, "`base` is .* a 'llava' model; expected is the 'llama' model"),
    "a base without weights": (
        lambda source: [path.unlink() for path in source.base.glob("pytorch_model*")],
        "has no weights",
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_does_not_fit_is_refused_by_name_and_runs_no_code(reason: str, tmp_path: Path) -> None:
    source = lora_folder(tmp_path / "source")
    damage, message = REFUSED[reason]
    damage(source)
    with pytest.raises((ValueError, OSError), match=f"(?s){message}"):
        convert_checkpoint(source.path, tmp_path / "out", base=source.base)
    assert not (source.path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [original_folder, transformers_folder])
def test_a_whole_checkpoint_takes_no_base(kind: Callable[[Path], Any], tmp_path: Path) -> None:
    source, base = kind(tmp_path / "source"), original_folder(tmp_path / "base")
    with pytest.raises(ValueError, match="`base` is .*base'.*it is for an adapter"):
        convert_checkpoint(source.path, tmp_path / "out", base=base.path)
