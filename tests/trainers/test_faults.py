"""What a training does when a step is no number, a disk is full, or a checkpoint is half there."""

import json
import os
import resource
import shutil

import pytest
import torch
from safetensors import safe_open
from transformers import TrainerCallback

from tests.conftest import tiny_autoencoder, tiny_student
from tests.trainers.training_helpers import byte_tokenizer, ragged_rows, tiny_args, tiny_teacher, train_log
from trainers import AEConfig, AETrainer, KDConfig, KDTrainer, PatchCollator
from trainers.checkpoints import SAVING, SUMS, check_checkpoint, last_checkpoint, recover, rotate
from trainers.token_lm import TokenLMConfig, TokenLMTrainer


STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
DATA = {"train_dataset": ragged_rows(25), "eval_dataset": ragged_rows(5), "data_collator": PatchCollator(4)}


def codec_trainer(folder, callbacks=None, **kwargs):
    torch.manual_seed(0)
    return AETrainer(
        tiny_autoencoder(), tiny_args(AEConfig, folder, **{**STEPS, **kwargs}), callbacks=callbacks, **DATA
    )


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


class Spoil(TrainerCallback):
    """Makes the loss, or only the gradient, of some micro-batches of a step infinite or NaN."""

    def __init__(self, *steps, what="loss", every_batch=False):
        self.steps, self.what, self.every_batch = steps, what, every_batch
        self.seen = {}

    def on_inputs(self, args, state, control, model, **kwargs):
        step = state.global_step + 1
        self.seen[step] = self.seen.get(step, 0) + 1
        spoils = step in self.steps and model.training and (self.seen[step] == 2 or self.every_batch)
        if not spoils:
            return
        if self.what == "loss":
            handle = model.register_forward_hook(lambda *given: self._no_number(given[2], handle))
        else:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float("inf"))[1])

    def _no_number(self, output, handle):
        handle.remove()
        output["loss"] = output["loss"] * float("nan")
        return output


# -- steps that are no numbers


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_no_number_stops_training_and_keeps_its_batch(tmp_path, what):
    """One NaN in a gradient makes every weight NaN, and transformers logs the mean of the steps before instead."""
    options = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    trainer = codec_trainer(tmp_path, [Spoil(4, what=what)], **options)
    with pytest.raises(ValueError, match="Step 4 is not finite") as error:
        trainer.train()
    # `push_to_hub` leaves out what begins with `_`: a batch of somebody's text is for nobody else
    kept = tmp_path / "_nonfinite-step-4-process-0.safetensors"
    assert str(kept) in str(error.value) and "--nonfinite_loss skip" in str(error.value)
    with safe_open(kept, "pt") as file:
        assert {"0.input_ids", "0.labels", "1.input_ids", "1.attention_mask"} <= set(file.keys())
        assert file.get_tensor("0.input_ids").shape == (2, 16)
        assert ("nan" in file.metadata()["losses"]) == (what == "loss")
    whole = codec_trainer(tmp_path / "whole", **options, max_steps=3)
    whole.train()
    assert same(weights(trainer), weights(whole)), "the weights are those of step 3"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_left_out_changes_no_weight_and_is_counted(tmp_path, what):
    """Zero gradients are no skipped step: momentum and weight decay go on; and a mean with a NaN in it is NaN."""
    before = {}

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            before[state.global_step] = {name: value.clone() for name, value in model.state_dict().items()}

    callbacks = [Spoil(3, what=what), Watch()]
    options = {"gradient_accumulation_steps": 2, "nonfinite_loss": "skip", "logging_steps": 3, "weight_decay": 0.1}
    trainer = codec_trainer(tmp_path, callbacks, **options)
    trainer.train()
    assert same(before[2], before[3]) and not same(before[3], before[4])
    first, second = train_log(trainer)
    assert first["skipped_steps"] == 1 and "skipped_steps" not in second
    # the first two steps are those of a run without the third
    plain = codec_trainer(tmp_path / "plain", **{**options, "logging_steps": 2})
    plain.train()
    expected = train_log(plain)[0]
    for name in ("loss", *AETrainer.part_names):
        if name in expected:
            assert first[name] == pytest.approx(expected[name], rel=1e-5), name


def test_a_run_whose_every_step_is_left_out_stops(tmp_path):
    """Days of steps that teach nothing would end with status 0."""
    spoil = Spoil(*range(1, 100), every_batch=True)
    trainer = codec_trainer(tmp_path, [spoil], max_steps=60, nonfinite_loss="skip", save_strategy="no")
    with pytest.raises(ValueError, match="20 steps before it were left out"):
        trainer.train()
    assert trainer.state.global_step == 20
    assert all(entry["loss"] != entry["loss"] for entry in train_log(trainer)), "no 0 that nobody measured"


