"""`torch.compile`. All but the last test trace and run the traced graphs as they are: that needs no compiler of C++,
and shows what cannot be traced or is traced again and again."""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, LlamaConfig

from modeling_latentforge import LatentForgeForCausalLM
from tests.conftest import PAD, TINY, text_batch, tiny_student


DECODERS = pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
# a trace takes seconds, and the two decoders share most of what is traced
SLOW_PARALLEL = pytest.mark.parametrize(
    "decoder", ["autoregressive", pytest.param("parallel", marks=pytest.mark.slow)]
)
SLOW_DYNAMIC = pytest.mark.parametrize("cache", [pytest.param("dynamic", marks=pytest.mark.slow), "static"])
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Graphs are kept by the code they were made of, whichever model it was."""
    torch.compiler.reset()
    # where graphs become too many, torch warns and goes on without
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


def small_student(decoder: str, **kwargs) -> LatentForgeForCausalLM:
    """One layer of everything: tracing takes its time for each. K=8."""
    backbone = LlamaConfig(**{**TINY, "num_hidden_layers": 1})
    return tiny_student("regression", decoder, backbone, patch_size=8, num_decoder_layers=1, **kwargs)


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def padded_batch() -> dict[str, torch.Tensor]:
    ids = text_batch(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


@DECODERS
def test_scoring_is_one_graph_and_gives_the_same_logits(decoder):
    """A break in the graph costs a start of every part; a wrong one costs the figures."""
    student = small_student(decoder)
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    batch = padded_batch()
    with torch.no_grad():
        made, expected = compiled(**batch, use_cache=False).logits, student(**batch, use_cache=False).logits
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)


@SLOW_PARALLEL
def test_training_is_one_graph_and_gives_the_same_gradients(decoder):
    """Losses whose gradient is taken by hand are what a tracer may lose without an error."""
    student, batch = small_student(decoder).train(), padded_batch()
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    plain = copy.deepcopy(student)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    for model in (compiled, plain):
        model(**batch, loss_weights={"ce": 1.0, "mse": 0.5}).loss.backward()
    found = {name: parameter.grad for name, parameter in student.named_parameters() if parameter.grad is not None}
    expected = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


@SLOW_PARALLEL
@SLOW_DYNAMIC
def test_generation_compiles_a_few_graphs_whatever_the_place_in_the_patch(decoder, cache):
    """One graph for every place, stride or length would hit torch's limit of 8 within a patch of 8, and every token
    would wait for a compilation."""
    student, ids = small_student(decoder), text_batch(1, 6)
    kwargs = {**GREEDY, "max_new_tokens": 34} | ({"cache_implementation": cache} if cache == "static" else {})
    expected = student.generate(ids, **kwargs)
    student.forward = torch.compile(student.forward, backend="eager")
    before = num_graphs()
    assert torch.equal(student.generate(ids, **kwargs), expected)
    first = num_graphs()
    assert 0 < first - before <= 6
    assert torch.equal(student.generate(ids, **kwargs), expected) and num_graphs() == first


@pytest.mark.slow
def test_a_compiled_model_generates_from_padded_prompts():
    """Rows that complete their patches apart take other branches at every token."""
    student, batch = small_student("autoregressive"), padded_batch()
    kwargs = {**GREEDY, "max_new_tokens": 10}
    expected = student.generate(**batch, **kwargs)
    student.compile(backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=False):
        assert torch.equal(student.generate(**batch, **kwargs), expected)


@SLOW_PARALLEL
def test_a_compiled_backbone_is_compiled_once_for_a_static_cache(decoder):
    """The part with most of the weights, alone: the prompt's graph and the step's."""
    student, ids = small_student(decoder), text_batch(1, 9)
    kwargs = {**GREEDY, "max_new_tokens": 34, "cache_implementation": "static"}
    expected = student.generate(ids, **kwargs)
    student.model.backbone.compile(backend="eager")
    before = num_graphs()
    assert torch.equal(student.generate(ids, **kwargs), expected)
    assert num_graphs() - before <= 2


def test_the_stock_automatic_compilation_leaves_a_student_alone():
    """`generate` compiles by itself where it finds a static cache on a GPU; ours is more than its backbone's."""
    student, ids = small_student("autoregressive"), text_batch(1, 6)
    config = CompileConfig(backend="eager")
    config._compile_all_devices = True
    kwargs = {**GREEDY, "max_new_tokens": 10, "cache_implementation": "static"}
    before = num_graphs()
    made = student.generate(ids, **kwargs, compile_config=config)
    assert torch.equal(made, student.generate(ids, **kwargs)) and num_graphs() == before


@pytest.mark.slow
@DECODERS
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=False)  # it sets more guards: nine or ten graphs
def test_the_default_compiler_gives_the_same_logits_gradients_and_tokens(decoder):
    """What is traced right may still be generated wrong."""
    student, ids = small_student(decoder), text_batch(2, 20)
    plain = copy.deepcopy(student)
    compiled = torch.compile(student)
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
    torch.compiler.reset()  # scoring, training and each cache are a process of their own elsewhere
    for model in (compiled, plain):
        model(ids, labels=ids, loss_weights={"ce": 1.0, "mse": 0.5}).loss.backward()
    for found, expected in zip(student.parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-3, atol=1e-4)
    for cache in ("dynamic", "static"):
        torch.compiler.reset()
        kwargs = {**GREEDY, "max_new_tokens": 34} | ({"cache_implementation": cache} if cache == "static" else {})
        student.forward = torch.compile(type(student).forward.__get__(student))
        assert torch.equal(student.generate(ids[:1, :6], **kwargs), plain.generate(ids[:1, :6], **kwargs))
