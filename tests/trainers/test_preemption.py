"""SIGUSR1: the running step, a checkpoint, an end that is gone on from."""

import os
import signal
import sys

import pytest
import torch
from transformers import TrainerCallback

from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import byte_tokenizer, ragged_rows, tiny_args, tiny_teacher
from trainers import AEConfig, AETrainer, DataArguments, PatchCollator, TokenLMConfig, TokenLMTrainer, load_blocks
from trainers.command_line import run
from trainers.preemption import TrainingStopped


class SignalAt(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGUSR1)


def trainer_of(folder, *callbacks, **kwargs):
    torch.manual_seed(0)
    args = tiny_args(AEConfig, folder, max_steps=6, per_device_train_batch_size=2, **kwargs)
    data = {"train_dataset": ragged_rows(12), "eval_dataset": ragged_rows(4), "data_collator": PatchCollator(4)}
    return AETrainer(tiny_autoencoder(), args, callbacks=list(callbacks), **data)


def test_a_training_that_is_stopped_and_gone_on_with_is_the_same(tmp_path):
    """A cluster that takes its machine back must cost neither steps nor another result."""
    before = signal.getsignal(signal.SIGUSR1)
    stopped = trainer_of(tmp_path / "run", SignalAt(2))
    with pytest.raises(TrainingStopped, match="checkpoint-3: go on with the same command") as caught:
        stopped.train()
    assert caught.value.checkpoint == str(tmp_path / "run" / "checkpoint-3")
    assert signal.getsignal(signal.SIGUSR1) == before
    args = tiny_args(AEConfig, tmp_path / "run", resume_from_checkpoint="auto")
    assert args.checkpoint() == caught.value.checkpoint
    resumed = trainer_of(tmp_path / "run")
    resumed.train(resume_from_checkpoint=args.checkpoint())
    whole = trainer_of(tmp_path / "whole")
    whole.train()
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class FirstIsBest(AETrainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_loss": float(self.state.global_step)}


@pytest.mark.parametrize(
    "kwargs", [{"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}, {"save_strategy": "best"}]
)
def test_what_a_stopped_training_goes_on_from_is_there_beside_the_best(tmp_path, kwargs):
    """With one to be kept transformers removed it at the end, with `best` it was never saved: steps were lost, or all
    of them learned again, though the message named it."""
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    trainer = trainer_of(tmp_path, SignalAt(3), **evaluates, load_best_model_at_end=True, **kwargs)
    trainer.__class__ = FirstIsBest
    with pytest.raises(TrainingStopped, match="checkpoint-4"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.args.save_total_limit == kwargs.get("save_total_limit")


def test_a_token_lm_too_goes_on_in_its_stream(tmp_path):
    """Teachers are trained longest; one that begins its text anew at every restart knows the beginning by heart."""
    (tmp_path / "text.txt").write_text("".join(f"{number} potatoes, " for number in range(400)))
    (tmp_path / "held_out.txt").write_text("held out")
    data = DataArguments(
        str(tmp_path / "text.txt"), eval_data=str(tmp_path / "held_out.txt"), block_size=16, streaming=True
    )

    def train(folder, *callbacks, **kwargs):
        stream, _ = load_blocks(data, byte_tokenizer(), 4, seed=0)
        args = tiny_args(TokenLMConfig, tmp_path / folder, max_steps=6, gradient_accumulation_steps=2)
        model = tiny_teacher().train()
        collator = PatchCollator(4)
        trainer = TokenLMTrainer(model, args, train_dataset=stream, data_collator=collator, callbacks=list(callbacks))
        trainer.train(**kwargs)
        return list(model.parameters())

    with pytest.raises(TrainingStopped, match="checkpoint-3"):
        train("run", SignalAt(2))
    resumed, whole = train("run", resume_from_checkpoint=True), train("whole")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, whole, strict=True))


def test_a_training_that_is_over_is_not_stopped(tmp_path):
    """It would go back into the queue to do nothing."""
    trainer = trainer_of(tmp_path, SignalAt(5))
    assert trainer.train().global_step == 6
    assert not any(tmp_path.glob("checkpoint-*"))


def test_auto_begins_anew_where_there_is_nothing(tmp_path):
    """The first start of a job has the flags of all later ones."""
    assert tiny_args(AEConfig, tmp_path / "none", resume_from_checkpoint="auto").checkpoint() is None


def test_a_script_that_is_stopped_ends_well(tmp_path, monkeypatch, capsys):
    """With another status the job counts as failed and is not put back."""
    ended = []

    def main():
        raise TrainingStopped("run/checkpoint-3", lambda: ended.append(True))

    monkeypatch.setattr(sys, "argv", ["train_student.py"])
    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 0 and ended and "checkpoint-3" in capsys.readouterr().err
