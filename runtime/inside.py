"""What a token wrote, made visible: its patch drawn by its field at other densities, its features, its weights.

Both models call their blocks and their decoder through `model.call`, so that no code of theirs is repeated here.
"""

import contextlib
import dataclasses

import torch
from PIL import Image

from model import patchify

from runtime.machine import autocast
from runtime.pictures import enlarge, picture_grid


DENSITIES = (1, 2, 4)  # times the pixels along a side of a patch: 1, 4 and 16 times as many
MAP_SIDE = 512  # pixels of the picture that is clicked, at least


@contextlib.contextmanager
def _calls(model, call):
    """Within it, the model calls its parts by `call`."""
    before, model.call = model.call, call
    try:
        yield
    finally:
        model.call = before


@contextlib.contextmanager
def recorded_tokens(model):
    """Within it, the tokens (B*L, D) that each velocity's decoder was given are added to the list that this yields."""
    recorded = []

    def call(module, *inputs):
        if module is model.decoder:
            recorded.append(inputs[1])
        return module(*inputs)

    with _calls(model, call):
        yield recorded


@contextlib.contextmanager
def replayed_tokens(model, recorded):
    """Within it, the model skips its blocks, and its field is written by the tokens `recorded`, one entry a velocity.

    So the same fields draw another number of pixels per patch. The picture differs from one that `--upscale` draws,
    where the transformer sees the denser pixels and answers with other tokens.
    """
    tokens = iter(recorded)

    def call(module, *inputs):
        if module is model.decoder:
            rgb, _, *size = inputs
            return module(rgb, next(tokens), *size)
        return inputs[0]

    with _calls(model, call):
        yield


def field_of_patch(model, x, t, y, number, how, precision):
    """What token `number` of the image x (1, 3, H, W) at time t with condition y (1, ...) wrote, and its features.

    A list with an entry for each block of the field: the features of the patch's pixels after it (P2, Dp), and the
    weights W1 (Dp, r*Dp) and W2 (r*Dp, Dp); float32, on the CPU.
    """
    found = []

    def hook(block, inputs, z):
        w1, w2 = block.weights(inputs[1][number : number + 1])  # (1, Dp, r*Dp), (1, r*Dp, Dp)
        found.append([part.float().cpu() for part in (z[number], w1[0], w2[0])])

    hooks = [block.register_forward_hook(hook) for block in model.decoder.blocks]
    try:
        with torch.inference_mode(), autocast(x.device, precision):
            model(x, t.to(x.device).expand(1), y, **how)
    finally:
        for handle in hooks:
            handle.remove()
    return found


def gray(maps):
    """Maps (N, h, w) of any range -> uint8 images (N, 3, h, w): 0 is middle gray, each map's largest value an end."""
    peak = maps.abs().amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)  # (N, 1, 1)
    return (127.5 + 127 * maps / peak).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)  # (N, 3, h, w)


def comparable(one, other):
    """Whether two configurations cut pictures alike: the same classes by number, patches and resolution."""
    names = ("num_classes", "patch_size", "resolution")
    return all(getattr(one, name, None) == getattr(other, name, None) for name in names)


@dataclasses.dataclass
class Inside:
    """A drawn picture, and what it takes to look into its patches."""

    model: torch.nn.Module
    y: torch.Tensor  # (1, ...), its condition
    grid: tuple  # (rows, columns) of its patches
    how: dict  # `grid` for the model, where patches do not have the trained size
    precision: str
    states: list  # (t, x_t (1, 3, H, W)) of each step
    pictures: list  # uint8 (3, k*H, k*W) for each density, and by the baseline

    def place(self, x, y):
        """(row, column) of the patch at pixel (x, y) of the map."""
        height, width = enlarge(self.pictures[0][None], MAP_SIDE).shape[-2:]
        return y * self.grid[0] // height, x * self.grid[1] // width

    def map(self, row, column):
        """The picture enlarged, its patches apart by lines, the one at (row, column) framed."""
        picture = enlarge(self.pictures[0][None], MAP_SIDE)[0]  # (3, k*H, k*W)
        height, width = picture.shape[1] // self.grid[0], picture.shape[2] // self.grid[1]
        picture[:, ::height], picture[:, :, ::width] = 128, 128
        patch = picture[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
        for edge in range(6):  # white between black, to be seen on any colour
            shade = 255 if edge in (2, 3) else 0
            patch[:, [edge, -1 - edge]] = patch[:, :, [edge, -1 - edge]] = shade
        return Image.fromarray(picture.permute(1, 2, 0).numpy())

    def patch(self, row, column, step):
        """What the page shows of a patch at a step: {part: picture}."""
        (rows, columns), (t, x_t) = self.grid, self.states[step]
        blocks = field_of_patch(self.model, x_t, t, self.y, row * columns + column, self.how, self.precision)
        cut = [_patches(picture, rows, columns)[row * columns + column] for picture in self.pictures]
        densest = max(max(patch.shape[1:]) for patch in cut)
        side = densest * -(-192 // densest)  # a multiple of the sides of all
        height, width = cut[0].shape[1:]
        headings = [f"{patch.shape[1]}x{patch.shape[2]} pixels" for patch in cut]
        cut = [enlarge(patch[None], side) for patch in cut]  # (1, 3, k*h, k*w) each
        headings[len(DENSITIES) :] = ["linear decoder"] * (len(cut) - len(DENSITIES))
        basis = self.model.decoder.encode(4 * height, 4 * width).float().cpu().T  # (E, 16*h*w)
        features = blocks[-1][0].T  # (Dp, h*w)
        written = torch.stack([matrix for _, w1, w2 in blocks for matrix in (w1, w2.T)])  # (2 * blocks, Dp, r*Dp)
        return {
            "map": self.map(row, column),
            "densities": picture_grid(torch.cat(cut), 1, None, headings, None),
            "basis": picture_grid(gray(basis.unflatten(1, (4 * height, 4 * width))), self.model.decoder.num_freqs),
            "features": picture_grid(enlarge(gray(features.unflatten(1, (height, width))), 64), 8),
            "weights": picture_grid(enlarge(gray(written), 128), 4),
        }


def _patches(picture, rows, columns):
    """Cuts a picture (3, H, W) into its patches, row by row: (rows*columns, 3, h, w)."""
    height, width = picture.shape[1] // rows, picture.shape[2] // columns
    return patchify(picture[None], height, width)[0].unflatten(-1, (height, width))
