"""From the tokens of a batch of units to those that a reducer leaves, exactly as many as the budget says.

Units that differ in size, in how much they keep, or in how many tokens reached the reducer go through it in groups of
like ones, so that every call sees full rows.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from ...configuration.configuration_adavtp import AdaVTPConfig
from ..budget.selection import Selection
from ..reducers.base import ScoringReducer, TokenReducer, take_tokens
from .encode import BudgetToken, encode_image, start_pass
from .encoder_reducer import EncoderReducer
from .features import BY_IMAGE, VisionFeatures
from .tower import TowerAttention, input_device


def reduce_tokens(
    name: str,
    reducer: TokenReducer,
    features: VisionFeatures,
    num_keep: torch.Tensor | None,
    runs_everything: bool = False,
) -> tuple[VisionFeatures, Selection]:
    """
    Lets a reducer of stage `"vision"` or `"projector"` choose from the tokens that are left of each image.

    Args:
        name: of the reducer, for error messages.
        reducer: the module.
        features: tokens `[num_images, max_tokens, hidden_size]`; images that have fewer end in positions of -1.
        num_keep: `[num_images]` int64, or `None`.
        runs_everything: whether the reducer runs whatever images there are and keep, as it does in training.

    Returns:
        The tokens that are left, and the selection of the image's N patches that they are. In training, where the
        choice has gates, all tokens are still there.

    Raises:
        ValueError: if the reducer did not keep exactly as many as it was told.
    """
    if "attention" in reducer.needs and not features.attention:
        raise ValueError(
            f"Reducer {name!r} reads the tower's attention to each token, and a reducer before it has merged tokens, "
            "which the tower never attended to; put it first, or use one that does without."
        )
    num_tokens = (features.positions >= 0).sum(dim=-1).cpu()
    # An image that keeps everything is as it was, whatever the others keep. In training every image goes through.
    runs_everything = runs_everything or reducer.training
    keeps_all = torch.zeros_like(num_tokens, dtype=torch.bool)
    if num_keep is not None and not runs_everything and not reducer.redistributes and reducer.is_exact:
        keeps_all = num_keep >= num_tokens
    shapes = [] if features.grids is None else features.grids.unbind(dim=1)
    alike = (num_keep if reducer.one_count else None, features.frames, *shapes)
    in_one_call = reducer.takes_padding and runs_everything
    groups = [torch.arange(len(num_tokens))] if in_one_call else image_groups(num_tokens, keeps_all, *alike)
    results = []
    for rows in groups:
        own = features.images(rows, int(num_tokens[rows].max()))
        if keeps_all[rows[0]]:
            selection = Selection.everything(len(rows), own.patches.shape[1], own.patches.device)
        else:
            device, wanted = input_device(reducer, own.patches), None if num_keep is None else num_keep[rows]
            selection = reducer(own.to(device), None if wanted is None else wanted.to(device)).to(own.patches.device)
            if num_keep is not None:
                _require_count(name, reducer, selection, num_keep[rows])
        selection.sizes = num_tokens[rows]
        results.append(_result(own, selection))
    return _joined(groups, results)


def reduce_in_tower(
    tower: PreTrainedModel,
    reducer: EncoderReducer,
    pixel_values: torch.Tensor,
    config: AdaVTPConfig,
    num_keep: torch.Tensor,
    is_token: torch.Tensor,
    budget_token: BudgetToken | None = None,
    budget: torch.Tensor | None = None,
    question: torch.Tensor | None = None,
) -> tuple[VisionFeatures, Selection]:
    """
    Runs the tower with a reducer in it; all but what follows is as in [`encode_image`].

    Args:
        num_keep: `[num_images]` int64, tokens to keep of each image.
        is_token: `[num_images, patches of the tower]` bool on the CPU, see [`TowerPass`].

    Returns:
        The tokens that are left, and the selection that they are of each image's tokens, which are counted without the
        patches that are none.
    """
    sizes = is_token.sum(dim=-1)
    most = int(sizes.max())
    keeps_all = num_keep >= sizes if not reducer.training else torch.zeros(len(num_keep), dtype=torch.bool)
    groups, results = image_groups(keeps_all, sizes, num_keep if reducer.one_count else None), []
    for rows in groups:
        images, own_tokens, num_patches = pixel_values[rows], is_token[rows], int(sizes[rows[0]])
        own = {
            name: None if value is None else value[rows]
            for name, value in (("budget", budget), ("question", question))
        }
        if keeps_all[rows[0]]:
            features = encode_image(tower, images, config, budget_token, **own)
            patches = features.patches[own_tokens.to(features.patches.device)].unflatten(0, (len(rows), -1))
            selection = Selection.everything(len(rows), num_patches, patches.device)
            features = replace(features, patches=patches, positions=selection.positions, num_patches=most)
            results.append((features, _of_longer_rows(selection, most)))
            continue
        tower_pass, token = start_pass(tower, config, budget_token, **own, is_token=own_tokens)
        encoded = reducer(tower_pass, images, num_keep[rows])
        patches = tower_pass.patches(encoded.sequence)
        selection = reducer.selection(encoded, patches, num_patches)
        budget_state = tower_pass.budget(encoded.sequence)
        if token is not None and config.budget_fusion == "post":
            budget_state = budget_token.cross_attention(token, patches)
        if selection.features is not None:
            patches = selection.features
        elif config.gradient_gates == "features":
            patches = selection.gather(patches)
        gates_attention = selection.gates is not None and config.gradient_gates == "attention"
        positions = encoded.positions if gates_attention else selection.positions
        cls = tower_pass.cls(encoded.sequence)
        left = VisionFeatures(patches, positions, cls=cls, budget=budget_state, num_patches=most)
        results.append((left, _of_longer_rows(selection, most)))
    return _joined(groups, results)


def _of_longer_rows(selection: Selection, num_patches: int) -> Selection:
    """A selection in a batch in which others have more tokens."""
    rest = (0, num_patches - selection.keep.shape[1])
    gates = None if selection.gates is None else nn.functional.pad(selection.gates, rest)
    return replace(selection, keep=nn.functional.pad(selection.keep, rest), gates=gates)


def image_groups(*keys: torch.Tensor | None) -> list[torch.Tensor]:
    """Indices of images that are alike in every key, `[num_images]` each or `None`."""
    keys = torch.stack([key.long() for key in keys if key is not None], dim=1)
    _, group = keys.unique(dim=0, return_inverse=True)
    return [(group == number).nonzero()[:, 0] for number in range(int(group.max()) + 1)]


def _require_count(name: str, reducer: TokenReducer, selection: Selection, num_keep: torch.Tensor) -> None:
    if not reducer.is_exact:
        return
    kept, wanted = selection.num_keep.cpu(), num_keep.cpu()
    may_add = isinstance(reducer, ScoringReducer) and reducer.config.min_token_entropy > 0
    if reducer.redistributes:
        kept, wanted = kept.sum(dim=0, keepdim=True), wanted.sum(dim=0, keepdim=True)
    is_right = (kept >= wanted).all() if may_add else torch.equal(kept, wanted)
    if not is_right:
        raise ValueError(f"Reducer {name!r} kept {kept.tolist()} tokens and was told to keep {wanted.tolist()}.")


def _result(features: VisionFeatures, selection: Selection) -> tuple[VisionFeatures, Selection]:
    """The tokens that a selection leaves, and the selection in terms of the whole image's patches."""
    index = selection.positions.clamp(min=0)
    is_token = selection.positions >= 0
    positions = features.positions.gather(1, index).masked_fill(~is_token, -1)
    # What is no token is written behind the last patch, and cut off.
    place = features.positions.masked_fill(features.positions < 0, features.num_patches)
    keep = torch.zeros(len(positions), features.num_patches + 1, dtype=torch.bool, device=positions.device)
    gates = selection.gates
    if gates is not None:
        gates = gates.new_zeros(keep.shape).scatter(1, place, gates)[:, :-1]
    keep = keep.scatter(1, place, selection.keep)[:, :-1]
    patches = selection.gather(features.patches)
    merged = selection.features is not None
    features_left = patches if merged else None
    whole = Selection(keep, positions, gates, features_left, selection.loss)
    whole.settings, whole.is_soft = selection.settings, selection.is_soft
    tower_patches = features.tower_patches
    if tower_patches is not None:
        tower_patches = take_tokens(tower_patches, index)
    attention = {} if merged else {layer: view.take(index) for layer, view in features.attention.items()}
    left = replace(features, patches=patches, positions=positions, tower_patches=tower_patches, attention=attention)
    return left, whole


