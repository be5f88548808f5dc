"""Videos: only headers for the index, the right frames for a sample, and reasons for what cannot be used."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bagel_ds.data.batches.materialize import materialize
from bagel_ds.data.samples import video
from bagel_ds.data.samples.draws import Draws, draw_key
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT, VIT, BadRow
from bagel_ds.data.samples.video import FrameSampler, decode_frames, read_header, sample_frames
from bagel_ds.data.streams.stream import GroupStream
from bagel_ds.errors import UserError
from tests.small_data import VIT_ARGS, byte_tokenizer, conversation, group, streams_of, write_conversations

# Codecs that show one picture after another, with and without pictures that depend on later ones, and containers that
# count their frames or don't.
KINDS = {
    "x.mp4": "mpeg4",
    "h.mp4": "libx264",
    "x.mkv": "mpeg4",
    "x.webm": "libvpx",
    "x.avi": "mpeg4",
    "x.ts": "libx264",
}


def write_video(path: Path, frames: int = 40, codec: str = "mpeg4", width: int = 64, height: int = 48) -> Path:
    """Frame i is grey of brightness 5 * i, brighter on the right; a key frame every ten."""
    av = pytest.importorskip("av", reason="PyAV is not installed (extra `video`)")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 10
        stream.bit_rate = 4_000_000
        for number in range(frames):
            pixels = np.full((height, width, 3), min(5 * number, 200), dtype=np.uint8)
            pixels[:, width // 2 :] += 40
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def _stream(folder: Path, lines: list[Any], **sampler: int) -> GroupStream:
    """Conversations about videos in folder/images."""
    paths = write_conversations(folder, lines)
    least_most = {"min_num_frames": 3, "max_num_frames": 5, **sampler}
    groups = {"vlm_sft": group(paths, frame_sampler_args=least_most)}
    return streams_of(folder, groups, byte_tokenizer(folder / "tokenizer"))[0]


def _line(name: str, *turns: str) -> dict[str, Any]:
    return {**conversation(*(turns or ("What happens? <video>", "It gets brighter."))), "video": name}


@pytest.mark.parametrize("name", KINDS)
def test_headers_tell_size_and_number_of_frames(tmp_path: Path, name: str) -> None:
    assert read_header(write_video(tmp_path / name, 23, KINDS[name])) == (tmp_path / name, 23, 64, 48)


@pytest.mark.parametrize("claimed", [0, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_count_of_frames_that_the_file_is_too_small_for_is_not_believed(tmp_path: Path, claimed: int) -> None:
    path = write_video(tmp_path / "x.avi", 23)
    content = bytearray(path.read_bytes())
    for chunk, offset in ((b"avih", 24), (b"strh", 40)):  # total frames, length of the stream
        place = content.index(chunk) + offset
        content[place : place + 4] = claimed.to_bytes(4, "little")
    path.write_bytes(content)
    assert read_header(path).frames == 23
    assert decode_frames(read_header(path), [22]).keys() == {22}


def test_a_count_of_frames_that_is_possible_is_believed(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.avi", 23)
    content = bytearray(path.read_bytes())
    place = content.index(b"strh") + 40
    content[place : place + 4] = (24).to_bytes(4, "little")
    path.write_bytes(content)
    assert read_header(path).frames == 24, "headers are read, frames not counted"
    with pytest.raises(BadRow, match="x.avi: the video ends before its frame 23"):
        decode_frames(read_header(path), [23])


def test_other_frame_limits_need_no_other_index(tmp_path: Path) -> None:
    write_video(tmp_path / "images" / "x.mp4")
    seen = []
    for least, most in ((3, 3), (5, 5)):
        stream = _stream(tmp_path, [_line("x.mp4")], min_num_frames=least, max_num_frames=most)
        plan = stream.plan_sample(0, 0)
        assert plan is not None and sum(entry.kind == VIT for entry in plan.entries) == least
        seen.append(stream.uses[0].index.file.key)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("numbers", [[0], [39], [3, 4, 17, 18, 39], [25, 2, 25], list(range(40))])
def test_frames_are_those_of_decoding_from_the_start(tmp_path: Path, name: str, numbers: list[int]) -> None:
    import av

    path = write_video(tmp_path / name, 40, KINDS[name])
    with av.open(str(path)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = decode_frames(read_header(path), numbers)
    assert frames.keys() == set(numbers)
    for number, image in frames.items():
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), expected[number])
        assert abs(float(np.asarray(image)[:, :32].mean()) - min(5 * number, 200)) < 12


def test_frames_are_one_of_each_equal_part_and_their_number_is_drawn() -> None:
    key = draw_key("choice", 0)
    counts = {}
    for epoch in range(600):
        numbers = sample_frames(100, FrameSampler(5, 3), Draws(key, epoch))
        counts[len(numbers)] = counts.get(len(numbers), 0) + 1
        parts = len(numbers)
        assert all(part * 100 // parts <= number < (part + 1) * 100 // parts for part, number in enumerate(numbers))
    assert counts.keys() == {3, 4, 5} and min(counts.values()) > 150
    assert sample_frames(4, FrameSampler(12, 8), Draws(key, 0)) == [0, 1, 2, 3]
    assert sample_frames(1, FrameSampler(1, 1), Draws(key, 0)) == [0]


def test_a_video_becomes_as_many_images_as_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "images" / "sub" / "x.mp4")
    stream = _stream(tmp_path, [_line("sub/x.mp4", " Before <video>\n after ", "Brighter.", "Sure?", "Yes.")])
    seen = set()
    for epoch in range(20):
        plan = stream.plan_sample(0, epoch)
        assert plan is not None and not stream.bad_rows
        kinds = [entry.kind for entry in plan.entries]
        frames = [entry.frame for entry in plan.entries if entry.kind == VIT]
        assert kinds == [TEXT, *[VIT] * len(frames), TEXT, TEXT, TEXT, TEXT]
        assert 3 <= len(frames) <= 5 and frames == sorted(frames)
        tokenizer = byte_tokenizer(tmp_path / "tokenizer")
        batch = materialize([plan], [stream], tokenizer, LayoutOptions(), 0)
        assert not batch.skipped and batch.sample_lens == (plan.length,)
        assert len(batch.vit_seqlens) == len(frames)
        brightness = [float(part.float().mean()) for part in batch.vit_patches.split(list(batch.vit_seqlens))]
        for number, value in zip(frames, brightness, strict=True):
            assert abs(value - min(5 * number, 200) - 20) < 12
        seen.add(tuple(frames))
    assert len(seen) > 10


def test_the_frames_that_are_shown_share_the_pixel_limit(tmp_path: Path) -> None:
    write_video(tmp_path / "images" / "x.mp4", width=112, height=112)
    paths = write_conversations(tmp_path, [_line("x.mp4")])
    args = {"image_stride": 14, "max_image_size": 112, "min_image_size": 14, "max_pixels": 112 * 112}
    sampler = {"min_num_frames": 4, "max_num_frames": 4}
    groups = {"vlm_sft": group(paths, frame_sampler_args=sampler, image_transform_args=args)}
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    (stream,) = streams_of(tmp_path, groups, tokenizer)
    plan = stream.plan_sample(0, 0)
    assert plan is not None
    size = ImageTransform(**args).size(112, 112, 4)
    assert [(entry.width, entry.height) for entry in plan.entries if entry.kind == VIT] == [size] * 4
    assert not materialize([plan], [stream], tokenizer, LayoutOptions(), 0).skipped


def test_videos_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    images = tmp_path / "images"
    content = write_video(images / "x.mp4").read_bytes()
    write_video(tmp_path / "outside.mp4")
    (images / "empty.mp4").write_bytes(b"")
    (images / "cut.mp4").write_bytes(content[: len(content) // 3])
    (images / "text.mp4").write_text("not a video")
    (images / "list.m3u8").write_text("#EXTM3U\n#EXTINF:1,\n../outside.mp4\n#EXT-X-ENDLIST\n")
    (images / "list.txt").write_text("ffconcat version 1.0\nfile ../outside.mp4\n")
    (images / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    lines = [
        _line("x.mp4"),
        _line("absent.mp4"),
        _line("empty.mp4"),
        _line("cut.mp4"),
        _line("text.mp4"),
        _line("list.m3u8"),
        _line("list.txt"),
        _line("link.mp4"),
        _line("../outside.mp4"),
        _line("x.mp4", "no tag", "yes"),
        _line("x.mp4", "<video> and <video>", "yes"),
        _line("x.mp4", "<video> and <image>", "yes"),
        conversation("<video>", "nothing to show"),
        {**_line("x.mp4"), "video": ["x.mp4", "x.mp4"]},
        {**_line("x.mp4"), "video": 7},
        {**_line("x.mp4"), "video": ["x.mp4"]},
    ]
    stream = _stream(tmp_path, lines)
    reasons = {bad.place.row - 1: bad.reason for bad in stream.bad_rows}
    expected = {
        1: "no such file",
        2: "cannot be read",
        3: "cannot be read",
        4: "cannot be read",
        5: "cannot be read",
        6: "cannot be read",
        7: "link that leaves",
        8: "leaves the image folder",
        9: "<video> 0 times, the row has 1",
        10: "<video> 2 times, the row has 1",
        11: "<image> 1 times, the row has 0",
        12: "<video> 1 times, the row has 0",
        13: "2 videos; one is supported",
        14: "video is 7",
    }
    assert reasons.keys() == expected.keys()
    for row, part in expected.items():
        assert part in reasons[row], reasons[row]


def test_a_video_that_breaks_later_drops_its_sample_and_no_other(tmp_path: Path) -> None:
    for name in ("x.mp4", "y.mp4"):
        write_video(tmp_path / "images" / name)
    stream = _stream(tmp_path, [_line("x.mp4"), _line("y.mp4")])
    plans = [plan for row in range(2) if (plan := stream.plan_sample(row, 0))]
    tokenizer = byte_tokenizer(tmp_path / "tokenizer")
    alone = materialize(plans[1:], [stream], tokenizer, LayoutOptions(), 0)
    write_video(tmp_path / "images" / "x.mp4", frames=2)
    batch = materialize(plans, [stream], tokenizer, LayoutOptions(), 0)
    assert len(batch.skipped) == 1 and "frame" in batch.skipped[0][1] and "line 1" in batch.skipped[0][1]
    assert batch.samples == alone.samples and batch.vit_patches.equal(alone.vit_patches)


def test_without_pyav_the_reason_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "images" / "x.mp4")
    lines = [_line("x.mp4"), conversation("no picture", "fine")]
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setitem(__import__("sys").modules, "av", None)
        patch.setattr(video.importlib.util, "find_spec", lambda name: None if name == "av" else found(name))
        stream = _stream(tmp_path, lines)
        assert [bad.reason for bad in stream.bad_rows] == [
            "the row shows a video, which needs PyAV: pip install 'bagel_ds[video]'"
        ]
    assert not _stream(tmp_path, lines).bad_rows, "the index must be made again once PyAV is there"


@pytest.mark.parametrize("sampler", [{"max_num_frames": 0}, {"min_num_frames": 0}, {"min_num_frames": 6}])
def test_a_frame_sampler_without_frames_is_an_error(tmp_path: Path, sampler: dict[str, int]) -> None:
    with pytest.raises(UserError, match="1 <= min_num_frames <= max_num_frames"):
        _stream(tmp_path, [_line("x.mp4")], **sampler)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(BadRow, match="x.mp4: it is a named pipe"):
        read_header(tmp_path / "x.mp4")


def test_defaults_are_the_published_values() -> None:
    assert FrameSampler() == FrameSampler(max_num_frames=12, min_num_frames=8)
    assert VIT_ARGS["image_stride"] == 14
