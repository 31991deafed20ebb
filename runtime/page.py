"""The layout of app.py's page: which controls there are, where they stand, and which job each button starts.

The jobs are app.py's. Each is a generator that yields {name of a part of the page: its new value}, as it goes on; a
value that is a dict holds several properties of the part. Those functions know nothing of gradio.
"""

import contextlib
import functools
import os
import pathlib
import socket
import tempfile
import time
import traceback

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read while gradio is imported
try:
    import gradio as gr
except ImportError:
    gr = None

from runtime.controls import CLASS_SIZES, LABELS, SLIDERS, TEXT_SIZES, WORDS, a_number, in_words_of_the_page, one_of
from runtime.files import UserError
from runtime.jobs import listen
from samplers import SOLVERS

CSS = """
img { image-rendering: pixelated; }
#frame img, #film img { image-rendering: auto; }
label[data-testid="block-label"] { position: static !important; border: 0 !important; }
#gallery .grid-wrap { min-height: 0 !important; max-height: none !important; }
#gallery .caption-label { font-size: 0.7rem; padding: 1px 4px; }
.gradio-container { max-width: min(1280px, 100vw) !important; margin: auto; }
.gradio-container main, .gradio-container .grid-container { min-width: 0 !important; }
button { white-space: normal; }
.icon-button-wrapper.top-panel { top: -24px !important; border: 0 !important; }
@media (max-width: 600px) {
  #gallery .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  #densities img { image-rendering: auto; }
}
.dark { --color-accent: var(--primary-400) !important; }
footer { display: none !important; }
"""
# For a contrast of 4.5 to 1 between text and what is behind it (WCAG 2, AA), which gradio's own colours miss.
CONTRAST = {
    "block_info_text_color": "*neutral_600",
    "body_text_color_subdued": "*neutral_600",
    "color_accent": "*primary_700",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_dark": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_hover_dark": "*primary_800",
}
ABOUT = """# PixNerd
Each token of the transformer writes the weights of a small neural field, and that field draws the token's patch, pixel
by pixel. **Draw** pictures, **watch** one form, and **look inside** its patches."""
DENSITY = """**The patch at 1, 4 and 16 times the pixels.** One picture, drawn three times by the same tokens: only the
places are new at which their fields are asked. Between the places that it was trained at, a field may be wrong."""
BASIS = """**The basis.** Products of cosines over the patch, from constant (top left: white all
over) to fine (bottom right): by these numbers alone the field knows a pixel's place. All patches have the same."""
FEATURES = """**What the field makes of them.** The features of this patch's pixels after the field's last block, at the
chosen time: mixtures of the basis and the noisy colours, by the weights that this patch's token wrote."""
WEIGHTS = """**What the token wrote.** The two matrices of each block of the field. Middle gray is 0."""
LIFETIME = 3600  # seconds that films and what was looked into stay in memory, and files on the disk
WAITING = "Waiting for its turn."
STOPPED = "Stopped."
REFUSED = "Not done: too many jobs are waiting, or the controls were just changing. Try again."


# ---- layout ----------------------------------------------------------------------------------------------------------


def build(models, jobs, controls_of):
    """gr.Blocks. models: names, the first one chosen; controls_of(name): {control: properties} that go with a model.

    jobs: functions of (send, folder, *values) by name; values are those of the controls in the order of LABELS, and for
    "look" a picture's number too. They send a list of (label, frame) as "watched", and an `Inside` as "looked".
    """
    parts = {}

    def add(name, kind, *values, **properties):
        parts[name] = kind(*values, **properties)
        parts[name].elem_id = name
        return parts[name]

    with gr.Blocks(title="PixNerd", analytics_enabled=False, delete_cache=(600, LIFETIME)) as blocks:
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
        _connect(parts, jobs, models, controls_of)
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
    about = "up to two other solvers, side by side from the same noise"
    add("others", gr.CheckboxGroup, list(SOLVERS), label=LABELS["others"], info=about)
    add("watch", gr.Button, "Watch", variant="primary")
    _picture(add, "frame", "The picture as it forms")
    about = "from noise, time 0, to the finished picture, time 1"
    add("moment", gr.Slider, 0, 1, 1, step=1, label="Step", info=about, interactive=False)
    _picture(add, "film", "The film as GIF")
    add("watched", gr.State, time_to_live=LIFETIME)


def _add_look(add):
    add("picture", gr.Number, 0, label="Number of the picture, from 0", precision=0, minimum=0)
    add("look", gr.Button, "Look inside", variant="primary")
    _picture(add, "map", "The picture: click a patch", buttons=[])
    with gr.Row():
        add("row", gr.Number, 0, label="Row (from 0)", precision=0, minimum=0, min_width=120)
        add("column", gr.Number, 0, label="Column (from 0)", precision=0, minimum=0, min_width=120)
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
    add("looked", gr.State, time_to_live=LIFETIME)


def _answer(function):
    """A function that is soon done, its complaint shown by the browser."""

    @functools.wraps(function)  # gradio reads the types of its arguments
    def handler(*values):
        try:
            return function(*values)
        except UserError as error:
            raise gr.Error(in_words_of_the_page(error), print_exception=False)

    return handler


