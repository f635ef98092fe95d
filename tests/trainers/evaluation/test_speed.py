"""Speed: what is counted, and that every model does the same work."""

import time

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import BACKBONES, text_ids, tiny_student
from trainers.evaluation.speed import (
    count_backbone_steps,
    decode_speed,
    drafting_speed,
    generation_speed,
    loop_overhead,
    timed,
)


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


def test_the_time_to_the_first_token_is_a_part_of_the_whole():
    """Taken from another run, or never set, it would make what follows look free."""
    (found,) = generation_speed({"a": token_lm()}, text_ids(8)[None].repeat(2, 1), new_tokens=9, repeats=2).values()
    for rate, first, after in zip(
        found["runs"], found["first_token_runs"], found["seconds_per_token_runs"], strict=True
    ):
        assert 0 < first < 18 / rate and first + 8 * after == pytest.approx(18 / rate)
    (found,) = generation_speed({"a": token_lm()}, text_ids(8)[None], new_tokens=1, repeats=1).values()
    assert found["seconds_per_token"] is None and found["seconds_per_token_runs"] == []


def test_the_baseline_takes_its_faster_cache_and_keeps_its_settings():
    """Against a baseline with a slow cache anything wins; one left switched changes what follows."""
    model = token_lm()
    found = decode_speed({"LM": model, "student": tiny_student().eval()}, text_ids(8)[None], 5, 2, baseline="LM")
    assert found["LM"]["cache"] in ("dynamic", "static") and found["LM"]["times_token_lm"] == 1
    ratio = found["student"]["tokens_per_second"] / found["LM"]["tokens_per_second"]
    assert found["student"]["times_token_lm"] == pytest.approx(ratio)
    assert model.generation_config.cache_implementation is None
    assert "times_token_lm" not in decode_speed({"LM": model}, text_ids(8)[None], 2, 1, baseline=None)["LM"]
    with pytest.raises(ValueError, match="none of the models"):
        decode_speed({"LM": model}, text_ids(8)[None], 2, 1, baseline="teacher")


def test_a_call_inside_another_counts_once():
    """Counted twice, the modules would seem to take longer than the whole, and the loop nothing."""

    class Sleeper:
        def outer(self):
            self.inner()

        def inner(self):
            time.sleep(0.02)

    sleeper, clock = Sleeper(), [0.0]
    with timed(sleeper, "outer", clock), timed(sleeper, "inner", clock):
        sleeper.outer()
    assert 0.02 <= clock[0] < 0.04 and vars(sleeper) == {}


def test_timing_gives_back_what_was_there():
    """A compiled step that is deleted afterwards would be measured once and then be gone."""
    model = tiny_student().eval()
    step = model.decoder.step
    model.decoder.step = own = lambda *arguments: step(*arguments)
    loop_overhead(model, text_ids(5)[None], new_tokens=5, repeats=1)
    assert model.decoder.step is own and "forward" not in vars(model.lm_head)


@pytest.mark.parametrize("kind", ["token LM", "parallel", "autoregressive"])
def test_the_loop_s_share_is_what_the_modules_leave(kind: str):
    """A module that is not timed would be blamed on the loop."""
    model = token_lm() if kind == "token LM" else tiny_student(decoder=kind).eval()
    found = loop_overhead(model, text_ids(8)[None], new_tokens=8, repeats=3)
    assert all(0 < share < 1 for share in found["runs"]) and len(found["runs"]) == 3
    assert found["seconds_per_token"] > 0
    with pytest.raises(ValueError, match=r"`repeats` \(0\)"):
        loop_overhead(model, text_ids(8)[None], repeats=0)


def test_drafting_counts_the_teacher_s_steps_of_each_way():
    """Without them a slow draft and a rejected one look alike."""
    teacher = token_lm()
    teacher.generation_config.eos_token_id = None
    prompts = [text_ids(8)[None], text_ids(11)[None]]
    found = drafting_speed(teacher, {"itself": teacher}, prompts, new_tokens=12, repeats=2)
    assert list(found) == ["alone", "itself", "prompt lookup"]
    assert found["alone"]["tokens"] == found["alone"]["teacher_steps"] == 24
    assert all(values["equal"] == 2 and len(values["runs"]) == 2 for values in found.values())
    assert found["prompt lookup"]["teacher_steps"] <= 24


def test_drafting_takes_turns_backwards_as_well(monkeypatch: pytest.MonkeyPatch):
    """A machine that slows down while it is measured would always slow the last way."""
    teacher, order = token_lm(), []
    generate = teacher.generate

    def watched(*args, **kwargs):
        order.append("lookup" if "prompt_lookup_num_tokens" in kwargs else "alone")
        return generate(*args, **kwargs)

    monkeypatch.setattr(teacher, "generate", watched)
    drafting_speed(teacher, {}, [text_ids(8)[None]], new_tokens=4, repeats=2)
    assert order[2:] == ["alone", "lookup", "lookup", "alone"]  # after the two that warm up


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"repeats": 0}, r"`repeats` \(0\)"),
        ({"assistants": {"alone": None}}, "may not be named alone"),
    ],
)
def test_drafting_on_nothing_is_refused(changes: dict, complaint: str):
    """A division by no tokens is an error far from its cause."""
    arguments = {"assistants": {}, "prompts": [text_ids(4)[None]], **changes}
    with pytest.raises(ValueError, match=complaint):
        drafting_speed(token_lm(), **arguments)
