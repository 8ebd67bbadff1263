"""A conversation in the chat template, as token ids with targets on the assistant's turns alone."""

from bisect import bisect_right
from os.path import commonprefix
from typing import Any, NamedTuple

from transformers import BatchEncoding, ProcessorMixin

from ...modeling.processing_adavtp import prefix_of, takes_suffix

IGNORED = -100

Message = dict[str, Any]


class ConversationText(NamedTuple):
    """
    Attributes:
        text: a conversation in the chat template, an image or a video as one placeholder; for a processor that
            [`takes_suffix`], prefix and suffix without what it adds.
        turns: of every answer, its first character in the text and the one behind its last.
    """

    text: str
    turns: list[tuple[int, int]]


class EncodedConversation(NamedTuple):
    """
    Attributes:
        input_ids: token ids, with every image's placeholders.
        labels: the same length; the token where the assistant speaks, -100 elsewhere.
    """

    input_ids: list[int]
    labels: list[int]


def conversation_text(processor: ProcessorMixin, messages: list[Message]) -> ConversationText:
    """
    Puts a conversation into the processor's chat template and finds the assistant's turns in it.

    A turn is what the template adds when the assistant's message follows the prompt that asks for it, up to the last
    mark that it writes; where its answers do not begin as the prompt ends (LLaVA-OneVision's), from the first word on.
    Markers of generation in the template are not asked: of many they leave out the end, without which a model does not
    learn to stop, and most templates have none. One that writes no end of sequence behind the last turn gets one here.

    Args:
        processor: with a chat template and a fast tokenizer.
        messages: `[{"role": "user" | "assistant" | "system", "content": [...]}, ...]`; a string is one text.

    Raises:
        ValueError: if the conversation is empty or begins with the assistant, or has a template that leaves out a
            system prompt, or rewrites earlier turns when later ones are added, so that turns cannot be told apart; or
            if it is more than one question and an answer and the processor [`takes_suffix`].
    """
    messages = _in_parts(messages)
    if takes_suffix(processor):
        prefix, suffix = _prefix_and_suffix(processor, messages)
        return ConversationText(prefix + suffix, [(len(prefix), len(prefix + suffix))])
    text = _text(processor, messages)
    return ConversationText(text, _turns(processor, messages, text))


def encode_conversation(
    processor: ProcessorMixin, messages: list[Message], num_image_tokens: int
) -> EncodedConversation:
    """
    The tokens of [`conversation_text`], with the assistant's turns as targets. No image is needed. Where the template
    writes no beginning of sequence, the tokenizer adds its own, as it does for a prompt.

    Args:
        processor, messages: see [`conversation_text`].
        num_image_tokens: placeholder tokens of one image, 0 where there are no images.

    Raises:
        ValueError: see [`conversation_text`]; or if images are shown that have no placeholder tokens.
    """
    text, turns = conversation_text(processor, messages)
    if processor.image_token in text and num_image_tokens < 1:
        raise ValueError(f"`messages` shows an image and none was given with it: {text!r}.")
    tokens = _tokens(processor, text, return_offsets_mapping=True)
    begins = [begin for begin, _ in turns]
    input_ids, labels = [], []
    for token, (start, stop) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        if token == processor.image_token_id:
            input_ids += [token] * num_image_tokens
            labels += [IGNORED] * num_image_tokens
            continue
        turn = bisect_right(begins, start) - 1
        input_ids.append(token)
        labels.append(token if turn >= 0 and start < stop <= turns[turn][1] else IGNORED)
    return EncodedConversation(input_ids, labels)


def count_tokens(processor: ProcessorMixin, messages: list[Message]) -> tuple[int, int, int]:
    """
    How long a conversation is, in less time than [`encode_conversation`] takes, with the same arguments.

    Returns:
        The number of tokens that are no image's or video's placeholders, and the number of images and of videos that
        have some. What a processor that [`takes_suffix`] adds to a prefix is counted with its images.
    """
    if takes_suffix(processor):
        prefix, suffix = _prefix_and_suffix(processor, _in_parts(messages))
        question, special = prefix.replace(processor.image_token, ""), processor.tokenizer.special_tokens_map
        written = [f"{special['bos_token']}{question}\n", f"{special['bos_token']}\n", suffix + special["eos_token"]]
        prefixed, added, answer = map(len, processor.tokenizer(written, add_special_tokens=False)["input_ids"])
        return prefixed - added + answer, prefix.count(processor.image_token), 0
    text = _text(processor, _in_parts(messages))
    num_images, num_videos = places_shown(processor, text).values()
    return len(_tokens(processor, text)["input_ids"]) - num_images - num_videos, num_images, num_videos


