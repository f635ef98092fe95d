"""Whole patches at a temperature, when their probability can only be drawn from.

A head that reads noise gives patches the distribution P(x) = E_noise prod_k softmax_k(x_k): no formula for P(x), so
none for P(x)^(1/T) either, and a temperature on each token gives another distribution. What remains is to draw (CALM,
arXiv 2510.27688, section 5): patches that come up n times in n draws have the probability P(x)^n.

R rows, N draws of a row so far, K tokens per patch, S size of a draw's state. 1/T = n + a with n whole and 0 <= a < 1.

`draw` is a function `(rows (R',), count) -> ids (R', count, K)`, or a [`LazyDraws`], which chooses a draw's tokens one
place after another and only as long as another draw agrees with it. Nothing loops over rows. The device is waited for
once per block of draws, with lazy draws once more per place of the patch.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .modeling_autoencoder import project_few


# nu^2 over the nu-norm of the counts, at which the batched form has seen enough: an upper bound of the relative bias
# that its weights then correct. 32 coinciding pairs at T = 0.5; measured in docs/experiments.md.
ENOUGH = 0.5
# share of the weight that may lie on patches whose coin the draws did not decide (only where 1/T is no whole number)
UNDECIDED = 0.1
# An output matrix of 32000 x 512 takes as long for 32 vectors as for 16 (18 and 16 ms on one thread, measured): it is
# read once.
FIRST_BLOCK = 32
SECTION = 256  # tokens


class PatchSample(NamedTuple):
    """`ids (R, K)`; `draws (R,)` made for them; `met (R,)`, False where `max_draws` forced the fallback; of lazy draws
    `logits (R, K, V)`, those that the tokens were drawn from, else None."""

    ids: torch.Tensor
    draws: torch.Tensor
    met: torch.Tensor
    logits: torch.Tensor | None = None


class PatchSampling(NamedTuple):
    """What `generate` was asked for: the temperature of whole patches, `exact` or `batched`, most draws per patch.

    `ended`, where not None, gives the rows `(B,)` whose text has ended, and for which nothing is drawn."""

    temperature: float
    form: str
    max_draws: int
    ended: Callable[[], torch.Tensor | None] | None = None


class LazyDraws:
    """Draws of one row of a student each: noise -> latent -> codec hidden, and tokens as they are asked for.

    With a large vocabulary a draw costs its K rows of the output matrix. Most draws agree with no other in their first
    token, and then need one.

    Args:
        sample_latents: `(R', 1, H)`, count -> latents `(R', count, D)`.
        decoder, output: the codec's decoder and the output matrix.
        condition: `(R, H)`.
    """

    def __init__(
        self,
        sample_latents: Callable[[torch.Tensor, int], torch.Tensor],
        decoder: nn.Module,
        output: nn.Module,
        condition: torch.Tensor,
    ):
        self.sample_latents, self.decoder, self.output, self.condition = sample_latents, decoder, output, condition
        self.patch_size = decoder.patch_size

    def start(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """`(R',)` -> states `(R', count, S)`, independent draws."""
        latents = self.sample_latents(self.condition[rows, None], count)
        return self.decoder.patch_hidden(latents.to(self.decoder.from_latent.weight.dtype))

    def token(self, states: torch.Tensor, place: int) -> torch.Tensor:
        """`(M, S)` -> one token `(M,)` each, drawn from the softmax of this place."""
        return draw_tokens(project_few(self.output, self.decoder.token_hidden(states, place)), overwrite=True)

    def whole(self, states: torch.Tensor) -> torch.Tensor:
        """`(M, S)` -> all tokens of each, `(M, K)`."""
        return draw_tokens(self.logits(states).flatten(0, 1), overwrite=True).unflatten(0, (-1, self.patch_size))

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`(M, S)` -> `(M, K, V)`."""
        return self.output(self.decoder.tokens_hidden(states))


def draw_tokens(logits: torch.Tensor, overwrite: bool = False) -> torch.Tensor:
    """`(M, V)` -> `(M,)`, a sample of each softmax from one uniform number: `multinomial` draws V of them.

    With `overwrite` the logits are spoilt, and nothing as large is allocated: fresh pages cost more than the sums (14
    against 48 ms for 200 rows of 32000, measured).
    """
    vocab_size = logits.shape[-1]
    top = logits.amax(-1, keepdim=True)
    if overwrite and logits.dtype == torch.float32:
        probabilities = logits.sub_(top).exp_()
    else:
        probabilities = (logits.float() - top.float()).exp_()
    # first the section that the number falls into, then the token: a running sum over all is the slowest part
    if vocab_size % SECTION:
        probabilities = nn.functional.pad(probabilities, (0, -vocab_size % SECTION))
    sections = probabilities.unflatten(-1, (-1, SECTION))  # (M, C, .)
    section, rest = _fall_into(sections.sum(-1).contiguous(), None)
    token, _ = _fall_into(sections[torch.arange(len(logits), device=logits.device), section].contiguous(), rest)
    return (section * SECTION + token).clamp(max=vocab_size - 1)


