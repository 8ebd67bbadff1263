"""Samples of tar shards (WebDataset), each as its members, undecoded.

`datasets` has a builder for such shards, which makes a column of every member of the first samples and decodes what
it finds. Conversations do not all have the same members: one has no image and the next has three. So here a sample is
the list of its members, and a member that cannot be decoded costs its own sample and not the run.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from datasets import DatasetInfo, Features, List, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .rows import common_row


class TarSamples(WebDataset):
    """`__key__` and `members` of the samples of tar files, in the files' order."""

    DECODERS: dict[str, Any] = {}

    def _info(self) -> DatasetInfo:
        member = {"name": Value("string"), "content": Value("binary")}
        return DatasetInfo(features=Features({"__key__": Value("string"), "members": List(member)}))

    def _generate_examples(self, *arguments: Any, **more: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
        for place, sample in super()._generate_examples(*arguments, **more):
            names = sorted(filter(_is_member, sample), key=_by_number)
            members = [{"name": name, "content": sample[name]} for name in names]
            yield place, {"__key__": sample["__key__"], "members": members}


def _is_member(name: str) -> bool:
    return name not in ("__key__", "__url__", "members")


def _by_number(name: str) -> list[tuple[str, int]]:
    """Orders `2.jpg` before `10.jpg`."""
    return [(text, int(number or 0)) for text, number in re.findall(r"([^0-9]*)([0-9]*)", name)]


def tar_row(key: str, members: list[dict[str, Any]]) -> dict[str, Any]:
    """
    A sample as a row of the common form.

    `KEY.json` has the conversation, in any form that [`common_row`] understands. The other members are its images, in
    the order of their names, numbers by size: `KEY.jpg`, or `KEY.0.jpg`, `KEY.1.png`, ... for several, or none. Paths
    of images in the JSON are not followed. Without `KEY.json`, `KEY.txt` is what the assistant says of the images, the
    user saying nothing, as in LLaVA's first stage.

    Args:
        key: the row's id where the conversation has none.
        members: `{"name", "content"}` of each, names without the key.
    """
    content = {member["name"]: member["content"] for member in members}
    said, caption = content.pop("json", None), content.pop("txt", None)
    images = list(content.values())
    if said is None and caption is None:
        problem = f"the sample has the members {sorted(content)}, and neither 'json' nor 'txt' with a conversation"
        return common_row(None, key) | {"problem": problem}
    if said is None:
        shown = [{"type": "image"}] * len(images)
        answer = caption.decode(errors="surrogateescape")
        turns = [
            {"role": "user", "content": shown},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return common_row({"messages": turns, "images": images}, key)
    try:
        record = json.loads(said)
    except ValueError as error:
        return common_row(None, key) | {"problem": f"the member 'json' is no JSON: {error}"}
    return common_row(record | {"images": images} if isinstance(record, dict) else record, key)
