"""The common form of conversational data: what every source's records become before anything else looks at them.

    {"id": "000000033471", "images": [{"bytes": None, "path": "/data/coco/train2017/000000033471.jpg"}],
     "videos": [], "image_folder": "/data", "problem": None,
     "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]}]}

Images stay as they were stored, undecoded, and so do videos, each a file or the images that are its frames. A record
that cannot be put into this form still becomes a row, with the reason in `problem`, so that whoever reads the rows can
count it; nothing is dropped here. What a record has beside its turns, images and videos is passed over if it only
describes them; what would change what is learned (a sound, tools, a turn's weight) is a problem.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .stored_images import embedded_image

if TYPE_CHECKING:
    from datasets import Features

PLACEHOLDERS = {"<image>": "image", "<video>": "video"}
ROLES = {
    **{"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant"},
    **{"system": "system", "developer": "system"},
}
# Fields of a record that hold what is said before its first turn.
SYSTEM_PROMPTS = ("system", "system_prompt", "system_message")
# Where a part of a message may have its image or video, as OpenAI and transformers write it.
SOURCES = {
    "image": ("image", "image_url", "path", "url", "base64"),
    "video": ("video", "video_url", "path", "url"),
}
# Of files in a tar.
VIDEO_ENDINGS = ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "webm")

# What changes what a record, a turn or a part of one teaches, and is not read.
_SOUND = ("audio", "audios", "audio_url", "audio_path")
_VIDEO_AND_SOUND = ("video", "videos", "video_url", "video_path", *_SOUND)
_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_WEIGHTS = ("weight", "loss", "loss_weight", "loss_scale", "train")
_OF_RECORDS = (
    *("video_url", "video_path"),
    *_SOUND,
    *_TOOLS,
    *("weight", "loss_weight", "loss_scale"),
    *("history", "chosen", "rejected", "rejected_response", "rejected_messages", "kto_tag"),
)
_OF_TURNS = (
    *_VIDEO_AND_SOUND,
    *_TOOLS,
    *_WEIGHTS,
    *SYSTEM_PROMPTS,
    *("image", "images", "reasoning_content", "reasoning", "thinking", "refusal"),
)
_OF_PARTS = (
    *("videos", "video_path", "video_start", "video_end", "fps", "nframes"),
    *_SOUND,
    *_WEIGHTS,
    *("input_audio", "source", "data", "file"),
)
# Values of these that say what would be so without them.
_SAYING_NOTHING = (None, "", "[]", [], {}, 1)

# Part of what caches of rows are keyed by: to be raised whenever the same record would give another row.
ROW_VERSION = 4

# Places for images, videos and sounds as other libraries write them into the text, which would be learned as words.
_OTHER_PLACEHOLDERS = re.compile(
    r"<(img|image|video|audio)>\s*[^<>\s][^<>]*</\1>"
    r"|<\|(?:image|img|video|audio|vision)[\w-]*\|>|<(?:image|img|video|audio)[_-]?\d+>|<(?:bbox|ref-object)>"
)
# Not in answers, which may explain HTML, and not where an end tag says that it is some.
_NO_HTML = r"<{kind}>(?!.*</{kind}>)"
_SOUND_PLACEHOLDER, _VIDEO_PLACEHOLDER = (
    re.compile(_NO_HTML.format(kind=kind), re.DOTALL) for kind in ("audio", "video")
)
# By whether the text is an answer.
_PLACES = {
    True: re.compile(r"\n?(<image>)\n?"),
    False: re.compile(rf"\n?(<image>|{_VIDEO_PLACEHOLDER.pattern})\n?", re.DOTALL),
}

UNDERSTOOD = (
    "'conversations' (LLaVA: turns of 'from' and 'value') with 'image' or 'images'; 'messages' (turns of 'role' and "
    "'content') with 'image' or 'images', or images in the parts of 'content'; 'texts' (pairs of 'user' and "
    "'assistant'), 'query' and 'response' (texts), or 'prompt' and 'completion' (messages) with 'image' or 'images'; "
    "of all, 'video' or 'videos' likewise"
)


def row_features() -> "Features":
    """The columns of the common form, for `datasets`."""
    from datasets import Features, Image, List, Value

    text, image = Value("string"), Image(decode=False)
    video = {"bytes": Value("binary"), "path": text, "frames": List(image), "fps": Value("float64")}
    return Features(
        {
            "id": text,
            "images": List(image),
            "videos": List(video),
            "image_folder": text,
            "messages": List({"role": text, "content": List({"type": text, "text": text})}),
            "problem": text,
        }
    )


TURNS = ("messages", "conversations", "texts")
# What is asked and what is answered, each in a field of its own: ms-swift's and TRL's names.
PAIRS = {"query": "response", "prompt": "completion"}


def turns_column(columns: Collection[str]) -> str | None:
    """Which of the columns has the turns, or the first of them; `None` if none has."""
    pairs = (asked for asked, answered in PAIRS.items() if {asked, answered} <= set(columns))
    return next((name for name in (*TURNS, *pairs) if name in columns), None)


def common_row(
    record: Any, default_id: str, image_folder: str | Path | None = None, trust_image_paths: bool = False
) -> dict[str, Any]:
    """
    A record of any understood form as a row of the common form.

    Args:
        record: `{"conversations": ..., "image": ...}` and the like; see [`UNDERSTOOD`]. A `system` or `system_prompt`
            becomes its first turn.
        default_id: the row's id where the record has no `id`, or one that is not a string or a whole number.
        image_folder: what paths of images are relative to; `None` leaves them as they are.
        trust_image_paths: whether paths may lead out of that folder. If not, it stands in the row, and whoever reads
            the row refuses those that do.

    Returns:
        `id`, `images`, `videos`, `image_folder`, `messages` and `problem`. A video has `bytes` or a `path`, or
        `frames` and, if known, `fps`. Where `problem` is not `None`, there are no messages.
    """
    return _row(record, default_id, None if image_folder is None else os.path.abspath(image_folder), trust_image_paths)


def tar_row(key: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A sample of a tar shard as a row of the common form.

    `KEY.json` has the conversation, in any form that [`common_row`] understands. The other members are its images, and
    by their endings its videos, in the order of their names, numbers by size: `KEY.jpg`, or `KEY.0.jpg`, `KEY.1.png`,
    ... for several, or none. Paths in the JSON are not followed. Without `KEY.json`, `KEY.txt` is what the assistant
    says of them, the user saying nothing, as in LLaVA's first stage.

    Args:
        key: the row's id where the conversation has none.
        members: `{"name", "content"}` of each, names without the key.
    """
    content = {member["name"]: member["content"] for member in members}
    said, caption = content.pop("json", None), content.pop("txt", None)
    members = {"image": [], "video": []}
    for name, encoded in content.items():
        members["video" if name.lower().endswith(VIDEO_ENDINGS) else "image"].append(encoded)
    if said is None and caption is None:
        problem = f"the sample has the members {sorted(content)}, and neither 'json' nor 'txt' with a conversation"
        return common_row(None, key) | {"problem": problem}
    if said is None:
        answer = {"type": "text", "text": caption.decode(errors="surrogateescape")}
        asked = [{"type": kind} for kind, given in members.items() for _ in given]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": [answer]}]
        return _row({"messages": turns}, key, members=members)
    try:
        record = json.loads(said)
    except (ValueError, RecursionError) as error:
        return common_row(None, key) | {"problem": f"the member 'json' is no JSON: {error}"}
    return _row(record, key, members=members)


