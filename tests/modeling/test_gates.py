"""The gradient of the choice: gates inside attention, and gates on features."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from adavtp import AdaVTPForConditionalGeneration
from adavtp.modeling.budget.selection import Selection
from adavtp.modeling.prompt import Prompt
from tiny_families import batch_of, ragged_prompts, with_budget
from tiny_models import (
    GATE_IDS,
    GATES,
    NUM_PATCHES,
    embedded,
    prepared_inputs,
    targets,
    tiny_batch,
    tiny_model,
)

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


# Gates between 0 and 1

SOFT = {"controller_estimator": "differentiable_top_k"}


@torch.no_grad()
@pytest.mark.parametrize("selection_output", ["gather", "mask"])
def test_soft_gates_multiply_what_the_decoder_gets_and_nothing_leaves(selection_output: str) -> None:
    model = tiny_model(**SOFT, gradient_gates="features", selection_output=selection_output)
    batch = tiny_batch(model.config, (1, 2))
    labels = targets(batch)
    prepared = prepared_inputs(model, **batch, token_budget=1.0)
    output = model.train()(**batch, labels=labels, token_budget=[0.3, 0.7])
    gates = output.selection.gates
    assert (gates > 0).all() and (gates < 1).all()
    torch.testing.assert_close(gates.sum(dim=-1), torch.tensor([4.0, 11.0, 11.0]), atol=1e-4, rtol=0)
    features = prepared.visual.features * gates.flatten()[:, None]
    weighed = replace(prepared, visual=replace(prepared.visual, features=features))
    embeds, mask = embedded(model, weighed), batch["attention_mask"]
    states = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0)
    ).last_hidden_state
    is_real = mask.bool()
    torch.testing.assert_close(output.logits[is_real], model.lm_head(states)[is_real], atol=1e-4, rtol=1e-4)
    assert torch.equal(output.labels, labels)


@torch.no_grad()
def test_towards_temperature_0_soft_gates_in_attention_see_what_evaluation_sees() -> None:
    model = tiny_model(**SOFT, gradient_gates="attention", controller_temperature=1e-6)
    batch = tiny_batch(model.config)
    labels = targets(batch)
    expected = model(**batch, labels=labels, token_budget=[0.3, 0.7])
    output = model.train()(**batch, labels=labels, token_budget=[0.3, 0.7])
    assert torch.equal(output.selection.keep, expected.selection.keep)
    # A dropped token keeps a thousandth of its weight.
    torch.testing.assert_close(output.loss, expected.loss, atol=2e-2, rtol=0)


@pytest.mark.parametrize("gates", GATES, ids=GATE_IDS)
def test_a_soft_choice_draws_nothing_keeps_the_best_and_trains_every_part(gates: dict[str, str]) -> None:
    model = tiny_model(**SOFT, **gates)
    batch = tiny_batch(model.config, (1, 2))
    best = model.select_tokens(**batch, token_budget=[0.4, 0.8]).keep
    asked = {"labels": targets(batch), "token_budget": [0.4, 0.8]}
    outputs = [model.train()(**batch, **asked) for _ in range(2)]
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert torch.equal(outputs[0].selection.keep, best)
    outputs[0].loss.backward()
    for part in ("controller", "budget_token", "multi_modal_projector", "language_model"):
        gradients = [parameter.grad for parameter in getattr(model.model, part).parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients), part
        assert any(gradient.abs().max() > 0 for gradient in gradients), part


@torch.no_grad()
def test_the_loss_of_a_soft_choice_counts_more_the_longer_it_trains() -> None:
    model = tiny_model(**SOFT).train()
    batch = tiny_batch(model.config, (1, 2))
    losses = []
    for progress in (0.0, 0.5, 1.0):
        model.model.controller.training_progress = progress
        output = model(**batch, labels=targets(batch), token_budget=0.4)
        gates, keep = output.selection.gates, output.selection.keep
        entropy = nn.functional.binary_cross_entropy(gates, keep.float())
        torch.testing.assert_close(output.selection.loss, (0.1 + 1.9 * progress) * entropy)
        losses.append(output.loss - output.selection.loss)
    # What else the loss is, is the same.
    torch.testing.assert_close(torch.stack(losses), losses[0].expand(3))


@pytest.mark.parametrize("gates", ["attention", "features"])
def test_a_soft_choice_belongs_at_the_end_of_a_stack(gates: str) -> None:
    model = tiny_model(**SOFT, gradient_gates=gates).train()
    batch = tiny_batch(model.config)
    labels = targets(batch)
    for follower in ("divprune", "fastv"):
        with pytest.raises(ValueError, match=f"`controller_estimator` is 'differentiable_top_k' and '{follower}'"):
            model(**batch, labels=labels, token_budget=0.6, reducer=["adaptive", follower])
    output = model(**batch, labels=labels, token_budget=0.6, reducer=["tome", "adaptive"])
    assert output.loss.isfinite() and output.selection.is_soft


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl"])
def test_soft_gates_multiply_the_tokens_of_other_families(name: str) -> None:
    # Units of several sizes, in one call.
    model, prompts = with_budget(name, **SOFT), ragged_prompts(name)[:2]
    batch = batch_of(name, prompts)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    fed = []
    model.get_decoder().register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        model(**batch, token_budget=1.0)
    output = model.train()(**batch, labels=labels, token_budget=0.4)
    selection = output.selection
    gates, num_keep = selection.gates, selection.keep.sum(dim=-1).to(selection.gates)
    torch.testing.assert_close(gates.sum(dim=-1), num_keep, atol=1e-4, rtol=0)
    assert (gates[~selection.is_token] == 0).all()
    whole, weighed = (kwargs["inputs_embeds"].detach() for kwargs in fed)
    changed = (whole != weighed).any(dim=-1)
    factor = (weighed[changed] / whole[changed]).float()
    # Tokens are counted unit by unit, which need not be the order of columns.
    expected = gates[selection.is_token].detach().float().sort().values
    for channel in factor.unbind(dim=-1):
        torch.testing.assert_close(channel.sort().values, expected, atol=1e-4, rtol=1e-4)
    output.loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "controller." in name]
    assert gradients and any(gradient.abs().max() > 0 for gradient in gradients)
