"""The rows of `make verify TOPIC=main` at tiny sizes: each passes where the thing holds, and falls short where not."""

import copy
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig
from modeling_latentforge.modeling_patch_decoder import LatentForgeShortConvolution
from tests.conftest import BACKBONES, EOS, PAD
from trainers.evaluation import rows_main
from trainers.evaluation.side_by_side import Run, training_code
from trainers.teachers import HFTeacher
from trainers.verification import Context


# -- the demo


def repository(folder: Path, demo_target: str) -> Path:
    """A git repository whose Makefile has a `demo` of our own."""
    folder.mkdir()
    (folder / "Makefile").write_text(f"demo:\n\t{demo_target}\n")
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "c"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def test_the_demo_row_runs_a_fresh_clone_and_loads_what_it_left(
    context: Context, tiny_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A demo that only works where it was written is no demo."""
    monkeypatch.setattr(rows_main, "ROOT", repository(tmp_path / "code", f"mkdir runs && cp -r {tiny_demo} runs/demo"))
    context.work_dir = context.shared_dir / "demo"
    (context.work_dir / "clone" / "runs" / "old").mkdir(parents=True)  # of another day
    measured = rows_main.demo(context)
    assert measured.passed and re.fullmatch(r"0\.\d minutes, \d\.\d GB", measured.figure)
    assert measured.details == {"stages": {"teacher": {"seconds": 1.0}}}
    assert [path.name for path in (context.work_dir / "clone" / "runs").iterdir()] == ["demo"]
    assert rows_main.demo_folder(context) == context.work_dir / "clone" / "runs" / "demo"

    (rows_main.ROOT / "Makefile").write_text("demo:\n\ttrue\n")
    with pytest.raises(RuntimeError, match="changes that a clone would not see: commit them"):
        rows_main.demo(context)


@pytest.mark.parametrize(
    ("target", "error", "complaint"),
    [
        ("echo no corpus; false", RuntimeError, "the demo ended with status 2: see .*demo.log"),
        ("mkdir -p runs/demo", FileNotFoundError, "holds no finished demo"),
    ],
)
def test_a_demo_that_breaks_off_is_an_error(
    context: Context,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    error: type[Exception],
    complaint: str,
):
    """Half a demo is quick and small, and would pass."""
    monkeypatch.setattr(rows_main, "ROOT", repository(tmp_path / "code", target))
    context.work_dir = context.shared_dir / "demo"
    context.work_dir.mkdir()
    with pytest.raises(error, match=complaint):
        rows_main.demo(context)
    if "echo" in target:
        assert "no corpus" in (context.work_dir / "demo.log").read_text()


def test_a_demo_of_other_code_is_not_read(context: Context, demo: Path):
    """Yesterday's models would vouch for today's code."""
    assert rows_main.demo_folder(context) == demo
    (context.shared_dir / "demo" / "code").write_text("another")
    with pytest.raises(FileNotFoundError, match="was trained by other code: run the row `demo` first"):
        rows_main.demo_codec(context)
    (demo / "report" / "report.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no finished demo: run the row `demo` first"):
        rows_main.equalities(context)


@pytest.fixture(scope="module")
def codec() -> LatentForgeAutoencoder:
    """Two tokens into 64 numbers, trained on tokens at random until it gives back every pair."""
    torch.manual_seed(0)
    config = LatentForgeAutoencoderConfig(
        vocab_size=300,
        patch_size=2,
        latent_size=64,
        hidden_size=64,
        intermediate_size=64,
        token_dropout=0.0,
        latent_dropout=0.0,
        initializer_range=0.1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    codec = LatentForgeAutoencoder(config).train()
    optimizer = torch.optim.AdamW(codec.parameters(), lr=1e-2)
    for _ in range(60):
        ids = torch.randint(0, 300, (8, 64))
        codec(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return codec.eval()


def test_the_demo_s_codec_is_judged_on_text_with_and_without_noise(
    context: Context, demo: Path, codec: LatentForgeAutoencoder
):
    """A codec that loses a token in a hundred caps every student behind it."""
    untrained = rows_main.demo_codec(context, max_eval_tokens=4096)
    assert not untrained.passed and untrained.details["clean"]["token_accuracy"] < 0.5
    codec.save_pretrained(demo / "autoencoder")
    measured = rows_main.demo_codec(context, max_eval_tokens=4096)
    assert measured.passed, measured.figure
    assert measured.details["clean"]["sigma"] == 0.0 and measured.details["noisy"]["sigma"] == 0.3
    assert measured.details["clean"]["num_tokens"] > 4000

    codec = copy.deepcopy(codec)
    with torch.no_grad():  # latents of a sixteenth of the size: right as they are, lost in the same noise
        codec.encoder.to_posterior.weight[: codec.config.latent_size] /= 16
        codec.encoder.to_posterior.bias[: codec.config.latent_size] /= 16
        codec.decoder.from_latent.weight *= 16
    codec.save_pretrained(demo / "autoencoder")
    fragile = rows_main.demo_codec(context, max_eval_tokens=4096)
    assert not fragile.passed
    assert fragile.details["clean"]["token_accuracy"] >= 0.995 > fragile.details["noisy"]["token_accuracy"]


def llama(num_layers: int) -> LlamaForCausalLM:
    config = BACKBONES["llama"]()
    config.num_hidden_layers = num_layers
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("faster", ["student", "teacher"])
def test_the_student_s_speed_is_a_multiple_of_its_own_teacher_s(context: Context, demo: Path, faster: str):
    """A ratio the wrong way round, or against another model, calls a slow student fast."""
    for name in ("student", "teacher"):
        llama(1 if name == faster else 16).save_pretrained(demo / name)
    measured = rows_main.demo_speed(context, new_tokens=8, repeats=3)
    rates = {name: values["tokens_per_second"] for name, values in measured.details.items()}
    assert measured.passed == (faster == "student")
    assert f"student {rates['student'] / rates['teacher']:.2f}x ({rates['student']:.0f} tokens/s)" in measured.figure
    assert "student_parallel" in rates and f"; teacher {rates['teacher']:.0f} tokens/s" in measured.figure


def test_the_large_models_differ_in_how_often_their_backbone_runs(context: Context):
    """Random weights stand for trained ones only where every model does the work of its kind."""
    measured = rows_main.large_speed(context, hidden_size=64, num_hidden_layers=1, new_tokens=16, repeats=1)
    steps = {name: values["backbone_steps_per_token"] for name, values in measured.details.items()}
    assert steps == {"teacher": 1, "student": 2 / 16, "parallel student": 2 / 16}
    # a teacher of one layer is nothing to win against
    assert not measured.passed and "parallel student" in measured.figure


# -- the codec


def books(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Real text where the rows look for the shared data."""
    with open(torch.__file__) as source:
        text = source.read()
    for name, part in (("train", text[:60_000]), ("valid", text[60_000:80_000])):
        (folder / "books" / name).mkdir(parents=True)
        (folder / "books" / name / "text.txt").write_text(part)
    monkeypatch.setenv("LATENTFORGE_DATA", str(folder))
    return folder


def test_books_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Whoever measures on another machine must learn what to set."""
    monkeypatch.setenv("LATENTFORGE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="books is not there: set LATENTFORGE_DATA to the folder that holds"):
        rows_main.books()


def test_the_books_codec_needs_its_accuracy_within_its_minutes(
    context: Context, codec: LatentForgeAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A codec that had an hour, or that forgets words, is not the one that is promised."""
    books(tmp_path / "data", monkeypatch)
    output = context.work_dir / "autoencoder"
    (context.work_dir / "code").write_text(training_code())

    def measure(codec: LatentForgeAutoencoder, *seconds: float) -> Any:
        codec.save_pretrained(output)
        log = [{"loss": 1.0}, *({"train_runtime": each} for each in seconds)]
        (output / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        return rows_main.books_codec(context, vocab_size=300, max_eval_tokens=4096)

    measured = measure(codec, 1200.0)
    assert measured.passed and measured.figure.endswith("after 20.0 minutes"), measured.figure
    assert not measure(codec, 600.0, 660.0).passed
    torch.manual_seed(0)
    untrained = measure(LatentForgeAutoencoder(codec.config).eval(), 1200.0)
    assert not untrained.passed and untrained.details["token_accuracy"] < 0.5


# -- losses


def test_a_command_that_fails_tells_its_last_words():
    """ "Ended with 1" sends a person to run it again by hand."""
    assert rows_main.run_or_tell([sys.executable, "-c", "print(1)"]) == "1\n"
    with pytest.raises(RuntimeError, match=r"ended with 3: said\s+no corpus"):
        rows_main.run_or_tell(
            [sys.executable, "-c", "import sys; print('said'); print('no corpus', file=sys.stderr); sys.exit(3)"]
        )


@pytest.mark.slow
def test_the_loss_is_measured_in_a_process_of_its_own(context: Context):
    """What the suite has used before would count as the loss's, or hide it."""
    measured = rows_main.loss_memory(context, tokens=1024, vocab_size=2048)
    gigabytes, error = measured.figure.split(" GB; gradients differ by ")
    assert measured.passed and 0 <= float(gigabytes) < 0.5 and float(error.split()[0]) < 1e-4


def test_a_loss_of_other_gradients_is_found(monkeypatch: pytest.MonkeyPatch):
    """A cheap loss with wrong gradients trains a worse model, quietly."""
    assert rows_main.loss_gradient_error(512) < 1e-4
    right = rows_main.token_loss
    monkeypatch.setattr(rows_main, "token_loss", lambda *given: [1.01 * right(*given)[0]])
    assert rows_main.loss_gradient_error(512) == pytest.approx(0.01, rel=0.1)


def test_kd_is_zero_only_where_teacher_and_student_agree_at_every_place(
    context: Context, monkeypatch: pytest.MonkeyPatch
):
    """A loss that is zero for a shifted signal too would teach nothing, and pass."""
    assert rows_main.kd_zero(context).passed

    class Shifted(HFTeacher):
        def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
            return super().signal(input_ids.roll(1, 1), attention_mask)

    monkeypatch.setattr(rows_main, "HFTeacher", Shifted)
    assert not rows_main.kd_zero(context).passed


# -- exactness


def looks_ahead(model: Any) -> Any:
    def add_the_future(module: nn.Module, args: Any, output: Any) -> Any:
        output.logits = output.logits + output.logits.flip(1)
        return output

    model.register_forward_hook(add_the_future)
    return model


def overlooks_a_token(model: Any) -> Any:
    def hide(module: nn.Module, args: Any) -> Any:
        ids = args[0].clone()
        ids[:, 7] = 0
        return (ids,)

    model.register_forward_pre_hook(hide)
    return model


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (None, "exact for every pair"),
        (looks_ahead, "regression x autoregressive at 23"),
        (overlooks_a_token, "energy x parallel is blind to 7"),
    ],
)
def test_causality_names_the_pair_and_place_where_it_breaks(
    context: Context, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], Any] | None, said: str
):
    """A student that sees its answer scores as no model can, and writes nonsense."""
    if fault is not None:
        build = rows_main._tiny
        monkeypatch.setattr(rows_main, "_tiny", lambda *given: fault(build(*given)))
    measured = rows_main.causality(context)
    assert measured.passed == (fault is None) and said in measured.figure


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache loses what the decoder's convolution has seen."""
    step = LatentForgeShortConvolution.step
    monkeypatch.setattr(LatentForgeShortConvolution, "step", lambda self, x, recent: step(self, x, 0 * recent))


