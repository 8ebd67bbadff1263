"""What a decoder does whose layers see different columns, written down by hand: no cache, no batch, no padding."""

from collections.abc import Sequence
from typing import Any

import torch

from adavtp import AdaVTPForConditionalGeneration


class LayeredReader:
    """
    One conversation as the stock decoder layers read it, each only the columns that it sees.

    Every question is answered by running all layers anew over everything read so far.

    Attributes:
        embeds: `[columns, hidden_size]`.
        positions: `[columns]` int64, as in the unpruned conversation.
        depth: `[columns]` int64, how many layers see each column.
        num_read: columns of the unpruned conversation.
    """

    def __init__(self, model: AdaVTPForConditionalGeneration) -> None:
        self.model = model
        self.num_layers = model.config.text_config.num_hidden_layers
        self.embeds = torch.empty(0, model.config.text_config.hidden_size)
        self.positions = torch.empty(0, dtype=torch.long)
        self.depth = torch.empty(0, dtype=torch.long)
        self.num_read = 0

    @torch.no_grad()
    def read(self, ids: Sequence[int]) -> None:
        """Appends text, which every layer sees."""
        embeds = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        self._append(embeds, torch.arange(len(ids)), torch.full((len(ids),), self.num_layers), len(ids))

    @torch.no_grad()
    def show(
        self, ids: Sequence[int], pixel_values: torch.Tensor | None, depth: torch.Tensor | None = None, **how: Any
    ) -> None:
        """
        Appends a prompt with images, as it is when the reducers before the decoder are done.

        Args:
            ids: of the prompt.
            pixel_values: of its images.
            depth: `[num_images, num_patches]` int64, how many layers see each patch; by default what the model says of
                the prompt on its own.
            how: budget and reducer.
        """
        if pixel_values is None:
            return self.read(ids)
        ids = torch.tensor(ids)[None]
        prompt, selection, _ = self.model.model.prepare_prompt(
            ids, pixel_values, position_ids=torch.arange(ids.shape[1])[None], **how
        )
        if depth is None:
            depth = self.model.select_tokens(ids, pixel_values, **how).depth
        if depth is None:
            depth = selection.keep * self.num_layers
        patches = prompt.patches[0]
        of_column = torch.where(patches >= 0, depth.flatten()[patches.clamp(min=0)], self.num_layers)
        return self._append(prompt.inputs_embeds[0], prompt.position_ids[0], of_column, ids.shape[1])

    def _append(self, embeds: torch.Tensor, positions: torch.Tensor, depth: torch.Tensor, num_read: int) -> None:
        self.embeds = torch.cat([self.embeds, embeds])
        self.positions = torch.cat([self.positions, self.num_read + positions])
        self.depth = torch.cat([self.depth, depth])
        self.num_read += num_read

    @torch.no_grad()
    def all_logits(self, answer: Sequence[int] = ()) -> torch.Tensor:
        """Logits `[columns of the last layer, vocab_size]` after reading, and then writing `answer`."""
        text, config = self.model.model.language_model, self.model.config
        answer_embeds = self.model.get_input_embeddings()(torch.tensor(answer, dtype=torch.long))
        hidden_states = torch.cat([self.embeds, answer_embeds])
        positions = torch.cat([self.positions, self.num_read + torch.arange(len(answer))])
        depth = torch.cat([self.depth, torch.full((len(answer),), self.num_layers)])
        for number, layer in enumerate(text.layers):
            sees = depth > number
            hidden_states, positions, depth = hidden_states[sees], positions[sees], depth[sees]
            compact = config.visual_position_ids == "compact"
            place = (torch.arange(len(depth)) if compact else positions)[None]
            hidden_states = layer(
                hidden_states[None],
                attention_mask=causal_mask(len(depth), window_of(text.config, number)),
                position_ids=place,
                position_embeddings=text.rotary_emb(hidden_states[None], place),
                past_key_values=None,
            )[0]
        return self.model.lm_head(text.norm(hidden_states))

    def logits_along(self, answer: Sequence[int]) -> torch.Tensor:
        """Logits `[len(answer), vocab_size]` that each token of `answer` was chosen from."""
        return torch.stack([self.all_logits(answer[:step])[-1] for step in range(len(answer))])

    def greedy(self, num_tokens: int) -> list[int]:
        answer = []
        for _ in range(num_tokens):
            answer.append(int(self.all_logits(answer)[-1].argmax()))
        return answer

    def beams(self, num_beams: int, num_tokens: int) -> list[list[int]]:
        """The answers of beam search, best first."""
        beams = [([], 0.0)]
        for _ in range(num_tokens):
            grown = []
            for answer, score in beams:
                best = self.all_logits(answer)[-1].log_softmax(dim=-1).topk(num_beams)
                grown += [([*answer, int(i)], score + float(p)) for p, i in zip(*best, strict=True)]
            beams = sorted(grown, key=lambda beam: -beam[1])[:num_beams]
        return [answer for answer, _ in beams]


def window_of(config: Any, layer: int) -> int | None:
    """How many columns, its own included, a row of a layer sees; `None` for all."""
    types = getattr(config, "layer_types", None)
    is_full = types is not None and types[layer] == "full_attention"
    return None if is_full else getattr(config, "sliding_window", None)


def causal_mask(length: int, window: int | None) -> torch.Tensor:
    """What is added to attention logits, `[1, 1, length, length]`."""
    row, column = torch.arange(length)[:, None], torch.arange(length)
    sees = (column <= row) & (column > row - (window or length))
    return torch.zeros(1, 1, length, length).masked_fill(~sees, torch.finfo(torch.float32).min)


def as_conversation(model: AdaVTPForConditionalGeneration) -> AdaVTPForConditionalGeneration:
    """The model without an end-of-sequence token and without placeholders in its answers."""
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        # A trained model does not write image placeholders; among 64 random words, a score of 0 is never the best.
        model.lm_head.weight[model.config.image_token_id] = 0.0
    return model
