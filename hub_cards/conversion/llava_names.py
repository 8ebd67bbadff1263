"""What LLaVA's tensors are called: in each published layout, and in an AdaVTP model.

Every name of a source either becomes one of the target's or is dropped for a reason that can be said in a few words;
a name that no rule knows is left as it is, and whoever compares it with the target's names finds it.
"""

import re
from dataclasses import dataclass
from typing import Literal

Layout = Literal["transformers", "llava_next", "original", "adapter", "clip"]

LANGUAGE, TOWER, PROJECTOR = "model.language_model.", "model.vision_tower.", "model.multi_modal_projector."

# Prefix in the source -> prefix in the target, the first that fits. transformers wrote the names without "model." in
# front up to version 4.51, and writes them still; from then on in memory it has those that begin with "model.".
_TRANSFORMERS = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", LANGUAGE),
    ("language_model.", LANGUAGE),
    ("vision_tower.vision_model.", TOWER),
    ("vision_tower.", TOWER),
    ("multi_modal_projector.", PROJECTOR),
    ("model.vision_tower.vision_model.", TOWER),
)
# Names of https://github.com/haotian-liu/LLaVA: the text model's own, with the visual parts inside.
_ORIGINAL = (
    ("model.mm_projector.0.", f"{PROJECTOR}linear_1."),
    ("model.mm_projector.2.", f"{PROJECTOR}linear_2."),
    ("model.vision_tower.vision_tower.vision_model.", TOWER),
    ("model.vision_tower.vision_tower.", TOWER),
    ("model.embed_tokens.", f"{LANGUAGE}embed_tokens."),
    ("model.layers.", f"{LANGUAGE}layers."),
    ("model.norm.", f"{LANGUAGE}norm."),
)
_PREFIXES: dict[Layout, tuple[tuple[str, str], ...]] = {
    "transformers": _TRANSFORMERS,
    "llava_next": _TRANSFORMERS,
    "original": _ORIGINAL,
    "adapter": _ORIGINAL,
    "clip": (("vision_model.", TOWER),),
}

_OF_THE_GRID = "separates rows of tiles, and one tile has no rows"
_OF_VIDEOS = "separates a video's frames"
_ADDED = "was added to the base's weight"
_OF_CLIP_TEXT = "belongs to CLIP's text side"
_COMPUTED = "a constant that is computed when the model is built"
_REASONS: tuple[tuple[str, tuple[Layout, ...], str], ...] = (
    (r"rotary_emb\.inv_freq$", ("transformers", "llava_next", "original", "adapter"), _COMPUTED),
    (r"embeddings\.position_ids$", ("transformers", "llava_next", "original", "adapter", "clip"), _COMPUTED),
    (r"^(model\.)?image_newline$", ("llava_next", "original", "adapter"), _OF_THE_GRID),
    (r"^model\.faster_token$", ("original", "adapter"), _OF_VIDEOS),
    (r"\.lora_[AB]\.weight$", ("adapter",), _ADDED),
    (r"^(text_model\..*|logit_scale|visual_projection\.weight|text_projection\.weight)$", ("clip",), _OF_CLIP_TEXT),
)


@dataclass(frozen=True)
class Dropped:
    """A tensor or a field of the source that the target has no use for, and why, in a few words."""

    name: str
    reason: str


def target_name(name: str, layout: Layout) -> str | Dropped:
    """
    What a tensor of a source is called in an AdaVTP model, or why it is dropped. The name is the target's only if the
    source is what it says it is.

    Args:
        name: in the source.
        layout: `"transformers"` (LLaVA), `"llava_next"`, `"original"` (LLaVA's own repository), `"adapter"` (what its
            training leaves without the language model) or `"clip"`.
    """
    if layout == "adapter":
        # PEFT's names for a model inside, and those for the whole of it.
        name = re.sub(r"^model\.(?=model\.|lm_head\.)", "", name.removeprefix("base_model."))
    for pattern, layouts, reason in _REASONS:
        if layout in layouts and re.search(pattern, name):
            return Dropped(name, reason)
    for prefix, replacement in _PREFIXES[layout]:
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name
