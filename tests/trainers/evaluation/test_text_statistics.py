import math

import pytest
import torch

from trainers.evaluation.text_statistics import distinct, ngram_entropy, repetition, text_statistics


def test_entropy_of_equal_shares_is_the_log_of_their_number():
    """A frontier of NLL against entropy is only as right as both of its axes."""
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert ngram_entropy(ids, 1) == pytest.approx(math.log(8))
    assert ngram_entropy(ids, 2) == pytest.approx(math.log(6))
    assert ngram_entropy(torch.zeros(2, 4, dtype=torch.long), 2) == 0


def test_no_ngram_crosses_two_texts():
    """Texts that lie beside each other in a batch have nothing to do with each other."""
    assert distinct(torch.tensor([[1, 2], [1, 2]]), 2) == 0.5
    assert distinct(torch.tensor([[1, 2], [2, 1]]), 2) == 1


def test_repetition_is_within_a_text_and_not_between_texts():
    """Two texts that begin alike do not loop; one that loops does."""
    loop, alike = torch.tensor([[1, 2, 1, 2, 1, 2]]), torch.tensor([[1, 2, 3], [1, 2, 3]])
    assert repetition(loop, 2) == pytest.approx(3 / 5) and repetition(alike, 2) == 0


def test_all_figures_are_there():
    """A report that lacks distinct-n beside NLL is the one that deceives."""
    names = {f"{kind}_{n}" for kind in ("entropy", "distinct") for n in (1, 2, 3)} | {"repetition_4"}
    assert set(text_statistics(torch.arange(12).view(2, 6))) == names
