"""sample.py with sentences: prompts, negative prompts, files of prompts, and the folders that evaluators read."""

import io
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, complaint, run_script, text_state
from PIL import Image

from runtime import models
from runtime.checkpoint import save_checkpoint
from runtime.files import UserError
from runtime.prompts import Prompt, check_layout, draw_layout, open_encoder, read_prompts, shared_noise, title_of
from runtime.sample_options import parse_args, suit
from text_model import PRESETS

FAST = ["--steps", "2", "--device", "cpu", "--precision", "fp32", "--compile", "off"]


@pytest.fixture
def ckpt(tmp_path):
    """A tiny text model in a file of ours, not trained, whose output depends on the text."""
    save_checkpoint(tmp_path / "text.pt", text_state())
    return tmp_path / "text.pt"


def draw(ckpt, out, *flags):
    status, stdout, stderr = run_script("sample.py", "--ckpt", ckpt, "--out", out, *FAST, *flags)
    assert status == 0, stderr
    return stdout


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_a_prompt_is_drawn_and_kept_in_the_file_with_its_settings(ckpt, tmp_path):
    draw(ckpt, tmp_path / "a.png", "--prompt", "red apple", "--prompt", "blue dog", "--num", 2)
    settings = json.loads(Image.open(tmp_path / "a.png").text["settings"])
    assert settings["prompt"] == ["red apple", "blue dog"] and settings["solver"] == ["adams"]
    assert (settings["cfg"], settings["shift"], settings["interval"]) == (2.5, 2.0, [0.0, 1.0])  # of small pictures
    (tmp_path / "list.txt").write_text("red apple\n")
    draw(ckpt, tmp_path / "b.png", "--prompts", tmp_path / "list.txt", "--num", 1)
    settings = json.loads(Image.open(tmp_path / "b.png").text["settings"])
    assert (settings["prompts"], settings["ckpt"]) == ("list.txt", "text.pt")  # and nothing of its maker's disk


def test_a_large_text_model_draws_as_the_released_demo():
    """REFERENCE: Adams of order 2, 25 steps, shift 3, guidance 4 at 0 < t < 1."""
    args = parse_args(["--prompt", "x"])
    suit(args, PRESETS["XXL"])
    drawn = (args.ckpt, args.solver, args.order, args.steps, args.shift, args.cfg, args.interval, args.temperature)
    assert drawn == ("xxl", ["adams"], 2, 25, 3.0, 4.0, [0.0, 1.0], 1.0)


def test_a_film_of_a_prompt_ends_with_its_picture(ckpt, tmp_path):
    """One frame for each time, the first step included, which guidance leaves alone."""
    draw(ckpt, tmp_path / "a.png", "--prompt", "red apple", "--num", 1, "--gif", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film:
        assert film.n_frames == 3 and json.loads(film.info["comment"])["prompt"] == ["red apple"]
        film.seek(2)
        frame = np.asarray(film.convert("RGB")).astype(int)
    small = frame[2:-2, 2:-2][16::32, 16::32]  # the middle of each pixel, which is 32 x 32 there
    assert small.shape == (16, 16, 3)
    assert np.abs(small - pixels(tmp_path / "a.png")[2:-2, 2:-2]).mean() < 4  # a GIF has 256 colours


def test_words_change_the_picture_and_a_batch_does_not(ckpt, tmp_path):
    """Each prompt's image from the same number; what shares a batch with it changes nothing visible."""
    for batch in (1, 8):
        draw(
            ckpt, tmp_path / f"{batch}", "--prompt", "red apple", "--prompt", "blue", "--num", 2, "--batch-size", batch
        )
    names = sorted(path.name for path in (tmp_path / "8").iterdir())
    assert names == ["00000-red-apple.png", "00001-red-apple.png", "00002-blue.png", "00003-blue.png"]
    one, eight = ([pixels(tmp_path / f"{batch}" / name).astype(int) for name in names] for batch in (1, 8))
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(one, eight))
    draw(ckpt, tmp_path / "other", "--prompt", "green apple", "--num", 1)
    assert np.abs(pixels(tmp_path / "other" / "00000-green-apple.png").astype(int) - eight[0]).max() > 1


