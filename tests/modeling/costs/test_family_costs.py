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
from adavtp.modeling.costs.presets import preset_config
from adavtp.modeling.costs.weightless import family_prompt, looks_of, meta_model
from adavtp.modeling.parts import parts_of_names
from counted_flops import ON_A_CPU
from tiny_families import FAMILIES, budgeted, with_budget

# Height and width in pixels: of tokens, or of tiles.
SIZES = dict.fromkeys(FAMILIES, (24, 32)) | dict.fromkeys(("internvl", "idefics3", "smolvlm"), (48, 96))
SIZES |= {"qwen3_vl_moe": (24, 32), "llava_next": (48, 40), "llava_onevision": (48, 40), "minicpmv4_6": (32, 48)}
TEXT = 9


def what_torch_counts(
    name: str, num_images: int = 1, text_tokens: int = TEXT, **asked: object
) -> tuple[dict[str, float], dict[str, float]]:
    """Of a prompt's forward, part by part, and of the step behind it; with real weights, which choose differently."""
    model = with_budget(name)
    inputs = family_prompt(model, looks_of(model, [SIZES[name]] * num_images) if num_images else None, text_tokens)
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
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_costs_what_torch_counts(name: str, token_budget: float) -> None:
    seen, step = what_torch_counts(name, token_budget=token_budget, reducer="adaptive")
    costs = ModelCosts.of(with_budget(name).config, SIZES[name])
    counted = costs.of_prompt(TEXT, token_budget=token_budget, reducer="adaptive")
    assert counted.vision == pytest.approx(seen["vision"], rel=1e-2)
    assert counted.projector == pytest.approx(seen["projector"], rel=1e-2)
    assert counted.prefill == pytest.approx(seen["decoder"], rel=1e-2)
    assert counted.total == pytest.approx(seen["total"], rel=1e-2)
    assert counted.decode_per_token == pytest.approx(step["step"], rel=1e-2)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma4"])
def test_long_prompts_and_what_follows_them_cost_what_torch_counts(name: str) -> None:
    seen, step = what_torch_counts(name, 0, 150)
    counted = ModelCosts.of(with_budget(name).config, SIZES[name]).of_prompt(150, num_images=0)
    assert counted.total == pytest.approx(seen["total"], rel=1e-3)
    assert counted.decode_per_token == pytest.approx(step["step"], rel=1e-3)


def test_of_a_mixture_the_experts_that_run_are_counted() -> None:
    seen, step = what_torch_counts("qwen3_vl_moe", token_budget=0.5)
    counted = ModelCosts.of(with_budget("qwen3_vl_moe").config, (24, 32)).of_prompt(TEXT, token_budget=0.5)
    assert counted.total == pytest.approx(seen["total"], rel=1e-2)
    assert counted.decode_per_token == pytest.approx(step["step"], rel=1e-2)


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


@pytest.mark.parametrize("name", ["llava_next", "paligemma"])
def test_what_merges_inside_a_family_s_tower_costs_what_torch_counts(name: str) -> None:
    asked = {"token_budget": 0.5, "reducer": "tome"}
    seen, _ = what_torch_counts(name, **asked)
    counted = ModelCosts.of(with_budget(name).config, SIZES[name]).of_prompt(TEXT, **asked)
    assert counted.vision == pytest.approx(seen["vision"], rel=1e-2)
    assert counted.total == pytest.approx(seen["total"], rel=1e-2)
    assert counted.vision < ModelCosts.of(with_budget(name).config, SIZES[name]).of_prompt(TEXT).vision


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
    tiny = ("--gpus", "1", "--longest", "40", "--text-tokens", "9", "--micro-batch", "1")
    assert "height and width in pixels" in said("plan", "--checkpoint", str(tmp_path), *tiny)
    planned = said("plan", "--checkpoint", str(tmp_path), "--image-size", "24x32", *tiny, "--json")
    assert json.loads(planned)["memory"]["decoder"] > 0


def test_well_known_shapes_of_families_have_the_sizes_that_are_known_of_them() -> None:
    known = [("qwen2.5-vl-7b", 8.29, (448, 448), [256]), ("llava-onevision-7b", 8.03, (768, 768), [729] * 5)]
    for name, billions, size, tokens in known:
        model = meta_model(preset_config(name))
        part_of = parts_of_names(model)
        own = [weight.numel() for key, weight in model.named_parameters() if part_of(key) != "controller"]
        assert sum(own) / 1e9 == pytest.approx(billions, abs=5e-3)
        assert list(ModelCosts.of(model.config, size).visual_tokens("full").sizes) == tokens
