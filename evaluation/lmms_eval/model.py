"""AdaVTP as a model of lmms-eval: `lmms-eval --model adavtp --model_args pretrained=...,token_budget=0.4,...`.

lmms-eval finds [`manifest`] through the entry point `lmms_eval.models` and imports this module; nothing else does. A
request comes in one of two forms: as a chat, a list of turns that hold their images, or simply, as a text and a list
of images and video files. Both become prompts through the checkpoint's own chat template. What each request cost goes
into the harness's own token counts and throughput, and line by line into a file (`statistics=PATH`).
"""

import json
import mimetypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby, islice
from statistics import fmean
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts, unwrap_generation_output
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL.Image import Image
from tqdm import tqdm
from transformers import GenerationConfig

from ...tasks.stored_videos import Clip, frame_sampler, stored_clip
from ..continuations import generate_continuations, score_continuations
from ..prompt_costs import PromptCost
from ..settings import reducer_label
from .arguments import AdaVTPModelArguments


def manifest() -> ModelManifest:
    """What lmms-eval's registry is told: one name, two forms. `--force_simple` picks the simple one."""
    return ModelManifest(
        model_id="adavtp",
        simple_class_path=f"{__name__}.AdaVTPSimple",
        chat_class_path=f"{__name__}.AdaVTPChat",
    )


