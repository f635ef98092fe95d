"""The roofline: what is counted of a text, what the machine's rates are, and that a share is of the right bound."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import BACKBONES, TINY, text_ids, tiny_student
from trainers.evaluation.benchmark import compile_decoder
from trainers.evaluation.roofline import (
    MIB,
    MachineRates,
    attained,
    peak_memory,
    percentile,
    token_seconds,
    watch_work,
)


def token_lm(attention: str = "sdpa") -> LlamaForCausalLM:
    config = BACKBONES["llama"]()
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def small_rates(**options) -> MachineRates:
    return MachineRates(
        "cpu", torch.float32, **{"rounds": 2, "smallest": MIB, "largest": MIB, "sizes": (64,), **options}
    )


def test_a_token_lm_reads_all_its_weights_a_step_but_one_row_of_the_table():
    """A count that misses a matrix makes the bound too easy, one that counts the table too hard."""
    model = token_lm()
    table = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not table]
    whole = 4 * sum(p.numel() for p in model.parameters() if p is not table)
    _, work = watch_work(model, text_ids(8)[None], 4)
    buffers = 4 * model.model.rotary_emb.inv_freq.numel()
    assert work.weight_bytes == 3 * (whole + 4 * TINY["hidden_size"] + buffers) and work.backbone_steps == 3
    # the first of the three steps reads 8 keys of the prompt and its own
    heads, size = 2, TINY["hidden_size"] // TINY["num_attention_heads"]
    keys = 9 + 10 + 11
    slot = TINY["num_hidden_layers"] * 2 * heads * size * 4
    assert work.cache_bytes in (keys * slot, 2 * keys * slot)  # the second where heads are repeated for the kernel
    attention = TINY["num_hidden_layers"] * 4 * TINY["hidden_size"] * keys
    assert 3 * 2 * sum(p.numel() for p in matrices) + attention == pytest.approx(work.operations, rel=0.01)


def test_attention_that_is_not_seen_is_not_counted_as_none():
    """A cache of 0 bytes would be the best of all caches."""
    row = attained({"LM": token_lm("eager")}, text_ids(8)[None], small_rates(), new_tokens=2, repeats=1)["LM"]
    assert row["cache_bytes_per_token"] is None and row["weight_bytes_per_token"] > 0


def test_rows_share_the_weights_that_are_read_and_nothing_else():
    """It is why batches pay; counted per row, every batch would be as far from its bound as one text."""
    model = token_lm()
    (_, one), (_, four) = (watch_work(model, text_ids(8)[None].repeat(rows, 1), 5) for rows in (1, 4))
    table = 4 * TINY["hidden_size"] * 4  # a row of the table for each
    assert four.weight_bytes - one.weight_bytes == 3 * table
    assert four.cache_bytes == 4 * one.cache_bytes and four.operations == 4 * one.operations


@pytest.mark.parametrize("decoder", ["parallel", "autoregressive"])
def test_a_student_reads_its_backbone_once_a_patch(decoder: str):
    """That is the whole saving: counted at every token, a student would seem to have none."""
    model = tiny_student(decoder=decoder).eval()
    backbone = 4 * sum(p.numel() for p in model.model.backbone.layers.parameters())
    (_, one), (_, two) = (watch_work(model, text_ids(8)[None], 1 + 4 * patches) for patches in (1, 2))
    assert (one.backbone_steps, two.backbone_steps) == (1, 2)
    assert two.weight_bytes == 2 * one.weight_bytes and one.weight_bytes > backbone and one.cache_bytes > 0


def test_a_compiled_decoder_is_watched_uncompiled():
    """What a compiled kernel reads is invisible: its bound would be that of a model without a decoder."""
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph

    plain, model = (tiny_student().eval() for _ in range(2))
    torch._dynamo.reset()
    compile_decoder(model, backend=backend)
    ids = text_ids(8)[None]
    (_, wanted), (_, found) = (watch_work(each, ids, 9) for each in (plain, model))
    assert found.weight_bytes == wanted.weight_bytes and found.operations >= wanted.operations and not calls


def test_watching_changes_no_token_and_leaves_nothing_behind():
    """A counted text that differs from the timed one would be another text's count."""
    model = token_lm()
    ids = text_ids(8)[None]
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    before = model.generate(ids, **options)
    watch_work(model, ids, 6)
    assert torch.equal(model.generate(ids, **options), before)
    assert not model._forward_hooks and not model.base_model._forward_pre_hooks


