"""What a run of sample.py costs, asked before it starts: whether it fits into memory, and whether compiling pays."""

import torch

from runtime.files import UserError
from runtime.flops import decoder_flops, forward_flops
from runtime.machine import available_memory, will_compile

# Operations from which --compile auto compiles; elsewhere 20,000 TFLOP. The compiler cannot read packed weights
# (machine.freeze), which on CPUs are faster in fp32 and nearly as fast in bf16: there compiling saves a fiftieth of the
# time and costs 10 to 20 s, so it pays from eight images of XL on. Counted, not timed: the same command does the same.
COMPILE_PAYS = {("cpu", "bf16"): 200e12, ("cpu", "fp32"): float("inf")}


def check_memory(config, images, size, grid, device, kept=0, frames=0):
    """UserError where `images` in a batch plainly do not fit: their activations, estimated, against the free memory.

    size: (height, width) in pixels; grid: (rows, columns) of tokens, None for those of `size`. kept: finished pictures
    that the machine's memory holds until they are laid out, each with so many `frames` of a film.
    """
    rows, columns = config.token_grid(*size, grid)
    tokens, pixels, D, Dp = rows * columns, size[0] * size[1], config.hidden_size, config.field_width
    # Alive at once are a few tensors of 4D per token, or the generated weights and some 2Dp per pixel.
    values = max(tokens * 8 * 4 * D, 4 * (tokens * 2 * config.field_ratio * Dp**2 + pixels * 2 * Dp))
    batch = 2 * images * values * 4  # bytes: both halves of guidance, in float32
    stored = kept * 3 * pixels * (3 + 4 * frames)  # bytes: drawn, joined, in the grid; a frame is a pair, twice
    cpu, of_batch = torch.device("cpu"), f"{images} images of {size[0]}x{size[1]}"
    in_all = stored + (batch if device.type == "cpu" else 0)
    for what, need, where, flag in (
        (of_batch, batch, device, "--batch-size"),
        ("all the pictures together", in_all, cpu, "--num"),
    ):
        free = available_memory(where)
        if free is not None and need > free:
            reason = f"{what} need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
            raise UserError(f"{reason}: use a smaller {flag}, --resolution or --upscale")


def pick_compile(choice, config, size, grid, evaluations, precision, device, say):
    """Whether to compile, for --compile auto, on or off. say(line): told why not, where compiling would have paid.

    evaluations: images times velocities each, both halves of guidance counted; size and grid: as in check_memory.
    UserError for "on" where nothing compiles.
    """
    rows, columns = config.token_grid(*size, grid)
    flops = evaluations * forward_flops(config, rows * config.patch_size, columns * config.patch_size)
    if choice == "auto" and flops < COMPILE_PAYS.get((device.type, precision), 20e15):
        return False
    return will_compile(choice, device, say)


def velocity_flops(config, size, grid, densities=()):
    """Operations of one velocity of one image; size and grid: as in check_memory.

    densities: of more drawings by the field alone, each with so many times the pixels a side.
    """
    rows, columns = config.token_grid(*size, grid)
    height, width = rows * config.patch_size, columns * config.patch_size  # of the image that the transformer sees
    field = decoder_flops(config, height, width)
    times = size[0] * size[1] / (height * width)  # as many pixels as there
    return forward_flops(config, height, width) + field * (times - 1 + sum(times * k**2 for k in densities))
