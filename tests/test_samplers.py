"""Solvers: exact where they must be, of the order that they claim, and equal to the released implementation."""

import functools
import math

import pytest
import torch
from helpers import TINY, randomised

from data import random_stream, to_uint8
from flow import clean_from_velocity, score_from_velocity, velocity_from_clean
from runtime.files import UserError
from samplers import adams, adams_coefficients, euler, euler_maruyama, generate, guide, heun, image_noise, time_grid

SOLVERS = {"euler": (euler, 1), "heun": (heun, 2)} | {
    f"adams{k}": (lambda v, x, t, k=k, **kw: adams(v, x, t, order=k, **kw), k) for k in (1, 2, 3, 4)
}


def test_time_grid_runs_from_noise_to_image():
    assert torch.equal(time_grid(4), torch.tensor([0, 0.25, 0.5, 0.75, 1.0]))
    assert time_grid(1).tolist() == [0, 1]
    shifted = time_grid(10, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all() and shifted[5] == 0.25
    with pytest.raises(ValueError, match="at least 1 step"):
        time_grid(0)


@pytest.mark.parametrize(
    "name", ["euler_50", "euler_10_shift3", "adams1_12", "adams2_25_shift3", "adams3_20", "adams4_20_shift2"]
)
def test_trajectories_are_the_released_implementations(golden, golden_model, device, name):
    """With guidance 3.5 on (0.1, 1.0). The released coefficients of order 3 and 4 are off by up to 3e-3 (float32)."""
    model, _ = golden_model("c2i_square", device)
    file = golden("samplers", device)
    solver, steps, *rest = name.split("_")
    steps, shift = int(steps), float(rest[0][5:]) if rest else 1.0
    times = time_grid(steps, shift)
    torch.testing.assert_close(times, file[f"{name}.t"].cpu(), atol=1e-6, rtol=0)
    states = {}
    with torch.no_grad():
        velocity = guide(model, file["y"], 3.5)
        x = SOLVERS[solver][0](velocity, file["noise"], times, callback=lambda step, t, x: states.update({step: x}))
    tolerance = {"adams3": 2e-4, "adams4": 2e-3}.get(solver, 1e-4)
    for got, expected in ((x, file[name]), (states[(steps + 1) // 2], file[f"{name}.x_half"])):
        assert (got - expected).abs().max() < tolerance * expected.abs().max()
    assert torch.equal(states[0], file["noise"]) and torch.equal(states[steps], x)
    if solver.startswith("adams"):
        order = int(solver[-1])
        for step in range(steps):
            got = adams_coefficients(times, step, order)
            expected = file[f"{name}.coeff"][step, 4 - len(got) :].cpu()
            torch.testing.assert_close(got, expected, atol=5e-3 if order > 2 else 1e-6, rtol=0)


def test_adams_coefficients_on_an_even_grid_are_the_textbook_ones():
    times = torch.arange(6) / 5
    textbook = {1: [1], 2: [-1 / 2, 3 / 2], 3: [5 / 12, -16 / 12, 23 / 12], 4: [-9 / 24, 37 / 24, -59 / 24, 55 / 24]}
    for order, expected in textbook.items():
        assert adams_coefficients(times, 4, order).tolist() == pytest.approx(expected, abs=1e-5)
    assert adams_coefficients(times, 0, 4).tolist() == [1]  # no history yet: Euler


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_integrates_polynomials_below_its_order_exactly(order):
    """v = p t^(p-1) integrates to 1 for p <= order, on an uneven grid, once the history is full."""
    times = torch.tensor([0.0, 0.03, 0.11, 0.2, 0.42, 0.5, 0.61, 0.8, 0.83, 1.0], dtype=torch.float64)
    full = order - 1  # the first steps have a short history: start where it is full
    for p in range(1, order + 1):
        history = [p * times[i] ** (p - 1) for i in range(len(times))]
        x = times[full] ** p
        for step in range(full, len(times) - 1):
            weights = adams_coefficients(times, step, order)
            x = x + (times[step + 1] - times[step]) * sum(
                w * v for w, v in zip(weights, history[step + 1 - order : step + 1])
            )
        assert x.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name, uneven):
    """dx/dt = 5 t^4 x, whose solution is exp(t^5): twice the steps, 2^order less error. Catches a wrong coefficient.

    The velocity is nearly 0 at the start, so that the Euler steps with which Adams begins do not hide its order.
    """
    solver, order = SOLVERS[name]

    def error(steps):
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64) ** (1.3 if uneven else 1)
        x = solver(lambda x, t: 5 * t**4 * x, torch.ones(1, dtype=torch.float64), times)
        return abs(x.item() - math.e)

    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.2)


def gaussian(x, t, mean=2.0, std=0.5):
    """The exact velocity where the data are N(mean, std^2)."""
    variance = t**2 * std**2 + (1 - t) ** 2
    return mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)


