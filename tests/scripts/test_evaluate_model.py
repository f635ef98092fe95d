"""`scripts/evaluate_model.py` on real, tiny models: what its report holds, that it resumes, what it refuses."""

import inspect
import json
import re
import shutil
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM
from scripts.evaluate_model import main
from tests.scripts.test_infer import make_tokenizer
from trainers.evaluation.evaluation import Evaluation, EvaluationSettings, Subjects
from trainers.model_card import CardFacts, card_of_folder, fill_card, update_card, weights_hash


TINY = "--block_size 64 --positions 150 --num_texts 20 --new_tokens 8 --temperatures 0.7 1.2 --device cpu --quick"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token LM, its students and their codec, of one tokenizer; and a text."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = make_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=128, **special)
    sizes = {"patch_size": 4, "latent_size": 16, "hidden_size": 32, "intermediate_size": 64}
    codec = LatentForgeAutoencoder(LatentForgeAutoencoderConfig(vocab_size=len(tokenizer), **sizes, **special))
    models = {"teacher": LlamaForCausalLM(backbone), "autoencoder": codec}
    for name, fields in {
        "student": {},
        "student_energy": {"decoder_type": "parallel", "head_config": {"head_type": "energy"}},
    }.items():
        models[name] = LatentForgeForCausalLM.from_autoencoder(codec, backbone, **fields)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    fill_card(models["student"].config, CardFacts("owner/name", metrics={"nll": 5.0})).save(
        folder / "student" / "README.md"
    )
    lines = inspect.getsource(textwrap).splitlines(keepends=True)
    (folder / "text.txt").write_text("".join(lines), encoding="utf-8")
    return folder


def run(trained: Path, *argv: str) -> tuple[dict, str]:
    """The JSON and the lines of progress of one call."""
    text = [
        *("--data", str(trained / "text.txt"), "--eval_data", str(trained / "text.txt"), "--cache_dir"),
        *(str(trained / "cache"), "--domain", f"prose={trained / 'text.txt'}", f"code={trained / 'text.txt'}"),
    ]
    err = StringIO()
    with redirect_stdout(StringIO()), redirect_stderr(err):
        path = main([argv[0], *text, *TINY.split(), *argv[1:]])
    return json.loads(path.read_text(encoding="utf-8")), err.getvalue()


@pytest.fixture(scope="module")
def evaluated(trained: Path) -> tuple[dict, str]:
    flags = ["--teacher", str(trained / "teacher"), "--baseline", str(trained / "student_energy")]
    return run(trained, str(trained / "student"), *flags)


def test_the_report_holds_every_part_and_says_its_conditions(evaluated: tuple[dict, str], trained: Path):
    """A figure without seed, text, threads and commit is nobody's."""
    report, progress = evaluated
    assert {"codec", "likelihood", "brier", "generation", "speed"} <= set(report)
    conditions = report["conditions"]
    for name in ("commit", "threads", "dtype", "device", "versions", "machine", "command", "data", "settings"):
        assert conditions[name] not in (None, ""), name
    assert conditions["settings"]["positions"] == 150 and conditions["settings"]["seed"] == 0
    assert list(report["brier"]) == ["student", "teacher", "student_energy"]
    counts = {entry[form]["positions"] for entry in report["brier"].values() for form in ("sampled", "smooth")}
    assert len(counts) == 1 and min(counts) >= 150  # equal for all
    assert "interval" in report["brier"]["teacher"]["sampled"]["judged_less_this"]
    assert report["likelihood"]["student"]["nats_per_token"] > 0
    assert "integral over that noise" in report["likelihood"]["student_energy"]["refused"]
    points = report["generation"]["models"]["student_energy"]
    assert points[0]["judge_nll"] > 0 and "flattened" in points[1]["refused"]
    assert set(report["codec"]["domains"]) == {"prose", "code", "numbers", "patches with EOS or padding"}
    assert [entry["sigma"] for entry in report["codec"]["curve"]] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert set(report["codec"]["cycle"]) == {"the codec's own latents", "student", "student_energy"}
    for name in ("rows", "roofline"):
        assert {row["model"] for row in report["speed"][name]} == {"student", "teacher", "student_energy"}
    assert report["speed"]["rates"]["matrix_rate"] > 0
    total = len(re.findall(r"\[\d+/\d+\] .*: \d+ s", progress))
    assert total >= 12 and "[1/" in progress


