"""From a row of conversational data to what a batch is made of: token ids, targets, decoded images and videos.

In hundreds of thousands of rows some images are cut off, some files are missing and some conversations do not fit.
Such a row is rejected with its id and a reason that says what to do, and is never repaired, shortened or passed over
in silence. How long a row is can be asked before any image is decoded.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from jinja2 import TemplateError
from transformers import ProcessorMixin

from ...modeling.budget.token_budget import num_tokens_to_keep
from ...modeling.processing_adavtp import AdaVTPProcessor
from ...tasks.stored_images import decoded_image, image_size
from ...tasks.stored_videos import Clip, clip_of_nothing, frame_sampler, keeps_videos_apart, stored_clip
from .chat_template import content_parts, conversation_text, count_tokens, encode_conversation
from .image_tokens import tokens_of_any_image
from .processed import processed_lengths

Row = dict[str, Any]
Result = TypeVar("Result")


class RejectedSample(ValueError):
    """A row that cannot be trained on: its `id`, the `reason`, and what that is about."""

    def __init__(
        self, id: str, reason: str, kind: Literal["conversation", "image", "video", "length"] = "conversation"
    ) -> None:
        super().__init__(f"Sample {id!r}: {reason}")
        self.id, self.reason, self.kind = id, reason, kind

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # A data loader's workers hand exceptions over pickled, and by default that keeps the message alone.
        return type(self), (self.id, self.reason, self.kind)


class ConversationReader:
    """
    Reads rows with the columns `id`, `images`, `videos` and `messages`, as [`load_conversations`] gives them. Where a
    row has an `image_folder`, an image or a video whose path leads out of it is refused.

    Args:
        processor: tokenizer, image processor and chat template. AdaVTP's makes images of one size; in other families
            an image's size says how many tokens it is, and a video's size and frames.
        max_length: tokens that a row may have at most, counted at full budget; `None` for no limit.

    Raises:
        ValueError: if `max_length` is below 1, or the number of an image's tokens depends on the image.
    """

    def __init__(self, processor: ProcessorMixin, max_length: int | None = None) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"`max_length` is {max_length}; allowed are whole numbers from 1, or None for no limit.")
        self.processor, self.max_length = processor, max_length
        # Of any image; `None` where it depends on the image.
        self.image_tokens = tokens_of_any_image(processor) if isinstance(processor, AdaVTPProcessor) else None
        self.reads_videos = getattr(processor, "video_processor", None) is not None
        self._of_looks: dict[tuple[Any, ...], tuple[int, int]] = {}

    def lengths(self, row: Row) -> tuple[int, int]:
        """
        How long a row is: the number of tokens that are not an image's, and the number of images, of which none is
        opened; or where images differ, of their visual tokens and those of videos, for which their sizes are looked
        up.

        Raises:
            RejectedSample: for what can be seen without opening images.
        """
        num_images, _ = given = self._num_given(row)
        num_text_tokens, *shown = self._in_template(row, count_tokens, row["messages"])
        num_text_tokens, num_visual = self._require_fit(row, num_text_tokens, tuple(shown), given)
        return num_text_tokens, num_images if self.image_tokens is not None else num_visual

    def lengths_at(self, lengths: torch.Tensor, budgets: torch.Tensor) -> torch.Tensor:
        """
        How long rows are in the decoder.

        Args:
            lengths: `[num_rows, 2]`, as [`lengths`] gives them.
            budgets: `[..., num_rows]`.

        Returns:
            `[..., num_rows]` int64. Where images differ, those of a row, and its videos, are taken for one.
        """
        num_text_tokens, counted = lengths.unbind(-1)
        if self.image_tokens is None:
            return num_text_tokens + (budgets.double() * counted).floor().long()
        num_visual, num_other = self.image_tokens
        num_kept = num_tokens_to_keep(budgets.flatten(), num_visual, budgets.numel()).view_as(budgets)
        return num_text_tokens + counted * (num_kept + num_other)

    def read(self, row: Row) -> Row:
        """
        Encodes a row and decodes its images.

        Returns:
            `id`; `images`, PIL, and `videos`, clips, in the order of their placeholders; and `input_ids`, with every
            image's placeholders at full budget, and `labels` (see [`encode_conversation`]), or where images differ
            `text` and `turns` (see [`conversation_text`]).

        Raises:
            RejectedSample: if the conversation cannot be read, its images and its placeholders do not agree, it has
                more than `max_length` tokens, or an image or a video is missing or broken.
        """
        given = self._num_given(row)
        if self.image_tokens is None:
            self.lengths(row)
            encoded = self._in_template(row, conversation_text, row["messages"])
        else:
            num_placeholders = self.image_tokens.num_placeholders
            encoded = self._in_template(row, encode_conversation, row["messages"], num_placeholders)
            num_visual = encoded.input_ids.count(self.processor.image_token_id)
            num_text_tokens = len(encoded.input_ids) - num_visual
            self._require_fit(row, num_text_tokens, (num_visual // num_placeholders, 0), given)
        return {
            "id": _id(row),
            **encoded._asdict(),
            "images": self._decoded(row, "image", decoded_image),
            "videos": self._decoded(row, "video", self._clip),
        }

    def _num_given(self, row: Row) -> tuple[int, int]:
        """The numbers of a row's images and videos, if it is a conversation that shows as many."""
        given = {kind: len(_given(row, kind)) for kind in ("image", "video")}
        if problem := row.get("problem") or _problem(row["messages"], given):
            raise RejectedSample(_id(row), problem)
        name = type(self.processor).__name__
        if given["video"] and not self.reads_videos:
            raise RejectedSample(_id(row), f"the row has a video, and {name} reads none; show frames as images")
        if all(given.values()) and keeps_videos_apart(self.processor):
            raise RejectedSample(_id(row), f"the row has images and videos, and {name} gives one or the other")
        return given["image"], given["video"]

    def _in_template(self, row: Row, take: Callable[..., Result], *arguments: Any) -> Result:
        try:
            return take(self.processor, *arguments)
        except (TemplateError, ValueError) as error:
            raise RejectedSample(_id(row), f"the conversation does not fit the chat template: {error}") from error

    def _decoded(self, row: Row, kind: str, take: Callable[..., Result]) -> list[Result]:
        """What `take` makes of each of a row's images or videos, and of the folder that they lie in."""
        taken = []
        for number, given in enumerate(_given(row, kind)):
            try:
                taken.append(take(given, row.get("image_folder")))
            except (OSError, ValueError) as error:
                place = given.get("path") if isinstance(given, dict) else None
                where = f"{kind}s[{number}] ({place[:200]})" if place else f"{kind}s[{number}]"
                reason = f"{where}: {str(error).removeprefix('`images[0]` ')}"
                raise RejectedSample(_id(row), reason, kind) from error
        return taken

    def _clip(self, video: Any, folder: str | None) -> Clip:
        return stored_clip(video, frame_sampler(self.processor), folder)

    def _clip_of_nothing(self, video: Any, folder: str | None) -> Clip:
        return clip_of_nothing(video, frame_sampler(self.processor), folder)

    def _require_fit(
        self, row: Row, num_text_tokens: int, shown: tuple[int, int], given: tuple[int, int]
    ) -> tuple[int, int]:
        """The tokens of a row that are no visual ones, and those that are."""
        for kind, num_shown, num_given in zip(("image", "video"), shown, given, strict=True):
            if num_shown != num_given:
                token = getattr(self.processor, f"{kind}_token")
                raise RejectedSample(
                    _id(row),
                    f"the conversation in the chat template shows {num_shown} {kind}(s) and the row has {num_given}; "
                    f"a text may not have {token!r} in it, and the template has to print every {kind}",
                )
        if self.image_tokens is None:
            marks, num_visual = self._in_visuals(row)
            num_text_tokens += marks
        else:
            num_visual = given[0] * self.image_tokens.num_placeholders
        if self.max_length is not None and num_text_tokens + num_visual > self.max_length:
            raise RejectedSample(
                _id(row),
                f"{num_text_tokens + num_visual} tokens, {num_visual} of them visual, are more than `max_length`, "
                f"{self.max_length}",
                "length",
            )
        return num_text_tokens, num_visual

    def _in_visuals(self, row: Row) -> tuple[int, int]:
        """Marks and placeholders of a row's images and videos."""
        sizes = tuple(self._decoded(row, "image", image_size))
        clips = self._decoded(row, "video", self._clip_of_nothing)
        looks = (sizes, tuple(clip.looks for clip in clips))
        if looks not in self._of_looks:
            self._of_looks[looks] = processed_lengths(self.processor, sizes, clips)
        return self._of_looks[looks]


