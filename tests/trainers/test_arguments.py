from dataclasses import dataclass, field

import pytest
from transformers import TrainingArguments

from trainers.arguments import parse_arguments
from trainers.data import DataArguments


@dataclass
class Options:
    width: int = 3
    rate: float = 0.5
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    chatty: bool = True
    note: str | None = None

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width must be >= 1, got {self.width}")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_flags_fill_every_dataclass():
    """A script's own options and HF's must come from one command line, or half of them are silently defaults."""
    options, data, training = parse_arguments(
        Options,
        DataArguments,
        TrainingArguments,
        argv=["--width", "7", "--block_size", "64", "--learning_rate", "1e-4"],
    )
    assert (options.width, data.block_size, training.learning_rate) == (7, 64, 1e-4)
    assert options.sizes == [1, 2]


def test_yaml_values_get_the_type_of_their_field(tmp_path):
    """YAML 1.1 reads 1e-4 as a string: an optimizer that gets '1e-4' fails hours later, or not at all."""
    path = write(
        tmp_path / "c.yaml",
        """
learning_rate: 1e-4
rate: -1e-3
sizes: [4, 5]
chatty: false
note: --begins with a dash
report_to: [none]
lr_scheduler_kwargs: {num_cycles: 2}
width: null
weight-decay: 0.1
""",
    )
    options, training = parse_arguments(Options, TrainingArguments, argv=["--config", path])
    assert options == Options(width=3, rate=-1e-3, sizes=[4, 5], chatty=False, note="--begins with a dash")
    assert (training.learning_rate, training.weight_decay) == (1e-4, 0.1)
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}
    assert training.report_to == []


def test_a_flag_wins_over_the_file_and_a_later_file_over_an_earlier(tmp_path):
    """Otherwise nobody can change one value of a recipe without copying it."""
    first = write(tmp_path / "a.yaml", "width: 5\nrate: 0.1\nsizes: [9]\n")
    second = write(tmp_path / "b.yaml", "rate: 0.2\nsizes: []\n")
    argv = [f"--config={first}", "--config", second, "--width=6"]
    (options,) = parse_arguments(Options, argv=argv)
    assert (options.width, options.rate, options.sizes) == (6, 0.2, [])
    (options,) = parse_arguments(Options, argv=["--sizes", "1", "2", *argv])
    assert options.sizes == [1, 2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--widht", "4"], "unknown flag --widht (did you mean --width?)"),
        (["--learning-rat=3"], "--learning_rate"),
        (["--wid", "4"], "unknown flag --wid "),
        (["stray"], "'stray'"),
        (["--width", "wide"], "invalid int value: 'wide'"),
        (["--width", "0"], "width must be >= 1, got 0"),
        (["--config", "/nowhere/x.yaml"], "cannot read --config /nowhere/x.yaml"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(argv, message, capsys):
    """A mistyped flag that is ignored, or taken for another, trains a wrong model for hours."""
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Options, TrainingArguments, argv=argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-4", "unknown key 'learning_rat' (did you mean learning_rate"),
        ("width: [1, 2]", "width takes one value, got the list [1, 2]"),
        ("- width", "must hold `name: value` lines, found a list"),
        ("width: {", "is not valid YAML"),
        ("config: other.yaml", "unknown key 'config'"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(text, message, tmp_path, capsys):
    """A recipe's misspelt key must not fall back to a default."""
    path = write(tmp_path / "recipe.yaml", text)
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Options, TrainingArguments, argv=["--config", path])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "recipe.yaml" in error


def test_an_empty_file_changes_nothing(tmp_path):
    """A recipe that is all comments is no error."""
    assert parse_arguments(Options, argv=["--config", write(tmp_path / "e.yaml", "# nothing\n")]) == (Options(),)


def test_help_lists_every_option_and_keeps_the_commands(capsys):
    """Help that crashes on a percent sign, or folds example commands into a paragraph, helps nobody."""
    with pytest.raises(SystemExit) as stop:
        parse_arguments(
            Options, DataArguments, TrainingArguments, argv=["--help"], description="Do it.\n\n    run --x\n"
        )
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "\n    run --x\n" in text
    assert all(flag in text for flag in ("--sizes", "--block_size", "--learning_rate", "--config"))


def test_a_section_of_a_file_is_read_alone(tmp_path, capsys):
    """Codec and student share a recipe's file: flags of the one in the other would be refused, or worse, taken."""
    path = write(tmp_path / "c.yaml", "codec: {width: 5}\nstudent: {width: 9}\n")
    (options,) = parse_arguments(Options, argv=["--config", f"{path}:student"])
    assert options.width == 9
    with pytest.raises(SystemExit):
        parse_arguments(Options, argv=["--config", f"{path}:teacher"])
    assert "no section 'teacher': it has codec, student" in capsys.readouterr().err


def test_a_file_of_sections_without_a_section_names_them(tmp_path, capsys):
    """`unknown key 'student'` sends people to look for a flag, where a word after the file's name is missing."""
    path = write(tmp_path / "seed.yaml", "first: {width: 4}\nsecond: {width: 5}\n")
    with pytest.raises(SystemExit) as stop:
        parse_arguments(Options, argv=["--config", path])
    assert stop.value.code == 2
    assert f"name a section: {path}:first or {path}:second" in capsys.readouterr().err
