"""Reading a picture, writing a file whole or not at all, and how a mistake of the user is told."""

import errno
import os
import pathlib
import signal
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from helpers import ROOT, in_a_fork, noise_picture
from runtime.files import UserError, check_writable, cut_long_sides, read_image, run, whole_file
from runtime.files.weights import damaged_record

# ---- pictures --------------------------------------------------------------------------------------------------------


def test_unreadable_pictures_are_errors_with_the_path(tmp_path):
    """Catches a gray or a neighbouring picture in the place of one that cannot be read."""
    whole, jpeg = tmp_path / "whole.png", tmp_path / "whole.jpg"
    noise_picture(64, 64).save(whole)
    noise_picture(64, 64).save(jpeg)
    cases = {
        "empty.png": (b"", "empty file"),
        "text.jpg": (b"this is not a picture", "another kind of file"),
        "cut.png": (whole.read_bytes()[:900], ""),
        "cut.jpg": (jpeg.read_bytes()[:900], "truncated"),
        "gif.png": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "another kind of file"),
    }
    for name, (content, reason) in cases.items():
        (tmp_path / name).write_bytes(content)
        for given in (None, content):  # from the file itself, or as the bytes of a member of a tar
            with pytest.raises(UserError, match=rf"{name} is not a readable .*{reason}") as error:
                read_image(tmp_path / name, given)
            assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="nowhere.png"):
        read_image(tmp_path / "nowhere.png")


def test_every_mode_becomes_rgb_and_transparency_lies_over_white(tmp_path):
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    for mode in ("L", "RGB", "RGBA", "LA", "P", "1", "CMYK"):
        path = tmp_path / (f"{mode}.jpg" if mode == "CMYK" else f"{mode}.png")
        red.convert(mode).save(path)
        image = read_image(path)
        assert image.mode == "RGB" and image.size == (4, 4), mode
        red_or_gray = {"L": (60,) * 3, "LA": (60,) * 3, "1": None, "P": None}.get(mode, (200, 0, 0))
        if red_or_gray:
            assert max(abs(a - b) for a, b in zip(image.getpixel((0, 0)), red_or_gray)) <= 2, mode
    assert read_image(tmp_path / "RGB.png").getpixel((0, 0)) == (200, 0, 0)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "clear-gray.png")
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "hole.png", transparency=1)
    for name in ("clear.png", "clear-gray.png", "hole.png"):
        assert read_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255), name


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.asarray(read_image(tmp_path / "ramp.png"))[0, :, 0].tolist() == list(range(256))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused_by_their_header(tmp_path):
    """20,000 x 20,000 pixels claimed in 70 bytes; and 10,000 x 10,000, at which Pillow itself only warns."""
    for side in (20_000, 10_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = b"".join(
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
            for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 9)))
        )
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        with pytest.raises(UserError, match="bomb.png claims to be larger"):
            read_image(tmp_path / "bomb.png")


