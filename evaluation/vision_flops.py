"""FLOPs up to the decoder: vision tower, reducers on the way, projector.

Images go through the tower one by one and so cost what they cost alone; behind it those of a batch share what depends
on the longest. What a reducer spends stands apart from what it saves.
"""

from collections.abc import Iterator

from ..configuration.configuration_adavtp import AdaVTPConfig
from .model_shape import ModelShape
from .reducer_flops import (
    TowerRun,
    attention_rows,
    budget_cross_attention,
    budget_token,
    image_flops,
    product,
    tower_run,
)
from .token_plan import StepTokens, TokenPlan


def vision_flops(shape: ModelShape, tokens: TokenPlan) -> tuple[float, float]:
    """
    The tower's passes, and what reducers spend there: merging, rows of attention, the budget's embedding.

    Returns:
        The two sums over images.
    """
    num_images, first = len(tokens.sample), tokens.steps[0] if tokens.steps else None
    in_tower = tokens.meets_budget and shape.budget_fusion == "encoder"
    others = int(shape.vision.has_cls) + int(in_tower)
    runs = [TowerRun.whole(shape)] * num_images
    if first is not None and first.step.reducer.stage == "encoder":
        runs = [tower_run(first.step.reducer, first.step.name, shape, keep) for keep in first.leaving]
    reducers = [step.step.reducer for step in tokens.steps] + ([tokens.decoder[1]] if tokens.decoder else [])
    read = {layer for reducer in reducers if "attention" in reducer.needs for layer in reducer.attention_layers}
    own = sum(run.own for run in runs) + num_images * attention_rows(shape, len(read))
    if tokens.meets_budget:
        own += num_images * budget_token(shape)
        if shape.budget_fusion == "post":
            # Where tokens leave inside the tower, it reads those that are left.
            left = [run.transformed[-1] if run.transformed else run.patches for run in runs]
            own += sum(budget_cross_attention(shape, patches) for patches in left)
    return sum(tower_flops(shape, run, others) for run in runs), own


def tower_flops(shape: ModelShape, run: TowerRun, others: int) -> float:
    """
    One image through the tower: the patches' convolution; then in each layer, for n tokens, four projections and
    attention, 8 n C^2 + 4 n^2 C, and an MLP, 4 n C M (6 n C M where it is gated).

    Args:
        shape: of the model.
        run: the patches in each half of each layer.
        others: CLS and budget token, which stay throughout.
    """
    vision = shape.vision
    total = product(run.patches, vision.patch_pixels, vision.hidden_size)
    for attended, transformed in zip(run.attended, run.transformed, strict=True):
        n = attended + others
        total += 4 * product(n, vision.hidden_size, vision.hidden_size) + 2 * product(n, vision.hidden_size, n)
        total += vision.mlp_matrices * product(transformed + others, vision.hidden_size, vision.mlp_size)
    return total


def between_flops(config: AdaVTPConfig, shape: ModelShape, tokens: TokenPlan) -> float:
    """Reducers between tower and decoder, by groups of images that go through them together."""
    return sum(
        images * image_flops(step.step.reducer, step.step.name, config, shape, n, keep)
        for step in tokens.steps
        if step.step.reducer.stage in ("vision", "projector") and _acts(step)
        for images, n, keep in _groups(step)
    )


def _acts(step: StepTokens) -> bool:
    """A step that would leave every image as it is is skipped."""
    return any(left < came for came, left in zip(step.entering, step.leaving, strict=True))


def _groups(step: StepTokens) -> Iterator[tuple[int, int, int]]:
    """For images that a reducer is shown together: how many they are, their tokens, and the most that one keeps."""
    reducer, together = step.step.reducer, {}
    for came, left in zip(step.entering, step.leaving, strict=True):
        # An image that keeps everything is not shown, unless its tokens may go to another.
        if left < came or reducer.redistributes:
            together.setdefault((came, left if reducer.one_count else None), []).append(left)
    for (came, _), counts in together.items():
        yield len(counts), came, max(counts)


def projector_flops(shape: ModelShape, tokens: TokenPlan, masks: bool) -> float:
    """
    Two linear maps, W to D and D to D, of the tokens that reach them: those that a reducer of stage "projector" gets,
    with CLS, or else those that all reducers before the decoder leave; rows filled up to the longest.

    Args:
        shape: of the model.
        tokens: of all images.
        masks: whether dropped tokens stay in the sequence, zero, and are projected too.
    """
    if not tokens.sample:
        return 0.0
    # Without a step before the decoder, what its first layer sees, which the images of a prompt share.
    of_each = [-(-tokens.layer_counts[prompt][0] // tokens.sample.count(prompt)) for prompt in tokens.sample]
    with_cls = shape.keep_cls
    for step in tokens.steps:
        if step.step.reducer.stage == "projector" and _acts(step):
            of_each, with_cls = step.entering, shape.vision.has_cls
            break
        of_each = step.leaving
    else:
        if masks and tokens.decoder is None:
            of_each = [shape.vision.num_patches]
    projected = len(tokens.sample) * (max(of_each) + int(with_cls))
    width = shape.decoder.hidden_size
    return product(projected, shape.vision.patch_width, width) + product(projected, width, width)
