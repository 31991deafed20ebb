"""PixNerd: a diffusion transformer on pixels (paper section 3; Eq. 5 for the trunk, 6 for the linear decoder).

    noisy image (B, C, H, W) -> patches -> tokens (B, L, D) -> blocks, conditioned on time and class -> tokens (B, L, D)
                              -> each token decodes its patch by a neural field -> velocity (B, C, H, W)

Letters, with one meaning from top to bottom: B batch, C=3 colours, H and W image, P patch side, L = (H/P)(W/P)
tokens, D width, Nh heads, Dh = D/Nh head width, m hidden width of the SwiGLU, P2 = P*P.
In text_model.py: the paper's text-to-image model, in which text tokens take the place of the class.
"""

import dataclasses
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from flow import velocity_from_clean
from neural_field import ENCODINGS, FIELD_NORMS, NeuralField, RMSNorm
from runtime.machine import attention


def setting(default, help, choices=None, fine_tuning=False, most=65_536):
    """A field of the configuration. train.py makes a flag of it; `--init` refuses another value unless fine_tuning."""
    rules = dict(help=help, choices=choices, fine_tuning=fine_tuning, most=most)  # most: of a whole number
    return dataclasses.field(default=default, metadata=rules)


@dataclasses.dataclass(frozen=True)
class PixNerdConfig:
    """Everything that decides the shapes and the arithmetic of a model; saved inside every checkpoint.

    Raises ValueError, naming the field, for values that make no model.
    """

    num_classes: int = setting(1000, "number of classes", fine_tuning=True, most=1_000_000)
    resolution: int = setting(256, "side of the training images in pixels", fine_tuning=True)
    patch_size: int = setting(16, "side of a patch in pixels")  # P
    hidden_size: int = setting(1152, "width of the transformer")  # D
    num_heads: int = setting(16, "attention heads")  # Nh
    depth: int = setting(26, "blocks of the transformer", most=1_000)
    prediction: str = setting("velocity", "what the decoder gives; clean: the image, as in JiT", ("velocity", "clean"))
    decoder: str = setting("field", "linear: one layer per token, the paper's baseline", ("field", "linear"))
    field_depth: int = setting(4, "blocks of the neural field", most=1_000)
    field_width: int = setting(64, "width of a pixel's features in the field")  # Dp
    field_ratio: int = setting(2, "hidden width of the field's MLPs, as a multiple of the field's width")  # r
    field_norm: str = setting("output", "which parts of the field are normalised (section 4.2)", FIELD_NORMS)
    encoding: str = setting("dct", "of a pixel's place in its patch: Eq. 12 or Eq. 7", ENCODINGS)
    num_freqs: int = setting(8, "frequencies per axis of the encoding")  # F

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, choices, most = getattr(self, field.name), field.metadata["choices"], field.metadata["most"]
            if choices and value not in choices:
                raise ValueError(f"{field.name} is {value!r}; choose one of {', '.join(choices)}")
            if field.type is int and (type(value) is not int or not 1 <= value <= most):
                raise ValueError(f"{field.name} is {value!r}; it must be a whole number from 1 to {most:,}")
        least = 4 * self.num_heads  # the rotary embedding turns pairs of numbers for two axes
        if self.hidden_size % least:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 * num_heads = {least}")
        self.token_grid(self.resolution, self.resolution)

    def token_grid(self, height, width, grid=None):
        """(rows, columns) of tokens for height x width pixels, or `grid`. ValueError if patches do not fill them."""
        P = self.patch_size
        if not grid and (height < 1 or width < 1 or height % P or width % P):
            raise ValueError(f"an image of {height}x{width} pixels cannot be cut into patches of {P}")
        rows, columns = grid or (height // P, width // P)
        if min(rows, columns) < 1 or height % rows or width % columns:
            raise ValueError(f"{rows}x{columns} tokens cannot share an image of {height}x{width} pixels equally")
        return rows, columns


# L and XL are the paper's (sections 4.1, 4.2); B and S keep DiT's shapes of those names with L's field; Nano is ours,
# for 32-pixel pictures on a laptop. Parameters: Nano 3.0 M, S 45 M, B 155 M, L 452 M, XL 701 M.
NANO = dict(num_classes=9, resolution=32, patch_size=8, hidden_size=128, num_heads=4, depth=8)
NANO |= dict(field_depth=2, field_width=32, field_ratio=1, num_freqs=6)
PRESETS = {
    "Nano": PixNerdConfig(**NANO),
    "S": PixNerdConfig(hidden_size=384, num_heads=6, depth=12, field_depth=2),
    "B": PixNerdConfig(hidden_size=768, num_heads=12, depth=12, field_depth=2),
    "L": PixNerdConfig(hidden_size=1024, num_heads=16, depth=22, field_depth=2),
    "XL": PixNerdConfig(hidden_size=1152, num_heads=16, depth=26, field_depth=4),
}


def patchify(x, height, width):
    """Cuts x (B, C, H, W) into patches of height x width pixels, row by row: (B, L, C, height*width)."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // height, height, W // width, width)  # (B, C, rows, height, columns, width)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C, height * width)  # (B, L, C, height*width)


def unpatchify(patches, rows, height, width):
    """The inverse of `patchify`: (B, L, C, height*width), `rows` of patches -> (B, C, H, W)."""
    B, L, C, _ = patches.shape
    x = patches.view(B, rows, L // rows, C, height, width)  # (B, rows, columns, C, height, width)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, C, rows * height, L // rows * width)  # (B, C, H, W)


def rotary_table(rows, columns, head_width, device=None, ends=(16, 16)):
    """Cosines and sines that turn queries and keys by their place in the image: (2, L, Dh/2), float32.

    Places run from 0 to `ends`, down and across, whatever the number of tokens (16 is the grid of the released model at
    256 pixels; a larger one interpolates), and the frequencies are 10000^(-k/Dh) for k = 0, 4, 8, ...; pair 2j turns by
    x * f_j, pair 2j+1 by y * f_j (released model).
    """
    freqs = 1 / 10000 ** (torch.arange(0, head_width, 4, device=device) / head_width)  # (Dh/4)
    y = torch.linspace(0, ends[0], rows, device=device).view(rows, 1, 1) * freqs  # (rows, 1, Dh/4)
    x = torch.linspace(0, ends[1], columns, device=device).view(1, columns, 1) * freqs  # (1, columns, Dh/4)
    angles = torch.stack(torch.broadcast_tensors(x, y), dim=-1)  # (rows, columns, Dh/4, 2): x, y, x, y, ...
    angles = angles.reshape(rows * columns, head_width // 2)  # (L, Dh/2)
    return torch.stack([angles.cos(), angles.sin()])  # (2, L, Dh/2)


def rotate(x, table):
    """Turns neighbouring pairs of x (B, Nh, L, Dh) by the angles of `table` (2, L, Dh/2). Same shape out."""
    cos, sin = table  # (L, Dh/2) each
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, Nh, L, Dh/2) each
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)  # (B, Nh, L, Dh/2, 2)
    return turned.flatten(-2).type_as(x)  # (B, Nh, L, Dh)


class Attention(nn.Module):
    """Self-attention over all tokens; queries and keys are normalised, then turned by the rotary embedding."""

    def __init__(self, width, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // num_heads)  # keeps the logits bounded, so that bf16 training stays stable
        self.k_norm = RMSNorm(width // num_heads)
        self.proj = nn.Linear(width, width)

    def forward(self, h, rope):
        qkv = self.qkv(h).unflatten(-1, (3, self.num_heads, -1))  # (B, L, 3, Nh, Dh)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, Nh, L, Dh) each
        q = rotate(self.q_norm(q), rope)  # (B, Nh, L, Dh)
        k = rotate(self.k_norm(k), rope)  # (B, Nh, L, Dh)
        out = attention(q, k, v)  # (B, Nh, L, Dh): softmax(q k^T / sqrt(Dh)) v
        return self.proj(out.transpose(1, 2).flatten(2))  # (B, L, D)


class SwiGLU(nn.Module):
    """The feed-forward layer of LLaMA: one linear layer gates another. Two thirds of 4D keeps the usual cost."""

    def __init__(self, width):
        super().__init__()
        inner = int(2 * 4 * width / 3)  # m
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, h):
        return self.w2(F.silu(self.w1(h)) * self.w3(h))  # (B, L, m) -> (B, L, D)


class Block(nn.Module):
    """A transformer block whose normalisations are shifted, scaled and gated by time and class (AdaLN, DiT).

    context: what the attention needs besides the tokens; here the table of the rotary embedding.
    """

    def __init__(self, width, attn, mlp):
        super().__init__()
        self.norm1, self.attn = RMSNorm(width), attn
        self.norm2, self.mlp = RMSNorm(width), mlp
        # Default initialisation, as in the released model; DiT starts it at zero ("AdaLN-zero").
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, h, c, *context):
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=-1)  # (B, 1, D) each
        h = h + gate_a * self.attn(self.norm1(h) * (1 + scale_a) + shift_a, *context)  # (B, L, D)
        h = h + gate_m * self.mlp(self.norm2(h) * (1 + scale_m) + shift_m)  # (B, L, D)
        return h  # (B, L, D)


class TimeEmbedding(nn.Module):
    """Time as 128 cosines and sines, then a two-layer MLP: t (B) in [0, 1] -> (B, D)."""

    def __init__(self, width):
        super().__init__()
        # As released, frequencies fall from 1 to 1/10. DiT's fall to 1/10,000, since its t counts to 1,000.
        freqs = torch.exp(-math.log(10) * torch.arange(128, device="cpu") / 128)  # (128)
        self.register_buffer("freqs", freqs, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        angles = t.float()[:, None] * self.freqs  # (B, 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))  # (B, D)


class LinearDecoder(nn.Module):
    """The paper's baseline (Eq. 6): AdaLN, then one linear layer from a token to all the velocities of its patch."""

    def __init__(self, width, patch_size, channels=3):
        super().__init__()
        self.norm = RMSNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, channels * patch_size**2)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, h, c):
        shift, scale = self.modulation(c).chunk(2, dim=-1)  # (B, 1, D) each
        return self.output(self.norm(h) * (1 + scale) + shift)  # (B, L, C*P2)


