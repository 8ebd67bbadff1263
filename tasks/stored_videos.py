"""
Videos as data store them: frames, or a file of which frames are taken.

Frames that are given are the frames that are shown. Of a file those are taken that the family's own video processor
would take, by the reader of videos that is installed.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import is_av_available, is_cv2_available, is_decord_available, is_torchcodec_available
from transformers.video_utils import VideoMetadata, load_video

from ..modeling.processing_adavtp import readable_images
from .stored_images import decoded_image, image_file, image_size

# transformers' names of readers, each with what says whether it is installed.
READERS: dict[str, Callable[[], bool]] = {
    "torchcodec": is_torchcodec_available,
    "pyav": is_av_available,
    "opencv": is_cv2_available,
    "decord": is_decord_available,
}
# Which frames of a video are shown, by what is known of it.
FrameSampler = Callable[..., Sequence[int]]


class Clip(NamedTuple):
    """
    A video as it is shown.

    Attributes:
        frames: `[num_frames, height, width, 3]` uint8.
        indices: which frames of the video these are.
        num_frames_of_video: how many it has.
        fps: how many of these there are in a second; `None` if nobody says.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    num_frames_of_video: int
    fps: float | None = None

    @property
    def looks(self) -> tuple[Any, ...]:
        """All that the length of a prompt depends on."""
        return (self.frames.shape, *self[1:])

    def metadata(self) -> dict[str, Any]:
        """In the form in which video processors take it."""
        return {
            "total_num_frames": self.num_frames_of_video,
            "fps": self.fps,
            "duration": None if self.fps is None else self.num_frames_of_video / self.fps,
            "frames_indices": list(self.indices),
            "height": self.frames.shape[1],
            "width": self.frames.shape[2],
        }

    @classmethod
    def of_frames(cls, frames: Sequence[Any], fps: float | None = None) -> "Clip":
        """
        Of frames that are shown as they are: PIL images or arrays, `fps` of them in a second.

        Raises:
            ValueError: if there are none, they differ in size, or `fps` is no number above 0.
        """
        shown = [_pixels(frame) for frame in readable_images(list(frames))]
        sizes = sorted({frame.shape[1::-1] for frame in shown})
        if len(sizes) != 1:
            raise ValueError(f"a video has frames of the sizes {sizes}; expected are one or more of one size")
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0):
            raise ValueError(f"`fps` is {fps!r}; allowed are numbers above 0")
        return cls(np.stack(shown), tuple(range(len(shown))), len(shown), fps)

    @classmethod
    def of_nothing(cls, num_frames: int, width: int, height: int, fps: float | None = None) -> "Clip":
        """So many black frames, which take no memory."""
        return cls(_nothing(num_frames, height, width), tuple(range(num_frames)), num_frames, fps)


def shown_clip(video: Any) -> Clip:
    """
    A video that is decoded already.

    Args:
        video: a list of frames, which are PIL images or arrays; an array `[num_frames, height, width, 3]`, or with
            channels in front; or `{"frames": ..., "fps": ...}`, one of these with how many frames there are in a
            second. Video processors that tell times take 24 where nobody says.

    Raises:
        ValueError: if it is something else, or see [`Clip.of_frames`].
    """
    if isinstance(video, Clip):
        return video
    frames, fps = _frames_and_fps(video)
    is_several = isinstance(frames, list | tuple) or getattr(frames, "ndim", 0) == 4
    undecoded = [frame for frame in frames if isinstance(frame, str | Path | dict)] if is_several else [video]
    if undecoded:
        raise ValueError(
            f"a video is, or has as a frame, {repr(undecoded[0])[:100]}; expected are decoded frames, as a list of "
            "images or an array, or in a dictionary as `frames` beside `fps`"
        )
    return Clip.of_frames(frames, fps)


def stored_clip(video: Any, sampler: FrameSampler | None, folder: str | Path | None = None) -> Clip:
    """
    A video as it stands in data, decoded.

    Args:
        video: as [`shown_clip`] takes it, with frames that may be stored as images are; or a file, as
            `{"bytes": ..., "path": ...}`, one of which is set.
        sampler: which frames of a file are shown; `None` for all.
        folder: that paths may not lead out of; `None` follows every path.

    Raises:
        OSError, ValueError: if something is missing or broken, a path leads out of the folder, or no reader of video
            files is installed; the message says which.
    """
    frames, fps = _frames_and_fps(video)
    if _are_stored(frames):
        return Clip.of_frames([decoded_image(frame, folder) for frame in frames], fps)
    return _read(video, sampler, folder) if _is_file(video) else shown_clip(video)


def clip_of_nothing(video: Any, sampler: FrameSampler | None, folder: str | Path | None = None) -> Clip:
    """As [`stored_clip`], but black: of stored frames only the first one's head is read, and of a file one frame."""
    frames, fps = _frames_and_fps(video)
    if _are_stored(frames):
        return Clip.of_nothing(len(frames), *image_size(frames[0], folder), fps)
    if not _is_file(video):
        clip = shown_clip(video)
        return clip._replace(frames=_nothing(*clip.frames.shape[:3]))
    clip = _read(video, sampler, folder, first_alone=True)
    _, height, width, _ = clip.frames.shape
    return clip._replace(frames=_nothing(len(clip.indices), height, width))


