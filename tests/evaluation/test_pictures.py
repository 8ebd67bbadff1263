"""The registered reducers as a table, and pictures of what they keep."""

from pathlib import Path

from PIL import Image

from adavtp.configuration.configuration_adavtp import AdaVTPConfig
from adavtp.evaluation.circumstances import checkpoint_hash
from adavtp.evaluation.pictures import save_gallery, save_kept_patches, where_methods_differ
from adavtp.evaluation.reducer_table import as_trained, reducer_table, reducers_to_compare
from adavtp.evaluation.runs import Run
from adavtp.evaluation.settings import reducer_label
from adavtp.modeling.reducers.base import REDUCERS
from run_folders import write_run
from tiny_models import OF_LLAVA


def test_the_table_has_every_reducer_and_marks_parts() -> None:
    rows = {row["name"]: row for row in reducer_table()}
    assert set(rows) == set(REDUCERS)
    assert {name for name, row in rows.items() if row["part_of"] == "aim"} == {"aim_merge", "aim_prune"}
    assert rows["fastv"]["parameters"]["ratio"] == 0.5 and rows["fastv"]["own_rule"]
    assert "attention" in rows["aim"]["needs"] and rows["aim"]["stage"] == "vision + decoder"
    assert "budget" in rows["adaptive"]["needs"] and rows["resampler"]["trained"]


def test_by_default_all_but_parts_are_compared_with_the_parameters_they_were_trained_with() -> None:
    config = AdaVTPConfig(trained_reducers=[{"name": "resampler", "num_layers": 1}])
    reducers = reducers_to_compare(config)
    assert reducers[0] == "adaptive" and {"name": "resampler", "num_layers": 1} in reducers
    assert as_trained(config, ["resampler", "vtw"]) == [{"name": "resampler", "num_layers": 1}, "vtw"]
    assert as_trained(config, {"name": "resampler", "num_layers": 2}) == {"name": "resampler", "num_layers": 2}
    labels = {reducer_label(reducer).partition(":")[0] for reducer in reducers}
    assert labels == OF_LLAVA - {"aim_merge", "aim_prune"}


def test_the_hash_is_of_configuration_and_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = checkpoint_hash(tmp_path)
    (tmp_path / "README.md").write_text("card")
    assert checkpoint_hash(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"weightz")
    second = checkpoint_hash(tmp_path)
    (tmp_path / "config.json").write_text('{"token_budget": 0.5}')
    assert len({first, second, checkpoint_hash(tmp_path)}) == 3


def test_a_run_is_drawn_by_budgets_and_by_reducers_also_what_is_out_of_reach(tmp_path: Path) -> None:
    scores = {("full", 1.0): [1.0, 0.0], ("adaptive", 0.5): [1.0, 1.0], ("adaptive", 0.25): [0.0, 1.0]}
    unreachable = [{"reducer": "vtw", "budget": 0.25, "reason": "too low"}]
    run = Run.open(write_run(tmp_path / "run", scores, shown=2, unreachable=unreachable))
    save_kept_patches(run, 1, tmp_path / "kept.png")
    save_gallery(run, 0.25, tmp_path / "gallery.png")
    for name, size in (("kept.png", (924, 269)), ("gallery.png", (1347, 286))):
        assert Image.open(tmp_path / name).size == size


def test_the_picture_is_of_the_question_on_which_methods_differ_at_most_budgets(tmp_path: Path) -> None:
    # Wrong with everything kept; alike; different at one budget; at two; at two again.
    full = [0.0, 1.0, 1.0, 1.0, 1.0]
    ours = {0.5: [1.0, 1.0, 1.0, 0.0, 1.0], 0.25: [1.0, 0.0, 1.0, 1.0, 0.0]}
    theirs = {0.5: [0.0, 1.0, 1.0, 1.0, 0.0], 0.25: [0.0, 0.0, 0.0, 0.0, 1.0]}
    scores = {("full", 1.0): full}
    scores |= {("adaptive", budget): own for budget, own in ours.items()}
    scores |= {("random", budget): own for budget, own in theirs.items()}
    assert where_methods_differ(Run.open(write_run(tmp_path / "run", scores, shown=5))) == 3