class AdaVTPRequests(AdaVTPModelArguments):
    """
    What both forms share: batches of prompts, however they were asked. A form says how a request is read:

    - `generation(request)`: the task's `generation_kwargs`;
    - `messages(request)`: the turns of a request in the form of chat templates, images in them;
    - `next_round(request, outputs, number, info)`: the turns of a later round, or `None` after the last; the outputs
      so far; and what the task wants to know.
    """

    def document(self, request: Instance) -> dict[str, Any]:
        """The row of the data set that a request is about."""
        doc_id, task, split = request.args[-3:]
        return self.task_dict[task][split][doc_id]

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The model's answers, in the order of the requests."""
        # Images are opened batch by batch: a benchmark's may not fit into memory.
        return self._answers(requests, lambda index: self.messages(requests[index]))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """For every request the answers of its rounds. A round's prompt is what the task says it is, nothing more."""
        outputs, infos = [[] for _ in requests], [None] * len(requests)
        turns = {index: self.messages(request) for index, request in enumerate(requests)}
        number = 0
        while turns:
            asked = list(turns)
            answers = self._answers([requests[index] for index in asked], list(turns.values()).__getitem__, number)
            number += 1
            for index, answer in zip(asked, answers, strict=True):
                said = [*outputs[index], answer.text]
                turns[index], outputs[index], infos[index] = self.next_round(
                    requests[index], said, number, infos[index]
                )
            turns = {index: messages for index, messages in turns.items() if messages is not None}
        return outputs

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """
        How likely every continuation is, and whether the model would say it itself.

        lmms-eval takes the choice with the least first number, since its models return losses (its issue 370). So
        that is the negative log-likelihood here, the sum over tokens; the file of statistics has it unnegated.
        """
        results: list[Any] = [None] * len(requests)
        for batch in self._batches(requests, [{}] * len(requests)):
            chosen = [requests[index] for index in batch]
            messages = [_turns(self.visuals(request), request.args[0]) for request in chosen]
            prompts, images, videos = zip(*map(self._prompt, messages), strict=True)
            continuations = [
                self._continuation(*row) for row in zip(messages, prompts, map(self._target, chosen), strict=True)
            ]
            scored = score_continuations(
                self._model, self.processor, prompts, continuations, images, self.setting, videos
            )
            for index, request, one in zip(batch, chosen, scored, strict=True):
                results[index] = _as_response((-one.log_likelihood, one.is_greedy), one.cost)
                self._write(request, one.cost, log_likelihood=one.log_likelihood)
        return results

    def visuals(self, request: Instance) -> list[Any] | None:
        """The images of a `loglikelihood` request, which has one form only."""
        return request.args[2](self.document(request))

    def _target(self, request: Instance) -> str:
        target = request.args[1]
        return target if isinstance(target, str) else str(target(self.document(request)))

    def _answers(
        self, requests: list[Instance], messages: Callable[[int], list[dict[str, Any]]], number: int = 0
    ) -> list[GenerationResult]:
        """Answers to requests, whose turns `messages` says by their place."""
        results, costs = [None] * len(requests), []
        generations = [self.generation(request) for request in requests]
        for batch in self._batches(requests, generations):
            prompts, images, videos = zip(*(self._prompt(messages(index)) for index in batch), strict=True)
            arguments, stop = generation_arguments(generations[batch[0]], self.max_new_tokens)
            generated = generate_continuations(
                self._model, self.processor, prompts, images, self.setting, stop, videos, **arguments
            )
            for index, one in zip(batch, generated, strict=True):
                results[index] = GenerationResult(one.text, _token_counts(one.cost))
                self._write(requests[index], one.cost, round=number, prediction=one.text)
                costs.append(one.cost)
        _log_throughput(costs)
        return results

    def _batches(self, requests: list[Instance], generations: list[dict[str, Any]]) -> Iterator[list[int]]:
        """Places of requests that go together: of the same `generation_kwargs`, the longest questions first."""
        keys = [json.dumps(generation, sort_keys=True, default=str) for generation in generations]
        lengths = [len(self.processor.tokenizer(request.args[0]).input_ids) for request in requests]
        order = sorted(range(len(requests)), key=lambda index: (keys[index], -lengths[index]))
        progress = tqdm(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        for _, group in groupby(order, key=lambda index: keys[index]):
            while batch := list(islice(group, self.batch_size)):
                yield batch
                progress.update(len(batch))
        progress.close()

    def _prompt(self, messages: list[dict[str, Any]]) -> tuple[str, list[Any], list[Clip]]:
        """Turns as a prompt, with a placeholder for each image and video, the images, and the videos."""
        parts = [part for turn in messages for part in turn["content"]]
        images = [part["image"] for part in parts if part["type"] == "image"]
        videos = [self._clip(part) for part in parts if part["type"] == "video"]
        return self._rendered(messages, add_generation_prompt=True), images, videos

    def _clip(self, part: dict[str, Any]) -> Clip:
        """A video that a task shows as the name of a file, or as frames."""
        video, more = part["video"], sorted(set(part) - {"type", "video"})
        if more:
            raise ValueError(f"A task shows a part of a video, by {', '.join(more)}; adavtp shows whole ones.")
        if getattr(self.processor, "video_processor", None) is None:
            raise ValueError(f"A task shows a video, and {type(self.processor).__name__} reads none.")
        stored = {"path": video} if isinstance(video, str) else video
        try:
            return stored_clip(stored, frame_sampler(self.processor, self.num_frames))
        except (OSError, ValueError) as error:
            raise ValueError(f"A task shows the video {repr(video)[:200]}: {error}") from error

    def _continuation(self, messages: list[dict[str, Any]], prompt: str, target: str) -> str:
        """A target as the assistant would say it after a prompt, with the space between them that the template has."""
        said = {"role": "assistant", "content": [{"type": "text", "text": target.strip()}]}
        whole = self._rendered([*messages, said], continue_final_message=True)
        if not whole.startswith(prompt):
            raise ValueError(
                f"The chat template of {self._model.name_or_path!r} does not begin an answer as its generation prompt "
                f"does, so no continuation can be scored: {whole[-80:]!r} against {prompt[-80:]!r}."
            )
        return whole[len(prompt) :]

    def _rendered(self, messages: list[dict[str, Any]], **arguments: Any) -> str:
        text = "".join(part.get("text", "") for turn in messages for part in turn["content"])
        # Some tasks write the placeholders into the question, where each image or video belongs.
        tokens = {kind: getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video")}
        written = [kind for kind, token in tokens.items() if token is not None and token in text]
        turns = [
            {
                "role": turn["role"],
                "content": [
                    part if part["type"] == "text" else {"type": part["type"]}
                    for part in turn["content"]
                    if part["type"] not in written
                ],
            }
            for turn in messages
        ]
        text = self.processor.apply_chat_template(turns, tokenize=False, **arguments)
        tokenizer = self.processor.tokenizer
        # Where the tokenizer begins every text with BOS, a template that writes it too would make it two.
        adds_bos = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return text.removeprefix(tokenizer.bos_token) if adds_bos else text

    def _write(self, request: Instance, cost: PromptCost, **more: Any) -> None:
        """Adds a line to the file of statistics. Requests that only fill up a process's share are none."""
        if self.statistics is None or request.metadata.get("__padding_only__"):
            return
        row = {"task": request.task_name, "doc_id": request.doc_id, "idx": request.idx, "type": request.request_type}
        row |= {"reducer": reducer_label(self.setting.reducer), "budget": self.setting.budget}
        row |= asdict(cost)
        row["ms"] = row.pop("milliseconds")
        with self.statistics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | more, ensure_ascii=False) + "\n")


