"""A question about an image, answered at a token budget: the answer, what was kept for it, and what it cost.

The checkpoint brings its own code, so this file knows a model only by what it does: `generate` takes a budget, and
hands back the selection that it answered with. Picture and cost are read off that selection. Only the time is taken
again where an answer is quick, since one reading of a short time says little.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import metadata_load
from PIL import Image
from transformers import AutoModel, PreTrainedConfig

MAX_NEW_TOKENS = 64

# Offered beside the checkpoint's own where the model can be asked for them; none of these has to be trained.
UNTRAINED_REDUCERS = ("divprune", "visionzip", "tome", "fastv", "random", "grid")

# At the full budget a reducer is not asked; this one reads nothing, so that nothing is prepared for it either.
NEVER_ASKED = "grid"
FULL_BUDGET = 1.0

# Seconds; the same answer is timed again until these are over.
TIMED_FOR = 0.2

# Pixels, of the image that is looked at before anybody asks, where a model takes images of any size.
ANY_SIZE = 224

# Language models of other families than LLaVA whose prefill is what `prefill_flops` says.
COUNTED_KINDS = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")

# Pixels, how high a picture is at least, and at most.
PICTURE_HEIGHT, MOST_HEIGHT = 480, 960


def checkpoint_name() -> str:
    """Folder or Hub repository of the checkpoint that answers."""
    return os.environ.get("ADAVTP_CHECKPOINT") or metadata_load(Path(__file__).with_name("README.md"))["models"][0]


@dataclass(frozen=True)
class Look:
    """
    One answer. Tokens are those that a decoder layer sees in prefill, mean over layers; `picture` is the image as the
    model was shown it, what it did not see darkened, and `None` where it is not looked at again; `prefill_flops` are
    the language model's on the prompt, `None` for kinds that are not counted here. The time goes from pixels and token
    ids to the whole answer, vision tower and reducer included: the median of `num_timed`.
    """

    answer: str
    picture: Image.Image | None
    visual_tokens: float
    prompt_tokens: float
    prefill_flops: int | None
    new_tokens: int
    milliseconds: float
    num_timed: int


class Checkpoint:
    """A model, whose code is run, and its processor: on the GPU in bfloat16 where there is one, else on the CPU."""

    def __init__(self, name: str) -> None:
        device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.name = name
        self.model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=dtype).to(device).eval()
        self.processor = self.model.processor
        # Of other families images may have any size, and N is an image's own.
        self.is_llava = hasattr(self.processor, "of_questions")
        size = self.model.config.vision_config.image_size if self.is_llava else ANY_SIZE
        nothing = Image.new("RGB", (size, size)), "What is this?"
        # The first answer of a process takes longer than any other.
        whole = self.look(*nothing, FULL_BUDGET, NEVER_ASKED)
        # Visual tokens of an image before reduction, N, where all have equally many.
        self.num_patches = round(whole.visual_tokens) if self.is_llava else None
        self.reducers = self._reducers(self._inputs(*nothing))

    @property
    def shown_name(self) -> str:
        """The repository, or the folder without where it lies."""
        return Path(self.name).name if Path(self.name).is_dir() else self.name

    @property
    def device(self) -> str:
        """What the times are of."""
        return torch.cuda.get_device_name() if self.model.device.type == "cuda" else "CPU"

    def _inputs(self, image: Image.Image, question: str) -> Any:
        """What the model takes; `ValueError` where a question has what only a prompt may have, or is too long."""
        tokens = self.processor.tokenizer.added_tokens_decoder.values()
        reserved = [
            getattr(self.processor, "image_token", "<image>"),
            *(token.content for token in tokens if token.special),
        ]
        if found := [token for token in reserved if token in question]:
            raise ValueError(
                f"The question has {found[0]}, which stands for something else in a prompt. Leave it out."
            )
        make = self.processor.of_questions if self.is_llava else self.model.inputs_of_questions
        inputs = make(image, question)
        length = inputs["input_ids"].shape[1]
        most = getattr(self.model.config.text_config, "max_position_embeddings", None)
        if most is not None and length + MAX_NEW_TOKENS > most:
            raise ValueError(
                f"The question is too long: with the image it makes {length} tokens, and this model reads at most "
                f"{most - MAX_NEW_TOKENS}."
            )
        return inputs.to(self.model.device, self.model.dtype)

    @torch.no_grad()
    def _reducers(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """How each reducer that can be chosen is called, and how it is asked for; the checkpoint's own is first."""
        config = self.model.config
        own = [_name_of(entry) for entry in config.reducers]
        others = [_name_of(entry) for entry in config.trained_reducers] + list(UNTRAINED_REDUCERS)
        can_be_asked = [
            name
            for name in others
            if [name] != own and not self.model.unreachable(**inputs, token_budget=FULL_BUDGET, reducer=name)
        ]
        return {" + ".join(own): config.reducers} | {name: name for name in can_be_asked}

    @torch.no_grad()
    def look(self, image: Image.Image, question: str, budget: float, reducer: Any) -> Look:
        """
        Answers a question, with a fraction of the visual tokens kept by a reducer, as `generate` takes it.

        Raises:
            ValueError: if image, question or budget are not allowed, or the reducer cannot reach the budget.
        """
        inputs = self._inputs(image, question)
        outputs, seconds = self._timed(inputs, token_budget=budget, reducer=reducer)
        prompt_length = inputs["input_ids"].shape[1]
        new_ids = outputs.sequences[0, prompt_length:]
        text_config = self.model.config.text_config
        selection = outputs["selection"]
        depth = layers_that_see(selection, text_config.num_hidden_layers)
        depth = (depth[0] if self.is_llava else depth[selection.is_token]).cpu()
        # What no layer drops: text, and what stands between visual tokens.
        num_others = prompt_length - len(depth)
        columns = [num_others + int((depth > layer).sum()) for layer in range(text_config.num_hidden_layers)]
        mean_columns = sum(columns) / len(columns)
        heights = {"least_height": PICTURE_HEIGHT, "most_height": MOST_HEIGHT}
        return Look(
            answer=self.processor.decode(new_ids, skip_special_tokens=True).strip(),
            picture=self.model.picture_of_kept(image, question, selection, **heights),
            visual_tokens=mean_columns - num_others,
            prompt_tokens=mean_columns,
            prefill_flops=prefill_flops(text_config, columns) if self._is_counted else None,
            new_tokens=len(new_ids),
            milliseconds=1000 * statistics.median(seconds),
            num_timed=len(seconds),
        )

    def _timed(self, inputs: dict[str, torch.Tensor], **choice: Any) -> tuple[Any, list[float]]:
        """What `generate` hands back, and how long that took, each time."""
        greedy = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "return_dict_in_generate": True}
        seconds = []
        while sum(seconds) < TIMED_FOR:
            start = _now(self.model.device)
            outputs = self.model.generate(**inputs, **choice, **greedy)
            seconds.append(_now(self.model.device) - start)
        return outputs, seconds

    @property
    def _is_counted(self) -> bool:
        return self.is_llava or self.model.config.text_config.model_type in COUNTED_KINDS


