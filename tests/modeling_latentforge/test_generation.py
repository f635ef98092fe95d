import pytest
import torch
from transformers import DynamicCache, LlamaConfig, MistralConfig

from modeling_latentforge import LatentForgeForCausalLM
from tests.conftest import BACKBONES, EOS, HEAD_DECODER, PAD, text_batch, tiny_autoencoder, tiny_student


PAIRS = pytest.mark.parametrize("head, decoder", HEAD_DECODER)


def _generate(student, ids, **kwargs):
    return student.generate(
        ids, **{"do_sample": False, "max_new_tokens": 11, "eos_token_id": None, "pad_token_id": PAD, **kwargs}
    )


@PAIRS
@pytest.mark.parametrize("backbone", BACKBONES)
def test_cached_generation_equals_uncached(head, decoder, backbone):
    """A cache that forgets, doubles or shifts a patch gives fluent, wrong text."""
    student = tiny_student(head, decoder, backbone)
    for length in (1, 3, 4, 7, 9):  # every place in a patch
        ids = text_batch(2, length)
        assert torch.equal(_generate(student, ids), _generate(student, ids, use_cache=False))


@PAIRS
def test_cached_logits_equal_those_of_one_forward_pass(head, decoder):
    """Equal ids can hide unequal distributions, which sampling would show."""
    student = tiny_student(head, decoder).double()
    ids = text_batch(2, 21)
    whole = student(ids, patch_offset=None if decoder == "autoregressive" else 2).logits
    output = student(ids[:, :6], use_cache=True)
    pieces = [output.logits]
    for start, stop in [(6, 7), (7, 8), (8, 13), (13, 14), (14, 21)]:
        output = student(ids[:, start:stop], past_key_values=output.past_key_values)
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-10)