def test_the_empty_prompt_is_the_null_condition_so_guidance_changes_nothing(ckpt, tmp_path):
    for scale in (1, 4):
        draw(ckpt, tmp_path / f"{scale}.png", "--prompt", "", "--num", 1, "--cfg", scale)
    assert np.abs(pixels(tmp_path / "1.png").astype(int) - pixels(tmp_path / "4.png")).max() <= 1


def test_a_negative_prompt_takes_the_place_of_the_empty_one(ckpt, tmp_path):
    """Guided away from itself a prompt is drawn unguided; away from another, it is another picture."""
    for name, negative, scale in (("same", "red apple", 4), ("unguided", None, 1), ("other", "blue dog", 4)):
        flags = ["--negative", negative] if negative else []
        draw(ckpt, tmp_path / f"{name}.png", "--prompt", "red apple", "--num", 1, "--cfg", scale, *flags)
    same, unguided, other = (pixels(tmp_path / f"{name}.png").astype(int) for name in ("same", "unguided", "other"))
    assert np.abs(same - unguided).max() <= 1 < np.abs(other - unguided).max()


def test_resolution_keeps_the_tokens_of_a_text_model(ckpt, tmp_path):
    """As the released any-resolution model: 2 x 2 tokens whatever the size, so 32 pixels are an --upscale of 2."""
    draw(ckpt, tmp_path / "a.png", "--prompt", "red", "--num", 1, "--resolution", "32x48")
    draw(ckpt, tmp_path / "b.png", "--prompt", "red", "--num", 1, "--upscale", "2x3")
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))
    assert "multiples of 2" in complaint("sample.py", "--ckpt", ckpt, "--prompt", "x", "--resolution", "33")


def test_text_features_are_computed_once_and_not_per_step(ckpt, tmp_path, monkeypatch):
    from pretrained.text_encoders import Words

    calls, encode = [], Words.encode
    monkeypatch.setattr(Words, "encode", lambda self, texts: calls.append(texts) or encode(self, texts))
    draw(ckpt, tmp_path / "a.png", "--prompt", "red apple", "--num", 2, "--steps", 4, "--batch-size", 1)
    assert calls == [[""], ["red apple"]]


HOSTILE = ["", "  ", "word " * 2000, "красное яблоко リンゴ", "🍎🍏", "\x00\x07\n\r\t", "../../x", "a/b\\c", "." * 300]


@pytest.mark.parametrize("prompt", HOSTILE)
def test_every_prompt_is_drawn_inside_the_folder(ckpt, tmp_path, prompt):
    draw(ckpt, tmp_path / "out", "--prompt", prompt, "--num", 1)
    assert len(list((tmp_path / "out").iterdir())) == 1 and {p.name for p in tmp_path.iterdir()} == {"out", "text.pt"}
    draw(ckpt, tmp_path / "grid.png", "--prompt", prompt, "--prompt", "x", "--num", 1)
    assert len(title_of(prompt)) <= 40 and title_of(prompt).isprintable()


@pytest.mark.parametrize(
    "prompt, title",
    [
        ("a red apple", "a red apple"),
        ("a cat that sits on a red mat and looks at a dog", "a cat that sits on a red mat and ..."),
        ("Donaudampfschifffahrtsgesellschaftskapitän", "Donaudampfschifffahrtsgesellschaftsk ..."),
        ("a " + "x" * 50, "a " + "x" * 34 + " ..."),
        ("一只猫坐在红色的垫子上" * 5, ("一只猫坐在红色的垫子上" * 5)[:36] + " ..."),
        ("two\nlines", "two lines"),
    ],
)
def test_a_title_is_cut_after_a_word_or_within_a_long_one(prompt, title):
    assert title_of(prompt) == title and len(title) <= 40