def test_every_token_after_the_first_has_its_own_time():
    """A mean hides that a student's first token of a patch takes longer than the others."""
    first, seconds = token_seconds(tiny_student().eval(), text_ids(8)[None], 9)
    assert len(seconds) == 8 and min(seconds) > 0 and first > 0


def test_a_percentile_is_one_of_the_values():
    """Between a patch's first token and the others nothing was measured."""
    values = [5.0, 1.0, 1.0, 1.0]
    assert percentile(values, 0.5) == 1 and percentile(values, 0.95) == 5 and percentile([2.0], 0.95) == 2
    assert percentile([float(x) for x in range(100)], 0.95) == 94


def test_rates_are_those_of_the_machine_and_kept():
    """A rate below what plain torch calls attain would put models beyond their bound."""
    rates = small_rates(rounds=3, smallest=MIB // 4, largest=8 * MIB)
    assert rates.record()["bandwidth"] == {} and rates.record()["matrix_rate"] is None
    for size in (1, MIB, 3 * MIB, 64 * MIB):
        assert 1e8 < rates.bandwidth(size) < 1e14 and rates.bandwidth(size) == rates.bandwidth(size)
    assert list(rates.record()["bandwidth"]) == [str(size) for size in (MIB // 4, MIB, 2 * MIB, 8 * MIB)]
    assert 1e7 < rates.matrix_rate < 1e17 and rates.record()["matrix_rate"] == rates.matrix_rate
    assert rates.record()["dtype"] == "float32"


def test_the_peak_of_a_block_is_what_it_held_at_most():
    """Memory that is given back before the end is what a machine runs out of."""
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(8 * MIB)  # 32 MB, and gone
    if peak.growth is None:
        pytest.skip("this system does not tell")
    assert 28 * MIB < peak.growth < 64 * MIB


def test_a_share_is_the_bound_over_the_time():
    """A bound of other work than the timed text's is no bound."""
    student = tiny_student().eval()
    models = {"LM": token_lm(), "student": student}
    found = attained(models, text_ids(16).view(2, 8), small_rates(), new_tokens=8, repeats=2)
    assert (found["LM"]["steps_reduction"], found["student"]["steps_reduction"]) == (1, 4)
    for name, row in found.items():
        reading = (row["weight_bytes_per_token"] + row["cache_bytes_per_token"]) / row["bandwidth"]
        multiplying = row["operations_per_token"] / row["matrix_rate"]
        assert row["bound_tokens_per_second"] == pytest.approx(1 / max(reading, multiplying))
        assert row["bound_by"] == ("memory" if reading >= multiplying else "matrices")
        assert row["share"] == pytest.approx(row["tokens_per_second"] / row["bound_tokens_per_second"])
        assert row["token_seconds_p50"] <= row["token_seconds_p95"] and len(row["runs"]) == 2
        assert row["peak_bytes"] is None or row["peak_bytes"] >= models[name].get_memory_footprint()
        assert row["prompt_tokens_per_second"] == pytest.approx(16 / row["first_token_seconds"])


@pytest.mark.parametrize(("new_tokens", "repeats"), [(0, 1), (1, 0)])
def test_nothing_to_measure_is_refused(new_tokens: int, repeats: int):
    """A median of no runs is an error far from its cause."""
    with pytest.raises(ValueError, match="must be at least 1"):
        attained({"LM": token_lm()}, text_ids(4)[None], small_rates(), new_tokens, repeats)
    with pytest.raises(ValueError, match=r"`new_tokens` \(1\) must be at least 2"):
        watch_work(token_lm(), text_ids(4)[None], 1)


@pytest.mark.gpu
def test_on_a_gpu_rates_and_shares_are_the_gpu_s():
    """A share of the CPU's bound would be above one."""
    rates = MachineRates("cuda", torch.bfloat16)
    assert rates.bandwidth(2**30) > 1e11 and rates.matrix_rate > 1e12
    model = token_lm().to("cuda", torch.bfloat16)
    row = attained({"LM": model}, text_ids(8)[None].cuda(), rates, new_tokens=8, repeats=2)["LM"]
    assert 0 < row["share"] < 1 and row["peak_bytes"] > model.get_memory_footprint()
