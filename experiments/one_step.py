"""One training step by hand: a picture through the path, the patches, one token's field and the loss, with every shape.

    python -m experiments.one_step --out step.png                       # on the model in assets/
    python -m experiments.one_step --ckpt runs/Nano/last.pt --picture 40 --time 0.3 --out step.png

It computes what train.training_loss does, but for the dropped label, piece by piece around the model's transformer,
prints every shape, and draws each piece: the picture, the noisy picture, the patch that one token stands for, what that
token's field draws in it (its velocities, also with four times the pixels a side, as section 4.5 does), the velocity of
the whole picture, its target, and the clean picture that it points to. Left out: models of other data, of sentences,
and without a field.
"""

import argparse

import torch
from PIL import Image, ImageDraw, ImageFont

from data import EMOJI_CLASSES, Emoji, from_uint8, random_stream, to_uint8
from flow import clean_from_velocity, flow_matching_loss, interpolate, velocity
from model import patchify, unpatchify
from runtime.files import UserError, run
from runtime.inside import recorded_tokens
from runtime.models import find_model
from runtime.options import FROM_0, SEED, SHARE
from runtime.pictures import save_picture

SIDE, GAP, CAPTION = 224, 16, 74  # pixels of a panel, between panels, and of the text above one
DENSER = 4  # pixels of the field where the model was trained with one


def step_by_hand(model, x, y, t, noise, token):
    """[(title, lines, picture (3, h, w) in [-1, 1])] of one step, its velocity (1, 3, H, W) and its loss ().

    x, noise (1, 3, H, W); y, t (1); token: the number of the patch to look into.
    """
    P, (_, _, H, W) = model.config.patch_size, x.shape
    x_t = interpolate(x, noise, t)  # (1, 3, H, W), Eq. 1
    patches = patchify(x_t, P, P)  # (1, L, 3, P*P)
    with recorded_tokens(model) as recorded:
        model(x_t, t, y)
    (s,) = recorded  # (L, D), what each token writes its field from
    rgb = patches[0].mT  # (L, P*P, 3), each pixel's noisy colour
    fields = model.decoder(rgb, s, P, P)  # (L, P*P, 3), one field for each token
    v = unpatchify(fields.mT[None], H // P, P, P)  # (1, 3, H, W)
    w1, w2 = model.decoder.blocks[0].weights(s[token : token + 1])  # (1, Dp, r*Dp), (1, r*Dp, Dp)
    # Section 4.5: the same weights at more pixels; each new pixel takes the noisy colour of the nearest old one.
    colours = patches[:, token].view(1, 3, P, P).repeat_interleave(DENSER, 2).repeat_interleave(DENSER, 3)
    dense = model.decoder(colours.flatten(2).mT, s[token : token + 1], DENSER * P, DENSER * P)  # (1, 16*P*P, 3)
    loss = flow_matching_loss(v, x, noise)
    clean = clean_from_velocity(v, x_t, t)  # (1, 3, H, W)

    def square(pixels, side):
        return pixels.mT.reshape(3, side, side) / 2  # velocities reach from -2 to 2 and beyond: shown at half

    columns = W // P
    place = f"row {token // columns + 1}, column {token % columns + 1}"
    panels = [
        ("1  picture x", [shape(x), "pixels in [-1, 1]"], x[0]),
        (f"2  noisy x_t, t = {t.item():.2f}", [shape(x_t), "t x + (1 - t) noise"], x_t[0]),
        ("3  one patch of x_t", [f"{shape(patches)}, one of L", place], patches[0, token].view(3, P, P)),
        ("4  its field's velocity", [f"W1 {shape(w1)}", f"W2 {shape(w2)}"], square(fields[token], P)),
        (
            "5  the field, denser",
            [f"{shape(dense)}", f"{DENSER} x {DENSER} times the pixels"],
            square(dense[0], DENSER * P),
        ),
        ("6  velocity v", [shape(v), "all fields side by side"], v[0] / 2),
        ("7  target x - noise", [shape(noise), f"loss {loss.item():.4f}, mean (6 - 7)^2"], velocity(x, noise)[0] / 2),
        ("8  predicted picture", [shape(clean), "x_t + (1 - t) v"], clean[0]),
    ]
    return panels, v, loss


def shape(tensor):
    """(1, 3, 32, 32) as a text."""
    return "(" + ", ".join(map(str, tensor.shape)) + ")"


def sheet(panels, token, columns, patch_size, resolution):
    """The panels in two rows, each with its title and its two lines; a frame shows the patch in the noisy picture."""
    across = (len(panels) + 1) // 2
    width, height = across * (SIDE + GAP) + GAP, 2 * (SIDE + CAPTION + GAP) + GAP
    picture = Image.new("RGB", (width, height), "white")
    draw, title, small = ImageDraw.Draw(picture), ImageFont.load_default(18), ImageFont.load_default(14)
    for i, (name, lines, pixels) in enumerate(panels):
        left, top = GAP + i % across * (SIDE + GAP), GAP + i // across * (SIDE + CAPTION + GAP)
        draw.text((left, top), name, "black", title)
        for number, line in enumerate(lines):
            draw.text((left, top + 26 + 20 * number), line, (90, 90, 90), small)
        image = Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy())
        picture.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, top + CAPTION))
        if i == 1:
            scale = SIDE / resolution * patch_size
            x, y = left + token % columns * scale, top + CAPTION + token // columns * scale
            draw.rectangle([x, y, x + scale - 1, y + scale - 1], outline="black", width=4)
            draw.rectangle([x + 1, y + 1, x + scale - 2, y + scale - 2], outline="white", width=2)
    return picture


def main():
    """Prints the shapes, checks the loss, saves the picture."""
    parser = argparse.ArgumentParser(description="One training step by hand, every piece printed and drawn.")
    parser.add_argument("--ckpt", default="emoji", help="emoji (assets/) or a checkpoint of a run on the emoji")
    parser.add_argument("--picture", type=FROM_0, default=555, help="number of the emoji, 0 to 1905")
    parser.add_argument("--time", type=SHARE, default=0.4, help="0: only noise, 1: only picture")
    parser.add_argument("--token", type=FROM_0, help="number of the patch to look into (default: one in the middle)")
    parser.add_argument("--seed", type=SEED, default=0)
    parser.add_argument("--out", default="step.png")
    args = parser.parse_args()
    model = find_model(args.ckpt, "ema").eval()
    config = model.config
    if model.class_names != EMOJI_CLASSES or config.decoder != "field" or config.prediction != "velocity":
        raise UserError(
            f"--ckpt {args.ckpt} is no model with a field of the emoji's nine classes: train one, or leave it out"
        )
    emoji = Emoji(config.resolution)
    rows, columns = config.token_grid(config.resolution, config.resolution)
    token = args.token if args.token is not None else (rows // 2) * columns + columns // 2
    if token >= rows * columns or args.picture >= len(emoji):
        raise UserError(f"--token must be below {rows * columns}, and --picture below {len(emoji)}")
    x, label = emoji[args.picture]
    x, t = from_uint8(x)[None], torch.tensor([args.time])  # (1, 3, H, W), (1)
    noise = torch.randn(x.shape, generator=random_stream("noise", args.seed, 0))  # (1, 3, H, W)
    with torch.no_grad():
        panels, *_ = step_by_hand(model, x, torch.tensor([label]), t, noise, token)
    for name, lines, _ in panels:
        print(f"{name:26s} {'; '.join(lines)}")
    save_picture(args.out, sheet(panels, token, columns, config.patch_size, config.resolution))
    print(f"drawn: {args.out}")


if __name__ == "__main__":
    run(main)