@pytest.mark.parametrize("name", ["euler", "heun", "adams2", "adams4"])
def test_eq_4_ode_carries_noise_to_a_gaussian(name):
    """The flow of a Gaussian is linear: eps goes to mean + std * eps, point by point."""
    noise = torch.linspace(-2, 2, 9)[:, None]
    x = SOLVERS[name][0](gaussian, noise, time_grid(400))
    torch.testing.assert_close(x, 2 + 0.5 * noise, atol=5e-3 if name == "euler" else 1e-3, rtol=0)


def test_eq_3_sde_carries_noise_to_the_same_gaussian():
    """Not point by point, but in distribution: mean 2 and standard deviation 0.5, in the middle of the path too."""
    generator = torch.Generator().manual_seed(0)
    noise, states = torch.randn(100_000, 1, generator=generator), {}
    x = euler_maruyama(gaussian, noise, time_grid(200), generator, callback=lambda step, t, x: states.update({step: x}))
    assert x.mean().item() == pytest.approx(2, abs=0.01) and x.std().item() == pytest.approx(0.5, abs=0.01)
    half = states[100]
    assert half.mean().item() == pytest.approx(1, abs=0.01)
    assert half.std().item() == pytest.approx((0.25 * 0.25 + 0.25) ** 0.5, abs=0.01)
    ode = euler(gaussian, noise, time_grid(200))
    assert torch.corrcoef(torch.stack([x[:, 0], ode[:, 0]]))[0, 1] < 0.9  # fresh noise was really added


def test_eq_3_one_step_is_the_stated_formula():
    x, v, t = torch.randn(2, 3, 2, 2), torch.randn(2, 3, 2, 2), 0.3
    times = torch.tensor([t, 0.4, 1.0])
    first = {}
    euler_maruyama(
        lambda *_: v, x, times, torch.Generator().manual_seed(5), callback=lambda s, t, x: first.update({s: x})
    )
    n, dt, w = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)), 0.1, 0.7
    expected = x + v * dt + score_from_velocity(v, x, t) * w * dt + (2 * w * dt) ** 0.5 * n
    torch.testing.assert_close(first[1], expected)


def test_eq_3_the_last_step_adds_no_noise():
    """Of the single step of a grid of two times, nothing is left to chance: Euler's x + v dt."""
    noise, times = torch.randn(2, 3, 4, 4), torch.tensor([0.4, 1.0])
    drawn = euler_maruyama(lambda x, t: x * 2, noise, times)
    torch.testing.assert_close(drawn, noise + 2 * noise * 0.6)


def test_eq_3_one_generator_per_image_makes_images_independent_of_the_batch():
    noise, times = torch.randn(3, 1), time_grid(5)
    together = euler_maruyama(gaussian, noise, times, [torch.Generator().manual_seed(i) for i in range(3)])
    alone = euler_maruyama(gaussian, noise[1:2], times, [torch.Generator().manual_seed(1)])
    torch.testing.assert_close(together[1:2], alone)


class Recorder:
    """A "model" whose velocity is 10 for no class and the class index otherwise, and which counts its rows."""

    def __init__(self):
        self.rows = []

    def null(self, y):
        return torch.full_like(y, 4)

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        assert t.shape == y.shape == (len(x),)
        return torch.where(y == 4, 10.0, y.float()).view(-1, 1).expand_as(x)


def test_guidance_extrapolates_from_no_class_to_the_class():
    v = guide(Recorder(), torch.tensor([0, 3]), 3.5)(torch.zeros(2, 1), torch.tensor(0.5))
    torch.testing.assert_close(v, torch.tensor([[10 + 3.5 * (0 - 10)], [10 + 3.5 * (3 - 10)]]))


def test_guidance_asks_the_model_for_its_null_condition():
    """Conditions may be classes (B) or features of a sentence (B, M, E). Catches: a class index made by the sampler."""

    class Sentences:
        def null(self, y):
            return torch.full_like(y, 0.25)

        def __call__(self, x, t, y):
            return y.mean(dim=(1, 2)).view(-1, 1).expand_as(x)

    y = torch.stack([torch.full((5, 7), 1.0), torch.full((5, 7), 3.0)])
    v = guide(Sentences(), y, 2.0)(torch.zeros(2, 1), torch.tensor(0.5))
    torch.testing.assert_close(v, torch.tensor([[0.25 + 2 * 0.75], [0.25 + 2 * 2.75]]))


