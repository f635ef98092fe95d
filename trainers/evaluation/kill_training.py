"""Trainings that are killed at drawn moments, resumed, and compared with ones that were not.

    OMP_NUM_THREADS=1 python -m trainers.evaluation.kill_training FOLDER POINTS INSIDE SEED

POINTS and INSIDE are of each kind of trainer. A point is a line of FOLDER/points.jsonl once it is done; the same
command goes on behind it.

Every training is a process of its own, forked from one that has imported everything; the forking one kills it with
SIGKILL from outside. Half of a run's random choices (dropout, noise, the order of rows, receivers) would show in its
last weights if the resumed run drew others.
"""

import hashlib
import inspect
import json
import os
import random
import shutil
import signal
import statistics
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from modeling_latentforge import (
    LatentForgeAutoencoder,
    LatentForgeAutoencoderConfig,
    LatentForgeForCausalLM,
    LatentForgeIdea,
    LatentForgeIdeaConfig,
    LatentForgeWire,
    LatentForgeWireConfig,
    Receiver,
)

from ..ae_config import AEConfig
from ..ae_trainer import AETrainer
from ..checkpoints import SAVING, check_checkpoint, last_checkpoint
from ..data import PatchCollator
from ..idea_config import IdeaConfig
from ..idea_trainer import IdeaTrainer
from ..kd_config import KDConfig
from ..kd_trainer import KDTrainer
from ..safe_trainer import SafeTrainer
from ..teachers.cached_teacher import CachedTeacher
from ..teachers.hf_teacher import HFTeacher
from ..teachers.store import SQLiteStore
from ..wire_build import new_encoder_config
from ..wire_config import WireConfig
from ..wire_models import byte_tokenizer
from ..wire_trainer import WireTrainer


KINDS = ("codec", "student", "kd", "wire", "idea")
EOS, PAD, VOCAB = 256, 257, 258
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STEPS, SAVE_EVERY, KEPT = 12, 2, 2
LONGEST = 900  # seconds of a training of seconds; then it hangs
TRIES = 6  # a point after the training's end is drawn again


def token_lm(eos: int = EOS, vocab_size: int = VOCAB) -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(
        LlamaConfig(**SIZES, vocab_size=vocab_size, initializer_range=0.3, bos_token_id=None, eos_token_id=eos)
    ).eval()


def codec() -> LatentForgeAutoencoder:
    sizes = {"latent_size": 16, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.3}
    return LatentForgeAutoencoder(
        LatentForgeAutoencoderConfig(vocab_size=VOCAB, patch_size=4, eos_token_id=EOS, pad_token_id=PAD, **sizes)
    )


def token_rows(count: int = 25, length: int = 16) -> list[dict[str, list[int]]]:
    text = list(inspect.getsource(textwrap).encode())
    rows = [text[length * row : length * (row + 1)] for row in range(count)]
    return [{"input_ids": ids, "attention_mask": [1] * length, "labels": list(ids)} for ids in rows]


def text_rows(count: int = 16) -> list[dict[str, Any]]:
    words = {"prompt": "\nThe key?", "steps": ("The key is here.", "It is not.")}
    return [
        {**words, "context": f"Room {row}: the key is number {7 * row % 16}.", "answers": (str(row),)}
        for row in range(count)
    ]


