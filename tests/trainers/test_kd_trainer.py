import threading
from functools import partial

import peft
import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import TINY, VOCAB, tiny_student
from tests.trainers.training_helpers import byte_tokenizer, ragged_rows, tiny_args, tiny_teacher, train_log
from trainers import KDConfig, KDTrainer, PatchCollator, TeacherCallback
from trainers.losses import dense_kl
from trainers.teachers import DenseSignal, HFTeacher, SparseSignal, TeacherCapabilities


class RecordingTeacher(HFTeacher):
    """A real teacher that remembers what was done to it."""

    def __init__(self, model, fail_after=None):
        super().__init__(model)
        self.checks = self.closes = self.asked = 0
        self.fail_after = fail_after
        self.threads = set()

    def check(self):
        self.checks += 1
        super().check()

    def signal(self, input_ids, attention_mask=None):
        # the lazy-projection probe of `check` does not count
        self.asked += 1
        self.threads.add(threading.get_ident())
        if self.fail_after is not None and self.asked > self.fail_after:
            raise ConnectionError("the endpoint went away")
        return super().signal(input_ids, attention_mask)

    def close(self):
        self.closes += 1
        super().close()


class TopTeacher:
    """What an endpoint gives: the twenty most likely ids at temperature 1."""

    vocab_size, num_tokens = VOCAB, VOCAB
    capabilities = TeacherCapabilities(form="sparse", any_temperature=False)

    def __init__(self, model):
        self.model = model

    def signal(self, input_ids, attention_mask=None):
        with torch.no_grad():
            values, ids = self.model(input_ids, attention_mask=attention_mask).logits.log_softmax(-1).topk(20)
        return SparseSignal(ids, values, vocab_size=VOCAB)

    def check(self):
        pass

    def close(self):
        self.model = None


