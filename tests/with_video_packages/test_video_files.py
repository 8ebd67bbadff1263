"""Files of videos: the frames that are shown of them are read, measured and refused as images are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

from adavtp import BudgetCollator
from adavtp.tasks import stored_videos
from adavtp.tasks.stored_videos import clip_of_nothing, frame_sampler, stored_clip
from adavtp.trainer.data.reader import ConversationReader, RejectedSample
from tiny_conversations import assistant, user
from tiny_processors import family_processor, released_folder

FPS, NUM_FRAMES = 4, 12
SHOWN = [0, 4, 7, 11]


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Noise, each frame another."""
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 40, 60, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def file(frames: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds, without a loss."""
    path = tmp_path_factory.mktemp("videos") / "noise.mov"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = 40, 60, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def take(*indices: int) -> Any:
    """A sampler of these frames."""
    return lambda metadata: list(indices)


@pytest.mark.parametrize("kind", ["path", "bytes"])
@pytest.mark.parametrize("shown", [(1, 5, 6), (3, 3, 4, 4), (11,)])
def test_the_frames_of_a_file_are_those_that_are_asked_for(
    kind: str, shown: tuple[int, ...], file: Path, frames: np.ndarray
) -> None:
    stored = {"path": str(file)} if kind == "path" else {"bytes": file.read_bytes(), "path": "noise.mov"}
    clip = stored_clip(stored, take(*shown))
    assert np.array_equal(clip.frames, frames[list(shown)])
    assert clip[1:] == (shown, NUM_FRAMES, FPS)
    assert clip_of_nothing(stored, take(*shown)).looks == clip.looks
    assert np.array_equal(stored_clip(stored, None).frames, frames)


def test_a_file_that_cannot_be_read_says_why(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.mov").write_bytes(file.read_bytes()[:500])
    for name, problem in (("broken.mov", "cannot be decoded as a video"), ("none.mov", "there is no such file")):
        with pytest.raises(ValueError, match=problem):
            stored_clip({"path": name}, None, tmp_path)
    with pytest.raises(ValueError, match="leads out of"):
        stored_clip({"path": str(file)}, None, tmp_path)
    monkeypatch.setattr(stored_videos, "READERS", dict.fromkeys(stored_videos.READERS, lambda: False))
    with pytest.raises(ValueError, match="none of torchcodec, pyav, opencv, decord is installed"):
        stored_clip({"path": str(file)}, None)


def test_a_row_with_a_file_is_the_row_with_the_frames_that_the_processor_takes(file: Path, frames: np.ndarray) -> None:
    processor = family_processor("qwen3_vl")
    asked = user("which digit is red ?")
    asked["content"].insert(0, {"type": "video"})
    row = {"id": "a", "videos": [{"path": str(file), "bytes": None}], "messages": [asked, assistant("7")]}
    reader, collator = ConversationReader(processor), BudgetCollator(processor)
    # Two frames a second, of three seconds.
    metadata = SimpleNamespace(total_num_frames=NUM_FRAMES, fps=FPS)
    shown = [int(index) for index in frame_sampler(processor)(metadata=metadata)]
    assert len(shown) == 6
    batch = collator([reader.read(row)])
    expected = collator([row | {"videos": [stored_clip({"path": str(file)}, take(*shown))]}])
    assert sum(reader.lengths(row)) == batch["input_ids"].shape[1]
    for key in expected.keys() - {"token_budget"}:
        assert torch.equal(batch[key], expected[key]), key
    with pytest.raises(RejectedSample, match=r"videos\[0\] \(nowhere.mp4\): there is no such file"):
        reader.read(row | {"videos": [{"path": "nowhere.mp4"}]})


def test_a_row_for_a_model_that_reads_no_videos_is_rejected(file: Path) -> None:
    asked = user("which digit is red ?")
    asked["content"].insert(0, {"type": "video"})
    row = {"id": "a", "videos": [{"path": str(file)}], "messages": [asked, assistant("7")]}
    with pytest.raises(RejectedSample, match="Idefics3Processor reads none"):
        ConversationReader(family_processor("idefics3")).read(row)
    both = [{"type": "video"}, {"type": "image"}, *asked["content"][1:]]
    messages = [{"role": "user", "content": both}, assistant("7")]
    image = {"bytes": None, "path": "a.png"}
    with pytest.raises(RejectedSample, match="images and videos, and SmolVLMProcessor gives one or the other"):
        ConversationReader(family_processor("smolvlm")).read(row | {"images": [image], "messages": messages})


@pytest.mark.parametrize("form", ["chat", "simple"])
@pytest.mark.parametrize("budget", ["0.4", '{"prompt": 9, "unit_weights": "novelty"}'])
def test_lmms_eval_asks_about_files_of_videos(
    form: str, budget: str, file: Path, frames: np.ndarray, tmp_path: Path
) -> None:
    folder = released_folder("qwen2_vl", tmp_path)
    arguments = f"pretrained={folder},reducer=divprune,num_frames={len(SHOWN)},token_budget={budget}"
    made = get_model("adavtp", force_simple=form == "simple").create_from_arg_string(arguments, {"device": "cpu"})
    made.task_dict["watching"] = {"test": [{}]}
    chat = [{"role": "user", "content": [{"type": "video", "url": str(file)}, {"type": "text", "text": "which ?"}]}]
    asked, generation = ("which ?", {"max_new_tokens": 3}), {"max_new_tokens": 3}
    given = (*asked, lambda row: [str(file)]) if form == "simple" else (asked[0], lambda row: chat, generation)
    metadata = {"task": "watching", "doc_id": 0, "repeats": 1}
    request = Instance("generate_until", (*given, 0, "watching", "test"), 0, metadata=metadata)
    (answer,) = made.generate_until([request])
    content = [{"type": "video"}, {"type": "text", "text": "which ?"}]
    inputs = made.processor(
        text=made.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True),
        videos=[frames[SHOWN]],
        return_tensors="pt",
        videos_kwargs={"do_sample_frames": False},
    )
    how = {"token_budget": 0.4} if budget == "0.4" else {"token_budget": {"prompt": 9, "unit_weights": "novelty"}}
    how["reducer"] = "divprune"
    said = made._model.generate(**inputs, **how, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == made.processor.decode(said, skip_special_tokens=True)
