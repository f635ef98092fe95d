import pytest
import torch

from trainers.evaluation import experiments, verify_sparse_kd
from trainers.evaluation.side_by_side import Run, SideBySide


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experiments")
    with open(torch.__file__) as source:  # real text
        (folder / "text.txt").write_text(source.read()[:60_000])
    return SideBySide(
        folder / "work",
        str(folder / "text.txt"),
        None,
        vocab_size=300,
        num_tokens=1024,
        block_size=64,
        tokens_per_step=512,
        eval_tokens=1024,
        hidden_size=64,
        num_hidden_layers=1,
        codec_steps=2,
        say=lambda line: None,
    )


def test_every_variant_is_a_run_of_its_own(table):
    """Two variants that hash to one run give a table whose rows agree by construction."""
    for name, experiment in experiments.EXPERIMENTS.items():
        codec = "codec" if experiment.needs_codec else None
        base = Run("student", 2e-3, 0, 8, dict(experiments.STUDENT), autoencoder=codec)
        names = {table.name(change(base)) for change in experiment.variants.values()}
        assert len(names) == len(experiment.variants), name


@pytest.mark.slow
def test_a_table_has_a_row_per_variant_and_the_range_over_seeds(table):
    """One seed's figure that reads like the mean of several is not evidence."""
    lines = experiments.answer("decoder_memory", table, seeds=(0, 1)).splitlines()
    assert lines[0] == experiments.EXPERIMENTS["decoder_memory"].question
    assert lines[4].startswith("|  | NLL | at context 1-15 | at context 16-63 | training, s |")
    assert [line.split(" | ")[0] for line in lines[6:]] == ["| none", "| patches"]
    assert " to " in lines[6] and "seeds 0, 1" in lines[2] and "training tokens 1024" in lines[2]


@pytest.mark.slow
def test_brier_of_parallel_heads_on_a_trained_codec(table):
    """Draws of patches that hold padding, or of other patches than the targets, would look like a bad head."""
    lines = experiments.answer("parallel_head", table).splitlines()
    assert lines[4].startswith("|  | Brier-1 | Brier-2 | Brier-3 | Brier-4 |")
    assert len(lines) == 6 + 3
    figures = [float(cell) for cell in lines[-1].split(" | ")[1:5]]
    assert all(-100 <= figure <= 100 for figure in figures)


def test_an_unknown_experiment_names_those_there_are(table):
    """A misspelt name must not train for an hour first."""
    with pytest.raises(ValueError, match="decoder_windows.*decoder_window"):
        experiments.answer("decoder_windows", table)


@pytest.mark.slow
def test_stored_ids_are_judged_by_the_distance_to_the_teacher(table, monkeypatch):
    """A gap that is taken between different seeds, or from another teacher, is noise with a sign."""
    monkeypatch.setattr(verify_sparse_kd, "SPARSE_SEEDS", (0,))
    monkeypatch.setattr(experiments, "TEACHER", Run("token_lm", 4e-3))
    variants = experiments.runs("sparse_kd", table, 4, 4e-3, (0,))
    results = {name: table.result(run) for name, (run,) in variants.items()}  # in this process
    measured = verify_sparse_kd.sparse_gap_of(table)
    for name in variants:
        if name != verify_sparse_kd.SPARSE_FULL:
            (gap,) = measured.details["gaps"][name]
            full = results[verify_sparse_kd.SPARSE_FULL]["kl_to_teacher"]
            assert (
                gap == pytest.approx(results[name]["kl_to_teacher"] - full) and f"{name} {gap:+.4f}" in measured.figure
            )
    lines = experiments.answer("sparse_kd", table, 4, 4e-3).splitlines()
    assert lines[4].startswith("|  | KL to the teacher | NLL |") and len(lines) == 6 + 5
