"""What a family's model costs is counted without a weight, and is what torch counts while it runs."""

from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adavtp.modeling.costs.model_costs import ModelCosts
from adavtp.modeling.costs.weightless import family_prompt, looks_of
from adavtp.modeling.parts import parts_of_names
from counted_flops import ON_A_CPU
from tiny_families import FAMILIES, budgeted, with_budget

# Height and width in pixels: of tokens, or of tiles.
SIZES = dict.fromkeys(FAMILIES, (24, 32)) | dict.fromkeys(("internvl", "idefics3", "smolvlm"), (48, 96))
SIZES |= {"llava_next": (48, 40), "llava_onevision": (48, 40)}
TEXT = 9


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
