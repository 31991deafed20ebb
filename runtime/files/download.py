"""Fetch a file of weights once, whole or not at all.

    path = cached_download("https://example.org/weights.pth", flag="--dino")

The file lands in torch.hub's folder, so weights that other programs fetched are found too, and the TORCH_HOME
variable moves them all. torch.hub's own downloader does the plain case; this one adds what 6 GB on a poor
line need: a cut download resumes where it stopped, the length is checked, several processes may ask at once.

Bytes go to NAME.part, and NAME.etag says which version of the remote file they belong to; only a complete and checked
NAME.part is renamed, so a file called NAME is always whole. A power cut may leave holes in NAME.part, from which the
next call resumes; but every file that is fetched here has a checksum of its own, of zip, gzip or SHA-256.

Left out: parallel connections, passwords. Proxies and certificates: urllib reads the
variables https_proxy, no_proxy and SSL_CERT_FILE.
"""

import hashlib
import http.client
import os
import pathlib
import time
import urllib.error
import urllib.parse
import urllib.request

import torch
from tqdm import tqdm

from runtime.files.errors import UserError
from runtime.files.locks import lock_or_wait

BLOCK = 1 << 16  # bytes per read; a drop loses the block it interrupts, so not too large
TIMEOUT = 30  # seconds without a byte after which a connection counts as dropped
RETRY_WAITS = (1, 3, 10, 30)  # seconds before each further try
MOST = 100 * 10**9  # bytes; no file of weights is nearly as large, and a server may send without end
# What a bad line raises. A full disk raises a plain OSError, which is not among these: it is not tried again.
DROPPED = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


def cached_download(url, flag=None, sha256_prefix=None, folder=None):
    """The path of the local copy of `url`, downloaded first if there is none; else no network is used. UserError.

    flag: the command line flag that takes a path instead ("--dino"), for the error message. sha256_prefix: the first
    hexadecimal digits (any number) of the file's SHA-256. folder: by default torch.hub's "checkpoints" folder.
    """
    folder = pathlib.Path(folder or os.path.join(torch.hub.get_dir(), "checkpoints"))
    # Unquoted, .../epoch%3D319.ckpt is kept as epoch=319.ckpt; its last part alone cannot lead out of the folder.
    name = os.path.basename(urllib.parse.unquote(urllib.parse.urlsplit(url).path))
    target, part = folder / name, folder / f"{name}.part"
    if target.exists():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # All ranks of a torchrun ask at the same moment: one gets the lock and downloads, the others sleep and then
        # find the file. The kernel frees the lock of a killed process. The lock file stays: if it were removed, one
        # process could lock a fresh one while another still waits for the old one.
        with open(folder / f"{name}.lock", "w") as lock:
            lock_or_wait(lock)
            if not target.exists():
                _fetch(url, part)
                if sha256_prefix:
                    _check_sha256(part, sha256_prefix.lower())
                os.replace(part, target)  # atomic: the others see no file or all of it
                part.with_suffix(".etag").unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        remedy = f"fetch it elsewhere and put it at {target}" + (f", or pass its path with {flag}" if flag else "")
        raise UserError(f"could not download {url} ({' '.join(str(error).split())}): {remedy}") from error
    return target


def _check_sha256(part, prefix):
    with open(part, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(prefix):
        part.unlink()  # a download that resumed from wrong bytes would fail for ever
        raise OSError(f"its SHA-256 starts with {digest[: len(prefix)]}, expected {prefix}")


def _fetch(url, part):
    """Completes the file `part`; after a dropped connection tries again, from where it stopped."""
    for attempt, wait in enumerate((*RETRY_WAITS, None)):
        try:
            return _transfer(url, part)
        except DROPPED as error:
            code = getattr(error, "code", 500)
            offline = attempt == 0 and type(error) is urllib.error.URLError  # never connected: say so at once
            if code == 416 and wait is not None and part.exists():
                part.unlink()  # nothing after our last byte: it is too long, or we were killed before the rename
            elif code < 500 or offline or wait is None:  # 404, 403: a clear no
                raise
        time.sleep(wait or 0)


def _transfer(url, part):
    """One connection: asks for what `part` still lacks, appends it, checks the length (RFC 9110, section 14)."""
    tag_file = part.with_suffix(".etag")
    tag = tag_file.read_text() if tag_file.exists() else ""
    offset = part.stat().st_size if tag and part.exists() else 0
    # If-Range means: the rest if the file is still version `tag`, else all of it. Without it, a file that was
    # replaced on the server would be spliced onto the beginning of the old one.
    headers = {"Range": f"bytes={offset}-", "If-Range": tag} if offset else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as reply:
        new_tag, length = reply.headers.get("ETag", ""), reply.length  # None: not said, or no number
        if reply.status != 206:  # the whole file, whatever was asked for
            offset = 0
        elif new_tag != tag or not reply.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
            part.unlink()
            raise ConnectionError("the server sent another part than it was asked for")
        total = None if length is None else offset + length
        bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=part.stem)
        with open(part, "ab" if offset else "wb") as file, bar:
            if not offset:
                # Written once `part` is empty, so a tag never describes the bytes of another version. A weak tag
                # (W/...) may cover files that differ in bytes, so it does not count.
                tag_file.write_text("" if new_tag.startswith("W/") else new_tag)
            while block := reply.read(BLOCK):
                file.write(block)
                bar.update(len(block))
                if file.tell() > MOST:
                    part.unlink()
                    raise OSError(f"it does not end after {MOST / 1e9:g} GB")
            file.flush()
            os.fsync(file.fileno())  # on the disk before it gets its final name, or a power cut leaves holes
    size = part.stat().st_size
    if total is not None and size != total:  # urllib ends quietly when the connection closes early
        raise ConnectionError(f"the connection closed after {size:,} of {total:,} bytes")
