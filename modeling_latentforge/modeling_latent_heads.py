"""Heads: what is known before a patch -> the patch's latent.

P patches, H hidden, D latent, S model samples, M target samples. A head has `noise_size` (0: it reads none)
and `sample(condition, noise)`; noise is an argument, so that its seed belongs to the caller. The energy head has a
`loss` of its own; the others learn through the decoder, and from the squared error to the codec's mean, the student's
part `mse`.
"""

import math

import torch
from torch import nn

from .configuration_latentforge import LatentForgeConfig
from .modeling_autoencoder import LatentForgeMLPBlock


# Distances below this carry no gradient: d^exponent has an infinite slope at 0 for exponents below 1, and samples of
# an untrained head coincide.
MIN_DISTANCE = 1e-6


def energy_loss(samples: torch.Tensor, targets: torch.Tensor, exponent: float = 1.0) -> torch.Tensor:
    """Negative energy score, per patch, unbiased (pairs of a sample with itself are left out).

    `2 E|z - y|^a - E|z - z'|^a` (Gneiting and Raftery 2007, eq. 22; CALM, arXiv 2510.27688, eq. 11), lower is better.

    Args:
        samples: `(S, P, D)` draws of the model, S >= 2.
        targets: `(M, P, D)` draws of the target distribution.
        exponent: a, in (0, 2).

    Returns:
        `(P,)`. The gradient is finite for every exponent, also where two samples coincide.
    """
    num_samples = samples.shape[0]
    samples, targets = samples.transpose(0, 1).float(), targets.transpose(0, 1).float()  # (P, S, D), (P, M, D)
    # the matrix-product form of cdist loses half the digits for near samples, and d^a magnifies that
    to_target = torch.cdist(samples, targets, compute_mode="donot_use_mm_for_euclid_dist")  # (P, S, M)
    rows, columns = torch.triu_indices(num_samples, num_samples, offset=1, device=samples.device)
    between = torch.cdist(samples, samples, compute_mode="donot_use_mm_for_euclid_dist")[
        :, rows, columns
    ]  # (P, S (S - 1) / 2)
    return 2 * _power(to_target, exponent).mean((1, 2)) - _power(between, exponent).mean(1)


def _power(distance: torch.Tensor, exponent: float) -> torch.Tensor:
    return distance.clamp_min(MIN_DISTANCE).pow(exponent)


