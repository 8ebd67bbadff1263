"""VidCom2, Video Compression Commander: unusual frames keep more, and of each its unusual tokens (arXiv 2505.14454).

A token is usual if it is near the mean of the whole video, and near the mean of its frame. A frame whose tokens are
unusual in the video gets a larger share of the budget, and every frame keeps those of its tokens that are least usual
in both.
"""

import torch

from ..budget.selection import Selection
from ..budget.token_budget import shared_by_weight
from ..budget.top_k import top_k_mask
from ..vision.features import VisionFeatures
from .base import TokenReducer, directions, register_reducer

_SCALES = tuple(2.0**power for power in range(-3, 2))
_TEMPERATURE = 0.01


def nearness(tokens: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Sum over five scales a of exp(-|x - c|^2 / 2a), of tokens `[..., width]`."""
    squared = (tokens - center).square().sum(dim=-1)
    return sum(torch.exp(-squared / (2 * scale)) for scale in _SCALES)


@register_reducer("vidcom2")
class VidCom2Reducer(TokenReducer):
    """
    Keeps of every frame the tokens that are least near to the means of video and frame.

    All is computed on the half of the channels that vary least over the video, and on unit vectors. With u_t the mean
    over frame t of -nearness to the video's mean, and p = softmax(u / 0.01) over frames, frame t gets the share
    1 + p_t - 1/T of what an equal division would give it. The authors round each frame's share by itself, at least 1;
    here frames share by Webster's method, which is the same wherever their numbers add up to K, so that K is exact.
    With fewer tokens than frames the frames with the largest shares keep one each.
    """

    needs = ("frames",)
    paper = "VidCom2 (arXiv 2505.14454)"

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        pairs = zip(
            features.patches.float(), features.positions // features.frame_size, num_keep.tolist(), strict=True
        )
        return Selection.from_keep(torch.stack([self.kept(*pair) for pair in pairs]))

    def kept(self, tokens: torch.Tensor, frame: torch.Tensor, num_keep: int) -> torch.Tensor:
        """Of one video's tokens `[num_tokens, width]`, of frames `[num_tokens]`, those that stay, bool."""
        steadiest = tokens.var(dim=0, correction=0).topk(tokens.shape[1] // 2, largest=False).indices
        tokens = directions(tokens[:, steadiest])
        numbers, frame = frame.unique(return_inverse=True)
        in_frame = (frame == torch.arange(len(numbers), device=frame.device)[:, None]).float()
        sizes = in_frame.sum(dim=-1)
        to_video = nearness(tokens, tokens.mean(dim=0))
        to_frame = nearness(tokens, (in_frame @ tokens / sizes[:, None])[frame])
        share = (-(in_frame @ to_video) / sizes / _TEMPERATURE).softmax(dim=0)
        counts = shared_by_weight(num_keep, (1 + share - share.mean()) * sizes, sizes)
        scores = torch.where(in_frame > 0, -(to_video + to_frame), -torch.inf)
        return (top_k_mask(scores, counts) & (in_frame > 0)).any(dim=0)
