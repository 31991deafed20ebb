"""The page of app.py in a real browser, as a person uses it.

Needs requirements-page.txt, requirements-browser.txt and Chromium or Chrome; skipped where one of them is missing. The
server draws with the shipped model and a tiny one, and its solver "heun" never ends, so that a job is sure to be
running. Screenshots stay in runs/browser/.
"""

import io
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, run_script, run_state, text_state
from PIL import Image

from runtime.checkpoint import save_checkpoint

pytestmark = pytest.mark.browser
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SHOTS = ROOT / "runs" / "browser"
WAIT = 120_000  # milliseconds until a test gives up; what it waits for takes seconds

# app.py, in a process that refuses every address but this machine's, and writes down which were asked for.
SERVER = """
import runpy, sys
root, log, *flags = sys.argv[1:]
sys.path.insert(0, root)

def refuse(event, values):
    if event in ("socket.connect", "socket.getaddrinfo"):
        address = values[1] if event == "socket.connect" else values
        host = address[0] if isinstance(address, tuple) else "this machine"  # a path: a socket of this machine
        if host not in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "this machine", None):
            with open(log, "a") as file:
                file.write(f"{event} {host}\\n")
            raise OSError("refused")

sys.addaudithook(refuse)
import samplers

def endless(velocity, noise, times, callback):
    while True:
        callback(0, times[0], noise)
        velocity(noise, times[0])

samplers.SOLVERS["heun"] = endless
sys.argv = ["app.py", *flags]
runpy.run_path(root + "/app.py", run_name="__main__")
"""