def _fall_into(weights: torch.Tensor, number: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `(M, C)` laid side by side and a number `(M, 1)`, by default uniform over all of them -> the index
    `(M,)` of the one that it falls into, and how far, `(M, 1)`."""
    cumulated = weights.cumsum(-1)
    if number is None:
        number = torch.rand_like(cumulated[:, :1]) * cumulated[:, -1:]
    # inside, whatever the rounding: what has no weight is never met
    number = number.clamp(min=0).minimum(cumulated[:, -1:] * (1 - 1e-6))
    index = torch.searchsorted(cumulated, number, right=True)
    return index[:, 0], number - (cumulated.gather(1, index) - weights.gather(1, index))


def check_patch_sampling(temperature: float, form: str, max_draws: int) -> None:
    """Raises ValueError with the value and the remedy."""
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not is_number or not 0 < temperature <= 1:
        raise ValueError(
            f"`patch_temperature` ({temperature!r}) must be a number in (0, 1]: a distribution that can only be drawn "
            "from can be sharpened, not flattened. None switches it off."
        )
    check_patch_options(form, max_draws)
    if max_draws < math.ceil(1 / temperature):
        raise ValueError(
            f"`max_draws` ({max_draws!r}) must be a whole number of at least {math.ceil(1 / temperature)}, the equal "
            f"draws that `patch_temperature` {temperature} asks for."
        )


def check_patch_options(form: str, max_draws: int) -> None:
    """What can be said without a temperature. Raises ValueError with the value and the remedy."""
    if form not in SAMPLERS:
        raise ValueError(f"`patch_sampling` ({form!r}) must be one of {sorted(SAMPLERS)}.")
    if not isinstance(max_draws, int) or isinstance(max_draws, bool) or max_draws < 1:
        raise ValueError(f"`max_draws` ({max_draws!r}) must be a whole number of at least 1.")


def split_exponent(temperature: float) -> tuple[int, float]:
    """1/T = n + a. 1/0.1 and its like are whole numbers up to rounding."""
    exponent = 1 / temperature
    if abs(exponent - round(exponent)) < 1e-6:
        return round(exponent), 0.0
    return math.floor(exponent), exponent - math.floor(exponent)


# -- draws so far


class DrawPool:
    """The draws of the rows that are not done.

    Attributes:
        rows: `(R,)`, what `draw` calls them.
        ids: `(R, N, K)`, -1 where a lazy draw's token was not chosen yet.
        states: `(R, N, S)`, or None.
    """

    def __init__(self, draw, rows: torch.Tensor):
        self.draw, self.rows, self.is_lazy = draw, rows, hasattr(draw, "start")
        self.ids: torch.Tensor | None = None  # before the first block
        self.states: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return 0 if self.ids is None else self.ids.shape[1]

    def choose_all_tokens(self, size: int = 32) -> None:
        """Lazy draws: whole at once, of `size` draws at a time."""
        if self.is_lazy:
            pieces = [self.draw.whole(piece) for piece in self.states.flatten(0, 1).split(size)]
            self.ids = torch.cat(pieces).view_as(self.ids)

    def grow(self, count: int) -> None:
        if self.is_lazy:
            states = self.draw.start(self.rows, count)
            ids = torch.full((*states.shape[:2], self.draw.patch_size), -1, device=states.device)
            self.states = states if self.states is None else torch.cat([self.states, states], dim=1)
        else:
            ids = self.draw(self.rows, count)
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)

    def keep(self, index: torch.Tensor) -> "DrawPool":
        """The rows at `index`, in a pool of their own."""
        pool = DrawPool(self.draw, self.rows[index])
        pool.ids = self.ids[index]
        pool.states = None if self.states is None else self.states[index]
        return pool

    def keys(self, threshold: int, first: int = 0, extra: torch.Tensor | None = None) -> torch.Tensor:
        """Numbers `(R, N')` that are equal where patches are, of the draws from `first` on and before them of draw
        `extra (R,)`.

        Draws of which fewer than `threshold` begin alike are told apart without looking further.
        """
        index = torch.arange(first, self.count, device=self.rows.device).expand(len(self.rows), -1)
        if extra is not None:
            index = torch.cat([extra[:, None], index], dim=1)
        apart = torch.arange(index.shape[1], device=index.device)
        alone = torch.zeros_like(index, dtype=torch.bool)
        key = torch.zeros_like(index)
        for place in range(self.ids.shape[2]):
            tokens = self.ids[:, :, place].gather(1, index)
            if self.is_lazy:
                row, column = (~alone & (tokens < 0)).nonzero(as_tuple=True)
                if len(row):
                    chosen = self.draw.token(self.states[row, index[row, column]], place)
                    self.ids[row, index[row, column], place] = tokens[row, column] = chosen
            base = tokens.max() + 1
            tokens = torch.where(alone, base + apart, tokens)
            key = _ranks(key * (base + len(apart)) + tokens)
            alone = _sizes(key) < threshold
        return key

    def take(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw `index (R,)` of each row, whole: ids `(R, K)`; logits `(R, K, V)` of a lazy draw or None."""
        row = torch.arange(len(index), device=index.device)
        ids = self.ids[row, index]
        if not self.is_lazy:
            return ids, None
        logits = self.draw.logits(self.states[row, index])
        return torch.where(ids < 0, draw_tokens(logits.flatten(0, 1)).view_as(ids), ids), logits


def _ranks(key: torch.Tensor) -> torch.Tensor:
    """`(R, N)` -> 0 for the smallest value of a row, 1 for the next."""
    ordered, order = key.sort(dim=1)
    steps = nn.functional.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0)).cumsum(1)
    return torch.empty_like(key).scatter_(1, order, steps)


