"""Run by test_resume.py with one thread: train, be killed between two steps, resume, and compare with a run that was
not.

python -m tests.trainers.resume_run FOLDER codec student
"""

import os
import signal
import sys

import torch
from transformers import TrainerCallback

from tests.conftest import tiny_autoencoder, tiny_student
from tests.trainers.training_helpers import ragged_rows, tiny_args, tiny_teacher, train_log
from trainers import AEConfig, AETrainer, KDConfig, KDTrainer, PatchCollator
from trainers.teachers import HFTeacher


KILL_AFTER, SAVE_EVERY, STEPS = 5, 2, 9


class KillAfter(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def trainer_of(kind, folder, callbacks=None):
    """Everything that draws random numbers: dropout, posterior and energy noise, shuffling over two epochs,
    evaluation."""
    torch.manual_seed(0)
    common = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_EVERY,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }
    data = {"train_dataset": ragged_rows(25), "eval_dataset": ragged_rows(5), "data_collator": PatchCollator(4)}
    if kind == "codec":
        args = tiny_args(AEConfig, folder, **common)
        return AETrainer(model=tiny_autoencoder(), args=args, callbacks=callbacks, **data)
    args = tiny_args(KDConfig, folder, **common, mse_weight=0.1)
    model = tiny_student("energy")
    return KDTrainer(model=model, args=args, teacher=HFTeacher(tiny_teacher()), callbacks=callbacks, **data)


def be_killed(kind: str, folder: str) -> int:
    """Train in a process of its own until it is killed; returns the signal that ended it."""
    # a fork has imported torch and transformers already, which is most of the time that this takes
    process = os.fork()
    if process == 0:
        trainer_of(kind, folder, [KillAfter()]).train()
        os._exit(0)
    return -os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(folder: str, *kinds: str) -> None:
    for kind in kinds:
        run = os.path.join(folder, kind)
        ended_by = be_killed(kind, run)
        assert ended_by == signal.SIGKILL, f"the {kind} run was to be killed, it ended with {ended_by}"
        assert sorted(os.listdir(run)) == ["checkpoint-2", "checkpoint-4"]
        # random state of another process, as a restarted program has it
        resumed = trainer_of(kind, run)
        torch.manual_seed(12345)
        resumed.train(resume_from_checkpoint=True)
        whole = trainer_of(kind, run + "-whole")
        whole.train()
        assert resumed.state.global_step == whole.state.global_step == STEPS
        for (name, ours), (_, theirs) in zip(
            resumed.model.state_dict().items(), whole.model.state_dict().items(), strict=True
        ):
            assert torch.equal(ours, theirs), f"{kind}: {name} differs by {(ours - theirs).abs().max()}"
        assert [without_times(e) for e in train_log(resumed)] == [without_times(e) for e in train_log(whole)]
        sys.stdout.write(f"{kind}: bit-equal\n")


def without_times(entry: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}


if __name__ == "__main__":
    main(*sys.argv[1:])
