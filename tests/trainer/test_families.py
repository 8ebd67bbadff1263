"""Every family trains as LLaVA does: by the same collator, trainer and losses, through its own processor."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from adavtp import AdaVTPForConditionalGeneration, AdaVTPTrainer, AdaVTPTrainingArguments, BudgetCollator
from adavtp.modeling.parts import PARTS, never_run_in_tower, parts_of_names
from adavtp.modeling.reducers.adaptive import VisionTokenController
from adavtp.tasks.digit_scenes import load_digit_scenes
from adavtp.trainer.adapter_folders import load_adapter
from adavtp.trainer.adapters import add_adapters, quantization
from adavtp.trainer.data.budget_stream import BudgetStream
from adavtp.trainer.data.processed import processed_lengths
from adavtp.trainer.data.reader import ConversationReader, RejectedSample
from adavtp.trainer.losses import visual_relevance
from adavtp.trainer.sharded_models import layer_classes, require_same_modules
from tiny_conversations import assistant, conversation_rows, picture, target_texts, user
from tiny_families import FAMILIES, Writer, batch_of, family_config, stock_model, with_budget
from tiny_processors import PROCESSED, family_model, family_processor, processor_parts
from tiny_trainers import EVERY_PART, MadeBatches, losses_of, weights_of

TRAINED = ("qwen2_5_vl", "llava_onevision", "internvl")
ALL_LOSSES = {"lm": 0.5, "distillation": 2.0, "relevance": 0.25}
RELEVANCE = {"relevance": 1.0}


def rows_of_many_sizes() -> list[dict[str, Any]]:
    """One image, none, two, and two turns; no two images of one size."""
    rows = conversation_rows(4, (1, 0, 2))
    for number, row in enumerate(rows):
        row["images"] = [picture(number, (50 + 10 * number, 30 + 9 * n)) for n, _ in enumerate(row["images"])]
    turns = [user("is there a 3 ?", 1), assistant("no"), user("which digit is red ?"), assistant("4 , the largest")]
    return [*rows, {"images": [picture(9, (30, 70))], "messages": turns}]


def family_trainer(
    folder: Path, name: str, model: PreTrainedModel | None = None, rows: Any = None, **arguments: Any
) -> AdaVTPTrainer:
    processor = family_processor(name)
    defaults = {
        "per_device_train_batch_size": 3,
        "max_steps": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "train_parts": EVERY_PART,
    }
    return AdaVTPTrainer(
        model=family_model(name, processor) if model is None else model,
        args=AdaVTPTrainingArguments(str(folder), **(defaults | arguments)),
        data_collator=BudgetCollator(processor, (0.3, 0.8), per="sample"),
        processing_class=processor,
        train_dataset=rows_of_many_sizes() if rows is None else rows,
        eval_dataset=rows_of_many_sizes(),
    )


# Data


def text_of(processor: ProcessorMixin, row: dict[str, Any]) -> str:
    """In the chat template, with the end that some templates do not write."""
    text, end = processor.apply_chat_template(row["messages"]), processor.tokenizer.eos_token
    return text if text.rstrip().endswith(end) else text.rstrip() + end


@pytest.mark.parametrize("name", PROCESSED)
def test_a_batch_is_what_the_family_s_processor_writes_and_the_answers_are_its_targets(name: str) -> None:
    processor, parts, rows = family_processor(name), processor_parts(name), rows_of_many_sizes()
    batch = BudgetCollator(processor)(rows)
    answers = [["red"], ["7"], ["4"], ["yes"], ["no", "4 , the largest"]]
    for number, (row, words) in enumerate(zip(rows, answers, strict=True)):
        ids, labels = batch["input_ids"][number].tolist(), batch["labels"][number].tolist()
        said = [text.strip() for text in target_texts(processor, ids, labels)]
        end, eos = parts.end, "" if parts.end == parts.eos else parts.eos
        assert said == [word + end + eos * (word == words[-1]) for word in words]
        alone = processor(images=[row["images"]] if row["images"] else None, text=[text_of(processor, row)])
        length = int(batch["attention_mask"][number].sum())
        assert ids[:length] == list(alone["input_ids"][0]) and set(ids[length:]) <= {processor.tokenizer.pad_token_id}
    texts = [text_of(processor, row) for row in rows]
    together = processor(images=[row["images"] for row in rows], text=texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["pixel_values"], together["pixel_values"])


@pytest.mark.parametrize("name", PROCESSED)
def test_an_answer_that_is_a_part_of_a_role_s_name_is_found_behind_it(name: str) -> None:
    collator = BudgetCollator(family_processor(name))
    said = [collator([{"images": [], "messages": [user("which ?"), assistant(word)]}]) for word in ("red", "is")]
    red, part_of_assistant = (batch["input_ids"][batch["labels"] >= 0] for batch in said)
    assert len(part_of_assistant) == len(red)
    assert torch.equal(part_of_assistant[1:], red[1:])


@pytest.mark.parametrize("name", PROCESSED)
def test_a_row_is_read_in_the_length_that_it_has_in_a_batch(name: str) -> None:
    processor, rows = family_processor(name), rows_of_many_sizes()
    reader, collator = ConversationReader(processor), BudgetCollator(processor)
    for number, row in enumerate(rows):
        row["id"] = f"row {number}"
        num_columns = collator([row])["input_ids"].shape[1]
        others, visual = reader.lengths(row)
        assert others + visual == num_columns
        assert visual == processed_lengths(processor, tuple(image.size for image in row["images"]))[1]
        assert reader.lengths_at(torch.tensor([[others, visual]]), torch.tensor([0.5])).item() == others + visual // 2
        read = collator([reader.read(row)])
        for key, value in collator([row]).items():
            assert key == "token_budget" or torch.equal(read[key], value), key
        with pytest.raises(RejectedSample, match="are more than `max_length`"):
            ConversationReader(processor, max_length=num_columns - 1).read(row)


def test_a_row_whose_images_are_not_those_of_its_messages_is_an_error() -> None:
    rows = rows_of_many_sizes()
    rows[0]["images"], rows[2]["images"] = rows[2]["images"], rows[0]["images"]
    with pytest.raises(ValueError, match=r"shows 1 image\(s\) and `images` has 2"):
        BudgetCollator(family_processor("qwen2_5_vl"))(rows)


# Which parts there are


# InternVL reads its last layer behind a norm, and others before it.
NORMED = {"vision_config": {**family_config("internvl").vision_config.to_dict(), "use_mean_pooling": False}}
MADE = [*((name, {}) for name in FAMILIES), *(("internvl", NORMED | {"vision_feature_layer": at}) for at in (-1, -2))]


@pytest.mark.parametrize(("name", "fields"), MADE)
def test_every_parameter_is_of_one_part_and_gets_a_gradient_unless_it_never_runs(
    name: str, fields: dict[str, Any]
) -> None:
    model, writer = with_budget(name, **fields).train(), Writer(name)
    part_of, never_run = parts_of_names(model), never_run_in_tower(model)
    for prompts in ([writer.prompt(), writer.prompt(images=())], [writer.prompt(images=())]):
        model.zero_grad()
        batch = batch_of(name, prompts)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :-4] = -100
        model(**batch, labels=labels, token_budget=0.5).loss.backward()
        for key, parameter in model.named_parameters():
            assert (parameter.grad is None) == key.startswith(never_run), key
        learned = {key for key, parameter in model.named_parameters() if parameter.grad is not None}
        assert {part_of(key) for key in learned} == set(PARTS) - {"scheduler"}
    of_parts = {part: {k.split(".")[1] for k in learned if part_of(k) == part and "." in k} for part in PARTS}
    (decoder,) = of_parts["decoder"] - {"weight"}
    assert decoder in ("language_model", "text_model")
    (tower,) = of_parts["vision"]
    assert tower in ("vision_tower", "vision_model", "visual")
    assert of_parts["projector"] <= {
        "multi_modal_projector",
        "connector",
        "embed_vision",
        "image_newline",
        "merger",
        "visual",
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_text_alone_has_the_loss_of_the_stock_class_with_the_tower_in_its_gradient(name: str) -> None:
    model, prompts = with_budget(name), [Writer(name).prompt(images=())] * 2
    batch = batch_of(name, prompts)
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    evaluated = model(**batch, labels=labels)
    trained = model.train()(**batch, labels=labels, token_budget=0.5)
    assert torch.equal(trained.loss, evaluated.loss) and torch.equal(trained.logits, evaluated.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_four_bits_are_the_decoder_s_linear_layers_and_nothing_else(name: str, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    # Its weights are changed below.
    stock = copy.deepcopy(stock_model(name))
    stock.save_pretrained(tmp_path)
    model = AdaVTPForConditionalGeneration.from_pretrained(
        tmp_path, quantization_config=quantization("nf4", torch.float32), dtype=torch.float32
    )
    in_four_bits = {key for key, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    decoder = {id(module) for module in stock.get_decoder().modules() if type(module) is nn.Linear}
    assert in_four_bits == {key for key, module in stock.named_modules() if id(module) in decoder} != set()
    others = {p.dtype for key, p in model.named_parameters() if key.removesuffix(".weight") not in in_four_bits}
    assert others == {torch.float32}
    batch = batch_of(name, [Writer(name).prompt()])
    for key in in_four_bits:
        weight = model.get_submodule(key).weight
        stock.get_submodule(key).weight.data = functional.dequantize_4bit(weight.data, weight.quant_state)
    batch = {
        key: value.float() if value.is_floating_point() else value
        for key, value in batch_of(name, [Writer(name).prompt()]).items()
    }
    # With gradients: without them the library packs weights anew on some CPUs, and only those that are wide.
    expected, logits = (run(**batch).logits[0, -1].detach() for run in (stock.float(), model))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


# Training


@pytest.mark.parametrize("name", TRAINED)
def test_dropped_tokens_may_leave_or_hide_and_training_is_the_same(name: str, tmp_path: Path) -> None:
    losses, weights = {}, {}
    for form in ("gather", "mask"):
        model = family_model(name, family_processor(name), selection_output=form)
        before = weights_of(model)
        trainer = family_trainer(tmp_path, name, model, optim="sgd", max_grad_norm=0.0, max_steps=3)
        torch.manual_seed(0)
        trainer.train()
        losses[form], weights[form] = losses_of(trainer), weights_of(model)
        changed = {key for key, value in weights[form].items() if not torch.equal(value, before[key])}
        assert {parts_of_names(model)(key) for key in changed} == set(PARTS) - {"scheduler"}
        assert not any(key.startswith(never_run_in_tower(model)) for key in changed)
    assert losses["gather"] == pytest.approx(losses["mask"], rel=1e-4) and losses["gather"][0] > 1
    for key, value in weights["gather"].items():
        torch.testing.assert_close(weights["mask"][key], value, atol=1e-4, rtol=1e-3, msg=key)


@pytest.mark.parametrize("name", TRAINED)
def test_only_the_named_parts_train_and_evaluation_measures_at_every_budget(name: str, tmp_path: Path) -> None:
    model = family_model(name, family_processor(name))
    before, part_of = weights_of(model), parts_of_names(model)
    trainer = family_trainer(
        tmp_path,
        name,
        model,
        train_parts=["controller", "projector"],
        loss_weights=ALL_LOSSES,
        eval_budgets=[1.0, 0.3],
    )
    trainer.train()
    changed = {part_of(key) for key, value in weights_of(model).items() if not torch.equal(value, before[key])}
    assert changed == {"controller", "projector"}
    assert {"eval_loss_b1.0", "eval_loss_b0.3"} <= trainer.evaluate().keys()
    trainer.save_model()
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in weights_of(model).items())


@pytest.mark.parametrize("name", TRAINED)
def test_relevance_of_images_of_many_sizes_is_that_of_each_alone(name: str) -> None:
    processor = family_processor(name)
    model, rows = family_model(name, processor), rows_of_many_sizes()
    collator = BudgetCollator(processor)
    together, of_rows = visual_relevance(model, collator(rows)), []
    for row in rows:
        if row["images"]:
            of_rows += list(zip(*visual_relevance(model, collator([row])), strict=True))
    assert len(of_rows) == len(together.of_patches) > 4
    for (own, num_targets), row, number in zip(of_rows, *together, strict=True):
        torch.testing.assert_close(row[: len(own)], own, atol=1e-5, rtol=1e-3)
        assert (row[len(own) :] == 0).all() and num_targets == number > 0
        torch.testing.assert_close(own.sum(), torch.tensor(1.0))


def test_adapters_of_a_family_train_and_are_saved_loaded_and_merged(tmp_path: Path) -> None:
    name, base = "qwen2_5_vl", tmp_path / "base"
    family_model(name, family_processor(name)).save_pretrained(base)
    model = type(family_model(name, family_processor(name))).from_pretrained(base)
    parts = ["decoder", "vision", "projector", "controller"]
    trainer = family_trainer(tmp_path / "adapter", name, add_adapters(model, parts, r=2, lora_dropout=0.0))
    trainer.train()
    trainer.save_model()
    batch = trainer.data_collator(rows_of_many_sizes())
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits
        untrained = type(model).from_pretrained(base)(**batch).logits
        loaded = load_adapter(tmp_path / "adapter").eval()
        assert torch.equal(loaded(**batch).logits, expected)
        merged = loaded.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(untrained, expected, atol=1e-3)
    adapted = {key for key, _ in trainer.model.named_parameters() if "lora_A" in key}
    assert any(".visual.blocks.2." in key for key in adapted) and not any(".merger." in key for key in adapted)
    assert any(".language_model.layers.3." in key for key in adapted)


def test_processes_that_share_parameters_take_what_runs_the_same_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAMILIES:
        model = with_budget(name)
        assert len(layer_classes(model)) == 2
        require_same_modules(model, is_fsdp=True)
        require_same_modules(model, is_fsdp=False)
    monkeypatch.setattr(VisionTokenController, "takes_padding", False)
    require_same_modules(with_budget("internvl"), is_fsdp=False)
    with pytest.raises(ValueError, match="runs once for every size of image"):
        require_same_modules(with_budget("qwen2_5_vl"), is_fsdp=False)


# Learning


def digits_alone(split: str, num_scenes: int, folder: Path) -> list[dict[str, Any]]:
    """Each handwritten digit of scenes, small and somewhere in grey noise; what is asked is its colour."""
    generator, rows = np.random.default_rng(0), []
    for scene in load_digit_scenes(split, num_scenes, cache_dir=folder):
        for digit in scene["objects"]:
            grey = generator.integers(0, 256, (48, 48, 1), dtype=np.uint8)
            image = Image.fromarray(grey.repeat(3, axis=-1))
            image.paste(
                scene["image"].crop(digit["box"]).resize((12, 12)), tuple(generator.integers(0, 37, 2).tolist())
            )
            messages = [user("what colour is the digit ?", 1), assistant(digit["colour"])]
            rows.append({"images": [image], "messages": messages})
    return rows


def test_a_controller_learns_to_choose_on_another_family(tmp_path: Path) -> None:
    processor = family_processor("internvl")
    size = {"height": 48, "width": 48}
    processor.image_processor = GotOcr2ImageProcessorPil(size=size, min_patches=1, max_patches=1)
    # A token for each of 8 x 8 patches.
    processor.image_seq_length = 64
    model = family_model(
        "internvl",
        processor,
        downsample_ratio=1.0,
        image_seq_length=64,
        vision_config={"num_hidden_layers": 1, "hidden_size": 48, "intermediate_size": 96},
        text_config={"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            scale = 0.5 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            nn.init.normal_(parameter, 0.0, scale, generator)
    collator = BudgetCollator(processor)
    rows, held_out = (digits_alone(split, number, tmp_path) for split, number in (("train", 256), ("test", 64)))
    batches = [collator(rows[first : first + 32]) for first in range(0, len(rows) - 31, 32)]

    def train(budgets: tuple[float, float], **arguments: Any) -> list[float]:
        trainer = family_trainer(
            tmp_path,
            "internvl",
            model,
            batches,
            per_device_train_batch_size=1,
            lr_scheduler_type="cosine",
            **arguments,
        )
        trainer.data_collator = MadeBatches(BudgetStream(budgets, "sample"))
        trainer.train()
        return losses_of(trainer)

    def loss_and_share_right(reducer: str) -> tuple[float, float]:
        """Of held-out digits, with 3 tokens of 64."""
        batch = collator(held_out) | {"token_budget": 0.05}
        with torch.no_grad():
            outputs = model.eval()(**batch, reducer=reducer)
        targets = outputs.labels[:, 1:]
        first = (targets != -100).int().argmax(dim=-1, keepdim=True)
        is_right = outputs.logits[:, :-1].argmax(dim=-1).gather(1, first) == targets.gather(1, first)
        return float(outputs.loss), float(is_right.float().mean())

    model.set_reducer("random")
    # A tower that trained would tell every token the colour, and no choice would matter.
    decoder = ["projector", "decoder"]
    losses = train((0.1, 1.0), max_steps=160, warmup_steps=20, learning_rate=6e-3, train_parts=decoder)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    model.set_reducer("adaptive")
    untrained, untrained_right = loss_and_share_right("adaptive")
    losses = train(
        (0.03, 0.3),
        max_steps=50,
        warmup_steps=10,
        learning_rate=1e-2,
        train_parts=["controller"],
        loss_weights=RELEVANCE,
    )
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    learned, learned_right = loss_and_share_right("adaptive")
    random, random_right = loss_and_share_right("random")
    assert learned < 0.9 * random and learned < 0.95 * untrained
    assert learned_right > random_right + 0.15 and learned_right > untrained_right + 0.05
