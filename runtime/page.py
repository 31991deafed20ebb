"""The layout of app.py's page: which controls there are, where they stand, and which job each button starts.

The jobs are app.py's. Each is a generator that yields {name of a part of the page: its new value}, as it goes on; a
value that is a dict holds several properties of the part. Those functions know nothing of gradio.
"""

import argparse
import contextlib
import os
import pathlib
import re
import tempfile
import time
import traceback

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
try:
    import gradio as gr
except ImportError:
    gr = None

from runtime.files import UserError
from runtime.jobs import listen
from samplers import SOLVERS

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
WORDS |= {"row": "Patch, row", "column": "Patch, column", "time": "Step at which to look"}
CSS = """
img { image-rendering: pixelated; }
label[data-testid="block-label"] { position: static !important; border: 0 !important; }
#gallery .grid-wrap { min-height: 0 !important; }
#gallery .caption-label { font-size: 0.7rem; padding: 1px 4px; }
.gradio-container { max-width: min(1280px, 100vw) !important; margin: auto; }
.gradio-container main, .gradio-container .grid-container { min-width: 0 !important; }
button { white-space: normal; }
@media (max-width: 600px) { #gallery .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; } }
footer { display: none !important; }
"""
ABOUT = """# PixNerd
Each token of the transformer writes the weights of a small neural field, and that field draws the token's patch, pixel
by pixel. **Draw** pictures, **watch** one form, and **look inside** its patches."""
DENSITY = """**The patch at 1, 4 and 16 times the pixels.** One picture, drawn three times by the same tokens: only the
places are new at which their fields are asked. Between the places that it was trained at, a field may be wrong."""
BASIS = """**The basis.** Products of cosines over the patch, from constant (top left) to fine (bottom right): the
field knows each pixel's place by these numbers alone. They are the same in all patches."""
FEATURES = """**What the field makes of them.** The features of this patch's pixels after the field's last block, at the
chosen time: mixtures of the basis and the noisy colours, by the weights that this patch's token wrote."""
WEIGHTS = """**What the token wrote.** The two matrices of each block of the field. Middle gray is 0."""


# ---- what is asked ---------------------------------------------------------------------------------------------------


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


# ---- layout ----------------------------------------------------------------------------------------------------------


