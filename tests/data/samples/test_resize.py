"""The resize kernel gives Pillow's pixels or is not used. What a run says where it isn't, and that it touches no other
memory: a program with sanitizers, each row in an allocation of its own."""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bagel_ds.data.samples import resize
from bagel_ds.data.samples.resize import began, bicubic, build, by_pillow, difference, loaded, prepare, processor_fault
from bagel_ds.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
SOURCE = Path(resize.__file__).with_name("resize.cpp")
NEEDS_KERNEL = pytest.mark.skipif(
    bool(processor_fault()) or shutil.which("c++") is None, reason="needs a processor with AVX2 and a C++ compiler"
)

Size = tuple[int, int]  # (width, height)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has not resized anything."""
    for name in ("BAGEL_DS_RESIZE", "LOCAL_RANK", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(resize, "_reported", set())
    monkeypatch.setattr(resize, "_starters_fault", None)
    resize._choice.cache_clear()
    yield
    resize._choice.cache_clear()


@pytest.fixture
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the kernel is built, empty."""
    folder = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
    return folder


@pytest.fixture(params=[0, 1], ids=["blocks of Pillow's", "one block"])
def block_allocator(request: pytest.FixtureRequest) -> Iterator[int]:
    before = Image.core.get_use_block_allocator()
    Image.core.set_use_block_allocator(request.param)
    yield request.param
    Image.core.set_use_block_allocator(before)


def noise(size: Size, seed: int = 0, extremes: bool = False) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels // 128 * np.uint8(255) if extremes else pixels)


def kernel_pixels(image: Image.Image, size: Size) -> torch.Tensor:
    """By the kernel; an error where Pillow would resize instead."""
    kernel, fault = resize._choice()
    assert kernel is not None, fault
    pixels = kernel(image, size)
    assert pixels is not None
    return pixels


def random_sizes(count: int, seed: int) -> list[tuple[Size, Size]]:
    """Before and after: small and large sides, long thin pictures, one side or both unchanged."""
    drawn = random.Random(seed)

    def side() -> int:
        return drawn.choice([1, drawn.randint(1, 12), drawn.randint(1, 150), drawn.randint(1, 700)])

    sizes = []
    for _ in range(count):
        source, size = (side(), side()), (side(), side())
        kept = drawn.choice(["neither", "neither", "neither", "width", "height", "both"])
        width = source[0] if kept in ("width", "both") else size[0]
        height = source[1] if kept in ("height", "both") else size[1]
        sizes.append((source, (width, height)))
    return sizes


@NEEDS_KERNEL
@pytest.mark.parametrize("part", range(4))
def test_random_sizes_have_pillows_pixels(part: int, block_allocator: int) -> None:
    sizes = random_sizes(400, seed=part)
    height_first = sum(a[1] - b[1] > max(2 * (a[0] - b[0]), 0) and a[0] != b[0] for a, b in sizes)
    assert 30 < height_first < 200, "both orders of the passes must be tried often"
    for number, (source, size) in enumerate(sizes):
        image = noise(source, number, extremes=number % 3 == 0)
        assert torch.equal(kernel_pixels(image, size), by_pillow(image, size)), (source, size)


@NEEDS_KERNEL
@pytest.mark.parametrize(
    ("source", "size"),
    [
        ((1200, 900), (600, 450)),  # weights that are exact in binary
        ((300, 200), (1200, 800)),
        ((1280, 720), (160, 90)),
        ((20_000, 2), (14, 14)),
        ((2, 20_000), (14, 14)),
        ((1, 1), (300, 200)),
        ((300, 200), (1, 1)),
        ((5000, 3), (3, 5000)),
        ((4, 3), (4, 1)),
    ],
)
def test_extreme_sizes_have_pillows_pixels(source: Size, size: Size) -> None:
    for extremes in (False, True):
        image = noise(source, extremes=extremes)
        assert torch.equal(kernel_pixels(image, size), by_pillow(image, size))


@NEEDS_KERNEL
@pytest.mark.parametrize("source", [(2100, 2050), (1900, 4500), (30_000, 200)])
def test_more_than_four_megapixels_have_pillows_pixels_in_one_block_or_several(
    source: Size, block_allocator: int
) -> None:
    image = noise(source)
    assert (resize._in_place(image) is not None) == bool(block_allocator)
    for size in ((700, 600), (256, source[1]), source):
        assert torch.equal(kernel_pixels(image, size), by_pillow(image, size))


@NEEDS_KERNEL
def test_pixels_are_right_with_any_size_of_pillows_blocks(block_allocator: int) -> None:
    """Also blocks smaller than the strips that are copied: then the kernel steps back, for this image only."""
    prepare()
    size = Image.core.get_block_size()
    try:
        for block in (2**16, 2**20, 2**26):
            Image.core.set_block_size(block)
            image = noise((1500, 1500))
            assert torch.equal(bicubic(image, (640, 640)), by_pillow(image, (640, 640)))
    finally:
        Image.core.set_block_size(size)


@NEEDS_KERNEL
def test_the_picture_is_left_as_it_is() -> None:
    image = noise((120, 90))
    before = image.tobytes()
    pixels = bicubic(image, (64, 48))
    del image
    other = noise((120, 90), seed=1)
    assert torch.equal(pixels, bicubic(Image.frombytes("RGB", (120, 90), before), (64, 48)))
    assert not torch.equal(pixels, bicubic(other, (64, 48)))
    assert pixels.dtype == torch.uint8 and pixels.shape == (48, 64, 3) and pixels.is_contiguous()


@NEEDS_KERNEL
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("a = -0.5;", "a = -0.75;"),  # another cubic
        ("1 << (kOne - 1)", "0"),  # cut off instead of rounded
        ("gone > 2 * columns", "gone > 3 * columns"),  # the other order of passes for some sizes
        ("weight < 0 ? -0.5 : 0.5", "0.5"),  # negative weights rounded otherwise: 1 of 2^22
        ("+ weight * (1 << kOne)", "+ weight * ((1 << kOne) - 64)"),
        ("std::max(scale, 1.0)", "scale"),  # no widening, or a narrowed filter
    ],
)
def test_a_kernel_with_other_pixels_is_refused(
    right: str, wrong: str, tmp_path: Path, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SOURCE.read_text()
    assert text.count(right) == 1
    broken = tmp_path / "broken.cpp"
    broken.write_text(text.replace(right, wrong))
    assert "its pixels differ from those of Pillow" in difference(loaded(build(broken, own_folder)))
    monkeypatch.setattr(resize, "_SOURCE", broken)
    image = noise((60, 120))
    assert torch.equal(bicubic(image, (40, 79)), by_pillow(image, (40, 79)))
    assert resize._choice().kernel is None
    assert difference(loaded(build(SOURCE, own_folder))) == "", "the right one has a name of its own"


@NEEDS_KERNEL
def test_another_pillow_is_noticed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One that filters the width first always, as 11.0 to 12.3 did."""
    original = Image.Image.resize

    def width_first(image: Image.Image, size: Size, *rest: object) -> Image.Image:
        return original(original(image, (size[0], image.size[1]), *rest), size, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", width_first)
    prepare()
    (record,) = caplog.records
    assert f"differ from those of Pillow {Image.__version__} (noise of" in record.getMessage()


def fault_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> str:
    """The reason why Pillow resizes, after three pictures; its pixels are checked, and that it is said once."""
    caplog.set_level(logging.INFO)
    for seed in range(3):
        image = noise((60, 50), seed)
        assert torch.equal(bicubic(image, (32, 48)), by_pillow(image, (32, 48)))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("Pillow resizes images, because the faster kernel can't be used: ")
    return record.getMessage()


def test_without_a_compiler_pillow_resizes(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resize, "processor_fault", lambda: "")
    monkeypatch.setenv("PATH", "")
    assert "there is no C++ compiler (c++); apt-get install g++" in fault_of(monkeypatch, caplog)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            "echo 'x.cpp:1: fatal error: immintrin.h: no such file' >&2; exit 1",
            "can't compile it: x.cpp:1: fatal error",
        ),
        ("exit 3", "can't compile it: exit code 3"),
        ("exit 0", "file too short"),  # it wrote nothing
    ],
)
def test_with_a_broken_compiler_pillow_resizes(
    script: str,
    reason: str,
    own_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(resize, "processor_fault", lambda: "")
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert reason in fault_of(monkeypatch, caplog)


def test_a_compiler_that_hangs_is_given_up(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nexec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(resize, "processor_fault", lambda: "")
    monkeypatch.setattr(resize, "_COMPILE_SECONDS", 0.2)
    monkeypatch.setenv("CXX", str(compiler))
    assert "took more than" in fault_of(monkeypatch, caplog)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("what", ["not a folder", "read only"])
def test_where_nothing_can_be_written_pillow_resizes(
    what: str, own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resize, "processor_fault", lambda: "")
    if what == "not a folder":
        own_folder.write_text("")
        assert "Not a directory" in fault_of(monkeypatch, caplog)
        return
    own_folder.mkdir()
    own_folder.chmod(0o500)
    if os.access(own_folder, os.W_OK):  # root may write everywhere
        monkeypatch.setattr(Path, "mkdir", _refuse)
    assert "ermission denied" in fault_of(monkeypatch, caplog) or "Read-only" in caplog.text


def _refuse(path: Path, *_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied", str(path))


def test_without_avx2_pillow_resizes(
    own_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2x\n")
    found = processor_fault(cpuinfo)
    monkeypatch.setattr(resize, "processor_fault", lambda: found)
    monkeypatch.setattr(resize.platform, "machine", lambda: "x86_64")
    assert "the processor has no AVX2" in processor_fault(cpuinfo)
    assert "features are unknown" in processor_fault(tmp_path / "absent")
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 avx\n")
    assert processor_fault(cpuinfo) == ""
    monkeypatch.setattr(resize.platform, "machine", lambda: "aarch64")
    assert "this is aarch64" in processor_fault(cpuinfo)
    assert "AVX2" in fault_of(monkeypatch, caplog) or "aarch64" in caplog.text
    assert not own_folder.exists(), "nothing is compiled for such a processor"


def test_one_process_of_a_host_reports_the_fault(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resize, "processor_fault", lambda: "there is a reason")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert prepare() == "there is a reason" and not caplog.records
    monkeypatch.setattr(resize, "_reported", set())
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert prepare() == prepare() == "there is a reason" and len(caplog.records) == 1


def test_a_worker_reports_only_what_its_starter_does_not_know(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(resize, "processor_fault", lambda: "there is a reason")
    monkeypatch.setenv("LOCAL_RANK", "3")
    began("there is a reason")
    bicubic(noise((20, 20)), (16, 16))
    assert not caplog.records
    monkeypatch.setattr(resize, "_reported", set())
    began("")
    bicubic(noise((20, 20)), (16, 16))
    (record,) = caplog.records
    assert "there is a reason" in record.getMessage()


@NEEDS_KERNEL
def test_a_user_can_turn_the_kernel_off(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BAGEL_DS_RESIZE", "pillow")
    image = noise((60, 50))
    assert prepare() == "" and torch.equal(bicubic(image, (32, 48)), by_pillow(image, (32, 48)))
    assert not own_folder.exists() and not caplog.records
    monkeypatch.setenv("BAGEL_DS_RESIZE", "kernel")
    with pytest.raises(UserError, match="BAGEL_DS_RESIZE=kernel is unknown; the only value is BAGEL_DS_RESIZE=pillow"):
        bicubic(image, (32, 48))


BUILDS = """
import sys, time
from pathlib import Path
from bagel_ds.data.samples.resize import build, difference, loaded
time.sleep(max(float(sys.argv[2]) - time.time(), 0))
library = build(Path(sys.argv[1]), Path(sys.argv[3]))
print(library, difference(loaded(library)), sep="|")
"""


@NEEDS_KERNEL
def test_processes_that_build_at_the_same_time_all_get_the_kernel(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", BUILDS, str(SOURCE), str(time.time() + 8), str(tmp_path)]
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0].strip() for process in started]
    (library,) = tmp_path.glob("*/*")
    assert outputs == [f"{library}|"] * 3
    assert library.name == "resize.so"


@NEEDS_KERNEL
def test_an_unfinished_build_is_not_used_and_a_finished_one_is_not_repeated(own_folder: Path) -> None:
    library = build(SOURCE, own_folder)
    made = library.stat().st_mtime_ns
    assert build(SOURCE, own_folder).stat().st_mtime_ns == made
    library.rename(library.with_name("tmpabc.so"))  # as one that was killed leaves
    assert build(SOURCE, own_folder) == library and library.stat().st_mtime_ns > made


RUN = """
import logging, sys
from pathlib import Path
from bagel_ds.data.batches.loader import PackingOptions, PlannedData
from bagel_ds.data.samples.image_tokens import LayoutOptions
from tests.small_data import byte_tokenizer, mixed_groups, streams_of

folder = Path(sys.argv[1])
tokenizer = byte_tokenizer(folder / "tokenizer")
streams = streams_of(folder, mixed_groups(folder), tokenizer)
data = PlannedData(streams, tokenizer, LayoutOptions(), PackingOptions(400, 500, 4), 0)
batches = data.micro_batches(0, 1, num_workers=2)
made = [next(batches).batch for _ in range(4)]
batches.close()
print(sum(image.sum().item() for batch in made for image in batch.images), sum(len(batch.images) for batch in made))
"""


@NEEDS_KERNEL
def test_workers_make_the_same_batches_without_a_compiler_and_the_run_says_so_once(tmp_path: Path) -> None:
    found = {}
    for compiler in ("c++", "/no/such/compiler"):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        environment = {
            **os.environ,
            "PYTHONPATH": str(REPOSITORY),
            "CXX": compiler,
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"),
        }
        command = [sys.executable, "-c", RUN, str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("Pillow resizes images") == (compiler != "c++"), done.stderr
        found[compiler] = done.stdout
    assert len(set(found.values())) == 1 and int(found["c++"].split()[1]) > 0


# Every row, and the result, in memory of exactly its size.
DRIVER = """
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>
extern "C" int bagel_ds_resize(const uint8_t* const*, int64_t, int64_t, uint8_t*, int64_t, int64_t);
int main() {
    long W, H, w, h, sizes = 0;
    while (std::scanf("%ld %ld %ld %ld", &W, &H, &w, &h) == 4) {
        std::vector<std::unique_ptr<uint8_t[]>> kept;
        std::vector<const uint8_t*> rows;
        for (long y = 0; y < H; y++) {
            kept.emplace_back(new uint8_t[4 * W]);
            for (long i = 0; i < 4 * W; i++) kept.back()[i] = static_cast<uint8_t>(std::rand() >> 8);
            rows.push_back(kept.back().get());
        }
        std::unique_ptr<uint8_t[]> out(new uint8_t[3 * w * h]);
        if (bagel_ds_resize(rows.data(), W, H, out.get(), w, h)) return 2;
        sizes++;
    }
    std::printf("%ld\\n", sizes);
}
"""


@NEEDS_KERNEL
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("", ""),
        ("x + 1 < w ? 4 : 3", "4"),  # a byte too many after the last pixel
        ("std::min(filters.first[x], width - taps)", "filters.first[x]"),  # the last filters reach beyond the row
        ("std::min(row + 1, H - 1)", "row + 1"),  # a row too many in pictures of an odd height
    ],
)
def test_the_kernel_stays_inside_its_rows_and_has_no_undefined_behavior(right: str, wrong: str, tmp_path: Path) -> None:
    (tmp_path / "driver.cpp").write_text(DRIVER)
    source, text = tmp_path / "kernel.cpp", SOURCE.read_text()
    assert not right or text.count(right) == 1
    source.write_text(text.replace(right, wrong) if right else text)
    program = tmp_path / "driver"
    flags = [flag for flag in resize._FLAGS if flag not in ("-shared", "-fPIC", "-O3")]
    flags += ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = ["c++", *flags, str(tmp_path / "driver.cpp"), str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    sizes = [*random_sizes(400, seed=9), *resize._TRIED, ((6000, 1), (1, 40)), ((1, 6000), (40, 1))]
    given = "".join(f"{a[0]} {a[1]} {b[0]} {b[1]}\n" for a, b in sizes)
    done = subprocess.run([program], input=given, capture_output=True, text=True, timeout=300)
    if right:
        assert "ERROR: AddressSanitizer" in done.stderr, "the sanitizer must see a kernel that leaves its rows"
    else:
        assert (done.returncode, done.stdout.strip()) == (0, str(len(sizes))), done.stderr[:3000]