def trainer_of(model, tmp_path, rows=16, teacher=None, callbacks=None, **kwargs):
    return KDTrainer(
        model=model,
        args=tiny_args(KDConfig, tmp_path, **kwargs),
        teacher=teacher,
        train_dataset=ragged_rows(rows),
        eval_dataset=ragged_rows(7),
        data_collator=PatchCollator(4),
        callbacks=callbacks,
    )


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_kd_loss_and_its_gradient_are_zero_when_the_teacher_is_the_student():
    """The whole path - positions, shift, grid, temperature - must line up: one place off and the student chases its
    own past."""
    student = tiny_student()
    student.train()
    batch = PatchCollator(4)(ragged_rows(6))
    with torch.no_grad():
        own = student(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    signal = DenseSignal.from_logits(own)
    output = student(
        **batch, loss_weights={"kd": 1.0}, distillation=partial(signal.loss, temperature=2.0), output_logits=False
    )
    output.loss.backward()
    assert abs(output.loss.item()) < 1e-6
    assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-6


def test_kd_part_equals_a_computation_by_hand(tmp_path):
    """Each token against the teacher's distribution at its own position, averaged over predicted tokens."""
    model, teacher = tiny_student(), tiny_teacher()
    rows = [row for row in ragged_rows(16) if 0 not in row["attention_mask"]][:4]
    batch = PatchCollator(4)(rows)
    model.eval()
    with torch.no_grad():
        student_logits = model(batch["input_ids"]).logits[:, :-1]
        teacher_logits = teacher(batch["input_ids"]).logits[:, :-1]
    predicted = batch["labels"][:, 1:] != -100
    kd = dense_kl(student_logits[predicted], teacher_logits[predicted], 2.0).mean().item()
    ce = torch.nn.functional.cross_entropy(student_logits[predicted], batch["labels"][:, 1:][predicted]).item()

    trainer = KDTrainer(
        model=model,
        args=tiny_args(KDConfig, tmp_path, max_steps=1, kd_weight=0.7, ce_weight=0.3, kd_temperature=2.0),
        teacher=HFTeacher(teacher),
        train_dataset=rows,
        data_collator=PatchCollator(4),
    )
    trainer.train()
    (entry,) = train_log(trainer)
    assert entry["kd"] == pytest.approx(kd, rel=1e-4)
    assert entry["ce"] == pytest.approx(ce, rel=1e-4)
    assert entry["loss"] == pytest.approx(0.7 * kd + 0.3 * ce, rel=1e-4)


def test_accumulation_equals_a_large_batch(tmp_path):
    """With ragged labels a mean of means weighs tokens by their neighbours, in every part of the loss."""
    logs, weights = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(3)
        trainer = trainer_of(
            tiny_student(),
            tmp_path,
            teacher=HFTeacher(tiny_teacher()),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            mse_weight=0.5,
            learning_rate=1e-3,
        )
        trainer.train()
        logs.append(train_log(trainer))
        weights.append(weights_of(trainer.model))
    for large, small in zip(*logs, strict=True):
        assert {"ce", "kd", "mse"} <= set(large)
        for name in ("loss", "ce", "kd", "mse", "grad_norm"):
            assert small[name] == pytest.approx(large[name], rel=1e-3), name
    torch.testing.assert_close(*weights, atol=1e-4, rtol=0)


def test_teacher_helps_the_student_towards_itself(tmp_path):
    """End to end: distilled alone, the student comes closer to its teacher on text it does not see."""
    trainer = trainer_of(
        tiny_student(num_decoder_layers=1),
        tmp_path,
        rows=64,
        teacher=HFTeacher(tiny_teacher(initializer_range=0.1)),
        ce_weight=0.0,
        max_steps=30,
        eval_strategy="steps",
        eval_steps=15,
        learning_rate=5e-3,
    )
    before = trainer_of(trainer.model, tmp_path, teacher=HFTeacher(tiny_teacher(initializer_range=0.1))).evaluate()
    trainer.train()
    after = [entry["eval_kd"] for entry in trainer.state.log_history if "eval_kd" in entry]
    assert after[-1] < 0.7 * before["eval_kd"]


def test_frozen_codec_is_unchanged_by_training(tmp_path):
    """The codec is the meaning of the latents: a drifting one is a different model behind the same name."""
    for kwargs in ({"decoder": "parallel"}, {"decoder": "parallel", "train_decoder": True}, {}):
        model = tiny_student(**kwargs)
        before = {name: tensor.clone() for name, tensor in model.autoencoder.state_dict().items()}
        rest = weights_of(model.model)
        trainer_of(model, tmp_path, mse_weight=1.0).train()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.autoencoder.state_dict().items())
        assert not torch.equal(weights_of(model.model), rest)


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
def test_energy_head_trains_by_default(tmp_path, decoder):
    """An energy head without its score is never trained; the default must not be the regression head's."""
    trainer = trainer_of(tiny_student("energy", decoder), tmp_path)
    trainer.train()
    entry = train_log(trainer)[-1]
    assert entry["loss"] == pytest.approx(entry["ce"] + entry["energy"], rel=1e-5)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_ce"] + metrics["eval_energy"], rel=1e-5)
    assert metrics["eval_energy"] == trainer.evaluate()["eval_energy"], "the noise of an evaluation is seeded"


@pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
def test_normaliser_counts_exactly_the_predicted_tokens(tmp_path, decoder):
    """A row that begins with padding has one predicted token less than it has labels: counted, it makes every NLL look
    better."""
    model = tiny_student(decoder=decoder)
    trainer = trainer_of(model, tmp_path, max_steps=1, per_device_train_batch_size=7, rows=7)
    trainer.train()
    batch = PatchCollator(4)(ragged_rows(7))
    predicted = 0
    for row, labels in zip(batch["attention_mask"], batch["labels"], strict=True):
        places = row.nonzero().flatten().tolist()[1:]  # all but the first token that is seen
        predicted += sum(labels[place].item() != -100 for place in places)
    labels = trainer.asked_labels(batch)
    assert trainer.count_items(labels) == predicted
    model.eval()
    assert trainer.evaluate()["eval_ce"] == pytest.approx(
        model(**{**batch, "labels": labels}, loss_weights={"ce": 1.0}).loss_components["ce"].item(), rel=1e-4
    )


