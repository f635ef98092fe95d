"""The rows of `make verify TOPIC=generation` at tiny sizes: each passes where the thing holds, and falls short where
not."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from trainers.evaluation import latent_sampling, rows_generation
from trainers.evaluation.benchmark import seed_backbone, seed_models, seed_student
from trainers.evaluation.latent_sampling import sample_calm
from trainers.verification import Context


SMALL: dict[str, int] = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}


# -- speed and memory


@pytest.mark.parametrize(
    ("parallel", "autoregressive", "passed"), [(1e-6, 1e-6, True), (1e6, 1e-6, False), (1e-6, 1e6, False)]
)
def test_decoding_passes_only_where_both_decoders_reach_their_targets(
    context: Context, parallel: float, autoregressive: float, passed: bool
):
    """One decoder's gain must not stand for the other's."""
    measured = rows_generation.decode(8, parallel, autoregressive)(context, new_tokens=8, repeats=1, **SMALL)
    assert measured.passed == passed
    for name, values in measured.details.items():
        ratio = values["tokens_per_second"] / measured.details["token LM"]["tokens_per_second"]
        assert f"{name} {ratio:.2f}x ({values['tokens_per_second']:.0f} tokens/s" in measured.figure
    assert set(measured.details) == {"token LM", "parallel", "autoregressive"}


def test_the_grid_has_every_batch_and_prompt_and_the_larger_decoder(context: Context):
    """A setting that is left out is one where we lose, people would think."""
    measured = rows_generation.decode_grid(context, batches=(1, 2), prompts=(8,), new_tokens=2, **SMALL)
    assert list(measured.details) == ["batch 1, prompt 8", "batch 2, prompt 8"]
    assert all(set(x) == {"token LM", "parallel", "autoregressive", "2 x 512"} for x in measured.details.values())


def test_the_loop_s_overhead_is_held_against_the_modules_time(context: Context, monkeypatch: pytest.MonkeyPatch):
    """A loop that costs more than the mathematics is ours to mend, and hides behind large models."""
    small = rows_generation.overhead(context, new_tokens=8, repeats=1, **SMALL)
    assert set(small.details) == {"parallel", "autoregressive"}
    assert not small.passed and max(values["share"] for values in small.details.values()) > 0.1

    def slow_models(*given: Any, **fields: Any) -> dict[str, Any]:
        model = seed_models(*given, **fields)["parallel"]
        plain = model.sample_latents

        def sample_latents(*given: Any, **named: Any) -> Any:
            time.sleep(0.8)
            return plain(*given, **named)

        model.sample_latents = sample_latents
        return {"parallel": model}

    monkeypatch.setattr(rows_generation, "seed_models", slow_models)
    slow = rows_generation.overhead(context, new_tokens=1, repeats=1, **SMALL)
    assert slow.passed, slow.figure


def test_what_grows_beside_the_backbone_s_slot_counts_too(context: Context, monkeypatch: pytest.MonkeyPatch):
    """Long texts are where patches are to pay; a memory of every patch is dear there, whoever holds it."""
    measured = rows_generation.cache_memory(context, tokens=1024, **SMALL)
    grown = {name: values["bytes_per_token"] for name, values in measured.details.items()}
    assert grown["token LM"] == 2 * 64 * 4 and grown["parallel"] == grown["token LM"] / 8
    assert grown["autoregressive"] > grown["parallel"] and not measured.passed  # its decoder reads all patches
    assert "parallel 0.1 kB a token (8.00 times less)" in measured.figure

    def without_memory(patch_size: int, **fields: Any) -> dict[str, Any]:
        student = seed_student(seed_backbone(**fields), patch_size, decoder_memory="none")
        return {**seed_models(patch_size, **fields), "autoregressive": student}

    monkeypatch.setattr(rows_generation, "seed_models", without_memory)
    assert rows_generation.cache_memory(context, tokens=1024, **SMALL).passed


# -- drafting


def test_a_demo_that_is_not_there_is_asked_for(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The rows measure trained models; random ones would give figures too."""
    monkeypatch.setattr(rows_generation, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="no trained demo: `make demo` first"):
        rows_generation.lossless_greedy(context)


