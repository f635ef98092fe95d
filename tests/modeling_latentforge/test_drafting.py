"""A student drafts for its teacher, or is drafted for: the cache goes back when tokens are rejected."""

import copy

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM
from tests.conftest import HEAD_DECODER, PAD, text_batch, tiny_student


PAIRS = pytest.mark.parametrize("head, decoder", HEAD_DECODER)


def _recording_cache(student, ids, mask=None):
    cache = student._as_latentforge_cache(None)
    cache.activate_past_recording()
    student(ids, attention_mask=mask, past_key_values=cache)
    return cache


@PAIRS
@pytest.mark.parametrize("padding", [0, 3])
def test_a_cropped_cache_equals_one_that_never_read_the_tokens(head, decoder, padding):
    """Rejected tokens that linger in the window, the convolution or the backbone make later drafts worse, silently."""
    student = tiny_student(head, decoder).double()
    row = text_batch(1, 40)
    for length in range(padding + 6, padding + 12):
        for read, removed in ((0, 1), (0, 4), (1, 1), (6, 1), (6, 2), (6, 5), (6, 6), (6, 7), (6, 9)):
            ids, mask = row[:, :length].clone(), torch.ones(1, 40, dtype=torch.long)
            ids[:, :padding], mask[:, :padding] = PAD, 0
            cache = _recording_cache(student, ids, mask[:, :length])
            for column in range(length, length + read):
                wrong = row[:, column : column + 1] + 1
                student(wrong, attention_mask=mask[:, : column + 1], past_key_values=cache)
            cache.crop(-removed)
            kept = length + read - removed
            assert cache.get_seq_length() == kept
            text = ids if kept <= length else torch.cat([ids, row[:, length:kept] + 1], 1)
            text = torch.cat([text[:, :kept], row[:, 20:27]], 1)
            offset = None if decoder == "autoregressive" else -length % 4
            whole = student(text, attention_mask=mask[:, : kept + 7], patch_offset=offset, use_cache=False).logits
            after = student(
                text[:, kept:], attention_mask=mask[:, : kept + 7], past_key_values=cache, sample_noise=False
            ).logits
            torch.testing.assert_close(after, whole[:, kept:], rtol=0, atol=1e-10)


def test_a_cache_that_did_not_record_says_how_to():
    """Going on from a wrong state would be silent."""
    student = tiny_student()
    cache = student(text_batch(1, 9), use_cache=True).past_key_values
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"recorded its last 0 tokens and cannot go back 2: call `activate_past"):
        cache.crop(-2)
    with pytest.raises(ValueError, match=r"`crop\(-10\)` of a cache of 9 tokens"):
        cache.crop(-10)


@PAIRS
def test_rows_that_were_rearranged_cannot_go_back(head, decoder):
    """What was recorded is of the rows as they were: another row's text would go on here."""
    student = tiny_student(head, decoder)
    cache = _recording_cache(student, text_batch(2, 9))
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="cannot go back 2"):
        cache.crop(-2)


@PAIRS
def test_a_cache_emptied_by_going_back_reads_a_new_text(head, decoder):
    """Slots of zeros that stay in the backbone's cache are patches that nobody wrote."""
    student = tiny_student(head, decoder).double()
    cache = _recording_cache(student, text_batch(1, 9))
    cache.crop(-9)
    other = text_batch(2, 11)[1:]
    logits = student(other, past_key_values=cache).logits
    torch.testing.assert_close(logits, student(other, use_cache=False).logits, rtol=0, atol=1e-10)


