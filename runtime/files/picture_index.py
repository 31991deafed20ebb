"""Which pictures a folder or a tar file holds, and where the bytes of each one are: found once, then kept in a file.

    index = index_pictures("IMAGENET/train")                   # a folder with one folder of pictures per class
    index = index_pictures("ILSVRC2012_img_train.tar")         # ImageNet as it is published: a tar of 1,000 tars
    index.classes, index.labels[7], index.where(7), index.read(7)

A tar is never unpacked: the index remembers the place of every picture in it. It is understood as if it had been
unpacked (a tar inside it into a folder of its own name) and --data had named the lowest folder that holds all class
folders. So train/n01440764/x.JPEG and n01440764/x.JPEG are both the picture x.JPEG of class n01440764, and a run may
move from the folder to the tar: even the fingerprint is the same. A folder of pictures without folders, or a tar of
such files, is one class, "pictures". Files that are no JPEG, PNG or WEBP are left out, and counted in .remark.

Listing a million files over a network takes minutes, and reading a million tar headers too. So the index is kept in
the folder of the run and believed while the tar has the same size and time of change, or every folder the same time
of change: adding, removing or renaming a file changes that of its folder. Left out: compressed tars, which cannot be
read from the middle; zip files.
"""

import collections
import contextlib
import hashlib
import itertools
import os
import posixpath
import tarfile
import time

import torch

from runtime.files.errors import UserError
from runtime.files.saving import whole_file
from runtime.files.weights import load_tensors

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
SPLITS = {"train", "val", "test"}
CACHE_FILE, CACHE_FORMAT = "pictures.index", 3
FLAT = "pictures"  # the one class of a folder without folders: its own name would change when somebody moves it
BESIDE = "beside the class folders"  # a reason to skip a picture, where all others are the ending of a file's name
TICK = 2 * 10**9  # nanoseconds between two times that the coarsest file systems tell apart


class PictureIndex:
    """The pictures of a folder or tar, by class and within a class by path.

    .classes (names), .counts (pictures of each), .labels (a class index per picture), .fingerprint (a text that changes
    when pictures are added, removed or renamed) and .remark (what was left out or taken for one class, or None). Names
    and places are two tensors, not millions of Python objects: those take over 200 MB for ImageNet, and again in each
    loader worker, since counting references writes to memory that a fork shares.
    """

    def __init__(self, source, classes, counts, prefix, names, places, stamps, flat=False, skipped=()):
        # names: uint8, "class/path" without `prefix`, \0 between; places (N, 2): offset and size in a tar, or empty;
        # flat: the class is no folder; skipped: {ending of their names: number} of other files.
        self.source, self.classes, self.counts, self.prefix = source, classes, counts, prefix
        self.names, self.places, self.stamps, self.flat, self.skipped = names, places, stamps, flat, dict(skipped)
        self.ends = torch.cat([(names == 0).nonzero().flatten(), torch.tensor([len(names)])])  # (N)
        self.labels = []
        for label, count in enumerate(counts):
            self.labels += [label] * count
        self.fingerprint = hashlib.sha256(names.numpy().tobytes().replace(b"\0", b"\n")).hexdigest()
        self.remark = _remark(source, len(self.labels), flat, self.skipped)

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """Class and path of picture i, as in "cat/7.png". IndexError beyond the last."""
        i = range(len(self))[i]
        name = self.names[self.ends[i - 1] + 1 if i else 0 : self.ends[i]]
        return name.numpy().tobytes().decode("utf-8", "surrogateescape")

    def where(self, i):
        """The path of picture i, for people too: folder/class/x.png, or "archive.tar: class/x.png"."""
        separator = ": " if len(self.places) else "/"
        inside = self.name(i).removeprefix(f"{FLAT}/") if self.flat else self.name(i)
        return f"{self.source}{separator}{self.prefix}{inside}"

    def read(self, i):
        """The bytes of picture i of a tar; None for a folder, where `where(i)` is a path that anybody can open.

        Raises UserError when the tar is not the one that was indexed.
        """
        if not len(self.places):
            return None
        return read_member(self.source, *self.places[i].tolist(), self.stamps[""], self.where(i))


def read_member(tar, offset, size, stamp, where):
    """The bytes of one file inside a tar. where: its name in messages. UserError if the tar's stamp is another now."""
    # Opened for each picture, which costs microseconds: so there is no file that forked workers could share.
    try:
        with open(tar, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), size, offset)
            unchanged = stamp_of(file.fileno()) == stamp
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}): is the tar still there?")
    if not unchanged or len(content) != size:
        raise UserError(f"{where}: the tar was changed while it was in use: start again")
    return content


