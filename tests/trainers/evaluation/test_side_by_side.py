import json

import pytest
import torch

from tests.conftest import text_batch, tiny_student
from trainers.evaluation import side_by_side
from trainers.evaluation.side_by_side import DecoderAlone, Run, SideBySide, shuffled_context, token_nll


def _table(tmp_path, **kwargs):
    text = tmp_path / "text.txt"
    with open(torch.__file__) as source:  # real text
        text.write_text(source.read()[:60_000])
    defaults = {"data": str(text), "eval_data": None, "vocab_size": 300, "num_tokens": 16384, "block_size": 64}
    shape = {"tokens_per_step": 512, "eval_tokens": 1024, "hidden_size": 64, "num_hidden_layers": 1}
    return SideBySide(tmp_path / "work", **{**defaults, **shape, "say": lambda line: None, **kwargs})


def test_all_kinds_train_on_the_same_blocks_and_are_kept(tmp_path):
    """A table over several sessions is worth nothing if a finished run is trained again or judged on other text."""
    table = _table(tmp_path)
    student = {"decoder_hidden_size": 64, "decoder_num_heads": 1}
    teacher = Run("token_lm", 5e-3)
    runs = [teacher, Run("decoder_alone", 5e-3, 0, 4, student), Run("student", 5e-3, 0, 4, student)]
    runs.append(Run("student", 5e-3, 0, 8, student, {"ce_weight": 0.5, "kd_weight": 0.5}, teacher))
    results = [table.result(run) for run in runs]
    assert len({result["eval_tokens"] for result in results}) == 1
    assert all(result["nll"] < 5.7 for result in results)  # below uniform, log 300 = 5.70
    assert set(results[0]["nll_by_context"]) == {"1-15", "16-63"}
    again = _table(tmp_path)
    again.build = None  # training again would need it
    assert again.result(runs[2]) == results[2]
    torch.testing.assert_close(table.judge(table.load(runs[2]))["nll"], results[2]["nll"])
    assert table.name(Run("student", 2e-3, 0, 4, student)) != table.name(runs[2])


@pytest.mark.slow
def test_runs_that_share_the_cores_are_the_runs_alone(tmp_path):
    """A table that trained its rows at once must not mix up whose figure is whose, nor train a teacher twice."""
    table = _table(tmp_path, num_tokens=2048, records_dir=tmp_path / "records")
    student = {"decoder_hidden_size": 64, "decoder_num_heads": 1}
    teacher = Run("token_lm", 5e-3)
    runs = [
        Run("student", rate, 0, 4, student, {"ce_weight": 0.5, "kd_weight": 0.5}, teacher) for rate in (1e-3, 5e-3)
    ]
    results = table.results(runs)
    assert [result["run"]["learning_rate"] for result in results] == [1e-3, 5e-3]
    assert results[0]["nll"] != results[1]["nll"]
    # another machine has the records only
    elsewhere = _table(tmp_path, num_tokens=2048, records_dir=tmp_path / "records")
    elsewhere.work_dir = tmp_path / "elsewhere" / elsewhere.work_dir.name
    assert elsewhere.results(runs) == results
    (tmp_path / "alone").mkdir()
    alone = _table(tmp_path / "alone", num_tokens=2048, data=table.data)
    assert abs(alone.result(runs[1])["nll"] - results[1]["nll"]) < 0.02


def test_a_new_default_is_a_new_run_and_older_code_is_named(tmp_path, monkeypatch):
    """A table that mixes models of two designs, and says nothing, answers no question."""
    table = _table(tmp_path, num_tokens=512, records_dir=tmp_path / "records")
    run = Run("student", 5e-3, 0, 4, {"decoder_hidden_size": 64, "decoder_num_heads": 1})
    explicit = Run("student", 5e-3, 0, 4, {**run.student, "decoder_conv_size": 4})
    other = Run("student", 5e-3, 0, 4, {**run.student, "decoder_conv_size": 1})
    assert table.name(run) == table.name(explicit) != table.name(other)
    table.result(run)
    assert table.provenance() == ""
    monkeypatch.setattr(side_by_side, "training_code", lambda: "another")
    table.result(run)
    assert table.provenance() == "; 1 of 1 runs were trained by an earlier state of the code"
    fresh = _table(tmp_path, num_tokens=512, records_dir=tmp_path / "records", fresh=True)
    assert fresh._known(run) is None


def test_runs_that_are_kept_in_the_repository_keep_their_names(tmp_path):
    """A new field of `Run` that changes every name throws away days of training without a word."""
    table = _table(tmp_path)
    for path in side_by_side.RECORDS.glob("*/student-*.json"):
        fields = json.loads(path.read_text())["run"]
        fields["student"].setdefault("decoder_lookup", 0)  # there was none
        if fields["teacher"] is not None:
            fields["teacher"] = Run(**fields["teacher"])
        assert table.name(Run(**fields)) == path.stem


def test_the_bare_decoder_sees_nothing_before_its_window():
    """The context share divides by its NLL: a leak makes every student look bad, a narrow window good."""
    student = tiny_student(num_decoder_layers=1, decoder_window=4)
    student.__class__ = DecoderAlone
    ids = text_batch(1, 16)
    changed = ids.clone()
    changed[0, :9] = 0  # four keys, the first of which mixes in three tokens before it: 9 .. 15
    difference = (student(ids).logits - student(changed).logits).abs().amax(-1)[0]
    assert difference[15] == 0 and difference[14] > 0


def test_shuffled_context_changes_the_latents_only_and_only_inside():
    """The check that latents carry their own document must not also change the window."""
    student = tiny_student(num_decoder_layers=1, decoder_window=4)
    ids = text_batch(2, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    before, valid = token_nll(student, batch)
    with shuffled_context(student):
        within, _ = token_nll(student, batch)
    after, _ = token_nll(student, batch)
    assert valid.all() and torch.equal(before, after)
    assert torch.equal(before[:, :3], within[:, :3])  # the first patch follows the start, whoever's it is
    assert (before[:, 4:] != within[:, 4:]).any()
