"""The controls of app.py's page: their labels and ranges, and whether a value is one that they can have.

A browser sends what it likes, whatever the control shows: every value is checked before it is used.
"""

import argparse
import re

from runtime.files import UserError

# Controls by the flags of sample.py: label, smallest and largest value, step. Ranges mostly of the authors' demo.
SLIDERS = {
    "num": ("Number of pictures", 1, 16, 1),
    "steps": ("Steps", 1, 100, 1),
    "order": ("Order of the adams solver", 1, 4, 1),
    "cfg": ("Guidance scale (1: none)", 0.1, 10, 0.1),
    "low": ("Guided from time", 0, 1, 0.05),
    "high": ("Guided until time", 0, 1, 0.05),
    "shift": ("Time shift (above 1: smaller steps near noise)", 0.1, 5, 0.1),
    "temperature": ("Temperature of the noise", 0.1, 2, 0.05),
}
# Controls of the size, for models of classes and of sentences; their ranges depend on the model.
CLASS_SIZES = {"rows": "Height in tokens", "columns": "Width in tokens", "pixels": "Pixels along a patch"}
TEXT_SIZES = {"height": "Height in pixels", "width": "Width in pixels"}
LABELS = {
    "ckpt": "Model",
    "class": "Class",
    "prompt": "Prompt",
    "negative": "Negative prompt",
    "seed": "Seed",
    "solver": "Solver",
    "others": "Compare with",
}
LABELS |= {name: row[0].split(" (")[0] for name, row in SLIDERS.items()} | CLASS_SIZES | TEXT_SIZES
# What the messages of sample.py call otherwise.
WORDS = {"batch-size": LABELS["num"], "resolution": "Size of the pictures", "upscale": LABELS["pixels"]}
WORDS |= {"interval": LABELS["low"], "picture": "Number of the picture", "moment": "Step"}
WORDS |= {"row": "Row", "column": "Column", "time": "Step at which to look"}


class Parser(argparse.ArgumentParser):
    """Raises a mistake, where argparse would print it and leave."""

    def error(self, message):
        raise UserError(message.removeprefix("argument "))


def a_number(name, value, low, high, step=1):
    """The value of a control, for a whole step as int, one of its multiples; else as float.

    UserError if it is none, or not in [low, high].
    """
    kind = type(step)
    if type(value) not in (int, float) or not low <= value <= high or (kind is int and value % step):
        word = ("whole number" if step == 1 else f"multiple of {step}") if kind is int else "number"
        raise UserError(f"--{name} takes a {word} from {low} to {high}, not {str(value)[:40]!r}")
    return kind(value)


def one_of(name, value, choices):
    """The value of a control, if it is one of the choices; else UserError."""
    if type(value) not in (int, str) or value not in choices:
        raise UserError(f"--{name} takes a choice of its list, not {str(value)[:40]!r}")
    return value


def a_text(name, value, empty=False):
    """The text of a control, without blanks around it. UserError if it is long, or empty where it must not be."""
    text = value.strip() if type(value) is str else ""
    if not (text or empty) or len(text) > 2000:
        raise UserError(f"--{name} is {'longer than 2,000 letters' if text else 'empty: say what to draw'}")
    return text


def in_words_of_the_page(message):
    """A message of sample.py, the labels of the controls in the place of flags."""
    return re.sub(r"--([a-z-]+)", lambda flag: f"“{(LABELS | WORDS).get(flag[1], flag[1])}”", str(message))
