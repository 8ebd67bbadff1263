"""CDPruner: keep tokens that differ from each other and matter to the question, both at once.

A determinantal point process says how good a set S is by det(L_S) of a kernel L_ij = w_i cos(i, j) w_j: the squared
volume that the chosen directions span, times how relevant they are (arXiv 2506.10967). The best set of K is found
greedily, adding the token that raises the determinant most.
"""

import math

import torch
from torch import nn
from transformers import AutoTokenizer, CLIPModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer, take_tokens
from .divprune import first_picks
from .query import question_cosines

# What is left of a unit vector, squared, when float32 cannot tell it from the rounding of what was subtracted.
_SPANNED = 1e-6
_LEAST_RANGE = 1e-6


@register_reducer("cdpruner")
class CDPrunerReducer(TokenReducer):
    """
    Keeps the K tokens that greedy MAP inference of a DPP takes, whose kernel is made of the cosines of projected
    tokens and of their relevance to the question.

    The published relevance is CLIP's: the cosine of each patch, behind CLIP's own visual projection, with CLIP's
    embedding of the question. LLaVA checkpoints have neither CLIP's text tower nor that projection, so they come from
    `text_model`. Without it our stand-in is the cosine of the projected token with the mean embedding of the prompt's
    text, in the decoder's space. Either is brought to [0, 1] in each image, r = (c - min + 1e-6) / (max - min).

    The published code prefers tokens with a *low* CLIP cosine (it negates c), takes minimum and maximum over the whole
    batch, flattens the kept tokens of all images into one sequence, and picks tokens twice when asked for more than
    the features' rank. Here `negate` is a switch, each image stands for itself, and no token is taken twice: those
    that the chosen ones span come last, the most relevant first.

    Args:
        text_model: a CLIP checkpoint, folder or repository, whose vision tower is this model's. It is loaded when it
            is first needed and is no part of this model's weights.
        tokenizer: with `text_model`, folder or repository of the model's own tokenizer, to read the prompt with; by
            default where the configuration was loaded from.
        negate: whether relevance is -c; by default with `text_model`, as published, and not without.
        theta: in [0, 1), weights tokens by exp(alpha r), alpha = theta / (2 (1 - theta)), which the published code has
            but does not use; by default tokens are weighted by r itself.
    """

    stage = "projector"
    paper = "CDPruner (arXiv 2506.10967)"

    def __init__(
        self,
        config: AdaVTPConfig,
        text_model: str | None = None,
        tokenizer: str | None = None,
        negate: bool | None = None,
        theta: float | None = None,
    ) -> None:
        super().__init__(config)
        if theta is not None and not 0.0 <= theta < 1.0:
            raise ValueError(f"`theta` is {theta}; allowed are None and 0 up to, but not including, 1.")
        if text_model is None and tokenizer is not None:
            raise ValueError(f"`tokenizer` is {tokenizer!r}, which only `text_model` makes use of, and that is None.")
        if text_model is not None:
            _require_clip_features(config, text_model)
        self.negate = text_model is not None if negate is None else negate
        self.theta = theta
        self.needs = ("question",) if text_model is None else ("question_ids", "tower_patches")
        self.clip_text = None if text_model is None else CLIPText(text_model, tokenizer or config.name_or_path)

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        tokens = features.patches.detach()
        if self.clip_text is None:
            cosines = question_cosines(tokens, features.question.detach())
        else:
            cosines = self.clip_text.cosines(features.tower_patches.detach(), features.question_ids)
        relevance = min_max_normalised(-cosines if self.negate else cosines)
        log_weights = relevance.log() if self.theta is None else self.theta / (2 - 2 * self.theta) * relevance
        unit = directions(tokens)
        order = greedy_map(unit @ unit.transpose(1, 2), log_weights, int(num_keep.max()))
        return Selection.from_keep(first_picks(order, num_keep, tokens.shape[1]))


def min_max_normalised(values: torch.Tensor) -> torch.Tensor:
    """(c - min + 1e-6) / (max - min) of each row, above 0, up to 1; values that are all alike stay alike."""
    least, most = values.aminmax(dim=-1, keepdim=True)
    return (values - least + 1e-6) / (most - least).clamp_min(_LEAST_RANGE)


def greedy_map(similarity: torch.Tensor, log_weights: torch.Tensor, num_picks: int) -> torch.Tensor:
    """
    Greedy MAP inference of a DPP with the kernel L_ij = w_i S_ij w_j (Chen et al., arXiv 1709.05135).

    Adding token i to the chosen set multiplies det(L) by w_i^2 g_i, where g_i is what is left of token i's unit
    vector, squared, when the span of the chosen ones is taken out. After token j was chosen,

        f_i = (S_ji - sum_k f_k,j f_k,i) / sqrt(g_j),    g_i <- g_i - f_i^2,

    with one row f of a Cholesky factor for each chosen token. Weights factor out of f, so that a small weight is not
    mistaken for a token without a direction of its own, and the next token is argmax of 2 log w_i + log g_i.

    Args:
        similarity: S, `[num_images, num_tokens, num_tokens]` float32, cosines.
        log_weights: log w, `[num_images, num_tokens]` float32.
        num_picks: how many are chosen, at most `num_tokens`.

    Returns:
        The order in which they are chosen, `[num_images, num_picks]` int64. Of equal ones the earlier is first; tokens
        with nothing left come last.
    """
    num_images, num_tokens, _ = similarity.shape
    # A token's cosine with itself is 1, or 0 where it has no length, but for rounding that would break ties.
    left = similarity.diagonal(dim1=1, dim2=2).round()
    factor = similarity.new_zeros(num_images, num_picks, num_tokens)
    log_weights = 2 * log_weights
    nothing = torch.finfo(left.dtype).tiny
    picks = []
    for step in range(num_picks):
        gain = log_weights + left.masked_fill(left < _SPANNED, nothing).log()
        pick = gain.argmax(dim=-1, keepdim=True)
        picks.append(pick)
        log_weights = log_weights.scatter(1, pick, -math.inf)
        to_pick = take_tokens(similarity, pick)
        of_pick = factor[:, :step].gather(2, pick[:, None].expand(-1, step, -1))
        row = (to_pick - of_pick.transpose(1, 2) @ factor[:, :step])[:, 0]
        # A token that is spanned already takes nothing out; dividing its rounding by itself would.
        left_of_pick = left.gather(1, pick)
        row = torch.where(left_of_pick < _SPANNED, 0.0, row * left_of_pick.clamp_min(_SPANNED).rsqrt())
        factor[:, step] = row
        left = left - row.square()
    return torch.cat(picks, dim=-1)