def _in_order(parts: list[list[str] | None], order: torch.Tensor) -> list[str] | None:
    """Lists of all groups as one, in the order of the images."""
    if None in parts:
        return None
    joined = [value for part in parts for value in part]
    return [joined[place] for place in order.tolist()]


def _joined(
    groups: list[torch.Tensor], results: list[tuple[VisionFeatures, Selection]]
) -> tuple[VisionFeatures, Selection]:
    """The results of all groups in the order of the images, shorter rows padded."""
    if len(groups) == 1:
        return results[0]
    parts, selections = [left for left, _ in results], [selection for _, selection in results]
    # On the CPU, like `sample`: it may index tensors of any device.
    order = torch.cat(groups).argsort()
    longest = max(part.positions.shape[1] for part in parts)

    def joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)[order]

    def tokens(name: str, fill: float = 0.0) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        rest = [[0, 0] * (tensor.dim() - 2) + [0, longest - tensor.shape[1]] for tensor in tensors]
        return joined([nn.functional.pad(*pair, value=fill) for pair in zip(tensors, rest, strict=True)])

    patches, positions = tokens("patches"), tokens("positions", -1)
    merged = any(selection.features is not None for selection in selections)
    pairs = zip(selections, groups, strict=True)
    losses = [selection.loss * len(rows) for selection, rows in pairs if selection.loss is not None]
    whole = Selection(
        joined([selection.keep for selection in selections]),
        positions,
        joined([selection.gates for selection in selections]),
        patches if merged else None,
        torch.stack(losses).sum() / len(order) if losses else None,
        settings=_in_order([selection.settings for selection in selections], order),
        is_soft=selections[0].is_soft,
    )
    attention = (
        {}
        if merged
        else {
            layer: TowerAttention.joined([part.attention[layer] for part in parts], longest, order)
            for layer in parts[0].attention
        }
    )
    left = replace(
        parts[0],
        patches=patches,
        positions=positions,
        tower_patches=tokens("tower_patches"),
        attention=attention,
        **{name: joined([getattr(part, name) for part in parts]) for name in BY_IMAGE},
    )
    return left, whole
