"""What the model promises: LLaVA at the full budget, LLaVA on hand-pruned inputs at any other, and clear refusals."""

import copy
import logging
import math
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from random import Random
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

from adavtp import AdaVTPForConditionalGeneration
from tiny_models import (
    IMAGE_TOKEN_ID,
    NUM_PATCHES,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    VOCAB_SIZE,
    alone,
    padded_on_the_right,
    targets,
    tiny_batch,
    tiny_config,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)

NEW_MODULES = ("model.budget_token.", "model.controller.")
IMAGES = [1, 2, 0]


def stock_llava(vision: str = "clip", text: str = "llama", **fields: Any) -> LlavaForConditionalGeneration:
    """A LLaVA of transformers with random weights, without a line of ours."""
    config = LlavaConfig(
        vision_config=tiny_vision_config(vision),
        text_config=tiny_text_config(text),
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=False,
        **({"vision_feature_select_strategy": "full"} if vision == "siglip" else {}),
        **fields,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval()


def pruned_by_hand(
    stock: LlavaForConditionalGeneration,
    sample: dict[str, torch.Tensor],
    keep: list[list[int]],
    positions: str = "original",
) -> torch.Tensor:
    """
    Logits of one sample from the stock parts alone: every patch is projected, and the text model gets the kept ones.

    Args:
        sample: unpadded, a batch of one.
        keep: patches to keep of each image.
        positions: `"original"` or `"compact"`.
    """
    embeds, position, image, placeholder = [], [], 0, 0
    features = None
    if "pixel_values" in sample:
        states = stock.model.vision_tower(sample["pixel_values"], output_hidden_states=True).hidden_states[-2]
        if stock.config.vision_feature_select_strategy == "default":
            states = states[:, 1:]
        features = stock.model.multi_modal_projector(states)
    for column, token in enumerate(sample["input_ids"][0].tolist()):
        if token != IMAGE_TOKEN_ID:
            embeds.append(stock.get_input_embeddings().weight[token])
            position.append(column)
            continue
        if placeholder in keep[image]:
            embeds.append(features[image, placeholder])
            position.append(column)
        placeholder += 1
        if placeholder == NUM_PATCHES:
            image, placeholder = image + 1, 0
    if positions == "compact":
        position = list(range(len(position)))
    hidden = stock.model.language_model(
        inputs_embeds=torch.stack(embeds)[None],
        attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
        position_ids=torch.tensor([position]),
    ).last_hidden_state
    return stock.lm_head(hidden)[0]


@pytest.fixture(scope="module")
def stock_and_ours(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, Any]]:
    """Stock LLaVA, and AdaVTP loaded from the folder that stock LLaVA saved."""
    made = {}

    def make(vision: str = "clip", text: str = "llama") -> tuple[Any, Any]:
        if (vision, text) not in made:
            folder = tmp_path_factory.mktemp(f"{vision}-{text}")
            stock = stock_llava(vision, text)
            stock.save_pretrained(folder)
            ours = AdaVTPForConditionalGeneration.from_pretrained(folder).eval()
            # Which tokens it keeps is of no interest, and that it keeps some.
            ours.config.untrained_controller = False
            made[vision, text] = (stock, ours)
        return made[vision, text]

    return make


# The full budget is LLaVA


@torch.no_grad()
@pytest.mark.parametrize("text", TEXT_CONFIGS)
@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_the_full_budget_is_stock_llava(
    vision: str, text: str, stock_and_ours: Callable[..., tuple[Any, Any]]
) -> None:
    stock, ours = stock_and_ours(vision, text)
    batch = tiny_batch(ours.config, IMAGES)
    is_real = batch["attention_mask"].bool()
    expected = stock(**batch).logits[is_real]
    assert expected.std() > 0.3
    for budget in (None, 1.0, NUM_PATCHES, [1.0, 1.0, 1.0]):
        logits = ours(**batch, token_budget=budget).logits
        torch.testing.assert_close(logits[is_real], expected, atol=1e-5, rtol=0)

    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    tokens = stock.generate(**batch, **options)
    assert torch.equal(ours.generate(**batch, **options), tokens)
    assert torch.equal(ours.generate(**batch, **options, token_budget=1.0), tokens)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"budget_fusion": "post"}, {"budget_token_place": "first"}], ids=str)
