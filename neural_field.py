"""The patch-wise neural field: the idea that gives PixNerd its name (paper section 3.2, Eq. 7 to 12).

A latent diffusion transformer decodes each token with one linear layer. In pixel space that layer would have to give
16 x 16 x 3 = 768 numbers at once. PixNerd instead lets every token *write the weights of a small MLP*. That MLP is
then run once per pixel of the token's patch:

    last hidden state of patch n  --SiLU, Linear-->  {W1, W2} of patch n                      (Eq. 9)
    (noisy colour of pixel i,j ; encoding of i,j)  --MLP with those weights-->  velocity      (Eq. 10, 11)

So the decoder is a function of continuous coordinates, different in every patch and defined at any pixel density.

Letters: N patches (batch times tokens), P patch side, P2 = P*P pixels of a patch, C=3 colours, D trunk width,
Dp pixel-feature width, r ratio of the field MLP, F encoding frequencies per axis, E encoding features.
Left out: Eq. 8 gives the encoding a two-layer MLP; the released model, and we, have one Linear (`x_embedder`, `embed`).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

FIELD_NORMS = ("none", "first", "both", "output")  # paper section 4.2: each one does more than the one before


def dct_encoding(height, width, num_freqs=8):
    """Coordinates as products of cosines, Eq. 12: the 2-D DCT basis, diagonal ones damped by 1 / (1 + fx fy).

    The pixels of a `height` x `width` patch, row by row, against F*F features (feature ix * F + iy), F = `num_freqs`:
    float32 (height*width, F*F), values in [-1, 1]. Coordinates run over [0, 1], both ends included, so another height
    and width means the same patch sampled more densely. The paper writes the frequencies as integers k, l; the
    released model uses linspace(0, F, F) = 0, 8/7, ..., 8, and so do we.
    """
    y = torch.linspace(0, 1, height).view(height, 1, 1, 1)  # (height, 1, 1, 1) down the rows
    x = torch.linspace(0, 1, width).view(1, width, 1, 1)  # (1, width, 1, 1) along the columns
    freqs = torch.linspace(0, num_freqs, num_freqs)  # (F)
    fx, fy = freqs.view(-1, 1), freqs.view(1, -1)  # (F, 1), (1, F)
    basis = torch.cos(math.pi * x * fx) * torch.cos(math.pi * y * fy) / (1 + fx * fy)  # (height, width, F, F)
    return basis.view(height * width, num_freqs**2)  # (height*width, F*F)


def sincos_encoding(height, width, num_freqs=8):
    """Coordinates as sines and cosines of each axis alone, Eq. 7: the encoding of NeRF, here for comparison.

    float32 (height*width, 4F) in [-1, 1]: sin(2^k pi x), cos(2^k pi x), then the same of y, k < F, x and y as above.
    """
    octaves = math.pi * 2.0 ** torch.arange(num_freqs)  # (F): each frequency doubles the one before
    y = torch.linspace(0, 1, height).view(height, 1, 1) * octaves  # (height, 1, F)
    x = torch.linspace(0, 1, width).view(1, width, 1) * octaves  # (1, width, F)
    features = torch.cat([a.expand(height, width, num_freqs) for a in (x.sin(), x.cos(), y.sin(), y.cos())], dim=-1)
    return features.view(height * width, 4 * num_freqs)  # (height*width, 4F)


ENCODINGS = {"dct": dct_encoding, "sincos": sincos_encoding}  # a function added here can be chosen by its name


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32 whatever comes in; same shape and dtype out."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=1e-6).type_as(x)  # (..., width)


class FieldBlock(nn.Module):
    """One residual MLP of the field. Its two weight matrices are not parameters: each token writes its own."""

    def __init__(self, hidden_size, width, ratio, norm):
        super().__init__()
        self.width, self.inner, self.field_norm = width, ratio * width, norm  # Dp, r*Dp, one of FIELD_NORMS
        self.norm = RMSNorm(width)
        self.to_weights = nn.Linear(hidden_size, 2 * self.width * self.inner)

    def weights(self, s):
        """Eq. 9, from s = SiLU(time + h) (N, D), see model.py: W1 (N, Dp, r*Dp), W2 (N, r*Dp, Dp), normalised."""
        w1, w2 = self.to_weights(s).chunk(2, dim=-1)  # (N, Dp*r*Dp) each
        w1 = w1.unflatten(-1, (self.width, self.inner))  # (N, Dp, r*Dp)
        w2 = w2.unflatten(-1, (self.inner, self.width))  # (N, r*Dp, Dp)
        # Eq. 10: the weights feeding one output unit get L2 norm 1, so a token chooses directions and not magnitudes.
        # The paper says "row-wise", thinking of nn.Linear's (out, in) layout. Ours is (in, out): the inputs are dim -2.
        if self.field_norm != "none":
            w1 = F.normalize(w1, dim=-2)  # (N, Dp, r*Dp)
        if self.field_norm in ("both", "output"):
            w2 = F.normalize(w2, dim=-2)  # (N, r*Dp, Dp)
        return w1, w2

    def forward(self, z, s):
        w1, w2 = self.weights(s)  # (N, Dp, r*Dp), (N, r*Dp, Dp)
        hidden = F.silu(torch.bmm(self.norm(z), w1))  # (N, P2, r*Dp)
        return z + torch.bmm(hidden, w2)  # (N, P2, Dp)


class NeuralField(nn.Module):
    """Decodes every patch, pixel by pixel, with MLPs written by its token (Eq. 8 to 12).

    hidden_size D, patch_size P, width Dp (64), ratio r (2), depth: number of blocks (L: 2, XL: 4). norm is one of
    FIELD_NORMS; "output", the paper's choice, normalises W1, W2 and the last features.
    """

    def __init__(self, hidden_size, patch_size, width=64, ratio=2, depth=2, num_freqs=8, encoding="dct", norm="output"):
        super().__init__()
        self.patch_size, self.num_freqs, self.encoding = patch_size, num_freqs, encoding
        # The encoding at the trained density never changes: made once, moved with the model, not saved with it; on the
        # CPU by name, so that a model built under torch.device("meta") has it too.
        with torch.device("cpu"):
            features = ENCODINGS[encoding](patch_size, patch_size, num_freqs)  # (P2, E)
        self.register_buffer("trained_encoding", features, persistent=False)
        self.embed = nn.Linear(3 + features.shape[1], width)
        self.blocks = nn.ModuleList(FieldBlock(hidden_size, width, ratio, norm) for _ in range(depth))
        self.norm = RMSNorm(width) if norm == "output" else nn.Identity()
        self.output = nn.Linear(width, 3)
        nn.init.zeros_(self.output.weight)  # so that training starts from velocity 0, as released
        nn.init.zeros_(self.output.bias)

    def encode(self, height, width):
        """The coordinate features of a patch drawn with height x width pixels: (height*width, E)."""
        if (height, width) == (self.patch_size, self.patch_size):
            return self.trained_encoding  # (P2, E)
        return ENCODINGS[self.encoding](height, width, self.num_freqs).to(self.trained_encoding)  # (height*width, E)

    def forward(self, rgb, s, height, width):
        """Noisy pixels rgb (N, P2, C) of patches of height x width pixels, and their tokens s (N, D) -> (N, P2, C)."""
        place = self.encode(height, width).expand(len(rgb), -1, -1)  # (N, P2, E): the same in all patches
        z = self.embed(torch.cat([rgb, place], dim=-1))  # (N, P2, Dp), Eq. 8
        for block in self.blocks:
            z = block(z, s)  # (N, P2, Dp), Eq. 9 and 10
        return self.output(self.norm(z))  # (N, P2, C), Eq. 11