def index_pictures(source, cache=None, write=True):
    """The PictureIndex of a folder of class folders or of pictures, or of a tar. Raises UserError.

    cache: a folder that keeps the index, or None. What is there is used if `source` has not changed since; otherwise
    it is made again in silence, and with `write` kept there (the folder is created; a full disk is no error).
    """
    source, start = os.fspath(source), time.time_ns()
    if not os.path.exists(source):
        remedy = "give --data emoji, a folder of pictures or of class folders, or an uncompressed tar of one"
        raise UserError(f"there is no data folder or tar file {source}: {remedy}")
    index = _read_cache(cache, source) if cache else None
    if index is None:
        try:
            index = _index_folder(source) if os.path.isdir(source) else _index_tar(source)
        except OSError as error:
            raise UserError(f"{error.filename or source} cannot be read: {error.strerror}")
        # One more change of what changed just now could leave its time as it is, so such an index is not kept.
        if cache and write and max(changed for changed, _ in index.stamps.values()) < start - TICK:
            _write_cache(cache, index)
    return index


def stamp_of(file):
    """[time of the last change in nanoseconds, size in bytes]: another pair means another content. Raises OSError."""
    status = os.stat(file)
    return [status.st_mtime_ns, status.st_size]


def _remark(source, count, flat, skipped):
    """What a user should hear of an index: "300 pictures, one class (...), 3 skipped: .heic 2, .mov 1"; or None."""
    parts = [f"one class ({source} has no class folders)"] if flat else []
    if skipped:
        by_number = sorted(skipped.items(), key=lambda item: (-item[1], item[0]))
        kinds = ", ".join(f"{kind} {number}" for kind, number in by_number)
        parts.append(f"{sum(skipped.values())} skipped: {kinds}")
    return ", ".join([f"{count} pictures", *parts]) if parts else None


def _ending(name):
    """What a skipped file is counted by: ".heic", or "no ending"."""
    return posixpath.splitext(name)[1].lower() or "no ending"


def _make_index(source, folders, names, stamps, prefix="", places=(), flat=False, skipped=()):
    """`names` ("class/path", sorted by class and then by path) -> PictureIndex; each of `folders` must be a class."""
    counts = {top: len(list(group)) for top, group in itertools.groupby(names, lambda name: name.split("/", 1)[0])}
    for folder in sorted(folders):
        if folder not in counts:
            raise UserError(f"{source}: the folder {prefix}{folder} holds no JPEG, PNG or WEBP images")
    if SPLITS.issuperset(counts):
        found = f"{', '.join(counts)} in the place of classes"
        raise UserError(f"{source} holds {found}: give its train folder, or a tar of that alone")
    blob = torch.frombuffer(bytearray("\0".join(names), "utf-8", "surrogateescape"), dtype=torch.uint8)
    places = torch.tensor(places, dtype=torch.int64).view(-1, 2)
    return PictureIndex(source, list(counts), list(counts.values()), prefix, blob, places, stamps, flat, skipped)


# ---- folders ---------------------------------------------------------------------------------------------------------


def pictures_below(root, inside="", stamps=None, skipped=None):
    """Names of the JPEG, PNG and WEBP files in root/inside and the folders below, relative to root, not sorted.

    Folders and files whose names start with a dot are left out. Notes in `stamps` when each folder was last changed,
    and counts other files in `skipped` (a Counter) by the ending of their names.
    """

    def stop(error):  # os.walk would leave out what it cannot read
        raise error

    root, names = os.path.join(root, ""), []
    for path, folders, files in os.walk(root + inside, onerror=stop):
        if stamps is not None:
            stamps[path.removeprefix(root)] = stamp_of(path)
        folders[:] = [name for name in folders if name[0] != "."]
        inside = os.path.join(path, "").removeprefix(root)
        names += [inside + name for name in files if name.lower().endswith(SUFFIXES)]
        if skipped is not None:
            others = (name for name in files if not name.lower().endswith(SUFFIXES) and name[0] != ".")
            skipped.update(map(_ending, others))
    return names


def _index_folder(root):
    with os.scandir(root) as entries:
        shown = [(entry.name, entry.is_dir()) for entry in entries if entry.name[0] != "."]
    classes = sorted(name for name, is_folder in shown if is_folder)
    files = sorted(name for name, is_folder in shown if not is_folder)
    loose = [name for name in files if name.lower().endswith(SUFFIXES)]
    others = [name for name in files if not name.lower().endswith(SUFFIXES)]
    stamps, skipped = {"": stamp_of(root)}, collections.Counter(map(_ending, others))
    names = [name for top in classes for name in sorted(pictures_below(root, top, stamps, skipped))]
    if loose and not names:  # folders without a single picture, as of videos, are no classes
        names = [f"{FLAT}/{name}" for name in loose]
        return _make_index(root, [], names, stamps, flat=True, skipped=skipped)
    if not classes:
        remedy = "give a folder of one of the two"
        raise UserError(f"{root} has no class folders and no JPEG, PNG or WEBP pictures: {remedy}")
    if loose:
        skipped[BESIDE] = len(loose)
    return _make_index(root, classes, names, stamps, skipped=skipped)


# ---- tar files -------------------------------------------------------------------------------------------------------