def plainly(module, *inputs):
    """module(*inputs)."""
    return module(*inputs)


class PixNerd(nn.Module):
    """The whole model. Class index `config.num_classes` stands for "no class" (classifier-free guidance)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        D, P = config.hidden_size, config.patch_size
        self.patch_embed = nn.Linear(3 * P * P, D)
        self.time_embed = TimeEmbedding(D)
        self.class_embed = nn.Embedding(config.num_classes + 1, D)
        self.blocks = nn.ModuleList(Block(D, Attention(D, config.num_heads), SwiGLU(D)) for _ in range(config.depth))
        if config.decoder == "field":
            field = (config.field_width, config.field_ratio, config.field_depth)  # Dp, r, blocks
            self.decoder = NeuralField(D, P, *field, config.num_freqs, config.encoding, config.field_norm)
        else:
            self.decoder = LinearDecoder(D, P)
        # How blocks and decoder are called. runtime/recompute.py puts activation checkpointing in its place.
        self.call = plainly
        self.class_names = None  # a list of num_classes names, where a checkpoint brings one; only for people

        # Initialisation as released: these four here, zeros in the decoders' last layer, PyTorch's default elsewhere.
        nn.init.xavier_uniform_(self.patch_embed.weight)
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.class_embed.weight, std=0.02)
        for layer in (self.time_embed.mlp[0], self.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)

    def forward(self, x, t, y, features_at=None, grid=None):
        """The velocity of noisy images x (B, C, H, W) at times t (B) in [0, 1] with classes y (B): (B, C, H, W).

        features_at=8 returns (velocity, tokens (B, L, D) after block 8, counted from 1), for REPA.
        grid=(rows, columns) fixes the number of tokens whatever the size of x (paper section 4.5): the trunk sees x
        resampled to its own grid, and the field draws each token's patch with H/rows x W/columns pixels.
        ValueError where patches do not fill the image, for a block that is not there, and for `grid` without a field.
        """
        if grid is not None and self.config.decoder == "linear":
            raise ValueError("a linear decoder has one patch size; another density needs decoder='field'")
        if features_at is not None and not 1 <= features_at <= self.config.depth:
            raise ValueError(f"features_at is {features_at}, but the blocks are 1 to {self.config.depth}")
        B, C, H, W = x.shape
        P = self.config.patch_size
        rows, columns = self.config.token_grid(H, W, grid)
        height, width = H // rows, W // columns  # pixels of one patch; P and P without `grid`
        # Nearest, as released: an average of neighbours would shrink the noise, and the trunk would see another t.
        # Where a patch has the trained size, this is x itself.
        trunk_x = F.interpolate(x, (rows * P, columns * P))  # (B, C, rows*P, columns*P)

        h = self.patch_embed(patchify(trunk_x, P, P).flatten(2))  # (B, L, D)
        t_emb = self.time_embed(t)  # (B, D)
        c = F.silu(t_emb + self.class_embed(y)).unsqueeze(1)  # (B, 1, D)
        rope = rotary_table(rows, columns, self.config.hidden_size // self.config.num_heads, x.device)  # (2, L, Dh/2)

        features = None
        for number, block in enumerate(self.blocks, start=1):
            h = self.call(block, h, c, rope)  # (B, L, D)
            features = h if number == features_at else features  # (B, L, D)

        if self.config.decoder == "linear":
            v = self.call(self.decoder, h, c).unflatten(-1, (C, P * P))  # (B, L, C, P2)
        else:
            # As released: time is added once more, the class is not. The paper's Eq. 9 has SiLU(h) alone.
            s = F.silu(t_emb.unsqueeze(1) + h).flatten(0, 1)  # (B*L, D)
            rgb = patchify(x, height, width).flatten(0, 1).transpose(1, 2)  # (B*L, P2, C)
            v = self.call(self.decoder, rgb, s, height, width)  # (B*L, P2, C)
            v = v.transpose(1, 2).unflatten(0, (B, -1))  # (B, L, C, P2)
        v = unpatchify(v, rows, height, width)  # (B, C, H, W)
        if self.config.prediction == "clean":
            v = velocity_from_clean(v, x, t)  # (B, C, H, W)
        return v if features_at is None else (v, features)

    def null(self, y):
        """The null condition of classifier-free guidance: y's shape, all "no class"."""
        return torch.full_like(y, self.config.num_classes)  # (B)

    def compile_blocks(self):
        """Compiles each repeated block once, not the whole model: seconds instead of minutes, nearly the same speed."""
        for block in self.blocks:
            block.compile(fullgraph=True)
        self.decoder.compile(fullgraph=True)
