import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, GraniteConfig, LlamaConfig

from modeling_latentforge import LatentForgeConfig, LatentForgeForCausalLM
from modeling_latentforge.modeling_patch_decoder import LatentForgeShortConvolution
from tests.conftest import BACKBONES, EOS, HEAD_DECODER, PAD, VOCAB, text_batch, tiny_autoencoder, tiny_student


PAIRS = pytest.mark.parametrize("head, decoder", HEAD_DECODER)


@PAIRS
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("input_mode", ["tokens", "latents"])
def test_no_logit_before_a_token_depends_on_it(head, decoder, backbone, input_mode):
    """The first LatentForge student attended to its own future: every loss it logged was meaningless."""
    student = tiny_student(head, decoder, backbone, input_mode=input_mode)
    ids = text_batch(1, 16)
    base = student(ids).logits
    for t in range(16):
        changed = ids.clone()
        changed[0, t] = EOS
        logits = student(changed).logits
        # position i predicts token i + 1; a parallel decoder sees tokens only through complete patches
        first = t if decoder == "autoregressive" else (t // 4 + 1) * 4 - 1
        assert torch.equal(logits[:, :first], base[:, :first])
        assert first >= 16 or not torch.equal(logits[:, first:], base[:, first:])


@pytest.mark.parametrize("memory, reach", [("none", 4), ("patches", 4)])
def test_context_beyond_the_window_arrives_through_the_latents(memory, reach):
    """A student whose latents carry nothing is only a small local language model in disguise."""
    student = tiny_student(decoder_memory=memory, decoder_window=reach, num_decoder_layers=1)
    ids = text_batch(1, 16)
    changed = ids.clone()
    changed[0, 0] = EOS
    assert (student(ids).logits - student(changed).logits)[0, 15].abs().max() > 1e-6


def test_the_convolution_reaches_back_its_taps_and_no_further():
    """One tap too many reads beyond the declared window; one too few wastes the layer it replaces."""
    convolution = LatentForgeShortConvolution(8, 4).double()
    convolution.weight.data.normal_()
    x = torch.randn(1, 9, 8, dtype=torch.double)
    whole, inputs = convolution(x)
    changed = x.clone()
    changed[0, 2] += 1
    moved = (convolution(changed)[0] - whole).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False, False, True, True, True, True, False, False, False]
    expected = nn.functional.conv1d(
        nn.functional.pad(x.mT, (3, 0)), convolution.weight.T[:, None], groups=8
    ).mT  # conv1d is a correlation: its last tap is the current token's
    torch.testing.assert_close(whole, x + expected)
    recent = inputs[:, 5:8]
    for t in range(5, 9):
        token, recent = convolution.step(x[:, t : t + 1], recent)
        torch.testing.assert_close(token[:, 0], whole[:, t])


def test_a_decoder_without_convolution_is_one_tap():
    """The ablation must be the same model otherwise."""
    student = tiny_student(decoder_conv_size=1)
    assert student.decoder.convolution.weight.abs().sum() == 0
    ids = text_batch(2, 9)
    cached = student(ids[:, :5], use_cache=True)
    step = student(ids[:, 5:], past_key_values=cached.past_key_values).logits
    torch.testing.assert_close(step, student(ids).logits[:, 5:], rtol=0, atol=1e-4)