def tar_members(file, path):
    """Yields (TarFile, member) of each file and folder of the tar in the open `file`; `path` names it in messages.

    Raises UserError for what is no whole, uncompressed tar, for names that lead out of it, and for anything but plain
    files and folders.
    """
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            tar.members.clear()  # tarfile keeps all that it has seen, over a gigabyte for a million pictures
            plain = member.isdir() or (member.isreg() and not member.issparse())
            if not plain or member.name.startswith("/") or ".." in member.name.split("/"):
                kind = "is a link, a sparse file or a device, or its name leads out of the archive"
                remedy = "make it again from plain files inside one folder (tar --dereference --hard-dereference)"
                raise UserError(f"{path}: the member {member.name} {kind}: {remedy}")
            if member.size < 0 or "\0" in member.name:
                raise tarfile.ReadError("a header that makes no sense")
            yield tar, member
        # tarfile takes a header that makes no sense, or the end of the file, for the end of the archive. The true end
        # has a block of zeros.
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end mark, but something else at byte {tar.offset:,}")
    except UserError:
        raise
    except (tarfile.TarError, ValueError, ArithmeticError, EOFError) as error:
        remedy = "uncompress it, or get it again"
        raise UserError(f"{path} is not an uncompressed tar file, or only part of one ({error}): {remedy}")


def _scan_tar(file, path, inside="", start=0):
    """Yields (name, offset, size) of each picture in the tar `file`, (name, 0, None) of each folder, (name, 0, -1) of
    each other file.

    path: its name in messages. inside: "folder/" for a tar within a tar. start: where it starts in the outermost one.
    """
    for tar, member in tar_members(file, path):
        name, lower, place = inside + posixpath.normpath(member.name), member.name.lower(), start + member.offset_data
        if member.isdir():
            yield name, 0, None
        elif lower.endswith(SUFFIXES):
            yield name, place, member.size
        elif lower.endswith(".tar"):
            yield name[:-4], 0, None
            yield from _scan_tar(tar.extractfile(member), f"{path}: {member.name}", f"{name[:-4]}/", place)
        else:
            yield name, 0, -1


def _index_tar(path):
    stamps = {"": stamp_of(path)}
    with open(path, "rb") as file:
        found = [item for item in _scan_tar(file, path) if "/." not in f"/{posixpath.dirname(item[0])}"]
    others = [name for name, _, size in found if size == -1 and posixpath.basename(name)[0] != "."]
    skipped, found = collections.Counter(map(_ending, others)), [item for item in found if item[2] != -1]
    holders = {posixpath.dirname(name) for name, _, size in found if size is not None}
    if not holders:
        raise UserError(f"{path} holds no JPEG, PNG or WEBP images")
    root = posixpath.commonpath(holders)
    if holders == {""}:  # pictures without any folder
        pictures = sorted(item for item in found if item[2] is not None)
        _refuse_twice(path, [name for name, *_ in pictures])
        names, places = [f"{FLAT}/{name}" for name, *_ in pictures], [place for _, *place in pictures]
        return _make_index(path, [], names, stamps, "", places, flat=True, skipped=skipped)
    if root in holders:  # there are pictures in the lowest common folder, so that must be the only class
        if root == "" or len(holders) > 1:
            loose = min(name for name, _, size in found if size is not None and posixpath.dirname(name) == root)
            where = "lies beside folders of pictures, or in none"
            raise UserError(f"{path}: the picture {loose} {where}: make the tar again with one folder per class")
        root = posixpath.dirname(root)
    prefix = f"{root}/" if root else ""
    found = [(name.removeprefix(prefix), *place) for name, *place in found if name.startswith(prefix)]
    folders = {name.split("/")[0] for name, _, size in found if size is None and name[0] != "."}
    pictures = [item for item in found if item[2] is not None]
    pictures.sort(key=lambda item: item[0].replace("/", "\0", 1))  # by class, then by path
    names = [name for name, *_ in pictures]
    _refuse_twice(path, names, prefix)
    return _make_index(path, folders, names, stamps, prefix, [place for _, *place in pictures], skipped=skipped)


def _refuse_twice(path, names, prefix=""):
    """UserError for a tar that holds a picture twice; names: sorted."""
    for name, following in itertools.pairwise(names):
        if name == following:
            raise UserError(f"{path} holds {prefix}{name} twice: make the tar again")


# ---- the cache -------------------------------------------------------------------------------------------------------


def _read_cache(folder, source):
    """The index of `source` that is kept in `folder`, or None if it is missing, damaged, or no longer true."""
    try:
        kept = load_tensors(os.path.join(folder, CACHE_FILE))
        if (kept.pop("format"), kept.pop("path")) != (CACHE_FORMAT, os.path.abspath(source)):
            return None
        for inside, stamp in kept["stamps"].items():
            if stamp_of(os.path.join(source, inside) if inside else source) != stamp:
                return None
        return PictureIndex(source, **kept)
    except (OSError, UserError, KeyError):
        return None


def _write_cache(folder, index):
    """Keeps the index in `folder`, whole or not at all. It is only a cache: where that fails, nothing is kept."""
    names = ("classes", "counts", "prefix", "names", "places", "stamps", "flat", "skipped")
    kept = {key: getattr(index, key) for key in names}
    kept |= {"format": CACHE_FORMAT, "path": os.path.abspath(index.source)}
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: what torch makes of a full disk
        with whole_file(os.path.join(folder, CACHE_FILE)) as temporary:
            torch.save(kept, temporary)