def test_drafting_counts_the_texts_that_are_the_teacher_s_own(
    context: Context, demo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A draft that changes the text is a faster other model."""
    monkeypatch.setattr(rows_generation, "ROOT", tmp_path)  # no demo of the user's
    shutil.copytree(demo / "teacher", context.work_dir / "token_draft")
    measured = rows_generation.lossless_greedy(context, num_prompts=1, max_eval_tokens=2048)
    assert measured.passed and measured.figure.startswith("1 of 1 texts equal; alone ")
    assert set(measured.details) == {"alone", "student", "token draft", "prompt lookup"}
    # the teacher drafts for itself: more than a token a step
    assert measured.details["token draft"]["tokens_per_teacher_step"] > 1

    forward = LlamaForCausalLM.forward

    def other_for_drafts(self: LlamaForCausalLM, *given: Any, **named: Any) -> Any:
        output = forward(self, *given, **named)
        cache, ids = named.get("past_key_values"), named["input_ids"]
        if ids.shape[1] > 1 and cache is not None and cache.get_seq_length() > ids.shape[1]:
            output.logits = output.logits.roll(1, -1)  # checks a draft's tokens otherwise than it writes
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", other_for_drafts)
    broken = rows_generation.lossless_greedy(context, num_prompts=1, max_eval_tokens=2048)
    assert not broken.passed and broken.details["student"]["equal"] < 1


# -- likelihood-free sampling


def test_a_sampler_that_ignores_the_temperature_is_off_the_floor(context: Context, monkeypatch: pytest.MonkeyPatch):
    """Texts at the wrong temperature look like any other text."""
    table: dict[str, Any] = {
        "temperatures": (0.5,),
        "num_rows": 5000,
        "distributions": {name: latent_sampling.DISTRIBUTIONS[name] for name in ("27 patches, Zipf 1",)},
    }
    measured = rows_generation.patch_sampling_variation(context, **table)
    assert measured.passed and measured.figure.endswith("batched further than CALM's: never"), measured.figure
    for name in ("exact", "batched"):
        right = getattr(latent_sampling, f"sample_{name}")

        def warm(draw: Any, rows: int, temperature: float, max_draws: int, right: Any = right, **named: Any) -> Any:
            return right(draw, rows, 0.9, max_draws, **named)

        monkeypatch.setattr(latent_sampling, f"sample_{name}", warm)
        wrong = rows_generation.patch_sampling_variation(context, **table)
        assert not wrong.passed
        monkeypatch.setattr(latent_sampling, f"sample_{name}", right)
    assert wrong.figure.endswith("27 patches, Zipf 1 at 0.5")


def test_sampling_is_timed_against_calm_s_at_equal_draws(context: Context, monkeypatch: pytest.MonkeyPatch):
    """CALM's own algorithm under our name cannot be five times as fast as itself."""
    monkeypatch.setattr(latent_sampling, "sample_batched", sample_calm)
    measured = rows_generation.patch_sampling_speed(context, new_tokens=8, repeats=3, **SMALL)
    assert not measured.passed
    speed = {name: values["tokens_per_second"] for name, values in measured.details.items()}
    times = speed["batched"] / speed["CALM"]
    assert f"batched {speed['batched']:.1f} tokens/s ({times:.1f}x CALM's)" in measured.figure
    assert measured.details["batched"]["draws"] == measured.details["CALM"]["draws"] == 200


# -- fewer bits


def test_quantisation_says_what_each_form_costs_and_which_has_no_kernel(
    context: Context, demo: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A form that silently stays fp32 would be as good as fp32, and half the table a copy."""
    pytest.importorskip("torchao.prototype.quantization.int4.inference_workflow", reason="needs torchao")
    monkeypatch.setattr(rows_generation, "ROOT", tmp_path)
    found = rows_generation.quantisation(context, max_eval_tokens=1024, new_tokens=4, repeats=1).details
    assert found["bf16"]["backbone_megabytes"] == found["fp32"]["backbone_megabytes"] / 2
    assert found["int8"]["backbone_megabytes"] < found["bf16"]["backbone_megabytes"]
    assert 0 < abs(found["int8"]["nats_per_token"] - found["fp32"]["nats_per_token"]) < 0.1
    assert all("refused" in values or values["tokens_per_second"] > 0 for values in found.values())
