"""Frozen encoders of text: what turns a sentence into the features (M, E) that text_model.py reads.

    encoder = load_text_encoder("words")             # no file, no download
    y = encoder.encode(["red apple", ""])            # (2, 16, 64)

"words" gives each word a vector that follows from its spelling alone. The denoiser has to learn from its own pictures
what each one means, so it draws what it was trained on, in new combinations ("blue apple"), and knows no synonym and no
grammar beyond the order of words. Of unknown words, three plurals in four lie nearest to their singular; with a letter
missing, fewer than half find their word.
"qwen3" is Qwen3-1.7B (arXiv 2505.09388), a language model that read much of the web, as in the released PixNerd. Its
features tell what a sentence means; it needs the package transformers, 3.4 GB to download and as much memory.

An encoder has
    .name                    what a checkpoint remembers it by
    .width, .length          E and M
    .encode(list of str)     float32 (B, M, E), on the encoder's device; longer texts are cut, shorter ones padded
    .null                    (M, E), the features of the empty text
Letters: B texts, M text tokens, E width of the features.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
import unicodedata

import torch

from runtime.files import UserError, check_writable, load_tensors, whole_file

QWEN3 = "Qwen/Qwen3-1.7B"
HINT = "give it the encoder that it was trained with (--text-encoder)"  # in messages
# Share of a word's vector that comes from its letters; docs/text.md says what it is worth. Of the emoji's 1,790 words,
# the nearest two ("chain", "chains") have a cosine of 0.71, and most plurals find their word. With 0.5 few do; with 0.9
# the nearest words have 0.83 in common, and the denoiser has to tell them apart by the rest.
SPELLING = 0.7


def load_text_encoder(spec, width=None, length=None, device="cpu"):
    """The encoder "words", "qwen3" (downloaded once) or that of a folder of a Qwen3 model, frozen.

    width: E; by default the encoder's own, 64 of words. A Qwen3 of another width gets zeros appended or is cut, as in
    the released code. length: M, by default 16 of words, 128 of Qwen3. Raises UserError: no such encoder, no package
    transformers, files that are missing or damaged, no network.
    """
    if spec == "words":
        return Words(width or 64, length or 16, device)
    check_text_encoder(spec)
    return Qwen3(spec, width, length or 128, device)


def check_text_encoder(spec):
    """UserError, in no time, for an encoder that `load_text_encoder` could not load: no folder, no transformers."""
    if spec not in ("words", "qwen3"):
        if not pathlib.Path(spec).is_dir():
            choices = "choose words, qwen3 or a folder of a Qwen3 model"
            raise UserError(f"--text-encoder {spec}: there is no such folder; {choices}")
        _check_folder(pathlib.Path(spec))
    if spec != "words":
        _import_transformers()


def open_text_encoder(config, cache=None, device="cpu"):
    """(encoder, config with the encoder's name) of a text model's configuration; (None, config) of any other.

    cache: the folder of --cache-text, or None. Raises UserError.
    """
    if not hasattr(config, "text_encoder"):
        return None, config
    if cache:
        check_writable("--cache-text", cache, is_folder=True)
    encoder = load_text_encoder(config.text_encoder, config.text_width, config.text_length, device)
    config = dataclasses.replace(config, text_encoder=encoder.name)
    return (Cached(encoder, cache) if cache else encoder), config


def refuse_encoder(path, own, theirs):
    """UserError: the model of the file `path` reads the features of encoder `own`, not those of `theirs`."""
    raise UserError(f"{path} reads the text features of {own}, not those of {theirs}: {HINT}")


def fit_encoder(model, encoder, path):
    """Makes sure that `model` (of the file `path`) reads this encoder; gives it the null features if it has none.

    It has none (all zeros) when it is new or released. Where it has some, the encoder's must be the same, but for the
    rounding of bf16 on another machine. Raises UserError.
    """
    config = model.config
    if encoder.name != config.text_encoder:
        refuse_encoder(path, config.text_encoder, encoder.name)
    for name in ("width", "length"):
        own, theirs = getattr(config, f"text_{name}"), getattr(encoder, name)
        if own != theirs:
            raise UserError(f"{path} reads text features of {name} {own}, and {encoder.name} gives {theirs}: {HINT}")
    null = encoder.null.to(model.null_features)  # (M, E)
    if not model.null_features.any():
        model.null_features.copy_(null)
    elif (null - model.null_features).norm() > 0.05 * model.null_features.norm():
        raise UserError(f"{path} was trained with other weights of {encoder.name}: {HINT}")


# ---- words -----------------------------------------------------------------------------------------------------------


def words(text):
    """The words of a text, lower-case and without accents: "Piñata, 2 o'clock!" -> ["pinata", "2", "oclock"].

    A number is a word, and so is every symbol: each emoji, and of punctuation # * & @ %. The rest of punctuation, and
    control characters, separate words like blanks.
    """

    def plain(character):
        kind = unicodedata.category(character)
        if kind == "Mn" or character in "'’":  # accents, which NFKD sets apart
            return ""
        if kind[0] == "S" or character in "#*&@%":
            return f" {character} "
        return character if kind[0] in "LN" or kind == "Mc" else " "

    return "".join(map(plain, unicodedata.normalize("NFKD", text).casefold())).split()


def signs(text, width):
    """`width` numbers of +1 or -1, at random but always the same for a text: (E). Two texts agree in about half."""
    return 2.0 * (torch.tensor(list(hashlib.shake_256(text.encode()).digest(width))) & 1) - 1  # (E)


@functools.lru_cache(maxsize=100_000)
def word_vector(word, width):
    """A word's vector, of length sqrt(E): (E), float32.

    One part belongs to the word alone, so that "cat" and "car" stay apart; the other is the sum of those of its
    neighbouring letters, three by three with an end at both sides ("<ca", "cat", "at>"), as in fastText
    (arXiv 1607.04606), so that the plural or a misspelled word is nearer to the right one than to others.
    """
    ends = f"<{word}>"
    letters = {ends[i : i + 3] for i in range(len(ends) - 2)}
    spelling = sum(signs(f"letters {three}", width) for three in sorted(letters)) / math.sqrt(len(letters))  # (E)
    vector = math.sqrt(1 - SPELLING) * signs(f"word {word}", width) + math.sqrt(SPELLING) * spelling  # (E)
    return vector * math.sqrt(width) / vector.norm()  # (E)


class Words:
    """Each word a fixed vector made from its spelling; what is not filled by words is zero."""

    name = "words"

    def __init__(self, width, length, device):
        self.width, self.length, self.device = width, length, device
        self.null = self.encode([""])[0]  # (M, E), zeros

    def encode(self, texts):
        features = torch.zeros(len(texts), self.length, self.width)  # (B, M, E)
        for row, text in zip(features, texts):
            for place, word in zip(row, words(text)):
                place.copy_(word_vector(word, self.width))
        return features.to(self.device)  # (B, M, E)


# ---- Qwen3 -----------------------------------------------------------------------------------------------------------


class Qwen3:
    """The last hidden states of a Qwen3 language model, bf16 inside, for the prompt as it is: no chat template.

    Tokens attend to those before them only, so the pads that follow a text know it, and the denoiser reads them too.
    """

    def __init__(self, spec, width, length, device):
        local = spec != "qwen3"
        self.tokenizer, self.model = _load(spec if local else QWEN3, local)
        self.model.requires_grad_(False).eval().to(device)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = "<|endoftext|>"
        config = self.model.config
        shape = (config.hidden_size, config.num_hidden_layers)
        self.name = "qwen3" if shape == (2048, 28) else "qwen3-{}x{}".format(*shape)
        self.width, self.length, self.device = width or config.hidden_size, length, device
        self.null = self.encode([""])[0]  # (M, E)

    @torch.no_grad()  # not inference_mode: the features take part in training
    def encode(self, texts):
        texts = [text.encode("utf-8", "replace").decode() for text in texts]  # halves of characters, which it refuses
        tokens = self.tokenizer(
            texts,
            padding="max_length",
            padding_side="right",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        ids, mask = tokens["input_ids"].to(self.device), tokens["attention_mask"].to(self.device)  # (B, M) each
        # The empty text is all pads. Read without a mask, as when the released model was trained: since transformers
        # 4.53 the default attention gives rows in which everything is masked another, meaningless result.
        mask[mask.sum(1) == 0] = 1
        with torch.autocast(ids.device.type, enabled=False):
            features = self.model(ids, attention_mask=mask, use_cache=False).last_hidden_state.float()  # (B, M, width)
        features = features[..., : self.width]
        return torch.nn.functional.pad(features, (0, self.width - features.shape[-1]))  # (B, M, E)


def _import_transformers():
    """The package; UserError where it is not installed, or older than Qwen3."""
    try:
        import transformers
        from transformers import Qwen2Tokenizer, Qwen3Model  # noqa: F401  which it imports only now
    except ImportError as error:
        raise UserError(f"Qwen3 needs the package transformers ({error}): pip install -r requirements-text.txt")
    return transformers


def _load(source, local):
    """(tokenizer, model in bf16) of a folder, or of a name on Hugging Face. UserError where that cannot be."""
    transformers = _import_transformers()
    transformers.utils.logging.set_verbosity_error()  # what matters of its reports follows below, in a line
    if local:
        transformers.utils.logging.disable_progress_bar()  # a download should show one
    how = dict(dtype=torch.bfloat16, use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True)
    try:
        tokenizer = transformers.Qwen2Tokenizer.from_pretrained(source, local_files_only=local)
        model, found = transformers.Qwen3Model.from_pretrained(source, local_files_only=local, **how)
    except Exception as error:  # noqa: BLE001  transformers and what it builds on have a dozen classes for this
        if isinstance(error, MemoryError):
            raise  # the machine's trouble, not the model's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if local:
            raise UserError(f"--text-encoder {source} cannot be read ({reason}): download it again")
        raise UserError(f"could not download {source} ({reason}): fetch it elsewhere, give --text-encoder its folder")
    lacking = sorted([*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])])
    if lacking:  # transformers would leave them at random, with no more than a warning
        raise UserError(f"--text-encoder {source} lacks the weight {lacking[0]} of the shape that config.json asks for")
    return tokenizer, model


def _check_folder(folder):
    """UserError, naming them, for files that a folder of a Qwen3 model lacks, and for another model's folder."""
    index = folder / "model.safetensors.index.json"
    weights = ["model.safetensors"]
    try:
        if index.exists():
            weights = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        tokenizer = ["tokenizer.json"] if (folder / "tokenizer.json").exists() else ["vocab.json", "merges.txt"]
        missing = [name for name in ["config.json", *weights, *tokenizer] if not (folder / name).is_file()]
        if missing:
            raise UserError(f"--text-encoder {folder} lacks {', '.join(missing)}: it takes the folder of a Qwen3 model")
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"--text-encoder {folder}: one of its .json files is damaged ({error}): download it again")
    if kind != "qwen3":
        raise UserError(f"--text-encoder {folder} holds a model of type {kind}, not of qwen3")