def frame_sampler(processor: ProcessorMixin, num_frames: int | None = None) -> FrameSampler | None:
    """
    Which frames of a file are shown: so many, evenly spread, or by default those that the processor takes; `None` for
    all.
    """
    if num_frames is not None:
        return lambda metadata: np.linspace(
            0, metadata.total_num_frames - 1, min(num_frames, metadata.total_num_frames)
        ).round()
    videos = processor.video_processor
    return videos.sample_frames if videos.do_sample_frames else None


def keeps_videos_apart(processor: ProcessorMixin) -> bool:
    """Whether a batch has images or videos, and not both: the processor would give them the same name."""
    return "pixel_values" in processor.video_processor.model_input_names


def processed_videos(processor: ProcessorMixin, clips: Sequence[Clip], **arguments: Any) -> BatchFeature:
    """
    What a processor makes of a batch with videos, whose frames are shown as they are, or without any.

    Args:
        processor: a family's.
        clips: of all prompts, in the order of their placeholders.
        arguments: of the processor's call, with `images` in the same order, or `None`.

    Raises:
        ValueError: if the processor cannot put these videos into one batch.
    """
    if not clips:
        return processor(**arguments)
    name, video_processor = type(processor).__name__, getattr(processor, "video_processor", None)
    if video_processor is None:
        raise ValueError(f"`videos` are given, and {name} reads none; show frames as images.")
    if arguments.get("images") is not None and keeps_videos_apart(processor):
        raise ValueError(
            f"`images` and `videos` are given in one batch, and {name} gives the model one or the other. Put them "
            "into batches of their own."
        )
    told = {"do_sample_frames": False, "video_metadata": [clip.metadata() for clip in clips]}
    if "return_tensors" not in arguments:
        told["return_tensors"] = "pt"
    try:
        return processor(videos=[clip.frames for clip in clips], videos_kwargs=told, **arguments)
    # What putting tensors of several shapes together raises.
    except (ValueError, RuntimeError, AttributeError) as error:
        lengths = sorted({len(clip.frames) for clip in clips})
        if len(lengths) < 2:
            raise
        raise ValueError(
            f"`videos` of a batch have {' and '.join(map(str, lengths))} frames, and {name} puts videos of one length "
            "alone into a batch. Show equally many frames of each, or one video a batch."
        ) from error


def _frames_and_fps(video: Any) -> tuple[Any, float | None]:
    """What a video has for frames, and how many of them there are in a second."""
    return (video.get("frames"), video.get("fps")) if isinstance(video, dict) else (video, None)


def _are_stored(frames: Any) -> bool:
    """Whether frames are such as `decoded_image` takes."""
    is_list = isinstance(frames, list | tuple) and len(frames) > 0
    return is_list and all(isinstance(frame, dict | Image.Image) for frame in frames)


def _is_file(video: Any) -> bool:
    return isinstance(video, dict) and any(video.get(name) is not None for name in ("bytes", "path"))


def _read(
    video: dict[str, Any], sampler: FrameSampler | None, folder: str | Path | None, first_alone: bool = False
) -> Clip:
    """The frames of a file that are shown; or the first of them alone, and which they are."""
    reader = next((name for name, is_there in READERS.items() if is_there()), None)
    if reader is None:
        raise ValueError(
            f"it is a video file, and none of {', '.join(READERS)} is installed to read it; install one, or give the "
            "frames"
        )
    shown: list[int] = []

    def once_each(metadata: VideoMetadata, **more: Any) -> np.ndarray:
        shown[:] = range(metadata.total_num_frames) if sampler is None else map(int, sampler(metadata=metadata))
        # Some readers give a frame that is asked for twice once.
        return np.unique(shown[:1] if first_alone else shown)

    content, path = video.get("bytes"), video.get("path")
    with tempfile.NamedTemporaryFile(suffix=Path(path or "").suffix) as copy:
        place = Path(copy.name)
        if content is not None:
            copy.write(content)
            copy.flush()
        else:
            place = image_file(path, folder or ".", trust_paths=folder is None)
            if not place.is_file():
                raise ValueError("there is no such file")
        try:
            frames, metadata = load_video(str(place), backend=reader, sample_indices_fn=once_each)
        # Readers raise what they like for a broken file.
        except Exception as error:
            raise ValueError(f"it cannot be decoded as a video: {error}") from error
    frames = np.asarray(frames)
    if frames.ndim == 4 and frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    wanted = np.unique(shown[:1] if first_alone else shown)
    if not shown or len(frames) != len(wanted):
        raise ValueError(f"{len(wanted)} of its frames were to be shown, and {reader} found {len(frames)}")
    if not first_alone:
        frames = frames[np.searchsorted(wanted, shown)]
    return Clip(frames, tuple(shown), metadata.total_num_frames, metadata.fps or None)


def _pixels(image: Any) -> np.ndarray:
    """An image as [`readable_images`] gives it, channels last."""
    pixels = np.asarray(image)
    return (pixels if pixels.shape[-1] == 3 else pixels.transpose(1, 2, 0)).astype(np.uint8)


def _nothing(num_frames: int, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(np.uint8(0), (num_frames, height, width, 3))
