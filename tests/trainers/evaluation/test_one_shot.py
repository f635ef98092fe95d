import pytest
import torch

from tests.conftest import VOCAB, tiny_student
from tests.trainers.training_helpers import tiny_teacher
from trainers.evaluation.one_shot import kept_tokens, one_shot_figures, teacher_logits


def rows(count=2, length=16):
    return torch.randint(VOCAB, (count, length), generator=torch.Generator().manual_seed(0))


def test_the_teacher_judges_each_patch_after_the_text_before_it_and_itself():
    """A patch that sees its neighbours, or the truth in its own place, is judged by what it could not have known."""
    teacher, ids = tiny_teacher().double().eval(), rows()
    patches = torch.randint(VOCAB, (2, 3, 4), generator=torch.Generator().manual_seed(1))
    found = teacher_logits(teacher, ids, patches)
    for row in range(2):
        for place in range(3):
            text = torch.cat([ids[row, : 4 * (place + 1)], patches[row, place]])[None]
            with torch.no_grad():
                expected = teacher(text).logits[0, 4 * (place + 1) - 1 : -1]
            torch.testing.assert_close(found[row, place], expected)


def test_kept_tokens_end_at_the_first_that_is_not_kept():
    """A later token that happens to agree is worth nothing: it follows another prefix."""
    kept = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1]])
    assert kept_tokens(kept).tolist() == [1, 3, 0]
    assert float(kept_tokens(torch.tensor([0.5, 0.5]))) == 0.75


def test_a_teacher_that_drafts_for_itself_is_kept_whole():
    """The upper end of the scale: whatever is less is the judge's own error."""
    found = one_shot_figures(None, tiny_teacher().eval(), rows())
    assert found["accepted_greedy"] == found["accepted_sampled"] == 4
    assert found["patches"] == 6


@pytest.mark.parametrize("head", ["regression", "energy", "aligned"])
def test_figures_of_every_head_lie_in_their_range(head):
    """All three heads are read by one judge; one that crashes leaves the table without its row."""
    torch.manual_seed(0)
    found = one_shot_figures(tiny_student(head, "parallel").eval(), tiny_teacher().eval(), rows())
    assert 0 <= found["impossible"] <= 1
    assert 0 <= found["accepted_greedy"] <= 4 and 0 <= found["accepted_sampled"] <= 4
    again = one_shot_figures(tiny_student(head, "parallel").eval(), tiny_teacher().eval(), rows())
    assert found["patches"] == again["patches"]


def test_rows_that_are_no_whole_patches_are_refused():
    """Cut silently, the last place would be judged by its neighbour's text."""
    with pytest.raises(ValueError, match="no whole patches"):
        one_shot_figures(tiny_student("energy", "parallel").eval(), tiny_teacher().eval(), rows(2, 14))