def test_exif_turns_a_picture_where_that_is_asked_for(tmp_path):
    """All eight orientations, against what the eye sees. Catches a turn the wrong way round."""
    upright = noise_picture(8, 6)
    stored = {1: [], 2: ["FLIP_LEFT_RIGHT"], 3: ["ROTATE_180"], 4: ["FLIP_TOP_BOTTOM"], 6: ["ROTATE_90"]}
    stored |= {8: ["ROTATE_270"], 5: ["FLIP_LEFT_RIGHT", "ROTATE_90"], 7: ["FLIP_LEFT_RIGHT", "ROTATE_270"]}
    for orientation, turns in stored.items():
        picture, exif = upright, Image.Exif()
        for turn in turns:
            picture = picture.transpose(Image.Transpose[turn])
        exif[0x0112] = orientation
        picture.save(tmp_path / "turned.png", exif=exif)
        assert read_image(tmp_path / "turned.png", exif="respect").tobytes() == upright.tobytes(), orientation
        assert read_image(tmp_path / "turned.png").tobytes() == picture.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_exif_is_ignored_broken_or_not(tmp_path):
    """ADM's preparation ignores the orientation. Catches pictures that are turned here and not in the reference."""
    picture, turned = noise_picture(8, 6), Image.Exif()
    turned[0x0112] = 6  # lies on its side
    picture.save(tmp_path / "turned.png", exif=turned)
    assert np.array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.asarray(picture))
    picture.save(tmp_path / "broken.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert read_image(tmp_path / "broken.jpg").size == (6, 8)


def test_only_the_middle_of_a_very_long_picture_is_kept():
    line = Image.fromarray(np.arange(100, dtype=np.uint8)[None])
    assert np.asarray(cut_long_sides(line))[0].tolist() == list(range(34, 66))
    assert np.asarray(cut_long_sides(line.rotate(-90, expand=True)))[:, 0].tolist() == list(range(34, 66))
    square = noise_picture(5, 160)
    assert cut_long_sides(square) is square


# ---- files that are whole or not there -------------------------------------------------------------------------------


def test_a_file_is_written_whole_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for content in ("first", "second"):
        with whole_file(path) as temporary:
            temporary.write_text(content)
        assert path.read_text() == content and os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_while_writing_keeps_the_file_before_and_leaves_nothing_else(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(type(error)), whole_file(path) as temporary:
        temporary.write_text("aft")
        raise error
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file.txt"]


def test_a_kill_while_writing_keeps_the_file_before(tmp_path):
    """Catches writing to the final name; what the killed process leaves is hidden, and replaced next time."""
    path = tmp_path / "file.txt"
    path.write_text("before")

    def half_a_write():
        with whole_file(path) as temporary:
            temporary.write_text("aft")
            os.kill(os.getpid(), signal.SIGKILL)

    child = in_a_fork(half_a_write)
    child.join()
    assert child.exitcode == -signal.SIGKILL and path.read_text() == "before"
    with whole_file(path) as temporary:
        temporary.write_text("after")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("ending", [".png", ".npz", ".gif"])
def test_the_temporary_file_has_the_ending_of_the_final_one(tmp_path, ending):
    """By which Pillow and numpy choose the format, and numpy whether to add an ending."""
    with whole_file(tmp_path / f"x{ending}") as temporary:
        assert temporary.suffix == ending and temporary.parent == tmp_path and temporary.name.startswith(".")
        temporary.touch()


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "old.png").write_bytes(b"old")
    check_writable("--out", tmp_path / "old.png")
    check_writable("--out", tmp_path / "new.png")
    check_writable("--out", tmp_path / "made" / "new.png")
    check_writable("--out", tmp_path / "run", is_folder=True)
    assert (tmp_path / "old.png").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["made", "old.png", "run"]
    assert os.listdir(tmp_path / "made") == os.listdir(tmp_path / "run") == []


def test_a_place_that_cannot_be_written_is_one_line_that_names_the_flag(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"--npz .*file/x.npz cannot be written \((Not a dir|File exists)"):
        check_writable("--npz", tmp_path / "file" / "x.npz")
    with pytest.raises(UserError, match=r"--out .*file cannot be written \(File exists\)"):
        check_writable("--out", tmp_path / "file", is_folder=True)
    with pytest.raises(UserError, match=r"--out .*folder is a folder: choose another name"):
        check_writable("--out", tmp_path / "folder")

    def read_only(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(pathlib.Path, "touch", read_only)
    with pytest.raises(UserError, match=r"--gif .*x.gif cannot be written \(Read-only file system\)"):
        check_writable("--gif", tmp_path / "x.gif")


def test_a_damaged_record_of_a_saved_file_is_named(tmp_path):
    """In the bytes of a tensor, and in the flag that makes a record a folder, of which torch would read nothing."""
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "x.pt")
    assert damaged_record(tmp_path / "x.pt") is None
    whole = bytearray((tmp_path / "x.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        record = next(info for info in archive.infolist() if info.filename.endswith("data/0"))
    flipped = bytearray(whole)
    flipped[record.header_offset + 500] ^= 4
    entry = whole.rindex(b"PK\x01\x02", 0, whole.rindex(record.filename.encode()))  # in the central directory
    folder = bytearray(whole)
    folder[entry + 38] |= 0x10  # the external attributes
    for damaged in (flipped, folder):
        (tmp_path / "x.pt").write_bytes(damaged)
        assert damaged_record(tmp_path / "x.pt") == record.filename


# ---- mistakes in one line --------------------------------------------------------------------------------------------


def ends(monkeypatch, error):
    """What run() leaves with when main() raises `error`: the text of the SystemExit."""

    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["/somewhere/script.py"])
    with pytest.raises(SystemExit) as leaving:
        run(main)
    return leaving.value.code


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("--steps 0 is not at least 1"), "script.py: --steps 0 is not at least 1"),
        (OSError(errno.ENOSPC, "No space left on device"), "script.py: [Errno 28] No space left on device"),
        (FileNotFoundError("there is no checkpoint x.pt"), "script.py: there is no checkpoint x.pt"),
        (ConnectionError(), "script.py: ConnectionError"),
        (KeyboardInterrupt(), "script.py: interrupted; what was saved stays"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "script.py: the GPU's memory is full: use fewer"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            "script.py: DataLoader worker (pid 7)",
        ),
        (MemoryError(), "script.py: the memory is full: use fewer images at once (--batch-size, --micro-batch, --num)"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: 9"),
            "script.py: the memory is full",
        ),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9"), "script.py: the memory is"),
        (dist.DistBackendError("timed out"), "script.py: rank 0 lost touch with another process: timed out"),
        (RuntimeError("[/gloo/x.cc:1] Connection closed by peer"), "script.py: rank 0 lost touch with another"),
    ],
)
def test_what_the_user_can_put_right_is_one_line(monkeypatch, error, line):
    text = ends(monkeypatch, error)
    assert text.startswith(line) and "\n" not in text


@pytest.mark.parametrize("allocate", [lambda: torch.empty(2**60), lambda: np.empty(2**57), lambda: bytearray(2**60)])
def test_what_torch_numpy_and_python_say_of_a_full_memory_is_known(monkeypatch, allocate):
    """Their true words, which a new version may change."""
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(SystemExit, match="^script.py: the memory is full"):
        run(allocate)


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("shapes (2,) and (3,)"), AssertionError(), KeyError(1)]
)
def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch, error):
    """Catches a ValueError of ours that is told as if it were the user's, without the place where it arose."""

    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(type(error)) as caught:
        run(main)
    assert caught.value is error and caught.traceback[-1].name == "main"


