"""Which pictures a folder or a tar file holds, and where the bytes of each one are: found once, then kept in a file.

    index = index_pictures("IMAGENET/train")                   # a folder with one folder of pictures per class
    index = index_pictures("ILSVRC2012_img_train.tar")         # ImageNet as it is published: a tar of 1,000 tars
    index.classes, index.labels[7], index.where(7), index.read(7)

A tar is never unpacked: the index remembers the place of every picture in it, and `read` takes it from there. It
is understood as if it had been unpacked (a tar inside it into a folder of its own name) and --data had named the
lowest folder that holds all class folders. So train/n01440764/x.JPEG and n01440764/x.JPEG are both the picture x.JPEG
of class n01440764, and a run may move from the folder to the tar: even the fingerprint is the same.

Listing a million files over a network takes minutes, and reading a million tar headers too. So the index is kept in
the folder of the run and believed while the tar has the same size and time of change, or every folder the same time
of change: adding, removing or renaming a file changes that of its folder. Left out: compressed tars, which cannot be
read from the middle; zip files.
"""

import array
import hashlib
import io
import json
import os
import posixpath
import tarfile
import time

import numpy as np

from runtime.files.errors import UserError
from runtime.files.saving import whole_file

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # first bytes
SPLITS = {"train", "val", "test"}
CACHE_FILE, CACHE_FORMAT = "pictures.index", 1
# A file system's clock ticks every 1 to 10 ms; some count whole seconds, or even pairs of them.
TICK_NS, COARSE_TICK_NS = 20_000_000, 2_000_000_000


class PictureIndex:
    """The pictures of a folder or tar, by class and within a class by path.

    .classes (names), .labels (a class index per picture) and .fingerprint (a text that changes when pictures are
    added, removed or renamed). The names are one run of bytes and the places an array, not millions of Python
    objects: those take over 200 MB for ImageNet, and again in each loader worker, since counting references writes to
    memory that a fork shares.
    """

    remark = None  # what a user should hear of it; captions have one

    def __init__(self, source, stamps, classes, counts, prefix, names, places):
        # `names` are "class/path" without `prefix`; `places` are (offset, size) in a tar, or empty for a folder.
        self.source, self.stamps, self.classes, self.counts, self.prefix = source, stamps, classes, counts, prefix
        self.names, self.places = names, places
        self.ends = np.append(np.flatnonzero(np.frombuffer(names, np.uint8) == 0), len(names))  # \0 between names
        self.labels = []
        for label, count in enumerate(counts):
            self.labels += [label] * count
        self.fingerprint = hashlib.sha256(names.replace(b"\0", b"\n")).hexdigest()

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """Class and path of picture i, as in "cat/7.png". IndexError beyond the last."""
        i = range(len(self))[i]
        return self.names[self.ends[i - 1] + 1 if i else 0 : self.ends[i]].decode("utf-8", "surrogateescape")

    def where(self, i):
        """The path of picture i, for people too: folder/class/x.png, or "archive.tar: class/x.png"."""
        if len(self.places):
            return f"{self.source}: {self.prefix}{self.name(i)}"
        return os.path.join(self.source, self.name(i))

    def read(self, i):
        """The bytes of picture i of a tar; None for a folder, where `where(i)` is a path that anybody can open.

        Raises UserError when the tar is not the one that was indexed.
        """
        if not len(self.places):
            return None
        offset, size = self.places[i].tolist()
        # Opened for each picture, which costs microseconds: so there is no file that forked workers could share.
        try:
            with open(self.source, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, offset)
                unchanged = _stamp(os.fstat(file.fileno())) == self.stamps[""]
        except OSError as error:
            raise UserError(f"{self.where(i)} cannot be read ({error.strerror}): is the tar still there?")
        if not unchanged or len(content) != size:
            raise UserError(f"{self.where(i)}: the tar was changed while it was in use: start again")
        return content


def index_pictures(source, cache=None, write=True):
    """The PictureIndex of a folder of class folders, or of a tar. Raises UserError.

    cache: a folder that keeps the index, or None. What is there is used if `source` has not changed since; otherwise
    it is made again in silence, and with `write` kept there (the folder is created; a full disk is no error).
    """
    source = os.fspath(source)
    if not os.path.isdir(source) and not os.path.isfile(source):
        raise UserError(
            f"there is no data folder or tar file {source}: give --data emoji, a folder of class folders,"
            " or an uncompressed tar of one"
        )
    index = _read_cache(cache, source) if cache else None
    if index is None:
        try:
            index = _index_folder(source) if os.path.isdir(source) else _index_tar(source)
        except OSError as error:
            raise UserError(f"{error.filename or source} cannot be read: {error.strerror}")
        if cache and write:
            _write_cache(cache, index)
    return index


