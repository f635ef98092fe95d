"""CALM's published algorithm beside ours: the same frozen codec, backbone, text, steps and optimizer.

[`CalmStudent`] is written from the paper's equations (Shao et al., Continuous Autoregressive Language Models, arXiv
2510.27688, sections 3.1 to 3.3), where these leave something open from what its released code is known to do: the
distances of the energy loss as differences of all pairs, held at once, and a head that starts at zero. No code of
it is used.

B rows, T tokens, K tokens per patch, N = T // K patches, M = N - 1 places, H hidden, D latent, S samples, Y targets.
"""

import json
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel
from transformers.trainer_utils import set_seed

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeForCausalLM
from modeling_latentforge.modeling_latent_heads import energy_loss

from ..token_lm import build_token_lm
from .brier import bootstrap_means, patch_outcomes
from .frontier import one_thread
from .patch_draws import draw_after_text
from .side_by_side import SideBySide, training_code


PATCH_SIZE = 4
OURS, CALM, CALM_CDIST = "ours", "CALM", "CALM, distances by cdist"


# -- the published algorithm


def calm_energy_loss(samples: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`2 / (S Y) sum |z_y - z_s| - 1 / (S (S - 1)) sum_{s != s'} |z_s - z_s'|` (equation of section 3.3, exponent 1).

    The differences of all pairs are tensors `(S, Y, P, D)` and `(S, S, P, D)`, as in the released code: for a step of
    2048 patches with 8 samples, 100 targets and D=128 0.84 GB, and again in the backward pass. The equation asks
    for no such tensor; `energy_loss` of ours gives the same number without.

    Args:
        samples: `(S, P, D)`.
        targets: `(Y, P, D)`.

    Returns:
        `(P,)`.
    """
    count = samples.shape[0]
    to_target = torch.linalg.vector_norm(samples[:, None] - targets[None], dim=-1).mean((0, 1))
    between = torch.linalg.vector_norm(samples[:, None] - samples[None], dim=-1).sum((0, 1)) / (count * (count - 1))
    return 2 * to_target - between


class CalmBlock(nn.Module):
    """Fuses what the head has so far with the hidden state by two linear layers, then SwiGLU, then adds its input
    (section 3.2): 6 H^2 weights."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.fuse = nn.Sequential(
            nn.Linear(2 * hidden_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )
        self.gate_up = nn.Linear(hidden_size, 2 * hidden_size)
        self.down = nn.Linear(hidden_size, hidden_size)

    def forward(self, current: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """`(..., H)` and `(..., H)` -> `(..., H)`."""
        fused = self.fuse(torch.cat([self.norm(current), condition], dim=-1))
        gate, up = self.gate_up(fused).chunk(2, dim=-1)
        return current + self.down(nn.functional.silu(gate) * up)


class CalmStudent(nn.Module):
    """K token embeddings -> MLP -> causal backbone -> head that reads noise -> latents of a frozen codec.

    Args:
        codec: trained; frozen here.
        backbone_config: of the backbone.
        num_samples: S of the energy loss; the paper's 8.
        num_targets: Y, draws of the codec's posterior; the paper's 100.
        energy: the energy loss.
    """

    noise_size = 64

    def __init__(
        self,
        codec: LatentForgeAutoencoder,
        backbone_config: Any,
        num_samples: int = 8,
        num_targets: int = 100,
        energy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = calm_energy_loss,
    ):
        super().__init__()
        config: Any = codec.config
        hidden_size, self.patch_size = backbone_config.hidden_size, config.patch_size
        self.num_samples, self.num_targets, self.energy = num_samples, num_targets, energy
        self.codec = codec.eval().requires_grad_(False)
        self.embed_tokens = nn.Embedding(codec.config.vocab_size, hidden_size)
        # two layers bring the K embeddings to one input (section 3.1)
        self.compress = nn.Sequential(
            nn.Linear(self.patch_size * hidden_size, 2 * hidden_size),
            nn.SiLU(),
            nn.Linear(2 * hidden_size, hidden_size),
            nn.LayerNorm(hidden_size),
        )
        self.backbone = AutoModel.from_config(backbone_config)
        self.backbone.set_input_embeddings(None)
        self.from_noise = nn.Linear(self.noise_size, hidden_size)
        self.from_condition = nn.Linear(hidden_size, hidden_size)
        num_blocks = max(1, backbone_config.num_hidden_layers // 4)  # a quarter of the layers
        self.blocks = nn.ModuleList(CalmBlock(hidden_size) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(hidden_size)
        self.to_latent = nn.Linear(hidden_size, config.latent_size)
        for module in [
            self.embed_tokens,
            *self.compress,
            self.from_noise,
            self.from_condition,
            *self.blocks.modules(),
        ]:
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.to_latent.weight)
        nn.init.zeros_(self.to_latent.bias)

    def conditions(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, T)` -> states `(B, M, H)` after patches 0 .. N - 2, each of which the next patch is predicted from."""
        patches = input_ids.unflatten(1, (-1, self.patch_size))[:, :-1]
        embeds = self.compress(self.embed_tokens(patches).flatten(-2))
        return self.backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state

    def sample(self, condition: torch.Tensor, count: int) -> torch.Tensor:
        """`(P, H)` -> `(count, P, D)`, noise from U(-0.5, 0.5)."""
        noise = torch.rand(count, len(condition), self.noise_size, device=condition.device) - 0.5
        current, condition = self.from_noise(noise), self.from_condition(condition).expand(count, -1, -1)
        for block in self.blocks:
            current = block(current, condition)
        return self.to_latent(self.norm(current))

    def loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(B, T)` whole patches without padding -> mean energy loss of patches 1 .. N - 1."""
        condition = self.conditions(input_ids).flatten(0, 1)
        with torch.no_grad():
            posterior = self.codec.encode(input_ids)
            mean, log_std = (x[:, 1:].flatten(0, 1) for x in (posterior.mean, posterior.log_std))
            noise = torch.randn(self.num_targets, *mean.shape, device=mean.device)
            targets = mean + noise * log_std.exp()
        return self.energy(self.sample(condition, self.num_samples), targets).mean()

    @torch.no_grad()
    def draw(self, input_ids: torch.Tensor, count: int) -> torch.Tensor:
        """Patches 1 .. N - 1 after the true text before them, the likeliest tokens of a latent each: `(B, T) ->
        (count, B, M, K)`."""
        condition = self.conditions(input_ids).flatten(0, 1)
        latents = self.sample(condition, count)
        ids = torch.stack([self.codec.decode(draw).argmax(-1) for draw in latents])
        return ids.view(count, len(input_ids), -1, self.patch_size)


# -- both, as one kind of thing


class OurStudent(nn.Module):
    """Our energy head with the codec's parallel decoder, trained by its own `forward`."""

    def __init__(self, codec: LatentForgeAutoencoder, backbone_config: Any):
        super().__init__()
        self.model = LatentForgeForCausalLM.from_autoencoder(
            codec, backbone_config, decoder_type="parallel", head_config={"head_type": "energy"}
        )

    def loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, labels=input_ids, loss_weights={"energy": 1.0}, output_logits=False).loss

    def draw(self, input_ids: torch.Tensor, count: int) -> torch.Tensor:
        self.model.eval()
        return draw_after_text(self.model, input_ids, PATCH_SIZE, num_draws=count, noise_samples=count).ids


@cache
def _table(fields: tuple[tuple[str, Any], ...]) -> SideBySide:
    return SideBySide(**dict(fields), say=_silent)


@dataclass(frozen=True)
class Comparison:
    """Text, size and budget of both.

    Attributes:
        fields: of [`SideBySide`], which gives text, tokenizer and codec.
        steps, rows: rows of `block_size` tokens a step, all in one batch.
        rates: learning rates of each; the better on half of the held-out rows counts, the other half is reported.
        draws: an even number of draws per place, scored in pairs.
        timed_steps: steps behind tokens a second, and behind the peak.
        code: trainings of other code are not taken for these.
    """

    fields: dict[str, Any]
    steps: int = 250
    rows: int = 16
    rates: tuple[float, ...] = (1e-3, 4e-3)
    draws: int = 8
    timed_steps: int = 5
    code: str = field(default_factory=training_code)

    def table(self) -> SideBySide:
        return _table(tuple(self.fields.items()))

    def __post_init__(self) -> None:
        if self.draws < 2 or self.draws % 2:
            raise ValueError(f"`draws` ({self.draws}) are scored in pairs: take an even number")

    def build(self, algorithm: str) -> Any:
        """The untrained model.

        Raises:
            ValueError: an unknown algorithm.
        """
        table = self.table()
        codec = LatentForgeAutoencoder.from_pretrained(table.codec(PATCH_SIZE))
        sizes: dict[str, Any] = {"hidden_size": table.hidden_size, "num_hidden_layers": table.num_hidden_layers}
        backbone_config = build_token_lm("llama", table.tokenizer, **sizes).config
        set_seed(0)
        if algorithm == OURS:
            return OurStudent(codec, backbone_config)
        if algorithm == CALM:
            return CalmStudent(codec, backbone_config)
        if algorithm == CALM_CDIST:
            return CalmStudent(codec, backbone_config, energy=energy_loss)
        raise ValueError(f"unknown algorithm {algorithm!r}: known are {OURS!r}, {CALM!r} and {CALM_CDIST!r}")

    def trained(self, algorithm: str, rate: float) -> dict[str, Any]:
        """Brier sums `(R, K)` and `counts (R,)` of the held-out rows, `weights` trained and `seconds`; kept."""
        kept = self.path(algorithm, rate)
        if kept.exists():
            return torch.load(kept, weights_only=True)
        model, batches = self.build(algorithm), self.batches()
        start = time.perf_counter()
        for _ in optimise(model, batches, self.steps, rate):
            pass
        seconds = time.perf_counter() - start
        result: dict[str, Any] = brier_of(model, self.held_out(), self.draws)
        result |= {"seconds": seconds, "weights": num_trained(model)}
        torch.save(result, kept.with_suffix(".part"))
        kept.with_suffix(".part").rename(kept)
        return result

    def path(self, algorithm: str, rate: float) -> Path:
        """Where a training is kept; the released and the economical form of CALM's distances are one training."""
        name = "calm" if algorithm != OURS else "ours"
        return self.table().work_dir / f"{name}-{self.steps}-{self.rows}-{self.draws}-{rate:g}-{self.code}.pt"

    def batches(self) -> Callable[[int], torch.Tensor]:
        """Step -> `(rows, block_size)`; the same for every algorithm. Text that is used up begins again."""
        rows = whole_rows(self.table().blocks()[0])
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        return lambda step: rows[order[torch.arange(step * self.rows, (step + 1) * self.rows) % len(rows)]]

    def held_out(self) -> torch.Tensor:
        return whole_rows(self.table().blocks()[1])


def whole_rows(blocks: Any) -> torch.Tensor:
    """`(R, T)`: the rows without padding, for which CALM has no mask."""
    ids, mask = (torch.as_tensor(blocks[name][:]) for name in ("input_ids", "attention_mask"))
    return ids.long()[mask.bool().all(1)]


def num_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def optimise(model: Any, batches: Callable[[int], torch.Tensor], steps: int, rate: float) -> Iterator[float]:
    """Train step by step, and give each one's seconds. AdamW as in `SideBySide`: betas 0.9 and 0.95, weight decay 0.1,
    5 % warm-up, cosine to a tenth, gradients clipped at norm 1."""
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        done = torch.tensor((step - warm_up) / max(1, steps - warm_up))
        return float(0.1 + 0.45 * (1 + torch.cos(done * torch.pi)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(steps):
        start = time.perf_counter()
        model.loss(batches(step)).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        yield time.perf_counter() - start


@torch.no_grad()
def brier_of(model: Any, rows: torch.Tensor, draws: int, batch: int = 16) -> dict[str, Any]:
    """Brier outcomes of pairs of draws at every patch start, summed over each row: `sums (R, K)`, `counts (R,)`."""
    model.eval()
    torch.manual_seed(0)
    sums, counts = [], []
    for ids in rows.split(batch):
        drawn = model.draw(ids, draws)  # (S, B, M, K)
        targets = ids.unflatten(1, (-1, PATCH_SIZE))[:, 1:]
        outcomes = patch_outcomes(drawn[::2], drawn[1::2], targets.expand(draws // 2, *targets.shape)).double().mean(0)
        sums.append(outcomes.sum(1))
        counts.append(torch.full((len(ids),), targets.shape[1]))
    return {"sums": torch.cat(sums), "counts": torch.cat(counts)}


# -- figures


def train_both(comparison: Comparison, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """By algorithm the better of its rates: `rate`, `rates` (all tried, with Brier-1 on the rows that choose), `sums`
    and `counts` of the rows that are reported, `weights`, `seconds`. Two trainings at once, one thread each."""
    comparison.table().codec(PATCH_SIZE)
    comparison.table().blocks()
    jobs = [(name, rate) for rate in comparison.rates for name in (OURS, CALM_CDIST)]
    missing = [job for job in jobs if not comparison.path(*job).exists()]
    for name, rate in missing:
        say(f"training {name}, rate {rate:g}")
    if len(missing) > 1 and not torch.accelerator.is_available():
        workers = min(len(missing), os.cpu_count() or 1)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_train, [comparison] * len(missing), missing))
    found: dict[str, dict[str, Any]] = {}
    for name in (OURS, CALM_CDIST):
        tried = {rate: comparison.trained(name, rate) for rate in comparison.rates}

        def choice(rate: float, tried: dict[float, Any] = tried) -> float:
            return float(tried[rate]["sums"][1::2, 0].sum() / tried[rate]["counts"][1::2].sum())

        best = max(tried, key=choice)
        entry = tried[best]
        reported = {"sums": entry["sums"][::2], "counts": entry["counts"][::2]}
        found[name] = {**entry, **reported, "rate": best, "rates": {rate: choice(rate) for rate in tried}}
    return found


def _train(comparison: Comparison, job: tuple[str, float]) -> None:
    with one_thread():
        comparison.trained(*job)


def brier_differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[dict[str, float]]:
    """Brier-1 .. K of both, percent, and `high`, the upper end of the 95 % interval of ours less theirs, the same
    rows drawn again for both: below 0, ours is worse by more than noise."""
    drawn = [bootstrap_means(side["sums"], side["counts"]) for side in (ours, theirs)]
    high = torch.quantile(drawn[0] - drawn[1], 0.975, dim=0)
    low = torch.quantile(drawn[0] - drawn[1], 0.025, dim=0)
    means = [side["sums"].sum(0) / side["counts"].sum() for side in (ours, theirs)]
    return [
        {"ours": 100 * float(a), "calm": 100 * float(b), "low": 100 * float(low[n]), "high": 100 * float(high[n])}
        for n, (a, b) in enumerate(zip(*means, strict=True))
    ]


def training_speed(comparison: Comparison, algorithms: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Tokens per second of training steps, one thread, in turns, the first step of each not counted."""
    batches = comparison.batches()
    runs: dict[str, list[float]] = {name: [] for name in algorithms}
    steps = comparison.timed_steps + 1
    trainings = {name: optimise(comparison.build(name), batches, steps, 1e-4) for name in algorithms}
    tokens = batches(0).numel()
    with one_thread():
        for turn in range(steps):
            for name, training in trainings.items():
                seconds = next(training)
                if turn:
                    runs[name].append(tokens / seconds)
    return {name: {"tokens_per_second": statistics.median(rates), "runs": rates} for name, rates in runs.items()}


def training_memory(comparison: Comparison, algorithm: str) -> int:
    """Bytes by which a process of its own grows from before the model is built to the highest moment of training
    (VmHWM of Linux): weights, gradients, optimizer and everything a step holds."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_grown, comparison, algorithm).result()


def _grown(comparison: Comparison, algorithm: str) -> int:
    with one_thread():
        batches = comparison.batches()
        before = _high_water()
        for _ in optimise(comparison.build(algorithm), batches, comparison.timed_steps, 1e-4):
            pass
    return _high_water() - before


def _high_water() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status says no VmHWM: peaks are measured on Linux only")
    return 1024 * int(found.group(1))


def compare(comparison: Comparison, say: Callable[[str], None]) -> dict[str, Any]:
    """Everything the row reads: `trained` (weights, rates), `brier`, `speed`, `memory` (bytes), `comparison`."""
    trained = train_both(comparison, say)
    algorithms = (OURS, CALM, CALM_CDIST)
    say("speed and memory of training")
    speed = training_speed(comparison, algorithms)
    memory = {name: training_memory(comparison, name) for name in algorithms}
    return {
        "trained": {
            name: {key: entry[key] for key in ("rate", "rates", "weights", "seconds")}
            for name, entry in trained.items()
        },
        "places": int(trained[OURS]["counts"].sum()),
        "brier": brier_differences(trained[OURS], trained[CALM_CDIST]),
        "speed": speed,
        "memory": memory,
        "comparison": json.loads(json.dumps(asdict(comparison), default=str)),
    }


def _silent(line: str) -> None:
    pass
