"""Fetch a file of weights once, whole or not at all.

    path = cached_download("https://example.org/weights.pth", flag="--dino")

The file lands in torch.hub's folder, so weights that other programs fetched are found too, and the TORCH_HOME
variable moves them all. torch.hub's own downloader does the plain case; this one adds what 6 GB on a poor
line need: a cut download resumes where it stopped, the length is checked, several processes may ask at once.

The life of a file: bytes go to NAME.part, and NAME.etag says which version of the remote file they belong to;
only a complete and checked NAME.part is renamed to NAME. So a file called NAME is always whole.

Left out: parallel connections, passwords, Windows (it has no fcntl). Proxies and certificates are urllib's
business: the variables https_proxy, no_proxy and SSL_CERT_FILE work.
"""

import fcntl
import hashlib
import http.client
import os
import pathlib
import re
import time
import urllib.error
import urllib.parse
import urllib.request

import torch
from tqdm import tqdm

from runtime.files.errors import UserError

BLOCK = 1 << 16  # bytes per read; a drop loses the block it interrupts, so not too large
TIMEOUT = 30  # seconds without a byte after which a connection counts as dropped
RETRY_WAITS = (1, 3, 10, 30)  # seconds before each further try
# What a bad line raises. A full disk raises a plain OSError, which is not among these: it is not tried again.
DROPPED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def cached_download(url, filename=None, flag=None, sha256_prefix=None, folder=None):
    """Return the local copy of `url`, downloading it first if there is none.

    url: str. A quoted last part becomes a plain name: .../epoch%3D319.ckpt is kept as epoch=319.ckpt.
    filename: str, the name to keep it under, where the one in the address will not do.
    flag: str, the command line flag that takes a path instead ("--dino"), for the error message.
    sha256_prefix: str, the first hexadecimal digits (any number) of the file's SHA-256.
    folder: where to keep it; by default torch.hub's "checkpoints" folder.
    Returns a pathlib.Path; a file that is already there is returned unread, without using the network.
    Raises UserError.
    """
    folder = pathlib.Path(folder or os.path.join(torch.hub.get_dir(), "checkpoints"))
    # The last part is taken after unquoting, so that a quoted slash (%2F) cannot lead out of the folder.
    name = filename or os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    target, part = folder / name, folder / f"{name}.part"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All ranks of a torchrun ask at the same moment: one gets the lock and downloads, the others sleep
        # and then find the file. The kernel frees the lock of a killed process. The lock file stays: if it were
        # removed, one process could lock a fresh one while another still waits for the old one.
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _fetch(url, part)
                if sha256_prefix:
                    _check_sha256(part, sha256_prefix)
                os.replace(part, target)  # atomic: the others see no file or all of it
                part.with_suffix(".etag").unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        remedy = f"fetch it elsewhere and put it at {target}"
        remedy += f", or pass its path with {flag}" if flag else ""
        raise UserError(f"could not download {url} ({error}): {remedy}") from error
    return target


def _check_sha256(part, prefix):
    digest = hashlib.sha256()
    with open(part, "rb") as file:
        while block := file.read(BLOCK):  # piece by piece: the file may be larger than the memory
            digest.update(block)
    if not digest.hexdigest().startswith(prefix.lower()):
        part.unlink()  # a download that resumed from wrong bytes would fail for ever
        raise OSError(f"its SHA-256 starts with {digest.hexdigest()[: len(prefix)]}, expected {prefix}")


def _fetch(url, part):
    """Complete the file `part`; after a dropped connection try again, from where it stopped."""
    for attempt, wait in enumerate((*RETRY_WAITS, None)):
        try:
            return _transfer(url, part)
        except DROPPED as error:
            refused = isinstance(error, urllib.error.HTTPError) and error.code < 500  # 404, 403: a clear no
            offline = attempt == 0 and type(error) is urllib.error.URLError  # never connected: say so at once
            if refused or offline or wait is None:
                raise
        time.sleep(wait)


def _transfer(url, part):
    """One connection: ask for what `part` still lacks, append it, check the length (RFC 9110, section 14)."""
    tag_file = part.with_suffix(".etag")
    tag = tag_file.read_text() if tag_file.exists() else ""
    offset = part.stat().st_size if tag and part.exists() else 0
    # If-Range means: the rest if the file is still version `tag`, else all of it. Without it, a file that was
    # replaced on the server would be spliced onto the beginning of the old one.
    headers = {"Range": f"bytes={offset}-", "If-Range": tag} if offset else {}
    try:
        reply = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not offset:
            raise
        # 416, there is nothing after our last byte. Either we have it all (killed just before the rename) ...
        if error.headers.get("Content-Range") == f"bytes */{offset}":
            return
        part.unlink()  # ... or more than all, which is wrong: start again
        return _transfer(url, part)
    with reply:
        new_tag = reply.headers.get("ETag", "")
        length = reply.headers.get("Content-Length")  # of this reply; not every server says it
        total = int(length) if length else None
        if offset and reply.status == 206:  # the rest
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", reply.headers.get("Content-Range", ""))
            if not span or int(span[1]) != offset or new_tag != tag:  # not what we asked for
                part.unlink()
                return _transfer(url, part)
            total = int(span[2])
        else:  # 200: the whole file, whatever we asked for
            offset = 0
        with (
            open(part, "ab" if offset else "wb") as file,
            tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem) as bar,
        ):
            if not offset:
                # Written once `part` is empty, so a tag never describes the bytes of another version. A weak
                # tag (W/...) may cover files that differ in bytes, so it does not count.
                tag_file.write_text("" if new_tag.startswith("W/") else new_tag)
            while block := reply.read(BLOCK):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its final name, or a power cut leaves holes
    size = part.stat().st_size
    if total is not None and size != total:  # urllib ends quietly when the connection closes early
        raise ConnectionError(f"the connection closed after {size:,} of {total:,} bytes")