def ignore_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the page, and the file that names every other address that the server asked for."""
    pytest.importorskip("gradio")
    folder = tmp_path_factory.mktemp("site")
    save_checkpoint(folder / "tiny.pt", run_state(1))
    save_checkpoint(folder / "text.pt", text_state())
    (folder / "temporary").mkdir()
    command = [sys.executable, "-c", SERVER, ROOT, folder / "asked", "--ckpt", f"{folder}/text.pt,{folder}/tiny.pt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    log = open(folder / "log", "w+")
    command += ["--port", str(free_port()), "--device", "cpu"]
    # As a shell starts what it puts into the background: deaf to Ctrl-C, and to be ended by a signal all the same.
    how = dict(stdout=log, stderr=log, env=environment, cwd=folder, preexec_fn=ignore_interrupts)
    server = subprocess.Popen([str(word) for word in command], **how)
    while "The page is at" not in (folder / "log").read_text():
        assert server.poll() is None, (folder / "log").read_text()
    yield re.search(r"http://\S+", (folder / "log").read_text())[0], folder
    server.terminate()
    assert server.wait(60) is not None
    left = [path for path in (folder / "temporary").rglob("*") if path.is_file()]
    assert not left, f"temporary files are left: {left}"
    assert "Traceback" not in (folder / "log").read_text(), (folder / "log").read_text()


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium or Chrome on this machine")
    SHOTS.mkdir(parents=True, exist_ok=True)
    with api.sync_playwright() as driver:
        # Without a sandbox, since root, as in a container, cannot have one.
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def visit(browser, site):
    """visit(width=1280) opens the page in a new window; at the end, no window must have asked another address."""
    pages, foreign = [], []

    def watched(route):
        if route.request.url.startswith((site[0], "data:", "blob:")):
            return route.continue_()
        foreign.append(route.request.url)
        return route.abort()

    def open_window(width=1280):
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(WAIT)
        page.route("**/*", watched)
        pages.append(page)
        page.goto(site[0])
        page.wait_for_selector("#draw")
        return page

    yield open_window
    for page in pages:
        page.close()
    assert not foreign, f"the page asked for {foreign}"


def status(page, pattern):
    """Waits until the status line matches; returns it."""
    script = "pattern => new RegExp(pattern).test(document.querySelector('#status textarea, #status input').value)"
    page.wait_for_function(script, arg=pattern)
    return page.locator("#status textarea, #status input").first.input_value()


def choose(page, name, text):
    """Chooses from a list the entry of this name, or of the file of this name."""
    box = page.locator(f"#{name} input").first
    box.click()
    page.get_by_role("option", name=re.compile(rf"(^|[/\s]){re.escape(text)}$")).first.click()


def fill(page, name, value):
    page.locator(f"#{name} input[type=number]").first.fill(value)
    page.locator(f"#{name} input[type=number]").first.press("Tab")


def unfold(page, title):
    page.get_by_role("button", name=title).click()


def tab(page, name):
    page.get_by_role("tab", name=name).click()


def endless(page):
    """Starts a job that does not end by itself, and sees that it runs."""
    unfold(page, "Solver and guidance")
    choose(page, "solver", "heun")
    tab(page, "Draw")
    press(page, "draw")
    status(page, "heun: step")


def press(page, name):
    """Presses a button, after the status line was emptied, so that what it says next is of this."""
    page.evaluate("document.querySelector('#status textarea, #status input').value = ''")
    page.click(f"#{name}")


def draw(page):
    """Draws; returns the pictures (N, H, W, 3) of the gallery."""
    press(page, "draw")
    status(page, "Done")
    count = int(page.locator("#num input[type=number]").input_value())
    page.wait_for_function(f"document.querySelectorAll('#gallery .grid-container img').length == {count}")
    sources = page.eval_on_selector_all("#gallery .grid-container img", "all => all.map(image => image.src)")
    pictures = [Image.open(io.BytesIO(page.request.get(source).body())) for source in sources]
    assert all("settings" in picture.text for picture in pictures)
    return np.stack([np.asarray(picture) for picture in pictures])


def by_command(page, folder):
    """What sample.py draws by the command that the page shows."""
    _, script, *flags = shlex.split(page.locator("#command textarea").input_value())
    code, _, stderr = run_script(script, *flags, "--out", folder, "--device", "cpu")
    assert code == 0, stderr
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_a_class_is_drawn_with_the_pixels_of_sample_py_and_another_model_with_its_own_classes(visit, tmp_path):
    page = visit()
    choose(page, "ckpt", "emoji")
    page.wait_for_function("document.querySelector('#class input').value.includes('smileys')")
    choose(page, "class", "8 flags")
    fill(page, "num", "2")
    fill(page, "seed", "5")
    unfold(page, "Solver and guidance")
    fill(page, "steps", "6")
    assert (draw(page) == by_command(page, tmp_path / "emoji")).all()
    choose(page, "ckpt", "tiny.pt")
    page.wait_for_function("document.querySelector('#class input').value == '0 a'")
    choose(page, "class", "2 c")
    pictures = draw(page)
    assert pictures.shape[1:] == (16, 16, 3) and (pictures == by_command(page, tmp_path / "tiny")).all()


def test_a_prompt_is_drawn_with_the_pixels_of_sample_py_and_an_empty_one_is_refused(visit, tmp_path):
    page = visit()
    choose(page, "ckpt", "text.pt")
    page.wait_for_selector("#prompt textarea")
    assert page.locator("#class").count() == 0 or not page.locator("#class").is_visible()
    page.fill("#prompt textarea", "")
    press(page, "draw")
    assert "“Prompt” is empty" in status(page, "Not done")
    page.fill("#prompt textarea", "blue apple")
    page.fill("#negative textarea", "green")
    unfold(page, "Size of the pictures")
    assert not page.locator("#rows").is_visible()
    fill(page, "height", "24")
    assert (draw(page) == by_command(page, tmp_path / "x")).all()


def test_a_stream_brings_several_frames_and_the_slider_goes_back_through_them(visit):
    page = visit()
    choose(page, "ckpt", "emoji")
    tab(page, "Watch")
    page.get_by_label("adams", exact=True).check()
    page.evaluate(
        "() => { window.seen = new Set(); setInterval(() => { const image = document.querySelector('#frame img');"
        " if (image) window.seen.add(image.src) }, 20) }"
    )
    press(page, "watch")
    status(page, "Done")
    assert page.evaluate("window.seen.size") >= 3
    page.wait_for_selector("#film img")
    film = Image.open(io.BytesIO(page.request.get(page.get_attribute("#film img", "src")).body()))
    assert film.format == "GIF" and film.n_frames == 51
    last = page.get_attribute("#frame img", "src")
    fill(page, "moment", "10")
    page.wait_for_function("last => document.querySelector('#frame img').src != last", arg=last)


def test_a_click_on_a_patch_shows_what_its_token_wrote(visit):
    page = visit()
    choose(page, "ckpt", "emoji")
    tab(page, "Look inside")
    press(page, "look")
    status(page, "Done")
    before = page.get_attribute("#weights img", "src")
    place = page.locator("#map img").bounding_box()
    page.mouse.click(place["x"] + 0.6 * place["width"], place["y"] + 0.3 * place["height"])
    page.wait_for_function("before => document.querySelector('#weights img').src != before", arg=before)
    assert [page.locator(f"#{name} input").input_value() for name in ("row", "column")] == ["1", "2"]
    before = page.get_attribute("#weights img", "src")
    fill(page, "row", "3")  # by keyboard alone
    page.locator("#patch").press("Enter")
    page.wait_for_function("before => document.querySelector('#weights img').src != before", arg=before)
    fill(page, "row", "4")
    press(page, "patch")
    assert "Patch, row" in status(page, "Not done")


def test_nonsense_is_answered_by_a_sentence(visit):
    page = visit()
    page.locator("#seed input").click()
    page.keyboard.press("Control+A")
    page.keyboard.type("x")  # which a number's box does not take, so that it is empty
    page.keyboard.press("Backspace")
    press(page, "draw")
    assert "“Seed”" in status(page, "Not done")
    fill(page, "seed", "1")
    choose(page, "ckpt", "emoji")
    unfold(page, "Size of the pictures")
    for name, most in (("rows", "8"), ("columns", "8"), ("pixels", "32")):
        fill(page, name, "1000000000")
        assert page.locator(f"#{name} input[type=number]").input_value() == most
    unfold(page, "Solver and guidance")
    fill(page, "low", "0.8")
    fill(page, "high", "0.2")
    press(page, "draw")
    assert "“Guided from time”" in status(page, "Not done: .*LOW must be below HIGH")
    tab(page, "Look inside")
    press(page, "patch")
    assert "look inside a picture first" in status(page, "Not done: look")


def test_a_closed_tab_and_the_stop_button_end_a_job_and_the_page_answers_while_it_runs(visit):
    """No job but the first can start before the first has ended, and this one does so only when it is stopped."""
    first = visit()
    endless(first)
    second = visit()
    choose(second, "ckpt", "emoji")  # answered while the job runs
    second.wait_for_function("document.querySelector('#class input').value.includes('smileys')")
    unfold(second, "Solver and guidance")
    fill(second, "steps", "3")
    first.close()
    assert len(draw(second)) == 4
    choose(second, "solver", "heun")
    press(second, "draw")
    status(second, "heun: step")
    press(second, "stop")
    status(second, "Stopped")
    choose(second, "solver", "euler")
    assert len(draw(second)) == 4


def test_controls_have_labels_and_nothing_overflows_on_a_phone(visit):
    for width in (1280, 390):
        page = visit(width)
        unfold(page, "Solver and guidance")
        unfold(page, "Size of the pictures")
        for name, job, part in (("Draw", "draw", "sheet"), ("Watch", "watch", "film"), ("Look inside", "look", "map")):
            tab(page, name)
            if name == "Look inside":
                choose(page, "ckpt", "emoji")
            press(page, job)
            status(page, "Done")
            page.wait_for_timeout(500)
            page.screenshot(path=SHOTS / f"{job}-{width}.png", full_page=True)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            wide = page.evaluate(
                "width => [...document.querySelectorAll('button, input, label, img, p')].filter(part => {"
                " const box = part.getBoundingClientRect(); return box.width && box.right > width + 1 })"
                ".map(part => part.outerHTML.slice(0, 200))",
                width,
            )
            assert not wide, wide
            nameless = page.evaluate(
                "[...document.querySelectorAll('input, textarea')].filter(part => part.offsetParent && !("
                "part.labels?.length || part.ariaLabel || part.getAttribute('aria-labelledby')))"
                ".map(part => part.outerHTML.slice(0, 200))"
            )
            assert not nameless, nameless
            assert not page.evaluate("[...document.images].filter(image => !image.alt).length")


def test_the_server_asks_no_other_machine(visit, site):
    """`visit` watches the browser; this is the server's side. Catches: analytics, a version check, fonts."""
    page = visit()
    draw(page)
    assert not (site[1] / "asked").exists(), (site[1] / "asked").read_text()
