import pytest
import torch

from tests.conftest import text_batch, tiny_student
from trainers.evaluation.brier import brier_scores, draw_patches


def test_estimate_is_unbiased_for_a_known_distribution():
    """A biased estimate ranks models by their bias."""
    generator = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.5, 0.3, 0.2])
    draws = [torch.multinomial(probs, 200_000, replacement=True, generator=generator)[:, None] for _ in range(2)]
    targets = torch.zeros(200_000, 1, dtype=torch.long)
    expected = 2 * probs[0] - probs.square().sum()
    torch.testing.assert_close(brier_scores(*draws, targets)[0].float(), expected, rtol=0, atol=5e-3)


def test_longer_prefixes_need_all_their_tokens():
    """Counting matches place by place would score a product distribution as high as the joint one."""
    first = torch.tensor([[1, 2, 3]])
    assert brier_scores(first, torch.tensor([[9, 2, 3]]), torch.tensor([[1, 9, 3]])).tolist() == [1.0, 0.0, 0.0]


def test_a_deterministic_model_gets_twice_its_accuracy_minus_one():
    """CALM's own formula lets four negative scores multiply to a good one: negatives must be visible."""
    draw, targets = torch.tensor([[1], [2], [3], [4]]), torch.tensor([[1], [0], [0], [0]])
    assert brier_scores(draw, draw, targets).item() == 2 * 0.25 - 1


@pytest.mark.parametrize("head", ["regression", "energy"])
def test_draws_are_of_patches_given_the_text_before_them(head):
    """Scoring a patch against its neighbour gives a plausible, meaningless figure."""
    student = tiny_student(head, "parallel")
    ids = text_batch(2, 16)
    changed = ids.clone()
    changed[:, 8:] = 0
    torch.manual_seed(3)
    draws = draw_patches(student, ids)
    torch.manual_seed(3)
    other = draw_patches(student, changed)
    assert draws.shape == (2, 3, 4)
    assert torch.equal(draws[:, :2], other[:, :2])  # patches 1 and 2 follow the same text
    logits = student(ids).logits[:, 3:-1].unflatten(1, (-1, 4))
    if head == "regression":  # a draw is one of the likely tokens of its own place
        assert (logits.softmax(-1).gather(3, draws[..., None]) > 0).all()
    assert not torch.equal(draws, draw_patches(student, ids))


def test_an_autoregressive_decoder_is_refused():
    """Its logits at one place are given the true tokens before it, not the drawn ones."""
    with pytest.raises(ValueError, match="parallel"):
        draw_patches(tiny_student(), text_batch(1, 8))


def test_shapes_that_differ_are_refused():
    """A row broadcast against a matrix would be scored without an error."""
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 4\).*\(1, 4\)"):
        brier_scores(torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(1, 4))