def _look_first(looked):
    if looked is None:
        raise UserError("look inside a picture first")


def _patch(send, _, looked, row, column, step):
    _look_first(looked)
    places = zip(("row", "column", "time"), (row, column, step), (*looked.grid, len(looked.states)))
    send(looked.patch(*(a_number(name, value, 0, count - 1) for name, value, count in places)))


def _connect(parts, jobs, models, controls_of):
    """Which part starts which job, what the job reads, and what it may change."""

    def updates(named):
        return {parts[name]: gr.update(**value) if type(value) is dict else value for name, value in named.items()}

    def stream(job):
        def handler(*values):
            start = time.perf_counter()
            try:
                # What a job writes stays until the page has copied it. Closed when the client is gone: see listen.
                with tempfile.TemporaryDirectory() as folder:
                    with contextlib.closing(listen(lambda send: job(send, pathlib.Path(folder), *values))) as results:
                        for named in results:
                            yield updates(named)
                yield updates({"status": f"Done in {time.perf_counter() - start:.1f} s."})
            except UserError as error:
                yield updates({"status": f"Not done: {in_words_of_the_page(error)}"})
            except Exception as error:  # noqa: BLE001  told on the page in a line, in full where the server runs
                traceback.print_exc()
                yield updates({"status": f"Failed: {type(error).__name__}; the server's terminal says more."})

        return handler

    def of(*names):
        return [parts[name] for name in names]

    # What is soon done does not wait behind the jobs, nor is it refused where too many wait already.
    quiet = dict(show_progress="hidden", api_visibility="private", queue=False)
    one = quiet | dict(queue=True, concurrency_limit=1, concurrency_id="job")  # one job at a time, whichever it is
    controls, place = of(*LABELS), of("looked", "row", "column", "time")
    looks = of("status", "map", "densities", "basis", "features", "weights")
    drawn, watched = of("status", "gallery", "sheet", "command"), of("status", "frame", "moment", "film", "watched")
    started = []

    def start(event, job, inputs, outputs):
        """The browser says that a job waits, was refused or stopped: the latter two fail, after all their messages."""
        status = parts["status"]
        waiting = event(None, None, status, js=f"() => (window.stopped = false, '{WAITING}')", **quiet)
        started.append(waiting.then(stream(job), inputs, outputs, **one))
        ended = f"status => window.stopped ? '{STOPPED}' : status == '{WAITING}' ? '{REFUSED}' : status"
        started[-1].failure(None, status, status, js=ended, **quiet)

    start(parts["draw"].click, jobs["draw"], controls, drawn)
    start(parts["watch"].click, jobs["watch"], controls, watched)
    start(parts["look"].click, jobs["look"], controls + of("picture"), [*looks, *place])
    start(parts["patch"].click, _patch, place, looks)

    def clicked(looked, event: gr.SelectData):
        _look_first(looked)
        if type(event.index) is not list or [*map(type, event.index)] != [int, int]:
            raise UserError("click the picture")
        return looked.place(*event.index)

    chosen = parts["map"].select(_answer(clicked), parts["looked"], of("row", "column"), **quiet)
    start(chosen.then, _patch, place, looks)

    def show(frames, step):
        if not frames:
            raise UserError("watch a picture first")
        label, frame = frames[a_number("moment", step, 0, len(frames) - 1)]
        return frame, gr.update(label=label)

    last = quiet | dict(trigger_mode="always_last")
    parts["moment"].change(_answer(show), of("watched", "moment"), of("frame", "moment"), **last)
    stopped = dict(js="() => (window.stopped = true, [])", cancels=started)
    parts["stop"].click(lambda: STOPPED, None, parts["status"], **stopped, **quiet)

    def choose(name):
        return updates(controls_of(one_of("ckpt", name, models)))

    parts["ckpt"].change(_answer(choose), parts["ckpt"], of(*controls_of(parts["ckpt"].value)), **quiet)


def check_address(host, port):
    """UserError where gradio is missing, or nothing can be served at the address: a taken port, a host elsewhere."""
    if gr is None:
        raise UserError("the page needs the package gradio: pip install -r requirements-page.txt")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, ValueError) as error:  # a ValueError is a name that is none
        raise UserError(f"--host {host[:80]} --port {port}: nothing can be served there ({error})")


def serve(blocks, host, port, show):
    """Serves the page until it is interrupted. show: open a browser. Address: as checked by `check_address`."""
    fonts = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # of the machine itself
    off = dict(share=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False)
    limits = dict(max_file_size=1, state_session_capacity=16)  # nothing is uploaded
    look = dict(theme=gr.themes.Default(**fonts).set(**CONTRAST), css=CSS, footer_links=[])
    where = dict(server_name=host, server_port=port, inbrowser=show, quiet=True, prevent_thread_lock=True)
    blocks.launch(**where, **look, **off, **limits)
    print(f"The page is at {blocks.local_url} (Ctrl-C ends it).", flush=True)
    blocks.block_thread()