def test_the_released_text_model_is_downloaded_and_asks_for_its_encoder(server, golden, tmp_path, monkeypatch):
    """From a server of this machine, with the golden file's weights: its names, its place, and Qwen3 by name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    weights = {key[2:]: tensor for key, tensor in golden("t2i_plain").items() if key.startswith("w.")}
    content = io.BytesIO()
    torch.save({"state_dict": {f"ema_denoiser.{key}": tensor for key, tensor in weights.items()}}, content)
    server.body, file = content.getvalue(), golden("t2i_plain")
    monkeypatch.setattr(models, "RELEASED_FILES", {"xxl": (server.url.replace("weights.pth", "model.ckpt"), 64)})
    model = models.find_model("xxl")
    assert (tmp_path / "cache" / "hub" / "checkpoints" / "pixnerd-xxl" / "model.ckpt").exists()
    assert model.config.resolution == 64 and model.class_names is None
    v = model(file["x"], file["t"], file["y"])
    assert (v - file["v"]).norm() < 1e-5 * file["v"].norm()
    with pytest.raises(UserError, match="--ckpt xxl reads the text features of qwen3, not those of words"):
        open_encoder(model, "words", None, "xxl", "cpu")


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "say what to draw with --prompt"),
        (["--class", "3"], "--class is not for --ckpt"),
        (["--npz", "a.npz", "--prompt", "x"], "--npz is not for --ckpt"),
        (["--prompt", "x", "--negative", "y", "--cfg", "1"], "--negative does nothing without guidance"),
        (["--prompt", "x", "--prompts", "y"], "--prompt and --prompts both say what to draw"),
        (["--prompt", "x", "--layout", "dpg"], "--layout needs --prompts"),
        (["--prompts", "nowhere.txt"], "--prompts nowhere.txt cannot be read"),
        (["--list-classes"], "knows no classes: use --prompt"),
        (["--prompt", "x", "--text-encoder", "nowhere"], "--text-encoder nowhere: there is no such folder"),
        (["--prompt", "x", "--text-encoder", "qwen3"], "reads the text features of words, not those of qwen3"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(ckpt, flags, message):
    assert message in complaint("sample.py", "--ckpt", ckpt, *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--negative blurry", "--ckpt xxl reads sentences: say what to draw with --prompt"),
        ("--text-encoder nowhere", "--ckpt xxl reads sentences: say what to draw with --prompt"),
        ("--prompt x --class 3", "--class is not for --ckpt xxl"),
        ("--prompt x --text-encoder nowhere", "--text-encoder nowhere: there is no such folder"),
        ("--prompt x --text-encoder words", "reads the text features of qwen3, not those of words"),
        ("--prompt x --resolution 33", "--resolution 33"),
        ("--prompt x", "Qwen3 needs the package transformers"),
        ("--prompts nowhere.txt", "--prompts nowhere.txt cannot be read"),
        ("--prompts {list} --layout dpg --num 3", "takes 4 images of each prompt"),
        ("--ckpt xl --prompt x", "--prompt is not for --ckpt xl, which knows classes"),
        ("--class gibberish", "--class 'gibberish' is unknown"),
    ],
)
def test_flags_are_checked_before_a_released_model_is_downloaded(tmp_path, monkeypatch, flags, message):
    """Gigabytes later would be late. Without transformers, as on a new machine."""

    def download(*arguments, **how):
        raise AssertionError("a download before the flags were checked")

    monkeypatch.setattr(models, "cached_download", download)
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "list.txt").write_text("a cat\n")
    words = flags.format(list=tmp_path / "list.txt").split()
    out = tmp_path / ("out" if "--layout" in words else "out.png")
    assert message in complaint("sample.py", *words, "--out", out)


def test_a_model_of_a_small_qwen3_asks_for_its_folder(tmp_path):
    state = text_state()
    save_checkpoint(tmp_path / "text.pt", state | {"config": state["config"] | {"text_encoder": "qwen3-32x2"}})
    line = complaint("sample.py", "--ckpt", tmp_path / "text.pt", "--prompt", "x")
    assert "text.pt reads the text features of qwen3-32x2: give that Qwen3's folder with --text-encoder" in line


def test_a_prompt_is_refused_by_a_model_of_classes():
    for flags in (["--prompt", "x"], ["--negative", "x"], ["--prompts", "x"]):
        line = complaint("sample.py", "--ckpt", "emoji", *flags)
        assert f"{flags[0]} is not for --ckpt emoji, which knows classes: use --class" in line


# ---- files of prompts ------------------------------------------------------------------------------------------------


def test_prompts_come_from_lines_json_and_folders(tmp_path):
    (tmp_path / "a.txt").write_text("red apple\n\n  blue dog \n", encoding="utf-8")
    assert [prompt.text for prompt in read_prompts(tmp_path / "a.txt")] == ["red apple", "blue dog"]
    line = '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}'
    (tmp_path / "b.jsonl").write_text(line + "\n" + '{"id": "whoops7", "prompt": "a red hat"}\n')
    first, second = read_prompts(tmp_path / "b.jsonl")
    assert first == Prompt("a photo of two cats", "00000", line) and second.id == "whoops7"
    (tmp_path / "c").mkdir()
    for name in ("2", "whoops1"):
        (tmp_path / "c" / f"{name}.txt").write_text(f"prompt {name}\n")
    assert [(prompt.id, prompt.text) for prompt in read_prompts(tmp_path / "c")] == [
        ("2", "prompt 2"),
        ("whoops1", "prompt whoops1"),
    ]


def test_only_a_line_feed_ends_a_line_and_a_byte_order_mark_is_none_of_the_text(tmp_path):
    """JSON may hold U+2028 as it is, where Python's splitlines breaks; Windows' editors write a mark and CR LF."""
    line = '{"prompt": "red\u2028apple"}'
    (tmp_path / "a.JSONL").write_bytes(f"\ufeff{line}\r\n".encode())
    assert read_prompts(tmp_path / "a.JSONL") == [Prompt("red\u2028apple", "00000", line)]
    (tmp_path / "b.txt").write_bytes("\ufeffred apple\r\nblue\x0bdog\n".encode())
    assert [prompt.text for prompt in read_prompts(tmp_path / "b.txt")] == ["red apple", "blue\x0bdog"]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "7.TXT").write_bytes("\ufeffred\napple\n".encode())
    assert read_prompts(tmp_path / "c")[0].text == "red apple"


SHARED = ROOT.parent / "shared" / "prompts"


@pytest.mark.skipif(not SHARED.exists(), reason="the authors' lists of prompts are not in the repository")
def test_the_benchmarks_own_lists_are_read_and_fit_their_layouts(tmp_path):
    """REFERENCE: 553 and 1,065 prompts; each line of GenEval's as it stands in the file, each id of DPG's a name."""
    geneval, dpg = (read_prompts(SHARED / name) for name in ("geneval_metadata.jsonl", "dpg_prompts.jsonl"))
    assert (len(geneval), len(dpg)) == (553, 1065)
    assert "".join(f"{prompt.line}\n" for prompt in geneval) == (SHARED / "geneval_metadata.jsonl").read_text("utf-8")
    check_layout("geneval", geneval, 4, tmp_path / "geneval")
    check_layout("dpg", dpg, 4, tmp_path / "dpg")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"prompt": "x"}\n{"prompt": ', "a.jsonl, line 2, is not a JSON object"),
        ("a.jsonl", b'\n\n["x"]', "line 3, is not a JSON object"),
        ("a.jsonl", b'{"prompt": "x"}\n' + b"[" * 100_000, "line 2, is not a JSON object"),  # too deep for Python
        ("a.jsonl", b'{"prompt": 7}', "line 1: its prompt is missing, no text, or blank"),
        ("a.jsonl", b'{"id": "x"}', "line 1: its prompt is missing, no text, or blank"),
        ("a.jsonl", b'{"id": 1.5, "prompt": "x"}', "line 1: the id 1.5 is neither a text nor a whole number"),
        ("a.jsonl", b'{"id": ["x"], "prompt": "x"}', 'the id ["x"] is neither a text nor a whole number'),
        ("a.jsonl", b'{"id": true, "prompt": "x"}', "the id true is neither a text nor a whole number"),
        ("a.txt", b"\n \n", "holds no prompt"),
        ("a.txt", "Äpfel".encode("latin-1"), "a.txt is not a text in UTF-8"),
        ("a.txt", "apple".encode("utf-16-le"), "a.txt is not a text in UTF-8"),
    ],
)
def test_a_broken_file_of_prompts_is_told_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_prompts(tmp_path / name)
    assert message in str(caught.value)


def test_a_broken_prompt_of_a_folder_is_named(tmp_path):
    for content, message in ((b" \n", "7.txt is empty"), ("Äpfel".encode("latin-1"), "7.txt is not a text in UTF-8")):
        (tmp_path / "7.txt").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_prompts(tmp_path)


# ---- layouts ---------------------------------------------------------------------------------------------------------


class Alone:
    """A process without others; `rank` of `world` only by name."""

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world

    def barrier(self):
        pass


def flat(text, watch):
    """Four pictures of 2 x 2 pixels, of a colour that depends on the prompt and the sample."""
    watch(1)
    return torch.tensor([len(text) + k for k in range(4)], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_noise_of_the_benchmarks_is_the_released_one(golden):
    file = golden("t2i_layouts")
    noise = shared_noise(0, [0, 1], (4, 6))
    assert torch.equal(noise, torch.stack([file["noise_seed0"], file["noise_seed1"]]))


def test_geneval_finds_its_lines_and_its_samples(tmp_path):
    """DIR/<digits>/metadata.jsonl holds the line unchanged, DIR/<digits>/samples/<digits>.png the pictures."""
    with np.load(pathlib.Path(__file__).parent / "golden" / "t2i_layouts.npz") as archive:
        (tmp_path / "list.jsonl").write_text(str(archive["metadata"]))
    prompts = read_prompts(tmp_path / "list.jsonl")
    assert draw_layout("geneval", prompts, 4, tmp_path / "out", flat, {"steps": 1}, 1, Alone()) == 8
    expected = {f"0000{i}/samples/000{k}.png" for i in range(2) for k in range(4)}
    assert files(tmp_path / "out") == expected | {"00000/metadata.jsonl", "00001/metadata.jsonl"}
    lines = (tmp_path / "list.jsonl").read_text().splitlines()
    assert [(tmp_path / "out" / f"0000{i}" / "metadata.jsonl").read_text() for i in range(2)] == [
        line + "\n" for line in lines
    ]
    assert pixels(tmp_path / "out" / "00001" / "samples" / "0002.png")[0, 0, 0] == len(prompts[1].text) + 2


def test_dpg_finds_one_sheet_of_two_by_two_and_nothing_else(tmp_path):
    prompts = [Prompt("a red hat", "12", ""), Prompt("two dogs", "whoops7", "")]
    draw_layout("dpg", prompts, 4, tmp_path / "out", flat, {"steps": 1}, 1, Alone())
    assert files(tmp_path / "out") == {"12.png", "whoops7.png"}
    assert pixels(tmp_path / "out" / "12.png")[..., 0].tolist() == [[9, 9, 10, 10]] * 2 + [[11, 11, 12, 12]] * 2


def test_processes_share_the_prompts_and_a_second_run_draws_what_is_missing(tmp_path):
    prompts, drawn = [Prompt("x" * i, str(i), "") for i in range(1, 8)], []

    def draw(text, watch):
        drawn.append(text)
        return flat(text, watch)

    for rank in range(3):
        draw_layout("dpg", prompts, 4, tmp_path / "three", draw, {"steps": 1}, 1, Alone(rank, 3))
    assert sorted(drawn) == [prompt.text for prompt in prompts]
    draw_layout("dpg", prompts, 4, tmp_path / "one", flat, {"steps": 1}, 1, Alone())
    for name in files(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    (tmp_path / "three" / "5.png").unlink()
    drawn.clear()
    draw_layout("dpg", prompts, 4, tmp_path / "three", draw, {"steps": 1}, 1, Alone())
    assert drawn == ["xxxxx"]
    with pytest.raises(UserError, match="was begun with steps=1, and this run has 2"):
        draw_layout("dpg", prompts, 4, tmp_path / "three", draw, {"steps": 2}, 1, Alone())


def test_a_layout_is_resumed_with_the_prompts_that_it_was_begun_with(tmp_path):
    """In whatever file they stand: pictures of two lists in one folder would be measured as if of one."""
    prompts = [Prompt("a red hat", "12", '{"prompt": "a red hat"}'), Prompt("two dogs", "7", '{"prompt": "two dogs"}')]

    def resume(prompts, file="list.jsonl", batch_size=32):
        settings = {"steps": 1, "prompts": file, "batch_size": batch_size}
        return draw_layout("geneval", prompts, 4, tmp_path / "out", flat, settings, 1, Alone())

    resume(prompts)
    resume(prompts, "moved.jsonl", 8)  # neither changes a picture
    line = (tmp_path / "out" / "00001" / "metadata.jsonl").read_text()
    for other in (
        prompts[::-1],
        prompts[:1],
        [prompts[0], Prompt("two cats", "7", prompts[1].line)],
        [prompts[0], Prompt("two dogs", "8", prompts[1].line)],
        [prompts[0], Prompt("two dogs", "7", '{"tag": "counting", "prompt": "two dogs"}')],
    ):
        with pytest.raises(UserError, match="out was begun with prompts='a list of 2 with SHA-256"):
            resume(other)
    (tmp_path / "out" / "00001" / "metadata.jsonl").unlink()
    resume(prompts)
    assert (tmp_path / "out" / "00001" / "metadata.jsonl").read_text() == line


def test_a_layout_from_the_command_line_is_resumed_to_the_same_bytes(ckpt, tmp_path):
    (tmp_path / "list.txt").write_text("red apple\nblue dog\n")
    flags = ["--prompts", tmp_path / "list.txt", "--layout", "geneval"]
    draw(ckpt, tmp_path / "a", *flags)
    before = {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")}
    assert len(before) == 10 and json.loads(before["00001/metadata.jsonl"]) == {"prompt": "blue dog"}
    (tmp_path / "a" / "00001" / "samples" / "0003.png").unlink()
    draw(ckpt, tmp_path / "a", *flags)
    assert {name: (tmp_path / "a" / name).read_bytes() for name in files(tmp_path / "a")} == before


@pytest.mark.slow
def test_two_processes_write_a_layout_as_one_does(ckpt, tmp_path):
    """By torchrun, to the byte: each prompt is drawn by one of them, its samples in one batch."""
    (tmp_path / "list.txt").write_text("red apple\nblue dog\ngreen cat\n")
    flags = ["--ckpt", ckpt, "--prompts", tmp_path / "list.txt", "--layout", "dpg", *FAST]
    for number in (1, 2):
        script = [ROOT / "sample.py", *flags, "--out", tmp_path / f"{number}"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", "--"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(word) for word in launch + script], capture_output=True, text=True, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr
    one, two = ({name: (tmp_path / n / name).read_bytes() for name in files(tmp_path / n)} for n in "12")
    assert one == two and len(one) == 3
    assert (tmp_path / "1.settings.json").read_text() == (tmp_path / "2.settings.json").read_text()


def test_what_an_evaluator_could_not_read_is_refused_before_drawing(tmp_path):
    prompts = [Prompt("x", "1", "")]
    for layout, prompts, num, out, message in (
        ("dpg", prompts, 3, "out", "takes 4 images of each prompt"),
        ("dpg", [Prompt("x", "a.b", "")], 4, "out", "'a.b' is no file name without a dot"),
        ("dpg", [Prompt("x", "../a", "")], 4, "out", "is no file name"),
        ("dpg", [Prompt("x", "\ud800", "")], 4, "out", "is no file name"),
        ("dpg", [Prompt("x", "象" * 90, "")], 4, "out", "is no file name"),  # 270 bytes
        ("dpg", prompts * 2, 4, "out", "is there twice"),
        ("geneval", prompts, 4, "out.png", "writes a folder"),
    ):
        with pytest.raises(UserError, match=message):
            check_layout(layout, prompts, num, tmp_path / out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="full holds other files"):
        draw_layout("dpg", prompts, 4, tmp_path / "full", flat, {}, 1, Alone())
