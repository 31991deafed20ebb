"""Floating-point operations, for plans, utilisation (MFU) and benchmarks: matrix products only, 2 per multiply-add."""

from neural_field import ENCODINGS
from text_model import TextPixNerdConfig


def forward_flops(config, height=None, width=None):
    """Of one forward pass of either model on one image of height x width pixels (as trained, if left out).

    A training step costs three times that per image: the backward pass does each product twice more. What the text
    encoder does is not counted.
    """
    rows, columns = config.token_grid(height or config.resolution, width or config.resolution)
    L, D = rows * columns, config.hidden_size
    ends = L * 3 * config.patch_size**2 * D + 256 * D + D * D  # patches and time
    if isinstance(config, TextPixNerdConfig):
        M, E = config.text_length, config.text_width
        ends += M * E * D
        text = M * (4 * D * D + 12 * D * D + 2 * M * D) + 6 * D * D  # qkv and proj, SwiGLU, q k^T and its v; AdaLN
        image = L * (4 * D * D + 12 * D * D + 2 * (L + M) * D) + 2 * M * D * D + 6 * D * D  # and the text's k and v
        blocks = config.text_depth * text + config.depth * image
    else:
        inner = int(2 * 4 * D / 3)
        blocks = config.depth * (L * (4 * D * D + 3 * D * inner + 2 * L * D) + 6 * D * D)
    return 2 * (ends + blocks) + decoder_flops(config, height, width)


def decoder_flops(config, height=None, width=None):
    """The part of `forward_flops` that decodes the tokens."""
    rows, columns = config.token_grid(height or config.resolution, width or config.resolution)
    L, D, P2, Dp = rows * columns, config.hidden_size, config.patch_size**2, config.field_width
    if config.decoder == "linear":
        return 2 * (L * D * 3 * P2 + 2 * D * D)
    encoding = ENCODINGS[config.encoding](1, 1, config.num_freqs).shape[1]  # features of a pixel
    matrices = 2 * config.field_ratio * Dp**2
    return 2 * L * (config.field_depth * (D + P2) * matrices + P2 * Dp * (3 + encoding + 3))
