import json

import pytest
import torch

from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import ragged_rows, tiny_args, train_log
from trainers import AEConfig, AETrainer, PatchCollator
from trainers.evaluation import reconstruction_accuracy


QUIET = {"token_dropout": 0.0, "latent_dropout": 0.0}


def deterministic_codec(**kwargs):
    """Without the noise of the posterior, so that losses can be compared between ways of batching."""
    model = tiny_autoencoder(**{**QUIET, **kwargs})
    with torch.no_grad():
        model.encoder.to_posterior.bias[16:] = -8.0
        model.encoder.to_posterior.weight[16:] = 0.0
    model.encoder.to_posterior.weight.register_hook(lambda grad: torch.cat([grad[:16], torch.zeros_like(grad[16:])]))
    return model


def trainer_of(model, tmp_path, rows=16, **kwargs):
    return AETrainer(
        model=model,
        args=tiny_args(AEConfig, tmp_path, **kwargs),
        train_dataset=ragged_rows(rows),
        eval_dataset=ragged_rows(7),
        data_collator=PatchCollator(4),
    )


def test_loss_parts_in_the_log_equal_a_computation_by_hand(tmp_path):
    """The log is what one decides by: a part that is averaged differently from the loss misleads."""
    torch.manual_seed(0)
    model = tiny_autoencoder(**QUIET)
    rows = ragged_rows(8)
    batch = PatchCollator(4)(rows)
    trainer = AETrainer(
        model=model,
        args=tiny_args(AEConfig, tmp_path, max_steps=1, per_device_train_batch_size=8, learning_rate=0.0),
        train_dataset=rows,
        data_collator=PatchCollator(4),
    )
    trainer.train()
    (entry,) = train_log(trainer)
    assert entry["loss"] == pytest.approx(entry["reconstruction"] + model.config.kl_weight * entry["kl"], rel=1e-5)
    model.train()
    # padding beside text is learnt too
    labels = torch.where(batch["attention_mask"] == 0, batch["input_ids"], batch["labels"])
    expected = model(**{**batch, "labels": labels}).loss_components
    # the KL has no noise; the reconstruction is drawn through the posterior
    assert entry["kl"] == pytest.approx(expected["kl"].item(), rel=1e-5)
    assert entry["reconstruction"] == pytest.approx(expected["reconstruction"].item(), rel=0.2)


def test_accumulation_equals_a_large_batch(tmp_path):
    """With ragged labels a mean of means weighs tokens by their neighbours; the run depends on how it was split."""
    logs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(3)
        trainer = trainer_of(
            deterministic_codec(),
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            learning_rate=1e-3,
        )
        trainer.train()
        logs.append(train_log(trainer))
    for large, small in zip(*logs, strict=True):
        for name in ("loss", "reconstruction", "kl", "grad_norm"):
            assert small[name] == pytest.approx(large[name], rel=2e-3), name


def test_parts_are_averaged_over_logging_steps(tmp_path):
    """`loss` is a mean over the steps since the last log; a part that shows only the last step jumps around it."""
    torch.manual_seed(3)
    every = trainer_of(deterministic_codec(), tmp_path, max_steps=4)
    every.train()
    torch.manual_seed(3)
    rare = trainer_of(deterministic_codec(), tmp_path, max_steps=4, logging_steps=4)
    rare.train()
    (entry,) = train_log(rare)
    for name in ("loss", "reconstruction", "kl"):
        mean = sum(step[name] for step in train_log(every)) / 4
        assert entry[name] == pytest.approx(mean, rel=1e-2), name


def test_evaluation_is_over_tokens_and_free_running(tmp_path):
    """A mean over batches weighs a short last batch like a full one; a teacher-forced accuracy hides what decoding
    would give."""
    model = tiny_autoencoder()
    trainer = trainer_of(model, tmp_path, eval_noise=[0.3, 2.0])
    metrics = trainer.evaluate()
    rows = ragged_rows(7)
    batch = PatchCollator(4)(rows)
    model.eval()
    with torch.no_grad():
        expected = model(**batch)
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
    assert metrics["eval_kl"] == pytest.approx(expected.loss_components["kl"].item(), rel=1e-5)
    assert metrics["eval_nll"] == pytest.approx(expected.loss_components["reconstruction"].item() / 4, rel=1e-5)
    by_hand = reconstruction_accuracy(model, rows)
    assert metrics["eval_token_accuracy"] == pytest.approx(by_hand["token_accuracy"])
    assert metrics["eval_patch_accuracy"] == pytest.approx(by_hand["patch_accuracy"])
    assert {"eval_token_accuracy_noise0.3", "eval_patch_accuracy_noise2"} <= set(metrics)
    assert metrics == {**trainer.evaluate(), **{k: v for k, v in metrics.items() if "per_second" in k or "time" in k}}