@PAIRS
def test_row_of_a_left_padded_batch_equals_the_row_alone(head, decoder):
    """Batched serving would give every user another answer than alone."""
    student = tiny_student(head, decoder).double()
    ids = text_batch(3, 11)
    lengths = [11, 6, 3]
    padded, mask = torch.full((3, 11), PAD), torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate(lengths):
        padded[row, 11 - length :], mask[row, 11 - length :] = ids[row, :length], 1
    batch = student(padded, attention_mask=mask).logits
    for row, length in enumerate(lengths):
        alone = student(ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(batch[row, 11 - length :], alone, rtol=0, atol=1e-10)


def test_ids_under_the_mask_do_not_matter():
    """Whatever a tokenizer pads with must not leak into the answer."""
    for decoder in ("autoregressive", "parallel"):
        student = tiny_student(decoder=decoder)
        ids = text_batch(1, 12)
        mask = torch.ones_like(ids)
        mask[0, 5:7] = 0
        other = ids.clone()
        other[0, 5:7] = EOS
        assert torch.equal(
            student(ids, attention_mask=mask).logits[:, 7:], student(other, attention_mask=mask).logits[:, 7:]
        )


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
def test_loss_is_the_usual_shifted_cross_entropy(decoder):
    """Perplexity from any tool must mean what it means for every other causal LM."""
    student = tiny_student(decoder=decoder)
    ids = text_batch(2, 16)
    labels = ids.clone()
    labels[0, 3:7] = -100
    output = student(ids, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(
        student(ids, labels=labels, num_items_in_batch=7).loss * 7, expected * (labels[:, 1:] != -100).sum()
    )
    assert student(ids, labels=labels, output_logits=False).logits is None


@PAIRS
def test_losses_of_left_padded_rows_equal_those_of_the_rows_alone(head, decoder):
    """Shifting rows but not their labels trains the right tokens on the wrong patches; an unshifted first token is
    predicted from itself."""
    student = tiny_student(head, decoder)
    ids = text_batch(1, 12)
    padded = nn.functional.pad(ids, (3, 0), value=PAD)
    mask = (padded != PAD).long()
    labels, padded_labels = ids.clone(), padded.masked_fill(mask == 0, -100)
    weights = {"ce": 1.0, "mse": 0.5}
    alone = student(ids, labels=labels, loss_weights=weights)
    with_padding = student(padded, attention_mask=mask, labels=padded_labels, loss_weights=weights)
    torch.testing.assert_close(with_padding.loss_components, alone.loss_components)


def test_mse_is_to_the_codecs_mean_and_weighs_patches_by_their_tokens():
    """A patch of padding must not pull the head."""
    student = tiny_student()
    ids = text_batch(1, 12)
    labels = ids.clone()
    labels[0, 4:8] = -100
    output = student(ids, labels=labels, loss_weights={"mse": 2.0})
    states = student.model(student.model.patch_embedding(ids.view(1, 3, 4), None))
    conditions = torch.cat([student.model.start.expand(1, 1, -1), states], 1)
    error = (student.head.sample(conditions)[:, :3] - student.autoencoder.encode(ids).mean).square().mean(-1)[0]
    expected = (3 * error[0] + 4 * error[2]) / 7
    torch.testing.assert_close(output.loss_components["mse"], expected)
    torch.testing.assert_close(output.loss, 2 * expected)


@PAIRS
def test_every_trainable_parameter_gets_a_gradient_and_the_codec_none(head, decoder):
    """A parameter without gradient stops DDP; a codec that moves invalidates its own latents."""
    student = tiny_student(head, decoder, train_decoder=False).train()
    ids = text_batch(2, 16)
    weights = {"ce": 1.0, "energy": 1.0} if head == "energy" else {"ce": 1.0, "mse": 1.0}
    student(ids, attention_mask=torch.ones_like(ids), labels=ids, loss_weights=weights).loss.backward()
    assert not [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad is None and not p.requires_grad for p in student.autoencoder.parameters())
    assert not student.autoencoder.training


def test_trained_decoder_starts_as_the_codecs_and_moves_alone():
    """A trained copy that shares storage with the codec would change the targets it is trained on."""
    student = tiny_student(decoder="parallel", train_decoder=True).train()
    ids = text_batch(1, 8)
    torch.testing.assert_close(student.decoder.expand.weight, student.autoencoder.decoder.expand.weight)
    before = student.autoencoder.decoder.expand.weight.clone()
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    student(ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(student.autoencoder.decoder.expand.weight, before)
    assert not torch.equal(student.decoder.expand.weight, before)


@PAIRS
def test_save_and_load_keeps_logits_and_the_frozen_codec(head, decoder, tmp_path):
    """`from_pretrained` silently unfreezes everything."""
    student = tiny_student(head, decoder)
    with torch.no_grad():
        for parameter in student.parameters():  # trained weights: none stands where initialisation would put it
            parameter.add_(0.1 * torch.randn_like(parameter))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = text_batch(2, 14)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    assert not any(p.requires_grad for p in loaded.autoencoder.parameters())
    config = LatentForgeConfig.from_pretrained(tmp_path)
    assert (config.head_config.head_type, config.decoder_type, config.patch_size) == (head, decoder, 4)


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    """transformers fills the hole with random numbers and goes on."""
    student = tiny_student()
    weights = student.state_dict()
    del weights["decoder.convolution.weight"]
    student.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ValueError, match=r"1 of its weights are missing, decoder.convolution.weight"):
        LatentForgeForCausalLM.from_pretrained(tmp_path)


def test_a_dtype_inside_the_backbone_config_does_not_split_the_model():
    """A config copied from a bf16 checkpoint built half a model in bf16: a crash at the first product."""
    config = BACKBONES["llama"]()
    config.dtype = torch.bfloat16
    student = tiny_student(backbone=config)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    loaded = student.to(torch.bfloat16)
    assert loaded(text_batch(1, 8)).logits.isfinite().all()


def test_low_rank_output():
    """A 128k vocabulary at full width is most of a small decoder's time."""
    student = tiny_student(decoder_output_size=8, tie_word_embeddings=False)
    assert student.lm_head.weight.shape == (VOCAB, 8)
    assert student(text_batch(1, 8)).logits.shape == (1, 8, VOCAB)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"decoder_window": 3}, r"`decoder_window` \(3\).*`patch_size` is 4"),
        ({"decoder_num_heads": 5}, r"`decoder_hidden_size` \(32\).*`decoder_num_heads` \(5\)"),
        ({"train_decoder": True}, "`train_decoder` is for"),
        ({"decoder_output_size": 8, "tie_word_embeddings": True}, r"`decoder_output_size` \(8\)"),
        ({"decoder_type": "serial"}, "serial"),
        ({"num_decoder_layers": 0}, "num_decoder_layers.*0"),
        ({"decoder_conv_size": 0}, "decoder_conv_size.*0"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_their_values(kwargs, message):
    """A window shorter than the patch would hide the patch's own tokens and still train."""
    with pytest.raises(Exception, match=message):
        LatentForgeForCausalLM.from_autoencoder(
            tiny_autoencoder(), BACKBONES["llama"](), **{"decoder_type": "autoregressive", **kwargs}
        )


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"kl": 1.0}, "Unknown loss parts.*kl"),
        ({"kd": 1.0}, "teacher"),
        ({"energy": 1.0}, "regression"),
        ({"ce": 0.0}, "zero"),
    ],
)
def test_losses_that_cannot_be_computed_are_refused(weights, message):
    """A misspelt weight would train without that loss."""
    ids = text_batch(1, 8)
    with pytest.raises(ValueError, match=message):
        tiny_student()(ids, labels=ids, loss_weights=weights)


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
def test_an_energy_score_alone_decodes_nothing(decoder):
    """A third of a step's memory and time would go into logits that no loss reads."""
    student, ids = tiny_student("energy", decoder), text_batch(2, 16)
    options = {"labels": ids, "loss_weights": {"energy": 1.0}}
    losses, calls = [], []
    decoding = student.decoder if decoder == "autoregressive" else student.autoencoder.decoder
    handle = decoding.register_forward_hook(lambda *_: calls.append(1))
    for output_logits in (True, False):
        torch.manual_seed(0)
        output = student(ids, output_logits=output_logits, **options)
        losses.append(output.loss)
        assert (output.logits is None) != output_logits and len(calls) == 1
    handle.remove()
    assert torch.equal(*losses)
    for weights in ({"energy": 1.0, "mse": 1.0}, {"energy": 1.0, "ce": 0.5}):
        torch.manual_seed(0)
        whole = student(ids, labels=ids, loss_weights=weights).loss_components
        torch.manual_seed(0)
        assert student(ids, labels=ids, loss_weights=weights, output_logits=False).loss_components == whole


