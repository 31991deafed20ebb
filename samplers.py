"""From noise to pictures: time grids, guidance, the solvers, and `generate` (paper section 4.1; Eq. 3 and 4).

A solver is a pure function of a velocity field, `solver(velocity, noise, times)`, where velocity(x, t) gives dx/dt of a
batch x (B, C, H, W) at one time t, a scalar float32 tensor. It starts from noise at times[0] = 0 and returns x at the
last time, 1. Classifier-free guidance is not solver code: `guide` wraps the model into such a velocity.
Every solver calls callback(step, t, x) with the noise (step 0) and after each step.
Left out: solvers with adaptive steps; the paper uses fixed grids.
"""

import torch

from data import random_stream, to_uint8
from flow import clean_from_velocity, score_from_velocity, shift_time
from runtime.files import UserError
from runtime.machine import autocast


def time_grid(steps, shift=1.0):
    """steps+1 times from 0 (noise) to 1 (image), float32. shift > 1: smaller steps near noise.

    ValueError for less than one step, or a shift that is not above 0.
    """
    if steps < 1 or shift <= 0:
        raise ValueError(f"a time grid needs at least 1 step and a shift above 0, not {steps} and {shift}")
    # linspace(0, 1 - 1/n, n) and then 1, not linspace(0, 1, n+1): they round differently, and guidance compares
    # these very float32 numbers with the ends of its interval (released model).
    times = torch.cat([torch.linspace(0, 1 - 1 / steps, steps), torch.ones(1)])  # (steps+1)
    return shift_time(times, shift)  # (steps+1)


def guide(model, y, scale, interval=(0.1, 1.0), **options):
    """Classifier-free guidance: v = v_null + scale (v_y - v_null), for low < t < high. y (B, ...): the conditions.

    At other times, and for scale 1, it is v_y alone, at half the cost. Both bounds are strict and compared in float32,
    as released: with 20 steps the third time is float32(0.1), which is not guided. options: more for the model, `grid`.
    """
    low, high = torch.tensor(interval, dtype=torch.float32)
    null_and_y = torch.cat([model.null(y), y])  # (2B, ...)

    def velocity(x, t):
        t = torch.as_tensor(t, dtype=torch.float32)
        times = t.to(x.device).expand(len(x))  # (B)
        if scale == 1 or not low < t < high:
            return model(x, times, y, **options)  # (B, C, H, W)
        # One batch of 2B is faster than two of B: each weight is read once.
        both = model(torch.cat([x, x]), torch.cat([times, times]), null_and_y, **options)  # (2B, C, H, W)
        v_null, v_y = both.chunk(2)  # (B, C, H, W) each
        return v_null + scale * (v_y - v_null)  # (B, C, H, W)

    return velocity


def _ignore(*_):
    pass


def euler(velocity, noise, times, callback=_ignore):
    """Euler's method, first order, on the probability-flow ODE dx/dt = v (Eq. 4). One evaluation a step."""
    x = noise
    callback(0, times[0], x)
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        x = x + (t_next - t) * velocity(x, t)
        callback(i + 1, t_next, x)
    return x


def heun(velocity, noise, times, callback=_ignore):
    """Heun's method, second order: the mean of the velocities at both ends of the step. Two evaluations a step."""
    x = noise
    callback(0, times[0], x)
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        v = velocity(x, t)
        v_next = velocity(x + (t_next - t) * v, t_next)
        x = x + (t_next - t) * (v + v_next) / 2
        callback(i + 1, t_next, x)
    return x


def adams_coefficients(times, step, order):
    """The weights of the last k = min(order, step+1) velocities in an Adams-Bashforth step, oldest first: (k) float64.

    The polynomial through those velocities is integrated from times[step] to times[step+1]. With u = (t - times[step])
    / (length of the step), the weights c that do so exactly for 1, u, ..., u^(k-1) solve
        sum_j c_j u_j^m = integral of u^m from 0 to 1 = 1 / (m + 1).
    They sum to 1, so x += (length of the step) * sum_j c_j v_j, on even and uneven grids alike. On even ones: order 2
    is (-1/2, 3/2). In float64, since neighbouring u are close; the released code lost up to 3e-3 here in float32.
    """
    nodes = times.double()[max(0, step + 1 - order) : step + 1]  # (k)
    u = (nodes - times[step].double()) / (times[step + 1].double() - times[step].double())  # (k): ..., -1, 0
    powers = torch.arange(len(nodes), dtype=torch.float64)  # (k)
    return torch.linalg.solve(u[None, :] ** powers[:, None], 1 / (powers + 1))  # (k)


