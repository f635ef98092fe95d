"""What followed the last time: for every token, the longest ending of the text that stood there before.

B rows, T tokens, P places of a text so far, L sizes of endings.

    ids (B, T) -> for each place: the token that followed the latest earlier occurrence of the last n tokens, and n

An ending is looked up in the text itself, as prompt lookup does for drafts (n-grams; no weights, no vocabulary of
them), so a decoder with a window of some tokens can repeat a name that stands thousands of tokens before. Masked
tokens match nothing.
"""

from collections.abc import Sequence

import torch


LARGEST_ENDING = 64  # runs are counted in int8
MISSING = -1  # in a history: a masked token, or none yet
_MULTIPLIER = 6364136223846793005  # odd: a product modulo 2^64 loses nothing (Knuth's MMIX)


def ending_sizes(longest: int) -> tuple[int, ...]:
    """1, 2, 4, .. up to `longest`; none for 0."""
    return tuple(1 << power for power in range(longest.bit_length()))


def _power(exponent: int) -> int:
    value = pow(_MULTIPLIER, exponent, 1 << 64)
    return value - (1 << 64) if value >> 63 else value


def find_continuations(
    ids: torch.Tensor, mask: torch.Tensor | None, sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of whole rows.

    Args:
        ids, mask: `(B, T)`; False in `mask` is no token.
        sizes: of endings, see [`ending_sizes`].

    Returns:
        `(B, T)` ids of what followed, and `(B, T)` levels: the place in `sizes`, from 1 on, of the longest ending that
        stood there before. Both 0 where nothing did.

    Time grows with T log T: endings are compared by a hash of 64 bits, which a text can be built to fool, but only
    where they are hundreds of tokens long.
    """
    ids = ids.long()
    places = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    known = ids if mask is None else torch.where(mask, ids, MISSING - 1 - places)
    found, levels = torch.zeros_like(ids), torch.zeros_like(ids)
    hashes, reach = (known + 1) * _MULTIPLIER, 1
    for level, size in enumerate(sizes, 1):
        while reach < size:
            longer = hashes[:, reach:] + hashes[:, :-reach] * _power(reach)
            hashes, reach = torch.cat([hashes[:, :reach], longer], dim=1), 2 * reach
        ordered, order = hashes.sort(dim=1, stable=True)
        same = (ordered[:, 1:] == ordered[:, :-1]) & (order[:, :-1] >= size - 1)
        before = torch.full_like(ids, -1).scatter_(1, order[:, 1:], torch.where(same, order[:, :-1], -1))
        seen = before >= 0
        levels = levels.masked_fill(seen, level)
        found = torch.where(seen, before + 1, found)
    following = known.gather(1, found)
    levels = levels.masked_fill(following < 0, 0)
    return following.masked_fill(levels == 0, 0), levels


def begin_history(
    ids: torch.Tensor, mask: torch.Tensor | None, lengths: Sequence[int], sizes: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What [`extend_history`] goes on from.

    Args:
        ids, mask: `(B, T)`, rows that start at their first token.
        lengths: how many of them each row holds.

    Returns:
        the rows, newest token first, `(B, P)`, P the largest length; and for each token but the newest, how many up to
        it, itself included, are the row's last ones `(B, P - 1)`, at most the largest size.
    """
    longest = max(lengths)
    known = (ids if mask is None else ids.masked_fill(~mask, MISSING)).int()
    if min(lengths) == longest:
        history = known[:, :longest].flip(1)
    else:
        places = torch.tensor(lengths, device=ids.device)[:, None] - 1 - torch.arange(longest, device=ids.device)
        history = known.gather(1, places.clamp(min=0)).masked_fill(places < 0, MISSING)
    runs = torch.zeros_like(history, dtype=torch.int8)
    alive = torch.ones_like(history, dtype=torch.bool)  # what has ended as the row does, so far
    for back in range(min(max(sizes, default=0), longest)):
        last = history[:, back, None]
        same = (history[:, back:] == last) & (last >= 0)
        alive &= torch.nn.functional.pad(same, (0, back))
        runs += alive
    return history, runs[:, 1:]


def extend_history(
    history: torch.Tensor, runs: torch.Tensor, token: torch.Tensor, mask: torch.Tensor | None, sizes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token `(B,)` of each row; `sizes` of endings as a tensor of int8 where the rows are, made once.

    Returns:
        history `(B, P + 1)` and runs `(B, P)`, and what followed the row's ending before, `(B,)` ids and levels as in
        [`find_continuations`], but that an id at level 0 means nothing.
    """
    matching = last = token[:, None].int()
    if mask is not None:
        last, matching = last.masked_fill(~mask[:, None], MISSING), last.masked_fill(~mask[:, None], MISSING - 1)
    runs = (torch.nn.functional.pad(runs, (0, 1)) + 1) * (history == matching)
    runs.clamp_(max=LARGEST_ENDING)
    # how many sizes fit, and the latest place where that many do: `max` names the first
    levels, place = torch.bucketize(runs, sizes, right=True, out_int32=True).max(1)
    history = torch.cat([last, history], dim=1)
    following = history.gather(1, place[:, None])[:, 0].long()
    levels = levels * (following >= 0)
    return history, runs, following.clamp_(min=0), levels
