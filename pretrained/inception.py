"""The network behind FID: Inception v3 as Google released it on 2015-12-05, with TensorFlow-1 resizing.

FID does not compare pixels but the features of one particular image classifier. "FID 2.15" has a meaning only with
that classifier, its weights and its way of resizing; torchvision's Inception v3, trained again later, gives other
numbers. Compared with the architecture paper (Szegedy et al., "Rethinking the Inception Architecture", arXiv
1512.00567, section 6) the released graph has four peculiarities, marked (1) to (4) below.

    model = load_inception()                         # downloads 91 MB once; or load_inception("FILE.pth")
    pool, spatial, logits = model(images)            # images: uint8 (B, 3, H, W), any H and W

eval_fid.py turns these three into FID (pool), sFID (spatial) and Inception Score (logits).
Letters: B images, C channels; the two numbers after C in shape comments are height and width.
Left out: training, the auxiliary classifier (not in the published file), the names of the classes.
"""

import functools
import hashlib
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime.files import UserError, cached_download, load_tensors, load_weights

URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256_PREFIX = "6726825d"  # by the convention of torch.hub, the file's name ends with it
SIDE = 299  # the pixels the classifier was trained on


def resize_tf1(images, size=SIDE):
    """Bilinear resizing as TensorFlow 1 does it (`resize_bilinear` with its default align_corners=False).

    images: uint8 (B, C, H, W). Returns float32 (B, C, size, size), values in [0, 255], not rounded.

    (1) Output pixel i reads the source at i * in / out. Newer libraries read (i + 0.5) * in / out - 0.5, which keeps
    the picture centred; here it moves by up to half a pixel. Nothing is averaged when shrinking either, so that large
    pictures alias. Both are faults that FID has to repeat, since the published numbers contain them.
    """

    def neighbours(length):  # the two source pixels that each output pixel lies between, and how far along it is
        source = torch.arange(size, device=images.device) * (length / size)  # (size)
        low = source.long()  # rounds down: source is never negative
        return low, (low + 1).clamp(max=length - 1), source - low  # the last row has itself as its neighbour

    top, bottom, down = neighbours(images.shape[2])  # (size), (size), (size)
    left, right, along = neighbours(images.shape[3])  # (size), (size), (size)
    # Rows are picked before the conversion to float, so that a 4000-pixel photo never exists in float32.
    rows = torch.lerp(images[:, :, top].float(), images[:, :, bottom].float(), down[:, None])  # B C size W
    return torch.lerp(rows[..., left], rows[..., right], along)  # B C size size


# (2) Padding is left out of the average: a pixel at the border averages 4 or 6 neighbours, not 9 with zeros among them.
average_3x3 = functools.partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum_3x3 = functools.partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
halve = functools.partial(F.max_pool2d, kernel_size=3, stride=2)


class ConvBN(nn.Module):
    """Convolution, BatchNorm, ReLU: (B, inp, H, W) -> (B, out, H', W'). The only layer type of the network."""

    def __init__(self, inp, out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inp, out, kernel, stride, padding, bias=False)  # BatchNorm's bias would cancel it
        self.bn = nn.BatchNorm2d(out, eps=0.001)  # (3) TensorFlow's epsilon; PyTorch's default is 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)  # B out H' W'


class Mixed(nn.Module):
    """Branches with different windows on one input, their channels stacked, so that the next layer chooses the scale.

    branches: {name: its convolutions}, each (channels, window) or (channels, window, stride); two windows run side by
    side. pool: what "branch_pool" starts with. Names are those of the published file: "branch7x7dbl_3" is the third
    convolution of the branch with two 7x7 windows, "_2a" and "_2b" are side by side.
    """

    def __init__(self, inp, branches, pool=average_3x3):
        super().__init__()
        self.pool, self.paths = pool, {}
        for branch, convolutions in branches.items():
            width, self.paths[branch] = inp, []
            for number, (out, window, *stride) in enumerate(convolutions, 1):
                name = f"{branch}_{number}" if len(convolutions) > 1 else branch
                names = {name + "a": window[0], name + "b": window[1]} if window is FORK else {name: window}
                for key, kernel in names.items():
                    self.add_module(key, ConvBN(width, out, kernel, *(stride or (1, "same"))))
                self.paths[branch].append(list(names))
                width = out * len(names)

    def forward(self, x):
        outputs = []
        for branch, steps in self.paths.items():
            h = self.pool(x) if branch == "branch_pool" else x  # B inp H W
            for names in steps:
                found = [getattr(self, name)(h) for name in names]
                h = torch.cat(found, dim=1) if len(found) > 1 else found[0]  # B width H' W'
            outputs.append(h)
        return torch.cat(outputs, dim=1)  # B out H' W'


# The five kinds of block. A 7x7 window is a 1x7 and a 7x1 convolution, which cover as much with 14 weights in place of
# 49; some 5x5 windows are two 3x3 convolutions.
ROW, COLUMN, FORK, HALF = (1, 7), (7, 1), ((1, 3), (3, 1)), 2


def grid_35(pool):
    """Mixed_5b to 5d: (B, C, 35, 35) -> (B, 224 + pool, 35, 35)."""
    return {
        "branch1x1": [(64, 1)],
        "branch5x5": [(48, 1), (64, 5)],
        "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
        "branch_pool": [(pool, 1)],
    }


