"""Reducers of videos: by their published definitions, exactly K, alone or in a stack."""

import math
from typing import Any

import pytest
import torch

from adavtp import TokenReducer, VisionFeatures
from adavtp.modeling.budget.token_budget import shared_by_weight
from adavtp.modeling.reducers.base import build_reducer
from pruned_by_hand import HandPruned
from tiny_families import FAMILIES, Writer, batch_of, budgeted
from tiny_models import tiny_batch, tiny_config, tiny_model

NAMES = ["evs", "progressive", "vidcom2"]
READ_VIDEOS = ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "glm4v", "gemma4")


def reducer(name: str, **parameters: Any) -> TokenReducer:
    return build_reducer(name, tiny_config(), **parameters).eval()


def video(num_frames: int, rows: int, columns: int, seed: int = 0, num_videos: int = 1) -> VisionFeatures:
    """Videos whose frames change a little, at some places more than at others."""
    generator = torch.Generator().manual_seed(seed)
    size = rows * columns
    change = torch.rand(num_videos, num_frames, size, 1, generator=generator) ** 3
    steps = torch.randn(num_videos, num_frames, size, 10, generator=generator)
    tokens = (steps[:, :1] + (change * steps).cumsum(dim=1)).flatten(1, 2)
    return VisionFeatures(
        tokens,
        torch.arange(num_frames * size).expand(num_videos, -1),
        num_patches=num_frames * size,
        grids=torch.tensor([[num_frames * rows, columns]] * num_videos),
        frames=torch.full((num_videos,), num_frames),
    )


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.double() @ other.double() / (one.double().norm() * other.double().norm()))


def evs_by_definition(tokens: torch.Tensor, size: int, pruning_rate: float) -> list[int]:
    """
    What EVS retains: max(tokens of a frame, int(N (1 - q))) tokens with the largest dissimilarity to the frame before,
    that of the first frame being larger than any.
    """
    dissimilarity = [math.inf] * size
    dissimilarity += [1 - cosine(tokens[index], tokens[index - size]) for index in range(size, len(tokens))]
    ranked = sorted(range(len(tokens)), key=lambda index: -dissimilarity[index])
    return sorted(ranked[: max(size, int(len(tokens) * (1 - pruning_rate)))])


@pytest.mark.parametrize("pruning_rate", [0.0, 0.25, 0.5, 0.7, 0.9])
def test_evs_retains_what_its_definition_does(pruning_rate: float) -> None:
    features = video(5, 2, 3, num_videos=3)
    for number in range(3):
        expected = evs_by_definition(features.patches[number], 6, pruning_rate)
        own = features.images(torch.tensor([number]), 30)
        assert reducer("evs")(own, torch.tensor([len(expected)])).positions.tolist() == [expected]


