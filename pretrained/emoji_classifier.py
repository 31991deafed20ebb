"""A small classifier of the embedded emoji: what the emoji distance sees, and a teacher for alignment. Both offline.

    python eval_fid.py --features emoji emoji samples.npz                           # the emoji distance
    python train.py --repa 0.5 --repa-block 4 --dino emoji                          # the teacher
    python -m experiments.emoji_classifier                                          # trains it again: a minute

The emoji distance is FID's formula on this network's 64 features: it tells whether a model of the emoji gets better.
It is NOT FID, and comparable only with emoji distances of as many samples that were drawn with the same settings, of
models that this network taught only with others that it taught. Lower is better. Each feature has a variance of about 1
over the real pictures, so a model that draws the average picture every time is at about 64; two halves of the real
pictures are about 1 apart. Left out: telling copies of the training pictures from new drawings.
"""

import hashlib
import pathlib

import torch
import torch.nn as nn
import torch.nn.functional as F

from runtime.files import UserError, load_tensors, load_weights

WEIGHTS_FILE = pathlib.Path(__file__).parent.parent / "assets/emoji-features.pt"
EMOJI_SIDE, KINDS = 32, 98  # pixels; Unicode's subcategories (assets/README.md)
PATCH = 8  # pixels per place of the last map: the patch of Nano
WIDTH = 64  # few, so that hundreds of pictures settle the 64 x 64 covariance; Inception's 2,048 need 50,000


class EmojiClassifier(nn.Module):
    """Classifies emoji of 32 pixels; 0.3 M parameters, 64 features. A feature network (runtime/feature_networks.py)."""

    title, widths, side = "emoji distance", (WIDTH, None), EMOJI_SIDE
    least = 2 * WIDTH  # of fewer pictures, the covariance is mostly chance

    def __init__(self):
        super().__init__()

        def stage(C, D):  # halves the side
            conv1, conv2 = nn.Conv2d(C, D, 3, 2, 1, bias=False), nn.Conv2d(D, D, 3, 1, 1, bias=False)
            return nn.Sequential(conv1, nn.BatchNorm2d(D), nn.ReLU(), conv2, nn.BatchNorm2d(D), nn.ReLU())

        self.stage1, self.stage2, self.stage3 = stage(3, 32), stage(32, 64), stage(64, 128)
        self.project = nn.Linear(128, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)  # variance 1, so that all features weigh the same
        self.classify = nn.Linear(WIDTH, KINDS)

    def last_map(self, x):
        """x (B, 3, 32, 32) in [-1, 1] -> features of each 8x8 pixels and their surroundings, (B, 128, 4, 4)."""
        return self.stage3(self.stage2(self.stage1(x)))  # (B, 32, 16, 16), (B, 64, 8, 8), (B, 128, 4, 4)

    def features(self, x):
        """x (B, 3, 32, 32) in [-1, 1] -> (B, 64)."""
        return self.norm(self.project(self.last_map(x).mean((2, 3))))  # (B, 64)

    def logits(self, features):
        """features (B, 64) -> logits of the 98 kinds, (B, 98)."""
        return self.classify(F.relu(features))  # (B, 98)

    @torch.no_grad()
    def forward(self, images):
        """uint8 (B, 3, 32, 32), RGB -> features float32 (B, 64), None, logits float32 (B, 98). UserError for others."""
        if images.dtype != torch.uint8 or images.shape[1:] != (3, EMOJI_SIDE, EMOJI_SIDE):
            got = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"expected uint8 pictures (B, 3, {EMOJI_SIDE}, {EMOJI_SIDE}), got {got}")
        features = self.features(images.float() / 127.5 - 1)  # (B, 64)
        return features, None, self.logits(features)  # (B, 64), (B, 98)


class EmojiTeacher(nn.Module):
    """The classifier in the place of DINOv2: alignment in miniature, without a download. Frozen, in eval mode."""

    width = 128

    def __init__(self):
        super().__init__()
        self.classifier = load_emoji_classifier()
        self.eval()

    @staticmethod
    def check(data, resolution, patch_size):
        """UserError unless a run on `data` (str), with these pixels a side and a patch, can have this teacher."""
        if (data, resolution, patch_size) != ("emoji", EMOJI_SIDE, PATCH):
            raise UserError(
                f"--dino emoji knows --data emoji at --resolution {EMOJI_SIDE} in patches of {PATCH} only, "
                f"not {data} at {resolution} in patches of {patch_size}"
            )

    @torch.no_grad()
    def forward(self, images, student_patch=PATCH):
        """images (B, 3, 32, 32), RGB in [0, 1] -> tokens (B, 16, 128), row by row. UserError for others."""
        self.check("emoji", images.shape[-1], student_patch)
        return self.classifier.last_map(images * 2 - 1).flatten(2).transpose(1, 2)  # (B, 16, 128)


def load_emoji_classifier(path=None):
    """The trained classifier, frozen, in eval mode, on the CPU. path: a file in place of the repository's.

    It has .sha256, the file's. Raises UserError for a file that is damaged or something else, FileNotFoundError.
    """
    path = path or WEIGHTS_FILE
    model = EmojiClassifier().eval().requires_grad_(False)
    load_weights(model, load_tensors(path).get("features"), path)
    model.sha256 = hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    return model
