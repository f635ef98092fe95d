import pytest
import torch

from tests.conftest import HEAD_DECODER, PAD, text_batch, text_ids, tiny_autoencoder, tiny_student
from trainers.evaluation import count_reconstructed, reconstruction_accuracy
from trainers.evaluation import reconstruction as module
from trainers.evaluation.reconstruction import active_dimensions, cycle_error, student_latents


@pytest.fixture(scope="module")
def trained():
    """A codec that has learnt 32 patches, with some mistakes left."""
    torch.manual_seed(0)
    model = tiny_autoencoder(token_dropout=0.0, latent_dropout=0.0, kl_weight=0.0, initializer_range=0.1)
    ids = text_batch(2, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model, ids


def test_accuracy_equals_a_count_by_hand(trained):
    """Every claim about a codec is this number."""
    model, ids = trained
    decoded = model.decode(model.encode(ids).mean).argmax(-1).flatten(1)
    result = reconstruction_accuracy(model, [{"input_ids": row} for row in ids.tolist()])
    assert 0.2 < result["token_accuracy"] <= 1
    assert result["token_accuracy"] == pytest.approx((decoded == ids).float().mean().item())
    whole = (decoded == ids).unflatten(1, (-1, 4)).all(-1)
    assert result["patch_accuracy"] == pytest.approx(whole.float().mean().item())
    assert (result["num_tokens"], result["num_patches"]) == (128, 32)


def test_chunks_change_nothing(trained, monkeypatch):
    """(tokens, vocabulary) logits of a 128k vocabulary do not fit; a wrong seam would miscount silently."""
    model, ids = trained
    whole = count_reconstructed(model, ids)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * 4 * 258)
    assert count_reconstructed(model, ids) == whole


def test_padding_does_not_count_and_partial_patches_do(trained):
    """Pads are easy: counted, they raise the figure; patches at the edge are hard: left out, they raise it too."""
    model, _ = trained
    ids = text_ids(16).tolist()
    row = {
        "input_ids": [PAD] * 6 + ids[:10],
        "attention_mask": [0] * 6 + [1] * 10,
        "labels": [-100] * 7 + ids[1:10],
    }
    result = reconstruction_accuracy(model, [row])
    assert (result["num_tokens"], result["num_patches"]) == (9, 3)


def test_row_that_is_no_multiple_of_the_patch_size_is_measured_to_its_end(trained):
    """Dropping the rest would leave the ends of all texts unmeasured."""
    model, _ = trained
    result = reconstruction_accuracy(model, [text_ids(10).tolist(), text_ids(8).tolist()])
    assert (result["num_tokens"], result["num_patches"]) == (18, 5)


def test_noise_is_seeded_and_hurts(trained):
    """A figure at sigma that nobody can repeat is none."""
    model, ids = trained
    clean, noisy, again = (reconstruction_accuracy(model, ids, sigma=sigma, seed=1) for sigma in (0.0, 5.0, 5.0))
    assert noisy == again and noisy["token_accuracy"] < clean["token_accuracy"]


def test_model_keeps_its_mode_and_training_mode_is_refused(trained):
    """With dropout on, the figure is about dropout."""
    model, ids = trained
    model.train()
    with pytest.raises(ValueError, match="model.eval"):
        count_reconstructed(model, ids)
    reconstruction_accuracy(model, ids)
    assert model.training
    model.eval()


def test_empty_data_is_refused(trained):
    """A NaN accuracy compares as false with every target."""
    with pytest.raises(ValueError, match="No token to reconstruct"):
        reconstruction_accuracy(trained[0], [])


def test_a_dimension_that_never_moves_is_not_active(trained):
    """Collapsed dimensions are paid for by the student, who must predict them."""
    model, ids = trained
    assert active_dimensions(model, ids)["active"] == active_dimensions(model, ids)["dimensions"] == 16
    layer = model.encoder.to_posterior
    weight, bias = layer.weight.data.clone(), layer.bias.data.clone()
    layer.weight.data[:3], layer.bias.data[:3] = 0, 1
    assert active_dimensions(model, ids)["active"] == 13
    layer.weight.data, layer.bias.data = weight, bias


def test_latents_of_text_come_back_and_others_do_not(trained):
    """A student whose latents lie off the codec's writes patches that no text has; no other figure says so."""
    model, ids = trained
    means = model.encode(ids).mean.flatten(0, 1).detach()
    right = (model.decode(means).argmax(-1) == ids.view(-1, 4)).all(1)
    assert right.any() and cycle_error(model, means[right])["error"] < 1e-5
    assert cycle_error(model, 3 * torch.randn(20, 16))["relative"] > 0.2


@pytest.mark.parametrize(("head", "decoder"), HEAD_DECODER)
def test_a_student_s_latents_are_given_the_text_before_their_patch(head, decoder):
    """A latent that has seen its own patch is the codec's, and says nothing about the student."""
    student, ids = tiny_student(head, decoder), text_batch(2, 16)
    changed = ids.clone()
    changed[:, 8:] = 0
    torch.manual_seed(1)
    latents = student_latents(student, ids).view(2, 3, -1)
    torch.manual_seed(1)
    others = student_latents(student, changed).view(2, 3, -1)
    assert torch.equal(latents[:, :2], others[:, :2]) and not torch.equal(latents[:, 2], others[:, 2])