class CLIPText:
    """
    What a CLIP checkpoint, `text_model`, has beside the vision layers that LLaVA keeps: the text tower, and both
    towers' projections into one space. `tokenizer` reads the prompts' ids.

    It is no module, so that it is neither saved nor trained with the model.
    """

    def __init__(self, text_model: str, tokenizer: str) -> None:
        self.text_model, self.tokenizer = text_model, tokenizer
        self._parts: nn.ModuleDict | None = None

    @torch.no_grad()
    def cosines(self, tower_patches: torch.Tensor, question_ids: torch.Tensor) -> torch.Tensor:
        """
        The cosine of each patch with its image's question in CLIP's space, the mean over segments of the question:
        `[num_images, num_tokens]` float32. Patches are as the tower's feature layer makes them, ids the model's own
        and -1 where no text is.
        """
        if self._parts is None:
            self._load(width=tower_patches.shape[-1])
        parts = self._parts.to(tower_patches.device)
        patches = parts["visual_projection"](parts["post_layernorm"](tower_patches.float()))
        question = self._embedded(self._questions(question_ids))
        # The mean of cosines is the product with the mean of unit vectors.
        return (directions(patches) @ question[..., None])[..., 0]

    def _questions(self, question_ids: torch.Tensor) -> list[str]:
        rows = [[index for index in row if index >= 0] for row in question_ids.tolist()]
        return self._prompt_tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _embedded(self, questions: list[str]) -> torch.Tensor:
        """The mean of the unit vectors of each question's segments, `[num_questions, projection_dim]`."""
        tokenizer, text_tower = self._clip_tokenizer, self._parts["text_model"]
        length = text_tower.config.max_position_embeddings
        segments = [
            text_segments(ids, tokenizer.bos_token_id, tokenizer.eos_token_id, length)
            for ids in tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        device = next(text_tower.parameters()).device
        # The text tower is causal and is read at its first end token, so more of them behind it change nothing.
        input_ids = torch.tensor(
            [row + [tokenizer.eos_token_id] * (length - len(row)) for rows in segments for row in rows], device=device
        )
        embedded = self._parts["text_projection"](text_tower(input_ids=input_ids).pooler_output)
        of_question = directions(embedded).split([len(rows) for rows in segments])
        return torch.stack([rows.mean(dim=0) for rows in of_question])

    def _load(self, width: int) -> None:
        if not self.tokenizer:
            raise ValueError(
                "Reducer 'cdpruner' has a `text_model` but no `tokenizer`, and the model's configuration was not "
                "loaded from anywhere; name the folder or repository of the model's own tokenizer."
            )
        clip = CLIPModel.from_pretrained(self.text_model, dtype=torch.float32).eval().requires_grad_(False)
        if clip.visual_projection.in_features != width:
            raise ValueError(
                f"`text_model` is {self.text_model!r}, whose vision tower is {clip.visual_projection.in_features} "
                f"wide; this model's is {width}. It has to be the CLIP that the vision tower was taken from."
            )
        self._clip_tokenizer = AutoTokenizer.from_pretrained(self.text_model)
        self._prompt_tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        self._parts = nn.ModuleDict(
            {
                "text_model": clip.text_model,
                "text_projection": clip.text_projection,
                "post_layernorm": clip.vision_model.post_layernorm,
                "visual_projection": clip.visual_projection,
            }
        )


def text_segments(ids: list[int], start: int, end: int, length: int) -> list[list[int]]:
    """
    A text in pieces that CLIP's text tower can read, each with its own start and end token.

    The published code cuts the text with one start and one end, so that all but the last piece are read where they
    have no end. A piece has `length` ids at most, both included; there is one or more.
    """
    room = length - 2
    return [[start, *ids[first : first + room], end] for first in range(0, max(len(ids), 1), room)]


def _require_clip_features(config: AdaVTPConfig, text_model: str) -> None:
    if config.vision_config.model_type != "clip_vision_model" or not isinstance(config.vision_feature_layer, int):
        raise ValueError(
            f"`text_model` is {text_model!r}, which reads a CLIP tower's patches of one feature layer; the "
            f"vision tower is a {config.vision_config.model_type!r} and `vision_feature_layer` is "
            f"{config.vision_feature_layer}. "
            "Without `text_model` any tower will do."
        )