def test_guidance_off_computes_one_half_only():
    """Scale 1, and times outside the open interval, ends included; float32(0.1) is not above float32(0.1)."""
    x, y = torch.zeros(2, 1), torch.tensor([0, 3])
    for scale, t, rows in ((3.5, 0.5, 4), (3.5, 0.1, 2), (3.5, 0.0, 2), (3.5, 1.0, 2), (3.5, 0.1001, 4), (1.0, 0.5, 2)):
        model = Recorder()
        v = guide(model, y, scale)(x, torch.tensor(t))
        assert model.rows == [rows], (scale, t)
        if rows == 2:
            assert v.flatten().tolist() == [0, 3]
    model = Recorder()
    euler(guide(model, y, 3.5), x, time_grid(20))
    assert model.rows == [2] * 3 + [4] * 17  # t = 0, 0.05 and 0.1 are not guided


def test_solvers_evaluate_as_often_as_they_say():
    for name, (solver, _) in SOLVERS.items():
        calls = []
        solver(lambda x, t: calls.append(float(t)) or x, torch.zeros(1), time_grid(6))
        assert len(calls) == (12 if name == "heun" else 6)


def test_unknown_orders_are_refused():
    with pytest.raises(ValueError, match="orders 1 to 4, not 5"):
        adams(gaussian, torch.zeros(1), time_grid(2), order=5)


# ---- generate: the whole way from noise to pictures ------------------------------------------------------------------

GENERATED = {
    "euler": euler,
    "heun": heun,
    "adams": functools.partial(adams, order=3),
    "euler-maruyama": euler_maruyama,  # with a generator for each image
}


def streams(numbers):
    """Fresh generators for the noise of the stochastic solver, one for each image."""
    return [random_stream("solver", 0, i) for i in numbers]


def test_an_image_starts_from_noise_of_its_seed_and_number_alone():
    noise = image_noise(3, [5, 0, 7], (4, 6))
    assert noise.shape == (3, 3, 4, 6) and torch.equal(noise[1:2], image_noise(3, [0], (4, 6)))
    assert torch.equal(noise[0], torch.randn(3, 4, 6, generator=random_stream("noise", 3, 5)))
    assert not torch.equal(noise, image_noise(4, [5, 0, 7], (4, 6)))


