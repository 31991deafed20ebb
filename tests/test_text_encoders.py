"""Text encoders: the words of the embedded one, the released encoder's numbers, and what goes wrong with folders."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import ROOT
from pretrained.released import import_reference
from pretrained.text_encoders import fit_encoder, load_text_encoder, word_vector, words
from runtime.files import UserError
from text_model import TextPixNerd, TextPixNerdConfig

GOLDEN = ROOT / "tests" / "golden" / "t2i_text.npz"


def error(got, expected):
    """norm(got - expected) / norm(expected), in which the tolerances of the golden files are given."""
    got = got.cpu()
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def emoji_names():
    with np.load(ROOT / "assets" / "noto_emoji_64.npz") as archive:
        return sorted({str(name) for name in archive["names"]})


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Red Apple", "red apple"),
        ("  Piñata, 2 o’clock! ", "pinata 2 oclock"),
        ("family: man, woman, boy", "family man woman boy"),
        ("see-no-evil monkey", "see no evil monkey"),
        ("keycap: *", "keycap *"),
        ("1984", "1984"),
        ("STRASSE straße", "strasse strasse"),
        ("🍎🐶", "🍎 🐶"),
        ("日本 é", "日本 e"),
        ("\x00\t\n\ud800...", ""),
    ],
)
def test_words_of_a_text(text, expected):
    """Case, accents and punctuation do not matter, symbols do."""
    assert words(text) == expected.split()


def test_a_word_has_one_vector_for_ever():
    """Checkpoints know words by these very numbers. Catches a dependence on torch's generator or Python's hash."""
    first = word_vector("apple", 64)[:6].tolist()
    assert first == pytest.approx([1.10131, -1.10131, 1.58061, 1.58061, 0.68664, -1.10131], abs=1e-5)
    assert word_vector("apple", 64).norm().item() == pytest.approx(8)
    assert word_vector("apple", 12).shape == (12,)


def test_encoding_puts_words_in_their_order_and_zeros_after_them():
    encoder = load_text_encoder("words")
    y = encoder.encode(["red apple", "", "Apple, red!", "red " * 40])
    assert (encoder.name, encoder.width, encoder.length) == ("words", 64, 16)
    assert y.shape == (4, 16, 64) and y.dtype == torch.float32
    red, apple = word_vector("red", 64), word_vector("apple", 64)
    assert torch.equal(y[0, :2], torch.stack([red, apple])) and not y[0, 2:].any()
    assert torch.equal(y[2, :2], torch.stack([apple, red]))
    assert torch.equal(y[1], encoder.null) and not encoder.null.any()
    assert torch.equal(y[3], red.expand(16, 64))  # cut
    assert torch.equal(encoder.encode(["red apple"])[0], y[0])  # whatever the batch
    assert load_text_encoder("words", width=12, length=3).encode(["a b c d"]).shape == (1, 3, 12)


def test_the_names_of_the_emoji_fit_and_stay_apart():
    """Catches: a length that cuts names, and punctuation whose loss makes two of them one."""
    names = emoji_names()
    assert max(len(words(name)) for name in names) <= load_text_encoder("words").length
    assert len({tuple(words(name)) for name in names}) == len(names) == 1905


@pytest.mark.slow
def test_known_words_stay_apart_and_an_unknown_one_is_near_its_spelling():
    """Of the emoji's words, no two are closer than 0.85; three plurals in four lie nearest to their singular."""
    known = sorted({word for name in emoji_names() for word in words(name)})
    vectors = torch.stack([word_vector(word, 64) for word in known]) / 8
    assert ((vectors @ vectors.T).fill_diagonal_(0)).max() < 0.85
    singulars = [word for word in known if len(word) > 3 and f"{word}s" not in known]
    plurals = torch.stack([word_vector(f"{word}s", 64) for word in singulars]) / 8
    nearest = (plurals @ vectors.T).argmax(1).tolist()
    assert np.mean([known[i] == word for i, word in zip(nearest, singulars)]) > 0.75


# ---- a model and its encoder -----------------------------------------------------------------------------------------


def tiny_model(**changes):
    sizes = dict(resolution=16, patch_size=4, hidden_size=32, num_heads=2, text_depth=1, depth=1, field_depth=1)
    return TextPixNerd(
        TextPixNerdConfig(**(dict(text_encoder="words", text_width=8, text_length=4, field_width=8) | sizes | changes))
    )