SCRIPT = """
import sys, torch
from runtime.files import UserError, run
from runtime.stopping import signals_blocked

class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, i):
        if i == 3 and sys.argv[1] == "picture":
            raise UserError("cat/3.png is not a readable image")
        return i

def main():
    with signals_blocked():  # as in runtime/loader.py: such workers do not end when they are asked to
        batches = iter(torch.utils.data.DataLoader(Pictures(), 2, num_workers=2))
    for batch in batches:
        if sys.argv[1] != "picture":
            raise RuntimeError("a fault") if sys.argv[1] == "fault" else KeyboardInterrupt

run(main)
"""


@pytest.mark.parametrize(
    "what, line",
    [
        ("picture", "script.py: cat/3.png is not a readable image"),
        pytest.param("fault", "RuntimeError: a fault", marks=pytest.mark.slow),
        pytest.param(
            *("interrupt", "script.py: interrupted; what was saved stays, and the same command resumes from there"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_script_ends_although_loader_workers_are_still_there(tmp_path, what, line):
    """And says what it was. Catches Python waiting at exit, for ever, for workers that a traceback still holds."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tmp_path / "script.py", what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == line
    assert ("Traceback" in done.stderr) == (what == "fault")


def test_a_reader_that_leaves_ends_no_run(tmp_path):
    """As in `python train.py | head -1`. Catches a BrokenPipeError, hours into a run, from a line that nobody reads."""
    code = """
import pathlib, sys
from runtime.files import run

def main():
    print("first", flush=True)
    sys.stdin.readline()
    for i in range(10_000):
        print("more", flush=i % 100 == 0)
    pathlib.Path(sys.argv[1]).write_text("done")

run(main)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "end")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    assert process.stdout.readline() == "first\n"
    process.stdout.close()
    process.stdin.close()  # now it goes on
    stderr = process.stderr.read()
    assert (process.wait(60), stderr) == (0, "") and (tmp_path / "end").read_text() == "done"


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-")), "<&- >&- 2>&-"]
)
def test_a_script_whose_output_is_closed_does_its_work(tmp_path, closed):
    """As under some schedulers. Catches: a traceback about None, and a mistake that ends with exit status 0."""
    code = "import pathlib, sys; from runtime.files import UserError, run\n"
    code += "def main():\n print('x'); pathlib.Path(sys.argv[1]).write_text('done')\n"
    code += " print('y', file=sys.stderr)\n if sys.argv[2:]: raise UserError('a line')\nrun(main)"
    for more, status in (((), 0), (("bad",), 1))[closed != "<&- >&- 2>&-" :]:  # a good end where all are closed
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code, tmp_path / "x", *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.returncode == status and "Traceback" not in done.stderr + done.stdout
        assert (tmp_path / "x").read_text() == "done"
        if more and "2>" not in closed:
            assert done.stderr.splitlines()[-1] == "-c: a line"


def png(width, depth, colour, row, clear):
    """A PNG of one row of raw bytes; colour: 0 gray, 2 RGB; clear: the samples of its transparent gray or colour."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))
    rest = chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear)) + chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + rest + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, expected",
    [
        (png(4, 2, 0, bytes([0b00011011]), [1]), [0, 255, 170, 255]),
        (png(4, 2, 0, bytes([0b00011011]), [0]), [255, 85, 170, 255]),
        (png(2, 4, 0, bytes([0x5A]), [5]), [255, 170]),
        (png(8, 1, 0, bytes([0b01000000]), [0]), [255] * 8),
        (png(2, 16, 2, struct.pack(">6H", 0x1234, 0x56, 0, 0x8000, 0x4000, 0x2000), [0x1234, 0x56, 0]), [255, 128]),
        (png(2, 16, 2, struct.pack(">6H", 0, 5, 0, 0x8000, 0x4000, 0x2000), [0, 5, 0]), [255, 128]),
    ],
)
def test_the_transparent_colour_of_a_png_of_any_depth_becomes_white(content, expected):
    """Pillow gives it in the file's own bits, and the pixels in 8. Catches: a background that stays black or gray."""
    picture = np.asarray(read_image("x.png", content))
    assert picture[0, :, 0].tolist() == expected and (picture[0, 0] == expected[0]).all()


def test_the_transparent_gray_of_a_16_bit_png_becomes_white(tmp_path):
    """As that of 8 bits does. Catches: the one gray that a PNG declares transparent staying black."""
    for dtype, clear in ((np.uint8, 0), (np.uint16, 0)):
        pixels = np.array([[0, 0, 200 * (257 if dtype == np.uint16 else 1)]], dtype)
        Image.fromarray(pixels).save(tmp_path / "x.png", transparency=clear)
        assert np.asarray(read_image(tmp_path / "x.png")).tolist() == [[[255] * 3, [255] * 3, [200] * 3]], dtype
