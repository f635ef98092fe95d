"""The benchmark's parts that its script's test does not tell apart."""

import pytest
import torch
from transformers import LlamaForCausalLM

from tests.conftest import BACKBONES, TINY, VOCAB, text_ids, tiny_student
from trainers.evaluation.benchmark import (
    SEED_BACKBONE,
    TABLES,
    FixedShapeStep,
    cache_bytes,
    cache_growth,
    compile_decoder,
    context_length,
    random_prompts,
    samples_whole_patches,
    seed_backbone,
    seed_student,
    seed_token_lm,
    spread,
    tiled_prompts,
)


def token_lm() -> LlamaForCausalLM:
    return LlamaForCausalLM(BACKBONES["llama"]()).eval()


def test_the_default_backbone_is_the_seed_s():
    """Every speed target is stated for 12 x 768 and 32k ids."""
    config = seed_backbone()
    assert {name: getattr(config, name) for name in SEED_BACKBONE} == SEED_BACKBONE


def test_models_of_one_backbone_differ_in_their_decoders_only():
    """A student with another backbone than its token LM's would win or lose by that."""
    backbone = seed_backbone(32, num_hidden_layers=2, vocab_size=VOCAB)
    codec = {"hidden_size": 32, "intermediate_size": 48}
    model = seed_token_lm(backbone)
    student = seed_student(backbone, 4, codec=codec, num_decoder_layers=2, decoder_hidden_size=16)
    parallel = seed_student(backbone, 4, "parallel", codec, head_config={"head_type": "energy"})
    layers = [
        sum(x.numel() for x in each.parameters()) for each in (model.model.layers, student.model.backbone.layers)
    ]
    assert layers[0] == layers[1] and model.config.tie_word_embeddings and not backbone.tie_word_embeddings
    assert student.config.num_decoder_layers == 2 and student.config.decoder_hidden_size == 16
    assert [samples_whole_patches(each) for each in (model, student, parallel)] == [False, False, True]


def test_prompts_are_repeated_and_cut_to_the_length_and_batch_asked_for():
    """Rows of other lengths than the table says would be padded, and slower for another reason."""
    assert tiled_prompts([[1, 2, 3], [4]], 3, 5).tolist() == [[1, 2, 3, 1, 2], [4] * 5, [1, 2, 3, 1, 2]]
    assert random_prompts(9, 2, 3).shape == (2, 3)
    for wrong in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            tiled_prompts(wrong, 1, 1)


def test_a_student_reads_k_times_its_backbone_s_positions():
    """A bound in patches taken for one in tokens would refuse seven prompts in eight."""
    backbone = BACKBONES["llama"]()
    backbone.max_position_embeddings = 10
    assert context_length(LlamaForCausalLM(backbone)) == 10
    assert context_length(tiny_student(backbone=backbone)) == 40


def test_the_cache_of_a_token_lm_is_its_keys_and_values():
    """A count that misses a tensor would make patches look cheaper or dearer than they are."""
    model, ids = token_lm(), text_ids(12)[None]
    heads, size = 2, TINY["hidden_size"] // TINY["num_attention_heads"]
    found = cache_growth(model, ids, short=4)
    assert found == {"bytes_per_token": TINY["num_hidden_layers"] * 2 * heads * size * 4, "constant_bytes": 0}
    tensor = torch.zeros(3)
    assert cache_bytes({"a": tensor, "b": [tensor, tensor]}) == 12
    for short in (0, 12):
        with pytest.raises(ValueError, match=r"`short`"):
            cache_growth(model, ids, short=short)


def test_the_cache_of_a_student_grows_by_one_backbone_slot_a_patch():
    """What grows with tokens instead of patches would eat the gain in long texts."""
    of_token_lm = cache_growth(token_lm(), text_ids(24)[None], short=8)["bytes_per_token"]
    found = cache_growth(tiny_student(decoder="parallel").eval(), text_ids(24)[None], short=8)
    assert found["bytes_per_token"] == of_token_lm / 4 and found["constant_bytes"] > 0


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_of_fixed_shapes_is_the_step(rows: int):
    """Padding that takes part would change texts, the more the shorter they are."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    model = tiny_student().eval()
    ids = text_ids(rows * 3).view(rows, 3)  # fewer tokens than the window holds, then more than a block of conditions
    options = {"max_new_tokens": 21, "min_new_tokens": 21, "do_sample": False, "output_logits": True}
    options |= {"return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    plain = model.generate(ids, **options)
    model.decoder.step = FixedShapeStep(model.decoder, block=3, backend=backend)
    compiled = model.generate(ids, **options)
    assert torch.equal(plain.sequences, compiled.sequences)
    torch.testing.assert_close(torch.stack(compiled.logits), torch.stack(plain.logits), rtol=0, atol=1e-4)
    # 24 tokens are 1 to 6 conditions, two blocks; the prompt's tensors may lie otherwise than a step's
    assert len(graphs) <= 4


def test_rows_of_unequal_length_take_the_plain_step():
    """Their masks are not those of the padding."""
    model = tiny_student().eval()
    ids = text_ids(10).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    plain = model.generate(ids, **options)
    compile_decoder(model, backend="eager")
    assert torch.equal(plain, model.generate(ids, **options))


def test_a_compiled_parallel_decoder_writes_the_same():
    """A compiled function that is put beside the used one would speed up nothing."""
    model = tiny_student(decoder="parallel").eval()
    ids = text_ids(6)[None]
    plain = model.generate(ids, max_new_tokens=9, do_sample=False)
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph

    torch._dynamo.reset()
    compile_decoder(model, backend=backend)
    assert torch.equal(plain, model.generate(ids, max_new_tokens=9, do_sample=False)) and calls


def test_a_token_lm_is_left_as_it_is():
    """transformers compiles it with its static cache; a second compilation would be another baseline."""
    model = token_lm()
    before = dict(vars(model))
    compile_decoder(model)
    assert vars(model) == before


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([2.0], "2"), ([3.0, 1.0, 2.0], "2 (1..3)"), ([0.01234, 1234.5], "617 (0.0123..1234)")],
)
def test_a_spread_is_the_median_and_the_range(values: list[float], text: str):
    """A mean, or a range without its middle, hides the one slow run."""
    assert spread(values) == text


def test_a_row_that_is_not_measured_says_why_in_every_table():
    """An empty line, or a KeyError after hours, says nothing."""
    for table in TABLES.values():
        last = table.markdown([{"device": "cuda", "not_measured": "no GPU"}]).splitlines()[-1]
        assert last.startswith("| cuda |") and "not measured (no GPU)" in last
        assert last.count("|") == len(table.columns) + 1