def build(kind: str, folder: Path) -> SafeTrainer:
    """A tiny trainer of a kind; its checkpoints lie in `folder/run`."""
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVE_EVERY,
        "save_total_limit": KEPT,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    blocks: dict[str, Any] = {"train_dataset": token_rows(), "data_collator": PatchCollator(4)}
    if kind == "codec":
        return AETrainer(codec(), AEConfig(**common), **blocks)
    if kind in ("wire", "idea"):
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"eos_token": "<|eos|>"})
        encoder = new_encoder_config(None, None, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=48)
        sizes: dict[str, Any] = {"encoder_config": encoder, "source": "bytes", "pooling": "queries", "latent_size": 16}
        if kind == "wire":
            model: LatentForgeWire = LatentForgeWire(LatentForgeWireConfig(**sizes, num_latents=8))
        else:
            sizes |= {"num_ideas": 4, "compression_hidden": 32, "middle_hidden": 32, "prefix_len": 4, "receiver": None}
            model = LatentForgeIdea(LatentForgeIdeaConfig(**sizes, steps=2))
        for name in ("one", "two"):
            model.add_receiver(name, Receiver(token_lm(tokenizer.eos_token_id, len(tokenizer)), tokenizer))
        if kind == "wire":
            return WireTrainer(model, WireConfig(**common, min_latents=2), train_dataset=text_rows())
        stages: dict[str, Any] = {"align_steps": 3, "encoder_steps": 3, "train_backbone": True, "sample_outputs": 0}
        return IdeaTrainer(model, IdeaConfig(**common, **stages), train_dataset=text_rows())
    head = {"head_type": "energy" if kind == "student" else "regression", "num_samples": 3, "num_targets": 4}
    student = LatentForgeForCausalLM.from_autoencoder(
        codec(), LlamaConfig(**SIZES, vocab_size=VOCAB), head_config=head, decoder_num_heads=2, initializer_range=0.3
    )
    if kind == "student":
        return KDTrainer(student, KDConfig(**common), **blocks)
    teacher = HFTeacher(str(folder.parent / "teacher"))
    cached = CachedTeacher(teacher, SQLiteStore(folder / "kd.sqlite"), k=12, num_draws=8)
    return KDTrainer(student, KDConfig(**common), teacher=cached, **blocks)


def fingerprint(trainer: SafeTrainer) -> str:
    state = trainer.model.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


# -- one training