def build(models, jobs, controls_of):
    """gr.Blocks. models: names, the first one chosen; controls_of(name): {control: properties} that go with a model.

    jobs: functions of (send, folder, *values) by name; values are those of the controls in the order of LABELS, and for
    "look" a picture's number too. They send a list of frames as "watched", and an `Inside` as "looked".
    """
    if gr is None:
        raise UserError("the page needs the package gradio: pip install -r requirements-page.txt")
    parts = {}

    def add(name, kind, *values, **properties):
        parts[name] = kind(*values, **properties)
        parts[name].elem_id = name
        return parts[name]

    with gr.Blocks(title="PixNerd", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.Markdown(ABOUT)
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                _add_controls(add, models, controls_of(models[0]))
            with gr.Column(scale=3, min_width=280):
                with gr.Row(equal_height=True):
                    add("status", gr.Textbox, "Ready.", label="Status", interactive=False, lines=1, scale=4)
                    add("stop", gr.Button, "Stop", min_width=80, scale=1)
                with gr.Tab("Draw"):
                    _add_draw(add)
                with gr.Tab("Watch"):
                    _add_watch(add)
                with gr.Tab("Look inside"):
                    _add_look(add)
        _connect(parts, jobs, controls_of)
    return blocks.queue(max_size=8, api_open=False)


def _picture(add, name, label, **properties):
    properties = {"buttons": ["download", "fullscreen"], "format": "png"} | properties
    return add(name, gr.Image, label=label, alt_text=label, interactive=False, **properties)


def _add_controls(add, models, controls):
    def sliders(*names):
        for name in names:
            label, low, high, step = SLIDERS.get(name, (LABELS[name], 0, 1, 1))
            properties = dict(minimum=low, maximum=high, step=step, value=4, label=label)
            add(name, gr.Slider, **properties | controls.get(name, {}))

    add("ckpt", gr.Dropdown, models, value=models[0], label=LABELS["ckpt"])
    add("class", gr.Dropdown, label=LABELS["class"], **controls["class"])
    add("prompt", gr.Textbox, "a red apple", label=LABELS["prompt"], **controls["prompt"])
    about = "what guidance leads away from"
    add("negative", gr.Textbox, "", label=LABELS["negative"], info=about, **controls["negative"])
    sliders("num")
    add("seed", gr.Number, 0, label=LABELS["seed"], precision=0)
    with gr.Accordion("Solver and guidance", open=False):
        add("solver", gr.Dropdown, list(SOLVERS), label=LABELS["solver"], **controls["solver"])
        sliders("steps", "order", "cfg", "low", "high", "shift", "temperature")
    with gr.Accordion(WORDS["resolution"], open=False):
        sliders(*CLASS_SIZES, *TEXT_SIZES)


def _add_draw(add):
    add("draw", gr.Button, "Draw", variant="primary")
    add("gallery", gr.Gallery, label="Pictures", columns=4, height=None, object_fit="contain", interactive=False)
    add("sheet", gr.DownloadButton, "Download all as one PNG", interactive=False)
    add("command", gr.Textbox, label="The same on the command line", interactive=False, lines=2)


def _add_watch(add):
    add("others", gr.CheckboxGroup, list(SOLVERS), label=LABELS["others"], info="other solvers, from the same noise")
    add("watch", gr.Button, "Watch", variant="primary")
    _picture(add, "frame", "The picture as it forms")
    add("moment", gr.Slider, 0, 1, 1, step=1, label="Step (the last one: finished)", interactive=False)
    _picture(add, "film", "The film as GIF")
    add("watched", gr.State, time_to_live=3600)


def _add_look(add):
    add("picture", gr.Number, 0, label="Number of the picture, from 0", precision=0, minimum=0)
    add("look", gr.Button, "Look inside", variant="primary")
    _picture(add, "map", "The picture: click a patch", buttons=[])
    with gr.Row():
        add("row", gr.Number, 0, label="Patch, row from 0", precision=0, minimum=0, min_width=120)
        add("column", gr.Number, 0, label="Patch, column from 0", precision=0, minimum=0, min_width=120)
        add("time", gr.Number, 0, label="Step at which to look", precision=0, minimum=0, min_width=120)
    add("patch", gr.Button, "Show this patch")
    gr.Markdown(DENSITY)
    _picture(add, "densities", "The patch as its field draws it")
    gr.Markdown(BASIS)
    _picture(add, "basis", "Basis functions")
    gr.Markdown(FEATURES)
    _picture(add, "features", "Features of the pixels")
    gr.Markdown(WEIGHTS)
    _picture(add, "weights", "Weights that the token wrote")
    add("looked", gr.State, time_to_live=3600)


def _connect(parts, jobs, controls_of):
    """Which part starts which job, what the job reads, and what it may change."""

    def updates(named):
        return {parts[name]: gr.update(**value) if type(value) is dict else value for name, value in named.items()}

    def stream(job):
        def handler(*values):
            start = time.perf_counter()
            try:
                # What a job writes stays until the page has copied it. Closed when the client is gone: see listen.
                with tempfile.TemporaryDirectory() as folder:
                    results = listen(lambda send: job(send, pathlib.Path(folder), *values))
                    with contextlib.closing(results):
                        for named in results:
                            yield updates(named)
                yield updates({"status": f"Done in {time.perf_counter() - start:.1f} s."})
            except UserError as error:
                yield updates({"status": f"Not done: {in_words_of_the_page(error)}"})
            except Exception as error:  # noqa: BLE001  told on the page in a line, in full where the server runs
                traceback.print_exc()
                yield updates({"status": f"Failed: {type(error).__name__}; the server's terminal says more."})

        return handler

    def patch(send, _, looked, row, column, step):
        if looked is None:
            raise UserError("look inside a picture first")
        places = zip(("row", "column", "time"), (row, column, step), (*looked.grid, len(looked.states)))
        send(looked.patch(*(a_number(name, value, 0, count - 1) for name, value, count in places)))

    def of(*names):
        return [parts[name] for name in names]

    quiet = dict(show_progress="hidden", api_visibility="private")
    one = quiet | dict(concurrency_limit=1, concurrency_id="job")  # one job at a time, whichever it is
    controls, place = of(*LABELS), of("looked", "row", "column", "time")
    looks = of("status", "map", "densities", "basis", "features", "weights")
    drawn, watched = of("status", "gallery", "sheet", "command"), of("status", "frame", "moment", "film", "watched")
    started = [
        parts["draw"].click(stream(jobs["draw"]), controls, drawn, **one),
        parts["watch"].click(stream(jobs["watch"]), controls, watched, **one),
        parts["look"].click(stream(jobs["look"]), controls + of("picture"), [*looks, *place], **one),
        parts["patch"].click(stream(patch), place, looks, **one),
    ]

    def clicked(looked, event: gr.SelectData):
        return looked.place(*event.index)

    chosen = parts["map"].select(clicked, parts["looked"], of("row", "column"), **quiet)
    started.append(chosen.then(stream(patch), place, looks, **one))

    def show(frames, step):
        return frames[a_number("moment", step, 0, len(frames) - 1)] if frames else None

    moment = of("watched", "moment")
    parts["moment"].change(show, moment, parts["frame"], trigger_mode="always_last", **quiet)
    parts["stop"].click(lambda: "Stopped.", None, parts["status"], cancels=started, **quiet)
    changed = of(*controls_of(parts["ckpt"].value))
    parts["ckpt"].change(lambda name: updates(controls_of(name)), parts["ckpt"], changed, **quiet)


def serve(blocks, host, port, show):
    """Serves the page until it is interrupted. show: open a browser. OSError where the port is taken."""
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # of the machine itself
    off = dict(share=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False)
    limits = dict(max_file_size=1, state_session_capacity=16)  # nothing is uploaded
    look = dict(theme=gr.themes.Default(**fonts), css=CSS, footer_links=[])
    where = dict(server_name=host, server_port=port, inbrowser=show, quiet=True, prevent_thread_lock=True)
    blocks.launch(**where, **look, **off, **limits)
    print(f"The page is at {blocks.local_url} (Ctrl-C ends it).", flush=True)
    blocks.block_thread()
