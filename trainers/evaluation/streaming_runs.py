"""A stream of numbered documents that is trained on by several processes and workers, killed, and gone on with.

    python -m trainers.evaluation.streaming_runs FOLDER PROCESSES WORKERS KILL_AFTER

writes `FOLDER/counted.json`: how often each document was trained on, of the steps that the checkpoint holds and those
after it.
"""

import json
import os
import random
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback

from ..ae_config import AEConfig
from ..ae_trainer import AETrainer
from ..data import DataArguments, PatchCollator, load_blocks
from .distributed_runs import PATCH, codec, in_processes


SAVE_EVERY = 3
FILES, DOCUMENTS = 5, 120  # an odd number of files: shares are not of equal length


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # of the 256 bytes, two that no text has
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[-1], pad_token=alphabet[-2])


def write_documents(folder: Path) -> list[str]:
    """`DOCUMENTS` texts of 20 to 200 bytes, each with its number, in `FILES` Parquet files."""
    draw = random.Random(0)
    texts = [f"{number} " + "".join(draw.choices("abcdefgh ", k=draw.randint(20, 200))) for number in range(DOCUMENTS)]
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(FILES):
        pq.write_table(pa.table({"text": texts[file::FILES]}), folder / f"{file}.parquet", row_group_size=8)
    return texts


class Recorder(TrainerCallback):
    """Notes what every step reads, ends the run at the end of the text, and kills it after `kill_after` steps."""

    def __init__(self, path: Path, kill_after: int | None):
        self.path, self.kill_after = path, kill_after
        self.trainer: Any = None

    def on_inputs(self, args: Any, state: Any, control: Any, inputs: dict[str, Any], **kwargs: Any) -> None:
        if (inputs["labels"] != -100).any():
            (worker,) = self.trainer._read[1]
            real = inputs["attention_mask"] != 0
            rows = [row[keep].tolist() for row, keep in zip(inputs["input_ids"], real, strict=True)]
            with open(self.path, "a") as file:
                file.write(json.dumps([state.global_step, worker, rows]) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def train(folder: Path, num_workers: int, kill_after: int | None) -> None:
    rank = os.environ["RANK"]
    tokenizer = byte_tokenizer()
    arguments = DataArguments(
        data=str(folder / "documents"),
        eval_data=str(folder / "held_out.txt"),
        block_size=64,
        streaming=True,
    )
    stream, held_out = load_blocks(arguments, tokenizer, PATCH, seed=0)
    recorder = Recorder(folder / f"{'first' if kill_after else 'second'}-{rank}.jsonl", kill_after)
    config = AEConfig(
        output_dir=str(folder / "run"),
        max_steps=1000,
        per_device_train_batch_size=2,
        dataloader_num_workers=num_workers,
        save_strategy="steps",
        save_steps=SAVE_EVERY,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1000,
    )
    trainer = AETrainer(
        codec(),
        config,
        train_dataset=stream,
        eval_dataset=held_out,
        data_collator=PatchCollator(PATCH),
        processing_class=tokenizer,
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=True if kill_after is None else None)


def count(folder: Path, texts: list[str], processes: int, last_step: int) -> dict[str, Any]:
    """How often each document was read whole; `damaged`: what was read and is none."""
    tokenizer = byte_tokenizer()
    shares: dict[tuple[int, int], list[int]] = defaultdict(list)
    for name in ("first", "second"):
        for rank in range(processes):
            for line in (folder / f"{name}-{rank}.jsonl").read_text().splitlines():
                step, worker, rows = json.loads(line)
                if name == "second" or step < last_step:  # later steps of the first run died with it
                    shares[rank, worker] += [id for row in rows for id in row]
    found: Counter[str] = Counter()
    for ids in shares.values():
        document: list[int] = []
        for id in ids:
            if id == tokenizer.eos_token_id:
                found[tokenizer.decode(document)] += 1
                document = []
            else:
                document.append(id)
        if document:
            found[tokenizer.decode(document)] += 1
    times = Counter(found[text] for text in texts)
    return {
        "documents": len(texts),
        "times": {str(key): times[key] for key in sorted(times)},
        "damaged": sum(text not in set(texts) for text in found),
        "shares": {f"{rank}.{worker}": len(ids) for (rank, worker), ids in sorted(shares.items())},
    }


def main(folder: str, processes: str, num_workers: str, kill_after: str) -> int:
    root = Path(folder)
    texts = write_documents(root / "documents")
    (root / "held_out.txt").write_text("A text apart.\n" * 8)

    def first(rank: int) -> None:
        train(root, int(num_workers), int(kill_after))

    def second(rank: int) -> None:
        train(root, int(num_workers), None)

    killed = in_processes(int(processes), first)
    ended = in_processes(int(processes), second)
    last_step = int(kill_after) // SAVE_EVERY * SAVE_EVERY
    counted = count(root, texts, int(processes), last_step) if not any(ended) else {}
    (root / "counted.json").write_text(json.dumps({**counted, "killed": killed, "ended": ended}))
    return max(abs(status) for status in ended)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
