"""KDTrainer with a teacher whose answers take time, or do not come."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.conftest import VOCAB, tiny_student
from tests.trainers.test_kd_trainer import trainer_of, weights_of
from tests.trainers.training_helpers import byte_tokenizer, ragged_rows, tiny_args, tiny_teacher, train_log
from trainers import KDConfig, KDTrainer, PatchCollator
from trainers.evaluation.loopback_servers import FakeVLLM
from trainers.teachers import (
    CachedTeacher,
    FlowConfig,
    SparseSignal,
    SQLiteStore,
    TeacherCapabilities,
    TeacherIdentity,
    TeacherUnavailable,
    VLLMServerTeacher,
)


IDENTITY = TeacherIdentity("teacher", "1", "float32", "0" * 64)


class RemoteTeacher:
    """A teacher over a wire: top 20, some seconds for each answer, away from one question to another."""

    vocab_size, num_tokens = VOCAB, VOCAB
    capabilities = TeacherCapabilities(form="sparse", any_temperature=False, remote=True, parallel_calls=8)

    def __init__(self, seconds=0.0, away=()):
        self.model, self.seconds, self.away = tiny_teacher(), seconds, away
        self.asked = self.closed = 0
        self.running = self.most = 0
        self.lock = threading.Lock()

    def signal(self, input_ids, attention_mask=None):
        with self.lock:
            self.asked += 1
            number = self.asked
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            if number in self.away:
                raise TeacherUnavailable("http://teacher gave no answer for 600 s.")
            time.sleep(self.seconds)
            with self.lock, torch.no_grad():
                values, ids = self.model(input_ids, attention_mask=attention_mask).logits.log_softmax(-1).topk(20)
            return SparseSignal(ids, values, vocab_size=VOCAB)
        finally:
            with self.lock:
                self.running -= 1

    def check(self):
        pass

    def close(self):
        self.closed += 1


def test_a_teacher_that_stays_away_ends_training_after_a_checkpoint(tmp_path):
    """An hour since the last checkpoint is an hour lost; going on without a word is worse."""

    def trainer_in(folder, teacher, **kwargs):
        torch.manual_seed(0)
        return trainer_of(
            tiny_student("energy"),
            tmp_path / folder,
            teacher=teacher,
            max_steps=6,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            **kwargs,
        )

    away = RemoteTeacher(away=range(7, 99))  # step 4, of two batches each
    # without prefetching questions are counted in the order of the batches
    trainer = trainer_in("broken", away, teacher_prefetch=0)
    with pytest.raises(TeacherUnavailable, match="no answer.*after step 3, which is kept in checkpoint-3"):
        trainer.train()
    assert away.closed == 1
    results = []
    for folder, resume in (("whole", None), ("broken", str(tmp_path / "broken" / "checkpoint-3"))):
        trainer = trainer_in(folder, RemoteTeacher())
        trainer.train(resume_from_checkpoint=resume)
        results.append(weights_of(trainer.model))
    # a run that never stopped: same batches, same noise
    assert torch.equal(*results)


def test_a_refusal_in_the_middle_ends_training_after_a_checkpoint_too(tmp_path):
    """A key that is revoked, or a server that came back with another model, would cost every step since the last
    save."""

    class Revoked(RemoteTeacher):
        def signal(self, input_ids, attention_mask=None):
            if self.asked >= 3:
                raise ValueError("http://teacher answers 401: Unauthorized.")
            return super().signal(input_ids, attention_mask)

    options = {"max_steps": 6, "teacher_prefetch": 0, "save_strategy": "steps", "save_steps": 1000}
    trainer = trainer_of(tiny_student(), tmp_path, teacher=Revoked(), **options)
    with pytest.raises(
        ValueError, match=r"401: Unauthorized. Training stopped after step 3, .* in checkpoint-3: go on"
    ):
        trainer.train()
    assert (tmp_path / "checkpoint-3" / "trainer_state.json").exists()


def test_all_processes_write_the_last_checkpoint_before_any_of_them_ends(tmp_path):
    """A launcher ends all with the first that fails: a large model's weights were half written, and the message said
    that they are kept. One that came late found the folder there, and did not write its random state."""
    trainer = trainer_of(tiny_student(), tmp_path, teacher=RemoteTeacher(away=range(3, 99)), teacher_prefetch=0)
    folder, waits = tmp_path / "checkpoint-2", []

    def wait_for_everyone():
        waits.append(sorted(path.name for path in folder.glob("rng_state*")))
        folder.mkdir(exist_ok=True)  # what another process does meanwhile

    trainer.accelerator.wait_for_everyone = wait_for_everyone
    with pytest.raises(TeacherUnavailable, match="kept in checkpoint-2"):
        trainer.train()
    written = ["rng_state.pth"]
    # late ones come, the save begins, all have written, it has its name, all may end
    assert waits == [[], [], [], written, written]


@pytest.mark.parametrize("error", [TeacherUnavailable("no answer"), ValueError("answers 401")])
def test_an_evaluation_that_the_teacher_leaves_costs_no_step(tmp_path, error):
    """After the training, or on a refusal, nothing was kept: an evaluation cost all that was learned."""

    class Leaves(RemoteTeacher):
        def signal(self, input_ids, attention_mask=None):
            if self.asked >= 2:
                raise error
            return super().signal(input_ids, attention_mask)

    trainer = trainer_of(tiny_student(), tmp_path, teacher=Leaves(), max_steps=2, teacher_prefetch=0)
    trainer.teacher_callback.close_after_training = False
    trainer.train()
    with pytest.raises(type(error), match="stopped after step 2, which is kept in checkpoint-2"):
        trainer.evaluate()
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()


def test_before_the_first_step_there_is_nothing_to_keep(tmp_path):
    """A checkpoint of untrained weights would be resumed from."""
    trainer = trainer_of(tiny_student(), tmp_path, teacher=RemoteTeacher(away=range(1, 99)))
    with pytest.raises(TeacherUnavailable):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_training_may_go_on_without_and_says_for_how_much(tmp_path):
    """By option, and never in silence."""
    teacher = RemoteTeacher(away=(2, 3))
    trainer = trainer_of(
        tiny_student(), tmp_path, teacher=teacher, max_steps=4, teacher_away="continue", teacher_prefetch=0
    )
    trainer.train()
    log = train_log(trainer)
    assert [entry["kd_coverage"] > 0.9 for entry in log] == [True, False, False, True]
    assert [entry["kd"] == 0 for entry in log] == [False, True, True, False]
    for entry in log:
        assert entry["loss"] == pytest.approx(entry["ce"] + entry["kd"], rel=1e-4)


def test_evaluation_leaves_out_what_the_teacher_did_not_judge(tmp_path):
    """Counted as 0, a dead teacher would look like a perfect student."""
    model = tiny_student()
    full = trainer_of(model, tmp_path, teacher=RemoteTeacher(), teacher_away="continue")
    first = full.evaluate(ragged_rows(7)[:4])
    half = trainer_of(model, tmp_path, teacher=RemoteTeacher(away=(2,)), teacher_away="continue").evaluate()
    assert full.evaluate()["eval_nll"] == half["eval_nll"] and 0 < half["eval_kd_coverage"] < 1
    assert half["eval_kd"] == pytest.approx(first["eval_kd"], rel=1e-4)
    assert half["eval_loss"] == pytest.approx(half["eval_nll"] + half["eval_kd"], rel=1e-5)


def test_an_evaluation_without_any_answer_has_no_distillation_figure(tmp_path):
    """NaN is no JSON: eval_results.json could be read by nothing but Python."""
    trainer = trainer_of(tiny_student(), tmp_path, teacher=RemoteTeacher(away=range(99)), teacher_away="continue")
    metrics = trainer.evaluate()
    assert metrics["eval_kd_coverage"] == 0 and metrics["eval_nll"] > 0
    assert not {"eval_kd", "eval_loss"} & set(metrics)


@pytest.mark.parametrize(
    "chooses",
    [{"save_strategy": "best", "metric_for_best_model": "loss"}, {"lr_scheduler_type": "reduce_lr_on_plateau"}],
)
def test_an_evaluation_without_any_answer_is_never_the_best(tmp_path, chooses):
    """Who chooses by the loss ended with a KeyError in the middle of a training that was to go on."""
    trainer = trainer_of(
        tiny_student(),
        tmp_path,
        teacher=RemoteTeacher(away=range(2, 99)),
        teacher_away="continue",
        teacher_prefetch=0,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        **chooses,
    )
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.state.best_model_checkpoint is None
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and all(map(math.isnan, losses))


def test_going_on_without_needs_something_else_to_learn(tmp_path):
    """With kd alone each such step would be a step of weight decay."""
    with pytest.raises(ValueError, match="nothing would be learned without the teacher"):
        trainer_of(tiny_student(), tmp_path, teacher=RemoteTeacher(), ce_weight=0.0, teacher_away="continue")
    with pytest.raises(ValueError, match="teacher_away must be"):
        KDConfig(output_dir=str(tmp_path), teacher_away="wait")


def test_batches_are_asked_about_together(tmp_path):
    """One after the other, a teacher of latency L costs L a batch, however long the trainer works."""
    teacher = RemoteTeacher(seconds=0.1)
    before = set(threading.enumerate())
    trainer_of(tiny_student(), tmp_path, rows=64, teacher=teacher, max_steps=8).train()
    assert 3 <= teacher.most <= 5
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("teacher")]


def test_a_store_around_a_remote_teacher_keeps_its_threads_and_asks_once(tmp_path):
    """One question at a time would make the first epoch as slow as a server is far away; two threads that meet the
    same text would pay for it twice."""
    teacher = RemoteTeacher(seconds=0.2)
    cached = CachedTeacher(teacher, SQLiteStore(tmp_path / "kd.sqlite"), k=20, identity=IDENTITY)
    assert cached.capabilities.parallel_calls == 8
    texts = [torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(n % 4)) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        signals = list(pool.map(cached.signal, texts))
    assert teacher.asked == 4 and 2 <= teacher.most <= 4
    assert (cached.statistics.asked, cached.statistics.found) == (8, 8)
    for first, second in zip(signals[:4], signals[4:], strict=True):
        assert torch.equal(first.top_logprobs, second.top_logprobs)
    away = CachedTeacher(RemoteTeacher(away=[1]), SQLiteStore(tmp_path / "other.sqlite"), k=20, identity=IDENTITY)
    with pytest.raises(TeacherUnavailable):
        away.signal(texts[0])
    assert away.signal(texts[0]).top_ids.shape == (2, 9, 20)  # what failed is nobody's any more


def test_a_hanging_server_does_not_hold_up_the_end(tmp_path):
    """Whoever presses Ctrl-C does not wait for ten minutes of patience."""
    pytest.importorskip("openai")
    tokenizer = byte_tokenizer()
    with FakeVLLM(tiny_teacher(), tokenizer) as server:
        teacher = VLLMServerTeacher(server.url, tokenizer, config=FlowConfig(deadline=60, patience=600))
        trainer = KDTrainer(
            model=tiny_student(),
            args=tiny_args(KDConfig, tmp_path, max_steps=4, teacher_prefetch=2),
            teacher=teacher,
            train_dataset=ragged_rows(16),
            data_collator=PatchCollator(4),
        )
        step = trainer.training_step

        def interrupted(*args, **kwargs):
            if trainer.state.global_step == 1:
                raise KeyboardInterrupt
            while not all(future.done() for future in trainer.teacher_callback._pending):
                time.sleep(0.01)
            server.fault = lambda number: "hang"
            return step(*args, **kwargs)

        trainer.training_step = interrupted
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        assert time.monotonic() - start < 25