class Encoder:
    """An encoder of which only the empty text matters."""

    name, width, length = "other", 8, 4

    def __init__(self, null):
        self.null = null


def test_a_model_gets_the_null_features_of_its_encoder_once():
    model, null = tiny_model(text_encoder="other"), torch.randn(4, 8)
    fit_encoder(model, Encoder(null), "x.pt")
    assert torch.equal(model.null_features, null)
    fit_encoder(model, Encoder(1.01 * null), "x.pt")  # the rounding of another machine
    assert torch.equal(model.null_features, null)
    with pytest.raises(UserError, match="x.pt was trained with other weights of other"):
        fit_encoder(model, Encoder(torch.randn(4, 8)), "x.pt")


def test_another_encoder_than_a_models_own_is_refused_by_name():
    for change, message in (
        ({"text_encoder": "qwen3"}, "x.pt reads the text features of qwen3, not those of words"),
        ({"text_width": 12}, "x.pt reads text features of width 12, and words gives 8"),
        ({"text_length": 5}, "x.pt reads text features of length 5, and words gives 4"),
    ):
        with pytest.raises(UserError, match=message):
            fit_encoder(tiny_model(**change), load_text_encoder("words", 8, 4), "x.pt")
    fit_encoder(tiny_model(), load_text_encoder("words", 8, 4), "x.pt")


# ---- Qwen3 -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def text_file():
    with np.load(GOLDEN) as archive:
        file = {key: torch.from_numpy(archive[key]) for key in archive.files if archive[key].dtype.kind in "fi"}
        return file | {"texts": [str(text) for text in archive["texts"]]}


def test_qwen3_gives_the_released_encoders_features(qwen3_folder, text_file, device):
    """Tokens, padding, final norm; and of the empty text those without a mask, alone and among others."""
    encoder = load_text_encoder(str(qwen3_folder), length=10, device=device)
    assert (encoder.name, encoder.width, encoder.length) == ("qwen3-32x2", 32, 10)
    tokens = encoder.tokenizer([*text_file["texts"], ""], padding="max_length", truncation=True, max_length=10)
    assert tokens["input_ids"] == text_file["ids"].tolist() and tokens["attention_mask"] == text_file["mask"].tolist()
    assert error(encoder.encode(text_file["texts"]), text_file["cond_bf16"]) < 2e-2
    assert error(encoder.null.expand(3, -1, -1), text_file["null_bf16"]) < 2e-2
    encoder.model.float()  # the golden float32 features, to a tolerance that shows every difference
    assert error(encoder.encode(text_file["texts"]), text_file["cond"]) < 1e-5
    assert error(encoder.encode([""])[0], text_file["null"]) < 1e-5
    assert error(encoder.encode([text_file["texts"][0], ""])[1], text_file["null"]) < 1e-5


@pytest.mark.parametrize("width, name", [(40, "padded"), (26, "cut")])
def test_qwen3_of_another_width_is_padded_or_cut_as_released(qwen3_folder, text_file, width, name, device):
    encoder = load_text_encoder(str(qwen3_folder), width, 10, device)
    assert encoder.width == width
    assert error(encoder.encode(text_file["texts"]), text_file[f"cond_bf16_{name}"]) < 2e-2
    assert error(encoder.null.expand(3, -1, -1), text_file[f"null_bf16_{name}"]) < 2e-2


def test_velocities_from_the_golden_features_are_the_released_implementations(golden, text_file, device):
    """From the encoder's numbers to the denoiser's."""
    file = golden("t2i_plain")
    config, weights = import_reference({key[2:]: value for key, value in file.items() if key.startswith("w.")})
    model = TextPixNerd(config)
    model.load_state_dict(weights)
    model, x, t = model.to(device), file["x"][:1].to(device), file["t"][:1].to(device)
    for kind, rows in (("cond", 3), ("null", 1)):
        y = text_file[f"{kind}_bf16_padded"][:rows].to(device)
        v = model(x.expand(rows, -1, -1, -1), t.expand(rows), y)
        assert error(v, text_file[f"v_{kind}"]) < 1e-5, kind


