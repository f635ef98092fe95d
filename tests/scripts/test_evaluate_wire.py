"""`scripts/evaluate_wire.py` on real, tiny models: what it writes, that it resumes, what it refuses; its recipes."""

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from scripts.evaluate_wire import EvaluateWireArguments, main
from tests.modeling_latentforge.test_wire import receiver, wire
from trainers import parse_arguments
from trainers.model_card import CardFacts, fill_card
from trainers.wire_models import save_wire


CONFIGS = Path(__file__).resolve().parent.parent.parent / "scripts" / "configs" / "wire"
QUICK = "--device cpu --max_new_tokens 4 --latency_examples 1 --resamples 50 --batch_size 8".split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wire of two receivers, these, and two data sets."""
    folder = tmp_path_factory.mktemp("wires")
    model = wire(receivers=("llama", "gpt2"), pooling="queries", quantizer="int8")
    save_wire(model, folder / "wire")
    for name in model.receivers:
        reader = receiver(name)
        reader.model.save_pretrained(folder / name)
        reader.tokenizer.save_pretrained(folder / name)
    fill_card(model.config, CardFacts("owner/wire")).save(folder / "wire" / "README.md")
    with (folder / "dev.jsonl").open("w") as file:
        for place in range(12):
            record = {"id": f"q{place}", "title": f"t{place}", "context": f"The quay {place} has a goat and a ferry."}
            record |= {"question": "Who?", "answers": {"text": ["a goat"], "answer_start": [0]}}
            file.write(json.dumps(record) + "\n")
        record |= {"id": "long", "context": "far too long " * 300}
        file.write(json.dumps(record) + "\n")
    with (folder / "validation.jsonl").open("w") as file:
        for place in range(10):
            words = "a good ferry" if place % 2 else "a bad goat"
            file.write(json.dumps({"idx": place, "sentence": f"{words} {place}", "label": place % 2}) + "\n")
    return folder


def run(trained: Path, *argv: str, plots: bool = False) -> tuple[dict, str]:
    """The JSON and the lines of progress of one call; pictures take most of its time."""
    err = StringIO()
    receivers = [f"{name}={trained / name}" for name in ("llama", "gpt2")]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()), redirect_stderr(err):
        if not plots:
            patch.setattr("trainers.evaluation.wire_report._plots", lambda report, directory: {})
        path = main([str(trained / "wire"), "--receivers", *receivers, *QUICK, *argv])
    return json.loads(path.read_text(encoding="utf-8")), err.getvalue()


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> tuple[dict, str]:
    return run(
        trained,
        *("--dataset", "squad,sst2", "--data", str(trained / "dev.jsonl"), str(trained / "validation.jsonl")),
        *("--methods", "text,latent,closed_book,shuffled,joint,linear_probe"),
        *("--latent_len", "2,4", "--seeds", "42,123", "--max_examples", "6"),
        plots=True,
    )


def test_everything_is_written_and_says_its_conditions(evaluated: tuple[dict, str], trained: Path):
    """A figure without seed, data and commit is nobody's."""
    report, progress = evaluated
    folder = trained / "wire" / "evaluation"
    conditions = report["conditions"]
    for name in ("commit", "command", "data", "receivers", "weights", "seeds", "quantizer", "machine", "settings"):
        assert conditions[name] not in (None, ""), name
    assert conditions["seeds"] == [42, 123] and conditions["metrics"] == {"squad": "f1", "sst2": "accuracy"}
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {line["latent_len"] for line in lines if line["method"] == "latent"} == {2, 4}
    assert {line["seed"] for line in lines} == {42, 123}
    text = (folder / "wire_evaluation.md").read_text()
    for words in (
        "## squad",
        "## sst2",
        "Share of what the context",
        "p, Holm",
        "Not measured: linear_probe",
        "| int8 |",
    ):
        assert words in text, words
    images = {path.name for path in folder.glob("*.png")}
    assert images == {f"rate_quality_{data}_{name}.png" for data in ("squad", "sst2") for name in ("llama", "gpt2")}
    assert all(f"({name})" in text for name in images)
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in images)
    assert "[1/" in progress


def test_what_cannot_be_read_whole_is_left_out_for_all_and_counted(evaluated: tuple[dict, str], trained: Path):
    """Left out by one method alone, the others are compared on harder examples."""
    report, _ = run(
        trained,
        "--data",
        str(trained / "dev.jsonl"),
        "--methods",
        "text,latent",
        "--seeds",
        "1,2",
        "--output_dir",
        str(trained / "all"),
    )
    assert report["conditions"]["left_out"] == {"squad, seed 1": 1, "squad, seed 2": 1}
    assert {entry["examples"] for entry in report["results"]} == {12}
    (trained / "dev_long.jsonl").write_text((trained / "dev.jsonl").read_text().splitlines()[-1] + "\n")
    with pytest.raises(
        ValueError, match="No example of squad can be read whole, the first because: .* tokens, the receiver reads"
    ):
        run(trained, "--data", str(trained / "dev_long.jsonl"), "--output_dir", str(trained / "none"))


def test_a_command_that_is_repeated_answers_nothing_again(evaluated: tuple[dict, str], trained: Path):
    """A night lost to a closed laptop is one that nobody spends twice."""
    report, _ = evaluated
    again, progress = run(
        trained,
        *("--dataset", "squad", "sst2", "--data", str(trained / "dev.jsonl"), str(trained / "validation.jsonl")),
        *("--methods", "text,latent", "closed_book,shuffled,joint,linear_probe"),
        *("--latent_len", "2", "4", "--seeds", "42", "123", "--max_examples", "6"),
    )
    assert again["results"] == report["results"] and again["comparisons"] == report["comparisons"]
    started = [line for line in progress.splitlines() if line.endswith(" ...")]
    assert all("linear_probe squad" in line for line in started)  # these refuse


