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


def average_3x3(x):
    """3x3 average pool of stride 1 that leaves the padding out of the count, as the published network does."""
    # (2) A pixel at the border averages 4 or 6 neighbours, not 9 with zeros among them.
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # the shape of x


class ConvBN(nn.Module):
    """Convolution, BatchNorm, ReLU: (B, inp, H, W) -> (B, out, H', W'). The only layer type of the network."""

    def __init__(self, inp, out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(inp, out, kernel, stride, padding, bias=False)  # BatchNorm's bias would cancel it
        self.bn = nn.BatchNorm2d(out, eps=0.001)  # (3) TensorFlow's epsilon; PyTorch's default is 1e-5

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)  # B out H' W'


# The five block types. Each runs a few branches with different windows on the same input and stacks their channels, so
# that the next layer can choose the scale. Attribute names are those of the published file: "branch7x7dbl_3" is the
# third convolution of the branch with two 7x7 windows. A 7x7 window is a 1x7 and a 7x1 convolution, which cover as much
# with 14 weights in place of 49; some 5x5 windows are two 3x3 convolutions.


class Mixed35(nn.Module):
    """Mixed_5b, 5c, 5d, on the 35 x 35 grid: (B, inp, 35, 35) -> (B, 224 + pool, 35, 35)."""

    def __init__(self, inp, pool):
        super().__init__()
        self.branch1x1 = ConvBN(inp, 64, 1)
        self.branch5x5_1 = ConvBN(inp, 48, 1)
        self.branch5x5_2 = ConvBN(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvBN(inp, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, padding=1)
        self.branch_pool = ConvBN(inp, pool, 1)

    def forward(self, x):
        point = self.branch1x1(x)  # B 64 35 35
        five = self.branch5x5_2(self.branch5x5_1(x))  # B 64 35 35
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))  # B 96 35 35
        pooled = self.branch_pool(average_3x3(x))  # B pool 35 35
        return torch.cat([point, five, double, pooled], dim=1)  # B 224+pool 35 35


class Reduce35to17(nn.Module):
    """Mixed_6a halves the grid: (B, 288, 35, 35) -> (B, 768, 17, 17)."""

    def __init__(self):
        super().__init__()
        self.branch3x3 = ConvBN(288, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvBN(288, 64, 1)
        self.branch3x3dbl_2 = ConvBN(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvBN(96, 96, 3, stride=2)

    def forward(self, x):
        three = self.branch3x3(x)  # B 384 17 17
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))  # B 96 17 17
        pooled = F.max_pool2d(x, 3, stride=2)  # B 288 17 17
        return torch.cat([three, double, pooled], dim=1)  # B 768 17 17


class Mixed17(nn.Module):
    """Mixed_6b to 6e, on the 17 x 17 grid: (B, 768, 17, 17) -> the same. `mid` is the width inside the branches."""

    def __init__(self, mid):
        super().__init__()
        self.branch1x1 = ConvBN(768, 192, 1)
        self.branch7x7_1 = ConvBN(768, mid, 1)
        self.branch7x7_2 = ConvBN(mid, mid, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvBN(mid, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvBN(768, mid, 1)
        self.branch7x7dbl_2 = ConvBN(mid, mid, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvBN(mid, mid, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvBN(mid, mid, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvBN(mid, 192, (1, 7), padding=(0, 3))
        self.branch_pool = ConvBN(768, 192, 1)

    def forward(self, x):
        point = self.branch1x1(x)  # B 192 17 17
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))  # B 192 17 17
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))  # B mid 17 17
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))  # B 192 17 17
        pooled = self.branch_pool(average_3x3(x))  # B 192 17 17
        return torch.cat([point, seven, double, pooled], dim=1)  # B 768 17 17


class Reduce17to8(nn.Module):
    """Mixed_7a halves the grid again: (B, 768, 17, 17) -> (B, 1280, 8, 8)."""

    def __init__(self):
        super().__init__()
        self.branch3x3_1 = ConvBN(768, 192, 1)
        self.branch3x3_2 = ConvBN(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvBN(768, 192, 1)
        self.branch7x7x3_2 = ConvBN(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvBN(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvBN(192, 192, 3, stride=2)

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))  # B 320 8 8
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))  # B 192 17 17
        seven = self.branch7x7x3_4(seven)  # B 192 8 8
        pooled = F.max_pool2d(x, 3, stride=2)  # B 768 8 8
        return torch.cat([three, seven, pooled], dim=1)  # B 1280 8 8


