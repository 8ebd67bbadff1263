"""How much of a frame was not in the frame before it."""

import torch


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
