import numpy as np

from tests.conftest import EOS, PAD, text_ids
from tests.trainers.training_helpers import byte_tokenizer
from trainers.evaluation.domains import _docstrings, domain_patches, numbers_text, special_patches


def test_numbers_are_numbers_and_seeded():
    """A codec that learnt words alone loses figures first: the text that shows it must be the same every time."""
    text = numbers_text(2000)
    assert len(text) == 2000 and text == numbers_text(2000) != numbers_text(2000, seed=1)
    assert sum(letter.isdigit() for letter in text) > 1000


def test_prose_is_what_people_wrote_about_the_code():
    """Code taken for prose would make both figures the same."""
    source = '"""One module that tells a story."""\n\ndef f():\n    """Short."""\n    return 1\n'
    assert _docstrings([source, "def broken(:\n"]) == ["One module that tells a story."]


def test_patches_are_whole_and_from_the_start():
    """A last patch filled with padding is another kind of patch."""
    patches = domain_patches({"a": "abcdefghij", "b": "xy"}, byte_tokenizer(), 4, 100)
    assert list(patches) == ["a"] and patches["a"].shape == (2, 4)
    assert domain_patches({"a": "abcdefghij"}, byte_tokenizer(), 4, 4)["a"].shape == (1, 4)


def test_ends_of_texts_are_found_and_bare_padding_is_not_counted():
    """Patches of padding alone are easy, and would hide the ends among them."""
    ids = np.array([[*text_ids(4), *text_ids(2), EOS, PAD, PAD, PAD, PAD, PAD]])
    found = special_patches(_Rows(ids), 4, [EOS, PAD])
    assert found.tolist() == [[*text_ids(2).tolist(), EOS, PAD]]


class _Rows:
    def __init__(self, ids):
        self.ids = ids

    def __getitem__(self, part):
        return {"input_ids": self.ids[part]}