def test_evaluation_equals_a_computation_by_hand(tmp_path):
    """nats per token, over tokens: means of batches differ, and gathered logits do not fit in memory."""
    model, teacher = tiny_student(), tiny_teacher()
    trainer = trainer_of(model, tmp_path, teacher=HFTeacher(teacher), ce_weight=0.0, mse_weight=0.5)
    metrics = trainer.evaluate()
    batch = PatchCollator(4)(ragged_rows(7))
    signal = HFTeacher(teacher).signal(batch["input_ids"], batch["attention_mask"])
    model.eval()
    with torch.no_grad():
        parts = model(
            **batch, loss_weights={"ce": 1.0, "kd": 1.0, "mse": 1.0}, distillation=signal.loss
        ).loss_components
    for name in ("ce", "kd", "mse"):
        assert metrics[f"eval_{name}"] == pytest.approx(parts[name].item(), rel=1e-4)
    assert metrics["eval_nll"] == metrics["eval_ce"]
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_kd"] + 0.5 * metrics["eval_mse"])


def test_teacher_is_checked_before_and_closed_after_training(tmp_path):
    """A teacher that cannot answer should cost seconds, not the hours until someone looks; one that lingers holds its
    memory."""
    teacher = RecordingTeacher(tiny_teacher())
    trainer = trainer_of(tiny_student(), tmp_path, teacher=teacher)
    assert (teacher.checks, teacher.closes) == (0, 0)
    trainer.train()
    assert (teacher.checks, teacher.closes) == (1, 1)
    metrics = trainer.evaluate()
    assert "eval_nll" in metrics and "eval_kd" not in metrics and "eval_loss" not in metrics
    with pytest.raises(RuntimeError, match="build a new teacher"):
        trainer.train()


@pytest.mark.parametrize("prefetch", [0, 1])
def test_teacher_is_closed_when_training_raises(tmp_path, prefetch):
    """A crashed notebook cell must not keep a server slot, or a GPU's memory, until the kernel is killed."""
    teacher = RecordingTeacher(tiny_teacher(), fail_after=3)
    trainer = trainer_of(tiny_student(), tmp_path, teacher=teacher, teacher_prefetch=prefetch, max_steps=9)
    with pytest.raises(ConnectionError, match="went away"):
        trainer.train()
    assert teacher.closes == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("teacher")]


def test_broken_teacher_stops_training_before_the_first_step(tmp_path):
    """Its NaN would be in every weight after one step."""
    model = tiny_teacher()
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    teacher = RecordingTeacher(model)
    trainer = trainer_of(tiny_student(), tmp_path, teacher=teacher)
    with pytest.raises(ValueError, match="not finite"):
        trainer.train()
    assert trainer.state.global_step == 0 and teacher.closes == 1


def test_prefetching_changes_nothing_but_the_thread(tmp_path):
    """Answers that reach the wrong batch would still give a plausible loss."""
    results, teachers = [], []
    for prefetch in (0, 1, 3):
        torch.manual_seed(0)
        teachers.append(RecordingTeacher(tiny_teacher()))
        trainer = trainer_of(
            tiny_student(),
            tmp_path,
            rows=20,
            teacher=teachers[-1],
            teacher_prefetch=prefetch,
            max_steps=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
        )
        trainer.train()
        results.append((weights_of(trainer.model), [step["loss"] for step in train_log(trainer)]))
    for weights, losses in results[1:]:
        assert torch.equal(weights, results[0][0]) and losses == results[0][1]
    assert teachers[0].threads == {threading.get_ident()}
    assert len(teachers[1].threads) == 2  # the health check, and the worker


def test_sparse_teacher_trains_and_refuses_a_temperature(tmp_path):
    """Every endpoint is of this kind."""
    trainer = trainer_of(tiny_student(), tmp_path, teacher=TopTeacher(tiny_teacher()))
    trainer.train()
    assert all(0 < entry["kd"] < 100 for entry in train_log(trainer))
    with pytest.raises(ValueError, match="kd_temperature is 2.0.*TopTeacher"):
        trainer_of(tiny_student(), tmp_path, teacher=TopTeacher(tiny_teacher()), kd_temperature=2.0)