def _make_index(source, stamps, names, places=(), prefix=""):
    """`names` ("class/path", sorted by class and then by path) -> PictureIndex."""
    classes, counts = [], []
    for name in names:
        top = name[: name.index("/")]
        if not classes or top != classes[-1]:
            classes.append(top)
            counts.append(0)
        counts[-1] += 1
    if SPLITS.issuperset(classes):
        raise UserError(
            f"{source} holds {', '.join(classes)} in the place of classes: give its train folder, "
            "or a tar of that alone"
        )
    blob = "\0".join(names).encode("utf-8", "surrogateescape")
    return PictureIndex(source, stamps, classes, counts, prefix, blob, np.array(places, np.int64).reshape(-1, 2))


# ---- folders ---------------------------------------------------------------------------------------------------------


def _stamp(status):
    return [status.st_mtime_ns, status.st_size]


def _settled_stamp(path):
    """The stamp of a file or folder that is about to be read, such that any later change gives it another one."""
    stamp = _stamp(os.stat(path))
    tick = TICK_NS if stamp[0] % 1_000_000_000 else COARSE_TICK_NS
    # Changed just now: one more change within the same tick of the clock would leave the time as it is.
    if abs(time.time_ns() - stamp[0]) < tick:
        time.sleep(tick / 1e9)
    return stamp


def pictures_below(root, inside="", stamps=None):
    """Names of the JPEG, PNG and WEBP files in root/inside and the folders below, relative to root, not sorted.

    Folders whose names start with a dot are left out. Notes in `stamps` when each folder was last changed.
    """
    names, folders = [], [inside]
    while folders:
        inside = folders.pop()
        path = os.path.join(root, inside)
        if stamps is not None:
            stamps[inside] = _settled_stamp(path)
        inside += "/" if inside else ""
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
                    names.append(inside + entry.name)
                elif entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
                    folders.append(inside + entry.name)
    return names


def _index_folder(root):
    stamps, names = {"": _settled_stamp(root)}, []
    with os.scandir(root) as entries:
        classes = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise UserError(f"{root} has no class folders: it must hold one folder of images per class")
    for name in classes:
        found = pictures_below(root, name, stamps)
        if not found:
            raise UserError(f"{os.path.join(root, name)} holds no JPEG, PNG or WEBP images")
        names += sorted(found)
    return _make_index(root, stamps, names)


# ---- tar files -------------------------------------------------------------------------------------------------------


def tar_members(tar, path):
    """The files and folders of an open tarfile.TarFile, one by one. `path` names it in messages.

    Raises UserError for a damaged archive, for names that lead out of it, and for anything but files and folders.
    """
    try:
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps all that it has seen, over a gigabyte for a million pictures
            if member.name.startswith("/") or ".." in member.name.split("/"):
                raise UserError(
                    f"{path}: the member {member.name} leads out of the archive: make it again from "
                    "names inside one folder"
                )
            if member.issparse() or not (member.isreg() or member.isdir()):
                raise UserError(
                    f"{path}: the member {member.name} is a link, a sparse file or a device: make it "
                    "again from plain files (tar --dereference --hard-dereference)"
                )
            if member.size < 0 or "\0" in member.name:
                raise tarfile.ReadError("a negative size, or a zero byte in a name")
            yield member
    except UserError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, EOFError) as error:  # of a header that makes no sense
        raise UserError(f"{path} is a damaged archive, or only part of one ({error}): remove it and get it again")