class LatentForgeRegressionHead(nn.Module):
    """One latent per condition."""

    noise_size = 0

    def __init__(self, config: LatentForgeConfig):
        super().__init__()
        hidden_size, head = config.backbone_config.hidden_size, config.head_config
        self.blocks = nn.Sequential(
            *(
                LatentForgeMLPBlock(hidden_size, head.intermediate_size, config.rms_norm_eps)
                for _ in range(head.num_layers)
            )
        )
        self.norm = nn.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.to_latent = nn.Linear(hidden_size, config.latent_size)

    def sample(self, condition: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """`(..., H)` -> `(..., D)`; `noise` is ignored."""
        return self.to_latent(self.norm(self.blocks(condition)))


class LatentForgeNoiseHead(nn.Module):
    """Noise and a condition -> a latent. The condition enters before every block (CALM, arXiv 2510.27688, section
    3.2).

    Args:
        noise_size: numbers that it reads.
        num_features: into which `features` turns them.
    """

    def __init__(self, config: LatentForgeConfig, noise_size: int, num_features: int):
        super().__init__()
        hidden_size, head = config.backbone_config.hidden_size, config.head_config
        self.noise_size = noise_size
        self.norm_condition = nn.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.from_noise = nn.Linear(num_features, hidden_size)
        self.from_condition = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(head.num_layers + 1))
        self.blocks = nn.ModuleList(
            LatentForgeMLPBlock(hidden_size, head.intermediate_size, config.rms_norm_eps)
            for _ in range(head.num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.to_latent = nn.Linear(hidden_size, config.latent_size)

    def features(self, noise: torch.Tensor) -> torch.Tensor:
        """`(..., noise_size)` -> `(..., num_features)`."""
        return noise

    def centre(self, condition: torch.Tensor) -> torch.Tensor:
        """What is added where there is no noise."""
        return self.from_noise.bias

    def sample(self, condition: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """`condition (..., H)`, `noise (..., noise_size)` broadcast against it -> `(..., D)`. Without noise: zeros in
        its place."""
        condition = self.norm_condition(condition)
        hidden = self.from_condition[0](condition)
        if noise is None:
            hidden = hidden + self.centre(condition)
        else:
            hidden = hidden + self.from_noise(self.features(noise).to(self.from_noise.weight.dtype))
        for block, from_condition in zip(self.blocks, self.from_condition[1:], strict=True):
            hidden = block(hidden + from_condition(condition))
        return self.to_latent(self.norm(hidden))


class LatentForgeEnergyHead(LatentForgeNoiseHead):
    """Uniform noise and a condition -> a sample of the latent. Loss: [`energy_loss`]."""

    def __init__(self, config: LatentForgeConfig):
        head = config.head_config
        super().__init__(config, head.noise_size, head.noise_size)
        self.num_samples, self.num_targets, self.exponent = head.num_samples, head.num_targets, head.exponent

    def draw_noise(
        self, shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """U(-0.5, 0.5) of `(*shape, noise_size)`."""
        noise = torch.rand(*shape, self.noise_size, device=like.device, dtype=torch.float32, generator=generator) - 0.5
        return noise.to(like.dtype)

    def loss(self, condition: torch.Tensor, target_mean: torch.Tensor, target_log_std: torch.Tensor) -> torch.Tensor:
        """Energy score of `num_samples` latents against `num_targets` draws of the codec's posterior: `(P, H), (P, D),
        (P, D) -> (P,)`."""
        noise = self.draw_noise((self.num_samples, condition.shape[0]), condition)
        samples = self.sample(condition, noise)
        target_mean, target_log_std = target_mean.float(), target_log_std.float()
        target_noise = torch.randn(
            self.num_targets, *target_mean.shape, device=target_mean.device, dtype=target_mean.dtype
        )
        targets = target_mean + target_noise * target_log_std.exp()
        return energy_loss(samples, targets, self.exponent)


class LatentForgeAlignedHead(LatentForgeNoiseHead):
    """A number u in [0, 1) for every token of the patch, and a condition -> the latent of the patch that a teacher
    writes with these numbers (noise-aligned distillation; PTP, arXiv 2512.21323).

    A teacher draws a token by inverting the sum of its probabilities, sorted from the likeliest on, at u. Given text,
    u is drawn from the token's own interval; then condition and numbers fix the patch, and all its tokens can be
    predicted at once by cross-entropy. Numbers below p are nucleus sampling with `top_p` p, but that the last token
    of the nucleus keeps only its part below p; zeros are greedy.
    """

    def __init__(self, config: LatentForgeConfig):
        self.num_frequencies = config.head_config.num_frequencies
        super().__init__(config, config.patch_size, config.patch_size * (1 + 2 * self.num_frequencies))

    def draw_noise(
        self, shape: tuple[int, ...], like: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """U(0, 1) of `(*shape, K)`, always in fp32: 8 bits tell few tokens apart."""
        return torch.rand(*shape, self.noise_size, device=like.device, dtype=torch.float32, generator=generator)

    def features(self, noise: torch.Tensor) -> torch.Tensor:
        octaves = 2.0 ** torch.arange(self.num_frequencies, device=noise.device)
        angles = (2 * math.pi * noise.float()[..., None] * octaves).flatten(-2)
        return torch.cat([noise, angles.sin(), angles.cos()], dim=-1)

    def centre(self, condition: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(self.noise_size, device=condition.device)
        return self.from_noise(self.features(zeros).to(self.from_noise.weight.dtype))


HEADS = {
    "regression": LatentForgeRegressionHead,
    "energy": LatentForgeEnergyHead,
    "aligned": LatentForgeAlignedHead,
}