def test_equalities_hold_for_models_as_built_and_for_the_demo_s(
    context: Context, demo: Path, monkeypatch: pytest.MonkeyPatch
):
    """Tokens that depend on the batch they were written in cannot be reproduced by anybody."""
    monkeypatch.setattr(rows_main, "PAIRS", [("regression", "autoregressive")])
    measured = rows_main.equalities(context, texts=1)
    assert measured.passed, measured.figure
    assert set(measured.details["built"]["fp64"]) == {"cached", "left-padded", "save and load", "log-probabilities"}
    assert max(measured.details["trained"]["fp32"].values()) <= 1e-5 and "greedy ids equal" in measured.figure
    forget(monkeypatch)
    monkeypatch.setattr(rows_main, "DTYPES", rows_main.DTYPES[1:])
    broken = rows_main.equalities(context, texts=0)
    assert not broken.passed and broken.details["trained"]["fp64"]["cached"] > 1e-3


def test_equalities_at_large_weights_are_held_against_plain_llama_s(context: Context, monkeypatch: pytest.MonkeyPatch):
    """Where rounding grows in every model, a fixed limit would blame ours, or be too wide to find a fault."""
    monkeypatch.setattr(rows_main, "PAIRS", [("regression", "autoregressive")])
    measured = rows_main.equalities_large(context, texts=1)
    assert measured.passed and 0 < measured.details["llama"] < 1e-3, measured.figure
    forget(monkeypatch)
    broken = rows_main.equalities_large(context, texts=1)
    assert not broken.passed and broken.details["fp64"]["cached"] > 1e-3


