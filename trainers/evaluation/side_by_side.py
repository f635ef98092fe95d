"""Token language models, students and bare decoders, trained on the same blocks and judged on the same held-out ones.

    tokens (B, T) -> token LM        full context, a position per token
                  -> student         the same backbone over patches, and its decoder
                  -> decoder alone   that decoder, nothing from before its window

A run is kept under the hash of everything that shapes it, so a table can be filled over several sessions; its figures
are kept once more as a small file of `records_dir`, which belongs to the repository: what one machine measured, the
next need not train again.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from transformers.trainer_utils import set_seed

from modeling_latentforge import (
    LatentForgeAutoencoder,
    LatentForgeAutoencoderConfig,
    LatentForgeConfig,
    LatentForgeForCausalLM,
)

from ..ae_config import AEConfig
from ..ae_trainer import AETrainer
from ..checkpoints import last_checkpoint
from ..data import DataArguments, PatchCollator, load_blocks, load_texts
from ..kd_config import KDConfig
from ..kd_trainer import KDTrainer
from ..teachers.base import SparseSignal
from ..teachers.hf_teacher import HFTeacher
from ..teachers.sparse import SparseTeacher
from ..token_lm import GRANITE, TokenLMConfig, TokenLMTrainer, build_token_lm
from ..tokenizer import train_tokenizer
from .likelihood import divergence_from_teacher


RECORDS = Path(__file__).parent.parent.parent / "docs" / "runs"

# The student of every comparison, as the tables of docs/experiments.md chose it; its decoder is as wide as the
# backbone. Most tables are older than the lookup, which token LMs could have as well: rows that are about it say so.
STUDENT = {
    "decoder_type": "autoregressive",
    "num_decoder_layers": 1,
    "decoder_memory": "patches",
    "decoder_lookup": 0,
}

STUDENT_DEFAULTS = {
    name: default
    for name in LatentForgeConfig.__annotations__
    if isinstance(default := getattr(LatentForgeConfig, name), (str, int, float))
}

# Context lengths, in tokens before the predicted one, at whose upper ends NLL is reported.
CONTEXT_EDGES = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)


class DecoderAlone(LatentForgeForCausalLM):
    """A student whose patches all read the learned start: what its decoder knows from its window only."""

    _auto_class = None  # lives here only: its source must not be saved beside the weights

    def _conditions(self, grid, cache, use_cache, latents=None):
        num_patches = grid.input_ids.shape[1] // self.config.patch_size
        return self.model.start.expand(grid.input_ids.shape[0], num_patches + 1, -1), None


class RenormalisedTeacher(SparseTeacher):
    """What not to do, for comparison only: the stored ids are taken for all there is."""

    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SparseSignal:
        signal = super().signal(input_ids, attention_mask)
        signal.top_logprobs = signal.top_logprobs.log_softmax(-1)
        return signal


KINDS = ("token_lm", "student", "decoder_alone")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        kind: `token_lm`, `student` or `decoder_alone`.
        learning_rate: peak, cosine to a tenth, 5 % warm-up.
        seed: of weights and data order.
        patch_size: of the student.
        student: fields of `LatentForgeConfig`, and `backbone`, arguments of `build_token_lm` where its backbone is not
            the comparison's; of a token LM, arguments of `build_token_lm`.
        weights: fields of `KDConfig` (`ce_weight`, ...).
        teacher: the token LM that teaches, or None.
        signal: what of the teacher's distributions the student learns from, arguments of `SparseTeacher`; with
            `renormalised`, as if nothing else existed. Empty: all of them.
        autoencoder: directory of a trained codec, or None: an untrained one, for students that never read it.
    """

    kind: str
    learning_rate: float
    seed: int = 0
    patch_size: int = 8
    student: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)
    teacher: "Run | None" = None
    autoencoder: str | None = None
    signal: dict[str, Any] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(json.dumps(asdict(self), sort_keys=True))

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}: take one of {', '.join(KINDS)}")


