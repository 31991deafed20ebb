"""Pictures for people: grids and films whose every pixel is where it belongs, and files that are whole or not there."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from runtime.files import UserError
from runtime.pictures import (
    check_outputs,
    check_sides,
    draw_all,
    picture_grid,
    save_all,
    save_film,
    save_picture,
    save_singles,
)


def gray_levels(count):
    """Images of one gray level each, 0, 10, 20, ...: uint8 (count, 3, 4, 6)."""
    return 10 * torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 3, 4, 6)


def test_grid_places_pictures_row_by_row():
    images = gray_levels(5)
    sheet = np.asarray(picture_grid(images, columns=2))
    assert sheet.shape == (3 * 6 + 2, 2 * 8 + 2, 3)
    for i in range(5):
        assert (sheet[2 + i // 2 * 6 :][:4, 2 + i % 2 * 8 :][:, :6] == 10 * i).all()
    assert picture_grid(images, 2, ["a", "long name", "c"]).width > sheet.shape[1]


def test_grid_places_groups_side_by_side_under_their_headings():
    """Catches groups cut in the wrong places, and headings that run into the next panel."""
    sheet = np.asarray(picture_grid(gray_levels(13)[1:], 2, headings=["one", "a much longer heading", "x"])).astype(int)
    step = (sheet.shape[1] - 2) // 3
    assert sheet.shape == (14 + 2 * 6 + 2, 3 * step + 2, 3) and step > 2 * 8
    for i in range(12):
        panel, row, column = i // 4, i % 4 // 2, i % 2
        assert (sheet[16 + row * 6 :][:4, 2 + panel * step + column * 8 :][:, :6] == 10 * (i + 1)).all()
        assert sheet[:14, 2 + panel * step :][:, :step].min() < 128  # its heading ...
        assert (sheet[:14, panel * step + step - 4 : panel * step + step] == 255).all()  # ... ends before the next


def test_gif_plays_every_frame_and_ends_on_the_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 100, 200)]
    frames[2].putpixel((0, 0), (0, 90, 0))
    save_film(tmp_path / "film.gif", frames, settings={"steps": 2})
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and json.loads(film.info["comment"]) == {"steps": 2}
        film.seek(2)
        assert film.convert("RGB").getpixel((4, 4)) == (200, 0, 0)
    assert os.listdir(tmp_path) == ["film.gif"]


@pytest.mark.parametrize("ending", ["webp", "png", "apng"])
def test_a_film_may_be_webp_or_animated_png(tmp_path, ending):
    """With the colours of the frames, which a palette would change, and the settings. Catches a film of one frame."""
    path, frames = tmp_path / f"film.{ending}", [Image.new("RGB", (8, 8), (value, 90, 7)) for value in (0, 100, 200)]
    save_film(path, frames, {"steps": 2})
    with Image.open(path) as film:
        assert (film.n_frames, film.format) == (3, "WEBP" if ending == "webp" else "PNG")
        for i, frame in enumerate(frames):
            film.seek(i)
            difference = np.asarray(film.convert("RGB")).astype(int) - np.asarray(frame)
            assert abs(difference).max() <= (8 if ending == "webp" else 0)
    assert b'{"steps": 2}' in path.read_bytes()


def test_a_film_shows_the_pictures_alone_and_small_ones_enlarged(tmp_path):
    """Catches half a screen of noise that nobody asked for, tiny pictures, and colours mixed by scaling."""
    pairs = torch.stack([gray_levels(4), gray_levels(8)[4:]])  # (2, 4, 3, 4, 6): x_t, predicted
    for noise, kept, panels in ((False, [4, 5, 6, 7], 1), (True, range(8), 2)):
        save_all(tmp_path / "x.png", tmp_path / "f.png", [pairs[1]], [[pairs]], ["a"], 4, ["euler"], {}, noise)
        with Image.open(tmp_path / "f.png") as film:
            frame = np.asarray(film.convert("RGB"))
        k = -(-512 // (2 * panels) // 6)  # to 256 or 128 pixels of the longer side, 6
        assert frame.shape == ((14 if noise else 0) + 2 * (4 * k + 2) + 2, panels * 2 * (6 * k + 2) + 2, 3)
        assert set(np.unique(frame[16:])) - {255} == {10 * i for i in kept}


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_settings_can_be_read_back_from_a_picture(tmp_path, ending):
    path, settings = tmp_path / f"x.{ending}", {"seed": 17, "classes": "c"}
    save_picture(path, Image.new("RGB", (8, 8)), settings)
    with Image.open(path) as image:
        assert image.format == {"jpg": "JPEG"}.get(ending, ending.upper())
        if ending == "png":
            text = image.text["settings"]
        else:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            text = comment.removeprefix(b"ASCII\0\0\0").decode()
    assert json.loads(text) == settings


def test_single_pictures_stay_in_their_folder_whatever_the_names(tmp_path):
    """Names come from checkpoints, which may be anybody's. Catches: a path out of the folder, or a name too long."""
    names = ["tiger cat", "../../up", "/root", "a\\b\0c\nd", "long" * 100, "\U0001f34e" * 200, "..", ""]
    save_singles(tmp_path / "singles", gray_levels(len(names)), names, {"seed": 1})
    assert os.listdir(tmp_path) == ["singles"]
    files = sorted(path for path in (tmp_path / "singles").iterdir())
    assert len(files) == len(names) and files[0].name == "00000-tiger-cat.png"
    assert [np.asarray(Image.open(path))[0, 0, 0] for path in files] == [10 * i for i in range(len(names))]


