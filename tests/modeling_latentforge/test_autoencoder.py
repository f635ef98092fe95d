import pytest
import torch
from torch import nn

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig
from tests.conftest import EOS, PAD, text_batch, tiny_autoencoder


def test_shapes_and_default_latent_size():
    """The student relies on (B, N, D) and (..., K, V)."""
    assert LatentForgeAutoencoderConfig(patch_size=8).latent_size == 256
    codec = tiny_autoencoder()
    ids = text_batch(2, 12)
    encoding = codec.encode(ids)
    assert encoding.mean.shape == encoding.log_std.shape == (2, 3, 16)
    assert codec.decode(encoding.mean).shape == (2, 3, 4, 258)
    assert codec(ids).logits.shape == (2, 12, 258)


def test_a_memorised_text_with_eos_and_padding_comes_back_exactly():
    """A codec that cannot give back EOS never lets a student stop; one that cannot give back padding garbles the last
    patch."""
    codec = tiny_autoencoder(initializer_range=0.05, token_dropout=0.0, latent_dropout=0.0).train()
    ids = text_batch(4, 32)
    ids[:, 21], ids[:, 22:24] = EOS, PAD
    optimizer = torch.optim.AdamW(codec.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        codec(ids, labels=ids).loss.backward()
        optimizer.step()
    codec.eval()
    assert torch.equal(codec.decode(codec.encode(ids).mean).argmax(-1).flatten(1), ids)


def test_patches_do_not_see_each_other():
    """Free-running reconstruction of one patch must not depend on its neighbours: the student predicts them one at a
    time."""
    codec = tiny_autoencoder()
    ids = text_batch(1, 12)
    other = ids.clone()
    other[:, 4:] = EOS
    assert torch.equal(codec.encode(ids).mean[:, 0], codec.encode(other).mean[:, 0])


def test_loss_parts_equal_their_definitions():
    """Reconstruction times K and the clamp per dimension before the sum are CALM's; either one moved changes the
    balance silently."""
    codec = tiny_autoencoder(kl_weight=0.01)
    ids = text_batch(2, 12)
    labels = ids.clone()
    labels[0, :4] = -100
    output = codec(ids, labels=labels)
    encoding = codec.encode(ids)
    ce = nn.functional.cross_entropy(codec.decode(encoding.mean).flatten(0, 2), labels.flatten())
    kl = 0.5 * (encoding.mean**2 + (2 * encoding.log_std).exp() - 1 - 2 * encoding.log_std)
    kl = kl.clamp(min=0.5).sum(-1).flatten()[1:].mean()
    torch.testing.assert_close(output.loss_components["reconstruction"], 4 * ce)
    torch.testing.assert_close(output.loss_components["kl"], kl)
    torch.testing.assert_close(output.loss, 4 * ce + 0.01 * kl)
    assert output.logits is None


def test_dropped_tokens_become_the_mask_embedding_not_token_zero():
    """CALM's code drops to id 0, which is a real token ('!' in Llama 3): the codec learns to distrust it."""
    codec = tiny_autoencoder(token_dropout=0.999).train()
    codec.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    seen: list[torch.Tensor] = []
    codec.encode(text_batch(2, 12))
    assert torch.equal(seen[0], codec.mask_embedding.expand_as(seen[0]))


def test_partial_patches_are_refused_with_the_remedy():
    """A silent cut would lose up to K - 1 tokens of every text."""
    with pytest.raises(ValueError, match=r"10 tokens are no multiple of `patch_size` \(4\).*Pad"):
        tiny_autoencoder().encode(text_batch(1, 10))


@pytest.mark.parametrize(
    "field, value",
    [("patch_size", 0), ("latent_size", -1), ("token_dropout", 1.0), ("latent_dropout", -0.1), ("kl_weight", -1.0)],
)
def test_impossible_sizes_are_refused_by_name_and_value(field, value):
    """A latent of size 0 or a dropout of 1 would train for hours and learn nothing."""
    with pytest.raises(Exception, match=f"{field}.*{value}|{value}.*{field}"):
        LatentForgeAutoencoderConfig(**{field: value})


def test_save_and_load_keeps_every_output(tmp_path):
    """The tied output matrix is left out of the file: a lost tie loads as noise."""
    codec = tiny_autoencoder()
    with torch.no_grad():
        for parameter in codec.parameters():  # trained weights: none stands where initialisation would put it
            parameter.add_(0.1 * torch.randn_like(parameter))
    codec.save_pretrained(tmp_path)
    loaded = LatentForgeAutoencoder.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight
    ids = text_batch(2, 12)
    torch.testing.assert_close(loaded(ids).logits, codec(ids).logits, rtol=0, atol=0)
