"""How much of a frame was not in the frame before it."""

import torch

from ..families.base import Units


def novelty(frames: torch.Tensor, before: torch.Tensor | None = None, first: float = 1.0) -> torch.Tensor:
    """
    Of every token 1 - cosine to the token at the same place one frame earlier, in [0, 2].

    Args:
        frames: `[num_images, num_frames, num_tokens, hidden_size]`.
        before: `[num_images, num_tokens, hidden_size]`, the frame before the first, if there is one.
        first: what the tokens of the first frame get where there is none before it.

    Returns:
        `[num_images, num_frames, num_tokens]` float32.
    """
    directions = torch.nn.functional.normalize(frames.float(), dim=-1)
    new = 1 - (directions[:, 1:] * directions[:, :-1]).sum(dim=-1)
    if before is None:
        begin = torch.full_like(directions[:, :1, :, 0], first)
    else:
        begin = 1 - (directions[:, :1] * torch.nn.functional.normalize(before.float(), dim=-1)[:, None]).sum(dim=-1)
    return torch.cat([begin, new], dim=1)


def novelty_of_units(features: torch.Tensor, units: Units) -> torch.Tensor:
    """
    The novelty of all tokens of each unit together. Where frames are units of their own, the one before is the last of
    the same shape that the prompt shows just before.

    Args:
        features: `[num_units, largest N, hidden_size]`.
        units: that they are of.

    Returns:
        `[num_units]` float64 on the CPU.
    """
    sums, earlier = [], None
    for number, (own, frames) in enumerate(zip(features, units.frames, strict=True)):
        (rows, columns), size = units.grids[number], int(units.sizes[number])
        whole = own[:size].view(1, frames, size // frames, -1)
        known = (int(units.sample[number]), rows // frames, columns)
        before = earlier[1] if earlier is not None and earlier[0] == known else None
        sums.append(novelty(whole, before).double().sum())
        earlier = (known, whole[:, -1])
    return torch.stack(sums).clamp(min=0).cpu()
