"""What ApET promises: tokens that a few basis tokens cannot say, the basis itself, and everything else merged in."""

import pytest
import torch

from adavtp.modeling.reducers.apet import (
    ApETLayerReducer,
    ApETReducer,
    approximation_errors,
    compressed,
    farthest_points,
)
from adavtp.modeling.reducers.base import build_reducer
from tiny_decoder_views import deep_config, tiny_view
from tiny_features import tiny_features
from tiny_models import tiny_config


def reducer(**parameters: int) -> ApETReducer:
    return build_reducer("apet", tiny_config(), **parameters)


def basis_by_definition(x: torch.Tensor, number: int) -> list[int]:
    basis = [0]
    while len(basis) < min(number, len(x)):
        rest = [token for token in range(len(x)) if token not in basis]
        nearest = [min(float((x[token] - x[other]).square().sum()) for other in basis) for token in rest]
        basis.append(rest[nearest.index(max(nearest))])
    return basis


def errors_by_definition(x: torch.Tensor, basis: list[int]) -> list[float]:
    """How far each token is from the span of the basis, by ridge regression in closed form, token by token."""
    span = x[basis].double()
    errors = []
    for token, own in enumerate(x.double()):
        weights = torch.linalg.inv(span @ span.T + 1e-5 * torch.eye(len(basis))) @ span @ own
        errors.append(0.0 if token in basis else float((own - weights @ span).norm()))
    return errors


def compressed_by_definition(x: torch.Tensor, num_keep: int, num_basis: int, spatial: bool) -> dict[int, torch.Tensor]:
    """The kept places and what stands there."""
    basis = basis_by_definition(x, num_basis)
    errors = errors_by_definition(x, basis)
    ranked = sorted(range(len(x)), key=lambda token: (-errors[token], token))
    kept, dropped = ranked[:num_keep], ranked[num_keep:]
    num_basis = min(len(basis), num_keep - 1)
    targets, places = kept[: num_keep - num_basis], kept[num_keep - num_basis :]
    groups = {target: [target] for target in targets}
    for token in dropped:
        cosines = [float(torch.cosine_similarity(x[token].double(), x[other].double(), dim=0)) for other in targets]
        # Of equally near ones the earlier in the image.
        best = min(other for other, cosine in zip(targets, cosines, strict=True) if cosine == max(cosines))
        groups[best].append(token)
    tokens = {target: x[members].mean(dim=0) for target, members in groups.items()}
    places = sorted(places) if spatial else places
    return tokens | {place: x[token] for place, token in zip(places, basis, strict=False)}


@pytest.mark.parametrize("basis", [1, 3, 10])
def test_it_is_what_the_definition_says(basis: int) -> None:
    features = tiny_features(3, 16)
    for num_keep in (1, 2, 5, 12, 15):
        selection = reducer(basis=basis)(features, torch.full((3,), num_keep))
        for image in range(3):
            expected = compressed_by_definition(features.patches[image], num_keep, basis, spatial=True)
            assert selection.positions[image].tolist() == sorted(expected)
            tokens = torch.stack([expected[place] for place in sorted(expected)])
            torch.testing.assert_close(selection.features[image], tokens, atol=1e-5, rtol=1e-5)


def test_a_token_that_the_basis_can_say_leaves_first() -> None:
    # The basis is tokens 0 and 1; all but the fourth and the sixth lie in their plane.
    x = torch.tensor([[9.0, 0, 0, 0], [-9, 5, 0, 0], [1, 1, 0, 0], [2, 1, 3, 0], [0, 2, 0, 0], [1, 0, 0, 2]])[None]
    is_token = torch.ones(1, 6, dtype=torch.bool)
    basis = farthest_points(x, is_token, 2)
    assert basis.tolist() == [[0, 1]]
    errors = approximation_errors(x, is_token, basis)
    torch.testing.assert_close(errors, torch.tensor([[0.0, 0, 0, 3, 0, 2]]), atol=1e-4, rtol=0)
    keep, tokens = compressed(x, is_token, basis, errors.round(), torch.tensor([4]), spatial_places=True)
    # 3 and 5 stay for their errors, 0 and 1 are the first of those without any, and hold themselves.
    assert keep[0].nonzero()[:, 0].tolist() == [0, 1, 3, 5]
    torch.testing.assert_close(tokens[0, :2], x[0, :2])
    # 2 and 4 point the way of 3.
    torch.testing.assert_close(tokens[0, 3], x[0, [2, 3, 4]].mean(dim=0))
    torch.testing.assert_close(tokens[0, 5], x[0, 5])


@pytest.mark.parametrize("side", ["left", "right"])
def test_inside_the_decoder_it_is_the_same_on_hidden_states_and_the_basis_follows_the_errors(side: str) -> None:
    view, _ = tiny_view(side=side)
    layer = ApETLayerReducer(deep_config(3), basis=2)
    stays, hidden_states = layer.reduce(view, layer.scores(view, 0), torch.tensor([4, 3]))
    for row, num_keep in enumerate((4, 3)):
        columns = view.is_visual[row].nonzero()[:, 0]
        x = view.hidden_states[row, columns]
        expected = compressed_by_definition(x, num_keep, 2, spatial=False)
        kept = stays[row, columns].nonzero()[:, 0].tolist()
        assert kept == sorted(expected)
        for place, token in expected.items():
            torch.testing.assert_close(hidden_states[row, columns[place]], token, atol=1e-5, rtol=1e-5)
        text = ~view.is_visual[row]
        assert torch.equal(hidden_states[row, text], view.hidden_states[row, text])


def test_without_merging_what_stays_is_as_it_was() -> None:
    view, _ = tiny_view()
    layer = ApETLayerReducer(deep_config(3), basis=2, merge=False)
    scores = layer.scores(view, 0)
    stays, hidden_states = layer.reduce(view, scores, torch.tensor([4, 3]))
    assert hidden_states is view.hidden_states
    for row, num_keep in enumerate((4, 3)):
        columns = view.is_visual[row].nonzero()[:, 0]
        errors = errors_by_definition(
            view.hidden_states[row, columns], basis_by_definition(view.hidden_states[row, columns], 2)
        )
        torch.testing.assert_close(scores[row, columns], torch.tensor(errors), atol=1e-5, rtol=1e-4)
        best = sorted(range(len(errors)), key=lambda place: (-errors[place], place))[:num_keep]
        assert stays[row, columns].nonzero()[:, 0].tolist() == sorted(best)


def test_a_prompt_that_keeps_all_beside_one_that_does_not_stays_as_it_is() -> None:
    view, _ = tiny_view()
    layer = ApETLayerReducer(deep_config(3))
    stays, hidden_states = layer.reduce(view, layer.scores(view, 0), torch.tensor([2, 5]))
    assert stays[1].all() and torch.equal(hidden_states[1], view.hidden_states[1])


def test_the_published_cut_is_before_layer_16_and_leaves_a_third() -> None:
    layer = ApETLayerReducer(deep_config(32))
    assert layer.layer_counts(96, None, 32) == [96] * 16 + [32] * 16
    # 64 of 576 in the mean, as in the authors' scripts.
    assert layer.layer_counts(96, 64, 32) == [96] * 16 + [32] * 16
