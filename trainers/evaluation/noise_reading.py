"""How many octaves does an aligned head need to read a number?

    python -m trainers.evaluation.noise_reading

P places whose next tokens follow Zipf's law in an order of their own, which is all that there is to know: a token is
then a function of the place and of u in [0, 1), its place in the sorted distribution, and the head can learn it to 0
nats. What is left after a fixed number of steps says how well sines and cosines of so many octaves tell numbers apart.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import LlamaConfig

from modeling_latentforge import LatentForgeAutoencoderConfig, LatentForgeConfig
from modeling_latentforge.modeling_latent_heads import LatentForgeAlignedHead


def unread_nats(
    num_frequencies: int, seed: int, places: int = 32, vocab_size: int = 256, patch_size: int = 4, steps: int = 800
) -> float:
    """Cross-entropy per token given its number, mean of the last tenth of the steps."""
    torch.manual_seed(seed)
    codec = LatentForgeAutoencoderConfig(vocab_size=vocab_size, patch_size=patch_size, latent_size=32 * patch_size)
    backbone = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2)
    head_config = {"head_type": "aligned", "num_frequencies": num_frequencies}
    head = LatentForgeAlignedHead(
        LatentForgeConfig(
            backbone_config=backbone, autoencoder_config=codec, head_config=head_config, decoder_type="parallel"
        )
    )
    reader = nn.Linear(32 * patch_size, patch_size * vocab_size)
    conditions = torch.randn(places, 128)
    order = torch.rand(places, patch_size, vocab_size).argsort(-1)  # likeliest first
    mass = 1 / torch.arange(1, vocab_size + 1)
    ends = (mass / mass.sum()).cumsum(0)
    optimizer = torch.optim.AdamW([*head.parameters(), *reader.parameters()], lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    left = []
    for _ in range(steps):
        place = torch.randint(places, (256,))
        noise = torch.rand(256, patch_size)
        rank = torch.searchsorted(ends, noise).clamp(max=vocab_size - 1)
        tokens = order[place].gather(2, rank[..., None])[..., 0]
        logits = reader(head.sample(conditions[place], noise)).unflatten(1, (patch_size, vocab_size))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        left.append(loss.item())
    return sum(left[-steps // 10 :]) / len(left[-steps // 10 :])


def table(
    frequencies: Sequence[int] = (1, 2, 4, 6, 8),
    seeds: Sequence[int] = (0, 1),
    say: Callable[[str], object] = print,
    **sizes: int,
) -> dict[int, list[float]]:
    """[`unread_nats`] of each number of octaves, one figure a seed."""
    results: dict[int, list[float]] = {}
    for count in frequencies:
        found = results[count] = []
        for seed in seeds:
            found.append(unread_nats(count, seed, **sizes))
            say(f"{count} octaves, seed {seed}: {found[-1]:.3f} nats left")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    table()
