"""What happens to a choice: two forms with the same numbers, and samples that do not notice their batch."""

from typing import Any

import pytest
import torch

from adavtp import AdaVTPConfig, AdaVTPForConditionalGeneration, Selection
from adavtp.modeling.prompt import Prompt
from tiny_models import (
    BOS_TOKEN_ID,
    GATE_IDS,
    GATES,
    IMAGE_TOKEN_ID,
    NUM_PATCHES,
    alone,
    embedded,
    padded_on_the_right,
    prepared_inputs,
    targets,
    tiny_batch,
    tiny_model,
)

VARIANTS = {
    "clip": {"vision": "clip"},
    "clip with CLS": {"vision": "clip", "vision_feature_select_strategy": "full"},
    "dinov2 with CLS": {"vision": "dinov2", "vision_feature_select_strategy": "full"},
    "siglip": {"vision": "siglip"},
    "mutual": {"vision": "clip", "budget_attention": "mutual"},
    "post": {"vision": "clip", "budget_fusion": "post"},
}
IMAGES = [1, 2, 0, 1]
BUDGETS = [0.4, 0.7, 0.5, 0.0]


def kept_columns(config: AdaVTPConfig, batch: dict[str, torch.Tensor], selection: Selection) -> list[list[int]]:
    """Columns of `input_ids` that stay in each row: text, CLS, and the placeholders of kept patches."""
    image, rows = 0, []
    for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
        columns = [i for i, token in enumerate(ids) if token != IMAGE_TOKEN_ID and mask[i]]
        placeholders = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN_ID]
        while placeholders:
            own = placeholders[: config.num_image_tokens]
            placeholders = placeholders[config.num_image_tokens :]
            if config.keep_cls:
                columns.append(own.pop(0))
            columns += [own[patch] for patch in selection.positions[image].tolist() if patch >= 0]
            image += 1
        rows.append(sorted(columns))
    return rows