@dataclass
class SideBySide:
    """The text, the backbone and the budget that all runs of a comparison share.

    Attributes:
        work_dir: runs, tokenizer and results.
        data, eval_data: as in `DataArguments`.
        vocab_size: of the byte-level BPE that is trained on `data`.
        num_tokens: training tokens per run; blocks repeat where the text is shorter.
        block_size, tokens_per_step: tokens.
        phase_size: documents begin at 0 .. phase_size - 1 pads; a multiple of every run's patch size, so that
            all read the same blocks.
        eval_tokens: held-out tokens: half of the rows choose between runs, the other half are reported.
        hidden_size, num_hidden_layers: of the Llama-shaped backbone; heads of 64, MLP of 8/3. The token LM is
            Granite-shaped: the same layers, with a factor on its embeddings.
        codec_steps: of 4096 tokens, where a run reads a trained codec.
        bf16: train in bf16 autocast (weights, optimizer and losses stay fp32); judged in fp32 either way.
        say: takes a line of progress.
        records_dir: figures of finished runs, in git; None: only `work_dir` counts.
        fresh: delete what was kept of this comparison first.
    """

    work_dir: Path
    data: str
    eval_data: str | None
    vocab_size: int
    num_tokens: int
    block_size: int = 512
    tokens_per_step: int = 8192
    phase_size: int = 8
    eval_tokens: int = 2**18
    hidden_size: int = 256
    num_hidden_layers: int = 4
    codec_steps: int = 500
    bf16: bool = True
    say: Callable[[str], None] = print
    records_dir: Path | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        own = ("work_dir", "say", "records_dir", "fresh")
        shared = {name: value for name, value in vars(self).items() if name not in own}
        self.fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("say", "fresh")}
        # where the text lies on this machine shapes nothing
        shared["data"], shared["eval_data"] = (_without_root(path) for path in (self.data, self.eval_data))
        self.shared = shared
        # tokenizer, codec and runs of another text or budget lie elsewhere
        self.work_dir = Path(self.work_dir) / _hash(shared)
        if self.fresh:
            shutil.rmtree(self.work_dir, ignore_errors=True)
            if self.records_dir is not None:
                shutil.rmtree(Path(self.records_dir) / self.work_dir.name, ignore_errors=True)
        self.work_dir.mkdir(parents=True, exist_ok=True)
        self._of_other_code: dict[str, bool] = {}
        training_code()  # files may change while a long table trains
        self._blocks: tuple[Any, Any] | None = None
        self._tokenizer: Any = None

    # -- what all runs share

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            path = self.work_dir / "tokenizer"
            if not (path / "tokenizer.json").exists():
                train_texts, _ = load_texts(DataArguments(data=self.data, eval_data=self.eval_data))
                train_tokenizer(train_texts, self.vocab_size).save_pretrained(path)
            self._tokenizer = AutoTokenizer.from_pretrained(path)
        return self._tokenizer

    def blocks(self) -> tuple[Any, Any]:
        """(training, held-out) blocks."""
        if self._blocks is None:
            arguments = DataArguments(
                data=self.data,
                eval_data=self.eval_data,
                block_size=self.block_size,
                max_train_tokens=self.num_tokens,
                max_eval_tokens=self.eval_tokens,
            )
            self._blocks = load_blocks(arguments, self.tokenizer, self.phase_size, seed=0)
        return self._blocks

    def name(self, run: Run) -> str:
        """Short name of a run, unique to everything that shapes it."""
        return f"{run.kind}-{_hash(_naming(self._portable(run)))}"

    def _portable(self, run: Run) -> dict[str, Any]:
        codec = run.autoencoder and Path(run.autoencoder).name  # it lies in `work_dir`
        # what a run leaves open is part of what it was: a new default makes a new run
        defaults = GRANITE if run.kind == "token_lm" else STUDENT_DEFAULTS
        teacher = run.teacher and self._portable(run.teacher)
        return asdict(run) | {"autoencoder": codec, "student": {**defaults, **run.student}, "teacher": teacher}

    def provenance(self) -> str:
        """What a figure made of these runs must say about them, to be put behind it."""
        old = sum(self._of_other_code.values())
        return (
            f"; {old} of {len(self._of_other_code)} runs were trained by an earlier state of the code" if old else ""
        )

    def codec(self, patch_size: int) -> str:
        """Directory of a codec of `latent_size` 32 K, trained once, on this text."""
        path = self.work_dir / f"codec-{patch_size}"
        if not path.exists():
            self.say(f"codec of patch size {patch_size}")
            set_seed(0)
            codec = LatentForgeAutoencoder(self._codec_config(patch_size, hidden_size=256, intermediate_size=768))
            arguments = AEConfig(
                output_dir=str(self.work_dir / "codec-trainer"),
                per_device_train_batch_size=4096 // self.block_size,
                max_steps=self.codec_steps,
                learning_rate=3e-3,
                lr_scheduler_type="cosine",
                warmup_steps=20,
                save_strategy="no",
                logging_steps=50,
                disable_tqdm=True,
                report_to="none",
            )
            AETrainer(
                codec, arguments, train_dataset=self.blocks()[0], data_collator=PatchCollator(patch_size)
            ).train()
            codec.save_pretrained(path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return str(path)

    def _codec_config(self, patch_size: int, **sizes: int) -> LatentForgeAutoencoderConfig:
        return LatentForgeAutoencoderConfig(
            vocab_size=len(self.tokenizer),
            patch_size=patch_size,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **sizes,
        )

    # -- one run

    def result(self, run: Run) -> dict[str, Any]:
        """Train (or resume, or just read) a run: `nll` (nats/token, held-out), `nll_by_context`, `seconds`, and of a
        student `nll_shuffled`, with the contexts of other documents, and `kl_to_teacher` where it had one."""
        known = self._known(run)
        if known is not None:
            return known
        folder = self.work_dir / self.name(run)
        self.say(
            f"{self.name(run)}: {run.kind} K={run.patch_size} lr={run.learning_rate:g} seed={run.seed} {run.student}"
        )
        if not (folder / "model").exists():
            self._train(run, folder)
        model = self._load(run)
        result = self.judge(model)
        if run.kind == "student":
            with shuffled_context(model):
                result["nll_shuffled"] = self.judge(model)["nll"]
            if run.teacher is not None and not model.is_aligned:  # whose logits are no distribution of its own
                result["kl_to_teacher"] = self.kl_to_teacher(model, run.teacher)
        result |= {"run": self._portable(run), "shared": self.shared, "code": training_code()}
        result["seconds"] = json.loads((folder / "seconds.json").read_text())
        for path in self._result_files(run):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
        self._of_other_code[self.name(run)] = False
        self.say(f"{self.name(run)}: {result['nll']:.4f} nats/token, {result['seconds']:.0f} s")
        return result

    def _result_files(self, run: Run) -> list[Path]:
        files = [self.work_dir / self.name(run) / "result.json"]
        if self.records_dir is not None:
            files.append(Path(self.records_dir) / self.work_dir.name / f"{self.name(run)}.json")
        return files

    def knows(self, run: Run) -> bool:
        """Whether the run's figures are kept."""
        return self._known(run) is not None

    def _known(self, run: Run) -> dict[str, Any] | None:
        for path in self._result_files(run):
            if path.exists():
                result = json.loads(path.read_text())
                self._of_other_code[self.name(run)] = result["code"] != training_code()
                return result
        return None

    def results(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """[`result`] of several runs.

        Those to be trained share the cores, one process and one thread each: models this small waste a second thread
        (measured: two runs at once train 1.45 times as many tokens a second).
        """
        missing = [run for run in dict.fromkeys(runs) if self._known(run) is None]
        teachers = {run.teacher for run in missing if run.teacher is not None}
        for teacher in teachers:
            self.load(teacher)  # once, not in every process
        workers = min(len(missing), os.cpu_count() or 1)
        if workers > 1 and not torch.accelerator.is_available():
            self.blocks()
            for run in missing:
                self.say(f"{self.name(run)}: {run}")
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _use_one_thread) as pool:
                for result in pool.map(_result, [self.fields] * len(missing), missing):
                    self.say(f"{result['nll']:.4f} nats/token, {result['seconds']:.0f} s: {result['run']}")
        return [self.result(run) for run in runs]

    def best(self, runs: Sequence[Run]) -> Run:
        """The run with the lowest NLL on the rows that choose, which no figure reports."""
        self.results(runs)
        return min(runs, key=lambda run: self.result(run)["nll_choice"])

    def load(self, run: Run) -> Any:
        """The trained model of a run; where only its figures came with the repository, it is trained again."""
        folder = self.work_dir / self.name(run)
        if not (folder / "model").exists():
            self._train(run, folder)
        return self._load(run)

    def _load(self, run: Run) -> Any:
        auto = {"token_lm": AutoModelForCausalLM, "student": LatentForgeForCausalLM, "decoder_alone": DecoderAlone}
        return auto[run.kind].from_pretrained(self.work_dir / self.name(run) / "model").eval()

    def build(self, run: Run) -> Any:
        """The untrained model of a run."""
        set_seed(run.seed)
        sizes: dict[str, Any] = {"hidden_size": self.hidden_size, "num_hidden_layers": self.num_hidden_layers}
        if run.kind == "token_lm":
            # the factor on the embeddings that the student has too: without it the baseline is 0.8 nats weaker at 1 M
            # tokens
            options = {"architecture": "granite", **sizes, **run.student}
            return build_token_lm(tokenizer=self.tokenizer, **options)
        fields = dict(run.student)
        sizes |= fields.pop("backbone", {})
        backbone_config = build_token_lm("llama", self.tokenizer, **sizes).config
        if run.autoencoder is None:
            autoencoder = LatentForgeAutoencoder(
                self._codec_config(run.patch_size, hidden_size=32, intermediate_size=32)
            )
        else:
            autoencoder = LatentForgeAutoencoder.from_pretrained(run.autoencoder)
        kind = DecoderAlone if run.kind == "decoder_alone" else LatentForgeForCausalLM
        set_seed(run.seed)
        return kind.from_autoencoder(autoencoder, backbone_config, **fields)

    def _train(self, run: Run, folder: Path) -> None:
        train_blocks, _ = self.blocks()
        steps = self.num_tokens // self.tokens_per_step
        rows = max(1, min(2048, self.tokens_per_step) // self.block_size)
        output_dir = str(folder / "trainer")
        arguments: dict[str, Any] = {
            "output_dir": output_dir,
            # the activations of 2048 tokens stay near the caches: up to 15 % faster than all rows at once (measured)
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": self.tokens_per_step // (rows * self.block_size),
            "bf16": self.bf16,
            "max_steps": steps,
            "learning_rate": run.learning_rate,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": max(1, steps // 20),
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "seed": run.seed,
            "data_seed": run.seed,
            "logging_steps": 50,
            "save_steps": max(1, steps // 5),
            "save_total_limit": 1,
            "disable_tqdm": True,
            "report_to": "none",
        }
        model = self.build(run)
        clock = _Clock(folder / "seconds.json")
        common = {"model": model, "train_dataset": train_blocks, "callbacks": [clock]}
        if run.kind == "token_lm":
            trainer: Trainer = TokenLMTrainer(
                args=TokenLMConfig(**arguments), data_collator=PatchCollator(1), **common
            )
        else:
            teacher: Any = None
            if run.teacher is not None:
                self.load(run.teacher)
                dtype = torch.bfloat16 if self.bf16 else None  # of the teacher's weights
                teacher = HFTeacher(str(self.work_dir / self.name(run.teacher) / "model"), self.tokenizer, dtype)
                if run.signal:
                    options = dict(run.signal)
                    kind = RenormalisedTeacher if options.pop("renormalised", False) else SparseTeacher
                    teacher = kind(teacher, seed=run.seed, **options)
            trainer = KDTrainer(
                args=KDConfig(**arguments, **run.weights),
                data_collator=PatchCollator(run.patch_size),
                teacher=teacher,
                **common,
            )
        trainer.train(resume_from_checkpoint=last_checkpoint(output_dir))
        model.save_pretrained(folder / "model.part")
        (folder / "model.part").rename(folder / "model")
        shutil.rmtree(output_dir)

    # -- judging

    def judge(self, model: nn.Module) -> dict[str, Any]:
        """Held-out NLL in nats per token: `nll` and `nll_by_context` (tokens between the block's start and the
        predicted one) of every second row, `nll_choice` of the others."""
        sums, counts = torch.zeros(2, self.block_size - 1), torch.zeros(2, self.block_size - 1)
        for batch in self.eval_batches():
            nll, valid = token_nll(model, batch)
            for half in (0, 1):
                sums[half] += nll[half::2].sum(0)
                counts[half] += valid[half::2].sum(0)
        choice = float(sums[1].sum() / counts[1].sum())
        sums, counts = sums[0], counts[0]
        by_context = {}
        for low, high in zip(CONTEXT_EDGES, CONTEXT_EDGES[1:], strict=False):
            if low < self.block_size:
                part = slice(low - 1, high - 1)
                by_context[f"{low}-{min(high, self.block_size) - 1}"] = float(sums[part].sum() / counts[part].sum())
        return {
            "nll": float(sums.sum() / counts.sum()),
            "nll_choice": choice,
            "nll_by_context": by_context,
            "eval_tokens": int(counts.sum()),
        }

    def kl_to_teacher(self, model: Any, teacher: Run) -> float:
        """KL(teacher || student) in nats per token, of the rows whose NLL is reported."""

        def reported() -> Iterator[dict[str, torch.Tensor]]:
            for batch in self.eval_batches():
                yield {name: values[::2] for name, values in batch.items()}

        return divergence_from_teacher(model, HFTeacher(self.load(teacher), self.tokenizer), reported())

    def eval_batches(self, rows: int = 16) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of held-out blocks that lie far apart in the corpus, so that no two rows are of one document."""
        _, held_out = self.blocks()
        stride = -(-len(held_out) // rows)
        collate = PatchCollator(self.phase_size)
        for start in range(stride):
            yield collate([held_out[i] for i in range(start, len(held_out), stride)])


@torch.no_grad()
def token_nll(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL `(B, T - 1)` of each predicted token, zero where its label is -100, and the mask of the others."""
    model.eval()
    batch = {name: values.to(next(model.parameters()).device) for name, values in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[
        :, :-1
    ]
    targets = batch["labels"][:, 1:]
    nll = nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return nll.cpu(), (targets != -100).cpu()


@contextmanager
def shuffled_context(model: LatentForgeForCausalLM) -> Iterator[None]:
    """Within, each row of a batch reads the conditions (latents and memory) of the row before it."""
    original = model._conditions

    def shuffled(*args: Any) -> Any:
        conditions, patch_mask = original(*args)
        return conditions.roll(1, dims=0), patch_mask

    model._conditions = shuffled  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del model._conditions


@cache
def training_code() -> str:
    """Hash of the code that shapes a trained model, as it was when first asked."""
    trainers = Path(__file__).parent.parent
    folders = (trainers.parent / "modeling_latentforge", trainers, trainers / "losses", trainers / "teachers")
    return _hash([file.read_text(encoding="utf-8") for folder in folders for file in sorted(folder.glob("*.py"))])


def _naming(fields: dict[str, Any]) -> dict[str, Any]:
    """Of `_portable`, what names a run: those from before there was a choice keep their names."""
    fields = fields | {"student": dict(fields["student"]), "teacher": fields["teacher"] and _naming(fields["teacher"])}
    if not fields["signal"]:
        del fields["signal"]
    if not fields["student"].get("decoder_lookup") or fields["student"].get("decoder_type") == "parallel":
        fields["student"].pop("decoder_lookup", None)
    return fields


def _without_root(path: str | None) -> str | None:
    return "/".join(Path(path).parts[-2:]) if path and Path(path).is_absolute() else path


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _result(fields: dict[str, Any], run: Run) -> dict[str, Any]:
    return SideBySide(**fields, say=_silent).result(run)


def _silent(line: str) -> None:
    pass


class _Clock(TrainerCallback):
    """Seconds of training, summed over resumed parts."""

    def __init__(self, path: Path):
        self.path = path
        self.before = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = json.loads(self.path.read_text()) if state.global_step and self.path.exists() else 0.0
        self.start = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self.path.write_text(json.dumps(self.before + time.perf_counter() - self.start))

    on_train_end = on_save
