"""Speed: what is counted, and that every model does the same work."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import BACKBONES, text_ids, tiny_student
from trainers.evaluation.speed import count_backbone_steps, generation_speed


def token_lm() -> LlamaForCausalLM:
    return LlamaForCausalLM(BACKBONES["llama"]()).eval()


def test_a_token_model_steps_once_a_token_and_a_student_once_a_patch():
    """The ratio of these two counts is the whole promise."""
    models = {
        "teacher": token_lm(),
        "parallel": tiny_student(decoder="parallel").eval(),
        "student": tiny_student().eval(),
    }
    result = generation_speed(models, text_ids(8)[None], new_tokens=16, repeats=2)
    assert result["teacher"]["backbone_steps_per_token"] == 1
    for name in ("parallel", "student"):
        assert result[name]["backbone_steps_per_token"] == pytest.approx(1 / 4, abs=1 / 16)
        assert len(result[name]["runs"]) == 2 and result[name]["tokens_per_second"] > 0


@pytest.mark.parametrize("do_sample", [False, True])
def test_every_model_writes_all_the_tokens_it_is_timed_for(do_sample: bool):
    """A model that ends early would look fast; one that is timed for more looks slow."""
    student = tiny_student().eval()
    student.generation_config.eos_token_id = list(range(258))[:200]  # almost any token would end the text
    generation_speed({"student": student}, text_ids(5)[None], new_tokens=9, do_sample=do_sample, repeats=1)


def test_counting_leaves_no_trace_on_the_model():
    """A forgotten hook would count, and slow down, everything that follows."""
    model = token_lm()
    with count_backbone_steps(model) as steps:
        model(text_ids(4)[None])
    model(text_ids(4)[None])
    assert steps.count == 1


def test_nothing_to_time_is_refused():
    """A median of no runs is an error far from its cause."""
    with pytest.raises(ValueError, match=r"`repeats` \(0\)"):
        generation_speed({"a": token_lm()}, torch.zeros(1, 1, dtype=torch.long), repeats=0)