def _scan_tar(file, path, inside, start, found):
    """Adds the pictures of the tar in `file` to `found`: (names, offsets, sizes, folders).

    path: its name in messages. inside: "folder/" for a tar within a tar. start: where it starts in the outermost one.
    """
    names, offsets, sizes, folders = found
    head = file.read(tarfile.BLOCKSIZE)
    file.seek(0)
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(f"{path} is compressed with {kind}: uncompress it, so that single pictures can be read")
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
    except (tarfile.TarError, ValueError, ArithmeticError) as error:
        raise UserError(f"{path} is not a tar file ({error}): --data takes a folder of class folders or a tar of one")
    for member in tar_members(tar, path):
        name = inside + posixpath.normpath(member.name)
        if member.isdir():
            folders.add(name)
        elif name.lower().endswith(SUFFIXES):
            if not any(part.startswith(".") for part in name.split("/")[:-1]):  # hidden, as in folders
                names.append(name)
                offsets.append(start + member.offset_data)
                sizes.append(member.size)
        elif name.lower().endswith(".tar"):
            folders.add(name[:-4])
            _scan_tar(
                tar.extractfile(member), f"{path}: {member.name}", f"{name[:-4]}/", start + member.offset_data, found
            )
    # tarfile takes a header that makes no sense, or the end of the file, for the end of the archive. The true end has
    # a block of zeros.
    file.seek(tar.offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(
            f"{path} is a damaged archive, or only part of one (no end mark, but something else at byte "
            f"{tar.offset:,}): remove it and get it again"
        )


def _index_tar(path):
    stamps = {"": _settled_stamp(path)}
    found = names, offsets, sizes, folders = [], array.array("q"), array.array("q"), set()
    with open(path, "rb") as file:
        _scan_tar(file, path, "", 0, found)
    if not names:
        raise UserError(f"{path} holds no JPEG, PNG or WEBP images")
    holders = {posixpath.dirname(name) for name in names}
    root = posixpath.commonpath(holders)
    if root in holders:  # there are pictures in the lowest common folder, so that must be the only class
        if root == "" or len(holders) > 1:
            loose = min(name for name in names if posixpath.dirname(name) == root)
            raise UserError(
                f"{path}: the picture {loose} lies beside folders of pictures, or in none: make the tar "
                "again with one folder per class"
            )
        root = posixpath.dirname(root)
    prefix = f"{root}/" if root else ""
    names = [name[len(prefix) :] for name in names]
    order = sorted(range(len(names)), key=lambda i: names[i].replace("/", "\0", 1))  # by class, then by path
    names = [names[i] for i in order]
    for name, following in zip(names, names[1:]):
        if name == following:
            raise UserError(f"{path} holds {prefix}{name} twice: make the tar again")
    index = _make_index(path, stamps, names, np.array([offsets, sizes]).T[order], prefix)
    for folder in sorted(folders):
        top = folder[len(prefix) :].split("/")[0]
        if folder.startswith(prefix) and top[0] != "." and top not in index.classes:
            raise UserError(f"{path}: {prefix}{top} holds no JPEG, PNG or WEBP images")
    return index


# ---- the cache: a SHA-256, then an npz -------------------------------------------------------------------------------


def _read_cache(folder, source):
    """The index of `source` that is kept in `folder`, or None if it is missing, damaged, or no longer true."""
    try:
        with open(os.path.join(folder, CACHE_FILE), "rb") as file:
            digest, content = file.read(32), file.read()
        if hashlib.sha256(content).digest() != digest:
            return None
        with np.load(io.BytesIO(content)) as tables:
            header, names, places = (tables[key] for key in ("header", "names", "places"))
        header = json.loads(header.tobytes())
        if header.pop("format") != CACHE_FORMAT or header.pop("path") != os.path.abspath(source):
            return None
        for inside, stamp in header["stamps"].items():
            if _stamp(os.stat(os.path.join(source, inside) if inside else source)) != stamp:
                return None
    except OSError:
        return None
    return PictureIndex(source, names=names.tobytes(), places=places, **header)


def _write_cache(folder, index):
    """Keeps the index in `folder`, whole or not at all. It is only a cache: where that fails, nothing is kept."""
    header = {
        "format": CACHE_FORMAT,
        "path": os.path.abspath(index.source),
        "stamps": index.stamps,
        "classes": index.classes,
        "counts": index.counts,
        "prefix": index.prefix,
    }
    content = io.BytesIO()
    np.savez(
        content,
        header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        names=np.frombuffer(index.names, np.uint8),
        places=index.places,
    )
    try:
        with whole_file(os.path.join(folder, CACHE_FILE)) as temporary, open(temporary, "wb") as file:
            file.write(hashlib.sha256(content.getbuffer()).digest())
            file.write(content.getbuffer())
    except OSError:
        pass