def grid_17(mid):
    """Mixed_6b to 6e: (B, 768, 17, 17) -> the same. `mid` is the width inside the branches."""
    return {
        "branch1x1": [(192, 1)],
        "branch7x7": [(mid, 1), (mid, ROW), (192, COLUMN)],
        "branch7x7dbl": [(mid, 1), (mid, COLUMN), (mid, ROW), (mid, COLUMN), (192, ROW)],
        "branch_pool": [(192, 1)],
    }


GRID_35_TO_17 = {"branch3x3": [(384, 3, HALF)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, HALF)], "branch_pool": []}
GRID_17_TO_8 = {
    "branch3x3": [(192, 1), (320, 3, HALF)],
    "branch7x7x3": [(192, 1), (192, ROW), (192, COLUMN), (192, 3, HALF)],
    "branch_pool": [],
}
GRID_8 = {  # Mixed_7b and 7c: (B, C, 8, 8) -> (B, 2048, 8, 8)
    "branch1x1": [(320, 1)],
    "branch3x3": [(384, 1), (384, FORK)],
    "branch3x3dbl": [(448, 1), (384, 3), (384, FORK)],
    "branch_pool": [(192, 1)],
}


class InceptionV3(nn.Module):
    """The FID network; 23.9 M parameters, 5.7 G multiply-adds an image. Frozen: always in eval mode, no gradients.

    What eval_fid.py asks of a feature network is documented in runtime/feature_networks.py.
    """

    title, widths, side = "FID", (2048, 2023), None
    least = 4  # precision and recall look at the third neighbour

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = Mixed(192, grid_35(32)), Mixed(256, grid_35(64))
        self.Mixed_5d = Mixed(288, grid_35(64))
        self.Mixed_6a = Mixed(288, GRID_35_TO_17, halve)
        self.Mixed_6b, self.Mixed_6c = Mixed(768, grid_17(128)), Mixed(768, grid_17(160))
        self.Mixed_6d, self.Mixed_6e = Mixed(768, grid_17(160)), Mixed(768, grid_17(192))
        self.Mixed_7a = Mixed(768, GRID_17_TO_8, halve)
        self.Mixed_7b = Mixed(1280, GRID_8)
        self.Mixed_7c = Mixed(2048, GRID_8, maximum_3x3)  # (4) Where its twin averages: a slip in the released graph.
        self.fc = nn.Linear(2048, 1008)  # ImageNet's 1000 classes and 8 outputs that were never used
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B, 3, H, W), RGB -> pool float32 (B, 2048), spatial float32 (B, 2023), logits float32 (B, 1008).

        pool and spatial are outputs of a ReLU, so not negative; the logits come without their bias.
        Raises UserError for anything but uint8 RGB: a float picture could be in [0, 1], [-1, 1] or [0, 255].
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
            raise UserError(f"expected uint8 pictures (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        x = (resize_tf1(images) - 128) / 128  # B 3 299 299
        # This memory format is 1.7 times as fast on a CPU. Left out: folding BatchNorm into the convolutions, which
        # gains nothing; bf16, which moves a Frechet distance by 0.6 %; torch.compile, whose 50 s seldom pay.
        x = x.contiguous(memory_format=torch.channels_last)  # B 3 299 299
        x = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))  # B 32 147 147
        x = halve(self.Conv2d_2b_3x3(x))  # B 64 73 73
        x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # B 192 35 35
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # B 288 35 35
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # B 768 17 17
        # sFID (Nash et al., arXiv 2103.03841) uses features that still have positions. ADM's evaluator takes the first
        # 7 channels of Mixed_6d.branch1x1, which comes first in the stack: 7 * 17 * 17 = 2023 is about as many as
        # pool's 2048. TensorFlow keeps channels last, so they are flattened in that order.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # B 2023
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))  # B 2048 8 8
        pool = x.mean(dim=(2, 3))  # B 2048
        return pool, spatial, self.logits(pool)  # B 2048, B 2023, B 1008

    def logits(self, pool):
        """pool (B, 2048) -> (B, 1008), without the bias, as in OpenAI's Inception Score and all published ones."""
        return pool @ self.fc.weight.T  # B 1008


def load_inception(path=None):
    """The network with published weights, on the CPU. path: a file in place of the download.

    Takes pytorch-fid's file and torch-fidelity's of the same network (weights-inception-2015-12-05-6726825d.pth). Every
    parameter must be there, with its shape, finite; nothing else. The network has .sha256, the file's.
    Raises UserError (the file is not these weights; no download) or OSError.
    """
    path = pathlib.Path(path) if path else cached_download(URL, flag="--inception", sha256_prefix=SHA256_PREFIX)
    weights = load_tensors(path, legacy=True)  # without checksums, if old; eval_fid.py compares the SHA-256
    with torch.device("meta"):  # random numbers would take longer to draw than these weights to read
        model = InceptionV3()
    model.to_empty(device="cpu")
    # PyTorch's BatchNorms have a step counter, which a frozen network never reads: a file may hold these or not.
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    load_weights(model, weights | counters, path)
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or Inf")
    model.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return model