class Mixed8(nn.Module):
    """Mixed_7b and 7c, on the 8 x 8 grid: (B, inp, 8, 8) -> (B, 2048, 8, 8)."""

    def __init__(self, inp, pool):
        super().__init__()
        self.branch1x1 = ConvBN(inp, 320, 1)
        self.branch3x3_1 = ConvBN(inp, 384, 1)
        self.branch3x3_2a = ConvBN(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvBN(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvBN(inp, 448, 1)
        self.branch3x3dbl_2 = ConvBN(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvBN(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvBN(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvBN(inp, 192, 1)
        self.pool = pool

    def forward(self, x):
        point = self.branch1x1(x)  # B 320 8 8
        three = self.branch3x3_1(x)  # B 384 8 8
        three = torch.cat([self.branch3x3_2a(three), self.branch3x3_2b(three)], dim=1)  # B 768 8 8
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))  # B 384 8 8
        double = torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], dim=1)  # B 768 8 8
        pooled = self.branch_pool(self.pool(x))  # B 192 8 8
        return torch.cat([point, three, double, pooled], dim=1)  # B 2048 8 8


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
        self.Mixed_5b = Mixed35(192, pool=32)
        self.Mixed_5c = Mixed35(256, pool=64)
        self.Mixed_5d = Mixed35(288, pool=64)
        self.Mixed_6a = Reduce35to17()
        self.Mixed_6b = Mixed17(128)
        self.Mixed_6c = Mixed17(160)
        self.Mixed_6d = Mixed17(160)
        self.Mixed_6e = Mixed17(192)
        self.Mixed_7a = Reduce17to8()
        self.Mixed_7b = Mixed8(1280, pool=average_3x3)
        # (4) The last block takes a maximum where its twin 7b takes an average: a slip in the released graph.
        self.Mixed_7c = Mixed8(2048, pool=lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
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
        # gains nothing; bf16, which moves a Frechet distance by 0.6 %; torch.compile, whose 50 s pay in long runs only;
        # those belong on a GPU.
        x = x.contiguous(memory_format=torch.channels_last)  # B 3 299 299
        x = self.Conv2d_1a_3x3(x)  # B 32 149 149
        x = self.Conv2d_2a_3x3(x)  # B 32 147 147
        x = self.Conv2d_2b_3x3(x)  # B 64 147 147
        x = F.max_pool2d(x, 3, stride=2)  # B 64 73 73
        x = self.Conv2d_3b_1x1(x)  # B 80 73 73
        x = self.Conv2d_4a_3x3(x)  # B 192 71 71
        x = F.max_pool2d(x, 3, stride=2)  # B 192 35 35
        x = self.Mixed_5b(x)  # B 256 35 35
        x = self.Mixed_5c(x)  # B 288 35 35
        x = self.Mixed_5d(x)  # B 288 35 35
        x = self.Mixed_6a(x)  # B 768 17 17
        x = self.Mixed_6b(x)  # B 768 17 17
        x = self.Mixed_6c(x)  # B 768 17 17
        x = self.Mixed_6d(x)  # B 768 17 17
        # sFID (Nash et al., arXiv 2103.03841) uses features that still have positions. ADM's evaluator takes the first
        # 7 channels of Mixed_6d.branch1x1, which comes first in the stack: 7 * 17 * 17 = 2023 is about as many as
        # pool's 2048. TensorFlow keeps channels last, so they are flattened in that order.
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # B 2023
        x = self.Mixed_6e(x)  # B 768 17 17
        x = self.Mixed_7a(x)  # B 1280 8 8
        x = self.Mixed_7b(x)  # B 2048 8 8
        x = self.Mixed_7c(x)  # B 2048 8 8
        pool = x.mean(dim=(2, 3))  # B 2048
        return pool, spatial, self.logits(pool)  # B 2048, B 2023, B 1008

    def logits(self, pool):
        """pool (B, 2048) -> (B, 1008), without the bias, as in OpenAI's Inception Score and all published ones."""
        return pool @ self.fc.weight.T  # B 1008


def load_inception(path=None):
    """The network with published weights, on the CPU. path: a file in place of the download.

    Takes pytorch-fid's file (pt_inception-2015-12-05-6726825d.pth) and torch-fidelity's of the same network
    (weights-inception-2015-12-05-6726825d.pth). Every parameter must be there, with its shape, finite; nothing else.
    The network has .sha256, the file's. Raises UserError (the file is not these weights; no download) or OSError.
    """
    path = pathlib.Path(path) if path else cached_download(URL, flag="--inception", sha256_prefix=SHA256_PREFIX)
    weights = load_tensors(path, legacy=True)  # without checksums, if old; eval_fid.py compares the SHA-256
    model = InceptionV3()
    # The one difference that is accepted: since 0.4.1 PyTorch gives each BatchNorm a step counter, which a frozen
    # network never reads. A file may hold these counters or not.
    counters = {name: value for name, value in model.state_dict().items() if name.endswith("num_batches_tracked")}
    load_weights(model, weights | counters, path)
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or Inf")
    with open(path, "rb") as file:
        model.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return model
