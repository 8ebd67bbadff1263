"""The benchmark of the methods measures all of them, and measures what it says; how fast anything is, no test says."""

import json
from pathlib import Path

import pytest
import torch

import reducers
from adavtp.modeling.reducers.base import REDUCERS, build_reducer
from adavtp.modeling.reducers.tome import tokens_after_layers
from adavtp.modeling.vision.encode import TowerPass, encode_image
from adavtp.modeling.vision.encoder_reducer import EncoderReducer
from adavtp.modeling.vision.tower import TowerAttention, tower_layers
from interleaved import Spread
from tiny_models import OF_LLAVA

SHAPE = reducers.Shape(16, 32, 4, 4, 32, 4, 64, 8, text_before=3, text_after=5)
SIZES = (
    "--num-patches 16 --width 32 --heads 4 --layers 4 "
    "--text-width 32 --text-heads 4 --text-mlp-width 64 --text-layers 8 --text-before 3 --text-after 5"
)
SPREAD = {"median", "lower_quartile", "upper_quartile", "repeats"}


@pytest.fixture(scope="module")
def parts() -> reducers.Parts:
    torch.manual_seed(0)
    return reducers.Parts.built(SHAPE, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def scene(parts: reducers.Parts) -> reducers.Scene:
    torch.manual_seed(0)
    with torch.no_grad():
        return reducers.make_scene(parts, SHAPE, 6, batch_size=2)


def test_every_registered_method_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "reducers.json"
    command = f"{SIZES} --batch-sizes 1 2 --first-only decoder --budget 0.4 --repeats 2 --clock process --json {file}"
    reducers.main(command.split())
    result = json.loads(file.read_text())
    assert set(result) == {"command", "versions", "machine", "seed", "settings", "batches"}
    assert result["command"] == f"python benchmarks/reducers.py {command}"
    assert [(batch["batch_size"], batch["num_keep"]) for batch in result["batches"]] == [(1, 6), (2, 6)]
    first, second = result["batches"]
    assert set(first["methods"]) == OF_LLAVA - {"aim"}
    assert set(second["methods"]) == {name for name in first["methods"] if REDUCERS[name].stage != "decoder"}
    assert (set(first["beside"]), set(second["beside"])) == ({reducers.TOWER, reducers.LAYER}, {reducers.TOWER})
    for batch in result["batches"]:
        for name, row in batch["methods"].items():
            assert row["stage"] == REDUCERS[name].stage
            assert row["peak_bytes"] > 0
            assert len(row["seconds"]["repeats"]) == 2
            assert set(row["seconds"]) == set(row["share_of_tower"]) == SPREAD
            assert row["target_share"] == (0.05 if name in ("divprune", "cdpruner", "scope") else 0.02)
            assert row["meets_target"] == (row["share_of_tower"]["median"] <= row["target_share"])
            assert ("whole_run_by_tower" in row) == (row["stage"] == "encoder")
            assert ("share_of_decoder_layer" in row) == (row["stage"] == "decoder")


def test_one_method_can_be_asked_for() -> None:
    result = reducers.main(f"{SIZES} --methods grid --batch-sizes 1 --budget 6 --repeats 1".split())
    assert set(result["batches"][0]["methods"]) == {"grid"}


@pytest.mark.parametrize(
    ("name", "own"), [("grid", [5.0, 6.0]), ("adaptive", [1.0, 3.0]), ("tome", [2.0, 4.0]), ("fastv", [5.0, 6.0])]
)
def test_own_seconds_are_those_beyond_what_would_run_anyway(
    name: str, own: list[float], parts: reducers.Parts
) -> None:
    seconds = {
        name: Spread.of([5.0, 6.0]),
        reducers.TOWER: Spread.of([4.0, 3.0]),
        reducers.LAYER: Spread.of([2.0, 2.0]),
        reducers.TOLD.format(name): Spread.of([3.0, 2.0]),
    }
    row = reducers.own_shares(name, build_reducer(name, parts.config), seconds)
    assert row["seconds"]["repeats"] == own
    assert row["share_of_tower"]["repeats"] == [own[0] / 4, own[1] / 3]
    assert not row["meets_target"]
    if name == "tome":
        assert row["whole_run_by_tower"]["repeats"] == [5 / 4, 2.0]
    if name == "fastv":
        assert row["share_of_decoder_layer"]["repeats"] == [2.5, 3.0]


@torch.no_grad()
def test_methods_read_the_attention_of_the_tower_that_is_timed(parts: reducers.Parts, scene: reducers.Scene) -> None:
    seen = encode_image(parts.tower, scene.pixel_values, parts.config, attention_layers=(1, 2, 3))
    assert set(scene.entering) == {1, 2, 3}
    torch.testing.assert_close(scene.features["vision"].patches, seen.patches)
    for layer, entering in scene.entering.items():
        attention = TowerAttention.of_layer(tower_layers(parts.tower)[layer], entering, has_cls=True)
        torch.testing.assert_close(attention.cls_row(), seen.attention[layer].cls_row())


@pytest.mark.parametrize(
    "name", [name for name in reducers.METHODS if REDUCERS[name].stage in ("vision", "projector")]
)
@torch.no_grad()
def test_what_is_timed_behind_the_tower_keeps_the_budget(
    name: str, parts: reducers.Parts, scene: reducers.Scene
) -> None:
    reducer = build_reducer(name, parts.config).eval()
    selection = reducers.calls_of(name, reducer, parts, scene)[name]()
    assert selection.num_keep.tolist() == [6, 6]


@pytest.mark.parametrize("name", [name for name in REDUCERS if issubclass(REDUCERS[name], EncoderReducer)])
@torch.no_grad()
def test_told_run_has_as_many_tokens_in_every_layer(
    name: str, parts: reducers.Parts, scene: reducers.Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = {}

    class Watched(TowerPass):
        def attend(self, index: int, hidden_states: torch.Tensor, *bias: torch.Tensor | None) -> torch.Tensor:
            lengths.setdefault(("attention", index), []).append(hidden_states.shape[1])
            return super().attend(index, hidden_states, *bias)

        def finish(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
            lengths.setdefault(("mlp", index), []).append(hidden_states.shape[1])
            return super().finish(index, hidden_states)

        def run_layer(self, index: int, hidden_states: torch.Tensor) -> torch.Tensor:
            return self.finish(index, self.attend(index, hidden_states))

    monkeypatch.setattr(reducers, "TowerPass", Watched)
    calls = reducers.calls_of(name, build_reducer(name, parts.config).eval(), parts, scene)
    assert calls[name]().num_keep.tolist() == [6, 6]
    assert calls[reducers.TOLD.format(name)]().shape == (2, lengths["mlp", 2][0], SHAPE.width)
    assert len(lengths) == 6
    assert all(of_method == of_told for of_method, of_told in lengths.values())
    if name == "tome":
        assert [lengths["mlp", layer][0] - 1 for layer in range(3)] == tokens_after_layers(16, 6, 3)


@torch.no_grad()
def test_told_run_with_all_tokens_is_the_tower(parts: reducers.Parts, scene: reducers.Scene) -> None:
    tower = TowerPass(parts.tower, parts.config)
    sequence = reducers.run_told(tower, scene.pixel_values, [17] * 3, [17] * 3)
    torch.testing.assert_close(tower.patches(sequence), scene.features["vision"].patches)


@pytest.mark.parametrize(
    ("name", "layer", "left"),
    [
        # A mean of 6 of 16 over 8 layers, and all 16 in the first of them: 16 + 7 * 32 / 7 = 48.
        ("fastv", 1, 5),
        # Layers 0 to 3 see all, which is a mean of 8 or more, so that its own rule holds: half leaves before each.
        ("aim_prune", 4, 8),
        # Three layers see everything and the others nothing, so that nothing leaves at its cut, before layer 1.
        ("vtw", 1, 16),
        ("pyramiddrop", 2, 6),
    ],
)
@torch.no_grad()
def test_first_cut_leaves_what_the_budget_says(
    name: str, layer: int, left: int, parts: reducers.Parts, scene: reducers.Scene
) -> None:
    reducer = build_reducer(name, parts.config).eval()
    first, num_keep = reducers.first_cut(reducer, parts.config, scene)
    assert (first, num_keep.tolist()) == (layer, [left, left])
    stays, hidden_states = reducers.calls_of(name, reducer, parts, scene)[name]()
    assert (stays & scene.view.is_visual).sum(dim=-1).tolist() == [left, left]
    assert hidden_states.shape == scene.view.hidden_states.shape


def test_peak_is_what_is_in_use_at_one_time() -> None:
    held = []

    def call() -> None:
        # 4 KiB three times, one after another, and 8 KiB that are still there when the last of them come.
        for _ in range(2):
            torch.ones(1024)
        held.append(torch.ones(2048))
        torch.ones(1024)

    assert reducers.peak_bytes(call, torch.device("cpu")) == 4 * (2048 + 1024)


@pytest.mark.parametrize(("arguments", "named"), [("--num-patches 15", "num-patches"), ("--methods aim", "aim")])
def test_wrong_setting_is_named(arguments: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reducers.parse(arguments.split())
    assert named in capsys.readouterr().err