# -- the student's quality: runs whose figures are known

RATES = (1e-3, 2e-3, 4e-3, 8e-3)


@pytest.fixture
def keep(context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Keeps figures of runs as if they were trained."""
    books(tmp_path / "data", monkeypatch)
    monkeypatch.setattr(rows_main, "RECORDS", tmp_path / "records")
    table = rows_main.books_table(context)

    def keep(runs: list[Run], **figures: Any) -> None:
        for run in runs:
            path = tmp_path / "records" / table.work_dir.name / f"{table.name(run)}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"code": training_code(), "nll_choice": figures["nll"], **figures}))

    return keep


def keep_grid(keep: Callable[..., None], best_rate: float, token_lm: float, student: float) -> None:
    """Token LMs and students of every rate and seed; those that learn from KD are 0.02 better."""
    kd = {"ce_weight": 0.5, "kd_weight": 0.5}
    for rate in RATES:
        worse = 0.1 * abs(math.log2(rate / best_rate))
        for seed in (0, 1):
            keep([Run("token_lm", rate, seed)], nll=token_lm + worse + 0.01 * seed)
            untaught = Run("student", rate, seed, 4, rows_main.STUDENT)
            keep([untaught], nll=student + 0.02 + worse + 0.01 * seed)
            taught = [
                Run("student", rate, seed, 4, rows_main.STUDENT, kd, Run("token_lm", teacher)) for teacher in RATES
            ]
            keep(taught, nll=student + worse + 0.01 * seed)
        whole = {"num_decoder_layers": 4, "decoder_window": 512, "decoder_memory": "none"}
        keep([Run("decoder_alone", rate, student={**rows_main.STUDENT, **whole})], nll=token_lm - 0.1)


@pytest.mark.parametrize(("limit", "passed"), [(0.05, True), (0.03, False)])
def test_a_student_is_compared_at_the_best_rates_of_both_sides(
    context: Context, keep: Callable[..., None], limit: float, passed: bool
):
    """A token LM at a bad rate loses to anything."""
    keep_grid(keep, best_rate=2e-3, token_lm=3.5, student=3.54)
    measured = rows_main.student_against_token_lm(4, limit)(context)
    assert measured.passed == passed
    assert measured.figure == (
        "+0.040 nats/token with KD, +0.060 without (token LM 3.505; one with the decoder's convolution 3.400, seed 0)"
    )
    assert measured.details["student_kd"]["nll"] == pytest.approx([3.54, 3.55])
    assert measured.details["token_lm"]["learning_rate"] == 2e-3


def test_a_best_rate_at_the_edge_of_the_grid_is_said(context: Context, keep: Callable[..., None]):
    """Whoever reads the gap must know that a better rate may lie beyond."""
    keep_grid(keep, best_rate=8e-3, token_lm=3.5, student=3.54)
    measured = rows_main.student_against_token_lm(4, 0.05)(context)
    assert measured.figure.endswith("; best rate at the grid's edge: token LM, student")
    assert measured.details["token_lm"]["learning_rate"] == measured.details["student_kd"]["learning_rate"] == 8e-3


@pytest.mark.parametrize(
    ("student", "alone", "shuffled", "passed"),
    [
        (2.6, 3.0, 3.1, True),
        (2.8, 3.0, 3.5, False),  # too little of it reaches the student
        (2.51, 2.58, 3.0, False),  # there is nothing worth sharing
        (2.6, 3.0, 2.9, False),  # another document's latents do nearly as well
    ],
)
def test_the_context_s_share_needs_worth_and_latents_of_the_right_text(
    context: Context, keep: Callable[..., None], student: float, alone: float, shuffled: float, passed: bool
):
    """A share of nothing is a hundred per cent, and a student that ignores its latents can look well."""
    by_context = {"1-15": 4.0}
    keep([Run("token_lm", rate) for rate in RATES], nll=2.5, nll_by_context=by_context)
    keep([Run("decoder_alone", rate, 0, 4, rows_main.STUDENT) for rate in RATES], nll=alone, nll_by_context=by_context)
    keep(
        [Run("student", 8e-3, 0, 4, rows_main.STUDENT)], nll=student, nll_by_context=by_context, nll_shuffled=shuffled
    )
    measured = rows_main.context_share(4, 0.6)(context)
    assert measured.passed == passed
    share = (alone - student) / (alone - 2.5)
    assert measured.figure.startswith(f"{share:.0%} of {alone - 2.5:.3f} nats; shuffled latents cost ")
    assert measured.details["shuffled_costs"] == pytest.approx(shuffled - student)
    assert measured.details["student"] == by_context


# -- the tests


@pytest.mark.slow
def test_the_row_of_the_tests_reads_time_and_coverage_of_both_packages(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Coverage of one package only, or of a suite that failed, is a figure about nothing."""
    root = tmp_path / "root"
    for package in ("modeling_latentforge", "trainers"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("def used():\n    return 1\n")
    test = "import modeling_latentforge, trainers\n\n\ndef test_a():\n    assert modeling_latentforge.used()"
    (root / "test_it.py").write_text(f"{test} + trainers.used() == 2\n")
    monkeypatch.setattr(rows_main, "ROOT", root)
    measured = rows_main.tests(context)
    assert measured.passed and " minutes, coverage 100 % (1 passed in " in measured.figure
    (root / "test_it.py").write_text(f"{test} == 1\n")  # one of four lines is not run
    measured = rows_main.tests(context)
    assert not measured.passed and "coverage 75 %" in measured.figure