class AdaVTPChat(AdaVTPRequests):
    """Requests are chats: `(context, doc_to_messages, generation_kwargs, doc_id, task, split)`."""

    is_simple = False

    def generation(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        return self._turns(request, request.args[1](self.document(request)))

    def next_round(
        self, request: Instance, outputs: list[str], number: int, info: Any
    ) -> tuple[list[dict[str, Any]] | None, list[str], Any]:
        payload = request.args[1](
            self.document(request), round_idx=number, previous_output=list(outputs), previous_round_info=info
        )
        if not isinstance(payload, tuple) or payload[1]:
            return None, outputs, info
        return self._turns(request, payload[0]), outputs, payload[3]

    def _turns(self, request: Instance, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        turns = ChatMessages(messages=messages).to_hf_messages()
        kinds = {part["type"] for turn in turns for part in turn["content"]} - {"text", "image", "video"}
        if kinds:
            raise ValueError(
                f"Task {request.task_name!r} shows {', '.join(sorted(kinds))}; adavtp looks at images and videos."
            )
        return turns


class AdaVTPSimple(AdaVTPRequests):
    """
    Requests are a text and images or video files: `(context, generation_kwargs, doc_to_visual, ..., doc_id, task,
    split)`.
    """

    is_simple = True

    def generation(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def messages(self, request: Instance) -> list[dict[str, Any]]:
        return _turns(self.visuals(request), request.args[0])

    def next_round(
        self, request: Instance, outputs: list[str], number: int, info: Any
    ) -> tuple[list[dict[str, Any]] | None, list[str], Any]:
        visuals, text, is_over, outputs, info = request.args[3](
            self.document(request), previous_output=list(outputs), round_idx=number, previous_round_info=info
        )
        return None if is_over else _turns(visuals, text), list(outputs), info


def generation_arguments(generation: dict[str, Any], max_new_tokens: int) -> tuple[dict[str, Any], list[str]]:
    """
    A task's `generation_kwargs` as arguments of `generate`, and the strings at which a continuation ends.

    As with other models of lmms-eval, a temperature above 0 means sampling and 0 means none. What is not of
    `generate` (other models have options of their own there) is left out with a warning.

    Raises:
        ValueError: if a stop string is none, or a setting of the model is among the arguments.
    """
    given = dict(generation)
    stop = given.pop("until", None) or []
    stop = [stop] if isinstance(stop, str) else list(stop)
    if not all(isinstance(string, str) and string for string in stop):
        raise ValueError(f"`until` is {generation['until']!r}; allowed are strings that are not empty.")
    if misplaced := {"token_budget", "reducer"} & given.keys():
        raise ValueError(f"`gen_kwargs` has {sorted(misplaced)}; these belong into `model_args`.")
    if foreign := sorted(name for name in given if not hasattr(GenerationConfig(), name)):
        logger.warning(f"`generation_kwargs` has {foreign}, which `generate` does not know; left out.")
    arguments = {"max_new_tokens": max_new_tokens, "num_beams": 1}
    arguments |= {name: value for name, value in given.items() if name not in foreign and value is not None}
    temperature = arguments.get("temperature")
    arguments["do_sample"] = arguments.get("do_sample", temperature is not None) is True and temperature != 0
    if not arguments["do_sample"]:
        # Those of sampling, from the task or from the checkpoint, mean nothing without it.
        arguments |= {"temperature": None, "top_p": None, "top_k": None}
    return arguments, stop


def _turns(visuals: Sequence[Any] | None, text: str) -> list[dict[str, Any]]:
    """One question about images, which a task may show as PIL images or paths, and videos, by their paths."""
    content = []
    for visual in visuals or []:
        kind = (mimetypes.guess_type(visual)[0] or "image").split("/")[0] if isinstance(visual, str) else "image"
        if kind not in ("image", "video") or not isinstance(visual, str | Image):
            shown = repr(visual) if isinstance(visual, str) else type(visual).__name__
            raise ValueError(f"A task shows {shown}; adavtp looks at images, PIL or paths, and at paths of videos.")
        content.append({"type": kind, kind: visual})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _token_counts(cost: PromptCost) -> TokenCounts:
    """Input tokens are those that a decoder layer saw, mean over layers."""
    return TokenCounts(input_tokens=round(cost.seen_tokens), output_tokens=cost.new_tokens)


def _as_response(response: tuple[float, bool], cost: PromptCost) -> Any:
    """A pair as lmms-eval takes it: version 0.7.3 makes strings of pairs that are not wrapped."""
    if unwrap_generation_output(response)[0] == response:
        return response
    return GenerationResult(response, _token_counts(cost))


def _log_throughput(costs: Sequence[PromptCost]) -> None:
    """Hands lmms-eval what it writes as `throughput` into its results."""
    if not costs:
        return
    seconds, tokens = sum(cost.milliseconds for cost in costs) / 1000, sum(cost.new_tokens for cost in costs)
    more = {"num_requests": len(costs), "visual_tokens": fmean(cost.visual_tokens for cost in costs)}
    counted = [cost.flops for cost in costs if cost.flops is not None]
    if len(counted) == len(costs):
        more["flops"] = fmean(counted)
    log_metrics(seconds, tokens, tokens / seconds, more)
