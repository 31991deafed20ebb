"""One picture file -> an RGB picture, or a line that says what is wrong with it; never another picture in its place."""

import io
import pathlib
import struct
import warnings

import numpy as np
from PIL import Image

from runtime.files.errors import UserError

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image makes errors of them


def read_image(path, content=None):
    """A JPEG, PNG or WEBP file as an RGB picture; gray and palettes are converted, transparency is laid over white.

    content: the bytes of the file, if they are not to be read from `path`. Sixteen-bit gray is scaled, where Pillow
    would clip it. EXIF orientation is ignored, as ADM does. UserError, naming the path, for what is not whole.
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
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable JPEG, PNG or WEBP image ({reason}): repair or remove it")


def cut_long_sides(image):
    """The middle of a picture longer than 32 to 1, or the picture: scaled up whole, 1x5000 would take a gigabyte."""
    width, height = (min(side, 32 * min(image.size)) for side in image.size)
    if (width, height) == image.size:
        return image
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
