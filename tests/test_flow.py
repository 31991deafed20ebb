"""Rectified flow: Eq. 1 to 4 against their closed forms, and the losses."""

import pytest
import torch

import flow


def test_eq_1_marginals_at_the_ends_and_between():
    """x_t has mean t x and standard deviation 1 - t; at t=0 it is the noise and at t=1 the image, exactly."""
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.full((200_000, 1), 3.0), torch.randn(200_000, 1, generator=generator)
    assert torch.equal(flow.interpolate(x, noise, 0.0), noise)
    assert torch.equal(flow.interpolate(x, noise, 1.0), x)
    for t in (0.25, 0.5, 0.9):
        x_t = flow.interpolate(x, noise, t)
        assert x_t.mean().item() == pytest.approx(3 * t, abs=0.01)
        assert x_t.std().item() == pytest.approx(1 - t, abs=0.01)


def test_eq_1_each_image_has_its_own_time():
    x, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.5, 1.0])
    x_t = flow.interpolate(x, noise, t)
    for i in range(3):
        torch.testing.assert_close(x_t[i], t[i] * x[i] + (1 - t[i]) * noise[i])


def test_eq_1_velocity_is_the_time_derivative_of_the_path():
    """By finite difference. Catches the opposite sign, which is the convention of other papers."""
    x, noise = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    slope = (flow.interpolate(x, noise, 0.5 + 1e-6) - flow.interpolate(x, noise, 0.5 - 1e-6)) / 2e-6
    torch.testing.assert_close(flow.velocity(x, noise), slope, atol=1e-8, rtol=0)


def test_image_noise_and_score_follow_from_the_velocity():
    x, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.1, 0.4, 0.7, 0.9])
    x_t, v = flow.interpolate(x, noise, t), flow.velocity(x, noise)
    torch.testing.assert_close(flow.clean_from_velocity(v, x_t, t), x)
    torch.testing.assert_close(flow.noise_from_velocity(v, x_t, t), noise)
    torch.testing.assert_close(
        flow.score_from_velocity(v, x_t, t), -noise / (1 - t).view(4, 1, 1, 1), atol=1e-5, rtol=1e-4
    )


def gaussian_velocity(x, t, mean=2.0, std=0.5):
    """The exact velocity and score where the data are N(mean, std^2): x_t is N(t mean, t^2 std^2 + (1-t)^2)."""
    variance = t**2 * std**2 + (1 - t) ** 2
    score = -(x - t * mean) / variance
    v = mean + (t * std**2 - (1 - t)) / variance * (x - t * mean)  # E[x - eps | x_t]
    return v, score


def test_score_of_a_gaussian_is_the_gradient_of_its_log_density():
    x = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]
    for t in (0.1, 0.5, 0.9):
        v, score = gaussian_velocity(x, t)
        torch.testing.assert_close(flow.score_from_velocity(v, x, t), score)


def test_eq_2_coefficients_are_the_derivatives_of_alpha_and_sigma():
    """f = d log(alpha)/ds and g^2 = d(sigma^2)/ds - 2 f sigma^2, by finite difference in s = 1 - t."""
    t, h = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), 1e-6
    s = 1 - t
    f = (torch.log(1 - (s + h)) - torch.log(1 - (s - h))) / (2 * h)
    g2 = ((s + h) ** 2 - (s - h) ** 2) / (2 * h) - 2 * f * s**2
    for got, expected in zip(flow.sde_coefficients(t), (f, g2)):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_eq_4_probability_flow_ode_is_the_velocity():
    """dx = [f x - g^2/2 score] ds with ds = -dt is dx = v dt, for any x."""
    x = torch.linspace(-2, 3, 11, dtype=torch.float64)[:, None]
    for t in (0.1, 0.5, 0.9):
        v, score = gaussian_velocity(x, t)
        f, g2 = flow.sde_coefficients(t)
        torch.testing.assert_close(-(f * x - g2 / 2 * score), v)


def test_shift_time_keeps_the_ends_and_the_order():
    t = torch.linspace(0, 1, 11)
    assert torch.equal(flow.shift_time(t, 1.0), t)
    shifted = flow.shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all() and (shifted[1:-1] < t[1:-1]).all()