def _teacher_and_draft(head, decoder, vocab_size):
    """Of so few ids that a random draft is accepted now and then."""
    torch.manual_seed(1)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    backbone = LlamaConfig(**sizes, **ids, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.5)
    codec = LatentForgeAutoencoder(
        LatentForgeAutoencoderConfig(**sizes, **ids, patch_size=4, latent_size=16, initializer_range=0.3)
    )
    draft = LatentForgeForCausalLM.from_autoencoder(
        codec,
        backbone,
        head_config={"head_type": head, "noise_size": 8},
        decoder_type=decoder,
        decoder_num_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(backbone).eval(), draft.eval()


@PAIRS
@pytest.mark.parametrize("length", [1, 4, 7])
def test_a_drafted_greedy_text_is_the_teachers(head, decoder, length):
    """Drafting promises the same text, wherever in a patch a draft is rejected."""
    teacher, draft = _teacher_and_draft(head, decoder, vocab_size=6)
    ids = text_batch(1, length) % 6
    alone = teacher.generate(ids, do_sample=False, max_new_tokens=40)
    for tokens in (1, 3, 8):
        draft.generation_config.num_assistant_tokens = tokens
        assert torch.equal(teacher.generate(ids, do_sample=False, max_new_tokens=40, assistant_model=draft), alone)


@PAIRS
@pytest.mark.parametrize("length", [1, 6, 8])
def test_a_model_accepts_every_draft_of_itself(head, decoder, length):
    """A draft's cache that is a token off still gives the right text, only slowly."""
    _, student = _teacher_and_draft(head, decoder, vocab_size=200)
    draft = copy.deepcopy(student)
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0  # a random model is sure of nothing
    calls = []
    student.register_forward_pre_hook(lambda *_: calls.append(1))
    for tokens in (1, 3, 8):
        draft.generation_config.num_assistant_tokens = tokens
        calls.clear()
        student.generate(text_batch(1, length) % 200, do_sample=False, max_new_tokens=40, assistant_model=draft)
        assert len(calls) == -(-40 // (tokens + 1))


@PAIRS
def test_a_students_own_text_may_be_drafted_for(head, decoder):
    """Its cache then goes back inside the prompt's pass, or many tokens at once."""
    _, student = _teacher_and_draft(head, decoder, vocab_size=6)
    ids = text_batch(1, 9) % 6
    alone = student.generate(ids, do_sample=False, max_new_tokens=40)
    for kwargs in (
        {"prompt_lookup_num_tokens": 5},
        {"prompt_lookup_num_tokens": 5, "past_key_values": DynamicCache(config=student.config.backbone_config)},
        {"assistant_model": _teacher_and_draft(head, decoder, 6)[0]},
    ):
        made = student.generate(ids, do_sample=False, max_new_tokens=40, return_dict_in_generate=True, **kwargs)
        assert torch.equal(made.sequences, alone)
        assert not made.past_key_values.is_recording  # it would go on keeping every state


@PAIRS
def test_a_drafted_sample_has_the_teachers_distribution(head, decoder):
    """A draft that reports another distribution than the one it drew from bends the teacher's; no text shows it."""
    teacher, draft = _teacher_and_draft(head, decoder, vocab_size=3)
    draft.generation_config.num_assistant_tokens = 2
    ids = torch.tensor([[0, 2, 1, 1, 2, 0]])
    texts = torch.cartesian_prod(*[torch.arange(3)] * 3)
    log_probs = teacher(torch.cat([ids.expand(27, -1), texts], 1)).logits.log_softmax(-1)[:, 5:8]
    exact = log_probs.gather(2, texts[..., None]).sum((1, 2)).exp()
    counts = torch.zeros(27)
    for _ in range(200):
        made = teacher.generate(ids, do_sample=True, top_k=0, max_new_tokens=3, assistant_model=draft)[0, 6:]
        counts[(made * torch.tensor([9, 3, 1])).sum()] += 1

    def distance(counts):
        return (counts / counts.sum(-1, keepdim=True) - exact).abs().sum(-1) / 2

    floor = distance(torch.distributions.Multinomial(200, exact).sample((2000,)))
    assert distance(counts) < floor.mean() + 3 * floor.std()
    assert distance(torch.full((27,), 1.0)) > floor.mean() + 6 * floor.std()  # the test can tell