def _id(row: Row) -> str:
    return str(row.get("id", "without id"))


def _given(row: Row, kind: str) -> list[Any]:
    """A row's images or videos."""
    # A data set that keeps one image in a column has None there for a row without one.
    return [given for given in row.get(f"{kind}s") or [] if given is not None]


def _problem(messages: list[Row] | None, given: dict[str, int]) -> str | None:
    """What is wrong with a conversation apart from its words, or `None`; `given` are its images and videos."""
    if not messages:
        return "there are no messages"
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if turns != [("user", "assistant")[index % 2] for index in range(len(turns))]:
        shown = roles if len(roles) <= 8 else [*roles[:8], "..."]
        return f"the turns are {', '.join(shown)}; user and assistant take turns, the user first"
    if "assistant" not in roles:
        return "the assistant says nothing, so that there is nothing to learn"
    for kind, number in given.items():
        shown = Counter(m["role"] for m in messages for part in content_parts(m) if part["type"] == kind)
        if others := sorted(set(shown) - {"user"}):
            article = "an" if kind == "image" else "a"
            return f"{article} {kind} is shown by {' and '.join(others)}; only the user shows {kind}s"
        if shown["user"] != number:
            return f"the messages show {shown['user']} {kind}(s) and the row has {number}"
    for message in messages:
        texts = [part["text"] for part in content_parts(message) if part["type"] == "text"]
        if message["role"] == "assistant" and not "".join(texts).strip():
            return "a turn of the assistant's is empty, so that there is nothing to learn but to say nothing"
    return None
