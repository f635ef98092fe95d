import pytest
import torch

from tests.conftest import PAD, text_batch, text_ids, tiny_autoencoder
from trainers.evaluation import count_reconstructed, reconstruction_accuracy
from trainers.evaluation import reconstruction as module


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
