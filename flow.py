"""Rectified flow: the path from noise to image, its velocity, and the losses (paper section 2 and Eq. 1 to 4).

The time convention, said once. t runs from 0 (noise) to 1 (image):

    x_t = alpha_t x + sigma_t eps,   alpha_t = t,   sigma_t = 1 - t                                       (Eq. 1)
    v = dx_t/dt = x - eps

so sampling integrates dx/dt = v upwards from t=0. Papers differ: DDPM, EDM and the text of Eq. 2 and 3 run from image
to noise; SiT and Stable Diffusion 3 use rectified flow with t=0 at the image and the opposite sign of v; Lipman et al.
and this code put the image at t=1. x is the clean image, eps the noise (`noise`), x_t the mixture (`x_t`).
"""

import torch
import torch.nn.functional as F


def _per_image(t, x):
    """t (B) or a single number, reshaped so that it multiplies x (B, ...) image by image."""
    return torch.as_tensor(t, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))  # (B or 1, 1, ..., 1)


def interpolate(x, noise, t):
    """The forward process, Eq. 1: x_t = t x + (1 - t) noise. x and noise (B, ...), t (B) in [0, 1]."""
    t = _per_image(t, x)
    return t * x + (1 - t) * noise


def velocity(x, noise):
    """The velocity of the straight path, and the target of training: v = x - noise, for every t."""
    return x - noise


def clean_from_velocity(v, x_t, t):
    """The image that a velocity points to: x = x_t + (1 - t) v, from Eq. 1 and v = x - eps."""
    return x_t + (1 - _per_image(t, x_t)) * v


def velocity_from_clean(x, x_t, t):
    """The velocity towards an image that a network predicts (x-prediction): v = (x - x_t) / max(1 - t, 0.05).

    The loss stays that of velocities. Images fill a thin surface in the space of pixels and noise fills all of it, so a
    narrow network predicts them more easily (JiT, Li & He, arXiv 2511.13720). 0.05, theirs, bounds errors near t=1.
    """
    return (x.float() - x_t) / (1 - _per_image(t, x_t)).clamp(min=0.05)


def noise_from_velocity(v, x_t, t):
    """The noise that a velocity comes from: eps = x_t - t v, from Eq. 1 and v = x - eps."""
    return x_t - _per_image(t, x_t) * v


def score_from_velocity(v, x_t, t):
    """The score grad log p_t(x_t) = -eps / sigma_t, for t < 1 (the score of a clean image is not finite)."""
    return -noise_from_velocity(v, x_t, t) / (1 - _per_image(t, x_t))


def sde_coefficients(t):
    """f and g^2 of the forward SDE dx = f x ds + g dw, Eq. 2, where s = 1 - t runs from image to noise.

    f = d log(alpha)/ds and g^2 = d(sigma^2)/ds - 2 f sigma^2, which for alpha = 1 - s and sigma = s are
    f = -1/t and g^2 = 2 (1 - t) / t. Both are infinite at t=0, where the image has vanished. With them Eq. 3 and 4 give
    the samplers: the probability-flow ODE, dx = [f x - g^2/2 score] ds, is dx = v dt (a test says so).
    """
    return -1 / t, 2 * (1 - t) / t


def shift_time(t, shift):
    """t / (t + (1 - t) shift): for shift > 1 spends more of [0, 1] near noise, as larger images need. Keeps 0 and 1."""
    return t / (t + (1 - t) * shift)


def sample_time(n, shift=1.0, generator=None):
    """n training times: sigmoid of a standard normal (logit-normal), then `shift_time`. Shape (n), in (0, 1).

    Dense in the middle, as in Stable Diffusion 3 (arXiv 2403.03206). At both ends most of the loss cannot be learned
    away: near t = 0 nothing shows which image it will be, near t = 1 the noise is too weak to be seen.
    """
    return shift_time(torch.sigmoid(torch.randn(n, generator=generator)), shift)


def flow_matching_loss(v, x, noise, per_image=False, weigh=None):
    """Mean over all elements of (v - (x - noise))^2, computed in float32. v, x, noise (B, C, H, W) -> scalar.

    per_image=True gives one mean per image (B), for logging the loss by time; their mean is the scalar. weigh: a linear
    map of the error (B, C, H, W), such as runtime.frequencies.by_frequency, to make some of it count more.
    """
    error = v.float() - velocity(x, noise).float()  # (B, C, H, W)
    error = weigh(error) if weigh else error
    error = error.square().flatten(1).mean(1)  # (B)
    return error if per_image else error.mean()


def alignment_loss(student, teacher, spatial=False):
    """REPA: 1 - cosine similarity, averaged over images and tokens. Both (B, L, features) -> scalar in [0, 2].

    The tokens of an early block, through a small projector, are pulled towards those of a frozen DINOv2 at the same
    places. Computed in float32. ValueError if the two have different shapes. spatial: normalise the teacher's tokens
    over the places, so that only what differs from place to place is taught (iREPA, Singh et al., arXiv 2512.10794).
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student tokens {tuple(student.shape)} and teacher tokens {tuple(teacher.shape)} differ")
    if spatial:
        centred = teacher.float() - teacher.float().mean(1, keepdim=True)  # (B, L, features)
        teacher = centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt()  # (B, L, features)
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1).mean()