def test_callback_can_be_passed_instead_of_a_teacher(tmp_path):
    """Who builds the callback owns its settings; two owners would close the teacher under each other."""
    callback = TeacherCallback(HFTeacher(tiny_teacher()))
    trainer = trainer_of(tiny_student(), tmp_path, callbacks=[callback])
    trainer.train()
    assert callback.closed and "kd" in train_log(trainer)[0]
    with pytest.raises(ValueError, match="More than one teacher"):
        trainer_of(tiny_student(), tmp_path, teacher=HFTeacher(tiny_teacher()), callbacks=[callback])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"ce_weight": -0.1}, "ce_weight must not be negative, got -0.1"),
        ({"kd_weight": float("nan")}, "kd_weight must not be negative, got nan"),
        ({"ce_weight": 0, "kd_weight": 0, "energy_weight": 0}, "All loss weights are 0"),
        ({"kd_temperature": 0.0}, "kd_temperature must be above 0, got 0.0"),
        ({"teacher_prefetch": -1}, "teacher_prefetch must not be negative, got -1"),
    ],
)
def test_arguments_that_cannot_work_are_refused(tmp_path, kwargs, message):
    """A negative weight unlearns, and looks like a falling loss."""
    with pytest.raises(ValueError, match=message):
        KDConfig(output_dir=str(tmp_path), **kwargs)


def test_weights_that_the_model_or_teacher_cannot_serve_are_refused(tmp_path):
    """Otherwise the part is silently missing from the loss, or raises after the data is prepared and the teacher
    loaded."""
    with pytest.raises(ValueError, match="kd_weight is 0.5 but there is no teacher.*--teacher"):
        trainer_of(tiny_student(), tmp_path, kd_weight=0.5)
    with pytest.raises(ValueError, match="There is a teacher but kd_weight is 0"):
        trainer_of(tiny_student(), tmp_path, kd_weight=0.0, teacher=HFTeacher(tiny_teacher()))
    with pytest.raises(ValueError, match="energy_weight is 1.0 but the student's head is `regression`"):
        trainer_of(tiny_student(), tmp_path, energy_weight=1.0)
    with pytest.raises(ValueError, match="All loss weights are 0"):
        trainer_of(tiny_student(), tmp_path, ce_weight=0.0)
    with pytest.raises(ValueError, match="258 token ids and the teacher 300"):
        trainer_of(tiny_student(), tmp_path, teacher=HFTeacher(tiny_teacher(vocab_size=300)))


def test_teacher_with_padded_columns_is_accepted(tmp_path):
    """Most published checkpoints have them."""
    teacher = HFTeacher(tiny_teacher(vocab_size=320), tokenizer=byte_tokenizer())
    trainer = trainer_of(tiny_student(), tmp_path, teacher=teacher)
    trainer.train()
    assert train_log(trainer)[-1]["kd"] > 0


def test_peft_wrapper_is_transparent(tmp_path):
    """Loss weights and the teacher's loss travel as keyword arguments; a wrapper that drops them trains on something
    else."""
    torch.manual_seed(0)
    plain = trainer_of(tiny_student(), tmp_path, teacher=HFTeacher(tiny_teacher()), max_steps=1)
    plain.train()
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=r"model\.backbone\..*\.(q_proj|v_proj)")
    wrapped = trainer_of(
        peft.get_peft_model(tiny_student(), lora), tmp_path, teacher=HFTeacher(tiny_teacher()), max_steps=1
    )
    wrapped.train()
    for name in ("loss", "ce", "kd"):
        assert train_log(wrapped)[0][name] == pytest.approx(train_log(plain)[0][name], rel=1e-5)


def test_a_compiled_training_has_the_same_losses(tmp_path):
    """`--torch_compile true`: what the trainer hands over beside the batch must survive tracing. One epoch traces the
    codec's part, the second what reads it."""
    logs = []
    torch.compiler.reset()
    for compile in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        folder = tmp_path / str(len(compile))
        backbone = LlamaConfig(**{**TINY, "num_hidden_layers": 1})
        epochs = {"max_steps": -1, "num_train_epochs": 2, "mse_weight": 0.5, "codec_cache": str(folder / "cache")}
        student = tiny_student(backbone=backbone, num_decoder_layers=1, decoder_lookup=0, decoder_memory="none")
        trainer = trainer_of(student, folder, rows=8, **epochs, **compile)
        trainer.train()
        logs.append([[entry[name] for name in ("ce", "mse")] for entry in train_log(trainer)])
    torch.compiler.reset()
    assert len(logs[0]) == 4 and trainer.codec_cache.num_found == 8
    for plain, compiled in zip(*logs, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4)
