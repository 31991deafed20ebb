"""PixNerd that reads sentences: text tokens in the place of the class (paper section 4.5). To be read beside model.py.

    text features (B, M, E) -> tokens (B, M, D) -> refining blocks, told time
                                                        |  keys and values for every block
    noisy image (B, C, H, W) -> tokens (B, L, D) -> blocks, told time -> tokens (B, L, D)
                                -> each token decodes its patch by a neural field -> velocity (B, C, H, W)

The text features come from a frozen encoder (pretrained/text_encoders.py). The image looks at the text, the text never
at the image. Letters as in model.py, and M text tokens, E width of the text features. There is no mask: what pads a
short text up to M tokens is read like the rest of it (released model).
Left out: bf16 weights, in which the released model was trained; ours are float32 under bf16 autocast.
"""

import dataclasses

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Attention, Block, PixNerdConfig, TimeEmbedding, plainly, setting
from model import patchify, rotary_table, rotate, unpatchify
from neural_field import ENCODINGS, NeuralField, RMSNorm
from runtime.machine import attention


def cosine_encoding(height, width, num_freqs=32, end=16):
    """Coordinates as cosines of each axis alone: what the released text-to-image model has in the place of Eq. 12.

    float32 (height*width, 2F) in [-1, 1]: cos(x f_k), cos(y f_k) for k < F, where f_k = 10000^(-k/F). Coordinates run
    over [0, end], both ends included, x along the columns and y down the rows. 16 is the any-resolution model's; the
    released training code has `end` = P, which is the same for its P = 16.
    """
    freqs = 1 / 10000 ** (torch.arange(num_freqs) / num_freqs)  # (F)
    y = torch.linspace(0, end, height).view(height, 1, 1) * freqs  # (height, 1, F)
    x = torch.linspace(0, end, width).view(1, width, 1) * freqs  # (1, width, F)
    angles = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # (height, width, F, 2): x, y, x, y, ...
    return angles.cos().view(height * width, 2 * num_freqs)  # (height*width, 2F)


ENCODINGS["cosine"] = cosine_encoding


@dataclasses.dataclass(frozen=True)
class TextPixNerdConfig:
    """Everything that decides the shapes and the arithmetic of a text-to-image model; saved inside every checkpoint.

    Raises ValueError, naming the field, for values that make no model.
    """

    text_encoder: str = setting("qwen3", "whose features the model reads: words, qwen3, or a folder of a Qwen3 model")
    text_width: int = setting(2048, "numbers in a text token")  # E
    text_length: int = setting(128, "text tokens; longer texts are cut, shorter ones padded")  # M
    resolution: int = setting(256, "side of the training images in pixels", fine_tuning=True)
    patch_size: int = setting(16, "side of a patch in pixels")  # P
    hidden_size: int = setting(1536, "width of the transformer")  # D
    num_heads: int = setting(24, "attention heads")  # Nh
    text_depth: int = setting(4, "blocks that refine the text", most=1_000)
    depth: int = setting(16, "blocks of the transformer", most=1_000)
    field_depth: int = setting(2, "blocks of the neural field", most=1_000)
    field_width: int = setting(64, "width of a pixel's features in the field")  # Dp
    field_ratio: int = setting(2, "hidden width of the field's MLPs, as a multiple of the field's width")  # r
    num_freqs: int = setting(32, "frequencies per axis of the encoding")  # F

    # Not settings: the released model has one of each. Of section 4.2's normalisations, W1's: W2 and the last features
    # stay as they are.
    decoder, encoding, field_norm = "field", "cosine", "first"
    # The same rules: whole numbers, heads that the rotary embedding can turn, patches that fill the image.
    __post_init__, token_grid = PixNerdConfig.__post_init__, PixNerdConfig.token_grid


# XXL is the paper's, 1,172 M parameters; Nano is ours, for the emoji and their names on a laptop: 5.7 M.
TEXT_NANO = dict(text_encoder="words", text_width=64, text_length=16, text_depth=1, resolution=32, patch_size=8)
TEXT_NANO |= dict(hidden_size=160, num_heads=5, depth=7, field_width=32, field_ratio=1, num_freqs=16)
PRESETS = {"Nano": TextPixNerdConfig(**TEXT_NANO), "XXL": TextPixNerdConfig()}


class TextAttention(Attention):
    """Self-attention of the text, without the rotary embedding: learned positions have been added to the tokens."""

    def forward(self, y):
        qkv = self.qkv(y).unflatten(-1, (3, self.num_heads, -1))  # (B, M, 3, Nh, Dh)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, Nh, M, Dh) each
        out = attention(self.q_norm(q), self.k_norm(k), v)  # (B, Nh, M, Dh)
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, M, D)


class JointAttention(Attention):
    """Attention of the image to itself and to the text at once: one softmax over the keys of both."""

    def __init__(self, width, num_heads):
        super().__init__(width, num_heads)
        self.text_kv = nn.Linear(width, 2 * width, bias=False)

    def forward(self, h, y, rope):
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, Nh, Dh)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, Nh, L, Dh) each
        text_kv = self.text_kv(y).unflatten(-1, (2, self.num_heads, -1))  # (B, M, 2, Nh, Dh)
        text_k, text_v = text_kv.permute(2, 0, 3, 1, 4)  # (B, Nh, M, Dh) each
        q = rotate(self.q_norm(q), rope)  # (B, Nh, L, Dh)
        k = rotate(self.k_norm(k), rope)  # (B, Nh, L, Dh)
        # One norm for both kinds of keys (released model); a word has no place in the image, so it is not turned.
        k = torch.cat([k, self.k_norm(text_k)], dim=2)  # (B, Nh, L+M, Dh)
        v = torch.cat([v, text_v], dim=2)  # (B, Nh, L+M, Dh)
        out = attention(q, k, v)  # (B, Nh, L, Dh): softmax(q k^T / sqrt(Dh)) v
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, L, D)