class _Tell(TrainerCallback):
    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell(f"begin {state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        self.tell(f"step {state.global_step}")


def _train(kind: str, folder: Path, resumes: bool, told: int, result: Path) -> None:
    def tell(line: str) -> None:
        os.write(told, f"{time.monotonic()} {line}\n".encode())

    trainer = build(kind, folder)
    trainer.add_callback(_Tell(tell))
    plain = trainer._save_checkpoint

    def save(*given: Any, **named: Any) -> None:
        tell(f"saves {trainer.state.global_step}")
        plain(*given, **named)
        tell(f"saved {trainer.state.global_step}")

    trainer._save_checkpoint = save  # type: ignore[method-assign]
    found = resumes and last_checkpoint(folder / "run") is not None
    if found:
        torch.manual_seed(12345)  # the checkpoint alone must say what is drawn
    trainer.train(resume_from_checkpoint=True if found else None)
    result.write_text(fingerprint(trainer), encoding="utf-8")


Trace = list[tuple[float, str, int]]


def training(kind: str, folder: Path, resumes: bool = False, kill: tuple[str, int, float] | None = None) -> Trace:
    """Train in a process of its own.

    Args:
        kind: of trainer.
        folder: of checkpoints, store, `result` and `trace`.
        resumes: from the last whole checkpoint, if there is one.
        kill: a word of the trace, its number, and how many seconds later the process is killed.

    Returns:
        what it told, with times; `folder/result` is there where it came to its end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / "result", folder / "trace"
    result.unlink(missing_ok=True)
    reads, writes = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            signal.alarm(LONGEST)
            os.close(reads)
            _train(kind, folder, resumes, writes, result)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writes)
    trace: Trace = []
    with os.fdopen(reads, encoding="utf-8") as lines:
        for line in lines:
            when, word, number = line.split()
            trace.append((float(when), word, int(number)))
            if kill is not None and (word, int(number)) == kill[:2]:
                time.sleep(max(0.0, float(when) + kill[2] - time.monotonic()))
                os.kill(process, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    with log.open("a", encoding="utf-8") as file:
        file.writelines(f"{when:.4f} {word} {number}\n" for when, word, number in trace)
        file.write(f"ended {status}\n")
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the {kind} training in {folder} ended with {status}, see what it said above")
    return trace


def _durations(trace: Trace) -> tuple[float, float]:
    """Seconds of the whole training, and of its middle save."""
    begun = {number: when for when, word, number in trace if word == "saves"}
    saves = [when - begun[number] for when, word, number in trace if word == "saved"]
    return trace[-1][0] - trace[0][0], statistics.median(saves)


# -- points


def point(kind: str, root: Path, number: int, aims_inside: bool, seed: int) -> dict[str, Any]:
    """Kill once, look at what is left, resume, compare."""
    whole = root / f"{kind}-whole"
    if not (whole / "durations.json").exists():
        shutil.rmtree(whole, ignore_errors=True)
        durations = _durations(training(kind, whole))
        (whole / "durations.json").write_text(json.dumps(durations), encoding="utf-8")
    total, saving = json.loads((whole / "durations.json").read_text())
    folder = root / f"{kind}-{number}"
    draw = random.Random(f"{seed} {kind} {number}")
    for _ in range(TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if aims_inside:
            step = SAVE_EVERY * draw.randint(1, STEPS // SAVE_EVERY)
            kill = ("saves", step, draw.uniform(0, saving))
        else:
            kill = ("begin", 0, draw.uniform(0, total))
        trace = training(kind, folder, kill=kill)
        if not (folder / "result").exists():
            break
    else:
        raise RuntimeError(f"{kind}, point {number}: {TRIES} trainings ended before they were killed")
    saved = max((step for _, word, step in trace if word == "saved"), default=0)
    left = last_checkpoint(folder / "run")
    newest = 0 if left is None else int(left.rsplit("-", 1)[1])
    # what has its name must be whole, and nothing that was saved may be gone
    halves = _broken(folder / "run")
    beside = _broken(folder / "run" / SAVING)
    store = folder / "kd.sqlite"
    sound = not store.exists() or SQLiteStore(store).check_integrity() == "ok"
    resumed = training(kind, folder, resumes=True)
    found = {
        "kind": kind,
        "number": number,
        "kill": kill,
        "inside": trace[-1][1] == "saves",
        "saved": saved,
        "whole": newest,
        "resumed_from": resumed[0][2],
        "lost": newest < saved,
        "halves": halves,
        "halves_beside": beside,
        "store_sound": sound,
        "same": (folder / "result").read_text() == (whole / "result").read_text(),
    }
    if passed(found):
        shutil.rmtree(folder)
    return found


def passed(found: dict[str, Any]) -> bool:
    """Whether a point cost nothing."""
    whole = not found["lost"] and not found["halves"] and found["resumed_from"] == found["whole"]
    return whole and found["store_sound"] and found["same"]


def _broken(folder: Path) -> list[str]:
    found = []
    for path in folder.glob("checkpoint-*"):
        try:
            check_checkpoint(path)
        except ValueError as error:
            found.append(str(error))
    return found


def points(root: Path, count: int, aimed_inside: int, seed: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """`count` points of each kind, `aimed_inside` of them at a save. Those that `root` has already are said again."""
    # tqdm's own lock is shared with forks: one that is killed while it holds it would stop all later ones for good
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "teacher").exists():
        token_lm().save_pretrained(root / "teacher.part")
        byte_tokenizer().save_pretrained(root / "teacher.part")
        (root / "teacher.part").rename(root / "teacher")
    aims = {kind: [number < aimed_inside for number in range(count)] for kind in KINDS}
    for kind, inside in aims.items():
        random.Random(f"{seed} {kind}").shuffle(inside)
    kept = root / "points.jsonl"
    done = {(one["kind"], one["number"]): one for one in _read(kept)}
    found = []
    for number in range(count):
        for kind in KINDS:
            one = done.get((kind, number))
            if one is None:
                one = point(kind, root, number, aims[kind][number], seed)
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(one) + "\n")
            found.append(one)
            say(json.dumps(one))
    return found


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # an interruption may have cut the last line
    path.write_text(whole + "\n" * bool(whole), encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    points(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), _say)
