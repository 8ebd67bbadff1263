"""Training on every family: loss and gradients are those of the stock class on prompts pruned by hand."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from pruned_by_hand import HandPruned, kept_of
from tiny_families import (
    FAMILIES,
    IN_DECODER,
    STATEFUL,
    Batch,
    Prompt,
    batch_of,
    budgeted,
    close_to,
    ragged_prompts,
    stock_model,
    with_budget,
)

BUDGETS = [0.7, 0.4, 1.0]
HOW = {"reducer": "divprune"}

every_family = pytest.mark.parametrize("name", FAMILIES)
both_forms = pytest.mark.parametrize("form", ["gather", "mask"])


def with_targets(name: str, prompts: list[Prompt], side: str) -> Batch:
    """A batch whose every column of text is a target, the first ones and those beside images too."""
    batch = batch_of(name, prompts, side)
    is_text = (batch["input_ids"] < 100) & (batch["attention_mask"] == 1)
    return batch | {"labels": batch["input_ids"].masked_fill(~is_text, -100)}


def loss_by_hand(name: str, prompts: list[Prompt]) -> torch.Tensor:
    """Mean over all targets but the first column's, each predicted by the column before it that is left."""
    losses = []
    for prompt, budget in zip(prompts, BUDGETS, strict=True):
        reference = HandPruned(name, prompt, kept_of(name, prompt, token_budget=budget, **HOW))
        logits = reference.head(reference.hidden()).float()
        ids = torch.tensor(prompt.ids)[reference.keep]
        is_target = ids[1:] < 100
        losses.append(cross_entropy(logits[:-1][is_target], ids[1:][is_target], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize("side", ["left", "right"])
@both_forms
@every_family
def test_the_loss_and_every_gradient_are_those_of_prompts_pruned_by_hand(name: str, form: str, side: str) -> None:
    # No test changes the stock model: its gradients are taken, and left nowhere.
    prompts, stock = ragged_prompts(name), stock_model(name)
    expected = loss_by_hand(name, prompts)
    parameters = dict(stock.named_parameters())
    found = torch.autograd.grad(expected, list(parameters.values()), allow_unused=True)
    gradients = dict(zip(parameters, found, strict=True))
    model = with_budget(name)
    call = {**with_targets(name, prompts, side), "token_budget": BUDGETS, "selection_output": form, **HOW}
    if form == "mask" and name in STATEFUL:
        with pytest.raises(ValueError, match="`selection_output` is 'mask'.*linear attention"):
            model(**call)
        return
    outputs = model(**call)
    torch.testing.assert_close(outputs.loss, expected, **close_to(name))
    outputs.loss.backward()
    own = dict(model.named_parameters())
    for key, gradient in gradients.items():
        if gradient is None:
            assert own[key].grad is None or not own[key].grad.any(), key
        else:
            assert torch.allclose(own[key].grad, gradient, **close_to(name)), key
    visual = [key for key in gradients if "lm_head" not in key and "language_model" not in key]
    assert any(gradients[key] is not None and gradients[key].any() for key in visual)


@torch.no_grad()
@every_family
def test_with_the_last_logits_alone_the_loss_is_that_of_the_last_labels(name: str) -> None:
    model, prompts = budgeted(name), ragged_prompts(name)
    calls = [(prompts, "divprune"), (prompts[2:], "divprune"), *[(prompts, "fastv")] * (name in IN_DECODER)]
    for shown, reducer in calls:
        call = {**with_targets(name, shown, "left"), "token_budget": 0.75, "reducer": reducer}
        whole, last = model(**call), model(**call, logits_to_keep=4)
        if name == "minicpmv4_6":
            # Its stock class makes all logits whatever it is asked for.
            assert torch.equal(last.logits, whole.logits) and torch.equal(last.loss, whole.loss)
            continue
        torch.testing.assert_close(last.logits, whole.logits[:, -4:])
        assert torch.equal(last.labels, whole.labels[:, -4:])
        expected = cross_entropy(whole.logits[:, -4:-1].flatten(0, 1).float(), whole.labels[:, -3:].flatten())
        torch.testing.assert_close(last.loss, expected)