def test_qwen3_is_frozen_and_its_features_can_be_trained_on(qwen3_folder):
    """Catches inference_mode, whose tensors autograd refuses, and a context of autocast that changes the features."""
    encoder = load_text_encoder(str(qwen3_folder), length=4)
    y = encoder.encode(["a cat"])
    assert not any(p.requires_grad for p in encoder.model.parameters()) and not y.requires_grad
    assert {p.dtype for p in encoder.model.parameters()} == {torch.bfloat16} and y.dtype == torch.float32
    torch.nn.Linear(32, 2)(y).sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.encode(["a cat"]), y)


def test_every_prompt_has_finite_features(qwen3_folder):
    prompts = ["", " ", "x" * 10_000, "\x00\n\x1b", "\ud800", "日本語", "🍎", "a cat " * 1000]
    for encoder in (load_text_encoder("words"), load_text_encoder(str(qwen3_folder), length=10)):
        y = encoder.encode(prompts)
        assert y.shape == (len(prompts), encoder.length, encoder.width) and y.isfinite().all()
        assert torch.equal(y[0], encoder.null)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def refusal(spec):
    with pytest.raises(UserError) as caught:
        load_text_encoder(str(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_folder(folder, *names, **texts):
    for name in names:
        (folder / name).write_text("{}")
    for name, text in texts.items():
        (folder / f"{name}.json").write_text(text)
    return folder


def test_files_that_a_folder_lacks_are_named(tmp_path):
    """Before anything is loaded, and so without transformers too."""
    assert "no such folder; choose words, qwen3 or a folder" in refusal(tmp_path / "absent")
    assert "lacks config.json, model.safetensors, vocab.json, merges.txt" in refusal(make_folder(tmp_path))
    make_folder(tmp_path, "tokenizer.json", "model.safetensors")
    assert refusal(tmp_path).split(" lacks ")[1].startswith("config.json:")
    make_folder(tmp_path, config='{"model_type": "bert"}')
    assert "holds a model of type bert, not of qwen3" in refusal(tmp_path)
    make_folder(tmp_path, config="{")
    assert "one of its .json files is damaged" in refusal(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    make_folder(tmp_path, "model-00001-of-00002.safetensors", **{"model.safetensors.index": json.dumps(index)})
    assert "lacks model-00002-of-00002.safetensors:" in refusal(tmp_path)


def test_missing_transformers_is_told_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # Python's way to say that a package cannot be imported
    folder = make_folder(tmp_path, "tokenizer.json", "model.safetensors", config='{"model_type": "qwen3"}')
    for spec in ("qwen3", folder):
        message = refusal(spec)
        assert "needs the package transformers" in message and "pip install -r requirements-text.txt" in message
    assert (ROOT / "requirements-text.txt").exists()
    assert load_text_encoder("words").encode(["a cat"]).any()  # which needs nothing


def test_a_full_memory_is_not_taken_for_a_damaged_model(qwen3_folder, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("transformers.Qwen3Model.from_pretrained", fail)
    with pytest.raises(MemoryError):
        load_text_encoder(str(qwen3_folder))


def test_damaged_and_incomplete_weights_are_refused(qwen3_folder, tmp_path):
    """transformers by itself would fill a weight that is not there with random numbers, and warn."""
    folder = shutil.copytree(qwen3_folder, tmp_path / "copy")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refusal(folder)
    (folder / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    for change in ({"num_hidden_layers": 3, "layer_types": 3 * ["full_attention"]}, {"intermediate_size": 64}):
        (folder / "config.json").write_text(json.dumps(config | change))
        assert "lacks the weight layers." in refusal(folder)


@pytest.mark.slow
def test_no_network_is_told_in_one_line(tmp_path):
    """In a process of its own, whose transformers is told to be offline and has an empty cache."""
    pytest.importorskip("transformers", reason="needs pip install -r requirements-text.txt")
    code = (
        "from pretrained.text_encoders import load_text_encoder\n"
        "from runtime.files import run\n"
        "run(lambda: load_text_encoder('qwen3'))"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("-c: could not download Qwen/Qwen3-1.7B")
    assert "Traceback" not in done.stderr and "give --text-encoder its folder" in done.stderr.splitlines()[-1]
