"""What CDPruner promises: the greedy mode of a DPP, and a relevance that is CLIP's where CLIP is at hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from adavtp.modeling.reducers.cdpruner import CDPrunerReducer
from adavtp.modeling.vision.features import VisionFeatures
from tiny_features import features_of, places_of, tiny_features
from tiny_models import tiny_config

CONFIG = tiny_config()

TEXT_LENGTH = 10
LETTERS = "abcdefghij"


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def normalised_relevance(cosines: np.ndarray, sign: float) -> np.ndarray:
    return (sign * cosines - min(sign * cosines) + 1e-6) / (max(cosines) - min(cosines))


def greedy_by_determinants(tokens: np.ndarray, weights: np.ndarray, num_keep: int) -> list[int]:
    """One token after another, for each candidate the determinant of the kernel with it, in float64."""
    unit = unit_rows(tokens)
    kernel = weights[:, None] * (unit @ unit.T) * weights
    chosen: list[int] = []
    while len(chosen) < num_keep:
        volume = {}
        for candidate in sorted(set(range(len(tokens))) - set(chosen)):
            index = [*chosen, candidate]
            # Rounded, so that what is equal is equal.
            volume[candidate] = round(np.linalg.slogdet(kernel[np.ix_(index, index)])[1], 9)
        chosen.append(max(volume, key=lambda candidate: (volume[candidate], -candidate)))
    return sorted(chosen)


# Without CLIP


@pytest.mark.parametrize("parameters", [{}, {"negate": True}, {"theta": 0.5}, {"theta": 0.9, "negate": True}])
@pytest.mark.parametrize("num_keep", [1, 4, 10, 14])
def test_it_is_the_greedy_mode_of_the_dpp_by_its_definition(num_keep: int, parameters: dict) -> None:
    features = tiny_features(3, 14, width=16)
    keep = CDPrunerReducer(CONFIG, **parameters)(features, torch.full((3,), num_keep)).keep
    for image, chosen in enumerate(places_of(keep)):
        tokens, question = features.patches[image].double().numpy(), features.question[image].double().numpy()
        cosines = unit_rows(tokens) @ unit_rows(question[None])[0]
        relevance = normalised_relevance(cosines, -1.0 if parameters.get("negate") else 1.0)
        theta = parameters.get("theta")
        weights = relevance if theta is None else np.exp(theta / (2 * (1 - theta)) * relevance)
        assert chosen == greedy_by_determinants(tokens, weights, num_keep)


def test_the_first_token_is_the_most_relevant_and_a_copy_of_it_is_not_the_second() -> None:
    patches = torch.tensor([[[0.1, 1.0], [1.0, 0.1], [1.0, 0.1], [0.5, 1.0]]])
    features = features_of(patches, question=torch.tensor([[1.0, 0.0]]))
    reducer = CDPrunerReducer(CONFIG)
    assert places_of(reducer(features, torch.tensor([1])).keep) == [[1]]
    assert places_of(reducer(features, torch.tensor([2])).keep) == [[1, 3]]


def test_theta_of_zero_looks_at_diversity_alone() -> None:
    features = tiny_features(3, 14, width=16)
    other = features_of(features.patches, question=-features.question)
    reducer = CDPrunerReducer(CONFIG, theta=0.0)
    keep, same = (reducer(asked, torch.tensor([5, 5, 5])).keep for asked in (features, other))
    assert torch.equal(keep, same)


@pytest.mark.parametrize("negate", [False, True])
def test_where_everything_is_as_relevant_diversity_alone_decides(negate: bool) -> None:
    patches = nn.functional.pad(tiny_features(3, 14, width=16).patches, (0, 1))
    features = features_of(patches, question=torch.eye(17)[-1].expand(3, -1))
    num_keep = torch.tensor([3, 5, 9])
    keep, diverse = (
        CDPrunerReducer(CONFIG, negate=negate, theta=theta)(features, num_keep).keep for theta in (None, 0.0)
    )
    assert torch.equal(keep, diverse)
    assert places_of(keep) == [
        greedy_by_determinants(image.double().numpy(), np.ones(14), count)
        for image, count in zip(patches, num_keep.tolist(), strict=True)
    ]


def test_theta_next_to_one_looks_at_relevance_alone() -> None:
    features = tiny_features(3, 14, width=16)
    keep = CDPrunerReducer(CONFIG, theta=0.99999)(features, torch.tensor([5, 5, 5])).keep
    cosines = nn.functional.cosine_similarity(features.patches, features.question[:, None], dim=-1)
    assert places_of(keep) == cosines.topk(5).indices.sort(dim=-1).values.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_token_is_taken_twice_beyond_the_rank_of_the_features(dtype: torch.dtype) -> None:
    features = tiny_features(60, 60, dtype, width=7)
    num_keep = torch.arange(1, 61)
    assert torch.equal(CDPrunerReducer(CONFIG)(features, num_keep).num_keep, num_keep)


def test_what_the_chosen_tokens_span_comes_last_and_then_the_most_relevant_first() -> None:
    # Tokens 0 to 3 lie in a plane, which any two of them span, and token 4 stands alone and is the least relevant.
    patches = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.01, 1.0]]])
    features = features_of(patches, question=torch.tensor([[1.0, 0.2, 0.0]]))
    reducer = CDPrunerReducer(CONFIG)
    chosen = [set(places_of(reducer(features, torch.tensor([count])).keep)[0]) for count in range(1, 6)]
    added = [chosen[0], *(after - before for before, after in zip(chosen, chosen[1:], strict=False))]
    # Token 3 is the most relevant but for token 0, as cosines with (1, 0.2) go: 0.98, 0.20, 0.83, 0.96, 0.00.
    assert added == [{0}, {2}, {4}, {3}, {1}]


def test_tokens_of_no_length_come_last() -> None:
    patches = torch.eye(6)[None].clone()
    patches[0, [1, 3]] = 0.0
    reducer = CDPrunerReducer(CONFIG, theta=0.0)
    assert places_of(reducer(features_of(patches, question=torch.ones(1, 6)), torch.tensor([4])).keep) == [
        [0, 2, 4, 5]
    ]


# With CLIP


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint as they are published: configuration, weights, and a byte-pair vocabulary of letters."""
    folder = tmp_path_factory.mktemp("clip")
    words = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    config = CLIPConfig(
        text_config=sizes | {"vocab_size": len(words), "max_position_embeddings": TEXT_LENGTH} | ids,
        vision_config=sizes | {"image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompt_tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's own tokenizer, one id a word and other ids than CLIP's."""
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["<pad>", "<s>", "</s>", *(2 * letter for letter in LETTERS)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


# In ids of the prompts' tokenizer, in which 3 + i is the i-th letter twice, with the start token and columns of other
# things between; and in CLIP's words. The first takes three segments: 9 words of 2 letters against 8 letters in each.
PROMPTS = [[1, -1, 3, 5, 3, 4, -1, 6, 6, 7, 8, 12], [-1, -1, -1, 1, 9, 10, -1, -1, -1, -1, -1, -1], [-1] * 12]
TEXTS = ["aa cc aa bb dd dd ee ff jj", "gg hh", ""]


def clip_features(dtype: torch.dtype = torch.float32) -> VisionFeatures:
    generator = torch.Generator().manual_seed(3)
    patches, tower_patches = (torch.randn(3, 14, width, generator=generator).to(dtype) for width in (20, 32))
    return features_of(patches, tower_patches=tower_patches, question_ids=torch.tensor(PROMPTS))


@torch.no_grad()
def clip_cosines(folder: Path, tower_patches: torch.Tensor) -> np.ndarray:
    """Each patch with each segment of its text, one segment at a time and without padding; the mean of cosines."""
    clip, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    cosines = []
    for patches, text in zip(tower_patches, TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"][1:-1]
        segments = [ids[first : first + TEXT_LENGTH - 2] for first in range(0, len(ids), TEXT_LENGTH - 2)] or [[]]
        projected = unit_rows(clip.visual_projection(clip.vision_model.post_layernorm(patches)).double().numpy())
        of_segment = []
        for segment in segments:
            wrapped = torch.tensor([[tokenizer.bos_token_id, *segment, tokenizer.eos_token_id]])
            text_features = clip.text_projection(clip.text_model(wrapped).last_hidden_state[:, -1])
            of_segment.append(projected @ unit_rows(text_features.double().numpy())[0])
        cosines.append(np.mean(of_segment, axis=0))
    return np.array(cosines)


@pytest.mark.parametrize("negate", [None, True, False])
def test_with_clip_relevance_is_clip_s_own_and_negated_unless_told(
    clip_folder: Path, prompt_tokenizer_folder: Path, negate: bool | None
) -> None:
    features = clip_features()
    reducer = CDPrunerReducer(CONFIG, str(clip_folder), str(prompt_tokenizer_folder), negate=negate)
    keep = reducer(features, torch.tensor([4, 5, 9])).keep
    cosines = clip_cosines(clip_folder, features.tower_patches)
    for image, count in enumerate([4, 5, 9]):
        relevance = normalised_relevance(cosines[image], 1.0 if negate is False else -1.0)
        expected = greedy_by_determinants(features.patches[image].double().numpy(), relevance, count)
        assert places_of(keep)[image] == expected


def test_a_long_question_is_the_mean_of_its_segments(clip_folder: Path, prompt_tokenizer_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    lengths = [len(tokenizer(text)["input_ids"]) - 2 for text in TEXTS]
    assert [math.ceil(length / (TEXT_LENGTH - 2)) for length in lengths] == [3, 1, 0]
    features = clip_features()
    reducer = CDPrunerReducer(CONFIG, str(clip_folder), str(prompt_tokenizer_folder))
    cosines = reducer.clip_text.cosines(features.tower_patches, features.question_ids)
    assert np.allclose(cosines, clip_cosines(clip_folder, features.tower_patches), atol=1e-5)


def test_with_clip_a_batch_is_the_same_as_alone_in_either_precision(
    clip_folder: Path, prompt_tokenizer_folder: Path
) -> None:
    reducer = CDPrunerReducer(CONFIG, str(clip_folder), str(prompt_tokenizer_folder))
    num_keep = torch.tensor([3, 14, 8])
    for dtype in (torch.float32, torch.bfloat16):
        features = clip_features(dtype)
        keep = reducer(features, num_keep).keep
        assert torch.equal(keep.sum(dim=-1), num_keep)
        rows = [torch.tensor([row]) for row in range(3)]
        assert torch.equal(keep, torch.cat([reducer(features.images(row, 14), num_keep[row]).keep for row in rows]))


def test_clip_is_loaded_when_it_is_needed_and_is_no_part_of_the_model(
    clip_folder: Path, prompt_tokenizer_folder: Path
) -> None:
    assert CDPrunerReducer(CONFIG, "no/such-folder").needs == ("question_ids", "tower_patches")
    assert CDPrunerReducer(CONFIG).needs == ("question",)
    reducer = CDPrunerReducer(CONFIG, str(clip_folder), str(prompt_tokenizer_folder))
    reducer(clip_features(), torch.tensor([4, 5, 9]))
    assert not reducer.state_dict() and not list(reducer.parameters())


def test_the_prompt_s_tokenizer_is_the_checkpoint_s_by_default(
    clip_folder: Path, prompt_tokenizer_folder: Path
) -> None:
    config = tiny_config()
    features, num_keep = clip_features(), torch.tensor([4, 5, 9])
    with pytest.raises(ValueError, match="no `tokenizer`"):
        CDPrunerReducer(config, str(clip_folder))(features, num_keep)
    named = CDPrunerReducer(config, str(clip_folder), str(prompt_tokenizer_folder))(features, num_keep).keep
    config.name_or_path = str(prompt_tokenizer_folder)
    assert torch.equal(CDPrunerReducer(config, str(clip_folder))(features, num_keep).keep, named)


def test_what_cannot_go_with_clip_is_refused(clip_folder: Path, prompt_tokenizer_folder: Path) -> None:
    with pytest.raises(ValueError, match="'siglip_vision_model'"):
        CDPrunerReducer(tiny_config("siglip"), str(clip_folder))
    with pytest.raises(ValueError, match="`vision_feature_layer` is"):
        CDPrunerReducer(tiny_config(vision_feature_layer=[-2, -1]), str(clip_folder))
    with pytest.raises(ValueError, match="`tokenizer` is 'somewhere'"):
        CDPrunerReducer(CONFIG, tokenizer="somewhere")
    narrow = features_of(torch.ones(1, 4, 8), tower_patches=torch.ones(1, 4, 16), question_ids=torch.ones(1, 2).long())
    with pytest.raises(ValueError, match="whose vision tower is 32 wide; this model's is 16"):
        CDPrunerReducer(CONFIG, str(clip_folder), str(prompt_tokenizer_folder))(narrow, torch.tensor([2]))