@PAIRS
@pytest.mark.parametrize("lengths", [[9, 4, 6, 1], [7, 4, 6, 1], [4, 4, 4, 4]])
def test_left_padded_batch_generates_what_each_row_generates_alone(head, decoder, lengths):
    """Rows complete their patches at different times; a neighbour's patch boundary must not move mine. Nor may padding
    that all rows share, as a server with fixed lengths has."""
    student = tiny_student(head, decoder)
    ids = text_batch(4, 9)
    padded, mask = torch.full((4, 9), PAD), torch.zeros(4, 9, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 9 - length :], mask[row, 9 - length :] = ids[row, :length], 1
    together = _generate(student, padded, attention_mask=mask, output_logits=True, return_dict_in_generate=True)
    for row, length in enumerate(lengths):
        alone = _generate(student, ids[row : row + 1, :length], output_logits=True, return_dict_in_generate=True)
        assert torch.equal(together.sequences[row, 9:], alone.sequences[0, length:])
        batched = torch.stack([step[row] for step in together.logits])
        torch.testing.assert_close(batched, torch.cat(alone.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
@pytest.mark.parametrize("length", [5, 8])
def test_log_probabilities_while_generating_equal_those_of_forward(decoder, length):
    """A score that differs from the one sampled from makes reranking, RL and perplexity lies."""
    student = tiny_student(decoder=decoder).double()
    ids = text_batch(2, length)
    torch.manual_seed(1)
    output = _generate(student, ids, do_sample=True, output_logits=True, return_dict_in_generate=True)
    new = output.sequences[:, length:]
    generated = torch.stack(output.logits, 1).double().log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    offset = None if decoder == "autoregressive" else -length % 4
    forward = student(output.sequences, patch_offset=offset).logits[:, length - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(generated, forward.gather(2, new[..., None]).sum((1, 2)), rtol=0, atol=1e-4)


@PAIRS
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_exactly_max_new_tokens_are_made(head, decoder, count):
    """CALM overshoots by up to K - 1 tokens."""
    assert _generate(tiny_student(head, decoder), text_batch(1, 6), max_new_tokens=count).shape == (1, 6 + count)


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
def test_eos_inside_a_patch_ends_the_row_and_only_it(decoder):
    """Tokens after EOS inside a patch are kept by CALM's code: answers end in noise."""
    student = tiny_student(decoder=decoder)
    ids = text_batch(2, 6)
    free = _generate(student, ids)[:, 6:]
    eos = int(free[0, 1])
    ended = _generate(student, ids, eos_token_id=eos)[:, 6:]
    for row in range(2):
        stop = (free[row] == eos).nonzero()
        stop = int(stop[0]) + 1 if len(stop) else 11
        assert torch.equal(ended[row, :stop], free[row, :stop])
        assert (ended[row, stop:] == PAD).all()


@PAIRS
def test_sampling_repeats_with_its_seed(head, decoder):
    """Without it no reported sample can be reproduced."""
    student = tiny_student(head, decoder)
    ids, draws = text_batch(1, 6), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(_generate(student, ids, do_sample=True, temperature=0.9, top_p=0.95, top_k=50))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_backbone_runs_once_per_patch():
    """It is the whole point."""
    for decoder in ("autoregressive", "parallel"):
        student = tiny_student(decoder=decoder)
        calls = []
        student.model.register_forward_hook(lambda *args: calls.append(1))  # noqa: B023
        _generate(student, text_batch(1, 8), max_new_tokens=16)
        assert len(calls) == 1 + 3  # the prompt, and three of the four new patches


@PAIRS
def test_beam_search_and_several_sequences(head, decoder):
    """Stock features that reorder the cache must find every part of it reordered, and the grid where it was."""
    student = tiny_student(head, decoder)
    ids = text_batch(2, 6)
    cached = _generate(student, ids, num_beams=3, num_return_sequences=2)
    assert cached.shape == (4, 17)
    assert torch.equal(cached, _generate(student, ids, num_beams=3, num_return_sequences=2, use_cache=False))


def test_a_callers_own_empty_cache_is_used():
    """`generate(past_key_values=DynamicCache())` is how callers keep a cache."""
    student, ids, cache = tiny_student(), text_batch(1, 6), DynamicCache()
    assert torch.equal(_generate(student, ids, past_key_values=cache), _generate(student, ids))
    assert int(cache.get_seq_length()) == 4  # patches, of 6 + 10 tokens seen


def test_a_filled_cache_of_another_model_is_refused():
    """Its positions are tokens, ours are patches: the text would be wrong, without an error."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(ValueError, match="3 positions, made by another model"):
        tiny_student()(text_batch(1, 4), past_key_values=cache)


def test_inputs_embeds_are_refused_with_the_remedy():
    """A patch needs ids: the decoder reads tokens."""
    with pytest.raises(ValueError, match="input_ids"):
        tiny_student()(None, inputs_embeds=torch.zeros(1, 4, 32))


def test_a_prompt_of_only_eos_starts_a_text():
    """The shortest prompt there is."""
    out = _generate(tiny_student(), torch.tensor([[EOS]]))
    assert out.shape == (1, 12)


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
def test_a_row_of_nothing_but_padding_is_refused_by_its_number(decoder):
    """An empty line in a batch of prompts must be found by whoever sent it."""
    ids, mask = text_batch(2, 6), torch.ones(2, 6, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(ValueError, match=r"Rows \[1\] of the prompts"):
        tiny_student(decoder=decoder).generate(ids, attention_mask=mask, max_new_tokens=3)


def test_logits_of_chosen_places():
    """Tools that score answers ask for the places of the answer only."""
    student, ids = tiny_student(), text_batch(1, 12)
    places = torch.tensor([3, 7, 8])
    torch.testing.assert_close(student(ids, logits_to_keep=places).logits, student(ids).logits[:, places])
    cache = student(ids[:, :6], use_cache=True).past_key_values
    kept = student(ids[:, 6:], past_key_values=cache, logits_to_keep=2).logits
    torch.testing.assert_close(kept, student(ids).logits[:, -2:], rtol=0, atol=1e-4)


def test_generating_in_inference_mode_leaves_no_trace():
    """The table of angles that generation keeps must still take part in a step with gradients."""
    student, ids = tiny_student(), text_batch(1, 8)
    with torch.inference_mode():
        student.generate(ids, max_new_tokens=3)
    with torch.enable_grad():
        cache = student(ids, use_cache=True).past_key_values
        student(ids[:, :1], past_key_values=cache).logits.sum().backward()


def test_labels_beside_a_filled_cache_are_refused():
    """The loss would be that of the new tokens without what stands before them."""
    student, ids = tiny_student(), text_batch(1, 12)
    cache = student(ids[:, :8], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cache of 8 tokens"):
        student(ids[:, 8:], past_key_values=cache, labels=ids[:, 8:])


def test_sampling_an_energy_head_without_the_cache_is_refused():
    """Each token of a patch would come from another latent: fluent nonsense at K times the price."""
    with pytest.raises(ValueError, match="use_cache"):
        _generate(tiny_student("energy"), text_batch(1, 6), do_sample=True, use_cache=False)


def test_unequal_rows_on_a_sliding_window_backbone_are_refused():
    """The gaps between rows would count as patches inside the window: wrong text, no error."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    student = tiny_student(backbone=MistralConfig(**sizes, num_key_value_heads=2, sliding_window=3))
    ids, mask = text_batch(2, 9), torch.ones(2, 9, dtype=torch.long)
    assert _generate(student, ids).shape == (2, 20)
    mask[0, :3] = 0
    with pytest.raises(ValueError, match="mistral.*sliding_attention"):
        _generate(student, ids, attention_mask=mask)


def test_static_cache_has_room_for_rows_that_complete_their_patches_apart():
    """A slot per patch is too few where every row takes its own."""
    student, ids = tiny_student(), text_batch(4, 9)
    mask = torch.ones_like(ids)
    for row, pads in enumerate((0, 1, 3, 2)):
        mask[row, :pads] = 0
    static = _generate(student, ids, attention_mask=mask, cache_implementation="static", max_new_tokens=20)
    assert torch.equal(static, _generate(student, ids, attention_mask=mask, max_new_tokens=20))


def test_chunked_prefill_of_padded_rows_is_refused():
    """Padding in a later chunk would read as masked text."""
    ids, mask = text_batch(1, 12), torch.ones(1, 12, dtype=torch.long)
    mask[0, :6] = 0
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        _generate(tiny_student(), ids, attention_mask=mask, prefill_chunk_size=4)


def test_the_backbones_own_eos_does_not_end_texts():
    """LlamaConfig brings eos 2: a text would stop at whatever token 2 is."""
    student = tiny_student()
    assert student.generation_config.eos_token_id == EOS
    config = LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    codec = tiny_autoencoder()
    codec.config.eos_token_id = None
    bare = LatentForgeForCausalLM.from_autoencoder(codec, config)
    assert bare.generation_config.eos_token_id is None and bare.generation_config.bos_token_id is None
    assert config.eos_token_id == 2  # the caller's own config is left alone