@torch.no_grad()
@pytest.mark.parametrize(
    ("side", "positions", "attention"),
    [("left", "original", "eager"), ("right", "compact", "sdpa"), ("left", "compact", "sdpa")],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_and_hiding_give_the_same_logits(variant: str, side: str, positions: str, attention: str) -> None:
    model = tiny_model(**VARIANTS[variant], visual_position_ids=positions, attn_implementation=attention)
    batch = tiny_batch(model.config, IMAGES)
    if side == "right":
        batch = padded_on_the_right(batch)
    dropped = model(**batch, token_budget=BUDGETS)
    hidden = model(**batch, token_budget=BUDGETS, selection_output="mask")
    assert dropped.selection.num_keep.tolist() == [6, 11, 11, 1]
    assert torch.equal(dropped.selection.keep, hidden.selection.keep)
    assert hidden.logits.shape[1] == batch["input_ids"].shape[1]
    rows = kept_columns(model.config, batch, dropped.selection)
    assert dropped.logits.shape[1] == max(map(len, rows))
    for row, columns in enumerate(rows):
        torch.testing.assert_close(
            dropped.logits[row, -len(columns) :], hidden.logits[row, columns], atol=1e-5, rtol=0
        )


@torch.no_grad()
@pytest.mark.parametrize(
    ("positions", "selection_output"), [("original", "mask"), ("compact", "gather"), ("compact", "mask")]
)
@pytest.mark.parametrize("variant", ["clip with CLS", "siglip", "mutual", "post"])
def test_a_batch_gives_what_its_samples_give_alone(variant: str, positions: str, selection_output: str) -> None:
    model = tiny_model(**VARIANTS[variant], visual_position_ids=positions, selection_output=selection_output)
    batch = tiny_batch(model.config, IMAGES)
    batch["labels"] = targets(batch)
    for together in (batch, padded_on_the_right(batch)):
        output = model(**together, token_budget=BUDGETS)
        losses = []
        for row, budget in enumerate(BUDGETS):
            own = model(**alone(batch, row, IMAGES), token_budget=budget)
            losses.append(own.loss)
            length = own.logits.shape[1]
            if selection_output == "gather" or together is batch:
                ours = output.logits[row, -length:]
            else:
                ours = output.logits[row, :length]
            if selection_output == "mask" and IMAGES[row]:
                # What stands at a hidden column is seen by nobody.
                columns = kept_columns(model.config, alone(batch, row, IMAGES), own.selection)[0]
                torch.testing.assert_close(ours[columns], own.logits[0, columns], atol=1e-5, rtol=0)
            else:
                torch.testing.assert_close(ours, own.logits[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(output.loss, torch.stack(losses).mean(), atol=1e-5, rtol=0)


LABELS = {
    "an answer at the end": lambda ids: torch.arange(ids.shape[1]) >= ids.shape[1] - 3,
    "all text": lambda ids: (ids != IMAGE_TOKEN_ID) & (ids != 0),
    "all text but BOS": lambda ids: (ids != IMAGE_TOKEN_ID) & (ids > BOS_TOKEN_ID),
}


def labelled(batch: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    ids = batch["input_ids"]
    return batch | {"labels": ids.masked_fill(~LABELS[kind](ids), -100)}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(("variant", "positions"), [("clip", "compact"), ("clip with CLS", "original")])
def test_dropping_and_hiding_train_alike(variant: str, positions: str, kind: str) -> None:
    gradients, losses = [], []
    for selection_output in ("gather", "mask"):
        fields = VARIANTS[variant] | {"visual_position_ids": positions, "gradient_gates": "features"}
        model = tiny_model(**fields).train()
        batch = labelled(tiny_batch(model.config, IMAGES), kind)
        torch.manual_seed(0)
        loss = model(**batch, token_budget=BUDGETS, selection_output=selection_output).loss
        loss.backward()
        losses.append(loss)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradient, gradients[1][name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(
    ("images", "budget"), [(IMAGES, 1.0), (IMAGES, BUDGETS), ([0] * 4, BUDGETS)], ids=["all", "ragged", "text"]
)
@pytest.mark.parametrize("gates", GATES, ids=GATE_IDS)
def test_the_side_of_padding_does_not_change_the_loss(
    gates: dict[str, str], images: list[int], budget: Any, kind: str
) -> None:
    model = tiny_model(**gates).train()
    batch = labelled(tiny_batch(model.config, images), kind)
    losses = []
    for padded in (batch, padded_on_the_right(batch)):
        torch.manual_seed(0)
        losses.append(model(**padded, token_budget=budget).loss)
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("budget", [1.0, BUDGETS], ids=["all", "ragged"])
@pytest.mark.parametrize("selection_output", ["gather", "mask"])
def test_no_text_loses_its_label_and_each_is_predicted_from_the_kept_token_before_it(
    selection_output: str, budget: Any, kind: str
) -> None:
    model = tiny_model(selection_output=selection_output)
    on_the_left = labelled(tiny_batch(model.config, IMAGES), kind)
    for batch in (on_the_left, padded_on_the_right(on_the_left)):
        output = model(**batch, token_budget=budget)
        total, count = 0.0, 0
        for row, columns in enumerate(kept_columns(model.config, batch, output.selection)):
            logits = output.logits[row, -len(columns) :]
            if selection_output == "mask" or (budget == 1.0 and logits.shape[1] != len(columns)):
                logits = output.logits[row, columns]
            wanted = batch["labels"][row, columns][1:]
            # The first token of a prompt has nothing before it that could predict it.
            assert output.labels[row, output.labels[row] != -100].tolist() == wanted[wanted != -100].tolist()
            total += torch.nn.functional.cross_entropy(logits[:-1], wanted, reduction="sum")
            count += (wanted != -100).sum()
        torch.testing.assert_close(output.loss, total / count, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("gates", GATES, ids=GATE_IDS)
def test_an_image_may_begin_the_prompt(gates: dict[str, str], attention: str) -> None:
    """In the hiding form the rows before the first kept patch then see nothing at all."""
    torch.manual_seed(0)
    model = tiny_model(attn_implementation=attention, **gates).train()
    batch = {name: value[:, 2:] for name, value in tiny_batch(model.config, [1, 1], lengths=[6, 6]).items()}
    batch["pixel_values"] = tiny_batch(model.config, [1, 1])["pixel_values"]
    assert (batch["input_ids"][:, 0] == IMAGE_TOKEN_ID).all()
    output = model(**batch, labels=targets(batch), token_budget=[0.0, 0.3])
    output.loss.backward()
    assert output.loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def packed_questions(
    model: AdaVTPForConditionalGeneration, num_padding: int
) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Three questions about one image, as one sequence with a block-diagonal mask, and each alone."""
    image = tiny_batch(model.config, [1])["pixel_values"]
    head = [BOS_TOKEN_ID, 9] + [IMAGE_TOKEN_ID] * NUM_PATCHES + [11]
    questions = [[20, 21, 22], [30, 31, 32, 33, 34], [40, 41]]
    ids, positions, block, labels = list(head), list(range(len(head))), [0] * len(head), [-100] * len(head)
    separate = []
    for number, question in enumerate(questions, start=1):
        ids, block = ids + question, block + [number] * len(question)
        positions += range(len(head), len(head) + len(question))
        # The answer is all of the block, so that a question-aware model chooses for the head alone.
        labels += question
        separate.append(
            {
                "input_ids": torch.tensor([head + question]),
                "labels": torch.tensor([[-100] * len(head) + question]),
                "pixel_values": image,
            }
        )
    ids, positions = ids + [0] * num_padding, positions + [0] * num_padding
    labels, block = labels + [-100] * num_padding, torch.tensor(block + [-1] * num_padding)
    sees = (block[None] == 0) | (block[None] == block[:, None])
    sees = sees & (block >= 0)[None] & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    packed = {
        "input_ids": torch.tensor([ids]),
        "labels": torch.tensor([labels]),
        "position_ids": torch.tensor([positions]),
        "attention_mask": (sees | torch.eye(len(ids), dtype=torch.bool))[None, None],
        "pixel_values": image,
    }
    return packed, separate


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("selection_output", ["gather", "mask"])
@pytest.mark.parametrize(("text", "positions"), [("llama", "original"), ("qwen3", "compact")])
def test_packed_questions_give_what_each_gives_alone(
    text: str, positions: str, selection_output: str, attention: str
) -> None:
    model = tiny_model(
        text=text,
        visual_position_ids=positions,
        selection_output=selection_output,
        attn_implementation=attention,
    )
    packed, separate = packed_questions(model, num_padding=4)
    for budget in (1.0, 0.4):
        assert_packed(model, packed, separate, budget)


def assert_packed(
    model: AdaVTPForConditionalGeneration,
    packed: dict[str, torch.Tensor],
    separate: list[dict[str, torch.Tensor]],
    budget: float,
) -> None:
    """Every question's logits and labels are those that it has alone."""
    output = model(**packed, token_budget=budget)
    num_columns = output.logits.shape[1] - 4
    end = num_columns - sum(question["input_ids"].shape[1] - 19 for question in separate)
    for question in separate:
        own = model(**question, token_budget=budget)
        assert torch.equal(own.selection.keep, output.selection.keep)
        length = question["input_ids"].shape[1] - 19
        torch.testing.assert_close(output.logits[:, end : end + length], own.logits[:, -length:], atol=1e-5, rtol=0)
        assert output.labels[0, end : end + length].tolist() == own.labels[0, -length:].tolist()
        end += length


@torch.no_grad()
def test_packed_questions_of_a_batch_do_not_notice_each_other() -> None:
    model = tiny_model()
    packed, _ = packed_questions(model, num_padding=0)
    batch = {name: torch.cat([value, value]) for name, value in packed.items()}
    batch["pixel_values"] = torch.cat([packed["pixel_values"], -packed["pixel_values"]])
    output = model(**batch, token_budget=[0.4, 0.8])
    own = model(**packed, token_budget=0.4)
    torch.testing.assert_close(output.logits[:1, -own.logits.shape[1] :], own.logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_block_diagonal_mask_works_for_text_alone_too(attention: str) -> None:
    model = tiny_model(attn_implementation=attention)
    blocks = [[1, 20, 21], [1, 30, 31, 32]]
    block = torch.tensor([0] * 3 + [1] * 4)
    packed = model(
        input_ids=torch.tensor([blocks[0] + blocks[1]]),
        position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
        attention_mask=((block[None] == block[:, None]) & torch.ones(7, 7, dtype=torch.bool).tril())[None, None],
    ).logits[0]
    separate = torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in blocks])
    torch.testing.assert_close(packed, separate, atol=1e-5, rtol=0)


def test_dropped_patches_never_reach_the_decoder() -> None:
    model = tiny_model(budget_fusion="post")
    batch = tiny_batch(model.config, [1])
    patches = []
    handle = model.model.multi_modal_projector.register_forward_hook(lambda _, args, __: patches.append(args[0]))
    with torch.no_grad():
        selection = model(**batch, token_budget=0.4).selection
        hidden = prepared_inputs(model, **batch, token_budget=0.4, selection_output="mask").prompt
    handle.remove()
    assert patches[0].shape == (1, 6, 32)
    assert (patches[1][0, ~selection.keep[0]] == 0).all()
    assert hidden.attention_mask[0, 2 : 2 + NUM_PATCHES].tolist() == selection.keep[0].long().tolist()


def test_a_selection_gathers_in_ascending_order_and_marks_ragged_rows() -> None:
    keep = torch.tensor([[False, True, False, True], [True, False, False, False]])
    selection = Selection.from_keep(keep)
    assert selection.positions.tolist() == [[1, 3], [0, -1]]
    assert selection.num_keep.tolist() == [2, 1]
    features = torch.arange(1.0, 9.0).view(2, 4, 1)
    assert selection.gather(features)[..., 0].tolist() == [[2.0, 4.0], [5.0, 0.0]]
    assert selection.mask(features)[..., 0].tolist() == [[0.0, 2.0, 0.0, 4.0], [5.0, 0.0, 0.0, 0.0]]


def test_feature_gates_leave_features_as_they_are_and_ask_what_the_mean_feature_would_do() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 4, 3, generator=generator)
    keep = torch.tensor([[False, True, False, True], [True, False, False, False]])
    for output in ("gather", "mask"):
        gates = keep.float().requires_grad_()
        selection, plain = Selection.from_keep(keep, gates), Selection.from_keep(keep)
        result = getattr(selection, output)(features)
        assert torch.equal(result, getattr(plain, output)(features))
        upstream = torch.randn(result.shape, generator=generator)
        (result * upstream).sum().backward()
        for image in range(2):
            mean = sum(features[image]) / 4
            kept = keep[image].nonzero().flatten().tolist()
            for patch in range(4):
                if patch not in kept:
                    assert gates.grad[image, patch] == 0
                    continue
                place = patch if output == "mask" else kept.index(patch)
                expected = (features[image, patch] - mean).dot(upstream[image, place])
                torch.testing.assert_close(gates.grad[image, patch], expected, atol=1e-5, rtol=0)


def test_attention_gates_weigh_columns_and_spare_each_row_its_own() -> None:
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    gates = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    prompt = Prompt(
        input_ids=torch.zeros(1, 5, dtype=torch.long),
        attention_mask=torch.tensor([[0, 1, 1, 1, 1]]),
        position_ids=torch.arange(5)[None],
        labels=torch.tensor([[-100, -100, -100, -100, 14]]),
    )
    gated = prompt.gating(gates[None], torch.float32)
    assert gated.labels.tolist() == [[-100, -100, -100, 14, -100]]
    weights = (logits + gated.attention_mask[0, 0]).softmax(dim=-1)
    for row in range(1, 5):
        shares = {
            column: float(logits[row, column].exp() * (1.0 if column == row else gates[column] + 1e-3))
            for column in range(1, row + 1)
        }
        expected = [shares.get(column, 0.0) / sum(shares.values()) for column in range(5)]
        assert weights[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("variant", "positions"), [("clip with CLS", "original"), ("post", "compact")])
def test_attention_gates_train_on_nearly_the_numbers_of_dropping(variant: str, positions: str) -> None:
    losses = []
    for gates in ("attention", "features"):
        model = tiny_model(**VARIANTS[variant], visual_position_ids=positions, gradient_gates=gates).train()
        batch = labelled(tiny_batch(model.config, IMAGES), "all text")
        torch.manual_seed(0)
        losses.append(model(**batch, token_budget=BUDGETS).loss.item())
    # A dropped column keeps a thousandth of its weight.
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


def test_attention_gates_say_what_a_dropped_token_would_have_been_worth() -> None:
    """The gate's derivative is the slope of the loss as the token is let in, for kept and dropped tokens alike."""
    model = tiny_model().double()
    batch = tiny_batch(model.config, [1])
    labels = targets(batch)
    placeholder = batch["input_ids"] == IMAGE_TOKEN_ID
    with torch.no_grad():
        prepared = prepared_inputs(model, **batch, labels=labels)
        inputs_embeds = embedded(model, prepared)
    keep = (torch.arange(NUM_PATCHES) % 3 == 0).double()

    def loss_of(gates: torch.Tensor) -> torch.Tensor:
        columns = torch.ones(placeholder.shape, dtype=torch.float64).masked_scatter(placeholder, gates)
        gated = prepared.prompt.gating(columns, torch.float64)
        hidden = model.model.language_model(
            inputs_embeds=inputs_embeds, attention_mask=gated.attention_mask, position_ids=gated.position_ids
        ).last_hidden_state
        return torch.nn.functional.cross_entropy(model.lm_head(hidden)[0, :-1], labels[0, 1:])

    gates = keep.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(gates), gates)
    assert (gradient != 0).all()
    with torch.no_grad():
        for patch in range(NUM_PATCHES):
            step = torch.zeros(NUM_PATCHES, dtype=torch.float64)
            step[patch] = 1e-4
            slope = (loss_of(keep + step) - loss_of(keep - step)) / 2e-4
            # Norms and softmax compute in float32 whatever the dtype of the model.
            torch.testing.assert_close(gradient[patch], slope, atol=5e-3, rtol=1e-2)


def test_everything_is_a_selection_too() -> None:
    selection = Selection.everything(2, 3, torch.device("cpu"))
    expected = Selection.from_keep(torch.ones(2, 3, dtype=torch.bool))
    assert torch.equal(selection.keep, expected.keep)
    assert torch.equal(selection.positions, expected.positions)


def test_dropping_columns_pads_the_shorter_rows_on_the_left() -> None:
    prompt = Prompt(
        input_ids=torch.arange(1, 9).view(2, 4),
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        position_ids=torch.tensor([[0, 1, 2, 0], [0, 1, 2, 3]]),
        labels=torch.tensor([[10, 11, 12, -100], [13, 14, 15, 16]]),
    )
    prompt.position_ids = torch.stack([prompt.position_ids, 10 * prompt.position_ids])
    kept = prompt.without(torch.tensor([[True, False, True, False], [True, True, False, True]]), pad_token_id=9)
    assert kept.attention_mask.tolist() == [[0, 1, 1], [1, 1, 1]]
    assert kept.position_ids.tolist() == [[[0, 0, 2], [0, 1, 3]], [[0, 0, 20], [0, 10, 30]]]
    assert kept.labels.tolist() == [[-100, 10, 12], [13, 14, 16]]
    assert kept.input_ids.tolist() == [[9, 1, 3], [5, 6, 8]]


def test_a_label_behind_hidden_columns_is_predicted_by_the_column_before_them() -> None:
    prompt = Prompt(
        input_ids=torch.zeros(2, 6, dtype=torch.long),
        attention_mask=torch.ones(2, 6, dtype=torch.int64),
        position_ids=torch.arange(6).expand(2, -1),
        labels=torch.tensor([[-100, -100, -100, -100, 14, 15], [-100, -100, 22, -100, -100, 25]]),
    )
    dropped = torch.tensor([[False, False, True, True, False, False], [False, True, False, True, True, False]])
    hidden = prompt.hiding(dropped)
    assert hidden.labels.tolist() == [[-100, -100, 14, -100, -100, 15], [-100, 22, -100, 25, -100, -100]]
    assert hidden.attention_mask.tolist() == [[1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 1]]