class UnreadableRecord(ValueError):
    """Why a record cannot be put into the common form."""


def _row(
    record: Any,
    default_id: str,
    image_folder: str | None = None,
    trust_image_paths: bool = False,
    members: dict[str, list[bytes]] | None = None,
) -> dict[str, Any]:
    """See [`common_row`]; of a tar's sample images and videos are its `members`, whatever the record calls them."""
    row = {"id": default_id, "images": [], "videos": [], "messages": [], "problem": None}
    row["image_folder"] = None if trust_image_paths else image_folder
    try:
        row["id"] = _id(record, default_id)
        messages, given = read_conversation(record, members)
        images = [_image(image, image_folder) for image in given["image"]]
        videos = [_video(video, image_folder) for video in given["video"]]
        return row | {"messages": messages, "images": images, "videos": videos}
    except UnreadableRecord as problem:
        return row | {"problem": str(problem)}


def read_conversation(
    record: dict[str, Any], members: dict[str, list[Any]] | None = None
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """
    The messages of a record in the common form, and by kind its images and videos as they stand in it; or `members` in
    their place.

    Raises:
        UnreadableRecord: if it has another form than those that are understood, or something that is not read.
    """
    _refuse_unread(record, _OF_RECORDS, "the record")
    given = {kind: _given(record, kind) for kind in SOURCES} if members is None else members
    messages, shown = _messages(record, given)
    if members is None:
        given = {kind: _of_parts(kind, shown[kind], given[kind]) for kind in SOURCES}
    return messages, given


def _id(record: Any, default_id: str) -> str:
    if not isinstance(record, dict):
        raise UnreadableRecord(f"the record is {_shown(record)}; expected is an object with {UNDERSTOOD}")
    given = record.get("id")
    is_one = isinstance(given, str | int) and not isinstance(given, bool) and given != ""
    return _whole(str(given)) if is_one else default_id


def _refuse_unread(fields: dict[str, Any], unread: Collection[str], where: str) -> None:
    if found := [name for name in unread if fields.get(name) not in _SAYING_NOTHING]:
        raise UnreadableRecord(
            f"{where} has `{found[0]}` {_shown(fields[found[0]])}, which is not read and changes what is learned"
        )


def _given(record: dict[str, Any], kind: str) -> list[Any]:
    """What stands in `images` or `image`, one or several; or the same of videos."""
    several, one = (_listed(record.get(name)) for name in (f"{kind}s", kind))
    if several and one and several != one:
        raise UnreadableRecord(
            f"the record has `{kind}s` {_shown(several)} and `{kind}` {_shown(one)}; expected is one"
        )
    return several or one


def _listed(given: Any) -> list[Any]:
    return [] if given is None or given == "" else given if isinstance(given, list) else [given]


def _of_parts(kind: str, shown: list[Any], given: list[Any]) -> list[Any]:
    """The images or videos, where parts of messages may bring their own: of each part what it has, or `None`."""
    own = [source for source in shown if source is not None]
    if own and (len(own) < len(shown) or given not in ([], own)):
        raise UnreadableRecord(
            f"the messages show {len(shown)} {kind}(s), {len(own)} of them with a source of their own, and the record "
            f"has {len(given)} beside them; expected are sources in all of the parts, or in `{kind}s` alone"
        )
    return own or given


def _image(image: Any, image_folder: str | None) -> dict[str, Any]:
    """An image, which is a path, a data URL, bytes, or in the form of `datasets`, in the form of `datasets`."""
    if isinstance(image, str):
        image = {"path": image}
    given = {"bytes": image} if isinstance(image, bytes) else image
    if not isinstance(given, dict) or not {"bytes", "path", "url"} & set(given):
        raise UnreadableRecord(f"an image is {_shown(image)}; expected is a path or an encoded image")
    content, path = given.get("bytes"), given.get("path") or given.get("url")
    if not isinstance(content, bytes | None) or not isinstance(path, str | None):
        raise UnreadableRecord(f"an image is {_shown(image)}; expected are a path that is text, or bytes")
    if content is None and path is not None:
        try:
            content = embedded_image(_whole(path))
        except UnreadableRecord:
            raise
        except ValueError as error:
            raise UnreadableRecord(f"an image is {_shown(path)}; {error}") from None
        if content is not None:
            path = None
        elif image_folder is not None and "://" not in path:
            path = str(Path(image_folder, path))
    return {"bytes": content, "path": path}


def _video(video: Any, folder: str | None) -> dict[str, Any]:
    """A video, which is a path, bytes, or frames as images are, alone or with `fps`, in the common form."""
    given = {"frames": video} if isinstance(video, list) else video
    fields = given if isinstance(given, dict) else {}
    if fields.get("frames"):
        fps = fields.get("fps")
        if isinstance(fps, bool) or not isinstance(fps, int | float | None):
            raise UnreadableRecord(f"a video has `fps` {_shown(fps)}; expected is a number")
        frames = [_image(frame, folder) for frame in fields["frames"]]
        return {"bytes": None, "path": None, "frames": frames, "fps": None if fps is None else float(fps)}
    try:
        return _image(given, folder) | {"frames": [], "fps": None}
    except UnreadableRecord:
        raise UnreadableRecord(
            f"a video is {_shown(video)}; expected is a path, an encoded file, or a list of frames"
        ) from None


def _messages(
    record: dict[str, Any], given_beside: dict[str, list[Any]]
) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """The messages, and by kind of each image and video that they show what the part has of it, or `None`."""
    given = [name for name in TURNS if record.get(name) is not None]
    if len(given) > 1:
        raise UnreadableRecord(
            f"the record has {' and '.join(f'`{name}`' for name in given)}; expected is one of them"
        )
    column = turns_column(given or [name for name in record if record[name] is not None])
    turns = _turns_of_pair(record, column) if column in PAIRS else record[column] if column else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        found = f"`{column}` is {_shown(turns)}" if column else f"the record has the fields {_shown(list(record))}"
        raise UnreadableRecord(f"{found}; understood are {UNDERSTOOD}")
    for turn in turns:
        _refuse_unread(turn, _OF_TURNS, "a turn")
    if column == "texts":
        turns = [{"role": role, "content": turn.get(role)} for turn in turns for role in ("user", "assistant")]
    shown: dict[str, list[Any]] = {kind: [] for kind in SOURCES}
    messages = _with_system_prompt(record, [_message(turn, shown) for turn in turns])
    if column == "conversations" and given_beside["video"] and not (given_beside["image"] or shown["video"]):
        # LLaVA's own files of videos show them by the image's placeholder.
        parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        for part in parts:
            part["type"] = "video"
        shown = {"image": [], "video": shown["image"]}
    if column != "conversations" and not any(shown.values()):
        messages = _with_visuals_first(messages, given_beside)
    return messages, shown


def _turns_of_pair(record: dict[str, Any], asked: str) -> list[Any]:
    """The turns of what is asked and answered, of which the answer alone is learned."""
    answered = PAIRS[asked]
    question, answer = record[asked], record[answered]
    if asked == "query":
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if not isinstance(question, list) or not isinstance(answer, list):
        raise UnreadableRecord(
            f"`{asked}` is {_shown(question)} and `{answered}` {_shown(answer)}; understood are lists of messages. "
            "Texts are learned without a chat template, which is not done here: put them into messages of a 'user' "
            "and an 'assistant'"
        )
    roles = [
        {ROLES.get(turn.get("role")) if isinstance(turn.get("role"), str) else None for turn in turns}
        for turns in (question, answer)
        if all(isinstance(turn, dict) for turn in turns)
    ]
    if len(roles) < 2 or "assistant" in roles[0] or roles[1] != {"assistant"}:
        raise UnreadableRecord(
            f"`{asked}` is {_shown(question)} and `{answered}` {_shown(answer)}; understood are messages of which the "
            "'assistant' has all in the latter and none in the former, where they would not be learned"
        )
    return [*question, *answer]


def _with_system_prompt(record: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    given = {name: record[name] for name in SYSTEM_PROMPTS if record.get(name) not in (None, "")}
    for name, prompt in given.items():
        if not isinstance(prompt, str):
            raise UnreadableRecord(f"`{name}` is {_shown(prompt)}; expected is text")
        first = {"role": "system", "content": [{"type": "text", "text": _words(prompt, "system")}]}
        if messages[0]["role"] != "system":
            messages = [first, *messages]
        elif messages[0] != first:
            raise UnreadableRecord(
                f"`{name}` is {_shown(prompt)}, and there is another system prompt before the turns"
            )
    return messages


def _message(turn: dict[str, Any], shown: dict[str, list[Any]]) -> dict[str, Any]:
    role, content = _either(turn, "from", "role"), _either(turn, "value", "content")
    if not isinstance(role, str) or role not in ROLES:
        raise UnreadableRecord(f"a turn is by {_shown(role)}; understood are {', '.join(ROLES)}")
    role = ROLES[role]
    if isinstance(content, str):
        parts = content_parts(content, role)
        for part in parts:
            if part["type"] in shown:
                shown[part["type"]].append(None)
        return {"role": role, "content": parts}
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        return {"role": role, "content": [_part(part, role, shown) for part in content]}
    raise UnreadableRecord(f"a turn says {_shown(content)}; expected is text, or a list of parts")


def _either(turn: dict[str, Any], first: str, second: str) -> Any:
    """One of two fields; a data set of both forms has nothing in the other one."""
    given = [turn[name] for name in (first, second) if turn.get(name) is not None]
    if len(given) == 2 and given[0] != given[1]:
        raise UnreadableRecord(f"a turn has `{first}` {_shown(given[0])} and `{second}` {_shown(given[1])}")
    return given[0] if given else None


def _part(part: dict[str, Any], role: str, shown: dict[str, list[Any]]) -> dict[str, str | None]:
    """
    A part of a message; of an image or a video, what the part has of it is put behind those that were shown before.
    """
    given, text = part.get("type"), part.get("text")
    kind = given.removesuffix("_url") if isinstance(given, str) else None
    names = SOURCES.get(kind, dict.fromkeys(name for of_kind in SOURCES.values() for name in of_kind))
    sources = [part[name] for name in names if part.get(name) is not None]
    others = [name for other, own in SOURCES.items() if other != kind for name in own if name not in names]
    _refuse_unread(part, (*_OF_PARTS, *others), "a part of a message")
    if given == "text" and isinstance(text, str) and not sources:
        return {"type": "text", "text": _words(text, role)}
    if kind not in SOURCES or len(sources) > 1 or text not in (None, ""):
        understood = [f"{own!r} and '{own}_url', with at most one of {', '.join(s)}" for own, s in SOURCES.items()]
        raise UnreadableRecord(
            f"a part of a message is {_shown(part)}; understood are types {', '.join(understood)}, and 'text'"
        )
    # Some data sets number the images that their parts show; they are given in the order of the parts.
    if not sources and isinstance(index := part.get("index"), int) and index != len(shown[kind]):
        raise UnreadableRecord(
            f"a part of a message is {_shown(part)}, the {kind} number {len(shown[kind])} that is shown"
        )
    if given != kind and not sources:
        raise UnreadableRecord(f"a part of a message is {_shown(part)}, without its {kind}")
    source = next(iter(sources), None)
    is_base64 = isinstance(part.get("base64"), str) and not source.startswith("data:")
    shown[kind].append(f"data:;base64,{source}" if is_base64 else source)
    return {"type": kind, "text": None}


def content_parts(text: str, role: str) -> list[dict[str, str | None]]:
    """
    A turn's text as parts, with an image or, but for answers, a video wherever `<image>` or `<video>` stands in it.
    The line break that LLaVA's files write between the placeholder and the text belongs to the placeholder, for a chat
    template writes its own.
    """
    parts: list[dict[str, str | None]] = []
    for number, said in enumerate(_PLACES[role == "assistant"].split(text)):
        if number % 2:
            parts.append({"type": PLACEHOLDERS[said], "text": None})
        elif said or text == said:
            parts.append({"type": "text", "text": _words(said, role)})
    return parts


def _whole(text: str) -> str:
    """JSON can spell half of a surrogate pair, and a file can have bytes that are no text: none can be written."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UnreadableRecord(
            f"{_shown(text)} is no Unicode text: character {error.start} is half of a surrogate pair, or was a byte "
            "that is no UTF-8"
        ) from None
    return text


def _words(text: str, role: str) -> str:
    """Text without a place for an image, a video or a sound that would be learned as words."""
    found = _OTHER_PLACEHOLDERS.search(text)
    if found is None and role != "assistant":
        found = _SOUND_PLACEHOLDER.search(text) or _VIDEO_PLACEHOLDER.search(text)
    if found:
        raise UnreadableRecord(
            f"a turn says {_shown(found[0])}; understood in a turn that is text are <image> for an image, whose file "
            "stands in `image`, and <video> for one in `video`"
        )
    return _whole(text)


def _with_visuals_first(messages: list[dict[str, Any]], given: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Where no message says where images and videos are, they stand before the user's first words, as TRL has it."""
    first = next((message for message in messages if message["role"] == "user"), None)
    if first is not None:
        places = [{"type": kind, "text": None} for kind, own in given.items() for _ in own]
        first["content"] = places + first["content"]
    return messages


def _shown(value: Any) -> str:
    # Also escapes what cannot be written to a file.
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