@pytest.mark.parametrize("name", GENERATED)
def test_generate_is_the_solver_with_guidance_and_its_film_holds_x_t_and_the_image_predicted_from_it(name):
    """Figure 7 of the paper. The prediction is x_t + (1 - t) v at x_t itself.

    Catches: a setting that is lost on the way, Heun's trial points in the film, a frame too many or too few.
    """
    model, y, times, film = randomised(TINY), torch.tensor([1, 2]), time_grid(5, 2.0), []
    noise = image_noise(0, [5, 6], (16, 16))
    more = {"generators": streams([5, 6])} if name == "euler-maruyama" else {}
    watch = lambda step, t, x_t, x: film.append((step, float(t), x_t, x))
    images = generate(model, y, noise, times, 4.0, (0.2, 0.8), name, order=3, watch=watch, **more)

    states, extra = [], {"generator": streams([5, 6])} if name == "euler-maruyama" else {}
    velocity = guide(model, y, 4.0, (0.2, 0.8))
    keep = lambda step, t, x: states.append(x)
    with torch.no_grad():
        x = GENERATED[name](velocity, noise, times, callback=keep, **extra)
        assert images.dtype == torch.uint8 and torch.equal(images, to_uint8(x))
        assert [step for step, *_ in film] == [0, 1, 2, 3, 4, 5]
        for (_, t, x_t, predicted), state, time in zip(film, states, times, strict=True):
            assert t == float(time) and torch.equal(x_t, state)
            expected = clean_from_velocity(velocity(state, time), state, time) if time < 1 else state
            torch.testing.assert_close(predicted, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", GENERATED)
def test_an_image_is_the_same_in_any_batch_up_to_rounding(name):
    model, y, times = randomised(TINY), torch.tensor([0, 1, 2]), time_grid(6)
    noise = image_noise(0, [0, 1, 2], (16, 16))
    together = generate(model, y, noise, times, 3.5, solver=name, generators=streams([0, 1, 2]))
    for i in range(3):
        alone = generate(model, y[i : i + 1], noise[i : i + 1], times, 3.5, solver=name, generators=streams([i]))
        assert (alone[0].int() - together[i].int()).abs().max() <= 1


def test_generate_draws_each_token_with_more_pixels_on_a_given_grid():
    """Section 4.5. Catches: a grid that is lost on its way through the guidance."""
    model, y, times, noise = randomised(TINY), torch.tensor([1]), time_grid(4), image_noise(0, [0], (32, 32))
    images = generate(model, y, noise, times, 3.0, grid=(4, 4))
    with torch.no_grad():
        x = euler(guide(model, y, 3.0, grid=(4, 4)), noise, times)
        tokens = euler(guide(model, y, 3.0), noise, times)  # 8x8 of them
    assert images.shape == (1, 3, 32, 32) and torch.equal(images, to_uint8(x))
    assert not torch.equal(images, to_uint8(tokens))


def test_generate_computes_in_the_precision_it_is_given():
    """bf16 by autocast: matrix products round, the state between the steps does not."""
    model, y, times, noise = randomised(TINY), torch.tensor([1]), time_grid(4), image_noise(0, [0], (16, 16))
    seen, states = [], []
    model.patch_embed.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    images = {p: generate(model, y, noise, times, 3.0, precision=p) for p in ("fp32", "bf16")}
    assert set(seen[: len(seen) // 2]) == {torch.float32} and set(seen[len(seen) // 2 :]) == {torch.bfloat16}
    difference = (images["fp32"].int() - images["bf16"].int()).abs()
    assert 0 < difference.max() and difference.float().mean() < 5
    generate(model, y, noise, times, 3.0, precision="bf16", watch=lambda step, t, x_t, x: states.append(x_t.dtype))
    assert set(states) == {torch.float32}


def test_a_picture_that_is_not_finite_is_refused():
    """Cut to 0..255, it would look like a picture."""
    model, y, times, noise = randomised(TINY), torch.tensor([1, 1]), time_grid(4), image_noise(0, [0, 1], (16, 16))
    assert generate(model, y, noise, times, 1.0).shape == (2, 3, 16, 16)
    for broken in (float("nan"), float("inf")):
        noise[1, 0, 3, 3] = broken
        with pytest.raises(UserError, match="--precision fp32: a picture is not finite; try fp32, or an earlier"):
            generate(model, y, noise, times, 1.0)


def test_generate_keeps_nothing_for_a_backward_pass():
    """Catches: the memory of all the steps, which a gradient would need."""
    model, y, seen = randomised(TINY), torch.tensor([1]), []
    watch = lambda step, t, x_t, x: seen.append(x.requires_grad)
    generate(model, y, image_noise(0, [0], (16, 16)), time_grid(2), 1.0, watch=watch)
    assert next(model.parameters()).requires_grad and seen == [False, False, False]


@pytest.mark.parametrize("steps, bound", [(20, 0.01), (50, 2.5), (200, 2.5)])
@pytest.mark.parametrize("solver", [euler, adams])
def test_perfect_predictions_of_image_and_velocity_draw_the_same_picture(solver, steps, bound):
    """Within `bound` steps of 1/255, root mean square. Perfect: the one image is known at every time.

    Exact in 20 steps, which end with one from t = 0.95. With more, x-prediction's velocity, (x - x_t) / max(1 - t,
    0.05), is too small from there on: of the way from noise to image the last k steps of length h, k = 0.05 / h, leave
    k h (1 - h / 0.05)^k by Euler, at most 0.05 / e, and a little more by Adams. Catches a clamp that begins earlier.
    """
    generator = torch.Generator().manual_seed(0)
    image, noise = 2 * torch.rand(2, 3, 4, 4, generator=generator) - 1, torch.randn(2, 3, 4, 4, generator=generator)
    times = time_grid(steps)
    by_image = solver(lambda x, t: velocity_from_clean(image, x, t), noise, times)
    by_velocity = solver(lambda x, t: image - noise, noise, times)
    torch.testing.assert_close(by_velocity, image, atol=1e-5, rtol=1e-4)
    left = by_velocity - by_image  # a share of the whole way
    share = (left * (image - noise)).sum() / (image - noise).square().sum()
    torch.testing.assert_close(left, share * (image - noise), atol=1e-4, rtol=0)
    assert left.square().mean().sqrt() * 127.5 < bound
    if solver is euler:
        k = steps // 20
        assert share.item() == pytest.approx(k / steps * (1 - 20 / steps) ** k, abs=1e-4)
