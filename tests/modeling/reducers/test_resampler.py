"""What the resampler promises: nested queries that read the whole image, at any budget, on the patches' own scale."""

import math

import torch
from torch import nn

from adavtp import AdaVTPConfig
from adavtp.modeling.reducers.resampler import ResamplerReducer, grid_encoding
from adavtp.modeling.vision.features import VisionFeatures
from tiny_models import NUM_PATCHES, tiny_config

WIDTH = 32


def features_of(patches: torch.Tensor, positions: torch.Tensor | None = None) -> VisionFeatures:
    positions = torch.arange(patches.shape[1]) if positions is None else positions
    return VisionFeatures(patches, positions.expand(len(patches), -1), num_patches=NUM_PATCHES)


def random_patches(num_images: int, num_tokens: int = NUM_PATCHES, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(num_images, num_tokens, width, generator=torch.Generator().manual_seed(0))


def resampler(config: AdaVTPConfig | None = None, spread: float = 0.2, **parameters: int) -> ResamplerReducer:
    """A resampler whose every weight is random, so that nothing is hidden by zeros and ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reducer = ResamplerReducer(config or tiny_config(), **parameters)
        for parameter in reducer.parameters():
            nn.init.normal_(parameter, mean=0.1, std=spread)
    return reducer


@torch.no_grad()
def test_the_first_tokens_are_the_same_at_any_budget() -> None:
    reducer, features = resampler(), features_of(random_patches(2))
    everything = reducer(features, torch.tensor([16, 16])).features
    for num_keep in range(1, 17):
        fewer = reducer(features, torch.tensor([num_keep, num_keep])).features
        assert torch.allclose(fewer, everything[:, :num_keep], atol=1e-5)


@torch.no_grad()
def test_tokens_are_what_attention_by_its_definition_makes_of_the_patches() -> None:
    reducer, patches = resampler(num_layers=2, num_heads=4), random_patches(1)
    tokens = reducer(features_of(patches), torch.tensor([5])).features[0]
    places = torch.tensor([place_by_definition(position) for position in range(NUM_PATCHES)])
    for number in range(5):
        latent = reducer.query_norm(reducer.queries.weight[number])
        for layer in reducer.layers:
            source = layer.patch_norm(patches[0]) + places
            query = layer.q_proj(layer.latent_norm(latent))
            read = []
            for head in range(4):
                part = slice(8 * head, 8 * head + 8)
                keys, values = layer.k_proj(source)[:, part], layer.v_proj(source)[:, part]
                weights = [math.exp(float(query[part] @ key) / math.sqrt(8)) for key in keys]
                read.append(sum(weight / sum(weights) * value for weight, value in zip(weights, values, strict=True)))
            latent = latent + layer.out_proj(torch.cat(read))
            latent = latent + layer.mlp(latent)
        mean = patches[0].mean(dim=0)
        deviation = ((patches[0] - mean) ** 2).mean(dim=0).sqrt()
        assert torch.allclose(tokens[number], mean + deviation * reducer.output_norm(latent), atol=1e-3)


def place_by_definition(position: int, width: int = WIDTH, side: int = 4) -> list[float]:
    """Sines and then cosines of the row, and the same of the column, at width / 4 frequencies from 1 down to 1e-4."""
    encoding = []
    for line in (position // side, position % side):
        angles = [line * 10_000.0 ** (-index / (width // 4)) for index in range(width // 4)]
        encoding += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return encoding


def test_a_token_s_place_is_where_its_patch_was_in_the_image() -> None:
    expected = torch.tensor([[place_by_definition(position) for position in (3, 9, 14)]])
    assert torch.allclose(grid_encoding(torch.tensor([[3, 9, 14]]), (4, 4), WIDTH), expected, atol=1e-6)
    assert grid_encoding(torch.tensor([[3, 9, 14]]), (4, 4), 30).shape == (1, 3, 30)
    patches, reducer = random_patches(1, 3), resampler()
    with torch.no_grad():
        here, there = (
            reducer(features_of(patches, torch.tensor(positions)), torch.tensor([2])).features
            for positions in ([3, 9, 14], [3, 9, 15])
        )
    assert not torch.allclose(here, there)


@torch.no_grad()
def test_the_order_of_the_patches_with_their_places_does_not_matter() -> None:
    patches, order, reducer = random_patches(1), torch.randperm(16), resampler()
    one, other = (
        reducer(features_of(patches[:, index], index), torch.tensor([6])).features
        for index in (order.sort()[0], order)
    )
    assert torch.allclose(one, other, atol=1e-5)


@torch.no_grad()
def test_tokens_stand_at_a_uniform_stride_in_the_order_of_the_queries() -> None:
    reducer = resampler()
    for num_tokens in (16, 11):
        features = features_of(random_patches(num_tokens, num_tokens))
        selection = reducer(features, torch.arange(1, num_tokens + 1))
        for num_keep, row in enumerate(selection.positions.tolist(), start=1):
            expected = [math.floor((step + 0.5) * num_tokens / num_keep) for step in range(num_keep)]
            assert row == expected + [-1] * (num_tokens - num_keep)
        assert selection.num_keep.tolist() == list(range(1, num_tokens + 1))
        assert all(
            keep.nonzero()[:, 0].tolist() == row[row >= 0].tolist()
            for keep, row in zip(selection.keep, selection.positions, strict=True)
        )


@torch.no_grad()
def test_new_weights_make_tokens_on_the_scale_of_the_patches_channel_by_channel() -> None:
    torch.manual_seed(0)
    reducer = ResamplerReducer(tiny_config())
    for module in reducer.modules():
        # As transformers sets up new layers of a model of this kind.
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    scale, shift = torch.logspace(-2, 3, WIDTH), torch.linspace(-5, 5, WIDTH)
    patches = random_patches(1) * scale + shift
    tokens = reducer(features_of(patches), torch.tensor([16])).features[0]
    assert ((tokens - patches[0].mean(dim=0)) / patches[0].std(dim=0)).abs().max() < 5
    ratio = (tokens - patches[0].mean(dim=0)).square().mean(dim=0).sqrt() / patches[0].std(dim=0)
    assert ratio.min() > 0.3 and ratio.max() < 3
    # And no two queries read the same.
    normalised = nn.functional.normalize((tokens - patches[0].mean(dim=0)) / patches[0].std(dim=0), dim=-1)
    assert (normalised @ normalised.T).fill_diagonal_(0.0).max() < 0.9


def test_every_weight_learns() -> None:
    reducer, patches = resampler(spread=0.1), random_patches(2).requires_grad_()
    weights = torch.randn(2, 16, WIDTH, generator=torch.Generator().manual_seed(1))
    (reducer(features_of(patches), torch.tensor([16, 16])).features * weights).sum().backward()
    silent = [name for name, parameter in reducer.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert silent == [] and patches.grad.abs().sum() > 0


@torch.no_grad()
def test_several_feature_layers_make_a_wider_resampler() -> None:
    config = tiny_config(vision_feature_layer=[-2, -1])
    features = features_of(random_patches(1, width=64))
    assert resampler(config)(features, torch.tensor([3])).features.shape == (1, 3, 64)
