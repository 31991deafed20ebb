"""Pictures with captions: which a folder or a tar holds, what each caption says, and where each picture is.

    index = index_captions("PHOTOS")        # x.jpg beside x.txt, at any depth; or metadata.jsonl; or tars of such pairs
    index = index_captions("00000.tar")     # KEY.jpg and KEY.txt, as img2dataset writes them
    index.labels[7], index.where(7), index.read(7)

A line of metadata.jsonl has file_name, relative to the folder of that file, and text. A caption is the whole text, not
stripped (released model); one of blanks alone counts as none. Left out: compressed tars; captions of several languages;
a kept list for a quick start, as of class folders, since all captions have to be read anyway.
"""

import hashlib
import json
import os
import posixpath

from runtime.files.errors import UserError
from runtime.files.picture_index import SUFFIXES, tar_members, read_member, stamp_of

METADATA, TEXTS = "metadata.jsonl", (".txt", "metadata.jsonl")
MOST_NAMED = 3  # of a long list of faults, in a message


class CaptionIndex:
    """.labels: the captions; .fingerprint: changes with any name or caption; .remark: what was left out, or None."""

    classes = None  # a condition in words needs none

    def __init__(self, source, names, captions, places, stamps, skipped=0):
        # places: (tar or "", offset, size) of each picture; stamps: {tar: its stamp when it was listed}.
        self.source, self.names, self.labels, self.places, self.stamps = source, names, captions, places, stamps
        self.remark = f"left out, without a caption or a picture: {_count(skipped, 'file')}" if skipped else None
        told = "".join(f"{len(part)}:{part}" for pair in zip(names, captions) for part in pair)
        self.fingerprint = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    def where(self, i):
        """The path of picture i, for people too: folder/x.png, or "archive.tar: x.png"."""
        tar = self.places[i][0]
        return f"{tar}: {self.names[i]}" if tar else os.path.join(self.source, self.names[i])

    def read(self, i):
        """The bytes of picture i of a tar; None for a file, where `where(i)` is its path. Raises UserError."""
        tar, offset, size = self.places[i]
        return read_member(tar, offset, size, self.stamps[tar], self.where(i)) if tar else None


def index_captions(source, skip=False):
    """The CaptionIndex of a folder or an uncompressed tar, sorted by path. Raises UserError.

    skip: leave out pictures without a caption, and captions without a picture, instead of refusing the data.
    """
    source = os.fspath(source)
    if not os.path.exists(source):
        raise UserError(f"there is no data folder or tar file {source}: give --data a folder of captioned pictures")
    pictures, captions = {}, {}  # name -> (tar, offset, size); name without its suffix -> text
    stamps = {}  # tar -> stamp
    try:
        if os.path.isdir(source):
            _read_folder(source, pictures, captions, stamps)
        else:
            _read_tar(source, "", pictures, captions, stamps)
    except OSError as error:
        raise UserError(f"{error.filename or source} cannot be read: {error.strerror}")
    if not pictures:
        raise UserError(f"{source} holds no JPEG, PNG or WEBP images")
    stems = {}
    for name in sorted(pictures):
        stem = posixpath.splitext(name)[0]
        if stem in stems:
            raise UserError(f"{stems[stem]} and {name} share one caption: rename one of the two")
        stems[stem] = name
    bare = [
        f"{name}: its text is blank" if stem in captions else name
        for stem, name in stems.items()
        if not captions.get(stem, "").strip()
    ]
    lonely = [stem for stem in captions if stem not in stems]
    if not skip:
        _refuse(source, bare, "picture", "caption")
        _refuse(source, lonely, "caption", "picture")
    kept = [(stem, name) for stem, name in stems.items() if captions.get(stem, "").strip()]
    if not kept:
        raise UserError(f"{source}: not one picture has a caption: put x.txt beside x.jpg, or write {METADATA}")
    names = [name for _, name in kept]
    places = [pictures[name] for name in names]
    return CaptionIndex(source, names, [captions[stem] for stem, _ in kept], places, stamps, len(bare) + len(lonely))


def _count(number, what):
    return f"{number} {what}{'s' * (number != 1)}"


def _refuse(source, names, what, lacks):
    if names:
        named = ", ".join(sorted(names)[:MOST_NAMED]) + ", ..." * (len(names) > MOST_NAMED)
        found = f"{_count(len(names), what)} without a {lacks} ({named})"
        raise UserError(f"{source} has {found}: add what is missing, or give --skip-uncaptioned")


def _add(captions, name, text, where):
    """Notes the caption of the picture `name`."""
    stem = posixpath.splitext(name)[0]
    if stem in captions:
        raise UserError(f"{where}: picture {stem} has a second caption here: remove one of the two")
    if "\0" in text:
        raise UserError(f"{where}: the caption of picture {stem} holds a zero character: take it out")
    captions[stem] = text


def decode(content, where):
    """The text of bytes in UTF-8, without the mark that Windows' editors set before it. UserError, which names where.

    A zero is a sign of UTF-16, whose bytes can pass for UTF-8.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{where} is not a text in UTF-8: save it in that encoding")
    return text


def json_lines(content, where):
    """(number from 1, line, its dict) of each line of a .jsonl, given as bytes; blank ones are left out. UserError.

    Only \\n ends a line: JSON may hold the other characters that Python's splitlines breaks at.
    """
    for number, line in enumerate(decode(content, where).split("\n"), start=1):
        if line.strip():
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):  # the second of brackets in brackets, thousands deep
                entry = None
            if not isinstance(entry, dict):
                raise UserError(f"{where}, line {number}, is not a JSON object")
            yield number, line.removesuffix("\r"), entry


def _read_folder(root, pictures, captions, stamps):
    for folder, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if name[0] != ".")
        for file in files:
            path, kind = os.path.join(folder, file), file.lower()
            name = os.path.relpath(path, root)
            if kind.endswith(SUFFIXES):
                pictures[name] = ("", 0, 0)
            elif kind.endswith(TEXTS):
                with open(path, "rb") as text:
                    _read_text(name, path, text.read(), captions)
            elif kind.endswith(".tar"):
                _read_tar(path, name, pictures, captions, stamps)


def _read_text(name, where, content, captions):
    """The captions of a .txt (one) or metadata.jsonl (one a line)."""
    if name.lower().endswith(".txt"):
        _add(captions, name, decode(content, where), where)
    else:
        for number, _, entry in json_lines(content, where):
            file_name, text = entry.get("file_name"), entry.get("text")
            if not (isinstance(file_name, str) and isinstance(text, str)):
                raise UserError(f"{where}, line {number}, lacks file_name or text")
            place = posixpath.normpath(posixpath.join(posixpath.dirname(name), file_name))
            _add(captions, place, text, f"{where}, line {number}")


def _read_tar(path, prefix, pictures, captions, stamps):
    """Names of what is in a tar of a folder begin with `prefix`, its own, so that two tars may use the same keys."""
    stamps[path] = stamp_of(path)
    with open(path, "rb") as file:
        for tar, member in tar_members(file, path):
            name, kind = posixpath.join(prefix, posixpath.normpath(member.name)), member.name.lower()
            if not member.isreg():
                continue
            if kind.endswith(SUFFIXES):
                if name in pictures:
                    raise UserError(f"{path} holds {member.name} twice: make the tar again")
                pictures[name] = (path, member.offset_data, member.size)
            elif kind.endswith(TEXTS):
                _read_text(name, f"{path}: {member.name}", tar.extractfile(member).read(), captions)
