"""What a family's model costs is counted without a weight, and is what torch counts while it runs."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from adavtp.command_line import app
from adavtp.modeling.budget.selection import Selection
from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.costs.weightless import family_prompt, looks_of
from adavtp.modeling.parts import parts_of_names
from counted_flops import ON_A_CPU
from tiny_families import FAMILIES, STATEFUL, budgeted, with_budget

# Height and width in pixels: of tokens, or of tiles.
SIZES = dict.fromkeys(FAMILIES, (24, 32)) | dict.fromkeys(("internvl", "idefics3", "smolvlm"), (48, 96))
SIZES |= {"llava_next": (48, 40), "llava_onevision": (48, 40)}
TEXT = 9
NOT_COUNTED = (*STATEFUL, "gemma4")


def what_torch_counts(name: str, num_images: int = 1, **asked: object) -> tuple[dict[str, float], dict[str, float]]:
    """Of a prompt's forward, part by part, and of the step behind it; with real weights, which choose differently."""
    model = budgeted(name)
    inputs = family_prompt(model, looks_of(model, SIZES[name], num_images) if num_images else None, TEXT)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        outputs = model(**inputs, **asked, logits_to_keep=1, use_cache=True)
    counts = {key.split(".", 1)[-1]: sum(of.values()) for key, of in counter.get_flop_counts().items()}
    part_of, parts, own = parts_of_names(model), Counter(), {}
    # The family's encoder is asked before its model runs, so that this holds some of its modules and not others.
    names = {key for key, _ in model.named_modules()} & counts.keys() - {"model"}
    # What a module spends itself, without those inside it.
    for key in sorted(names, key=lambda key: -key.count(".")):
        own[key] = counts[key] - sum(spent for inside, spent in own.items() if inside.startswith(f"{key}."))
        parts[part_of(key)] += own[key]
    total = counts["Global"]
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        model(input_ids=torch.tensor([[2]]), past_key_values=outputs.past_key_values)
    return {"total": total, **parts}, {"step": float(counter.get_total_flops())}


@pytest.mark.parametrize("token_budget", [1.0, 0.5])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_COUNTED])
def test_a_prompt_costs_what_torch_counts(name: str, token_budget: float) -> None:
    seen, step = what_torch_counts(name, token_budget=token_budget, reducer="adaptive")
    costs = ModelCosts.of(with_budget(name).config, SIZES[name])
    counted = costs.of_prompt(TEXT, token_budget=token_budget, reducer="adaptive")
    assert counted.vision == pytest.approx(seen["vision"], rel=1e-2)
    assert counted.projector == pytest.approx(seen["projector"], rel=1e-2)
    assert counted.prefill == pytest.approx(seen["decoder"], rel=1e-2)
    assert counted.total == pytest.approx(seen["total"], rel=1e-2)
    assert counted.decode_per_token == pytest.approx(step["step"], rel=1e-2)


@pytest.mark.parametrize("name", NOT_COUNTED)
def test_of_a_decoder_that_is_no_sum_of_its_layers_no_cost_is_made_up(name: str) -> None:
    with pytest.raises(ValueError, match=f"Costs of a '{name}' model are not counted: its l"):
        ModelCosts.of(with_budget(name).config, SIZES[name])


@pytest.mark.parametrize(("name", "num_images"), [("llava_next", 2), ("qwen2_5_vl", 2), ("mistral3", 0)])
def test_prompts_of_several_images_and_of_none_cost_what_torch_counts(name: str, num_images: int) -> None:
    asked = {"token_budget": 0.5, "reducer": "divprune"}
    seen, _ = what_torch_counts(name, num_images, **asked)
    counted = ModelCosts.of(with_budget(name).config, SIZES[name]).of_prompt(TEXT, num_images=num_images, **asked)
    assert counted.total == pytest.approx(seen["total"], rel=1e-2)


def test_a_selection_of_an_image_of_another_size_is_not_counted_as_if_it_were_of_this_one() -> None:
    costs, selection = ModelCosts.of(with_budget("qwen2_5_vl").config, (16, 16)), Selection.everything(1, 64, "cpu")
    with pytest.raises(ValueError, match=r"`selection` is of \[64\] visual tokens, .* have \[4\]; pass"):
        costs.of_selection(selection, TEXT, token_budget=0.5, reducer="divprune")


def test_what_leaves_inside_a_family_s_decoder_costs_what_torch_counts() -> None:
    for name in ("qwen2_5_vl", "llava_next"):
        asked = {"token_budget": 0.75, "reducer": {"name": "fastv", "layer": 2}}
        seen, _ = what_torch_counts(name, **asked)
        counted = ModelCosts.of(with_budget(name).config, SIZES[name]).of_prompt(TEXT, **asked)
        assert counted.total == pytest.approx(seen["total"], rel=1e-2)


def test_the_command_counts_a_family_s_folder_and_says_what_it_has_to_be_told(tmp_path: Path) -> None:
    budgeted("qwen2_5_vl").config.save_pretrained(tmp_path)
    asked = ["--checkpoint", str(tmp_path), "--text-tokens", str(TEXT), "--budget", "0.5"]

    def said(*arguments: str) -> str:
        return " ".join(CliRunner().invoke(app, list(arguments), env={"COLUMNS": "300"}).output.split())

    counted = json.loads(said("flops", *asked, "--image-size", "24x32", "--json"))
    expected = ModelCosts.of(with_budget("qwen2_5_vl").config, (24, 32)).of_prompt(TEXT, token_budget=0.5)
    assert counted["total"] == expected.total and counted["visual_tokens"] == 12
    assert "height and width in pixels" in said("flops", *asked)
    assert "`image_size` is '24'" in said("flops", *asked, "--image-size", "24")
    assert "training is planned for LLaVA's alone" in said("plan", "--checkpoint", str(tmp_path))