def test_every_trainer_looks_at_its_loss(tmp_path):
    """A guard of the codec's trainer alone leaves students, wires and token models unguarded."""
    from trainers import IdeaTrainer, WireTrainer
    from trainers.safe_trainer import SafeTrainer

    for kind in (AETrainer, KDTrainer, WireTrainer, IdeaTrainer, TokenLMTrainer):
        assert issubclass(kind, SafeTrainer) and kind.training_step is SafeTrainer.training_step
    model = tiny_teacher().train()
    model.lm_head.weight.data[5] = float("inf")
    args = tiny_args(TokenLMConfig, tmp_path, max_steps=2)
    trainer = TokenLMTrainer(model, args, processing_class=byte_tokenizer(), **DATA)
    with pytest.raises(ValueError, match="Step 1 is not finite"):
        trainer.train()


def test_an_unknown_word_for_it_is_refused(tmp_path):
    """`ignore` read as anything but `stop` would train on NaN."""
    with pytest.raises(ValueError, match="nonfinite_loss must be `stop` or `skip`, got 'ignore'"):
        tiny_args(AEConfig, tmp_path, nonfinite_loss="ignore")


# -- disks


class FullDisk(TrainerCallback):
    """No file may grow beyond `most` bytes once a step is reached, and a writer meets it in the middle of its file."""

    def __init__(self, step, most):
        self.step, self.most = step, most

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.most, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    @staticmethod
    def end():
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.mark.parametrize(
    ("most", "file"),
    [
        (20_000, "weights"),
        pytest.param(130_000, "optimizer", marks=pytest.mark.slow),
        pytest.param(1_000, "config", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_full_in_the_middle_of_a_save_leaves_the_earlier_checkpoint(tmp_path, most, file):
    """A checkpoint cut in the middle that has the newest name is the one that everybody resumes from."""
    full = FullDisk(4, most)
    trainer = codec_trainer(tmp_path, [full], save_total_limit=1)
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written") as error:
            trainer.train()
    finally:
        full.end()
    assert "checkpoint-2 before it is whole" in str(error.value) and "MiB are free" in str(error.value)
    assert sorted(path.name for path in tmp_path.glob("*point-*")) == ["checkpoint-2"]
    assert not list((tmp_path / SAVING).glob("*"))
    again = codec_trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    whole = codec_trainer(tmp_path / "whole")
    whole.train()
    assert same(weights(again), weights(whole))


def test_a_disk_that_is_full_for_the_last_model_says_so(tmp_path):
    """safetensors and torch have words of their own for it, which a script takes for a fault of this code."""
    trainer = codec_trainer(tmp_path, max_steps=2)
    trainer.train()
    try:
        FullDisk(2, 20_000).on_step_end(trainer.args, trainer.state, trainer.control)
        with pytest.raises(OSError, match="The model could not be written.*checkpoint-2 before it is whole"):
            trainer.save_model()
    finally:
        FullDisk.end()


def test_a_fault_of_ours_in_a_save_is_not_called_a_full_disk(tmp_path, monkeypatch):
    """Who is told to make room looks for the fault in the wrong place."""

    def faulty(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr("trainers.safe_trainer.seal", faulty)
    with pytest.raises(RuntimeError, match="a bug"):
        codec_trainer(tmp_path).train()
    assert last_checkpoint(tmp_path) is None


# -- which checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """checkpoint-2, -4 and -6 of a codec."""
    folder = tmp_path_factory.mktemp("run")
    codec_trainer(folder).train()
    return folder


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def test_whole_checkpoints_are_sealed_and_nothing_else_is_left(run):
    """A file that no sum covers can change unseen."""
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    listed = (run / "checkpoint-6" / SUMS).read_text().splitlines()
    assert {line.split("  ")[1] for line in listed[:-1]} == {
        path.name for path in (run / "checkpoint-6").iterdir() if path.name != SUMS
    }
    check_checkpoint(run / "checkpoint-6")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json", "config.json", SUMS])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_a_checkpoint_with_a_damaged_file_is_passed_over(copy, name, damage):
    """A bit that turned in the weights loads, and trains on."""
    path = copy / "checkpoint-6" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    if damage == "gone" and name == SUMS:  # of a version that wrote none
        assert last_checkpoint(copy) == str(copy / "checkpoint-6")
        return
    assert last_checkpoint(copy) == str(copy / "checkpoint-4")
    with pytest.raises(ValueError, match="checkpoint-6"):
        codec_trainer(copy).train(resume_from_checkpoint=str(copy / "checkpoint-6"))


def test_a_checkpoint_without_sums_needs_its_last_file(copy):
    """Half of one that an older version was writing when it died."""
    (copy / "checkpoint-6" / SUMS).unlink()
    (copy / "checkpoint-6" / "trainer_state.json").write_text('{"epoch": 1')
    assert last_checkpoint(copy) == str(copy / "checkpoint-4")


def test_without_a_whole_checkpoint_resuming_is_an_error(tmp_path):
    """Starting anew without a word would overwrite what could still be looked at."""
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="no whole checkpoint"):
        codec_trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="There is no checkpoint"):
        codec_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))


