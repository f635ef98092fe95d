"""CALM's algorithm as written here at tiny size: the same loss, nothing seen from the future, kept trainings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from modeling_latentforge.modeling_latent_heads import energy_loss
from tests.conftest import VOCAB, tiny_autoencoder
from trainers.evaluation import calm_comparison, rows_evaluation
from trainers.evaluation.calm_comparison import CALM, CALM_CDIST, OURS, CalmStudent, Comparison, calm_energy_loss


def backbone() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )


def calm(**options: Any) -> CalmStudent:
    torch.manual_seed(0)
    return CalmStudent(tiny_autoencoder(patch_size=4), backbone(), **options)


def test_the_published_loss_is_ours_in_other_words():
    """A comparison of two losses would be none of two algorithms."""
    torch.manual_seed(0)
    samples, targets = torch.randn(8, 5, 6, requires_grad=True), torch.randn(100, 5, 6)
    theirs, ours = calm_energy_loss(samples, targets), energy_loss(samples, targets)
    torch.testing.assert_close(theirs, ours)
    gradients = [torch.autograd.grad(loss.sum(), samples, retain_graph=True)[0] for loss in (theirs, ours)]
    torch.testing.assert_close(*gradients)


def test_the_head_starts_at_zero_and_learns():
    """All samples coincide at the start, where a distance has no slope: NaN there would train nothing."""
    model = calm()
    ids = torch.randint(0, VOCAB - 4, (2, 16))
    condition = model.conditions(ids).flatten(0, 1)
    assert not model.sample(condition, 3).any()
    losses = []
    for _ in calm_comparison.optimise(model, lambda step: ids, 12, 5e-3):
        torch.manual_seed(1)
        losses.append(float(model.loss(ids).detach()))
    assert losses[-1] < losses[0] and all(torch.isfinite(p).all() for p in model.parameters())
    before = tiny_autoencoder(patch_size=4).state_dict()
    assert all(before[name].shape == value.shape for name, value in model.codec.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.codec.parameters())


def test_a_patch_is_drawn_from_the_text_before_it_only():
    """A rival that reads the patch that it predicts would be unbeatable."""
    model = calm().eval()
    torch.nn.init.normal_(model.to_latent.weight, std=1.0)
    ids = torch.randint(0, VOCAB - 4, (1, 16))
    changed = ids.clone()
    changed[0, 8:12] = (changed[0, 8:12] + 1) % (VOCAB - 4)  # patch 2
    with torch.no_grad():
        states, others = model.conditions(ids), model.conditions(changed)
    assert states.shape == (1, 3, 32)  # after patches 0, 1 and 2: of patches 1, 2 and 3
    assert torch.equal(states[:, :2], others[:, :2]) and not torch.allclose(states[:, 2], others[:, 2])
    drawn = model.draw(ids, 4)
    assert drawn.shape == (4, 1, 3, 4)


def tiny_comparison(folder: Path, **options: Any) -> Comparison:
    text = folder / "text.txt"
    if not text.exists():
        with open(torch.__file__) as source:  # real text
            text.write_text(source.read()[:30_000])
    fields = {"work_dir": folder / "work", "data": str(text), "eval_data": None, "vocab_size": 300, "phase_size": 1}
    sizes = {"num_tokens": 4096, "block_size": 64, "eval_tokens": 1024, "hidden_size": 64, "num_hidden_layers": 1}
    shape = {"codec_steps": 2, "tokens_per_step": 512}
    given = {"steps": 2, "rows": 2, "rates": (1e-3,), "draws": 2, "timed_steps": 1, **options}
    return Comparison({**fields, **sizes, **shape}, **given)


def test_both_are_trained_on_the_same_batches_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An hour that is lost with a broken connection, or two algorithms on two texts."""
    monkeypatch.setattr(calm_comparison, "training_memory", lambda comparison, name: len(name))
    comparison = tiny_comparison(tmp_path)
    for name in (OURS, CALM_CDIST):  # in this process
        comparison.trained(name, 1e-3)
    first = comparison.batches()
    assert torch.equal(first(1), tiny_comparison(tmp_path).batches()(1)) and not torch.equal(first(0), first(1))
    assert first(10**6).shape == (2, 64)  # text that is used up begins again
    found = calm_comparison.compare(comparison, lambda line: None)
    assert set(found["speed"]) == {OURS, CALM, CALM_CDIST} and len(found["brier"]) == 4
    assert all(entry["tokens_per_second"] > 0 and len(entry["runs"]) == 1 for entry in found["speed"].values())
    ours, theirs = (found["trained"][name]["weights"] for name in (OURS, CALM_CDIST))
    assert 0.5 < ours / theirs < 2
    monkeypatch.setattr(Comparison, "build", None)  # training again would need it
    monkeypatch.setattr(calm_comparison, "training_speed", lambda comparison, names: found["speed"])
    again = calm_comparison.compare(tiny_comparison(tmp_path), lambda line: None)
    assert again["brier"] == found["brier"] and again["places"] == found["places"]
    with pytest.raises(ValueError, match=r"`draws` \(3\) are scored in pairs"):
        tiny_comparison(tmp_path, draws=3)


def test_worse_than_noise_is_told_from_noise():
    """Four scores of which one is a little lower are no loss; four that are clearly lower are."""
    counts = torch.full((200,), 100)
    generator = torch.Generator().manual_seed(0)
    noise, other = (torch.randn(200, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    noise, other = noise - noise.mean(0), other - other.mean(0)
    theirs = {"sums": 10 + noise, "counts": counts}
    equal = {"sums": 9.99 + other, "counts": counts}
    worse = {"sums": 9 + noise, "counts": counts}
    assert all(entry["high"] > 0 > entry["low"] for entry in calm_comparison.brier_differences(equal, theirs))
    found = calm_comparison.brier_differences(worse, theirs)
    assert all(entry["high"] < 0 for entry in found)
    assert found[0]["ours"] == pytest.approx(found[0]["calm"] - 1)


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"speed": {OURS: 1299.0}}, False),
        ({"memory": {OURS: 1.1e9}}, False),
        ({"brier": [{"ours": 1.0, "calm": 2.0, "low": -1.5, "high": -0.1}]}, False),
    ],
)
def test_the_row_asks_for_quality_speed_and_memory(change: dict[str, Any], passed: bool):
    """Faster and worse is no result."""
    speed = {OURS: 1300.0, CALM: 1000.0, CALM_CDIST: 1200.0} | change.get("speed", {})
    found = {
        "brier": change.get("brier", [{"ours": 1.0, "calm": 1.1, "low": -0.5, "high": 0.1}]),
        "places": 15_000,
        "speed": {name: {"tokens_per_second": rate} for name, rate in speed.items()},
        "memory": {OURS: 1e9, CALM: 3e9, CALM_CDIST: 1.5e9} | change.get("memory", {}),
    }
    measured = rows_evaluation.judge_calm(found)
    assert measured.passed == passed and "15,000 places" in str(measured.figure)
    assert "as released" in str(measured.figure) and "with its distances by cdist" in str(measured.figure)
