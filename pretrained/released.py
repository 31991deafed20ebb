"""The released PixNerds' names for their weights, to and from ours (checkpoints of MCG-NJU/PixNerd, MIT).

Both models are served, the class-conditional one and the text-to-image one. The released code keeps the transformer's
and the field's blocks in one list, `blocks`: first the one, then the other.
"""

import dataclasses
import re

import torch

from model import PixNerd, PixNerdConfig
from runtime.files import UserError
from text_model import TextPixNerd, TextPixNerdConfig

# Parts of names, ours and theirs, for both models.
RENAMED = {
    "patch_embed": "s_embedder.proj",
    "time_embed": "t_embedder",
    "class_embed": "y_embedder.embedding_table",
    "text_embed": "y_embedder.proj",
    "text_norm": "y_embedder.norm",
    "text_positions": "y_pos_embedding",
    "text_blocks": "text_refine_blocks",
    "text_kv": "kv_y",
    "modulation": "adaLN_modulation.0",
    "to_weights": "param_generator1.0",
    "decoder.embed": "x_embedder.embedder.0",
    "decoder.norm": "final_layer.norm",
    "decoder.output": "final_layer.linear",
}
# What the released code does not let one choose, besides all settings with `choices`: it has their default.
FIXED = {PixNerdConfig: (), TextPixNerdConfig: ("num_freqs", "field_ratio")}


def reference_names(config):
    """Our state dict's keys -> the released model's, for a configuration of either model."""
    text = isinstance(config, TextPixNerdConfig)

    def renamed(ours):
        name = re.sub(r"^decoder\.blocks\.(\d+)", lambda found: f"blocks.{config.depth + int(found[1])}", ours)
        if text and name.startswith("blocks."):
            name = name.replace(".qkv.", ".qkv_x.")
        for part, theirs in RENAMED.items():
            name = re.sub(rf"(^|\.){re.escape(part)}(\.|$)", rf"\g<1>{theirs}\2", name)
        return name

    with torch.device("meta"):
        model = (TextPixNerd if text else PixNerd)(config)
    return {ours: renamed(ours) for ours in model.state_dict() if ours != "null_features"}


def import_reference(state_dict, path="the file"):
    """(config, state dict of ours) from a released model's state dict, its prefix removed. Either model.

    The configuration is read off the shapes. What shapes cannot tell is as released: the field's encoding and
    normalisations, and a resolution of 16 x 16 patches of the class-conditional model, 32 x 32 of the text-to-image
    one, whose encoder is Qwen3. The null features of the latter, which no released file has, are zeros: for whoever
    knows the encoder to fill. Raises UserError naming a missing or superfluous key.
    """
    try:
        config = _config(state_dict)
    except (KeyError, ValueError, AttributeError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path} is not a PixNerd checkpoint ({str(error).strip()})")
    names = reference_names(config)
    for theirs in names.values():
        if theirs not in state_dict:
            raise UserError(f"{path} lacks the weight {theirs}")
    for theirs in state_dict.keys() - names.values():
        raise UserError(f"{path} has the weight {theirs}, which a released PixNerd does not")
    weights = {ours: state_dict[theirs] for ours, theirs in names.items()}
    if isinstance(config, TextPixNerdConfig):
        weights["null_features"] = torch.zeros(config.text_length, config.text_width)
    return config, weights


def _config(state_dict):
    """The configuration of a released model, by the shapes and the number of its weights."""

    def count(pattern):
        return sum(re.fullmatch(pattern, key) is not None for key in state_dict)

    width, patch_values = state_dict["s_embedder.proj.weight"].shape
    field_width, field_inputs = state_dict["x_embedder.embedder.0.weight"].shape
    patch, depth = round((patch_values / 3) ** 0.5), count(r"blocks\.\d+\.attn\.proj\.weight")
    hidden = len(state_dict[f"blocks.{depth}.param_generator1.0.bias"]) // (2 * field_width)
    shared = {"patch_size": patch, "hidden_size": width, "depth": depth, "field_width": field_width}
    shared |= {"num_heads": width // len(state_dict["blocks.0.attn.q_norm.weight"])}
    shared |= {"field_depth": count(r"blocks\..*\.param_generator1\.0\.bias"), "field_ratio": hidden // field_width}
    if "y_pos_embedding" not in state_dict:
        classes = len(state_dict["y_embedder.embedding_table.weight"]) - 1
        freqs = round((field_inputs - 3) ** 0.5)
        return PixNerdConfig(num_classes=classes, resolution=16 * patch, num_freqs=freqs, **shared)
    shared |= {"text_depth": count(r"text_refine_blocks\.\d+\.norm1\.weight"), "text_encoder": "qwen3"}
    shared |= {"text_length": state_dict["y_pos_embedding"].shape[1]}
    shared |= {"text_width": state_dict["y_embedder.proj.weight"].shape[1]}
    return TextPixNerdConfig(resolution=32 * patch, num_freqs=(field_inputs - 3) // 2, **shared)


def export_reference(model):
    """The model's state dict under the released key names. UserError for choices that the released code has not."""
    config = model.config
    for field in dataclasses.fields(config):
        own, fixed = getattr(config, field.name), field.metadata["choices"] or field.name in FIXED[type(config)]
        # Of text encoders it has Qwen3 alone, be it downloaded or in a folder.
        if fixed and own != field.default or field.name == "text_encoder" and own == "words":
            raise UserError(f"the released code knows only {field.name}={field.default!r}, not {own!r}")
    own = model.state_dict()
    return {theirs: own[ours] for ours, theirs in reference_names(config).items()}
