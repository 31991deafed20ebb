"""Pictures for people: grids with titles, films, and files that carry the settings they were drawn with."""

import json
import os
import pathlib
import re
import sys

import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, PngImagePlugin
from tqdm import tqdm

from data import to_uint8
from runtime.files import UserError, check_writable, whole_file

FORMATS = (".png", ".jpg", ".jpeg", ".webp")  # of pictures, by the ending of their names
FILMS = (".gif", ".webp", ".png", ".apng")  # of films; the last two are animated PNG
FILM_SIDE = 512  # pixels that a film's longer side has at least, give or take its gaps: 32 are too few to look at
GAP = 2  # white pixels around each image of a grid
MAX_GRID = 15_000  # pixels of a grid without its titles; a WEBP ends at 16,383, and few programs show more of a PNG


def is_picture(name):
    """Whether a file of this name is one picture, by its ending; `--out` takes any other name for a folder."""
    return pathlib.Path(name).suffix.lower() in FORMATS


def grid_shape(count, columns=None):
    """(rows, columns) of a grid of `count` images; without `columns`, about as many of both."""
    columns = columns or min(count, max(1, round(count**0.5)))
    return -(-count // columns), columns


def check_outputs(out, gif=None, npz=None):
    """UserError, before anything is computed, for files that cannot be written, or with an ending that is none of ours.

    out: a picture or a folder; gif: a film; npz: in the place of pictures, so that `out` does not count.
    """
    if gif and os.path.abspath(gif) == os.path.abspath(out):
        raise UserError(f"--gif {gif} is the file of --out too: choose another name for one of the two")
    for flag, name, endings in (("--npz", npz, (".npz",)), ("--gif", gif, FILMS)):
        if name and not name.lower().endswith(endings):
            raise UserError(f"{flag} {name}: the name must end in {', '.join(endings)}")
        if name:
            check_writable(flag, name)
    if not npz:
        if pathlib.Path(out).suffix.lower() in set(Image.registered_extensions()) - set(FORMATS):
            raise UserError(f"--out {out}: a picture's name must end in {', '.join(FORMATS)}; any other is a folder")
        check_writable("--out", out, is_folder=not is_picture(out))


def check_sides(out, gif, size, rows, num, panels=1, noise=False):
    """UserError, before anything is computed, for a grid of `save_all` whose sides would be above MAX_GRID.

    out: its file; gif: of its film (or None), which is twice as wide with `noise`; size: (height, width) of an image in
    pixels; rows: classes, of `num` images each; panels: solvers.
    """
    rows, columns = (rows, num) if rows > 1 else grid_shape(num)
    height, width = rows * (size[0] + GAP), panels * columns * (size[1] + GAP) * (2 if gif and noise else 1)
    if (gif or is_picture(out)) and max(height, width) > MAX_GRID:
        remedy = "use fewer classes, a smaller --num, or a folder for --out and no --gif"
        raise UserError(f"a picture of {width}x{height} pixels is too large, {MAX_GRID} are the limit: {remedy}")


def picture_grid(images, columns=None, titles=None, headings=None, text=10):
    """uint8 images (N, 3, H, W) -> one RGB picture, row by row, with 2 white pixels between; `titles` names the rows.

    With `headings` the images are that many groups of equal number, one grid each, side by side under their headings.
    text: its height in pixels; None: such that it can be read where the whole is as wide as a phone.
    """
    panels = len(headings or [""])
    count, _, height, width = len(images) // panels, *images.shape[1:]
    rows, columns = grid_shape(count, columns)
    text = text or max(16, panels * columns * width // 20)
    font = ImageFont.load_default(text)
    left = 8 + max(int(font.getlength(title)) for title in titles) if titles else 0
    top = text + 4 if headings else 0
    step = max([columns * (width + GAP), *(int(font.getlength(heading)) + 8 for heading in headings or [])])
    sheet = Image.new("RGB", (left + panels * step + GAP, top + rows * (height + GAP) + GAP), "white")
    write = ImageDraw.Draw(sheet).text
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        panel, place = divmod(i, count)
        row, column = divmod(place, columns)
        corner = left + GAP + panel * step + column * (width + GAP), top + GAP + row * (height + GAP)
        sheet.paste(Image.fromarray(image), corner)
    for row, title in enumerate(titles or []):
        write((left - 4, top + GAP + row * (height + GAP) + height // 2), title, "black", font, anchor="rm")
    for panel, heading in enumerate(headings or []):
        write((left + GAP + panel * step, top // 2 + 1), heading, "black", font, anchor="lm")
    return sheet


def enlarge(images, side):
    """Repeats the pixels of images (N, C, H, W) so that the longer side has at least `side`: (N, C, k*H, k*W)."""
    k = max(1, -(-side // max(images.shape[-2:])))
    return images.repeat_interleave(k, dim=-2).repeat_interleave(k, dim=-1)  # (N, C, k*H, k*W)


def film_frame(pairs, solvers):
    """One time of a drawing: x_t on the left, the predicted image on the right; of several solvers, side by side.

    pairs: for each solver uint8 (2, N, 3, H, W), as in the films of `draw_all`. Each of several solvers has a panel,
    x_t above and the predicted image below.
    """
    images = enlarge(torch.cat(pairs).flatten(0, 1), 128)  # (solvers * 2 * N, 3, H, W)
    if len(solvers) == 1:
        return picture_grid(images, None, None, ["x_t", "predicted clean image"], None)
    return picture_grid(images, pairs[0].shape[1], ["x_t", "predicted"], solvers, None)


def _notes(settings):
    """What Pillow's writers take to keep `settings` in a file: each format knows one of the two."""
    text, png, exif = json.dumps(settings), PngImagePlugin.PngInfo(), Image.Exif()
    if settings is not None:
        png.add_text("settings", text)
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + text.encode()
    return dict(pnginfo=png, exif=exif)


def save_picture(path, picture, settings=None):
    """PNG, JPEG or WEBP by the ending; `settings` go in as JSON: PNG's text "settings", or EXIF's UserComment."""
    with whole_file(path) as temporary:
        picture.save(temporary, quality=95, **_notes(settings))


def save_singles(folder, images, names, settings=None):
    """Images uint8 (N, 3, H, W) as PNG files of their own, named by number and `names` (N): "00007-tiger-cat.png".

    Whatever a name holds, its file lies in `folder`, and the name of the file is short enough for a file system.
    """
    for i, (image, name) in enumerate(zip(images.permute(0, 2, 3, 1).cpu().numpy(), names, strict=True)):
        plain = re.sub(r"[^\w.-]", "-", name)[:60]
        save_picture(pathlib.Path(folder) / f"{i:05d}-{plain}.png", Image.fromarray(image), settings)


def save_film(path, frames, settings=None):
    """Pictures of one size -> an endless film of 80 ms each, the last held for 1.5 s: GIF, WEBP or animated PNG.

    By the ending, one of FILMS; settings: kept as in a picture, in a GIF as its comment.
    """
    kind, how = {".gif": "GIF", ".webp": "WEBP"}.get(pathlib.Path(path).suffix.lower(), "PNG"), _notes(settings)
    if kind == "GIF":
        palette = frames[-1].quantize(255)  # one palette for all frames, taken from the finished picture: no flicker
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        how = dict(comment=json.dumps(settings))
    first, *rest = frames
    how |= dict(save_all=True, append_images=rest, duration=[80] * len(rest) + [1500], loop=0)
    with whole_file(path) as temporary:
        first.save(temporary, kind, quality=90, **how)


def draw_all(draw, count, batch_size, solvers, steps, film=False):
    """Draws `count` images by each solver in batches: a list of images uint8 (N, 3, H, W), and one of films, if wanted.

    draw(numbers, watch, solver) draws a batch, uint8 (B, 3, H, W) on the CPU; watch: of samplers.generate. A film is a
    list of its steps+1 frames, uint8 (2, N, 3, H, W): x_t, and the clean image predicted from it.
    """
    images, films = [], []
    batches = [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    with tqdm(total=len(solvers) * len(batches) * steps, disable=not sys.stderr.isatty()) as bar:
        for solver in solvers:
            frames = [[] for _ in range(steps + 1)]

            def watch(step, t, x_t, x, frames=frames):
                bar.update(step > 0)
                if film:
                    frames[step].append(torch.stack([to_uint8(x_t), to_uint8(x)]).cpu())  # (2, B, 3, H, W)

            images.append(torch.cat([draw(numbers, watch, solver) for numbers in batches]))  # (N, 3, H, W)
            films += [[torch.cat(parts, dim=1) for parts in frames]] if film else []
    return images, films


def save_all(out, gif, images, films, titles, num, solvers, settings, noise=False):
    """Saves what `draw_all` returns: `out` is one grid or a folder of single pictures, `gif` (or None) the film.

    titles: the names of the classes, of which there are `num` images each, in a row (one class alone: in a square).
    solvers: their names, which head the panels where there are several; settings: kept in each file. The film shows the
    clean image predicted at each time and, with `noise`, x_t beside it.
    """
    names = [title for title in titles for _ in range(num)]
    columns, titles = (num, titles) if len(titles) > 1 else (None, None)
    several = len(solvers) > 1
    if is_picture(out):
        grid = picture_grid(torch.cat(images), columns, titles, solvers if several else None)
        save_picture(out, grid, settings)
    else:
        for solver, drawn in zip(solvers, images):
            save_singles(out, drawn, [f"{name} {solver}" if several else name for name in names], settings)
    if gif:
        headings = solvers if several else None
        if noise:
            headings = [f"{solver}: {what}" for solver in solvers for what in ("x_t", "predicted")]
        rows, across = grid_shape(len(names), columns)
        side = FILM_SIDE // max(rows, across * len(headings or [""]))
        frames = []
        for parts in zip(*films):  # of each time, by all solvers
            grid = torch.cat([pair if noise else pair[1:] for pair in parts]).flatten(0, 1)  # (panels*N, 3, H, W)
            frames.append(picture_grid(enlarge(grid, side), columns, titles, headings))
        save_film(gif, frames, settings)
