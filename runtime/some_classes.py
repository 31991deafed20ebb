"""Parts of a data set: some classes (`train.py --classes flags,food-fruit:4`), or all but some captions."""

import difflib
import pathlib

import numpy as np

from data import Pictures
from runtime.files import UserError, decode


class Part(Pictures):
    """Some pictures of another data set: .kept[i] is the number there of picture i here."""

    @property
    def in_memory(self):
        """As of the whole."""
        return self.dataset.in_memory

    def picture(self, i, rng=None):
        """The picture of the whole data set that is number i here."""
        return self.dataset.picture(int(self.kept[i]), rng)


class SomeClasses(Part):
    """Some classes of a data set, which become classes 0, 1, ... in the order of `names`.

    "NAME:N" takes each picture of NAME N times per epoch (1 to 1,000). .remark: how many pictures of what that makes.
    Raises UserError for a name that is not there, for pictures of two names, and for another N.
    """

    def __init__(self, dataset, names):
        members = dataset.members()
        self.dataset, self.classifier = dataset, dataset.classifier
        self.classes, self.labels, counts = [], [], []
        self.kept = np.array([], int)  # an array, which loader workers share
        for text in names:
            name, _, times = (text, "", "1") if text in members else text.rpartition(":")
            if name not in members:
                name = name or text
                near = difflib.get_close_matches(name, members, 3, 0.5) or sorted(members)[:10]
                raise UserError(f"--classes: {name!r} is not a class of the data; did you mean {', '.join(near)}?")
            if times not in map(str, range(1, 1001)):
                raise UserError(f"--classes: {text!r} should be {name}:N, N from 1 to 1000: how often in an epoch")
            if np.isin(members[name], self.kept).any():
                raise UserError(f"--classes: {text!r} has pictures of a name before it; leave one of the two out")
            self.kept = np.concatenate([self.kept, np.tile(members[name], int(times))])
            self.labels += [len(self.classes)] * (len(self.kept) - len(self.labels))
            self.classes.append(name)
            counts.append(f"{name} {len(members[name])}" + (f" x {times}" if times != "1" else ""))
        self.remark = f"--classes takes {len(np.unique(self.kept))} pictures: {', '.join(counts)}"
        self.remark += f"; of the data: {dataset.remark}" if dataset.remark else ""
        self.fingerprint = f"{dataset.fingerprint}, of it in this order {', '.join(names)}"


class HeldOut(Part):
    """A captioned data set without the pictures whose captions `path` lists, one a line. Raises UserError."""

    classes = None

    def __init__(self, dataset, path):
        try:
            text = decode(pathlib.Path(path).read_bytes(), f"--hold-out {path}")
        except OSError as error:
            remedy = "give a text file with one caption a line"
            raise UserError(f"--hold-out {path} cannot be read ({error.strerror}): {remedy}")
        unwanted = {line.strip() for line in text.split("\n")} - {""}
        if unknown := unwanted - {label.strip() for label in dataset.labels}:
            raise UserError(f"--hold-out {path}: no picture has the caption {sorted(unknown)[0]!r}")
        self.kept = [i for i, label in enumerate(dataset.labels) if label.strip() not in unwanted]
        if not self.kept:
            raise UserError(f"--hold-out {path} leaves no picture to train on: list fewer captions")
        self.dataset, self.labels = dataset, [dataset.labels[i] for i in self.kept]
        self.classifier = dataset.classifier
        self.remark = f"--hold-out leaves {len(self)} of {len(dataset)} pictures"
        self.fingerprint = f"{dataset.fingerprint}, without {sorted(unwanted)}"
