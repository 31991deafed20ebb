"""Cropped pictures kept in one file, so that a long run decodes each of them once (`--cache-crops FOLDER`).

Of the time for a training sample, decoding the JPEG and ADM's crop take seven tenths, and their result is the same in
every epoch. So the first epoch writes each crop to its place in a file, and the later ones read it. Without
--augment that changes no number: a crop that was read is the crop that would have been made. 196,612 bytes a picture
at 256 pixels, 252 GB for ImageNet: meant for a fast local disk, one file for all processes of a machine and all runs.

Nothing is locked and nothing is synchronised. Each record starts with a checksum of its pixels, its number, and the
size and time of change of the picture's file; a record that is missing, half-written, damaged or out of date fails it,
and the picture is decoded again.
Left out: sharing between machines, compression.
"""

import hashlib
import os
import shutil
import zlib

import numpy as np
import PIL
import torch

from picture_index import DataError

HEADER = 4  # bytes: CRC-32


class CropCache:
    """Crops of `count` pictures at `resolution`. `name`: a text that tells this data set from others.

    The file is made at its full length, but a disk gives it room only as crops arrive. Raises DataError if the folder
    cannot be used, or has too little room for the crops that are still to come.
    """

    def __init__(self, folder, name, count, resolution):
        # Another Pillow may round otherwise; then the crops are made anew.
        key = hashlib.sha256(f"{name} {count} {resolution} {PIL.__version__}".encode()).hexdigest()[:16]
        self.path, self.side = os.path.join(folder, f"crops-{resolution}-{key}"), resolution
        self.record = HEADER + 3 * resolution**2
        needed = count * self.record
        try:
            os.makedirs(folder, exist_ok=True)
            with open(self.path, "ab") as file:
                file.truncate(needed)  # grows by a hole, which reads as zeros; a file that is there has this length
                free = shutil.disk_usage(folder).free + 512 * os.fstat(file.fileno()).st_blocks
        except OSError as error:
            raise DataError(f"--cache-crops {folder} cannot be used ({error.strerror}): choose another folder")
        if free < needed:
            raise DataError(f"--cache-crops {folder} needs {needed / 1e9:.1f} GB for {count} crops and has room for "
                            f"{free / 1e9:.1f}: choose another folder, or leave it out")  # fmt: skip

    def _checksum(self, pixels, i, stamp):
        return zlib.crc32(repr((i, stamp)).encode(), zlib.crc32(pixels)).to_bytes(HEADER, "little")

    def get(self, i, stamp):
        """The crop of picture i, uint8 (3, resolution, resolution); None unless there, sound, and of this stamp."""
        content = bytearray(self.record)
        with open(self.path, "rb", buffering=0) as file:  # for each crop: so workers share no position in it
            file.seek(i * self.record)
            file.readinto(content)
        pixels = memoryview(content)[HEADER:]
        if content[:HEADER] != self._checksum(pixels, i, stamp):
            return None
        return torch.frombuffer(pixels, dtype=torch.uint8).view(3, self.side, self.side)  # (3, H, W)

    def put(self, i, stamp, image):
        """Keeps the crop of picture i, uint8 (3, resolution, resolution). DataError when the disk is full."""
        pixels = np.ascontiguousarray(image).tobytes()
        try:
            with open(self.path, "r+b") as file:
                file.seek(i * self.record)
                file.write(self._checksum(pixels, i, stamp) + pixels)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written ({error.strerror}): make room, or leave out --cache-crops")
