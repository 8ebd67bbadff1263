"""Samples of tar shards (WebDataset), each as its members, undecoded.

`datasets` has a builder for such shards, which makes a column of every member of the first samples and decodes what
it finds. Conversations do not all have the same members: one has no image and the next has three. So here a sample is
the list of its members, and a member that cannot be decoded costs its own sample and not the run.
"""

import re
from collections.abc import Iterator
from typing import Any

from datasets import DatasetInfo, Features, List, Value
from datasets.packaged_modules.webdataset.webdataset import WebDataset


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
