"""How much a tower attends to its tokens, read from any tower without the matrix of all attention weights.

Every attention of transformers 5 hands queries and keys, after norms and rotation, to a function that its config
names. What enters an attention module while the family encodes is noted; later the module is run once more on it, by a
copy that shares its weights and whose configuration names a function of ours, which keeps queries and keys and attends
to nothing. The model itself stays as it is.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "adavtp_queries_and_keys"
# Queries that are compared with all keys at a time.
_CHUNK = 1024


@contextmanager
def noting_inputs(modules: Sequence[nn.Module]) -> Iterator[list[list[tuple[tuple, dict[str, Any]]]]]:
    """Notes, for each of some modules, the arguments of its calls in this thread."""
    noted: list[list[tuple[tuple, dict[str, Any]]]] = [[] for _ in modules]
    thread = threading.get_ident()

    def hook_of(calls: list[tuple[tuple, dict[str, Any]]]) -> Any:
        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == thread:
                calls.append((args, kwargs))

        return note

    handles = [
        module.register_forward_pre_hook(hook_of(calls), with_kwargs=True)
        for module, calls in zip(modules, noted, strict=True)
    ]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def queries_and_keys(
    module: nn.Module, calls: Sequence[tuple[tuple, dict[str, Any]]]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Queries and keys `[images, heads, num_patches, head_dim]` of an attention module on what entered it, one pair for
    each of its calls of attention; queries are scaled, so that their products with keys are the logits.
    """
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    watched = copy.copy(module)
    watched.config = _WatchedConfig(module.config, found)
    for args, kwargs in calls:
        type(module).forward(watched, *args, **kwargs)
    return found


class _WatchedConfig:
    """A configuration that is another one in all but the attention function."""

    def __init__(self, config: Any, found: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._config, self._found, self._attn_implementation = config, found, NAME

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _keep_queries_and_keys(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    module.config._found.append((query.float() * scaling, key.float()))
    return torch.zeros_like(query.transpose(1, 2)), None


AttentionInterface.register(NAME, _keep_queries_and_keys)


def row_of_cls(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """How much the first token attends to each other one, `[images, heads, num_patches - 1]`, softmax over all."""
    return (query[:, :, :1] @ key.transpose(-1, -2)).softmax(dim=-1)[:, :, 0, 1:]


def received(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """How much each token receives, the mean over all that attend, `[images, heads, num_patches]`."""
    total = torch.zeros(key.shape[:-1], device=key.device)
    for part in query.split(_CHUNK, dim=2):
        total += (part @ key.transpose(-1, -2)).softmax(dim=-1).sum(dim=2)
    return total / query.shape[2]
