import pytest
import torch

from modeling_latentforge.modeling_latent_heads import energy_loss
from tests.conftest import tiny_student


@pytest.mark.parametrize("exponent", [0.5, 0.75, 1.0, 1.5])
def test_energy_gradient_is_finite_where_samples_coincide(exponent):
    """CALM's reference code gets NaN for exponents below 1 from the zero diagonal; an untrained head gives equal
    samples as well."""
    samples = torch.randn(1, 5, 6).repeat(4, 1, 1).requires_grad_()
    loss = energy_loss(samples, torch.randn(3, 5, 6), exponent).sum()
    loss.backward()
    assert loss.isfinite() and samples.grad.isfinite().all()


def test_energy_score_equals_its_definition():
    """A diagonal that is counted, or a missing factor 2, changes the optimum: the head would no longer match the
    distribution."""
    samples, targets = torch.randn(4, 3, 6), torch.randn(2, 3, 6)
    expected = torch.zeros(3)
    for p in range(3):
        to_target = sum((samples[s, p] - targets[m, p]).norm() for s in range(4) for m in range(2)) / 8
        between = sum((samples[s, p] - samples[r, p]).norm() for s in range(4) for r in range(4) if s != r) / 12
        expected[p] = 2 * to_target - between
    torch.testing.assert_close(energy_loss(samples, targets), expected)


def test_energy_score_is_lowest_at_the_target_distribution():
    """A score that prefers a narrower or shifted model is not proper: samples would collapse."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(64, 200, 2, generator=generator)
    draws = torch.randn(64, 200, 2, generator=generator)
    scores = {
        name: energy_loss(model, targets).mean()
        for name, model in {"right": draws, "narrow": 0.5 * draws, "wide": 2 * draws, "shifted": draws + 0.5}.items()
    }
    assert min(scores, key=scores.get) == "right"


def test_energy_head_uses_its_noise_and_repeats_without_it():
    """A head that ignores the noise is a regression head at eight times the price."""
    student = tiny_student("energy", "parallel")
    condition = torch.randn(2, 3, 32)
    assert not torch.equal(student.sample_latents(condition, True), student.sample_latents(condition, True))
    assert torch.equal(student.sample_latents(condition, False), student.sample_latents(condition, False))