def test_gradient_checkpointing_gives_the_same_gradients():
    """Recomputation with other dropout or another cache state trains a different model."""
    ids = text_batch(2, 16)
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        student = tiny_student().train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        student(ids, labels=ids).loss.backward()
        grads.append(student.model.backbone.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("multiplier", [1.0, 16.0])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_from_teacher_copies_layers_and_reads_a_patch_as_the_mean_of_its_embeddings(backbone, multiplier):
    """A student that starts from noise while the log says `from_teacher` wastes the teacher's training."""
    teacher = AutoModelForCausalLM.from_config(BACKBONES[backbone]())
    student = LatentForgeForCausalLM.from_teacher(
        teacher, tiny_autoencoder(), layers=[1], embedding_multiplier=multiplier
    )
    name = "mlp.dense_h_to_4h" if backbone == "gpt_neox" else "mlp.up_proj"
    kept = student.model.backbone.layers[0].get_submodule(name).weight
    assert torch.equal(kept, teacher.base_model.layers[1].get_submodule(name).weight)
    ids = text_batch(1, 8)
    patch = student.model.patch_embedding(ids.view(1, 2, 4), None)
    mean = teacher.get_input_embeddings()(ids).view(1, 2, 4, -1).mean(2)
    torch.testing.assert_close(patch, mean)
    assert torch.equal(student.lm_head.weight, teacher.get_output_embeddings().weight)
    assert torch.equal(student.decoder.embed_tokens.weight, teacher.get_input_embeddings().weight)
    assert student(ids).logits.isfinite().all()


def test_from_teacher_refuses_a_foreign_vocabulary_and_missing_layers():
    """Ids of another tokenizer index other words: training runs and learns nonsense."""
    config = BACKBONES["llama"]()
    config.vocab_size = 100
    with pytest.raises(ValueError, match=f"{VOCAB} token ids, the teacher 100"):
        LatentForgeForCausalLM.from_teacher(AutoModelForCausalLM.from_config(config), tiny_autoencoder())
    teacher = AutoModelForCausalLM.from_config(BACKBONES["llama"]())
    with pytest.raises(ValueError, match=r"layers 0 to 1, each once, got \[2\]"):
        LatentForgeForCausalLM.from_teacher(teacher, tiny_autoencoder(), layers=[2])


def test_a_backbone_that_reads_both_ways_is_refused():
    """It would see the patches that it is trained to predict: a loss near zero, and text of noise."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="bert backbone that reads in both directions"):
        LatentForgeForCausalLM.from_autoencoder(tiny_autoencoder(), BertConfig(**sizes))
    student = LatentForgeForCausalLM.from_autoencoder(tiny_autoencoder(), BertConfig(**sizes, is_decoder=True))
    ids = text_batch(1, 12)
    changed = ids.clone()
    changed[0, 8] = EOS
    assert torch.equal(student(ids).logits[:, :8], student(changed).logits[:, :8])


def test_a_keyword_that_means_nothing_is_refused():
    """`attention_maks=` that is swallowed is a batch whose padding is read as text."""
    student, ids = tiny_student(), text_batch(1, 8)
    with pytest.raises(TypeError, match="knows no attention_maks"):
        student(ids, attention_maks=torch.ones_like(ids))
    student(ids, return_dict=True, output_attentions=None, output_hidden_states=False)


def test_resizing_the_vocabulary_is_refused():
    """transformers would resize the embeddings and leave the codec behind."""
    with pytest.raises(ValueError, match="codec"):
        tiny_student().resize_token_embeddings(300)


def test_a_long_context_model_keeps_window_attention_equal_to_full_masked_attention():
    """The blockwise window must be the window, at every length and block boundary."""
    from modeling_latentforge.modeling_patch_decoder import window_attention

    for length, window in [(1, 4), (5, 4), (8, 4), (13, 5), (16, 16), (7, 16)]:
        query, key, value = torch.randn(3, 2, 2, length, 8, dtype=torch.float64)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        expected = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=(distance >= 0) & (distance < window)
        )
        torch.testing.assert_close(window_attention(query, key, value, window), expected)


def test_backbone_without_a_spare_embedding_matrix():
    """An unused embedding of 128k x H is dead weight in every checkpoint."""
    student = tiny_student(
        backbone=LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    )
    assert not [name for name, _ in student.model.backbone.named_parameters() if "embed" in name]


def test_a_call_with_an_unknown_field_is_refused():
    """`head_type="energy"` would build a regression head, and an experiment would compare a model with itself."""
    codec = tiny_autoencoder()
    backbone = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
    with pytest.raises(TypeError, match="no field 'head_type'.*head_config"):
        LatentForgeForCausalLM.from_autoencoder(codec, backbone, head_type="energy")
    with pytest.raises(TypeError, match="no field 'window', 'latent_dim'"):
        LatentForgeForCausalLM.from_autoencoder(codec, backbone, window=99, latent_dim=3)
    with pytest.raises(ValueError, match="hiden_size.*did you mean `hidden_size`"):
        LatentForgeForCausalLM.from_autoencoder(codec, {"model_type": "llama", "hiden_size": 32})


def test_a_teacher_that_divides_its_logits_gives_a_matrix_that_need_not():
    """Granite's student would begin eight times as sure of itself as its teacher."""
    config = GraniteConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        logits_scaling=8.0,
        tie_word_embeddings=False,
    )
    teacher = AutoModelForCausalLM.from_config(config)
    student = LatentForgeForCausalLM.from_teacher(teacher, tiny_autoencoder())
    torch.testing.assert_close(student.lm_head.weight, teacher.lm_head.weight / 8)
