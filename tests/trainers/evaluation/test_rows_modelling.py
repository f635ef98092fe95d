import pytest
import torch

from tests.conftest import VOCAB, tiny_student
from trainers.evaluation import rows_modelling
from trainers.evaluation.rows_modelling import brier_of_texts, one_shot_runs


@pytest.mark.parametrize("patch_size", [1, 4, 8])
def test_texts_of_any_patch_size_are_judged_at_the_same_places(patch_size):
    """A curve over K whose points saw other contexts compares the contexts."""
    torch.manual_seed(0)
    model = tiny_student("energy", "parallel", patch_size=patch_size).eval()
    rows = torch.randint(VOCAB, (3, 136), generator=torch.Generator().manual_seed(0))
    found = brier_of_texts(model, rows)
    assert len(found["brier"]) == 4
    assert found == brier_of_texts(model, rows), "the same draws each time"


def test_a_model_that_always_agrees_with_the_text_scores_one():
    """The end of the scale: a shift by one token would make it 0."""
    rows = torch.arange(136).repeat(3, 1)

    class Counts:
        def generate(self, prompts, max_new_tokens, **kwargs):
            new = prompts[:, -1:] + torch.arange(1, max_new_tokens + 1)
            return torch.cat([prompts, new], dim=1)

    assert brier_of_texts(Counts(), rows)["brier"] == [1.0] * 4


def test_heads_of_one_table_differ_in_their_heads_only():
    """Another rate or seed beside another head answers no question."""
    runs = one_shot_runs("codec")
    assert {(run.learning_rate, run.seed, run.patch_size, run.autoencoder) for run in runs.values()} == {
        (4e-3, 0, 4, "codec")
    }
    assert all(run.student["decoder_type"] == "parallel" for run in runs.values())
    assert runs["aligned"].teacher == rows_modelling.TEACHER and runs["energy"].teacher is None
