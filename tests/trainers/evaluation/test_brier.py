import pytest
import torch

from tests.conftest import text_batch, tiny_student
from trainers.evaluation.brier import (
    bootstrap_means,
    brier_difference,
    brier_lm,
    brier_scores,
    draw_patches,
    mixture_terms,
    summarize_brier,
)


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


def test_four_negative_scores_make_no_high_one():
    """The published code clamps after the product: a model that is always wrong would get 100 of 100."""
    assert brier_lm(torch.full((4,), -1.0)) == 0
    assert brier_lm(torch.tensor([0.9, 0.8, -0.1, -0.2])) == 0
    assert brier_lm(torch.tensor([0.5, 0.5, 0.5, 0.5, -1.0])) == pytest.approx(50)  # published: the first four
    assert brier_lm(torch.tensor([0.5, 0.125])) == pytest.approx(25)  # patches of two


def test_a_mixture_s_terms_are_those_of_all_its_patches_summed():
    """A sum over samples with themselves is biased upwards, the more the fewer samples."""
    torch.manual_seed(0)
    kinds = torch.randn(2, 1, 2, 3).softmax(-1)  # two latents, equally likely; 2 tokens of 3 ids
    exact = (kinds[:, 0, 0, :, None] * kinds[:, 0, 1, None, :]).mean(0)  # P(x1, x2)
    target = torch.tensor([[2, 1]])
    drawn = torch.randint(2, (4, 4000))  # four noises each, many times over
    probabilities = kinds[drawn.flatten(), 0].view(4, 4000, 2, 3)
    of_target, collision = mixture_terms(probabilities, target.expand(4000, 2))
    assert of_target.mean(0)[1].item() == pytest.approx(exact[2, 1].item(), abs=2e-3)
    assert collision.mean(0)[1].item() == pytest.approx(exact.square().sum().item(), abs=2e-3)
    assert collision.mean(0)[0].item() == pytest.approx(exact.sum(1).square().sum().item(), abs=2e-3)
    alone = mixture_terms(kinds[:1], target)  # a latent that is no draw: exact
    assert alone[1][0, 1].item() == pytest.approx(kinds[0].square().sum(-1).prod().item())


def test_intervals_are_as_wide_as_rows_differ_and_not_as_patches_do():
    """Patches of a row share their text; taken for independent, they would prove differences that are none."""
    torch.manual_seed(0)
    rows = torch.rand(200, 1).round()  # all patches of a row are right, or none
    sums, counts = rows.expand(200, 4) * 50, torch.full((200,), 50)
    found = summarize_brier(sums, counts)
    assert found["brier_error"][0] == pytest.approx(0.5 / 200**0.5, rel=0.15)
    low, high = found["brier_lm_interval"]
    assert low < found["brier_lm"] < high and found["positions"] == 10_000 and found["rows"] == 200
    assert torch.equal(bootstrap_means(sums, counts, seed=1), bootstrap_means(sums, counts, seed=1))


def test_a_difference_is_of_the_same_rows():
    """What both models find hard is noise of each score and not of their difference."""
    torch.manual_seed(0)
    hard = torch.rand(100, 4)
    counts = torch.ones(100, dtype=torch.long)
    ours, theirs = {"sums": hard + 0.02, "counts": counts}, {"sums": hard, "counts": counts}
    found = brier_difference(ours, theirs)
    assert 1.5 < found["interval"][0] < found["difference"] < found["interval"][1] < 2.5
    with pytest.raises(ValueError, match="same patches of the same rows"):
        brier_difference(ours, {"sums": hard, "counts": 2 * counts})