class SwiGLU(nn.Module):
    """model.SwiGLU at its full width 4D, not two thirds of it; gate and value lie in one matrix (released model)."""

    def __init__(self, width):
        super().__init__()
        self.w12 = nn.Linear(width, 8 * width, bias=False)
        self.w3 = nn.Linear(4 * width, width, bias=False)

    def forward(self, h):
        gate, value = self.w12(h).chunk(2, dim=-1)  # (B, L or M, 4D) each
        return self.w3(F.silu(gate) * value)  # (B, L or M, D)


class TextPixNerd(nn.Module):
    """The whole model. The features of the empty text stand for "nothing asked" (classifier-free guidance)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P, Nh = config.hidden_size, config.patch_size, config.num_heads
        M, E = config.text_length, config.text_width
        self.patch_embed = nn.Linear(3 * P * P, D)
        self.time_embed = TimeEmbedding(D)
        self.text_embed, self.text_norm = nn.Linear(E, D), RMSNorm(D)
        self.text_positions = nn.Parameter(torch.randn(1, M, D))
        self.text_blocks = nn.ModuleList(Block(D, TextAttention(D, Nh), SwiGLU(D)) for _ in range(config.text_depth))
        self.blocks = nn.ModuleList(Block(D, JointAttention(D, Nh), SwiGLU(D)) for _ in range(config.depth))
        field = (config.field_width, config.field_ratio, config.field_depth, config.num_freqs)  # Dp, r, blocks, F
        self.decoder = NeuralField(D, P, *field, config.encoding, config.field_norm)
        self.call = plainly  # as in PixNerd: activation checkpointing may take its place
        # What the encoder makes of the empty text; zeros until it is asked. A buffer, so that a checkpoint has it.
        self.register_buffer("null_features", torch.zeros(M, E))

        # As released: positions N(0, 1), these here, zeros in the decoder's last layer, PyTorch's default elsewhere.
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x, t, y, features_at=None, grid=None):
        """The velocity of noisy images x (B, C, H, W) at times t (B) in [0, 1] with text features y (B, M, E): as x.

        features_at=6 returns (velocity, tokens (B, L, D) after block 6, counted from 1), for REPA.
        grid=(rows, columns) fixes the number of tokens whatever the size of x, as in PixNerd.forward.
        ValueError where patches do not fill the image, for a block that is not there, and for y of another shape.
        """
        if features_at is not None and not 1 <= features_at <= self.config.depth:
            raise ValueError(f"features_at is {features_at}, but the blocks are 1 to {self.config.depth}")
        M, E = self.config.text_length, self.config.text_width
        if y.shape != (len(x), M, E):
            raise ValueError(f"text features have shape {tuple(y.shape)}, not {(len(x), M, E)}")
        B, C, H, W = x.shape
        P = self.config.patch_size
        rows, columns = self.config.token_grid(H, W, grid)
        height, width = H // rows, W // columns  # pixels of one patch; P and P without `grid`
        trunk_x = F.interpolate(x, (rows * P, columns * P))  # (B, C, rows*P, columns*P): nearest, as in PixNerd

        t_emb = self.time_embed(t)  # (B, D)
        c = F.silu(t_emb).unsqueeze(1)  # (B, 1, D)
        y = self.text_norm(self.text_embed(y)) + self.text_positions  # (B, M, D)
        for block in self.text_blocks:
            y = self.call(block, y, c)  # (B, M, D)

        h = self.patch_embed(patchify(trunk_x, P, P).flatten(2))  # (B, L, D)
        # Places are counted in tokens, and the two lengths are swapped, which only shows where they differ: released.
        Dh = self.config.hidden_size // self.config.num_heads
        rope = rotary_table(rows, columns, Dh, x.device, ends=(columns, rows))  # (2, L, Dh/2)
        features = None
        for number, block in enumerate(self.blocks, start=1):
            h = self.call(block, h, c, y, rope)  # (B, L, D)
            features = h if number == features_at else features  # (B, L, D)

        s = F.silu(t_emb.unsqueeze(1) + h).flatten(0, 1)  # (B*L, D)
        rgb = patchify(x, height, width).flatten(0, 1).transpose(1, 2)  # (B*L, P2, C)
        v = self.call(self.decoder, rgb, s, height, width)  # (B*L, P2, C)
        v = unpatchify(v.transpose(1, 2).unflatten(0, (B, -1)), rows, height, width)  # (B, C, H, W)
        return v if features_at is None else (v, features)

    def null(self, y):
        """The null condition of classifier-free guidance: y's shape, the empty text in each row."""
        return self.null_features.to(y.dtype).expand_as(y)  # (B, M, E)

    def compile_blocks(self):
        """Compiles each repeated block once, as in PixNerd."""
        for module in (*self.text_blocks, *self.blocks, self.decoder):
            module.compile(fullgraph=True)
