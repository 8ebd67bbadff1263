"""Cuts through small text models: what a reducer inside the decoder is shown, and the stock model's own attention."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from tiny_models import tiny_config, tiny_text_config
from transformers import AutoModel

from adavtp import AdaVTPConfig
from adavtp.modeling.decoder_reducers_adavtp import DecoderView

# Two prompts, words and visual tokens: 3 words, 6 visual tokens, 4 words; and 2, 5 and 3.
PROMPTS = ("...######....", "..#####...")


@cache
def deep_config(num_layers: int) -> AdaVTPConfig:
    """A configuration whose decoder has so many layers."""
    return tiny_config(text_config=tiny_text_config(num_layers=num_layers))


def tiny_view(
    cut: int = 1,
    text: str = "llama",
    prompts: Sequence[str] = PROMPTS,
    side: str = "left",
    num_layers: int = 3,
    dtype: torch.dtype = torch.float32,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    **fields: Any,
) -> tuple[DecoderView, tuple[torch.Tensor, ...]]:
    """
    A pass of random embeddings through a stock text model, seen at a cut where no token has left yet.

    Args:
        cut: k; the view lies before layer k.
        text: a key of `TEXT_CONFIGS`.
        prompts: one string for each prompt, `"#"` for a visual token and `"."` for a word; the last asks.
        side: where shorter prompts are padded.
        num_layers: of the model.
        dtype: of the model.
        rows: of the prompts, those that are in the batch; by default all. A prompt has the same embeddings in any.
        seed: of weights and embeddings.
        fields: of the text model's configuration.

    Returns:
        The view, and the attention `[batch, heads, n, n]` of each layer of the stock model.
    """
    rows = tuple(range(len(prompts)) if rows is None else rows)
    made = _pass(text, tuple(prompts), side, num_layers, dtype, rows, seed, tuple(fields.items()))
    column = torch.arange(made["is_real"].shape[1])
    view = DecoderView(
        previous_layer=made["model"].layers[cut - 1],
        next_layer=made["model"].layers[cut],
        norm=made["model"].norm,
        previous_hidden_states=made["hidden_states"][cut - 1],
        hidden_states=made["hidden_states"][cut],
        position_embeddings=made["position_embeddings"],
        is_real=made["is_real"],
        is_visual=made["is_visual"],
        last=torch.where(made["is_real"], column, -1).amax(dim=-1),
        inputs_embeds=made["hidden_states"][0],
    )
    return view, made["attentions"]


@cache
@torch.no_grad()
def _pass(
    text: str,
    prompts: tuple[str, ...],
    side: str,
    num_layers: int,
    dtype: torch.dtype,
    rows: tuple[int, ...],
    seed: int,
    fields: tuple[tuple[str, Any], ...],
) -> dict[str, Any]:
    """The model, what it was shown, and what it made of it."""
    config = tiny_text_config(text, num_layers, **dict(fields))
    generator = torch.Generator().manual_seed(seed)
    embeds = [torch.randn(len(prompt), config.hidden_size, generator=generator) for prompt in prompts]
    length = max(len(prompts[row]) for row in rows)
    inputs_embeds = torch.zeros(len(rows), length, config.hidden_size)
    is_real, is_visual = torch.zeros(2, len(rows), length, dtype=torch.bool)
    for row, prompt in enumerate(rows):
        start = length - len(prompts[prompt]) if side == "left" else 0
        columns = slice(start, start + len(prompts[prompt]))
        inputs_embeds[row, columns], is_real[row, columns] = embeds[prompt], True
        is_visual[row, columns] = torch.tensor([token == "#" for token in prompts[prompt]])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(config, attn_implementation="eager").eval().to(dtype).requires_grad_(False)
    position_ids = (is_real.long().cumsum(dim=-1) - 1).clamp(min=0)
    outputs = model(
        inputs_embeds=inputs_embeds.to(dtype),
        attention_mask=is_real.long(),
        position_ids=position_ids,
        output_hidden_states=True,
        output_attentions=True,
        use_cache=False,
    )
    return {
        "model": model,
        "hidden_states": outputs.hidden_states,
        "attentions": outputs.attentions,
        "position_embeddings": model.rotary_emb(outputs.hidden_states[0], position_ids),
        "is_real": is_real,
        "is_visual": is_visual,
    }


def view_of(hidden_states: torch.Tensor, is_visual: torch.Tensor) -> DecoderView:
    """A view that shows hidden states `[batch, n, hidden_size]` and no layers, for what reads nothing else."""
    last = torch.full((len(is_visual),), is_visual.shape[1] - 1)
    real = torch.ones_like(is_visual)
    tables = (torch.ones(1, is_visual.shape[1], 2), torch.zeros(1, is_visual.shape[1], 2))
    return DecoderView(None, None, None, hidden_states, hidden_states, tables, real, is_visual, last)


def without_columns(view: DecoderView, keep: torch.Tensor) -> DecoderView:
    """The view `[1, n]` with fewer columns, as the decoder's loop takes them along."""
    assert len(keep) == 1
    columns = keep[0].nonzero()[:, 0]
    shift = torch.cumsum(keep[0].long(), 0) - 1
    return replace(
        view,
        previous_hidden_states=view.previous_hidden_states[:, columns],
        hidden_states=view.hidden_states[:, columns],
        position_embeddings=tuple(table[:, columns] for table in view.position_embeddings),
        is_real=view.is_real[:, columns],
        is_visual=view.is_visual[:, columns],
        inputs_embeds=view.inputs_embeds[:, columns],
        last=shift[view.last],
        carried={name: tensor[:, columns] for name, tensor in view.carried.items()},
    )
