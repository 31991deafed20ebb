"""The page of app.py in a real browser, as a person uses it.

Needs requirements-page.txt, requirements-browser.txt and Chromium or Chrome; skipped where one of them is missing. The
server draws with the shipped model and tiny ones, and its solver "heun" never ends, so that a job is sure to be
running. Screenshots stay in runs/browser/.
"""

import dataclasses
import io
import json
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
from helpers import ROOT, TINY, run_script, run_state, text_state
from PIL import Image

from model import PixNerd
from runtime.checkpoint import FORMAT, save_checkpoint
from runtime.page import REFUSED, WAITING

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
    linear = dataclasses.replace(TINY, decoder="linear")
    state = {"format": FORMAT, "config": dataclasses.asdict(linear), "ema": PixNerd(linear).state_dict()}
    save_checkpoint(folder / "linear.pt", state)
    (folder / "temporary").mkdir()
    command = [sys.executable, "-c", SERVER, ROOT, folder / "asked", "--ckpt", f"{folder}/text.pt,{folder}/tiny.pt"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder / "temporary")}
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        environment.pop(name, None)
    log = open(folder / "log", "w+")
    command += ["--port", str(free_port()), "--device", "cpu", "--baseline", folder / "linear.pt", "--limit", "60"]
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

    def open_window(width=1280, **how):
        page = browser.new_page(viewport={"width": width, "height": 900}, **how)
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


# Texts with less contrast to what is behind them than WCAG 2 asks for at level AA, switched-off controls aside.
FAINT = """() => {
  const brush = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = color => {
    brush.clearRect(0, 0, 1, 1);
    brush.fillStyle = color;
    brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data];
  };
  const luminance = color => {
    const [r, g, b] = rgba(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = part => {
    const color = getComputedStyle(part).backgroundColor;
    return rgba(color)[3] == 255 || !part.parentElement ? color : behind(part.parentElement);
  };
  const read = part => part.offsetParent && !part.closest(":disabled") && !["checkbox", "range"].includes(part.type)
    && (part.value || [...part.childNodes].some(node => node.nodeType == 3 && node.textContent.trim()));
  return [...document.querySelectorAll("body *")].filter(read).flatMap(part => {
    const [low, high] = [luminance(getComputedStyle(part).color), luminance(behind(part))].sort((a, b) => a - b);
    const contrast = (high + 0.05) / (low + 0.05);
    return contrast < 4.5 ? [`${contrast.toFixed(2)}: ${part.outerHTML.slice(0, 200)}`] : [];
  });
}"""


def status(page, pattern):
    """Waits until the status line matches; returns it."""
    script = "pattern => new RegExp(pattern).test(document.querySelector('#status textarea, #status input').value)"
    page.wait_for_function(script, arg=pattern)
    return page.locator("#status textarea, #status input").first.input_value()


def choose(page, name, text):
    """Chooses from a list the entry of this name, or of the file of this name."""
    box = page.locator(f"#{name} input").first
    box.click()
    option = page.get_by_role("option", name=re.compile(rf"(^|[/\s]){re.escape(text)}$")).first
    if name != "ckpt":
        return option.click()
    with page.expect_response(lambda response: "/run/predict" in response.url):  # which changes other controls
        option.click()
    page.wait_for_timeout(500)


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


def stop(page):
    """Presses Stop, and sees that the status says so in the end: the job's own last words may still be under way."""
    press(page, "stop")
    page.wait_for_timeout(1000)
    status(page, "Stopped")


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


def join(page, button, values):
    """Presses a button as another browser does, whose controls have these values: the server's answer."""
    config = page.request.get(page.url + "config").json()
    (number,) = [part["id"] for part in config["components"] if part["props"].get("elem_id") == button]
    (first,) = [job["id"] for job in config["dependencies"] if [number, "click"] in job["targets"]]
    (job,) = [job["id"] for job in config["dependencies"] if job["trigger_after"] == first]
    asked = {"data": values, "fn_index": job, "session_hash": os.urandom(8).hex(), "trigger_id": number}
    return page.request.post(page.url + "gradio_api/queue/join", data=asked)


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
    kept = json.loads(film.info["comment"])
    assert kept["steps"] == 50 and kept["solver"] == ["euler", "adams"]
    last = page.get_attribute("#frame img", "src")
    fill(page, "moment", "10")
    page.wait_for_function("last => document.querySelector('#frame img').src != last", arg=last)
    page.get_by_text("Step 10, time 0.20").wait_for()


def test_a_picture_that_is_alone_is_shown_whole(visit):
    page = visit()
    fill(page, "num", "1")
    draw(page)
    page.wait_for_timeout(500)
    hidden = "box => box.scrollHeight - box.clientHeight"
    assert page.eval_on_selector("#gallery .grid-wrap", hidden) <= 1


