"""What the idea model's rows train and count: their flags are the scripts', their baselines as large as they say."""

import pytest

from modeling_latentforge import LatentForgeIdea, LatentForgeIdeaConfig
from scripts.idea import IdeaArguments
from tests.modeling_latentforge.test_idea import ENCODER
from tests.trainers.training_helpers import byte_tokenizer
from trainers import IdeaConfig, parse_arguments
from trainers.evaluation import rows_idea
from trainers.evaluation.rows_idea import ROWS, equal_width, lead_3, trained_parameters
from trainers.verification import Context
from trainers.wire_data import IdeaDataArguments
from trainers.wire_flags import IdeaAliases


class Trained(Exception):
    """In the place of an hour of training."""


@pytest.mark.parametrize("row", [row for row in ROWS if row.long], ids=lambda row: row.name)
def test_what_a_long_row_trains_is_what_the_script_takes(row, tmp_path, monkeypatch):
    """A flag that was renamed ends a row hours after it began."""
    (tmp_path / "books" / "train").mkdir(parents=True)
    (tmp_path / "_noncommercial" / "dialogsum").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        line = '{"dialogue": "#A#: Hi.", "summary": "A greets."}\n'
        (tmp_path / "_noncommercial" / "dialogsum" / f"{split}.jsonl").write_text(line)

    def run(name, flags, output):
        words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
        parsed = parse_arguments(IdeaArguments, IdeaDataArguments, IdeaAliases, IdeaConfig, argv=words)
        assert name == "idea.py" and parsed[0].steps == flags["steps"]
        assert parsed[3].train_backbone
        assert bool(parsed[0].lora_r) == (row.name == "summaries")  # whose receiver learns to read
        raise Trained

    monkeypatch.setenv("LATENTFORGE_DATA", str(tmp_path))
    byte_tokenizer().save_pretrained(tmp_path)
    for name in ("receiver_folder", "tokenizer_folder", "encoder_with_places"):
        monkeypatch.setattr(rows_idea, name, lambda *args, **kwargs: tmp_path)
    monkeypatch.setattr(rows_idea, "windows_of_novels", lambda *args: ["a window"] * 4)
    monkeypatch.setattr(rows_idea, "embed_mean_square", lambda receiver: 0.5)
    monkeypatch.setattr(rows_idea, "script", run)
    with pytest.raises(Trained):
        row.measure(Context("idea", row.name, tmp_path / "own", tmp_path / "shared", print))


def test_the_model_that_does_not_think_has_as_many_trained_parameters():
    """What thinking gains over a smaller model, the parameters may have gained."""
    fields = {"encoder_config": ENCODER, "source": "bytes", "num_ideas": 3, "latent_size": 24, "receiver": None}
    thinks = LatentForgeIdea(LatentForgeIdeaConfig(**fields, steps=6, middle_hidden=64))
    width = equal_width(thinks)
    none = LatentForgeIdea(LatentForgeIdeaConfig(**fields, steps=0, middle_hidden=64, compression_hidden=width))
    assert trained_parameters(none) == pytest.approx(trained_parameters(thinks), rel=1e-3)


def test_lead_3_is_what_was_said_first():
    """Names of speakers in it are words that no summary has."""
    assert lead_3("#Person1#: Hello, you.\n#Person2#: Hi.\nNo mark.\n#Person1#: Bye.") == "Hello, you. Hi. No mark."