def test_training_times_are_logit_normal():
    """log(t / (1 - t)) is N(-log(shift), 1)."""
    for shift in (1.0, 3.0):
        t = flow.sample_time(100_000, shift, torch.Generator().manual_seed(0)).double()
        logit = torch.log(t / (1 - t))
        assert logit.mean().item() == pytest.approx(-torch.tensor(shift).log().item(), abs=0.02)
        assert logit.std().item() == pytest.approx(1, abs=0.02)


def test_flow_matching_loss_is_the_mean_squared_error_to_the_velocity():
    v, x, noise = (torch.randn(2, 3, 4, 4) for _ in range(3))
    total = sum(
        (v[b, c, i, j] - (x - noise)[b, c, i, j]) ** 2
        for b in range(2)
        for c in range(3)
        for i in range(4)
        for j in range(4)
    )
    torch.testing.assert_close(flow.flow_matching_loss(v, x, noise), total / v.numel())
    torch.testing.assert_close(flow.flow_matching_loss(v, x, noise, per_image=True).mean(), total / v.numel())
    assert flow.flow_matching_loss(flow.velocity(x, noise), x, noise) == 0


def test_a_perfect_prediction_of_the_image_is_the_velocity_up_to_the_last_twentieth():
    x, noise, t = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.tensor([0.0, 0.5, 0.9, 0.95])
    v = flow.velocity_from_clean(x, flow.interpolate(x, noise, t), t)
    torch.testing.assert_close(v, flow.velocity(x, noise), atol=1e-5, rtol=1e-4)
    t = torch.tensor([0.96, 0.975, 0.99, 1.0])  # from there on smaller, in proportion, and never infinite
    v = flow.velocity_from_clean(x, flow.interpolate(x, noise, t), t)
    shares = ((1 - t) / 0.05).view(4, 1, 1, 1)
    torch.testing.assert_close(v, shares * flow.velocity(x, noise), atol=1e-4, rtol=1e-3)


def test_spatial_alignment_teaches_what_differs_from_place_to_place():
    """By a loop, and a teacher that is moved and scaled teaches the same."""
    student, teacher = torch.randn(2, 6, 5), torch.randn(2, 6, 5)
    normal = torch.empty(2, 6, 5)
    for b in range(2):
        for feature in range(5):
            column = teacher[b, :, feature]
            normal[b, :, feature] = (column - column.mean()) / column.var(unbiased=False).sqrt()
    expected = flow.alignment_loss(student, normal)
    torch.testing.assert_close(flow.alignment_loss(student, teacher, spatial=True), expected, atol=1e-5, rtol=1e-4)
    moved = 3 * teacher + torch.randn(2, 1, 5)
    torch.testing.assert_close(flow.alignment_loss(student, moved, spatial=True), expected, atol=1e-5, rtol=1e-4)


def test_alignment_loss_is_one_minus_the_mean_cosine():
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    cosines = [torch.dot(a, b) / a.norm() / b.norm() for a, b in zip(student.view(6, 5), teacher.view(6, 5))]
    torch.testing.assert_close(flow.alignment_loss(student, teacher), 1 - sum(cosines) / 6)
    assert flow.alignment_loss(student, 7 * student).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="differ"):
        flow.alignment_loss(student, teacher[:, :2])


def test_loss_with_alignment_is_the_released_implementations(golden, golden_model, device):
    """The whole REPA objective on the golden model: flow loss + 0.5 * alignment of block 2 through the projector."""
    model, _ = golden_model("c2i_square", device)
    file = golden("repa_loss", device)
    x, noise, t = file["x"], file["eps"], file["t"]
    v, tokens = model(flow.interpolate(x, noise, t), t, file["y"], features_at=int(file["align_layer"]))
    for i in (0, 2, 4):
        tokens = torch.nn.functional.linear(tokens, file[f"proj.0.{i}.weight"], file[f"proj.0.{i}.bias"])
        tokens = torch.nn.functional.silu(tokens) if i < 4 else tokens
    flow_loss, alignment = flow.flow_matching_loss(v, x, noise), flow.alignment_loss(tokens, file["teacher"])
    torch.testing.assert_close(flow_loss, file["fm_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(alignment, file["cos_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(flow_loss + float(file["weight"]) * alignment, file["loss"], rtol=1e-5, atol=0)
