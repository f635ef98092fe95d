"""Texts at several temperatures, and how far they are from people's."""

import pytest
import torch

from tests.conftest import EOS, text_batch, text_ids, tiny_student
from tests.trainers.training_helpers import tiny_teacher
from trainers.evaluation.generation_quality import (
    prompts_and_references,
    sampling_options,
    text_figures,
    write_texts,
)
from trainers.evaluation.mauve import cluster, divergence_area, judge_texts, mauve


def test_area_is_one_for_equal_distributions_and_falls_with_their_distance():
    """A curve that is integrated the wrong way round gives the best model the worst figure."""
    even = torch.full((4,), 0.25, dtype=torch.float64)
    leaning = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    apart = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64), torch.tensor([0, 0, 0, 1.0], dtype=torch.float64)
    assert divergence_area(even, even) == pytest.approx(1, abs=1e-9)
    assert divergence_area(*apart) < 0.05 < divergence_area(even, leaning) < 1
    assert divergence_area(even, leaning) == pytest.approx(divergence_area(leaning, even), abs=1e-9)


def test_points_of_one_heap_share_a_cluster():
    """Clusters that mix what differs call all texts alike."""
    torch.manual_seed(0)
    heaps = torch.cat([torch.tensor([5.0, 0]) + 0.1 * torch.randn(20, 2), torch.tensor([0, 5.0]) + torch.rand(20, 2)])
    assigned = cluster(heaps, 2)
    assert len(set(assigned[:20].tolist())) == len(set(assigned[20:].tolist())) == 1 and assigned[0] != assigned[-1]
    assert len(set(cluster(torch.ones(6, 3), 4).tolist())) == 1  # fewer kinds of text than clusters


def test_texts_of_another_kind_are_further_away():
    """The figure must tell a model that babbles from one that writes."""
    torch.manual_seed(0)
    people, alike, other = torch.randn(80, 8), torch.randn(80, 8), torch.randn(80, 8) + 2
    near, far = mauve(alike, people), mauve(other, people)
    assert near["mauve"] > 2 * far["mauve"] and near == mauve(alike, people)


def test_the_judge_sees_the_prompt_and_is_asked_for_the_text():
    """NLL of the prompt itself would be the same for all models, and hide them."""
    judge, prompts, texts = tiny_teacher(), text_batch(3, 8), text_ids(36, start=200).view(3, 12)
    nats, features = judge_texts(judge, prompts, texts, batch_size=2)
    ids = torch.cat([prompts, texts], dim=1)
    with torch.no_grad():
        logs = judge(ids).logits.log_softmax(-1)[:, 7:-1].gather(2, texts[..., None])[..., 0]
    torch.testing.assert_close(nats, -logs, rtol=1e-4, atol=1e-4)
    assert features.shape == (3, 32)


@pytest.mark.parametrize(("head", "decoder"), [("regression", "autoregressive"), ("energy", "parallel")])
def test_texts_are_of_equal_length_and_seeded(head: str, decoder: str):
    """Entropy and distinct-n grow with the length of a text; figures that nobody can repeat are none."""
    student, prompts = tiny_student(head, decoder), text_batch(3, 8)
    student.generation_config.pad_token_id = 257
    first, again, other = (write_texts(student, prompts, 6, 0.5, batch_size=2, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (3, 6) and torch.equal(first, again) and not torch.equal(first, other)


def test_texts_follow_the_model_and_not_the_config_that_came_with_it():
    """A checkpoint that penalises repetition would be praised for varied texts that its distribution does not have."""
    teacher, prompts = tiny_teacher(), text_batch(3, 8)
    texts = write_texts(teacher, prompts, 8, 1.0)
    teacher.generation_config.repetition_penalty = 50.0
    assert torch.equal(write_texts(teacher, prompts, 8, 1.0), texts)
    assert teacher.generation_config.repetition_penalty == 50.0


def test_whole_patches_are_not_flattened():
    """Temperature on tokens of one latent is another distribution than the one that is asked for."""
    energy = tiny_student("energy", "parallel")
    assert sampling_options(energy, 0.5)["patch_temperature"] == 0.5
    assert sampling_options(tiny_student(), 1.2)["temperature"] == 1.2
    with pytest.raises(ValueError, match="sharpened, not flattened"):
        sampling_options(energy, 1.2)


def test_people_s_texts_hold_no_end_and_no_text_twice():
    """A reference that is also the other text would make a ceiling of 1."""
    rows = torch.arange(240).view(4, 60).clone()
    rows[0, 3] = EOS
    prompts, references, others = prompts_and_references(rows, 9, 4, 8, EOS)
    assert prompts.shape == (9, 4) and references.shape == others.shape == (9, 8)
    assert not (torch.cat([prompts, references], dim=1) == EOS).any()
    assert not set(references.flatten().tolist()) & set(others.flatten().tolist())
    with pytest.raises(ValueError, match="no two pieces of 61 tokens"):
        prompts_and_references(rows, 9, 60, 1, EOS)


def test_without_a_judge_there_are_counts_only():
    """An NLL of nobody would be a column of zeros."""
    texts, prompts = text_batch(4, 12), text_batch(4, 8)
    assert "judge_nll" not in text_figures(texts, prompts)
    figures = text_figures(texts, prompts, texts, tiny_teacher())
    assert figures["judge_nll"] > 0 and figures["mauve"] == pytest.approx(1)
