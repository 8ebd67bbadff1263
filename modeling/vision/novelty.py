"""How much of a frame was not in the frame before it."""

import torch

from ..families.base import Units


def novelty(tokens: torch.Tensor, positions: torch.Tensor, frame_size: int, first: float = 1.0) -> torch.Tensor:
    """
    Of every token 1 - cosine to the last one before it, in time, that stood at the same place of its frame: of a whole
    video that of the frame before.

    Args:
        tokens: `[num_videos, num_tokens, hidden_size]`.
        positions: `[num_videos, num_tokens]` int64, of each token in its video, frame by frame.
        frame_size: tokens of a whole frame.
        first: what a token gets before which none stood at its place.

    Returns:
        `[num_videos, num_tokens]` float32, but for `first` in [0, 2].
    """
    place = positions % frame_size
    order = (place * (positions.max() + 1) + positions).argsort(dim=-1)
    directions = torch.nn.functional.normalize(tokens.float(), dim=-1)
    directions = directions.gather(1, order[..., None].expand_as(directions))
    place = place.gather(1, order)
    new = 1 - (directions[:, 1:] * directions[:, :-1]).sum(dim=-1)
    new = new.masked_fill(place[:, 1:] != place[:, :-1], first)
    new = torch.nn.functional.pad(new, (1, 0), value=first)
    return torch.empty_like(new).scatter(1, order, new)


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
    sums, earlier, before = [], None, features[0, :0]
    for number, (own, frames) in enumerate(zip(features, units.frames, strict=True)):
        (rows, columns), size = units.grids[number], int(units.sizes[number])
        shown_before = earlier == (int(units.sample[number]), rows // frames, columns)
        earlier = (int(units.sample[number]), rows // frames, columns)
        whole = torch.cat([before, own[:size]]) if shown_before else own[:size]
        positions = torch.arange(len(whole), device=whole.device)
        sums.append(novelty(whole[None], positions[None], size // frames)[0, -size:].double().sum())
        before = own[size - size // frames : size]
    return torch.stack(sums).clamp(min=0).cpu()
