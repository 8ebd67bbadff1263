"""Tokens for a whole prompt, shared by its images, tiles, frames and videos: by size, attention or novelty."""

import math
from copy import deepcopy
from functools import cache

import pytest
import torch

from adavtp.modeling.families.base import Units
from adavtp.modeling.reducers.hired import shares_of_tiles
from pruned_by_hand import HandPruned, language_inputs, tiles_of_tokens
from tiny_families import ANY_RES, FAMILIES, IMAGE, VIDEO, Prompt, Writer, batch_of, budgeted, stock_model, with_budget
from tiny_models import tiny_batch, tiny_model


def by_hand(total: int, sizes: list[int], weights: list[float]) -> list[int]:
    """Webster's method, token by token: each goes where it is most overdue, after every unit has its first."""
    counts = [1] * len(sizes)
    for _ in range(min(total, sum(sizes)) - len(sizes)):
        open_units = [unit for unit, size in enumerate(sizes) if counts[unit] < size]
        counts[max(open_units, key=lambda unit: (weights[unit] / (counts[unit] + 0.5), -unit))] += 1
    return counts


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_s_tokens_are_shared_by_size_and_a_larger_number_takes_from_no_unit(name: str) -> None:
    model, before = budgeted(name), None
    batch = batch_of(name, [Writer(name).prompt(images=((2, 2), (2, 2) if name == "llava_onevision" else (1, 2)))])
    sizes = model.select_tokens(**batch, token_budget=1.0, reducer="grid").sizes.tolist()
    for total in range(len(sizes), sum(sizes) + 2, max(1, sum(sizes) // 7)):
        kept = model.select_tokens(**batch, token_budget={"prompt": total}, reducer="grid").num_keep.tolist()
        assert kept == by_hand(total, sizes, sizes)
        assert before is None or all(now >= then for now, then in zip(kept, before, strict=True))
        before = kept


@pytest.mark.parametrize("name", ANY_RES)
def test_newlines_stay_with_their_rows_and_are_not_counted(name: str) -> None:
    model = budgeted(name)
    videos = ((2, 2, 2),) if name == "llava_onevision" else ()
    prompt = Writer(name).prompt(images=((2, 2),), videos=videos)
    batch = batch_of(name, [prompt])
    newline = stock_model(name).base_model.image_newline
    is_newline = (language_inputs(stock_model(name), batch)["inputs_embeds"][0] == newline).all(dim=-1)
    outputs = model(**batch, token_budget=0.0, reducer="grid")
    assert int(is_newline.sum()) == 8 + len(videos)
    sizes, kept = outputs.selection.sizes, outputs.selection.num_keep
    assert kept.tolist() == [1] * len(sizes)
    text = sum(token not in (IMAGE, VIDEO) for token in prompt.ids)
    assert len(prompt.ids) == text + int(is_newline.sum()) + int(sizes.sum())
    assert outputs.logits.shape[1] == text + int(is_newline.sum()) + len(sizes)
    left = HandPruned(name, prompt, outputs.selection.keep[outputs.selection.is_token])
    written = model.generate(**batch, token_budget=0.0, reducer="grid", max_new_tokens=4, do_sample=False)
    assert written[0, -4:].tolist() == left.greedy()


@cache
def eager(name: str) -> torch.nn.Module:
    tower = deepcopy(stock_model(name).base_model.vision_tower)
    tower.set_attn_implementation("eager")
    return tower


@torch.no_grad()
def attention_of_tiles(name: str, image: dict[str, torch.Tensor], layer: int) -> torch.Tensor:
    """What each patch of each tile gets in a layer of the stock tower, `[tiles, patches]`: of CLS, or received."""
    attention = eager(name)(image["pixel_values"], output_attentions=True).attentions[layer]
    return attention[:, :, 0, 1:].sum(dim=1) if name == "llava_next" else attention.mean(dim=2).sum(dim=1)


def picture(name: str, seed: int, pixels: tuple[int, int]) -> Prompt:
    """A prompt with one image of so many pixels, whose tiles have 24 a side."""
    writer = Writer(name, seed)
    sizes = torch.tensor(pixels)
    tiles = writer._noise(1 + math.ceil(pixels[0] / 24) * math.ceil(pixels[1] / 24), 3, 24, 24)
    prompt = writer.prompt(images=())
    ids = [IMAGE] * writer._num_packed(tiles, sizes, True)
    return Prompt(prompt.ids[:3] + ids + prompt.ids[3:], [{"pixel_values": tiles, "image_sizes": sizes}], [], [1])


def best(scores: torch.Tensor, count: int) -> list[int]:
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def official_hired(
    budget: torch.Tensor, ranking: torch.Tensor, total: int, alpha: float = 0.5
) -> tuple[list[int], list[list[int]]]:
    """
    HiRED's selection as its authors' code makes it for a whole view and 2 x 2 tiles, of the attention of CLS in the
    first layer and in the one that made the features, `[5, N]` each. Their regions of the tiles are strips of rows, a
    fault; the paper's are here.
    """
    num_tokens = budget.shape[1]
    side = math.isqrt(num_tokens)
    whole = min(int(total * alpha), num_tokens)
    found = [0, 0, 0, 0]
    for patch in best(budget[0], int(num_tokens * (1 - alpha))):
        found[2 * (patch // side // (side // 2)) + patch % side // (side // 2)] += 1
    counts = [whole, *(int((total - whole) * number / sum(found)) for number in found)]
    return counts, [best(scores, count) for scores, count in zip(ranking, counts, strict=True)]


@pytest.mark.parametrize("total", [16, 32, 40])
def test_hired_with_shares_by_attention_is_the_official_selection_on_a_square_of_tiles(total: int) -> None:
    compared = 0
    for seed in range(1, 7):
        prompt = picture("llava_next", seed, (48, 48))
        image = prompt.images[0]
        first, making = (attention_of_tiles("llava_next", image, layer) for layer in (0, 1))
        counts, chosen = official_hired(first, making, total)
        # Its code gives a tile without any none, and drops what it rounds off.
        if 0 in counts or max(counts) > 16 or sum(counts) != total:
            continue
        compared += 1
        budget = {"prompt": total, "unit_weights": "attention"}
        selection = budgeted("llava_next").select_tokens(
            **batch_of("llava_next", [prompt]), token_budget=budget, reducer="hired"
        )
        assert selection.num_keep.tolist() == counts
        assert [row.nonzero()[:, 0].tolist() for row in selection.keep] == chosen
    assert compared >= 2


@pytest.mark.parametrize("name", ANY_RES)
@pytest.mark.parametrize("pixels", [(48, 43), (40, 48), (24, 48), (48, 20)])
def test_tiles_share_by_what_the_whole_view_looks_at_in_their_part_of_the_picture(
    name: str, pixels: tuple[int, int]
) -> None:
    prompt = picture(name, 3, pixels)
    image = prompt.images[0]
    tile = torch.tensor(tiles_of_tokens(name, image)[16:])
    # A newline stands behind every row of the tiles.
    in_grid = tile.view(sum(token == IMAGE for token in prompt.ids) - 16 - len(tile), -1)
    found: dict[int, int] = dict.fromkeys(sorted(set(tile.tolist())), 0)
    for patch in best(attention_of_tiles(name, image, 0)[0], 8):
        # The centre of the patch, and the token of the tiles that holds it, in a picture without padding.
        y, x = (patch // 4 + 0.5) / 4, (patch % 4 + 0.5) / 4
        found[int(in_grid[int(y * in_grid.shape[0]), int(x * in_grid.shape[1])])] += 1
    sizes = [16, *(int((tile == number).sum()) for number in found)]
    weights = [sum(sizes) / 2, *(sum(sizes) / 2 * number / 8 for number in found.values())]
    for total in (9, 16, 23, 30):
        budget = {"prompt": total, "unit_weights": "attention"}
        selection = budgeted(name).select_tokens(**batch_of(name, [prompt]), token_budget=budget, reducer="grid")
        assert selection.sizes.tolist() == sizes
        assert selection.num_keep.tolist() == by_hand(total, sizes, weights)


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma4", "internvl", "minicpmv4_6", "llava_onevision"])
def test_what_is_new_in_a_frame_weighs_more(name: str) -> None:
    writer, stock = Writer(name), stock_model(name)
    if name == "internvl":
        prompt = writer.prompt(images=((2, 2),))
        tiles = prompt.images[0]["pixel_values"]
        tiles[2] = tiles[1] + 0.01 * tiles[2]
        features = stock.base_model.get_image_features(tiles).pooler_output
        frames, shapes = list(features), [(1, 16)] * 5
    else:
        prompt = writer.prompt(images=(), videos=((3, 2, 2), (3, 2, 2)))
        batch = batch_of(name, [prompt])
        names = ("pixel_values_videos", "video_grid_thw", "video_position_ids", "num_frames_per_video")
        given = {key: value for key, value in batch.items() if key in (*names, "target_sizes_videos")}
        made = stock.base_model.get_video_features(**given, return_dict=True).pooler_output
        rows = torch.cat([video[:12] if name == "llava_onevision" else video for video in made])
        frames = list(rows.view(-1, 4, rows.shape[-1]))
        shapes = [(1, 4)] * 6 if name == "minicpmv4_6" else [(3, 4)] * 2
    new = [[1.0] * len(frames[0])]
    for before, frame in zip(frames, frames[1:], strict=False):
        new.append([1 - cosine(token, then) for token, then in zip(frame, before, strict=True)])
    weights, at = [], 0
    for count, _ in shapes:
        weights.append(sum(map(sum, new[at : at + count])))
        at += count
    sizes = [count * size for count, size in shapes]
    for total in (7, 11, 14):
        budget = {"prompt": total, "unit_weights": "novelty"}
        selection = budgeted(name).select_tokens(**batch_of(name, [prompt]), token_budget=budget, reducer="grid")
        assert selection.num_keep.tolist() == by_hand(total, sizes, weights)


def test_the_configuration_says_what_a_budget_does_not_and_both_refuse_what_is_not_known() -> None:
    prompt = picture("llava_next", 2, (48, 48))
    batch = batch_of("llava_next", [prompt])
    model = with_budget("llava_next", unit_weights="attention")
    of_config = model.select_tokens(**batch, token_budget={"prompt": 30}, reducer="grid").num_keep
    said = {"prompt": 30, "unit_weights": "attention"}
    by_size = {"prompt": 30, "unit_weights": "size"}
    assert (
        of_config.tolist()
        == budgeted("llava_next").select_tokens(**batch, token_budget=said, reducer="grid").num_keep.tolist()
    )
    assert model.select_tokens(**batch, token_budget=by_size, reducer="grid").num_keep.tolist() == [6] * 5
    with pytest.raises(ValueError, match="`unit_weights` is 'area'; allowed: 'size', 'attention', 'novelty'"):
        model(**batch, token_budget={"prompt": 30, "unit_weights": "area"})
    with pytest.raises(ValueError, match="unit_weights"):
        with_budget("llava_next", unit_weights="area")
    with pytest.raises(ValueError, match="a call of a 'internvl' model does not say which tile shows what"):
        budgeted("internvl")(**batch_of("internvl", [Writer("internvl").prompt()]), token_budget=said)
    with pytest.raises(ValueError, match="images of a 'adavtp' model are neither tiles nor frames"):
        tiny_model()(**tiny_batch(tiny_model().config, [2]), token_budget=said)
    with pytest.raises(ValueError, match="'hired' cannot act on a 'llava_next' model: `tile_grid` tells apart"):
        model(**batch, token_budget=0.5, reducer={"name": "hired", "tile_grid": [2, 2]})


def test_where_no_token_is_attended_tiles_share_equally() -> None:
    sizes, tile = torch.tensor([1, 4, 3]), {0: torch.tensor([1])}
    units = Units(torch.zeros(3).long(), sizes, [(1, 1), (2, 2), (1, 3)], torch.arange(8), parts=tile)
    assert shares_of_tiles(torch.zeros(3, 4), units).tolist() == [2.5, 2.5, 3.0]
