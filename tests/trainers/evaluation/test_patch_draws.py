"""Patches drawn after true text: the distributions are the model's own, at every place, for every kind of model."""

import pytest
import torch
from transformers import GPTNeoXForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3ForCausalLM

from tests.conftest import BACKBONES, HEAD_DECODER, TINY, text_batch, tiny_student
from trainers.evaluation import patch_draws
from trainers.evaluation.brier import brier_lm, summarize_brier
from trainers.evaluation.enumerable import chain_brier, chain_token_lm, draw_chain, known_models
from trainers.evaluation.patch_draws import brier_sums, draw_after_text, plan_positions


TOKEN_LMS = {"llama": LlamaForCausalLM, "gpt_neox": GPTNeoXForCausalLM, "qwen3": Qwen3ForCausalLM}


def make(name: str):
    if name in TOKEN_LMS:
        config = BACKBONES[name]()
        config.initializer_range = 0.3
        return TOKEN_LMS[name](config).eval()
    # a window that is shorter than the text, and one that reaches past the patch only
    return tiny_student(decoder_memory="patches", decoder_window=6) if name == "memory" else tiny_student()


@pytest.mark.parametrize("name", [*TOKEN_LMS, "student", "memory"])
def test_every_branch_reads_the_text_before_its_place_and_itself(name: str, monkeypatch: pytest.MonkeyPatch):
    """A branch that sees its neighbour, or the text after its place, scores what no model can write."""
    model, ids = make(name), text_batch(2, 20)
    steps: list[torch.Tensor] = []
    branch = patch_draws._branch

    def recorded(first, targets, num_draws, step):
        steps.append(first[:, :, None].expand(-1, -1, num_draws, -1))

        def watched(drawn, place):
            steps.append(step(drawn, place))
            return steps[-1]

        return branch(first, targets, num_draws, watched)

    monkeypatch.setattr(patch_draws, "_branch", recorded)
    drawn = draw_after_text(model, ids, 4)
    assert drawn.ids.shape == (2, 2, 4, 4) and len(steps) == 4
    for row, place, draw, token in ((0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 1, 2), (1, 3, 0, 3), (0, 3, 1, 3)):
        prefix = torch.cat([ids[row, : 4 * (place + 1)], drawn.ids[draw, row, place, :token]])
        with torch.no_grad():
            alone = model(prefix[None]).logits[0, -1].softmax(-1)
        torch.testing.assert_close(steps[token][row, place, draw], alone, rtol=0, atol=2e-6)
    with torch.no_grad():
        logs = model(ids).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    expected = logs[:, 3:].unflatten(1, (4, 4)).cumsum(-1).exp().double()
    torch.testing.assert_close(drawn.target_probability, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("head", "decoder"), HEAD_DECODER)
def test_both_estimators_agree_for_every_kind_of_student(head: str, decoder: str, monkeypatch: pytest.MonkeyPatch):
    """Two estimates of one quantity that differ would rank models by the estimator."""
    if (head, decoder) == ("energy", "parallel"):
        # as CALM writes, tokens are the likeliest of a latent: make the softmaxes that sure
        student = tiny_student(head, decoder)
        weight = student.get_output_embeddings().weight
        weight.data.mul_(1e4)
    else:
        student = tiny_student(head, decoder)
    rows = text_batch(16, 64)
    sums = brier_sums(student, rows, 4, positions=16 * 15, noise_samples=8)
    assert int(sums["counts"].sum()) == 16 * 15
    sampled, smooth = (summarize_brier(sums[form], sums["counts"]) for form in ("sampled", "smooth"))
    for a, b, error in zip(sampled["brier"], smooth["brier"], sampled["brier_error"], strict=True):
        assert abs(a - b) <= 4 * error + 0.02


@pytest.mark.parametrize("name", ["uniform on a chain", "deterministic, wrong", "the chain itself", "another chain"])
def test_the_score_of_a_model_on_paper_is_its_closed_form(name: str):
    """Whoever doubts the metric can compute these by hand."""
    text, chain = known_models()[name]
    sums = brier_sums(chain_token_lm(chain), draw_chain(text, 128, 64), 4, positions=1900)
    truth = chain_brier(text, chain, 4)
    for form in ("sampled", "smooth"):
        found = summarize_brier(sums[form], sums["counts"])
        for value, expected, error in zip(found["brier"], truth.tolist(), found["brier_error"], strict=True):
            assert abs(value - expected) <= 4 * error + 1e-5
    if name == "deterministic, wrong":
        assert truth.tolist() == [-1] * 4 and found["brier_lm"] == 0 and float(brier_lm(truth)) == 0


def test_more_positions_come_from_cutting_the_rows_elsewhere():
    """Positions that are counted twice would narrow the interval and say nothing new."""
    assert plan_positions(10, 64, 4, 100) == (7, [0], 64)
    assert plan_positions(10, 64, 4, 300) == (8, [0, 1, 2], 60)
    rows, phases, length = plan_positions(10, 64, 4, 10**6)
    assert (rows, phases, length) == (10, [0, 1, 2, 3], 60)
    ends = {phase + place for phase in phases for place in range(4, length, 4)}
    assert len(ends) == 4 * (length // 4 - 1)


def test_figures_are_seeded_and_do_not_depend_on_who_was_measured_before():
    """A resumed evaluation must say what an uninterrupted one would."""
    student, rows = tiny_student(), text_batch(4, 32)
    first = brier_sums(student, rows, 4, 28)
    torch.rand(7)
    again = brier_sums(student, rows, 4, 28)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["sampled"], brier_sums(student, rows, 4, 28, seed=1)["sampled"])
    student.train()
    brier_sums(student, rows, 4, 28)
    assert student.training


def test_what_cannot_be_scored_is_refused():
    """A window that slides over branches of other places would be scored on a text that nobody wrote."""
    with pytest.raises(ValueError, match="hold 4 tokens, asked are 8"):
        draw_after_text(tiny_student(), text_batch(1, 16), 8)
    with pytest.raises(ValueError, match="two or more whole patches"):
        draw_after_text(tiny_student(), text_batch(1, 4), 4)
    sliding = MistralForCausalLM(MistralConfig(**TINY, num_key_value_heads=2, sliding_window=8)).eval()
    with pytest.raises(ValueError, match="sliding"):
        draw_after_text(sliding, text_batch(1, 16), 4)