def _sizes(ranks: torch.Tensor) -> torch.Tensor:
    """`(R, N)` ranks -> how many of the row have the same."""
    return torch.zeros_like(ranks).scatter_add_(1, ranks, torch.ones_like(ranks)).gather(1, ranks)


# -- exact


def sample_exact(
    draw, num_rows: int, temperature: float, max_draws: int, device: torch.device | str = "cpu"
) -> PatchSample:
    """P(x)^(1/T) without error (CALM, algorithm 1).

    n equal draws in a row have the probability P(x)^n; then a coin that falls with P(x)^a (Bernoulli factory): draw
    on, accept at the first equal draw, and before that give up at the i-th unequal one with probability a / i. Who
    fails begins again. The expected number of draws, (n + [a > 0] sum_x P^(1/T - 1)) / sum_x P^(1/T), is unbounded at
    real entropies: a row that reaches `max_draws` takes the batched form's choice among the draws it made.
    """
    n, a = split_exponent(temperature)
    result = _Result(num_rows, device)
    pool = DrawPool(draw, torch.arange(num_rows, device=device))
    candidate = torch.zeros(num_rows, dtype=torch.long, device=device)
    equal, tosses = torch.zeros_like(candidate), torch.zeros_like(candidate)
    while len(pool.rows):
        first = pool.count
        pool.grow(min(max(n if n == 1 and not a else FIRST_BLOCK, first // 2), max_draws - first))
        key = pool.keys(2, first, candidate if first else None)
        current = key[:, 0]  # the candidate's
        gives_up = torch.rand(key.shape, device=device) if a else None
        done = torch.zeros_like(candidate, dtype=torch.bool)
        for column in range(bool(first), key.shape[1]):
            drawn, begins = key[:, column], equal == 0
            candidate = torch.where(begins & ~done, column - bool(first) + first, candidate)
            current = torch.where(begins, drawn, current)
            same = drawn == current
            if a:
                is_tossing = equal >= n
                tosses = torch.where(is_tossing, tosses + 1, 0)
                goes_on = same | (is_tossing & (gives_up[:, column] * tosses >= a))
                equal = torch.where(goes_on, equal + same, 0)
            else:
                equal = torch.where(same, equal + 1, 0)
            done = done | (equal >= n + bool(a))
        if pool.count < max_draws:
            over, left = _split(done)
        else:
            over, left = torch.arange(len(done), device=device), torch.arange(0, device=device)
            pick = _pick(_sizes(pool.keys(2)), n, a)
            candidate = torch.where(done, candidate, pick)
        result.put(pool.keep(over), candidate[over], done[over])
        pool = pool.keep(left)
        candidate, equal, tosses = candidate[left], equal[left], tosses[left]
    return result.sample()


# -- batched


def sample_batched(
    draw,
    num_rows: int,
    temperature: float,
    max_draws: int,
    device: torch.device | str = "cpu",
    enough: float = ENOUGH,
) -> PatchSample:
    """P(x)^(1/T) nearly, from one set of draws (after CALM, algorithm 2, whose number of draws is fixed).

    A patch that came up c times weighs c (c - 1) .. (c - n + 1), the n-tuples of draws that agree on it: their mean is
    P(x)^n up to a factor. With nu = 1/T no whole number it weighs the generalised falling factorial, gamma(c + 1) /
    gamma(c + 1 - nu): the exact form's coin, averaged over the order of the draws, where what they leave undecided (c
    = n) counts as accepted.

    Choosing by weight divides by their sum, which makes frequent patches too rare, to first order in 1/N by the factor
    1 - nu^2 c^(nu - 1) / sum of weights; the weights are multiplied by its inverse, 1 + .... Draws go on until nu^2 /
    (sum of weights)^(1/nu), which bounds that term, is at most `enough`, and no more than a tenth of the weight is
    undecided. Needs about nu^2 / (enough (sum_x P^nu)^(1/nu)) draws; the total variation that is left is below 0.01
    for whole 1/T and below 0.02 otherwise, on the distributions of docs/experiments.md and in rows that got so far.

    Rows with enough draws leave the batch. A row that reaches `max_draws` chooses with what it has, and if no patch
    came up n times, with the largest n' that one did: like CALM.
    """
    n, a = split_exponent(temperature)
    nu = n + a
    result = _Result(num_rows, device)
    pool = DrawPool(draw, torch.arange(num_rows, device=device))
    block = 1 if nu == 1 else FIRST_BLOCK
    goal = nu * math.log(nu**2 / enough)  # of the logarithm of the weights' sum
    while len(pool.rows):
        pool.grow(min(block, max_draws - pool.count))
        sizes = _sizes(pool.keys(max(n, 2)))
        weights = log_falling_factorial(sizes, nu) - sizes.log()  # of a draw; a patch has c of them
        total = weights.logsumexp(1, keepdim=True)
        met = total[:, 0] >= goal
        if a:
            met = met & (((weights - total).exp() * (sizes == n)).sum(1) <= UNDECIDED)
        if nu == 1:
            met = torch.ones_like(met)
        over, left = _split(met | (pool.count >= max_draws))
        finished, sizes = pool.keep(over), sizes[over]
        if n > 2 and pool.count >= max_draws:
            sizes = _sizes(finished.keys(2))  # where nothing came up n times
        result.put(finished, _pick(sizes, n, a), met[over])
        pool = pool.keep(left)
        if len(left):
            # the sum grows with the power nu of the draws: as many more as the nearest row needs. From none agreeing
            # nothing follows but that it is far; a large block costs less a draw
            further = pool.count * (((goal - total[left].amax()) / nu).clamp(max=math.log(4)).exp() - 1)
            block = max(FIRST_BLOCK, pool.count // 2, int(further))
    return result.sample()


def log_falling_factorial(count: torch.Tensor, order: float | torch.Tensor) -> torch.Tensor:
    """log gamma(c + 1) / gamma(c + 1 - order), and -inf where c is below the whole part of `order`; float64."""
    count = count.double()
    order = torch.as_tensor(order, dtype=torch.float64, device=count.device)
    possible = count >= order.floor()
    value = torch.lgamma(count + 1) - torch.lgamma(torch.where(possible, count + 1 - order, 1.0))
    return torch.where(possible, value, -torch.inf)


def log_patch_weights(sizes: torch.Tensor, n: int, a: float) -> torch.Tensor:
    """Counts `(R, N)` of each draw's patch -> log weights of the draws, float64.

    Where no patch of a row came up n times, n is the largest number that one did and a is 0.
    """
    most = sizes.amax(1, keepdim=True)
    order = torch.where(most >= n, n + a, most.double())  # (R, 1)
    weights = log_falling_factorial(sizes, order)
    total = (weights - sizes.log()).logsumexp(1, keepdim=True)
    term = log_falling_factorial(sizes, 2 * order - 1) - torch.where(weights == -torch.inf, 0.0, weights) - total
    return weights + torch.log1p(order.square() * term.exp()) - sizes.log()


def _pick(sizes: torch.Tensor, n: int, a: float) -> torch.Tensor:
    """A draw of each row by weight, `(R,)`."""
    if not len(sizes):
        return sizes.new_zeros(0)
    return torch.multinomial(log_patch_weights(sizes, n, a).softmax(1), 1)[:, 0]


def _split(done: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`(R,)` -> indices that are done and that are not."""
    order, count = done.long().argsort(descending=True, stable=True), int(done.sum())
    return order[:count], order[count:]


class _Result:
    """Rows as they are done, put back in order."""

    def __init__(self, num_rows: int, device):
        self.rows: list[torch.Tensor] = []
        self.parts: list[tuple] = []
        self.num_rows, self.device = num_rows, device

    def put(self, pool: DrawPool, index: torch.Tensor, met: torch.Tensor) -> None:
        if len(index):
            ids, logits = pool.take(index)
            self.rows.append(pool.rows)
            self.parts.append((ids, torch.full_like(index, pool.count), met, logits))

    def sample(self) -> PatchSample:
        order = torch.cat(self.rows).argsort()
        ids, draws, met, logits = zip(*self.parts, strict=True)
        return PatchSample(
            torch.cat(ids)[order],
            torch.cat(draws)[order],
            torch.cat(met)[order],
            None if logits[0] is None else torch.cat(logits)[order],
        )


SAMPLERS = {"exact": sample_exact, "batched": sample_batched}


__all__ = ["LazyDraws", "PatchSample", "sample_batched", "sample_exact"]