def _name_of(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else entry["name"]


def _now(device: torch.device) -> float:
    """Seconds; on a GPU once it has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def layers_that_see(selection: Any, num_layers: int) -> torch.Tensor:
    """`[num_images, num_patches]` int64: how many decoder layers see each patch of what `generate` hands back."""
    return selection.keep.long() * num_layers if selection.depth is None else selection.depth


def prefill_flops(text_config: PreTrainedConfig, columns: Sequence[int]) -> int:
    """
    What a language model of the Llama, Mistral, Qwen2 or Qwen3 kind computes on a prompt, 1 multiply-add as 2 FLOPs.

    A layer with n columns, text and visual tokens: queries and outputs 4 n D Q, keys and values 4 n D P, attention
    4 n n Q, and three matrices of the gated MLP 6 n D M. D, Q, P and M are the widths of the model, of all queries, of
    all keys and of the MLP. Behind the layers stands the head on one column, 2 D V for V words.
    """
    width = text_config.hidden_size
    head_dim = getattr(text_config, "head_dim", None) or width // text_config.num_attention_heads
    queries, keys = head_dim * text_config.num_attention_heads, head_dim * text_config.num_key_value_heads
    per_column = 4 * width * queries + 4 * width * keys + 6 * width * text_config.intermediate_size
    layers = sum(n * per_column + 4 * n * n * queries for n in columns)
    return layers + 2 * width * text_config.vocab_size
