import pytest
import torch

from scripts import experiment


@pytest.mark.slow
def test_several_questions_share_their_runs(tmp_path, capsys):
    """A base run trained once per question makes an evening of an hour."""
    text = tmp_path / "text.txt"
    with open(torch.__file__) as source:  # real text
        text.write_text(source.read()[:40_000])
    shape = "--vocab_size 300 --num_tokens 8192 --block_size 64 --hidden_size 64 --num_hidden_layers 1"
    answer = experiment.main(
        f"--name decoder_memory decoder_depth --data {text} --work_dir {tmp_path / 'work'} {shape}".split()
    )
    assert answer.count("| NLL |") == 2 and "One decoder layer or two?" in answer
    (folder,) = (tmp_path / "work").iterdir()
    assert len([path for path in folder.iterdir() if path.name.startswith("student-")]) == 3
    assert capsys.readouterr().out.endswith(answer + "\n")


def test_an_unknown_question_is_refused_before_anything_is_trained():
    """A misspelt second name must not come up after the first has trained for an hour."""
    with pytest.raises(SystemExit, match="unknown experiment 'depth': known are .*decoder_depth"):
        experiment.main(["--name", "decoder_memory", "depth"])
