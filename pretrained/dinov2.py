"""The frozen teacher of representation alignment: a DINOv2 vision transformer (arXiv 2304.07193).

REPA (arXiv 2410.06940), which PixNerd trains with, aligns the output of an early block of the student, token by token,
with the features of a network that was trained to represent images. This file is that network; the loss is
flow.alignment_loss.

    teacher = load_dinov2()     # ViT-B/14, 346 MB, downloaded once; load_dinov2("my.pth") reads that file
    tokens = teacher(images)    # (B, 3, 256, 256) in [0, 1] -> (B, 256, 768)

DINOv2 cuts 14-pixel patches and PixNerd 16-pixel ones, so the teacher sees the image at 14/16 of its size:
256 -> 224 pixels, and both have 16 x 16 tokens, one teacher token for each token of the student.

Letters: B batch, C = 3, H, W the student's image; P = 14 the teacher's patch, Hp x Wp its grid of patches, L = Hp Wp;
1+L tokens with the class token in front; D width, Nh heads, Dh = D / Nh. M = 37, the side of the grid that the
published position embedding was trained on (518 pixels). Parameter names are those of the published files.

Left out: what only training DINOv2 needs (masking, stochastic depth, the heads of its losses), register tokens,
the gated feed-forward of ViT-g.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

from runtime.files import UserError, cached_download, load_tensors, load_weights

URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth"


class Attention(nn.Module):
    """Softmax attention of every token to every token: (B, 1+L, D) -> (B, 1+L, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, 1+L, 3, Nh, Dh)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, Nh, 1+L, Dh)
        x = F.scaled_dot_product_attention(q, k, v)  # (B, Nh, 1+L, Dh)
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, 1+L, D)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each scaled by channel and added to its input."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)  # 1e-6 as in the published model, not PyTorch's 1e-5
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        # nn.GELU() is the exact one (erf); the usual tanh approximation is off by up to 5e-4 at each.
        layers = OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim))
        self.mlp = nn.Sequential(layers)
        # The scales start near zero, so that deep stacks train; 1e-5 as in DINOv2's training.
        self.ls1, self.ls2 = (nn.ParameterDict({"gamma": torch.full((dim,), 1e-5)}) for _ in range(2))

    def forward(self, x):
        x = x + self.ls1["gamma"] * self.attn(self.norm1(x))  # (B, 1+L, D)
        return x + self.ls2["gamma"] * self.mlp(self.norm2(x))  # (B, 1+L, D)


class DINOv2(nn.Module):
    """A DINOv2 vision transformer that returns patch tokens, frozen and in eval mode from the start.

    img_size: side in pixels of the images its position embedding was made for (518 in the published files).
    ViT-S/B/L: embed_dim D = 384, 768, 1024; depth 12, 12, 24; num_heads Nh = D / 64.
    Source: arXiv 2304.07193, and the shapes of the published weights.
    """

    def __init__(self, img_size, patch_size, embed_dim, depth, num_heads):
        super().__init__()
        self.patch_size, self.width = patch_size, embed_dim
        self.grid = img_size // patch_size  # M
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))  # class token first
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))  # unused here, but in the files
        # A convolution whose stride is its size is one Linear applied to each patch.
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, embed_dim, patch_size, stride=patch_size)))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        # Mean and deviation of ImageNet's training images, per channel. Not persistent: not in the files.
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def position_embedding(self, rows, cols):
        """The learned embedding resampled to a grid of rows x cols patches: (1, 1 + rows * cols, D)."""
        if rows == cols == self.grid:
            return self.pos_embed  # (1, 1+L, D)
        patch_pos = self.pos_embed[:, 1:].unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)  # (1, D, M, M)
        # The 0.1 was meant to keep floor(M * scale) from losing a patch to rounding. But F.interpolate also places its
        # samples by the given scale, so every position moves a little (except on the native grid, above). The
        # published features are computed in this way: pass the scale, not the size.
        scale = ((rows + 0.1) / self.grid, (cols + 0.1) / self.grid)
        patch_pos = F.interpolate(patch_pos, scale_factor=scale, mode="bicubic", antialias=False)  # (1, D, Hp, Wp)
        return torch.cat([self.pos_embed[:, :1], patch_pos.flatten(2).transpose(1, 2)], dim=1)  # (1, 1+L, D)

    @torch.no_grad()
    def forward(self, images, student_patch=16):
        """Features of every patch, after the final norm: (B, L, D), patches row-major, no class token.

        images: (B, 3, H, W), RGB in [0, 1] (not the student's [-1, 1]), at the student's size. They are resized by
        P / student_patch, so that both networks have the same grid. ValueError where the patch does not divide H and W.
        """
        height, width = images.shape[-2:]
        if height % student_patch or width % student_patch:
            raise ValueError(f"images of {height}x{width} pixels are not whole patches of {student_patch}")
        rows, cols = height // student_patch, width // student_patch  # Hp, Wp
        size = (rows * self.patch_size, cols * self.patch_size)  # 256 -> 224
        x = (images - self.mean) / self.std  # (B, C, H, W)
        # Without antialiasing, as in PixNerd's training; with it the teacher would see a blurrier image.
        x = F.interpolate(x, size, mode="bicubic", align_corners=False, antialias=False)  # (B, C, Hp*P, Wp*P)
        x = self.patch_embed(x).flatten(2).transpose(1, 2)  # (B, L, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1+L, D)
        x = x + self.position_embedding(rows, cols)  # (B, 1+L, D)
        for block in self.blocks:
            x = block(x)  # (B, 1+L, D)
        return self.norm(x)[:, 1:]  # (B, L, D)


def load_dinov2(path=None):
    """A frozen DINOv2 (float32, CPU) with the weights of a published file, whose shapes tell the architecture.

    path: the file; None downloads ViT-B/14 once into torch.hub's cache. Heads have 64 channels, as in every published
    model; a narrower toy has one head. Raises UserError (damaged, another network, no download), FileNotFoundError.
    """
    path = path or cached_download(URL, flag="--dino")
    weights = load_tensors(path)
    try:
        width, _, patch, _ = weights["patch_embed.proj.weight"].shape
        grid = math.isqrt(weights["pos_embed"].shape[1] - 1)  # M; one position is the class token's
        depth = sum(name.startswith("blocks.") and name.endswith(".norm1.weight") for name in weights)
        model = DINOv2(grid * patch, patch, width, depth, max(1, width // 64))
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError):
        raise UserError(f"{path} does not hold the weights of a DINOv2")
    load_weights(model, weights, path)  # strict: another architecture would give features that are silently wrong
    return model
