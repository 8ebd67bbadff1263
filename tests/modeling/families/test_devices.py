"""Parts of a model on several devices, as `device_map` puts them: whatever meets, meets on one."""

from typing import Any

import pytest
import torch

from pretend_devices import FIRST, SECOND, placed, placed_parts
from tiny_families import Writer, batch_of, with_budget

HALF = {"token_budget": 0.5}
# What goes from one part to another: rows, deepstack, attention, a dial's tokens, the budget in a tower and behind it.
ASKED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("qwen3_vl", HALF, {}),
    ("gemma4", HALF | {"reducer": "cls_attention"}, {}),
    ("minicpmv4_6", HALF | {"reducer": "native"}, {}),
    ("llava_next", {"token_budget": {"prompt": 20, "unit_weights": "attention"}}, {}),
    ("llava_next", HALF, {"reducers": ["dynamicvit"]}),
    ("llava_onevision", HALF, {"budget_fusion": "encoder"}),
    ("gemma3", HALF, {"budget_fusion": "encoder"}),
    ("paligemma", HALF, {"reducers": ["token_fusion"]}),
]


@pytest.mark.parametrize(("name", "asked", "fields"), ASKED, ids=str)
def test_what_a_model_says_does_not_depend_on_where_its_parts_are(
    name: str, asked: dict[str, Any], fields: dict[str, Any]
) -> None:
    batch = batch_of(name, [Writer(name).prompt(images=((2, 2),))])
    model = with_budget(name, **fields)
    with torch.no_grad():
        expected = model(**batch, **asked).logits
    tower = next(key for key, module in model.named_modules() if module is model.get_encoder(modality="image"))
    with placed_parts(model, {"": FIRST, tower: SECOND, "budget_token": SECOND, "reducers": FIRST}):
        said = model(**placed(batch, FIRST), **asked).logits
    assert said.device == FIRST
    torch.testing.assert_close(said.inner, expected)


def test_parts_that_share_no_device_would_not_be_added() -> None:
    linear = torch.nn.ModuleDict({"one": torch.nn.Linear(2, 2), "two": torch.nn.Linear(2, 2)})
    with placed_parts(linear, {"": FIRST, "two": SECOND}):
        one, two = (linear[name](torch.ones(1, 2).to(FIRST)) for name in ("one", "two"))
        assert (one.device, two.device) == (FIRST, SECOND)
        with pytest.raises(RuntimeError, match="aten.add.Tensor of tensors on"):
            one + two
        assert (one + two.to(FIRST)).device == FIRST
