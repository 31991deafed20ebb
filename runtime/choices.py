"""--class, --resolution and --upscale: from the words of a user to class indices, tokens and pixels."""

import difflib
import fractions
import re
import shlex

from neural_field import ENCODINGS
from runtime.files import UserError
from runtime.options import class_names


def find_classes(text, names):
    """The class indices that --class asks for, and a remark on each name that could mean something else: two lists.

    text: items with commas between; a name that holds a comma stands alone or in double quotes. An item is a name as it
    is, "all" or an index, or a name in other letters: the first of these that there is. Raises UserError, which lists
    what there is.
    """
    found, remarks, lower = [], [], [name.lower() for name in names]
    for item in [text] if text in names else class_names(text) or [text]:
        index = int(item) if re.fullmatch("[0-9]{1,9}", item) else -1
        exact = [names.index(item)] if item in names else []
        other = [*range(len(names))] if item == "all" else [index] if index in range(len(names)) else []
        loose = [lower.index(item.lower())] if item.lower() in lower else []
        if exact and other and exact != other:
            instead = "every class" if item == "all" else f"index {index}, {names[index]}"
            remarks.append(f"--class {item} is taken for the class of that name (index {exact[0]}), not for {instead}")
        if not (exact or other or loose):
            if re.fullmatch("-?[0-9]+", item):
                raise UserError(f"--class {item} is out of range: this model knows 0 to {len(names) - 1}")
            near = difflib.get_close_matches(item.lower(), lower, n=3, cutoff=0.5)
            # "a photo of a cat" is nearest to "hot pot"; a misspelt name of several words is far nearer to its own.
            if len(text.split()) > 2 and not difflib.get_close_matches(item.lower(), lower, cutoff=0.75):
                remedy = f"draw it with a text model, as in --ckpt emoji-text --prompt {shlex.quote(text)}"
                raise UserError(f"--class {text!r} reads like a sentence, and this model knows classes: {remedy}")
            raise UserError(f"--class {item!r} is unknown; did you mean {', '.join(near or names[:10])}?")
        found += exact or other or loose
    return found, remarks


def pair(text, number):
    """ "A" -> (A, A) and "AxB" -> (A, B), each read by `number`. ValueError for anything else."""
    # Of few characters, none an "e": 1e999999999 would be computed to its last digit.
    if not re.fullmatch("[0-9./]{1,9}(x[0-9./]{1,9})?", text.lower()):
        raise ValueError
    values = [number(part) for part in text.lower().split("x")]
    return values[0], values[-1]


def find_size(config, resolution=None, upscale="1"):
    """(height, width) in pixels, and (rows, columns) of tokens or None where patches have the trained size.

    resolution: "N" or "HEIGHTxWIDTH", the pixels of patches as trained, which decide the number of tokens (default: as
    trained). upscale: a factor, or "HEIGHTxWIDTH" factors, by which each patch grows (section 4.5). Raises UserError,
    also for sizes of which nothing but noise can come.

    A text model keeps its tokens, as released: there the resolution, too, decides how many pixels a patch has.
    """
    P, grid = config.patch_size, config.token_grid(config.resolution, config.resolution)
    text = hasattr(config, "text_encoder")
    units = grid if text else (P, P)
    try:
        sides = pair(resolution or str(config.resolution), int)
        if not all(side > 0 and side % unit == 0 for side, unit in zip(sides, units)):
            raise ValueError
    except ValueError:
        multiples = f"both multiples of {units[0]}, the {'tokens of a side' if text else 'side of a patch'}"
        raise UserError(f"--resolution {resolution} is not N or HEIGHTxWIDTH in pixels, {multiples}")
    if text:
        sides = [side // count for side, count in zip(sides, grid)]  # pixels of a patch
    else:
        grid, sides = config.token_grid(*sides), (P, P)
    try:
        factors = pair(upscale, fractions.Fraction)  # exact, and reads 5/4 too
        patch = [side * factor for side, factor in zip(sides, factors)]
        if not all(side > 0 and side % 1 == 0 for side in patch):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        kinds = f"a factor such as 1.5, nor HEIGHTxWIDTH factors such as 2x1.5, in multiples of 1/{P}"
        raise UserError(f"--upscale {upscale} is not {kinds}: patches of {P} pixels must become whole pixels")
    _refuse_noise(config, grid, patch)
    if patch == [P, P]:
        return (grid[0] * P, grid[1] * P), None
    if config.decoder == "linear":
        raise UserError(f"--upscale {upscale} needs a neural field; this model's linear decoder has one patch size")
    return (int(grid[0] * patch[0]), int(grid[1] * patch[1])), grid


def waves(config):
    """How often the finest feature of the model's encoding changes its sign across a patch: its half-waves."""
    features = ENCODINGS[config.encoding](1, 4096, config.num_freqs)  # (4096, E), along one row
    return int((features[:-1] * features[1:] < 0).sum(0).max())


def smallest_patch(config):
    """The least pixels along a patch that are drawn as more than noise.

    As many as the finest wave has halves; but with the cosines of the text model, most of which are slow, a few
    that are aliased do no harm: the one in assets/ draws its apple with 2 pixels a patch in the place of 8.
    """
    return 1 if config.encoding == "cosine" else min(config.patch_size, waves(config))


def _refuse_noise(config, grid, patch):
    """UserError for twice the trained tokens and more, and for patches too small for the waves of their encoding."""
    P, trained = config.patch_size, config.resolution // config.patch_size
    if max(grid) > 2 * trained:
        most = f"{2 * trained}x{2 * trained} tokens ({2 * config.resolution} pixels)"
        remedy = f"{most} are the most, and --upscale gives more pixels"
        tokens = f"{grid[0]}x{grid[1]} tokens, and the model was trained with {trained}x{trained}"
        raise UserError(f"--resolution asks for {tokens}, so nothing but noise would come out: {remedy}")
    if config.decoder == "field" and min(patch) < (least := smallest_patch(config)):
        pixels = f"{int(min(patch))} pixels across, fewer than the {waves(config)} half-waves of its encoding"
        remedy = f"use --upscale {least}/{P} or more, or draw at --upscale 1 and shrink the picture"
        raise UserError(f"--upscale leaves a patch {pixels}, so nothing but noise would come out: {remedy}")


def far_from_training(config, size, grid):
    """Remarks, a line each, on a size far from what was trained: what will be seen, and what would help.

    size, grid: as find_size returns them.
    """
    P, trained, remarks = config.patch_size, config.resolution // config.patch_size, []
    rows, columns = config.token_grid(*size, grid)
    tokens = f"{rows}x{columns} tokens where the model was trained with {trained}x{trained}"
    if max(rows, columns) > 1.25 * trained:
        remarks.append(f"{tokens}: expect things twice or torn apart; --upscale gives more pixels with less harm")
    elif min(rows, columns) < 0.75 * trained:
        remarks.append(f"{tokens}: expect fragments; draw at the trained size and shrink or cut the picture")
    height, width = size[0] // rows, size[1] // columns
    pixels = f"{height}x{width} pixels a patch where the model was trained with {P}x{P}"
    if max(height, width) > 2 * P:
        remarks.append(f"{pixels}: expect softness and visible borders; draw at --upscale 2 and enlarge that")
    elif min(height, width) < P:
        remarks.append(f"{pixels}: expect specks; draw at --upscale 1 and shrink the picture")
    return remarks