def test_all_images_are_drawn_in_batches_by_each_solver_and_filmed():
    """Catches: a lost short last batch, a film of one solver that continues in the next, frames in another order."""
    asked = []

    def draw(numbers, watch, solver):
        asked.append((solver, list(numbers)))
        x = torch.tensor([float(number) for number in numbers]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2) / 10
        for step in range(3):
            watch(step, step / 2, x * step / 2, x)
        return torch.full((len(numbers), 3, 2, 2), len(asked), dtype=torch.uint8)

    images, films = draw_all(draw, 5, 2, ["a", "b"], 2, film=True)
    assert asked == [(solver, numbers) for solver in "ab" for numbers in ([0, 1], [2, 3], [4])]
    assert [image[:, 0, 0, 0].tolist() for image in images] == [[1, 1, 2, 2, 3], [4, 4, 5, 5, 6]]
    assert len(films) == 2 and [len(film) for film in films] == [3, 3]
    for film in films:
        for step, frame in enumerate(film):
            assert frame.shape == (2, 5, 3, 2, 2)
            x = torch.arange(5) / 10
            assert frame[0, :, 0, 0, 0].tolist() == [int((v * step / 2 + 1) * 127.5 + 0.5) for v in x.tolist()]
            assert frame[1, :, 0, 0, 0].tolist() == [int((v + 1) * 127.5 + 0.5) for v in x.tolist()]
    assert draw_all(draw, 1, 9, ["a"], 2)[1] == []  # no film, no memory for it


def test_rows_are_classes_and_one_class_alone_is_a_square(tmp_path):
    images = gray_levels(4)
    save_all(tmp_path / "two.png", None, [images], [], ["a", "b"], 2, ["euler"], {})
    save_all(tmp_path / "one.png", None, [images], [], ["a"], 4, ["euler"], {})
    two, one = (np.asarray(Image.open(tmp_path / name)) for name in ("two.png", "one.png"))
    assert one.shape == (2 * 6 + 2, 2 * 8 + 2, 3) and np.array_equal(two[:, -18:], one)  # "a", "b" stand to the left


# ---- what cannot be written is found first ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag,name,reason",
    [
        ("out", "file/x.png", "cannot be written"),
        ("out", "file", "cannot be written"),
        ("gif", "file/x.gif", "cannot be written"),
        ("npz", "file/x.npz", "cannot be written"),
        ("out", "folder.png", "is a folder"),
        ("npz", "folder.npz", "is a folder"),
        ("out", "x.bmp", "name must end in .png"),
        ("gif", "film.mp4", "must end in .gif, .webp, .png, .apng"),
        ("gif", "x.png", "is the file of --out too"),
        ("npz", "x.png", "must end in .npz"),
    ],
)
def test_outputs_that_cannot_be_written_are_refused_by_flag(tmp_path, flag, name, reason):
    (tmp_path / "file").write_text("in the way")
    for folder in ("folder.png", "folder.npz"):
        (tmp_path / folder).mkdir()
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=f"--{flag} {tmp_path / name}.*{reason}"):
        check_outputs(**{"out": str(tmp_path / "x.png"), flag: str(tmp_path / name)})
    assert sorted(os.listdir(tmp_path)) == before


def test_grids_that_are_too_large_for_their_format_are_refused():
    check_sides("x.webp", None, (16, 16), 3, 800)
    check_sides("x.webp", None, (16, 16), 1, 2800)  # one class alone is drawn as a square
    check_sides("folder", None, (16, 16), 3, 9000)
    for out, gif, num, panels in (("x.png", None, 900, 1), ("folder", "x.gif", 450, 1), ("x.jpg", None, 450, 2)):
        with pytest.raises(UserError, match="a picture of 16200x54 pixels is too large, 15000 are the limit: use few"):
            check_sides(out, gif, (16, 16), 3, num, panels, noise=True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["key", "disk"])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif"])
def test_a_picture_whose_writing_fails_leaves_the_old_file(tmp_path, monkeypatch, name, error):
    """Half of the bytes are written when it happens. Catches: writing under the final name, and left-over halves."""

    def fail(self, path, *rest, **more):
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    (tmp_path / name).write_text("before")
    picture = Image.new("RGB", (8, 8))
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(type(error)):
        save_film(tmp_path / name, [picture]) if name == "x.gif" else save_picture(tmp_path / name, picture)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == "before"
