"""What lmms-eval's `--model_args` say: a checkpoint, on a device, in one setting.

lmms-eval splits the text at commas that are in no brackets and makes numbers of what looks like one; what is left to
understand is budgets, reducers and stacks of them. Whatever is refused is refused before a data set is loaded.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from PIL import Image

from ...modeling.budget.schedule import StackBudget
from ...modeling.modeling_adavtp import AdaVTPForConditionalGeneration, ReducerSpec
from ...modeling.processing_adavtp import inputs_of_questions, takes_suffix
from ..settings import FULL, FULL_BUDGET, Setting, budget_of_text, exact_budget, reducer_of_text, tokens_per_image

# Pixels, of an image that is looked at before a data set is loaded.
_BLANK = (32, 32)

# What other models of lmms-eval take where a task says nothing.
DEFAULT_NEW_TOKENS = 1024


class AdaVTPModelArguments(lmms):
    """
    A checkpoint in one setting, as lmms-eval's `--model_args` describe it.

    Args:
        pretrained: folder or Hub repository of an AdaVTP checkpoint, of any family; or of a family's as it was
            released, which has no weights for a reducer that has to be trained.
        token_budget: fraction or number of visual tokens kept; for a stack also JSON, `{"tome": 0.5, "fastv": 0.6}`.
            By default the reducer's own rule, or the configuration's budget.
        reducer: as in `fastv:layer=2`; a stack in brackets, as in `[tome,adaptive]`; `full` for no reduction. By
            default the configuration's.
        device: of a single process, by default what accelerate picks; several processes get theirs from accelerate.
        device_map, dtype, attn_implementation, revision, trust_remote_code: as in `from_pretrained`.
        batch_size, max_new_tokens: requests that are answered together, and the limit where a task says none.
        num_frames: that are shown of a video file, evenly spread; by default what the checkpoint's processor takes.
        statistics: a file that gets a JSON line for every request; of several processes each has its own.

    Raises:
        ValueError: if an argument is not known or not allowed; the message names it and what is allowed.
        FileExistsError: if `statistics` is there already.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        token_budget: float | int | str | None = None,
        reducer: str | None = None,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        batch_size: int | str = 1,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        num_frames: int | None = None,
        trust_remote_code: bool = False,
        revision: str = "main",
        statistics: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown or pretrained is None:
            refused = f"unknown: {', '.join(map(repr, sorted(unknown)))}" if unknown else "`pretrained` is missing"
            allowed = [name for name in inspect.signature(AdaVTPModelArguments).parameters if name != "unknown"]
            raise ValueError(f"`model_args` of adavtp, {refused}; allowed are {', '.join(allowed)}.")
        self.batch_size = _positive("batch_size", batch_size)
        self.max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        self.num_frames = None if num_frames is None else _positive("num_frames", num_frames)
        given_budget, given_reducer = _budget(token_budget), None if reducer is None else _reducer(str(reducer))
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = _device(self.accelerator, device, device_map)
        of_hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        self._model = AdaVTPForConditionalGeneration.from_pretrained(
            pretrained,
            **of_hub,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device_map=self.device if device_map is None else device_map,
        ).eval()
        self.processor = self._model.processor_class.from_pretrained(pretrained, **of_hub)
        if takes_suffix(self.processor):
            raise ValueError(
                f"`pretrained` is {pretrained!r}, whose {type(self.processor).__name__} writes single questions about "
                "images and no chats, as lmms-eval's requests are. `adavtp evaluate` asks such questions."
            )
        if self.processor.chat_template is None:
            raise ValueError(
                f"`pretrained` is {pretrained!r}, whose processor has no chat template; lmms-eval's requests are "
                "questions, so set `processor.chat_template` and save the processor again."
            )
        self.setting = _setting(self._model, given_reducer, given_budget)
        blank = inputs_of_questions(self.processor, [[Image.new("RGB", _BLANK)]], ["?"]).to(self._model.device)
        if (reason := self.setting.unreachable(self._model, blank)) is not None:
            raise ValueError(reason)
        # Last, so that what is refused leaves no file behind.
        self.statistics = None if statistics is None else _new_file(Path(statistics), self._rank, self._world_size)


def _positive(name: str, value: Any) -> int:
    if not str(value).isdigit() or int(value) < 1:
        raise ValueError(f"`{name}` is {value!r}; allowed are whole numbers from 1.")
    return int(value)


def _budget(token_budget: Any) -> StackBudget | None:
    """A budget from model_args, of which numbers come as numbers."""
    if not isinstance(token_budget, str):
        return token_budget
    try:
        return json.loads(token_budget) if token_budget.startswith("{") else budget_of_text(token_budget)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"`token_budget` is {token_budget!r}; allowed are a fraction such as 0.4, a number of tokens, and for "
            'stacks JSON such as {"tome": 0.5, "fastv": 0.6}.'
        ) from error


def _reducer(text: str) -> ReducerSpec:
    """A reducer from model_args, which are split at commas, but not inside brackets."""
    try:
        return reducer_of_text(text[1:-1] if text.startswith("[") and text.endswith("]") else text)
    except ValueError as error:
        raise ValueError(
            f"`reducer` is {text!r}: {error} Or a stack in brackets, as in [tome,fastv:layer=2]."
        ) from error


def _device(accelerator: Accelerator, device: str | None, device_map: str | None) -> torch.device:
    if accelerator.num_processes == 1:
        return torch.device(device or accelerator.device)
    if device_map is not None:
        raise ValueError(
            f"`device_map` is {device_map!r} and there are {accelerator.num_processes} processes, each with a model "
            "on its own device; use one of the two."
        )
    if device is not None and torch.device(device).type != accelerator.device.type:
        raise ValueError(f"`device` is {device!r}, and accelerate gave this process {accelerator.device}.")
    return accelerator.device


def _new_file(path: Path, rank: int, world_size: int) -> Path:
    path = path.with_suffix(f".{rank}{path.suffix}") if world_size > 1 else path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError as error:
        raise FileExistsError(
            f"`statistics` is {str(path)!r}, and that is there already; name another file, or move it away."
        ) from error
    return path


def _setting(model: AdaVTPForConditionalGeneration, reducer: ReducerSpec | None, token_budget: Any) -> Setting:
    """The setting that was asked for."""
    if reducer == FULL and token_budget is None:
        token_budget = FULL_BUDGET
    token_budget = exact_budget(token_budget, tokens_per_image(model))
    setting = Setting(model.config.reducers if reducer is None else reducer, token_budget)
    setting.arguments()
    return setting
