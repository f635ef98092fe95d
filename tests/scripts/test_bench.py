"""`scripts/bench.py` on real, tiny models: what its tables hold, what it keeps, what it refuses."""

import functools
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM
from scripts.bench import BenchArguments, main
from tests.conftest import tiny_autoencoder
from tests.scripts.test_infer import make_tokenizer
from trainers.evaluation import benchmark


ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = ["def main():", "class Shape:", "    return first"]
QUICK = ["--new_tokens", "4", "--repeats", "2", "--device", "cpu"]
TINY = [
    *("--hidden_size", "32", "--num_hidden_layers", "2", "--vocab_size", "300", "--codec_hidden_size", "32"),
    *("--patch_size", "4", "2", "--decoder", "1x16", "2x32"),
]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def run(folder: Path, *argv: str) -> tuple[dict, str, str]:
    """The JSON, standard output and standard error of one call."""
    out, err = StringIO(), StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        path = main([*argv, *QUICK, "--output_dir", str(folder)])
    return json.loads(path.read_text(encoding="utf-8")), out.getvalue(), err.getvalue()


def table(text: str, title: str) -> list[list[str]]:
    """Cells of the lines of one printed table, the header's first."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token LM and three students of one tokenizer, saved; and prompts."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=64)
    codec = LatentForgeAutoencoder(
        LatentForgeAutoencoderConfig(
            vocab_size=len(tokenizer), patch_size=4, latent_size=16, hidden_size=32, intermediate_size=64
        )
    )
    models = {"teacher": LlamaForCausalLM(backbone)}
    for name, fields in {
        "student": {},
        "student_parallel": {"decoder_type": "parallel"},
        "student_energy": {"decoder_type": "parallel", "head_config": {"head_type": "energy"}},
    }.items():
        models[name] = LatentForgeForCausalLM.from_autoencoder(codec, backbone, **fields)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def of_trained(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, str]:
    names = ("student", "student_parallel", "student_energy")
    models = [str(trained / name) for name in names]
    flags = ["--prompts_file", str(trained / "prompts.txt"), "--batch_sizes", "1", "4", "--prompt_lengths", "8"]
    tables = ["decode", "overhead", "memory", "sampling", "drafting"]
    folder = tmp_path_factory.mktemp("results")
    return run(folder, "--model", *models, "--baseline", str(trained / "teacher"), *flags, "--tables", *tables)


@pytest.fixture(scope="module")
def of_random(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, str, str]:
    grid = ["--batch_sizes", "1", "2", "--prompt_lengths", "4", "8"]
    return run(tmp_path_factory.mktemp("results"), *TINY, *grid, "--tables", "decode", "overhead", "memory")


RANDOM_MODELS = [
    "token LM",
    "token LM, layers: 1",
    *(f"K={size} {name}" for size in (4, 2) for name in ("parallel", "autoregressive 1x16", "autoregressive 2x32")),
]


def test_random_weights_fill_every_setting_of_every_model(of_random: tuple[dict, str, str]):
    """A cell that is silently missing reads as one that nobody asked for."""
    report, text, _ = of_random
    assert list(report["tables"]) == ["decode", "overhead", "memory"] and report["finished"]
    rows = [row for row in report["tables"]["decode"] if "not_measured" not in row]
    found = [(row["batch"], row["prompt"], row["model"]) for row in rows]
    assert found == [(batch, prompt, name) for batch in (1, 2) for prompt in (4, 8) for name in RANDOM_MODELS]
    for row in rows:
        assert len(row["runs"]) == 2 and row["device"] == "cpu"
        assert row["times_token_lm"] == pytest.approx(1) or row["model"] != "token LM"
    for name in ("overhead", "memory"):
        assert [row["model"] for row in report["tables"][name] if "not_measured" not in row] == RANDOM_MODELS
    assert report["models"]["K=4 autoregressive 2x32"]["num_decoder_layers"] == 2
    assert report["samples"] == [] and "Samples" not in text


def test_a_student_s_steps_are_one_a_patch_in_the_table(of_random: tuple[dict, str, str]):
    """The count explains the speed: without it a fast machine and a fast model look alike."""
    rows = table(of_random[1], "Decoding")
    steps = rows[0].index("backbone steps a token")
    # five tokens: the prompt's step and, of K = 4, one patch; of K = 2, two
    wanted = {"token LM": "1", "K=4": "0.4", "K=2": "0.6"}
    for row in rows[1:-1]:
        assert row[steps] == next(count for name, count in wanted.items() if row[3].startswith(name)), row


def test_every_time_stands_with_median_and_range(of_random: tuple[dict, str, str]):
    """A median alone hides whether two figures differ at all."""
    spread = r"[\d.e+-]+ \(([\d.e+-]+)\.\.([\d.e+-]+)\)"
    for title, columns in {
        "Decoding": ["tokens/s", "ms a token", "first token, ms"],
        "Loop overhead": ["% of the time", "us a token"],
    }.items():
        header, *rows = table(of_random[1], title)
        for row in rows[:-1]:
            for column in columns:
                found = re.fullmatch(spread, row[header.index(column)])
                assert found and float(found[1]) <= float(found[2]), (column, row)


def test_the_roofline_names_the_machine_s_rates_and_what_a_row_is_bound_by(trained: Path, tmp_path: Path):
    """A share of an unknown whole says nothing; a student beside its own teacher alone says nothing of smaller LMs."""
    LlamaForCausalLM.from_pretrained(trained / "teacher").save_pretrained(tmp_path / "small_lm")
    make_tokenizer().save_pretrained(tmp_path / "small_lm")
    models = [str(trained / "student"), str(tmp_path / "small_lm")]
    flags = ["--prompts_file", str(trained / "prompts.txt"), "--batch_sizes", "1", "2", "--tables", "roofline"]
    report, text, _ = run(tmp_path, "--model", *models, "--baseline", str(trained / "teacher"), *flags)
    rates, rows = report["rates"], [row for row in report["tables"]["roofline"] if "not_measured" not in row]
    assert rates["dtype"] == "float32" and rates["threads"] == torch.get_num_threads() and rates["matrix_rate"] > 0
    assert "This machine, cpu" in text and "GB/s" in text and "Gflop/s" in text
    names = ("teacher", "student", "small_lm")
    assert [(row["batch"], row["model"]) for row in rows] == [(batch, name) for batch in (1, 2) for name in names]
    for row in rows:
        assert row["matrix_rate"] == rates["matrix_rate"] and row["bandwidth"] in rates["bandwidth"].values()
        assert row["bound_by"] in ("memory", "matrices") and row["share"] > 0 and row["prompt_share"] > 0
    header, of_teacher, of_student, *_ = table(text, "Roofline")
    steps, share = header.index("tokens a backbone step"), header.index("% of that")
    assert (of_teacher[steps], of_student[steps]) == ("1", "4")
    assert re.fullmatch(r"[\d.e+-]+ \(.*\.\..*\)", of_teacher[share])
    assert "| 512 | not measured (517 tokens, teacher reads 64) |" in text
    assert "roofline" in BenchArguments().tables


@no_gpu
def test_a_gpu_that_is_not_there_is_said_not_to_be_measured(
    of_random: tuple[dict, str, str], of_trained: tuple[dict, str, str]
):
    """A table of CPU figures without a word about the GPU would be read as the whole answer."""
    for report, text, _ in (of_random, of_trained):
        assert text.count("not measured (no GPU)") == len(report["tables"])
        assert all(rows[-1] == {"device": "cuda", "not_measured": "no GPU"} for rows in report["tables"].values())


def test_the_json_says_what_the_figures_depend_on(of_random: tuple[dict, str, str]):
    """A figure without threads, dtype and versions cannot be compared with another."""
    report = of_random[0]
    assert {"python", "torch", "transformers"} <= set(report["versions"])
    assert report["machine"]["cpu"] and report["threads"] == torch.get_num_threads() and report["dtype"] == "float32"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", report["date"]) and "commit" in report
    assert report["arguments"]["hidden_size"] == 32 and report["device"] == "cpu"


def test_a_cache_of_patches_takes_at_most_one_kth_a_token(of_random: tuple[dict, str, str]):
    """Memory is the other half of what patches are for."""
    times = {row["model"]: row["times_less"] for row in of_random[0]["tables"]["memory"] if "model" in row}
    assert times["token LM"] == 1 and times["K=4 parallel"] == 4 and times["K=2 parallel"] == 2


def test_trained_models_continue_every_prompt_once(of_trained: tuple[dict, str, str]):
    """Samples that somebody chose, or that lack a model, sell it."""
    report, text, _ = of_trained
    assert [sample["prompt"] for sample in report["samples"]] == PROMPTS
    names = ["teacher", "student", "student_parallel", "student_energy"]
    for sample in report["samples"]:
        assert list(sample) == ["prompt", *names]
    assert text.split("## Samples")[1].count("student_parallel:") == len(PROMPTS)


def test_the_baseline_is_what_trained_models_are_compared_with(of_trained: tuple[dict, str, str]):
    """Of a comparison with the wrong model nothing shows it."""
    rows = {row["model"]: row for row in of_trained[0]["tables"]["decode"] if row.get("batch") == 4}
    assert rows["teacher"]["times_token_lm"] == 1 and rows["teacher"]["cache"] in ("dynamic", "static")
    for row in rows.values():
        ratio = row["tokens_per_second"] / rows["teacher"]["tokens_per_second"]
        assert row["times_token_lm"] == pytest.approx(ratio)


def test_sampling_and_drafting_tell_gain_and_work(of_trained: tuple[dict, str, str]):
    """Speed without the draws, or the accepted tokens, that it comes from cannot be explained."""
    report = of_trained[0]
    sampling = {row["sampler"]: row for row in report["tables"]["sampling"] if "model" in row}
    assert list(sampling) == ["plain", "exact", "batched", "CALM"] and sampling["CALM"]["draws"] == 200
    assert {row["model"] for row in sampling.values()} == {"student_energy"}
    drafting = {row["model"]: row for row in report["tables"]["drafting"] if "not_measured" not in row}
    assert list(drafting) == ["alone", "student", "student_parallel", "student_energy", "prompt lookup"]
    assert drafting["alone"]["tokens_per_teacher_step"] == 1
    assert all(row["equal"] == row["texts"] == len(PROMPTS) for row in drafting.values())


def test_progress_stands_on_standard_error_alone(of_random: tuple[dict, str, str]):
    """`bench.py > table.md` must hold the tables and nothing else."""
    _, out, err = of_random
    assert "decode: batch 2, prompt 8" in err and "overhead: K=4 parallel" in err
    assert "decode: batch" not in out and out.startswith("# Benchmark")


def test_what_is_measured_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Hours of figures lost to a key press are not measured again."""
    monkeypatch.setattr(benchmark, "memory_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    flags = ["--tables", "overhead", "memory", "--patch_size", "4", "--decoder", "1x16"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *TINY, *flags)
    (path,) = tmp_path.iterdir()  # and no half-written file
    assert re.fullmatch(r"bench_\d{8}_\d{6}\.json", path.name)
    report = json.loads(path.read_text(encoding="utf-8"))
    assert not report["finished"] and len(report["tables"]["overhead"]) >= 3 and "memory" not in report["tables"]


def test_default_prompts_beyond_a_context_are_left_out_and_said(trained: Path, tmp_path: Path):
    """The defaults must run on small models too, and a missing line must say why."""
    flags = ["--prompts_file", str(trained / "prompts.txt"), "--batch_sizes", "1", "--tables", "decode"]
    report, text, _ = run(
        tmp_path, "--model", str(trained / "student"), "--baseline", str(trained / "teacher"), *flags
    )
    assert {row["prompt"] for row in report["tables"]["decode"] if "model" in row} == {16}
    assert "| 512 | not measured (517 tokens, teacher reads 64) |" in text


def test_compiling_is_one_flag_and_changes_no_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A flag that is parsed and not handed on looks like one that does not help."""
    seen = []

    def compile_without_compiler(function, **options):
        seen.append(options)
        return torch_compile(function, **options, backend="eager")

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(torch_compile)(compile_without_compiler))
    flags = ["--patch_size", "4", "--decoder", "1x16", "--batch_sizes", "1", "--prompt_lengths", "8", "--compile"]
    report, text, _ = run(tmp_path, *TINY, *flags, "--tables", "decode", "overhead")
    assert len(seen) == 2 and not any("mode" in options for options in seen) and "decoder compiled" in text
    steps = {row["model"]: row.get("backbone_steps_per_token") for row in report["tables"]["decode"] if "model" in row}
    assert steps == {"token LM": 1, "token LM, layers: 1": 1, "K=4 parallel": 0.4, "K=4 autoregressive 1x16": 0.4}


def test_bfloat16_halves_the_cache(of_random: tuple[dict, str, str], tmp_path: Path):
    """A dtype that reaches only some of the models would compare unlike with unlike."""
    report, _, _ = run(tmp_path, *TINY, "--tables", "memory", "sampling", "--dtype", "bfloat16")
    for row, whole in zip(report["tables"]["memory"], of_random[0]["tables"]["memory"], strict=True):
        assert "not_measured" in row or row["bytes_per_token"] == whole["bytes_per_token"] / 2
    names = {row["model"] for row in report["tables"]["sampling"] if "model" in row}
    assert names == {"K=4 parallel, energy head", "K=2 parallel, energy head"}


def test_the_prompts_of_the_repository_are_a_few_and_fit(trained: Path):
    """`make bench` reads them as they are; a prompt that a small tokenizer cannot read would stop it."""
    prompts = [line for line in (ROOT / "prompts.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert 5 <= len(prompts) <= 8 and len(set(prompts)) == len(prompts)
    assert all(make_tokenizer()(prompt)["input_ids"] for prompt in prompts)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--tables", "decoding"), "unknown table 'decoding': known are decode, roofline, overhead, memory, sampling"),
        (("--tables", "drafting"), "the table drafting needs --model and --baseline"),
        (("--baseline", "x"), "a baseline needs a --model"),
        (("--dtype", "float16"), "dtype must be float32 or bfloat16, got 'float16'"),
        (("--repeats", "0"), "repeats must be at least 1, got 0"),
        (("--batch_sizes", "1", "0"), "batch_sizes must be at least 1, got [1, 0]"),
        (("--decoder", "512"), "a decoder is layers x width, as in 2x512, got '512'"),
        (("--model", "no/such/student"), "there is no folder no/such/student. Train a model with"),
        (
            ("--model", "m", "--trust_remote_code", "--baseline", "no/such/lm"),
            "baseline: there is no folder no/such/lm",
        ),
        (("--batchsizes", "1"), "did you mean --batch_sizes"),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_how_to_mend_it(
    flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture
):
    """A traceback after minutes of building models helps nobody."""
    with pytest.raises(SystemExit) as stop:
        main(list(flags))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and complaint in err and len(err.splitlines()) == 1


def refusal(*argv: str) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        main([*argv, "--device", "cpu"])
    message = str(error.value)
    assert "\n" not in message
    return message


def test_models_that_do_not_fit_are_refused_in_one_line(trained: Path, tmp_path: Path):
    """Tokens of two vocabularies are of different length: their rates compare nothing."""
    student, teacher = str(trained / "student"), str(trained / "teacher")
    prompts = ("--prompts_file", str(trained / "prompts.txt"))
    other = make_tokenizer()
    other.add_tokens(["one_more"])
    LlamaForCausalLM.from_pretrained(teacher).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    found = refusal("--model", student, "--baseline", str(tmp_path / "other"), *prompts)
    assert "has another vocabulary" in found and str(tmp_path / "other") in found
    tiny_autoencoder().save_pretrained(tmp_path / "codec")
    assert "is a codec" in refusal("--model", student, str(tmp_path / "codec"), *prompts)
    found = refusal(
        "--model", student, "--baseline", teacher, *prompts, "--prompt_lengths", "16", "60", "--new_tokens", "4"
    )
    assert "a prompt of 60" in found and "teacher reads 64" in found and "lower --prompt_lengths" in found
    assert "energy head" in refusal("--model", student, *prompts, "--tables", "sampling")


def test_prompts_that_are_missing_or_empty_are_refused(trained: Path, tmp_path: Path):
    """Timing on nothing would end deep inside torch."""
    (tmp_path / "empty.txt").write_text("\n  \n", encoding="utf-8")
    model = ("--model", str(trained / "student"))
    assert "holds no prompt: write one a line" in refusal(*model, "--prompts_file", str(tmp_path / "empty.txt"))
    assert "cannot read --prompts_file" in refusal(*model, "--prompts_file", str(tmp_path / "none.txt"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    """transformers' own message speaks of a Hub that nobody asked for."""
    with pytest.raises(SystemExit):
        main(["--model", str(tmp_path)])
    assert "holds no model: there is no config.json" in capsys.readouterr().err


@no_gpu
def test_a_gpu_that_is_asked_for_and_missing_is_refused():
    """Figures of a CPU under the name of a GPU would be worse than none."""
    with pytest.raises(ValueError, match="torch sees no GPU"):
        main([*TINY, "--device", "cuda"])
