"""The small question that chose `num_frequencies`."""

from trainers.evaluation.noise_reading import table


def test_a_head_learns_what_its_number_says():
    """A table in which nothing is read would call every number of octaves as good as another."""
    said = []
    found = table((1, 4), (0,), say=said.append, places=2, vocab_size=8, patch_size=2, steps=250)
    assert found[4][0] < 0.5 < 2.0  # of ln 8 = 2.08
    assert len(said) == 2