@pytest.mark.parametrize("feature_layer", [-1, [-2, -1]], ids=str)
def test_the_full_budget_is_stock_llava_however_the_budget_is_told(
    feature_layer: int | list[int], fields: dict[str, str]
) -> None:
    stock = stock_llava(vision_feature_layer=feature_layer)
    ours = tiny_model(vision_feature_layer=feature_layer, **fields)
    missing, unexpected = ours.load_state_dict(stock.state_dict(), strict=False)
    assert all(name.startswith(NEW_MODULES) for name in missing)
    assert not unexpected
    batch = tiny_batch(ours.config, [1])
    torch.testing.assert_close(ours(**batch).logits, stock(**batch).logits, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("vision", ["clip", "dinov2"])
def test_the_full_budget_is_stock_llava_with_cls(vision: str) -> None:
    fields = {"vision_feature_select_strategy": "full"}
    stock, ours = stock_llava(vision, **fields), tiny_model(vision, **fields)
    ours.load_state_dict(stock.state_dict(), strict=False)
    assert ours.config.keep_cls
    batch = tiny_batch(ours.config, [1])
    assert (batch["input_ids"] == IMAGE_TOKEN_ID).sum() == NUM_PATCHES + 1
    torch.testing.assert_close(ours(**batch).logits, stock(**batch).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_mutual_budget_token_gives_every_patch_and_need_not_be_llava() -> None:
    stock, ours = stock_llava(), tiny_model(budget_attention="mutual")
    ours.load_state_dict(stock.state_dict(), strict=False)
    batch = tiny_batch(ours.config, [1])
    output = ours(**batch)
    assert output.selection.num_keep.tolist() == [NUM_PATCHES]
    assert output.logits.shape == stock(**batch).logits.shape


def test_a_text_only_batch_is_the_text_model_s() -> None:
    stock, ours = stock_llava(), tiny_model()
    ours.load_state_dict(stock.state_dict(), strict=False)
    batch = tiny_batch(ours.config, [0, 0])
    labels = targets(batch)
    expected, output = stock(**batch, labels=labels), ours(**batch, labels=labels, token_budget=0.3)
    assert output.selection is None
    is_real = batch["attention_mask"].bool()
    torch.testing.assert_close(output.logits[is_real], expected.logits[is_real], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=0)


def test_reading_text_exports_and_compiles_in_one_piece() -> None:
    model = tiny_model()
    text = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**text, use_cache=False).logits
        exported = torch.export.export(model, (), text | {"use_cache": False}, strict=False).module()
        torch.testing.assert_close(exported(**text, use_cache=False).logits, expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**text, use_cache=False).logits, expected)


def test_the_loss_at_the_full_budget_is_stock_llava_s() -> None:
    stock, ours = stock_llava(), tiny_model()
    ours.load_state_dict(stock.state_dict(), strict=False)
    batch = tiny_batch(ours.config, IMAGES)
    expected = stock(**batch, labels=targets(batch)).loss
    torch.testing.assert_close(ours(**batch, labels=targets(batch)).loss, expected, atol=1e-5, rtol=0)


# Any other budget is LLaVA on hand-pruned inputs


