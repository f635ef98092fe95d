import pytest
import torch

from modeling_latentforge.latent_sampling import sample_exact
from tests.conftest import text_batch, tiny_student
from trainers.evaluation.latent_sampling import (
    DISTRIBUTIONS,
    as_markdown,
    draw_from,
    sample_calm,
    sampler_named,
    sampling_speed,
    variation_table,
    zipf,
)
from trainers.evaluation.speed import generation_speed


def test_calms_reference_takes_its_fixed_draws_and_comes_near():
    """A reference that is worse than the paper's makes ours look better."""
    probabilities = zipf(27, 1.0)
    sample = sample_calm(draw_from(probabilities), 20_000, 0.5)
    assert (sample.draws == 200).all() and sample.met.all()
    exact = probabilities.square() / probabilities.square().sum()
    found = torch.bincount(sample.ids[:, 0], minlength=27) / 20_000
    assert (found - exact).abs().sum() / 2 < 0.02


def test_calms_reference_falls_back_to_fewer_repetitions():
    """Where no patch came up four times it takes those that came up three times, two, once."""
    sample = sample_calm(draw_from(zipf(10_000, 0.0)), 100, 0.25, num_draws=20)
    assert not sample.met.any()


def test_calms_reference_knows_whole_exponents_only():
    """A rounded temperature would be another comparison."""
    with pytest.raises(ValueError, match="1/n only, got 0.8"):
        sample_calm(draw_from(zipf(27, 1.0)), 2, 0.8)


def test_the_table_has_every_sampler_and_says_where_it_fell_back():
    """A figure of the fallback beside figures of the method would be read as the method's."""
    few = {name: DISTRIBUTIONS[name] for name in list(DISTRIBUTIONS)[:1]}
    records = variation_table((0.8, 0.25), few, max_draws=64, num_rows=500)
    assert {r["sampler"] for r in records if r["temperature"] == 0.8} == {"exact", "batched", "batched, enough 1"}
    assert all(r["draws"] <= 64 for r in records if "CALM" not in r["sampler"])
    assert "fallback)" in as_markdown(records) and "| 27 patches, Zipf 1 | 0.1062 | 0.25 |" in as_markdown(records)


def test_speed_is_measured_with_the_draws_that_were_made():
    """Tokens per second mean nothing without what was drawn for them."""
    speeds = sampling_speed(
        tiny_student("energy", "parallel"), text_batch(2, 6), max_draws=24, new_tokens=8, repeats=1
    )
    assert set(speeds) == {"plain", "exact", "batched", "CALM"}
    assert speeds["CALM"]["draws"] == 200 and speeds["batched"]["draws"] <= 24
    assert all(figures["tokens_per_second"] > 0 for figures in speeds.values())
    assert speeds["exact"]["fallback"] == 1 > speeds["plain"]["fallback"] == 0  # of 256 tokens none comes up 4 times


def test_a_stored_generation_config_does_not_shape_the_measurement():
    """`plain` would sample at the folder's patch temperature, and CALM's rows would stop at its token temperature."""
    student = tiny_student("energy", "parallel")
    student.generation_config.update(do_sample=True, temperature=0.7, top_k=5, repetition_penalty=1.2)
    student.generation_config.patch_temperature = 0.5
    stored = student.generation_config.to_dict()
    with sampler_named("exact", sample_exact) as samples:
        speeds = sampling_speed(student, text_batch(1, 6), max_draws=24, new_tokens=4, repeats=1)
        assert speeds["CALM"]["draws"] == 200
        generation_speed({"student": student}, text_batch(1, 6), new_tokens=4, do_sample=True, repeats=1)
        generation_speed({"student": student}, text_batch(1, 6), new_tokens=4, repeats=1)
    assert not samples and student.generation_config.to_dict() == stored
