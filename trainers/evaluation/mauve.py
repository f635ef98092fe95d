"""How near a model's texts are to people's, as distributions: MAUVE (Pillutla et al., arXiv 2102.01454).

Features are the judge's (the teacher's own hidden states), clusters and curve are computed here: the library of the
paper needs a GPT-2 download, faiss and scikit-learn. So figures compare models under one judge, one number of texts
and one seed, and nothing else; the report puts people's text against other text of people beside them.

R texts of L tokens, H width of the judge, C clusters.
"""

from typing import Any

import torch


SCALE = 5.0  # of the exponent, "c" of the paper


@torch.no_grad()
def judge_texts(
    judge: Any, prompts: torch.Tensor, texts: torch.Tensor, batch_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a token model thinks of continuations.

    Args:
        judge: a token LM in eval mode.
        prompts, texts: `(R, T)` and `(R, L)` ids; a text continues its prompt.
        batch_size: rows at once.

    Returns:
        nats of each token of the texts `(R, L)`, and features `(R, H)`: the last hidden states, mean over the text's
        tokens. (The paper takes the last token's state; of texts that end anywhere it tells mostly that token.)
    """
    nats, features = [], []
    for prompt, text in zip(prompts.split(batch_size), texts.split(batch_size), strict=True):
        ids = torch.cat([prompt, text], dim=1).to(judge.device)
        output = judge(input_ids=ids, output_hidden_states=True, use_cache=False)
        start = prompt.shape[1]
        logits = output.logits[:, start - 1 : -1].float()
        nats.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, start:], reduction="none").cpu())
        features.append(output.hidden_states[-1][:, start:].float().mean(1).cpu())
    return torch.cat(nats), torch.cat(features)


def cluster(features: torch.Tensor, num_clusters: int, steps: int = 50, seed: int = 0) -> torch.Tensor:
    """k-means of `(R, H)`, begun by k-means++: the cluster of each row, `(R,)`."""
    features = torch.nn.functional.normalize(features.double(), dim=1)
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(features), (1,), generator=generator))]
    nearest = torch.full((len(features),), float("inf"), dtype=torch.float64)
    for _ in range(num_clusters - 1):
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1))
        if not nearest.sum():  # fewer different texts than clusters
            break
        chosen.append(int(torch.multinomial(nearest, 1, generator=generator)))
    centres = features[chosen]
    assigned = torch.cdist(features, centres).argmin(1)
    for _ in range(steps):
        sums = torch.zeros_like(centres).index_add_(0, assigned, features)
        counts = assigned.bincount(minlength=len(centres)).double()[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
        again = torch.cdist(features, centres).argmin(1)
        if torch.equal(again, assigned):
            break
        assigned = again
    return assigned


def divergence_area(first: torch.Tensor, second: torch.Tensor, points: int = 99) -> float:
    """Area under the divergence curve of two distributions `(C,)`, 1 where they are equal, towards 0 where they are
    disjoint: `(exp(-c KL(Q | R)), exp(-c KL(P | R)))` over mixtures `R = w P + (1 - w) Q`."""
    weights = torch.linspace(0, 1, points + 2, dtype=torch.float64)[1:-1, None]
    mixture = weights * first + (1 - weights) * second  # (points, C)

    def fall(p: torch.Tensor) -> torch.Tensor:
        return torch.exp(-SCALE * torch.special.xlogy(p, p / mixture.clamp(min=1e-300)).sum(1))

    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    x = torch.cat([one, fall(second), zero])  # w grows: R goes from Q to P, x from 1 to 0
    y = torch.cat([zero, fall(first), one])
    return float(-torch.trapezoid(y, x))


def mauve(features: torch.Tensor, reference: torch.Tensor, seeds: int = 5) -> dict[str, float]:
    """MAUVE of `(R, H)` features against `(R', H)` of reference texts.

    Both are clustered together, a cluster for ten texts of each; shares are smoothed by 1/2 a text (Pillutla et al.,
    arXiv 2212.14578).

    Returns:
        `mauve`, mean over `seeds` clusterings, and `mauve_deviation` between them.
    """
    both = torch.cat([features, reference])
    clusters = max(2, len(both) // 20)
    values = []
    for seed in range(seeds):
        assigned = cluster(both, clusters, seed=seed)
        shares = []
        for part in (assigned[: len(features)], assigned[len(features) :]):
            counts = part.bincount(minlength=clusters).double() + 0.5
            shares.append(counts / counts.sum())
        values.append(divergence_area(shares[0], shares[1]))
    found = torch.tensor(values, dtype=torch.float64)
    return {"mauve": float(found.mean()), "mauve_deviation": float(found.std())}