def test_processes_that_find_different_checkpoints_are_told(tmp_path, monkeypatch):
    """Where machines share no folder, some begin anew and some go on: they train apart, and hang at the end."""
    codec_trainer(tmp_path, max_steps=2).train()
    trainer = codec_trainer(tmp_path)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    monkeypatch.setattr("trainers.safe_trainer.gather_object", lambda found: [*found, None])
    with pytest.raises(ValueError, match="process 0: checkpoint-2, process 1: none.*all machines share"):
        trainer.train(resume_from_checkpoint=True)
    trainer.args.output_dir = str(tmp_path / "empty")
    with pytest.raises(ValueError, match="no whole checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_the_one_that_replaces_another_is_found_before_it_has_its_name(copy):
    """Dying between two renames must not leave none."""
    (copy / SAVING).mkdir()
    (copy / "checkpoint-6").rename(copy / SAVING / "checkpoint-6")
    assert last_checkpoint(copy) == str(copy / SAVING / "checkpoint-6")
    (copy / SAVING / "checkpoint-6" / SUMS).unlink()  # it was not finished
    assert last_checkpoint(copy) == str(copy / "checkpoint-4")


def test_one_that_was_sealed_gets_its_name_before_another_is_written(copy):
    """Among what is being written, transformers' own rotation removes it before the next one is whole."""
    for step in (4, 6):
        (copy / SAVING).mkdir(exist_ok=True)
        (copy / f"checkpoint-{step}").rename(copy / SAVING / f"checkpoint-{step}")
    (copy / SAVING / "checkpoint-4" / "config.json").write_text("half")
    recover(copy)
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    check_checkpoint(copy / "checkpoint-6")


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(1, None, [4]), (2, None, [2, 4]), (3, None, [2, 4, 8]), (1, 8, [4, 8]), (2, 2, [2, 4])],
)
def test_what_was_just_written_stays(tmp_path, limit, best, left):
    """A training that went back to an earlier step lost each checkpoint as it was written: a later one was newest."""
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, limit, best and str(tmp_path / f"checkpoint-{best}"), tmp_path / "checkpoint-4")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step}" for step in left]


def test_a_training_beside_a_damaged_checkpoint_keeps_its_own(tmp_path):
    """`auto` begins anew where the only checkpoint is damaged; all that is written then is of earlier steps."""
    codec_trainer(tmp_path, save_total_limit=1).train()
    (tmp_path / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    assert last_checkpoint(tmp_path) is None
    codec_trainer(tmp_path, save_total_limit=1, max_steps=4).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_older_checkpoints_go_only_when_the_new_one_is_there(tmp_path, monkeypatch):
    """With save_total_limit 1, removing first and dying next loses everything."""
    seen = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            seen.append(sorted(os.listdir(tmp_path)))

    from trainers import safe_trainer

    plain = safe_trainer.rotate

    def rotate(*given):
        seen.append(sorted(os.listdir(tmp_path)))
        plain(*given)

    monkeypatch.setattr(safe_trainer, "rotate", rotate)
    codec_trainer(tmp_path, [Look()], save_total_limit=1).train()
    assert seen == [
        ["checkpoint-2"],
        ["checkpoint-2"],
        ["checkpoint-2", "checkpoint-4"],
        ["checkpoint-4"],
        ["checkpoint-4", "checkpoint-6"],
        ["checkpoint-6"],
    ]


def test_one_that_is_half_removed_has_not_its_name(tmp_path, monkeypatch):
    """Where its sums went first, what is left of it reads as a checkpoint of an older version."""
    for step in (2, 4, 6):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / SUMS).touch()

    def die(folder, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path, 2, None, tmp_path / "checkpoint-6")
    assert sorted(path.name for path in tmp_path.iterdir()) == [SAVING, "checkpoint-4", "checkpoint-6"]


def test_the_best_checkpoint_has_its_lasting_name(tmp_path):
    """A best checkpoint that is remembered where it was written is gone when training ends."""
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = codec_trainer(tmp_path, metric_for_best_model="eval_loss", **options)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}") and os.path.isdir(best)
    for folder in tmp_path.glob("checkpoint-*"):
        check_checkpoint(folder)
        kept = json.loads((folder / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert kept is None or SAVING not in kept


def test_a_student_with_a_teacher_resumes_from_the_whole_one(tmp_path):
    """The trainer with the most parts beside the weights."""
    from trainers.teachers import HFTeacher

    def trainer():
        torch.manual_seed(0)
        args = tiny_args(KDConfig, tmp_path, **STEPS)
        return KDTrainer(tiny_student(), args, teacher=HFTeacher(tiny_teacher()), **DATA)

    first = trainer()
    first.train()
    (tmp_path / "checkpoint-6" / "optimizer.pt").write_bytes(b"half")
    again = trainer()
    again.train(resume_from_checkpoint=True)
    assert same(weights(first), weights(again))