@torch.no_grad()
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    ("vision", "text"), [("clip", "llama"), ("siglip", "mistral"), ("dinov2", "qwen2"), ("clip", "qwen3")]
)
def test_any_budget_is_the_stock_text_model_on_hand_pruned_inputs(
    vision: str, text: str, positions: str, stock_and_ours: Callable[..., tuple[Any, Any]]
) -> None:
    stock, ours = stock_and_ours(vision, text)
    batch = tiny_batch(ours.config, IMAGES)
    ours.config.visual_position_ids = positions
    for budgets in ([0.0, 0.4, 0.5], [0.7, 0.15, 0.0], [2, 13, 5], [0.95, 0.95, 0.95]):
        output = ours(**batch, token_budget=budgets)
        image = 0
        for row, num_images in enumerate(IMAGES):
            keep = [keep.nonzero().flatten().tolist() for keep in output.selection.keep[image : image + num_images]]
            image += num_images
            expected = pruned_by_hand(stock, alone(batch, row, IMAGES), keep, positions)
            ours_of_row = output.logits[row, -len(expected) :]
            torch.testing.assert_close(ours_of_row, expected, atol=1e-5, rtol=0)
    ours.config.visual_position_ids = "original"


@torch.no_grad()
def test_fifty_budgets_keep_exactly_what_they_say() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, [1])
    random = Random(0)
    for trial in range(50):
        budget = round(random.random(), random.randint(1, 4)) if trial % 3 else random.randint(2, 20)
        if isinstance(budget, float):
            num_keep = max(1, int(Decimal(repr(budget)) * NUM_PATCHES))
        else:
            num_keep = min(budget, NUM_PATCHES)
        output = model(**batch, token_budget=budget)
        assert output.selection.num_keep.tolist() == [num_keep]
        assert output.selection.positions.shape == (1, num_keep)
        assert output.logits.shape[1] == batch["input_ids"].shape[1] - NUM_PATCHES + num_keep


@torch.no_grad()
def test_the_configuration_says_the_budget_where_the_call_does_not() -> None:
    model = tiny_model(token_budget=0.4)
    batch = tiny_batch(model.config, [1])
    assert model(**batch).selection.num_keep.tolist() == [6]
    assert model(**batch, token_budget=1.0).selection.num_keep.tolist() == [16]
    assert model(**batch, token_budget=0.0).selection.num_keep.tolist() == [1]


@torch.no_grad()
@pytest.mark.parametrize("selection_output", ["gather", "mask"])
def test_select_tokens_is_forward_s_choice_without_the_decoder(selection_output: str) -> None:
    model = tiny_model(selection_output=selection_output)
    batch = tiny_batch(model.config, IMAGES)
    labels = targets(batch, num_targets=4)
    ran = []
    for layer in [model.model.language_model, *model.model.language_model.layers, model.lm_head]:
        layer.register_forward_hook(lambda *_: ran.append(True))
    for extra in ({}, {"labels": labels}):
        for budget in (0.0, [0.4, 0.7, 0.2], 1.0):
            selection = model.select_tokens(**batch, **extra, token_budget=budget)
            assert not ran
            expected = model(**batch, **extra, token_budget=budget).selection
            assert ran.pop()
            ran.clear()
            assert torch.equal(selection.keep, expected.keep)
            assert torch.equal(selection.positions, expected.positions)


# A loss that is computed elsewhere

FORMS = {
    "gather": {"selection_output": "gather"},
    "mask": {"selection_output": "mask"},
    "in the decoder": {"reducers": [{"name": "fastv", "layer": 1}], "selection_output": "mask"},
    "by the question": {"reducers": ["query"]},
    "feature gates": {"gradient_gates": "features"},
}