# ---- features on disk ------------------------------------------------------------------------------------------------


class Cached:
    """`--cache-text FOLDER`: an encoder that encodes each caption once, and reads its features from then on.

    A file per caption, in bf16, which loses nothing of Qwen3's: 0.5 MB for 128 tokens of width 2048. Several processes
    may share the folder: files appear whole, and their names are hashes of the encoder, its null features and the
    caption. Raises UserError for a damaged file or a folder that cannot be written.
    """

    def __init__(self, encoder, folder):
        self.encoder, self.folder = encoder, pathlib.Path(folder)
        self.name, self.width, self.length = encoder.name, encoder.width, encoder.length
        self.null, self.device = encoder.null, encoder.device
        null = encoder.null.float().cpu().numpy().tobytes()
        self.key = hashlib.sha256(f"{encoder.name} {encoder.width} {encoder.length} ".encode() + null)

    def path(self, text):
        """The file of a caption, in one of 256 folders."""
        key = self.key.copy()
        key.update(text.encode("utf-8", "surrogatepass"))
        return self.folder / key.hexdigest()[:2] / f"{key.hexdigest()[2:40]}.pt"

    def encode(self, texts):
        missing = [text for text in dict.fromkeys(texts) if not self.path(text).exists()]
        try:
            for text, features in zip(missing, self.encoder.encode(missing) if missing else []):
                self.path(text).parent.mkdir(parents=True, exist_ok=True)
                with whole_file(self.path(text)) as temporary:
                    torch.save({"features": features.to("cpu", torch.bfloat16)}, temporary)
        except OSError as error:
            raise UserError(f"--cache-text {self.folder} cannot be written ({error.strerror}): choose another folder")
        found = [load_tensors(self.path(text))["features"] for text in texts]  # (M, E) each
        return torch.stack(found).float().to(self.device)  # (B, M, E)
