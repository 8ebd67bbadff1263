"""What reducers promise: a name each, room for one's own, and a random control that repeats itself."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from adavtp import AdaVTPConfig, Selection, TokenReducer, VisionFeatures, register_reducer
from adavtp.modeling.reducers.base import REDUCERS, build_reducer, reducer_parameters
from tiny_models import NUM_PATCHES, targets, tiny_batch, tiny_model


@pytest.fixture
def registry() -> Iterator[None]:
    """Takes back what a test registers."""
    before = dict(REDUCERS)
    yield
    REDUCERS.clear()
    REDUCERS.update(before)


class FirstPatches(TokenReducer):
    """Keeps the first K patches."""

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        column = torch.arange(features.patches.shape[1], device=num_keep.device)
        return Selection.from_keep(column < num_keep[:, None])


class LearnedPatches(TokenReducer):
    """Keeps the best patches by a linear score of patch and budget."""

    needs = ("budget",)

    def __init__(self, config: AdaVTPConfig) -> None:
        super().__init__(config)
        self.score = nn.Linear(config.vision_config.hidden_size, 1)

    def forward(self, features: VisionFeatures, num_keep: torch.Tensor) -> Selection:
        scores = self.score(features.patches * features.budget[:, None])[..., 0]
        ranks = scores.argsort(dim=-1, descending=True).argsort(dim=-1)
        keep = ranks < num_keep[:, None]
        return Selection.from_keep(keep, keep + scores - scores.detach())


# The random control


@torch.no_grad()
def test_random_repeats_itself_and_differs_between_images_and_seeds() -> None:
    model = tiny_model(reducer="random")
    batch = tiny_batch(model.config, [1] * 8)
    keep = model.select_tokens(**batch, token_budget=0.5).keep
    torch.manual_seed(1)
    assert torch.equal(model.select_tokens(**batch, token_budget=0.5).keep, keep)
    assert torch.equal(model(**batch, token_budget=0.5).selection.keep, keep)
    assert len({tuple(row.tolist()) for row in keep}) == 8
    model.set_reducer("random", seed=1)
    assert (model.select_tokens(**batch, token_budget=0.5).keep != keep).any(dim=-1).all()


@torch.no_grad()
def test_a_larger_random_budget_adds_to_a_smaller_one() -> None:
    model = tiny_model(reducer="random")
    batch = tiny_batch(model.config, [1])
    kept = [model.select_tokens(**batch, token_budget=count).keep for count in range(2, NUM_PATCHES + 1)]
    assert all((larger | ~smaller).all() for smaller, larger in zip(kept, kept[1:], strict=False))


def test_random_draws_every_patch_equally_often() -> None:
    model = tiny_model(reducer="random")
    pixels = torch.randn(4000, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(NUM_PATCHES).expand(4000, -1)
    features = VisionFeatures(torch.zeros(4000, NUM_PATCHES, 1), positions, pixel_values=pixels)
    for training in (True, False):
        torch.manual_seed(0)
        model.train(training)
        share = model.model.reducers["random"](features, torch.full((4000,), 4)).keep.float().mean(dim=0)
        # A share of 4000 draws with probability 1/4 has a standard deviation of 0.0068.
        assert (share - 0.25).abs().max() < 0.03


def test_random_training_draws_anew_and_trains_the_rest() -> None:
    model = tiny_model(reducer="random").train()
    batch = tiny_batch(model.config, [1])
    torch.manual_seed(0)
    drawn = set()
    for _ in range(5):
        output = model(**batch, labels=targets(batch), token_budget=0.4)
        drawn.add(tuple(output.selection.positions[0].tolist()))
    assert len(drawn) > 1
    output.loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_what_a_reducer_does_not_need_is_not_computed() -> None:
    model = tiny_model(reducer="random")
    ran = []
    model.model.budget_token.register_forward_hook(lambda *_: ran.append(True))
    with torch.no_grad():
        model(**tiny_batch(model.config, [1]), token_budget=0.4)
        assert not ran
        model.set_reducer("adaptive")
        model(**tiny_batch(model.config, [1]), token_budget=0.4)
    assert ran


# One's own


@torch.no_grad()
def test_a_reducer_of_one_s_own_works_by_its_name(registry: None) -> None:
    assert register_reducer("first")(FirstPatches) is FirstPatches
    model = tiny_model()
    batch = tiny_batch(model.config, [1, 2])
    before = model(**batch, token_budget=0.4).logits
    model.set_reducer("first")
    assert model.config.reducer == "first"
    output = model(**batch, token_budget=[0.4, 0.2])
    assert output.selection.positions.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, -1, -1, -1], [0, 1, 2, -1, -1, -1]]
    assert torch.equal(model.select_tokens(**batch, token_budget=[0.4, 0.2]).keep, output.selection.keep)
    model.set_reducer("adaptive")
    assert torch.equal(model(**batch, token_budget=0.4).logits, before)

    assert tiny_model(reducer="first").select_tokens(**batch, token_budget=2).positions.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reducer_that_is_set_later_has_the_model_s_dtype_and_learns(dtype: torch.dtype, registry: None) -> None:
    register_reducer("learned")(LearnedPatches)
    model = tiny_model().to(dtype).train()
    model.set_reducer("learned")
    assert model.model.reducers["learned"].training
    batch = tiny_batch(model.config, [1, 1])
    output = model(**batch, labels=targets(batch), token_budget=[0.4, 0.7])
    assert output.selection.num_keep.tolist() == [6, 11]
    output.loss.backward()
    gradient = model.model.reducers["learned"].score.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_what_is_no_reducer_cannot_be_registered(registry: None) -> None:
    for wrong in (nn.Linear, object, len):
        with pytest.raises(TypeError, match="TokenReducer"):
            register_reducer("wrong")(wrong)
    assert "wrong" not in REDUCERS


def test_a_name_belongs_to_one_class(registry: None) -> None:
    register_reducer("first")(FirstPatches)
    register_reducer("first")(FirstPatches)
    with pytest.raises(ValueError) as refusal:
        register_reducer("first")(LearnedPatches)
    for fragment in ("`name`", "'first'", "FirstPatches"):
        assert fragment in str(refusal.value)
    with pytest.raises(ValueError, match="VisionTokenController"):
        register_reducer("adaptive")(FirstPatches)
    assert REDUCERS["first"] is FirstPatches


@torch.no_grad()
def test_an_unknown_name_is_refused_and_changes_nothing() -> None:
    model = tiny_model()
    batch = tiny_batch(model.config, [1])
    before = model(**batch, token_budget=0.4).logits
    with pytest.raises(ValueError) as refusal:
        model.set_reducer("clairvoyant")
    for fragment in ("`reducer`", "'clairvoyant'", "adaptive", "random"):
        assert fragment in str(refusal.value)
    assert model.config.reducer == "adaptive"
    assert torch.equal(model(**batch, token_budget=0.4).logits, before)
    with pytest.raises(ValueError, match="clairvoyant"):
        tiny_model(reducer="clairvoyant")


def test_a_reducer_without_forward_says_so(registry: None) -> None:
    register_reducer("empty")(type("Empty", (TokenReducer,), {}))
    model = tiny_model(reducer="empty")
    with pytest.raises(NotImplementedError, match=r"Empty has to define forward"):
        model(**tiny_batch(model.config, [1]), token_budget=0.4)


# What a file of JSON, or a call, can hold in the place of a parameter.
ODD = [True, -1, 10**30, float("nan"), float("inf"), "x", b"x", [], [0.5], [None], {}, torch.tensor([0.5, 0.5]), 1j]


@pytest.mark.parametrize("name", sorted(REDUCERS))
def test_a_parameter_of_any_type_is_taken_or_refused_in_a_sentence_that_names_it(name: str) -> None:
    config = tiny_model().config
    for parameter in reducer_parameters(name):
        for value in ODD:
            try:
                build_reducer(name, config, **{parameter: value})
            except ValueError as error:
                assert parameter in str(error)