def test_the_card_takes_its_figures_from_the_evaluation(evaluated: tuple[dict, str], trained: Path):
    """Figures that are typed into a card are right once."""
    report, _ = evaluated
    card = ModelCard.load(trained / "wire" / "README.md")
    entry = next(
        x for x in report["results"] if (x["method"], x["receiver"], x["dataset"]) == ("text", "llama", "squad")
    )
    assert "evaluate_wire.py" in card.text and "f1 of llama from the text, squad" in card.text
    assert f"{entry['metrics']['f1']['mean']:.4g}" in card.text and str(trained) not in str(card)
    assert any(result.metric_type == "accuracy" for result in card.data.eval_results)


def test_the_first_token_may_be_drawn(trained: Path):
    """A flag that is parsed and not passed on changes no answer."""
    flags = ["--data", str(trained / "dev.jsonl"), "--methods", "latent", "--seeds", "1", "--max_examples", "6"]
    folders = [str(trained / name) for name in ("greedy", "drawn")]
    run(trained, *flags, "--output_dir", folders[0])
    hot = ["--first_token_top_p", "0.99", "--first_token_temperature", "5", "--eos_ban_steps", "2"]
    report, _ = run(trained, *flags, *hot, "--output_dir", folders[1])
    assert report["conditions"]["settings"]["decoding"]["eos_ban_steps"] == 2
    texts = [
        [json.loads(line)["prediction"] for line in (Path(folder) / "predictions.jsonl").read_text().splitlines()]
        for folder in folders
    ]
    assert texts[0] != texts[1]


def test_plain_text_is_continued_with_a_share_of_the_gain(trained: Path):
    """The row of the target table is made here."""
    book = trained / "books" / "valid"
    book.mkdir(parents=True)
    for name in "ab":
        (book / f"{name}.txt").write_text(f"The ferry of {name} leaves the quay at a quarter past six. " * 12)
    flags = ["--dataset", "text", "--data", str(book), "--context_tokens", "16", "--continue_tokens", "4"]
    flags += ["--methods", "text,closed_book,latent,zero", "--nll_tokens", "8", "--seeds", "0"]
    report, _ = run(trained, *flags, "--output_dir", str(trained / "text"))
    shares = report["gain_share"]
    assert {(entry["receiver"], entry["method"]) for entry in shares} == {
        (name, method) for name in ("llama", "gpt2") for method in ("latent", "zero")
    }
    for entry in shares:  # an untrained receiver may not gain by text
        assert "no gain" in entry["refused"] if "refused" in entry else entry["documents"] == 2
    records = [json.loads(line) for line in (trained / "text" / "predictions.jsonl").read_text().splitlines()]
    assert max(record["answer_tokens"] for record in records) == 8 and "token_f1" in records[0]


def test_figures_of_another_receiver_are_not_taken(trained: Path):
    """Yesterday's receiver under today's name."""
    shutil.copytree(trained / "llama", trained / "other")
    flags = ["--data", str(trained / "dev.jsonl"), "--methods", "closed_book", "--seeds", "1", "--max_examples", "4"]
    flags += ["--latency_examples", "0", "--output_dir", str(trained / "swap")]
    _, progress = run(trained, *flags)
    assert "kept" not in progress
    model = AutoModelForCausalLM.from_pretrained(trained / "llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    try:
        model.save_pretrained(trained / "llama")
        _, progress = run(trained, *flags)
        assert "kept" not in progress
    finally:
        shutil.copytree(trained / "other", trained / "llama", dirs_exist_ok=True)
    _, progress = run(trained, *flags)
    assert progress.count("kept") == 3


@pytest.mark.parametrize("name", ["baseline", "embedding_baselines"])
def test_a_recipe_is_one_that_the_script_takes(name: str, trained: Path):
    """A recipe with a method that was renamed stops only when somebody has waited for the models."""
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--model", str(trained / "wire"), "--receivers", "llama=x"]
    (arguments,) = parse_arguments(EvaluateWireArguments, argv=argv)
    assert arguments.numbers == [42, 123, 456] and arguments.settings.methods[0] == "text"
    assert ("zero" in arguments.methods) == (name == "baseline") == ("replay" not in arguments.methods)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--methods", "text,latents"), "unknown method 'latents': known are text, latent"),
        (("--dataset", "hotpot,sst3"), "unknown dataset 'sst3': known are squad, hotpotqa"),
        (("--dataset", "hotpot,sst2", "--data", "a"), "data names 1 sources for the 2 data sets hotpotqa, sst2"),
        (("--latent_len", "16,few"), "latent_len: 'few' is no whole number"),
        (("--seeds", "1.5"), "seeds: '1.5' is no whole number"),
        (("--max_examples", "0"), "max_examples must be at least 1, got 0"),
        (("--first_token_top_p", "1.5"), "`first_token_top_p` must lie in (0, 1], got 1.5"),
        (("--eos_ban_steps", "9"), "eos_ban_steps must lie in 0 to max_new_tokens - 1 (3), got 9"),
        (("--text_mode", "repeat"), "mode must be 'continue' or 'reconstruct', got 'repeat'"),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_how_to_mend_it(
    flags: tuple[str, ...], complaint: str, trained: Path, capsys: pytest.CaptureFixture
):
    """A traceback after minutes of loading helps nobody."""
    with pytest.raises(SystemExit) as stop:
        main([str(trained / "wire"), "--receivers", f"llama={trained / 'llama'}", *QUICK, *flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in err and len(err.splitlines()) == 1