def loss_by_hand(hidden_or_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the next token, as everybody computes it who has logits and labels of the same columns."""
    assert hidden_or_logits.shape[:2] == labels.shape
    return nn.functional.cross_entropy(hidden_or_logits[:, :-1].transpose(1, 2), labels[:, 1:])


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("is_padded_right", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_a_loss_of_the_callers_is_the_models_own(form: str, is_padded_right: bool, training: bool) -> None:
    model = tiny_model(**FORMS[form]).train(training)
    batch = tiny_batch(model.config, IMAGES)
    # The first target stands behind the only image of its row: what predicts it is in front of dropped patches.
    batch["labels"] = targets(batch, num_targets=4)
    batch = padded_on_the_right(batch) if is_padded_right else batch
    torch.manual_seed(0)
    expected = model(**batch, token_budget=0.6)
    torch.manual_seed(0)
    output = model(**batch | {"labels": None, "caller_targets": batch["labels"]}, token_budget=0.6)
    assert torch.equal(output.selection.keep, expected.selection.keep)
    assert output.loss is None and output.labels is None
    torch.testing.assert_close(loss_by_hand(output.logits, batch["labels"]), expected.loss)


@torch.no_grad()
@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_keeps_labels_to_itself_gets_the_models_own_loss(training: bool) -> None:
    model = tiny_model(token_budget=0.6).train(training)
    batch = tiny_batch(model.config, IMAGES)
    batch["labels"] = targets(batch, num_targets=4)
    torch.manual_seed(0)
    expected = model(**batch)

    # What TRL's `add_fused_lm_head` does.
    def forward(self: nn.Module, labels: torch.Tensor, **inputs: Any) -> torch.Tensor:
        return loss_by_hand(self.lm_head(self.base_model(**inputs).last_hidden_state), labels)

    model.forward = MethodType(forward, model)
    for call in (model, model.forward):  # older versions of PEFT call `forward`
        torch.manual_seed(0)
        torch.testing.assert_close(call(**batch), expected.loss)
    copied = copy.deepcopy(model)
    copied.lm_head.weight.zero_()
    assert copied(**batch) == pytest.approx(math.log(VOCAB_SIZE))


@pytest.mark.parametrize("reducer", [None, "fastv", "cdpruner"])
def test_training_without_labels_is_refused_where_the_question_chooses(reducer: str | None) -> None:
    model = tiny_model().train()
    batch = tiny_batch(model.config, [1])
    with pytest.raises(ValueError, match="`labels` is None in training.*question.*`caller_targets`"):
        model(**batch, token_budget=0.6, reducer=reducer)
    # There is nothing to choose here, none asks here, and here no text is an answer.
    assert model(**batch, token_budget=1.0).logits.isfinite().all()
    assert model(**batch, token_budget=0.6, reducer="random").logits.isfinite().all()
    no_targets = torch.full_like(batch["input_ids"], -100)
    assert model(**batch, token_budget=0.6, reducer=reducer, caller_targets=no_targets).logits.isfinite().all()


def test_a_reducer_with_a_loss_of_its_own_needs_the_models() -> None:
    model = tiny_model(reducers=["dynamicvit"]).train()
    batch = tiny_batch(model.config, [1])
    with pytest.raises(ValueError, match="`caller_targets`.*'dynamicvit'.*AdaVTPTrainer"):
        model(**batch, token_budget=0.6, caller_targets=targets(batch))


def test_labels_that_leave_no_question_are_said(caplog: pytest.LogCaptureFixture) -> None:
    logging.Logger.warning_once.cache_clear()
    model = tiny_model().train()
    batch = tiny_batch(model.config, [1])
    with caplog.at_level(logging.WARNING):
        model(**batch, labels=targets(batch), token_budget=0.6)
        assert not caplog.messages
        model(**batch, labels=batch["input_ids"], token_budget=0.6)
    assert "first token of text is a target" in caplog.text


# LLaVA's names


@pytest.mark.parametrize("save_original_format", [True, False], ids=["old names", "new names"])
def test_a_llava_checkpoint_lacks_only_the_new_modules(save_original_format: bool, tmp_path: Path) -> None:
    stock = stock_llava()
    stock.save_pretrained(tmp_path, save_original_format=save_original_format)
    ours, info = AdaVTPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]
    assert all(name.startswith(NEW_MODULES) for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = ours.state_dict()
    for name, tensor in stock.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert set(state) == set(stock.state_dict()) | set(info["missing_keys"])


def test_a_llava_checkpoint_of_the_first_layout_loads(tmp_path: Path) -> None:
    """The names that LLaVA-1.5 was published with, written out."""
    from safetensors.torch import load_file, save_file

    stock = stock_llava()
    stock.save_pretrained(tmp_path)
    first_layout = {}
    for name, tensor in stock.state_dict().items():
        if name.startswith("model.language_model."):
            name = name.replace("model.language_model.", "language_model.model.", 1)
        elif name.startswith("lm_head."):
            name = f"language_model.{name}"
        elif name.startswith("model.vision_tower."):
            name = name.replace("model.vision_tower.", "vision_tower.vision_model.", 1)
        else:
            name = name.removeprefix("model.")
        first_layout[name] = tensor.contiguous()
    assert not set(first_layout) & set(stock.state_dict())
    save_file(first_layout, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert set(load_file(tmp_path / "model.safetensors")) == set(first_layout)

    ours, info = AdaVTPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert all(name.startswith(NEW_MODULES) for name in info["missing_keys"])
    assert not info["unexpected_keys"]
    state = ours.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stock.state_dict().items())


def test_our_checkpoint_loads_into_stock_llava_with_only_the_new_modules_unexpected(tmp_path: Path) -> None:
    ours = tiny_model()
    ours.save_pretrained(tmp_path)
    fields = {"vision_config": tiny_vision_config(), "text_config": tiny_text_config()}
    stock, info = LlavaForConditionalGeneration.from_pretrained(
        tmp_path,
        config=LlavaConfig(**fields, image_token_index=IMAGE_TOKEN_ID, tie_word_embeddings=False),
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert info["unexpected_keys"]
    assert all(name.startswith(NEW_MODULES) for name in info["unexpected_keys"])
    batch = tiny_batch(ours.config, [1])
    with torch.no_grad():
        torch.testing.assert_close(stock(**batch).logits, ours(**batch).logits, atol=1e-5, rtol=0)


def test_our_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    ours = tiny_model(controller_head="dot", budget_fusion="post", token_budget=0.3)
    ours.save_pretrained(tmp_path)
    again, info = AdaVTPForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert again.config.to_dict().keys() == ours.config.to_dict().keys()
    for name in ("controller_head", "budget_fusion", "token_budget", "keep_cls", "reducer"):
        assert getattr(again.config, name) == getattr(ours.config, name)
    for name, tensor in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


# Embeddings in place of ids


@pytest.mark.parametrize("reducer", ["adaptive", "fastv"])
@pytest.mark.parametrize("token_budget", [1.0, 0.6, [0.5, 1.0, 0.75]], ids=str)
def test_embeddings_with_images_are_read_as_their_ids_are(token_budget: object, reducer: str) -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, IMAGES)
    options = {"token_budget": token_budget, "reducer": reducer}
    from_ids = model(**batch, labels=targets(batch), **options)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    labels = torch.nn.functional.pad(torch.ones(3, 3).long(), (embeds.shape[1] - 3, 0), value=-100)
    from_embeds = model(**batch, inputs_embeds=embeds, labels=labels, **options)
    # The text behind the images; what stands in padding is nobody's.
    assert torch.equal(from_embeds.logits[:, -4:], from_ids.logits[:, -4:])
    assert torch.equal(from_embeds.labels[:, -3:] >= 0, torch.ones(3, 3, dtype=torch.bool))
    assert torch.equal(from_embeds.selection.keep, from_ids.selection.keep)
    assert torch.equal(from_embeds.image_hidden_states, from_ids.image_hidden_states)
    from_embeds.loss.backward()
    # Prompt tuning learns through them; what stands in the place of a patch is not read.
    assert (embeds.grad[batch["attention_mask"].bool()].abs().sum(dim=-1) > 0).sum() > 10


@torch.no_grad()
def test_the_stock_class_reads_the_same_embeddings_at_the_full_budget() -> None:
    stock, model = stock_llava(), tiny_model()
    model.load_state_dict(stock.state_dict(), strict=False)
    batch = tiny_batch(model.config, IMAGES)
    batch["inputs_embeds"] = stock.get_input_embeddings()(batch.pop("input_ids"))
    is_real = batch["attention_mask"].bool()
    ours, expected = model(**batch).logits[is_real], stock(**batch).logits[is_real]
    torch.testing.assert_close(ours, expected)


@torch.no_grad()
def test_logits_are_kept_at_each_samples_own_positions() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, (1, 1), (6, 6))
    logits = model(**batch, token_budget=0.4).logits
    positions = torch.tensor([[0, 3], [2, 5]])
    kept = model(**batch, token_budget=0.4, logits_to_keep=positions).logits
    torch.testing.assert_close(kept, torch.stack([logits[0, [0, 3]], logits[1, [2, 5]]]))
    mask = torch.zeros(logits.shape[:2], dtype=torch.bool)
    mask[0, 1] = mask[1, 4:6] = True
    torch.testing.assert_close(model(**batch, token_budget=0.4, logits_to_keep=mask).logits, logits[mask])
    with pytest.raises(ValueError, match="`logits_to_keep` is a mask of shape.*selection_output='mask'"):
        model(**batch, token_budget=0.4, logits_to_keep=batch["attention_mask"].bool())


# Refusals


def refused_calls() -> dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, Any]], list[str]]]:
    """Changes to a good batch of one, and what the message has to say."""
    text_only = {"input_ids": torch.tensor([[1, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}
    square = torch.ones(1, 1, 22, 22, dtype=torch.bool).tril()
    return {
        "two images, placeholders of one": (
            lambda batch: {"pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)},
            ["`input_ids`", "[16]", "2 image(s)", "exactly 16"],
        ),
        "image without placeholders": (lambda batch: text_only, ["`input_ids`", "[0]", "1 image(s)", "exactly 16"]),
        "placeholders without image": (
            lambda batch: {"pixel_values": None},
            ["`input_ids`", "[16]", "0 image(s)", "exactly 16"],
        ),
        "a placeholder too few": (
            lambda batch: {"input_ids": batch["input_ids"].index_fill(1, torch.tensor([3]), 5)},
            ["`input_ids`", "[15]", "1 image(s)", "exactly 16"],
        ),
        "4-D mask without positions": (
            lambda batch: {"attention_mask": square},
            ["`position_ids`", "None", "2-D `attention_mask`"],
        ),
        "4-D mask that is not bool": (
            lambda batch: {"attention_mask": square.long(), "position_ids": torch.arange(22)[None]},
            ["`attention_mask`", "torch.int64", "(1, 1, 22, 22)", "torch.bool", "(1, 22)"],
        ),
        "mask of another length": (
            lambda batch: {"attention_mask": torch.ones(1, 7, dtype=torch.int64)},
            ["`attention_mask`", "(1, 7)", "(1, 22)"],
        ),
        "ids of one dimension": (lambda batch: {"input_ids": batch["input_ids"][0]}, ["`input_ids`", "(22,)"]),
        "ids of an empty batch": (lambda batch: {"input_ids": batch["input_ids"][:0]}, ["`input_ids`", "(0, 22)"]),
        "ids that are no integers": (
            lambda batch: {"input_ids": batch["input_ids"].float()},
            ["`input_ids`", "torch.float32", "torch.long"],
        ),
        "text of one dimension": (
            lambda batch: {"input_ids": torch.tensor([1, 5, 6]), "attention_mask": None, "pixel_values": None},
            ["`input_ids`", "(3,)", "[batch, sequence]"],
        ),
        "labels of another length": (
            lambda batch: {"labels": batch["input_ids"][:, 1:]},
            ["`labels`", "(1, 21)", "`input_ids`", "(1, 22)"],
        ),
        "labels that are no ids": (
            lambda batch: {"labels": batch["input_ids"].float()},
            ["`labels`", "torch.float32", "torch.long"],
        ),
        "targets of another length": (
            lambda batch: {"caller_targets": batch["input_ids"][:, 1:]},
            ["`caller_targets`", "(1, 21)", "`input_ids`", "(1, 22)"],
        ),
        "positions of another length": (
            lambda batch: {"position_ids": torch.arange(3)[None]},
            ["`position_ids`", "(1, 3)", "(1, 22)"],
        ),
        "another feature layer": (
            lambda batch: {"vision_feature_layer": 1},
            ["`vision_feature_layer`", "1", "-2", "configuration"],
        ),
        "another feature strategy": (
            lambda batch: {"vision_feature_select_strategy": "full"},
            ["`vision_feature_select_strategy`", "'full'", "'default'"],
        ),
        "unknown selection output": (
            lambda batch: {"selection_output": "prune"},
            ["`selection_output`", "'prune'", "'gather'", "'mask'"],
        ),
        "budget above 1": (lambda batch: {"token_budget": 1.5}, ["`token_budget`", "1.5", "0.0 to 1.0"]),
        "budgets for another batch": (
            lambda batch: {"token_budget": [0.5, 0.5]},
            ["`token_budget`", "(2,)", "batch of 1", "one per sample"],
        ),
        "bad budget for a text-only batch": (
            lambda batch: text_only | {"pixel_values": None, "token_budget": -1.0},
            ["`token_budget`", "-1.0", "0.0 to 1.0"],
        ),
        "unknown selection output for a text-only batch": (
            lambda batch: text_only | {"pixel_values": None, "selection_output": "prune"},
            ["`selection_output`", "'prune'", "'gather'", "'mask'"],
        ),
        "ids and embeddings": (
            lambda batch: {"inputs_embeds": torch.zeros(1, 22, 32)},
            ["`input_ids`", "`inputs_embeds`"],
        ),
        "an image, and embeddings without its placeholders": (
            lambda batch: {"input_ids": None, "inputs_embeds": torch.zeros(1, 22, 32)},
            ["Image features and image tokens do not match", "`inputs_embeds`", "[0]", "1 image(s)"],
        ),
        "an image, and features of one": (
            lambda batch: {"mm_encoder_outputs": {"image": None}},
            ["`pixel_values`", "`mm_encoder_outputs`"],
        ),
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", refused_calls())
def test_a_bad_call_is_refused_and_leaves_the_model_working(case: str, training: bool) -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, [1])
    assert batch["input_ids"].shape == (1, 22)
    expected = model(**batch, token_budget=0.4).logits
    change, fragments = refused_calls()[case]
    with pytest.raises(ValueError) as refusal:
        model.train(training)(**(batch | {"token_budget": 0.4} | change(batch)))
    for fragment in fragments:
        assert fragment in str(refusal.value)
    assert torch.equal(model.eval()(**batch, token_budget=0.4).logits, expected)


def test_the_mask_form_is_refused_where_a_window_would_count_what_is_hidden() -> None:
    model = tiny_model(text="mistral", text_config=tiny_text_config("mistral", sliding_window=12))
    batch = tiny_batch(model.config, [1])
    with pytest.raises(ValueError, match="`selection_output` is 'mask'.*12 columns of 22"):
        model(**batch, token_budget=0.4, selection_output="mask")
    assert model(**batch, token_budget=1.0, selection_output="mask").logits.isfinite().all()


def test_no_images_at_all_are_as_good_as_none_given() -> None:
    model = tiny_model()
    text = tiny_batch(model.config, [0, 0])
    no_images = torch.empty(0, 3, 32, 32)
    assert torch.equal(model(**text, pixel_values=no_images).logits, model(**text).logits)
    answer = model.generate(**text, pixel_values=no_images, max_new_tokens=3, do_sample=False)
    assert torch.equal(answer, model.generate(**text, max_new_tokens=3, do_sample=False))


def test_an_image_after_a_filled_cache_is_refused() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, [1])
    cache = model(**tiny_batch(model.config, [0]), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="`pixel_values`.*`past_key_values`"):
        model(**batch, past_key_values=cache)


REFUSED_FIELDS = {
    "budget above 1": ({"token_budget": 2.5}, ["2.5", "[0, 1]", ">= 2"]),
    "negative budget": ({"token_budget": -0.1}, ["-0.1", "[0, 1]", ">= 2"]),
    "the budget 1": ({"token_budget": 1}, ["is 1;", "[0, 1]", ">= 2"]),
    "budget NaN": ({"token_budget": float("nan")}, ["nan", "[0, 1]", ">= 2"]),
    "budget True": ({"token_budget": True}, ["True", "float", "int"]),
    "budget in words": ({"token_budget": "half"}, ["'half'", "float", "int"]),
    "fusion": ({"budget_fusion": "early"}, ["'early'", "'encoder'", "'post'"]),
    "attention": ({"budget_attention": "none"}, ["'none'", "'read_only'", "'mutual'"]),
    "place": ({"budget_token_place": "middle"}, ["'middle'", "'last'", "'first'"]),
    "position": ({"budget_position": "zero"}, ["'zero'", "'learned'", "'last_patch'"]),
    "head": ({"controller_head": "mlp"}, ["'mlp'", "'patch_budget'", "'dot'", "'late_interaction'"]),
    "choice": ({"controller_choice": "worst"}, ["'worst'", "'best'", "'spread'", "'mmr'"]),
    "estimator": ({"controller_estimator": "reinforce"}, ["'straight_through'", "'differentiable_top_k'"]),
    "lambda above 1": ({"controller_mmr_lambda": 1.5}, ["1.5", "0 to 1"]),
    "attention of the decoder": ({"visual_attention": "more"}, ["'more'", "'plain'", "'rescaled'"]),
    "temperature 0": ({"controller_temperature": 0.0}, ["0.0", "above 0"]),
    "temperature NaN": ({"controller_temperature": float("nan")}, ["nan", "above 0"]),
    "infinite temperature": ({"controller_temperature": float("inf")}, ["inf", "finite"]),
    "output": ({"selection_output": "prune"}, ["'prune'", "'gather'", "'mask'"]),
    "positions": ({"visual_position_ids": "none"}, ["'none'", "'original'", "'compact'"]),
    "question": ({"question_aware": "yes"}, ["'yes'", "bool"]),
    "CLS without room": ({"keep_cls": True}, ["True", "`vision_feature_select_strategy`", "'default'", "'full'"]),
    "room without CLS": (
        {"keep_cls": False, "vision_feature_select_strategy": "full"},
        ["False", "`vision_feature_select_strategy`", "'default'", "'full'"],
    ),
    "CLS of a tower without": (
        {"keep_cls": True, "vision": "siglip"},
        ["True", "no CLS token", "'full'", "keep_cls=False"],
    ),
    "cutting a CLS that is not there": (
        {"vision_feature_select_strategy": "default", "vision": "siglip"},
        ["'default'", "'siglip_vision_model'", "'full'"],
    ),
}


@pytest.mark.parametrize(("fields", "fragments"), REFUSED_FIELDS.values(), ids=REFUSED_FIELDS.keys())
def test_a_configuration_that_cannot_be_is_refused(fields: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as refusal:
        tiny_config(**fields)
    for fragment in [f"`{next(iter(fields))}`", *fragments]:
        assert fragment in str(refusal.value)


def test_a_field_that_is_changed_later_is_checked_too() -> None:
    config = tiny_config()
    with pytest.raises(ValueError, match="`controller_head` is 'mlp'"):
        config.controller_head = "mlp"
    assert config.controller_head == "patch_budget"


@pytest.mark.parametrize(
    ("vision", "fields", "keep_cls"),
    [
        ("clip", {}, False),
        ("clip", {"vision_feature_select_strategy": "full"}, True),
        ("siglip", {}, False),
        ("dinov2", {}, False),
        ("dinov2", {"vision_feature_select_strategy": "full"}, True),
    ],
)
def test_whether_cls_is_kept_follows_from_tower_and_strategy(
    vision: str, fields: dict[str, str], keep_cls: bool
) -> None:
    config = tiny_config(vision, **fields)
    assert config.keep_cls is keep_cls
    assert config.num_image_tokens == NUM_PATCHES + keep_cls