def vidcom2_by_definition(tokens: torch.Tensor, size: int, base: float) -> list[list[int]]:
    """
    What VidCom2 keeps of each frame, token by token: on the half of the channels with the least variance, normalised,
    the nearness to the means of video and frame; frames share by the softmax of how unusual they are.
    """
    tokens = tokens.double()
    variance = tokens.var(dim=0, correction=0).tolist()
    steady = sorted(range(len(variance)), key=lambda channel: variance[channel])[: len(variance) // 2]
    frames = torch.stack([token[steady] / token[steady].norm() for token in tokens]).split(size)

    def near(token: torch.Tensor, center: torch.Tensor) -> float:
        return sum(math.exp(-float(((token - center) ** 2).sum()) / (2 * 2.0**k)) for k in (-3, -2, -1, 0, 1))

    middle = torch.cat(frames).mean(dim=0)
    to_video = [[near(token, middle) for token in frame] for frame in frames]
    to_frame = [[near(token, frame.mean(dim=0)) for token in frame] for frame in frames]
    unusual = [-sum(own) / size for own in to_video]
    weights = [math.exp((value - max(unusual)) / 0.01) for value in unusual]
    shares = [weight / sum(weights) for weight in weights]
    kept = []
    for number, share in enumerate(shares):
        scale = min(1.0, base * (1 + share - 1 / len(frames)))
        scores = [v + f for v, f in zip(to_video[number], to_frame[number], strict=True)]
        count = max(1, round(scale * size))
        kept.append(sorted(sorted(range(size), key=lambda index: scores[index])[:count]))  # noqa: B023
    return kept


def test_vidcom2_keeps_what_its_definition_does() -> None:
    equal = 0
    for seed in range(2):
        features = video(4, 3, 4, seed)
        for num_keep in range(4, 49, 2):
            expected = vidcom2_by_definition(features.patches[0], 12, num_keep / 48)
            positions = reducer("vidcom2")(features, torch.tensor([num_keep])).positions[0]
            ours = [(positions[positions // 12 == number] % 12).tolist() for number in range(4)]
            if sum(map(len, expected)) == num_keep:
                equal += 1
                assert ours == expected
            elif all(len(own) < 12 for own in expected):
                # It rounds every frame by itself, and misses the budget: it keeps the same, one more or less.
                for mine, its in zip(ours, expected, strict=True):
                    assert abs(len(mine) - len(its)) <= 1
                    assert set(mine) <= set(its) or set(its) <= set(mine)
    assert equal >= 10


def progressive_by_definition(tokens: torch.Tensor, size: int, counts: list[int]) -> list[int]:
    kept = [int((2 * step + 1) * size // (2 * counts[0])) for step in range(counts[0])]
    for number, count in enumerate(counts[1:], start=1):
        own = range(number * size, (number + 1) * size)
        likeness = {index: max(cosine(tokens[index], tokens[other]) for other in kept) for index in own}
        kept += sorted(own, key=lambda index: likeness[index])[:count]  # noqa: B023
    return sorted(kept)


@pytest.mark.parametrize("decay", [0.0, 1.0, 2.5])
def test_a_later_frame_keeps_what_is_least_like_all_that_was_kept_before(decay: float) -> None:
    features = video(4, 3, 4, seed=2)
    for num_keep in (4, 9, 20, 33, 47):
        weights = torch.tensor([12 * (1.0 + number) ** -decay for number in range(4)], dtype=torch.float64)
        counts = shared_by_weight(num_keep, weights, torch.full((4,), 12)).tolist()
        assert counts == sorted(counts, reverse=True) and sum(counts) == num_keep
        expected = progressive_by_definition(features.patches[0], 12, counts)
        selection = reducer("progressive", decay=decay)(features, torch.tensor([num_keep]))
        assert selection.positions[0].tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_every_video_keeps_exactly_k_and_what_it_keeps_alone(name: str) -> None:
    for shape in ((1, 3, 3), (5, 2, 3), (8, 1, 1)):
        size = math.prod(shape)
        features = video(*shape, num_videos=size)
        counts = torch.arange(1, size + 1)
        together = reducer(name)(features, counts)
        assert together.num_keep.tolist() == counts.tolist()
        for number in range(size):
            own = features.images(torch.tensor([number]), size)
            assert torch.equal(reducer(name)(own, counts[number : number + 1]).keep[0], together.keep[number])


def test_eight_frames_of_576_tokens_become_1152_and_288() -> None:
    prompt = Writer("qwen2_vl").prompt(images=(), videos=((8, 24, 24),))
    model, batch = budgeted("qwen2_vl"), batch_of("qwen2_vl", [prompt])
    first = model.select_tokens(**batch, token_budget=1152, reducer="progressive")
    of_frames = first.keep.view(8, 576).sum(dim=-1).tolist()
    assert first.sizes.tolist() == [4608] and sum(of_frames) == 1152
    shares = [1 / (1 + number) for number in range(8)]
    for share, kept in zip(shares, of_frames, strict=True):
        assert abs(kept - 1152 * share / sum(shares)) < 1
    stack = {"progressive": 0.25, "divprune": 0.25}
    both = model.select_tokens(**batch, token_budget=stack, reducer=["progressive", "divprune"])
    assert both.num_keep.tolist() == [288] and bool((both.keep <= first.keep).all())


@pytest.mark.parametrize("name", READ_VIDEOS)
@pytest.mark.parametrize("reducers", ["evs", "vidcom2", ["progressive", "divprune"], ["grid", "evs"]], ids=str)
def test_a_family_s_videos_are_pruned_by_frames_and_the_answer_is_the_stock_model_s(name: str, reducers: Any) -> None:
    images = () if name == "glm4v" else ((2, 2),)
    prompts = [Writer(name).prompt(images=images, videos=((3, 2, 2),)), Writer(name, 5).prompt(images=())]
    model, call = budgeted(name), {"token_budget": 0.5, "reducer": reducers}
    selection = model.select_tokens(**batch_of(name, prompts[:1]), **call)
    assert selection.num_keep.tolist() == [size // 2 for size in selection.sizes.tolist()]
    left = HandPruned(name, prompts[0], selection.keep[selection.is_token])
    written = model.generate(**batch_of(name, prompts), **call, max_new_tokens=4, do_sample=False)
    assert written[0, -4:].tolist() == left.greedy()


def test_frames_of_one_video_are_not_those_of_another_of_the_same_grid() -> None:
    # Both have grids of 6 x 2, of two frames and of three.
    name = "qwen2_5_vl"
    prompts = [Writer(name, seed).prompt(images=(), videos=(size,)) for seed, size in ((1, (2, 3, 2)), (2, (3, 2, 2)))]
    batch = batch_of(name, prompts)
    together = budgeted(name).select_tokens(**batch, token_budget=0.75, reducer="evs")
    for number, prompt in enumerate(prompts):
        alone = budgeted(name).select_tokens(**batch_of(name, [prompt]), token_budget=0.75, reducer="evs")
        assert torch.equal(alone.keep[0], together.keep[number])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in READ_VIDEOS])
def test_where_every_unit_is_an_image_they_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="'evs' cannot act on a .* every unit of this family is an image"):
        budgeted(name)(**batch_of(name, [Writer(name).prompt()]), token_budget=0.5, reducer="evs")


def test_llava_reads_images_only_and_a_decay_that_means_nothing_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="'vidcom2' cannot act on a 'adavtp' model"):
        model(**tiny_batch(model.config, [1]), token_budget=0.5, reducer="vidcom2")
