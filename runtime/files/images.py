"""One picture file -> an RGB picture, or a line that says what is wrong with it; never another picture in its place."""

import io
import pathlib
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from runtime.files.errors import UserError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image makes errors of them


# EXIF's orientation -> what turns the stored pixels upright; 1 means that they are.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(path, content=None, exif="ignore"):
    """A JPEG, PNG or WEBP file as an RGB picture; gray and palettes are converted, transparency is laid over white.

    content: the bytes of the file, if they are not to be read from `path`. Sixteen-bit gray is scaled, where Pillow
    would clip it; of 16-bit colours Pillow keeps the upper bytes, and the transparent one is known by these alone.
    exif: "respect" turns the picture as its EXIF orientation says, "ignore" leaves it as it is stored, as ADM does; an
    orientation that cannot be read counts as none. UserError, naming the path, for what is not whole.
    """
    try:
        content = pathlib.Path(path).read_bytes() if content is None else content
        if not content:
            raise ValueError("empty file")
        image = Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"])
        # Pillow refuses headers that claim over 179 million pixels and warns above 89; here both are errors.
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.format == "PNG" and "transparency" in image.info:
            image.info["transparency"] = _in_8_bits(image.info["transparency"], image.mode, content[24])
        turn = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation)) if exif == "respect" else None
        image = image if turn is None else image.transpose(turn)
        if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion would make everything above 255 white
            gray = np.asarray(image).astype(np.uint32)
            clear = gray == image.info.get("transparency", -1)  # the one gray that a PNG may declare transparent
            image = Image.fromarray(np.where(clear, 255, gray // 257).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB picture too
    except Image.DecompressionBombError:
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise UserError(f"{path} claims to be larger than {limit:.0f} million pixels: remove it")
    except UnidentifiedImageError:  # Pillow's own words show an address in memory
        raise UserError(f"{path} is not a readable JPEG, PNG or WEBP image (another kind of file): remove it")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable JPEG, PNG or WEBP image ({reason}): repair or remove it")


def _in_8_bits(clear, mode, depth):
    """The gray or colour that a PNG of `depth` bits declares transparent, as Pillow has its pixels in memory."""
    if mode == "RGB" and depth == 16:
        return tuple(value >> 8 for value in clear)
    if mode == "L" and depth in (2, 4):
        most = 2**depth - 1
        return (clear & most) * 255 // most
    return clear


def cut_long_sides(image):
    """The middle of a picture longer than 32 to 1, or the picture: scaled up whole, 1x5000 would take a gigabyte."""
    width, height = (min(side, 32 * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def released_crop(pil_image, size):
    """`--crop released`: scaled by one bilinear filter, as the released text-to-image model's pictures were."""
    (w, h), short = pil_image.size, min(pil_image.size)
    w, h = int(size * w / short), int(size * h / short)
    left, top = round((w - size) / 2), round((h - size) / 2)  # half to even
    return pil_image.resize((w, h), Image.BILINEAR).crop((left, top, left + size, top + size))