def test_the_page_needs_no_other_file_and_shows_what_the_json_holds(evaluated: tuple[dict, str], trained: Path):
    """A report that is sent to somebody loses whatever lies beside it."""
    report, _ = evaluated
    folder = trained / "student" / "evaluation"
    page = (folder / "evaluation.html").read_text(encoding="utf-8")
    markdown = (folder / "evaluation.md").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page
    for text in (page, markdown):
        assert f"{report['brier']['student']['sampled']['brier_lm']:.2f}" in text
        assert "clamped at 0 before the product" in text and "none is selected" in text
        assert "has no exact likelihood" in text and "positions in" in text
    assert len(report["generation"]["models"]["student"][0]["texts"]) == 3
    assert "the first of BrierLM's rows, up to 32,768 tokens" in markdown  # --quick reads fewer for the likelihood
    speed = page.split("<h2>Speed</h2>")[1]
    assert "teacher" in speed and "tokens a backbone step" in speed and "This machine, cpu" in speed


def test_what_is_finished_is_not_measured_again(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Half an hour lost to a closed laptop is half an hour that nobody spends twice."""
    flags = [str(trained / "teacher"), "--parts", "likelihood", "brier", "--output_dir", str(tmp_path / "out")]
    measured = []
    part = Evaluation._brier

    def broken(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Evaluation, "_brier", broken)
    with pytest.raises(KeyboardInterrupt):
        run(trained, *flags)
    monkeypatch.setattr(Evaluation, "_brier", part)
    first, progress = run(trained, *flags)
    assert "[1/2] likelihood teacher: kept" in progress and "[2/2] brier teacher ..." in progress
    again, progress = run(trained, *flags)
    assert progress.count("kept from an earlier run") == 2 and again["brier"] == first["brier"]
    other, progress = run(trained, *flags, "--seed", "1")
    measured += re.findall(r"\] (\w+) teacher \.\.\.", progress)
    assert "brier" in measured and other["brier"] != first["brier"]


def test_figures_of_other_weights_are_not_taken(trained: Path, tmp_path: Path):
    """A report of yesterday's model under today's name is wrong without a sign of it."""
    model = LlamaForCausalLM.from_pretrained(trained / "teacher")
    flags = [str(tmp_path / "teacher"), "--parts", "likelihood", "--output_dir", str(tmp_path / "out")]
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    figures = []
    for _ in range(2):
        model.save_pretrained(tmp_path / "teacher")
        report, progress = run(trained, *flags)
        assert "kept" not in progress
        figures.append(report["likelihood"]["teacher"]["nats_per_token"])
        model.lm_head.weight.data.mul_(30)
    assert figures[0] != figures[1]


def test_figures_are_of_the_weights_that_were_read(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A training that goes on in the folder would put yesterday's figures into the card of today's weights."""
    folder = tmp_path / "teacher"
    shutil.copytree(trained / "teacher", folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nA card.\n", encoding="utf-8")
    later = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    later.save_pretrained(tmp_path / "later")
    part = Evaluation._likelihood

    def trained_meanwhile(self):
        (tmp_path / "later" / "model.safetensors").replace(folder / "model.safetensors")
        return part(self)

    monkeypatch.setattr(Evaluation, "_likelihood", trained_meanwhile)
    report, progress = run(trained, str(folder), "--parts", "likelihood")
    assert report["conditions"]["weights"] == weights_hash(trained / "teacher") != weights_hash(folder)
    assert "stays as it is" in progress and "nats" not in (folder / "README.md").read_text(encoding="utf-8")


def test_speed_of_another_machine_is_not_taken(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder that was copied would give one processor's tokens a second under another one's name."""
    model, seen = LlamaForCausalLM.from_pretrained(trained / "teacher"), []

    def measured() -> None:
        subjects = Subjects({"teacher": model}, None, None, None, torch.zeros(1, 8, dtype=torch.long), None, 4)
        Evaluation(subjects, EvaluationSettings(), tmp_path)._part("speed", {}, lambda: seen.append("") or {})

    measured()
    measured()
    assert len(seen) == 1
    machine = {"machine": {"cpu": "another", "threads": torch.get_num_threads()}}
    monkeypatch.setattr("trainers.evaluation.evaluation.environment", lambda: machine)
    measured()
    assert len(seen) == 2


def test_a_codec_is_judged_alone(trained: Path, tmp_path: Path):
    """Whoever trains a codec first wants to know whether to go on."""
    report, _ = run(trained, str(trained / "autoencoder"), "--output_dir", str(tmp_path / "out"))
    assert set(report) == {"conditions", "codec"} and report["codec"]["dimensions"]["dimensions"] == 16
    assert "whole patches right" in (tmp_path / "out" / "evaluation.md").read_text(encoding="utf-8")


def test_the_card_takes_its_figures_from_the_evaluation_of_these_weights(evaluated: tuple[dict, str], trained: Path):
    """Figures that are typed into a card are right once."""
    report, _ = evaluated
    folder = trained / "student"
    card = ModelCard.load(folder / "README.md")
    lm = report["brier"]["student"]["sampled"]["brier_lm"]
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results["nll"] == 5.0 and results["brier_lm"] == pytest.approx(lm, abs=1e-6)
    assert results["nats_per_token"] == pytest.approx(report["likelihood"]["student"]["nats_per_token"], abs=1e-6)
    assert f"| {lm:.2f} (" in card.text and str(trained) not in str(card)
    assert "Nothing else was measured" not in card.text
    before = str(card)
    update_card(folder)
    assert str(ModelCard.load(folder / "README.md")) == before
    config = LatentForgeForCausalLM.from_pretrained(folder).config
    assert f"| {lm:.2f} (" in card_of_folder(folder, config, "owner/name").text
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + b"\0\0\0\1")
        assert "BrierLM" not in card_of_folder(folder, config, "owner/name").text
        with pytest.raises(ValueError, match="no evaluation of its weights"):
            update_card(folder)
    finally:
        weights.write_bytes(kept)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("no/such/model",), "there is no folder no/such/model. Train a model with `make demo`"),
        (("{}/student", "--parts", "brierlm"), "unknown part 'brierlm': known are codec, likelihood, brier"),
        (("{}/student", "--temperatures", "0"), "temperatures must be above 0"),
        (("{}/student", "--domain", "poems.txt"), "a domain is NAME=TEXT"),
        (("{}/student", "--dtype", "float16"), "dtype must be float32 or bfloat16"),
        (("{}/student", "--positions", "0"), "positions must be at least 1, got 0"),
        (("{}/student", "--new_tokens", "3"), "new_tokens must be at least 4, got 3"),
        (("{}",), "holds no model: there is no config.json"),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_how_to_mend_it(
    flags: tuple[str, ...], complaint: str, trained: Path, capsys: pytest.CaptureFixture
):
    """A traceback after minutes of loading helps nobody."""
    with pytest.raises(SystemExit) as stop:
        main([flag.replace("{}", str(trained)) for flag in flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in err and len(err.splitlines()) == 1


def test_models_that_cannot_stand_beside_each_other_are_refused(trained: Path, tmp_path: Path):
    """Scores at other places, of other tokens, compare nothing."""

    def refusal(*argv: str) -> str:
        with pytest.raises(ValueError) as error:
            run(trained, *argv)
        assert "\n" not in str(error.value)
        return str(error.value)

    student, teacher = str(trained / "student"), str(trained / "teacher")
    other = make_tokenizer()
    other.add_tokens(["one_more"])
    LlamaForCausalLM.from_pretrained(teacher).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    assert "another vocabulary" in refusal(student, "--baseline", str(tmp_path / "other"))
    assert "teacher reads at most 128 tokens" in refusal(teacher, "--block_size", "256")
    assert "patches of 4, 8 tokens cannot be scored" in refusal(student, "--patch_size", "8")
    assert "judged by a token model" in refusal(teacher, "--teacher", student)
    assert "codecs are judged alone" in refusal(str(trained / "autoencoder"), "--teacher", teacher)
    assert "is a codec" in refusal(teacher, "--baseline", str(trained / "autoencoder"))
    with pytest.raises(ValueError, match="eval_fraction must lie between 0 and 1, got 2"):
        run(trained, teacher, "--eval_fraction", "2")
