"""The gradient of the choice: gates inside attention, and gates on features."""

import pytest
import torch

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.budget.selection import Selection
from adavtp.modeling.prompt import Prompt
from tiny_models import NUM_PATCHES, targets, tiny_batch, tiny_model

# What a gate of zero leaves of a column's weight in training.
LEAST_GATE = 1e-3


def random_prompt(gates: torch.Tensor) -> Prompt:
    length = gates.shape[-1]
    return Prompt(
        torch.zeros(1, length, dtype=torch.long), torch.ones(1, length, dtype=torch.long), torch.arange(length)[None]
    )


def test_attention_with_gates_is_dynamicvits_formula() -> None:
    torch.manual_seed(0)
    length, gates = 6, torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0, 1.0]])
    logits = torch.randn(length, length)
    weights = (logits + random_prompt(gates).gating(gates, torch.float32).attention_mask[0, 0]).softmax(dim=-1)
    for row in range(length):
        terms = [
            torch.exp(logits[row, column]) * (1.0 if column == row else gates[0, column] + LEAST_GATE)
            for column in range(row + 1)
        ]
        expected = torch.stack(terms) / sum(terms)
        torch.testing.assert_close(weights[row, : row + 1], expected)
        assert (weights[row, row + 1 :] == 0).all()


def test_a_gate_of_padding_stays_shut() -> None:
    gates = torch.ones(1, 4)
    prompt = random_prompt(gates)
    prompt.attention_mask[0, 0] = 0
    weights = prompt.gating(gates, torch.float32).attention_mask[0, 0].softmax(dim=-1)
    assert (weights[1:, 0] == 0).all()


def losses(model: AdaVTPForConditionalGeneration, gates: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.config.gradient_gates = gates
    torch.manual_seed(3)
    return model(**batch, token_budget=[0.3, 0.7]).loss


@pytest.mark.parametrize("text", ["llama", "mistral", "qwen2", "qwen3"])
def test_both_kinds_of_gates_see_what_the_shorter_sequence_sees(text: str) -> None:
    model = tiny_model(text=text).train()
    batch = tiny_batch(model.config)
    batch["labels"] = targets(batch)
    with torch.no_grad():
        in_attention, on_features = losses(model, "attention", batch), losses(model, "features", batch)
    # A dropped token keeps a thousandth of its weight, so the two differ by something of that order.
    torch.testing.assert_close(in_attention, on_features, atol=2e-2, rtol=0)


def gradient_of_gates(
    model: AdaVTPForConditionalGeneration, batch: dict[str, torch.Tensor], gates: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last token's squared logits, summed, at given gates `[1, num_patches]`, and the gradient of the gates."""
    gates = gates.clone().requires_grad_()
    selection = Selection.from_keep(gates.detach() > 0.5, gates)
    model.model.controller.forward = lambda *_: selection
    # The library computes its loss in float32, which is too coarse for a difference quotient.
    loss = model(**batch, token_budget=0.5).logits[:, -1].square().sum()
    loss.backward()
    return loss.detach(), gates.grad


def test_the_gradient_of_gates_is_the_slope_of_the_output_for_kept_and_for_dropped_tokens() -> None:
    model = tiny_model(gradient_gates="attention").train().double()
    batch = tiny_batch(model.config, images_per_sample=(1,))
    batch |= {"pixel_values": batch["pixel_values"].double(), "labels": targets(batch)}
    gates = torch.tensor([[1.0, 0.0] * (NUM_PATCHES // 2)], dtype=torch.float64)
    _, gradient = gradient_of_gates(model, batch, gates)
    # Norms compute in float32 whatever the model's dtype, so a smaller step would drown.
    step = 1e-4
    for patch in (0, 1, 6, 7):
        moved = gates.clone()
        moved[0, patch] += step
        above, _ = gradient_of_gates(model, batch, moved)
        moved[0, patch] -= 2 * step
        below, _ = gradient_of_gates(model, batch, moved)
        slope = (above - below) / (2 * step)
        torch.testing.assert_close(gradient[0, patch], slope, rtol=0.05, atol=0.05)
        assert gradient[0, patch] != 0


def test_gates_on_features_change_nothing_forward() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, NUM_PATCHES, 8, requires_grad=True)
    keep = torch.rand(2, NUM_PATCHES) < 0.5
    gates = keep.float().requires_grad_()
    selection = Selection.from_keep(keep, gates)
    assert torch.equal(selection.gated(features), features)
    weights = torch.randn_like(features)
    (selection.gated(features) * weights).sum().backward()
    towards_mean = features - features.mean(dim=1, keepdim=True)
    torch.testing.assert_close(gates.grad, (weights * towards_mean).sum(dim=-1).detach())
    torch.testing.assert_close(features.grad, weights)


def test_gates_in_attention_refuse_a_text_model_whose_window_they_would_switch_off() -> None:
    model = tiny_model(text="mistral").train()
    model.model.language_model.config.sliding_window = 5
    batch = tiny_batch(model.config)
    batch["labels"] = targets(batch)
    with pytest.raises(ValueError, match="gradient_gates.*attention.*window 5"):
        model(**batch, token_budget=0.5)
    model.config.gradient_gates = "features"
    assert model(**batch, token_budget=0.5).logits.isfinite().all()


def test_gates_in_attention_refuse_checkpointing_that_would_lose_their_gradient() -> None:
    model = tiny_model().train()
    batch = tiny_batch(model.config)
    batch["labels"] = targets(batch)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="`gradient_gates` is 'attention'.*use_reentrant=True.*'features'"):
        model(**batch, token_budget=0.5)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch, token_budget=0.5).loss.backward()
    assert all(parameter.grad.any() for parameter in model.model.controller.parameters())