def places_shown(processor: ProcessorMixin, text: str) -> dict[str, int]:
    """Placeholders of images and of videos in a conversation in the chat template, by kind."""
    tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
    return {kind: 0 if token is None else text.count(token) for kind, token in tokens.items()}


def content_parts(message: Message) -> list[dict[str, Any]]:
    """
    A message's content as parts without empty fields: LLaVA's template prints nothing of a string, and `datasets`
    gives every part the fields of all, of which a template would print an image's empty text.
    """
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return [{key: value for key, value in part.items() if value is not None} for part in parts]


def _in_parts(messages: list[Message]) -> list[Message]:
    if not messages or messages[0]["role"] == "assistant":
        raise ValueError(
            f"`messages` is {messages!r}; a conversation begins with a message of the user's or of the system's."
        )
    return [{"role": message["role"], "content": content_parts(message)} for message in messages]


def _prefix_and_suffix(processor: ProcessorMixin, messages: list[Message]) -> tuple[str, str]:
    """A question and its answer, as a processor that [`takes_suffix`] is given them."""
    *asked, answer = messages
    if answer["role"] != "assistant":
        raise ValueError(f"`messages` ends with a turn of {answer['role']}; expected is the assistant's answer.")
    return prefix_of(processor, asked), "".join(part["text"] for part in answer["content"])


def _text(processor: ProcessorMixin, messages: list[Message]) -> str:
    """The conversation in the chat template, an image as one placeholder, with an end behind a last answer."""
    text, end = processor.apply_chat_template(messages), processor.tokenizer.eos_token or ""
    prompts = [part for message in messages if message["role"] == "system" for part in message["content"]]
    if lost := [part for part in prompts if part.get("text", "").strip() not in text]:
        raise ValueError(f"`processor.chat_template` does not print the system prompt {lost[0]['text'][:100]!r}.")
    if messages[-1]["role"] != "assistant" or text.rstrip().endswith(end):
        return text
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    # The space that a template writes behind a turn belongs to the next one, and here there is none.
    return text[: len(prompt)] + text[len(prompt) :].rstrip() + end


def _turns(processor: ProcessorMixin, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Of every answer, its first character in the text and the one behind its last."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return []
    # Many conversations in one call: the call costs more than the template.
    before = processor.apply_chat_template([messages[:index] for index in answers], add_generation_prompt=True)
    through = processor.apply_chat_template([messages[: index + 1] for index in answers])
    if answers[-1] == len(messages) - 1:
        through[-1] = text
    turns = []
    for index, prompt, to in zip(answers, before, through, strict=True):
        begin = len(prompt) if to.startswith(prompt) else _first_word(messages[index], prompt, to)
        if begin < 0 or not text.startswith(to):
            raise ValueError(
                "`processor.chat_template` rewrites earlier turns when later ones are added, so the assistant's turns "
                "cannot be found; use a template that only appends."
            )
        turns.append((begin, len(to.rstrip())))
    return turns


def _first_word(answer: Message, prompt: str, text: str) -> int:
    """Where the words of an answer begin in the text, behind what it has in common with the prompt for it; or -1."""
    words = "".join(part.get("text", "") for part in answer["content"]).strip()
    return text.find(words, len(commonprefix([prompt, text])))


def _tokens(processor: ProcessorMixin, text: str, **options: Any) -> BatchEncoding:
    """Token ids with one beginning of sequence: the template's, or where it writes none the tokenizer's."""
    return processor.tokenizer(text, add_special_tokens=not has_begin(processor, text), **options)


def has_begin(processor: ProcessorMixin, text: str) -> bool:
    """Whether the template writes the beginning of sequence, so that the tokenizer must not."""
    bos = processor.tokenizer.bos_token
    return bos is not None and text.startswith(bos)
