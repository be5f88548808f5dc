"""Videos as sequences of frames: sizes and counts from headers, single frames decoded when a worker needs them.

Guarantees: number and size of frames come without decoding; which frames a sample shows is one draw per row and epoch;
a frame is found by its timestamp, so seeking gives the same picture as decoding from the start. Reads only the file
itself, never another one that it names. Needs PyAV (`pip install 'bagel_ds[video]'`); without it every video is a bad
row that says so. Rotation tags and sound are ignored.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.images import size_fault
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.git_lfs import pointer_fault
from bagel_ds.regular_files import file_fault

# Containers that hold the pictures themselves. Playlists (hls, concat, dash, image2) would open the files they name.
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,gif,m4v,h264,hevc,ivf"


@dataclass(frozen=True)
class FrameSampler:
    """How many frames a sample shows of a video: any number between the two, all equally likely."""

    max_num_frames: int = 12
    min_num_frames: int = 8


class Video(NamedTuple):
    """What the header of a video file says; sizes in pixels."""

    path: Path
    frames: int
    width: int
    height: int


class _Packets(NamedTuple):
    """Timestamps (in the stream's time base), sorted; frames at `keys` decode without earlier ones."""

    times: list[int]
    keys: list[int]


def available() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def read_header(path: Path) -> Video:
    """Counts the frames where the header gives no number, or one that the file is too small for. Raises `BadRow`."""
    with _opened(path) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if fault := size_fault(width, height):
            raise BadRow(fault)
        frames = stream.frames
        if not 0 < frames <= path.stat().st_size:
            frames = sum(1 for packet in container.demux(stream) if packet.size)
        if frames < 1:
            raise BadRow("the video has no frames")
        return Video(path, frames, width, height)


def sample_frames(frames: int, limits: FrameSampler, draws: Draws) -> list[int]:
    """Numbers of the frames shown: one frame of each of as many equal sections of the video."""
    least = limits.min_num_frames
    shown = min(least + draws.choice(limits.max_num_frames - least + 1), frames)
    bounds = [section * frames // shown for section in range(shown + 1)]
    return [start + draws.choice(stop - start) for start, stop in zip(bounds[:-1], bounds[1:], strict=True)]


def decode_frames(video: Video, numbers: Sequence[int]) -> dict[int, Image.Image]:
    """The frames of these numbers (from 0, in the order they are shown) as RGB. Raises `BadRow`."""
    with _opened(video.path) as (container, stream):
        images = _decode_by_time(container, stream, numbers)
    if images is not None:
        return images
    with _opened(video.path) as (container, stream):
        return _decode_in_order(container, stream, numbers)


def _packets(container: Any, stream: Any) -> _Packets | None:
    """None where a container has no timestamps."""
    packets = [packet for packet in container.demux(stream) if packet.size]
    if any(packet.pts is None for packet in packets):
        return None
    shown = sorted(packet.pts for packet in packets if not packet.is_discard)
    return _Packets(shown, sorted(packet.pts for packet in packets if packet.is_keyframe))


def _decode_by_time(container: Any, stream: Any, numbers: Sequence[int]) -> dict[int, Image.Image] | None:
    """Decodes on, or seeks where a keyframe lies between the last frame and the next one wanted.

    None where the frames cannot be found so: no timestamps, or seeking that ends elsewhere (MPEG-TS).
    """
    packets = _packets(container, stream)
    if packets is None or max(numbers) >= len(packets.times):
        return None
    images: dict[int, Image.Image] = {}
    here: int | None = None
    decoded: Iterator[Any] = iter(())
    for number in sorted(set(numbers)):
        time = packets.times[number]
        key = max((key for key in packets.keys if key <= time), default=packets.times[0])
        if here is None or key > here:
            container.seek(key, stream=stream, backward=True)
            decoded = container.decode(stream)
        frame = next((frame for frame in decoded if frame.pts is not None and frame.pts >= time), None)
        if frame is None or frame.pts != time:
            return None
        here = time
        images[number] = frame.to_image()
    return images


def _decode_in_order(container: Any, stream: Any, numbers: Sequence[int]) -> dict[int, Image.Image]:
    images: dict[int, Image.Image] = {}
    for number, frame in enumerate(container.decode(stream)):
        if number in numbers:
            images[number] = frame.to_image()
        if number >= max(numbers):
            break
    if len(images) < len(set(numbers)):
        raise BadRow(f"the video ends before its frame {max(numbers)}")
    return images


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; whatever goes wrong with them is a `BadRow` that names the file."""
    try:
        import av
    except ImportError as error:
        raise BadRow("the row shows a video, which needs PyAV: pip install 'bagel_ds[video]'") from error
    if fault := file_fault(path) or pointer_fault(path):
        raise BadRow(f"{path}: {fault}")
    options = {"format_whitelist": _CONTAINERS}
    try:
        # Through a Python file, so that ffmpeg never sees a name that it could take for a protocol.
        with open(path, "rb") as file, av.open(file, "r", container_options=options) as container:
            if not container.streams.video:
                raise BadRow("the file has no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # the workers are parallel already
            yield container, stream
    except BadRow as error:
        raise BadRow(f"{path}: {error}") from error
    except Exception as error:  # what decoders raise on damaged files is an open set
        raise BadRow(f"{path}: the video cannot be read ({type(error).__name__}: {error})") from error
