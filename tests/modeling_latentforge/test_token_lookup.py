"""What followed the last time: the same for whole rows, token by token, and by the definition."""

import pytest
import torch

from modeling_latentforge.token_lookup import begin_history, ending_sizes, extend_history, find_continuations

from ..conftest import tiny_student


def by_definition(row: list[int], known: list[bool], sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """(id, level) of each place, straight from the words of the docstring."""
    found = []
    for end in range(len(row)):
        best = (0, 0)
        for level, size in enumerate(sizes, 1):
            ending = range(end - size + 1, end + 1)
            if ending[0] < 0 or not all(known[i] for i in ending):
                continue
            for place in range(end - 1, size - 2, -1):
                earlier = range(place - size + 1, place + 1)
                if all(known[j] for j in earlier) and [row[j] for j in earlier] == [row[i] for i in ending]:
                    best = (row[place + 1], level) if known[place + 1] else (0, 0)  # (any, 0)
                    break
        found.append(best)
    return found


@pytest.mark.parametrize("longest", [1, 4, 16])
def test_whole_rows_are_looked_up_as_defined(longest):
    """A hash that confuses endings, or looks at the token it is to predict, would make held-out figures too good."""
    torch.manual_seed(0)
    ids = torch.randint(3, (8, 60))
    ids[0, 30:] = ids[0, :30]  # one long repetition
    mask = torch.rand(ids.shape) > 0.1
    mask[:2] = True
    sizes = ending_sizes(longest)
    found, levels = find_continuations(ids, mask, sizes)
    for row in range(len(ids)):
        expected = by_definition(ids[row].tolist(), mask[row].tolist(), sizes)
        assert list(zip((found[row] * (levels[row] > 0)).tolist(), levels[row].tolist(), strict=True)) == expected
    assert int(levels[0, 45]) == len(sizes)


def test_token_by_token_finds_what_whole_rows_find():
    """Otherwise generation reads other hints than training did, and only the text's quality would tell."""
    torch.manual_seed(0)
    ids, mask = torch.randint(3, (6, 50)), torch.rand(6, 50) > 0.1
    lengths = [1, 7, 20, 33, 2, 20]
    sizes = ending_sizes(16)
    history, runs = begin_history(ids, mask, lengths, sizes)
    assert history.shape == runs.shape == (6, 33)
    whole = find_continuations(ids, mask, sizes)
    rows = torch.arange(6)
    for step in range(15):
        places = torch.tensor(lengths) + step
        history, runs, found, levels = extend_history(history, runs, ids[rows, places], mask[rows, places], sizes)
        assert torch.equal(levels, whole[1][rows, places])
        assert torch.equal(found[levels > 0], whole[0][rows, places][levels > 0])


def test_a_later_token_changes_nothing_before_it():
    """A causal model that looks ahead has a likelihood that is none."""
    torch.manual_seed(0)
    ids = torch.randint(4, (2, 40))
    changed = ids.clone()
    changed[:, 25:] = 9
    for one, other in zip(*(find_continuations(x, None, ending_sizes(8)) for x in (ids, changed)), strict=True):
        assert torch.equal(one[:, :25], other[:, :25])


def test_lookup_teaches_a_decoder_to_repeat_what_lies_beyond_its_window():
    """What it is for: a name that the window no longer holds."""
    torch.manual_seed(0)
    losses = {}
    for longest in (0, 4):
        student = tiny_student(decoder_lookup=longest, decoder_memory="none", decoder_window=4, initializer_range=0.05)
        student.train()
        optimizer = torch.optim.AdamW([x for x in student.parameters() if x.requires_grad], lr=1e-2)
        for _ in range(100):
            first = torch.randint(student.config.vocab_size, (8, 16))
            ids = first.repeat(1, 2)
            labels = torch.where(torch.arange(32) >= 20, ids, -100)
            loss = student(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[longest] = float(loss.detach())
    assert losses[4] < 0.2 * losses[0]