def test_evaluating_does_not_change_what_is_learnt(tmp_path):
    """Noise drawn by an evaluation would move the training's random state: two runs that differ in eval_steps would
    differ in weights."""
    weights = []
    for strategy in ("no", "steps"):
        torch.manual_seed(0)
        trainer = trainer_of(tiny_autoencoder(), tmp_path, eval_strategy=strategy, eval_steps=1)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("metric", ["nll", "token_accuracy"])
def test_best_checkpoint_is_kept_by_our_metrics(tmp_path, metric):
    """transformers takes `nll` for an accuracy, because its name does not end in loss, and would keep the worst
    model."""
    torch.manual_seed(0)
    trainer = trainer_of(
        tiny_autoencoder(),
        tmp_path,
        max_steps=6,
        # a rate that grows until the model breaks: the last step is not the best
        learning_rate=3.0,
        warmup_steps=6,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer.train()
    values = [entry[f"eval_{metric}"] for entry in trainer.state.log_history if f"eval_{metric}" in entry]
    best = max(values) if "accuracy" in metric else min(values)
    assert values[-1] != best, "the test needs a run whose last step is not its best"
    assert trainer.state.best_metric == pytest.approx(best)
    assert trainer.evaluate()[f"eval_{metric}"] == pytest.approx(best, rel=1e-5)
    state = json.loads((tmp_path / f"checkpoint-{trainer.state.best_global_step}" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(best)


def test_data_seed_is_always_set(tmp_path):
    """Without it the order of the data depends on the random state when the loader is built, and a resumed run sees
    other batches."""
    assert AEConfig(output_dir=str(tmp_path), seed=5).data_seed == 5
    assert AEConfig(output_dir=str(tmp_path), seed=5, data_seed=9).data_seed == 9


def test_rows_without_labels_are_refused(tmp_path):
    """The loss would silently be normalised by nothing."""
    rows = [{"input_ids": row["input_ids"]} for row in ragged_rows(4)]
    trainer = AETrainer(model=tiny_autoencoder(), args=tiny_args(AEConfig, tmp_path), train_dataset=rows)
    with pytest.raises(ValueError, match="no `labels`.*load_blocks"):
        trainer.train()


def test_negative_noise_level_is_refused(tmp_path):
    """A typo would otherwise be measured, with the sign lost."""
    with pytest.raises(ValueError, match="-0.3"):
        AEConfig(output_dir=str(tmp_path), eval_noise=[-0.3])


def test_trained_model_is_saved_without_the_trainers_cache_switch(tmp_path):
    """Trainer writes use_cache=False into the model's config: the saved model would generate without a cache."""
    trainer = trainer_of(tiny_autoencoder(), tmp_path)
    trainer.save_model()
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())


def test_padding_of_patches_that_hold_text_is_learnt_but_not_reported(tmp_path):
    """Padding had no labels: a codec that gave back 99.99 % of text wrote words into every half-full patch."""
    torch.manual_seed(0)
    rows = ragged_rows(24)
    assert any(0 in row["attention_mask"] for row in rows)
    codec = deterministic_codec(initializer_range=0.05)
    trainer = trainer_of(
        codec, tmp_path, rows=24, max_steps=200, learning_rate=3e-3, per_device_train_batch_size=8, logging_steps=200
    )
    trainer.train()
    batch = PatchCollator(4)(rows)
    given = codec.eval().decode(codec.encode(batch["input_ids"]).mean).argmax(-1).flatten(1)
    text = batch["attention_mask"] != 0
    pads = ~text & text.unflatten(1, (-1, 4)).any(-1).repeat_interleave(4, 1)
    assert pads.any() and (given == batch["input_ids"])[pads].float().mean() > 0.9
    asked = trainer.asked_labels(batch)
    assert torch.equal(asked[pads], batch["input_ids"][pads])
    assert (asked[~text & ~pads] == -100).all(), "patches of nothing are nobody's business"