def test_the_downloaded_sheet_keeps_its_settings(visit):
    page = visit()
    fill(page, "seed", "7")
    assert len(draw(page)) == 4
    with page.expect_download() as download:
        page.click("#sheet")
    assert download.value.suggested_filename == "pixnerd.png"
    sheet = Image.open(download.value.path())
    assert json.loads(sheet.text["settings"])["seed"] == 7 and sheet.size == (38, 38)


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
    assert "“Row” takes a whole number from 0 to 3" in status(page, "Not done")


def test_the_linear_baseline_stands_beside_the_field_where_their_models_are_alike(visit):
    page = visit()
    tab(page, "Look inside")
    widths = []
    for name in ("emoji", "tiny.pt"):
        choose(page, "ckpt", name)
        page.wait_for_function("name => document.querySelector('#ckpt input').value.endsWith(name)", arg=name)
        unfold(page, "Solver and guidance")
        fill(page, "steps", "3")
        unfold(page, "Solver and guidance")
        press(page, "look")
        status(page, "Done")
        source = page.get_attribute("#densities img", "src")
        widths.append(Image.open(io.BytesIO(page.request.get(source).body())).width)
    assert 3 * 192 < widths[0] < 4 * 192 < widths[1]


def test_nonsense_is_answered_by_a_sentence(visit):
    page = visit()
    # A number's box takes no "x", so that it is empty; an "e" may belong to a number.
    for letters in ("x", "12e"):
        page.locator("#seed input").click()
        page.keyboard.press("Control+A")
        page.keyboard.press("Backspace")
        page.keyboard.type(letters)
        press(page, "draw")
        assert "“Seed” takes a whole number" in status(page, "Not done")
    fill(page, "seed", "1")
    choose(page, "ckpt", "emoji")
    unfold(page, "Size of the pictures")
    for name, most in (("rows", "8"), ("columns", "8"), ("pixels", "32")):
        fill(page, name, "1000000000")
        assert page.locator(f"#{name} input[type=number]").input_value() == most
    unfold(page, "Solver and guidance")
    fill(page, "num", "16")
    fill(page, "steps", "100")
    choose(page, "solver", "heun")  # 18 TFLOP, on one core
    press(page, "draw")
    sentence = "Not done: this would take about [0-9,]+ s, and a job may take 60 s: lower “Steps”, .*$"
    assert "“Number of pictures” or “Pixels along a patch”" in status(page, sentence)
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
    stop(second)
    choose(second, "solver", "euler")
    assert len(draw(second)) == 4


def test_a_job_says_that_it_waits_and_a_full_queue_refuses_jobs_alone(visit):
    """Catches: Stop and the choice of a model that wait for a place in the queue, and are refused with the jobs."""
    first, second = visit(), visit()
    endless(first)
    press(second, "draw")
    status(second, WAITING)
    stop(second)
    answers = [join(second, "patch", [None, 0, 0, 0]).status for _ in range(9)]  # which end as soon as they start
    assert answers == [200] * 8 + [503]
    press(second, "draw")
    status(second, REFUSED)
    choose(second, "ckpt", "emoji")
    second.wait_for_function("document.querySelector('#class input').value.includes('smileys')")
    stop(first)
    unfold(second, "Solver and guidance")
    fill(second, "steps", "3")
    assert len(draw(second)) == 4


def test_the_page_is_served_to_this_machine_alone_and_no_file_of_it(visit, site):
    address, folder = site
    port = int(re.search(r":([0-9]+)", address)[1])
    for host, answers in (("127.0.0.1", True), ("127.0.0.2", False), (socket.gethostname(), False)):
        try:  # 127.0.0.2 is this machine too: a server at 0.0.0.0 answers there
            socket.create_connection((socket.gethostbyname(host), port), 5).close()
            assert answers or socket.gethostbyname(host) == "127.0.0.1", host
        except OSError:
            assert not answers, host
    page = visit()
    for path in ("/etc/passwd", ROOT / "README.md", folder / "tiny.pt", "tiny.pt", f"{folder}/temporary/../tiny.pt"):
        assert page.request.get(f"{address}gradio_api/file={path}").status == 403, path


def test_texts_stand_out_from_what_is_behind_them(visit):
    for scheme in ("light", "dark"):
        page = visit(color_scheme=scheme)
        unfold(page, "Solver and guidance")
        unfold(page, "Size of the pictures")
        assert draw(page).any()
        for name in ("Draw", "Watch", "Look inside"):
            tab(page, name)
            page.wait_for_timeout(500)  # colours change slowly
            assert page.evaluate(FAINT) == [], (scheme, name)


def test_controls_have_labels_and_nothing_overflows_on_a_phone(visit):
    for width in (1280, 390):
        page = visit(width)
        unfold(page, "Solver and guidance")
        unfold(page, "Size of the pictures")
        for name, job, part in (("Draw", "draw", "sheet"), ("Watch", "watch", "film"), ("Look inside", "look", "map")):
            tab(page, name)
            if name == "Look inside":
                choose(page, "ckpt", "emoji")
                page.wait_for_function("document.querySelector('#class input').value.includes('smileys')")
                fill(page, "steps", "6")
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