def adams(velocity, noise, times, order=2, callback=_ignore):
    """Adams-Bashforth multistep of order 1 to 4: reuses the last velocities, so one evaluation a step.

    Order 2 is the paper's best in few steps. The first steps, while the history is short, are of lower order.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"adams has orders 1 to 4, not {order}")
    x, history = noise, []
    callback(0, times[0], x)
    for i in range(len(times) - 1):
        history = [*history, velocity(x, times[i])][-order:]
        weights = adams_coefficients(times.cpu(), i, order).tolist()
        v = sum(weight * past for weight, past in zip(weights, history))
        x = x + (times[i + 1] - times[i]) * v
        callback(i + 1, times[i + 1], x)
    return x


def euler_maruyama(velocity, noise, times, generator=None, callback=_ignore):
    """Euler-Maruyama on the reverse-time SDE (Eq. 3): x += v dt + w s dt + sqrt(2 w dt) n, with w = 1 - t.

    s is the score and n fresh noise: noise is removed a little faster than the ODE does and a little is put back, so
    that errors are forgotten. Any w(t) >= 0 has the marginals of Eq. 4; 1 - t is the released choice, g^2 t / 2 of
    Eq. 2. The last step is Euler's: noise that is added there would stay in the picture.
    `generator`: one torch.Generator, or one for each image (then an image does not depend on its batch).
    """

    def fresh(x):
        if isinstance(generator, (list, tuple)):
            return torch.stack([torch.randn(x.shape[1:], generator=g) for g in generator]).to(x)
        return torch.randn(x.shape, generator=generator).to(x)

    x = noise
    callback(0, times[0], x)
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        v, dt = velocity(x, t), t_next - t
        x_mean = x + v * dt
        if i < len(times) - 2:
            w = 1 - t
            x_mean = x_mean + w * score_from_velocity(v, x, t) * dt
            x = x_mean + (2 * w * dt).sqrt() * fresh(x)
        else:
            x = x_mean
        callback(i + 1, t_next, x)
    return x


# The order of adams is a choice of its own; euler_maruyama also wants a generator for each image.
SOLVERS = {"euler": euler, "heun": heun, "adams": adams, "euler-maruyama": euler_maruyama}


def image_noise(seed, numbers, size):
    """Noise (B, 3, H, W) for image `numbers` (B) of a seed and size (H, W): one stream each, whatever the batch."""
    return torch.stack([torch.randn(3, *size, generator=random_stream("noise", seed, i)) for i in numbers])


def generate(
    model,
    y,
    noise,
    times,
    scale,
    interval=(0.1, 1.0),
    solver="euler",
    order=2,
    generators=None,
    grid=None,
    precision="fp32",
    watch=_ignore,
):
    """Pictures, uint8 (B, 3, H, W), of the conditions y (B, ...) from noise (B, 3, H, W), on the device of the noise.

    times: a `time_grid`. solver: a name of SOLVERS. grid: (rows, columns) of tokens, if not as trained. watch(step, t,
    x_t, x): called at every time of the grid with the state and the clean image that the velocity there points to, for
    films and progress bars. Raises UserError for a picture that is not finite, which pixels would hide.
    """
    guided = guide(model, y, scale, interval, **({"grid": grid} if grid else {}))
    step, state = 0, None  # of the solver, as its callback tells them

    def velocity(x, t):
        v = guided(x, t)  # (B, 3, H, W)
        if x is state:  # and not the trial point at which Heun asks too
            watch(step, t, x, clean_from_velocity(v, x, t))
        return v

    def callback(number, t, x):
        nonlocal state, step
        step, state = number, x

    options = {"adams": {"order": order}, "euler-maruyama": {"generator": generators}}.get(solver, {})
    with torch.inference_mode(), autocast(noise.device, precision):
        x = SOLVERS[solver](velocity, noise, times, callback=callback, **options)  # (B, 3, H, W)
    watch(len(times) - 1, times[-1], x, x)
    if not x.isfinite().all():
        raise UserError(f"--precision {precision}: a picture is not finite; try fp32, or an earlier checkpoint")
    return to_uint8(x)  # (B, 3, H, W)
