"""Every family's processor loads by Auto classes from a folder in the family's own layout, and the model reads it."""

import contextlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from adavtp import AdaVTPForConditionalGeneration
from pruned_by_hand import cut_inputs, language_inputs
from repository import ROOT
from tiny_conversations import picture
from tiny_families import FAMILIES
from tiny_processors import family_folder, family_processor, processor_parts, released_folder, stock_of

# Their folders have the form that transformers 5 writes, which keeps a processor's parts in one file.
NESTED = ("gemma4", "minicpmv4_6", "qwen3_5")
PARTS = {"image_processor", "video_processor", "tokenizer", "feature_extractor", "chat_template"}


def as_released(name: str, folder: Path) -> Path:
    """A folder of a tiny model in the layout in which the family's were published, a file for each part."""
    released_folder(name, folder)
    if name in NESTED:
        return folder
    processor = family_processor(name)
    processor.image_processor.save_pretrained(folder)
    if processor_parts(name).videos is not None:
        processor.video_processor.save_pretrained(folder)
    own = {key: value for key, value in processor.to_dict().items() if key not in PARTS}
    (folder / "processor_config.json").write_text(json.dumps(own))
    return folder


def asked(processor: ProcessorMixin, has_template: bool) -> BatchFeature:
    """A question about a picture."""
    image = picture(1, (60, 50))
    if not has_template:
        return processor(images=[image], text="<image>which digit is red ?", return_tensors="pt")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "which digit is red ?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_as_it_was_released_loads_and_is_the_same_when_it_is_saved_again(name: str, tmp_path: Path) -> None:
    folder, has_template = as_released(name, tmp_path / "released"), processor_parts(name).template is not None
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == processor_parts(name).processor[0]
    model = AdaVTPForConditionalGeneration.from_pretrained(folder, reducer="divprune")
    inputs, made = asked(processor, has_template), asked(family_processor(name), has_template)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again = asked(AutoProcessor.from_pretrained(tmp_path / "again"), has_template)
    assert inputs.keys() == made.keys() == again.keys()
    for key, value in made.items():
        assert torch.equal(inputs[key], value) and torch.equal(again[key], value), key
    answer = model.generate(**inputs, token_budget=0.4, max_new_tokens=2, do_sample=False)
    saved = AdaVTPForConditionalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(saved.generate(**inputs, token_budget=0.4, max_new_tokens=2, do_sample=False), answer)


def test_the_readme_s_example_runs_on_a_folder_in_the_layout_of_its_checkpoint(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Other families")[1]
    example, name = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], "Qwen/Qwen2.5-VL-7B-Instruct"
    assert example.count(name) == 2
    names: dict[str, Any] = {}
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(example.replace(name, os.fspath(as_released("qwen2_5_vl", tmp_path))), names)
    inputs, model, said = names["inputs"], names["model"], names["output"][0, names["inputs"]["input_ids"].shape[1] :]
    assert printed.getvalue() == names["processor"].decode(said, skip_special_tokens=True) + "\n"
    selection = model.select_tokens(**inputs, token_budget=0.4)
    assert selection.keep.sum() == int(0.4 * selection.keep.numel())
    # The first word is the stock class's on what is left.
    stock = stock_of("qwen2_5_vl", model)
    is_left = inputs["input_ids"][0] != model.config.image_token_id
    is_left[~is_left.clone()] = selection.keep[0]
    with torch.no_grad():
        hidden = stock.get_decoder()(**cut_inputs(language_inputs(stock, inputs), is_left.nonzero()[:, 0]))[0]
    assert stock.lm_head(hidden[0, -1]).argmax() == said[0]


@pytest.mark.parametrize("name", ["qwen2_vl"])
def test_a_folder_of_ours_loads_with_the_family_s_processor(name: str, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(family_folder(name, tmp_path))
    assert type(processor).__name__ == processor_parts(name).processor[0]
