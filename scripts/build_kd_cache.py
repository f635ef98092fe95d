"""Label a data set once: what the teacher says about every row, kept for any number of trainings.

    python scripts/build_kd_cache.py --data builtin:python --autoencoder checkpoints/ae --teacher runs/demo/teacher
    python scripts/build_kd_cache.py --data corpus.jsonl --autoencoder checkpoints/ae --teacher Qwen/Qwen3-0.6B-Base \\
        --format parquet --output cache/qwen3 --push_to my-name/qwen3-answers
    python scripts/build_kd_cache.py --copy_from my-name/qwen3-answers --output cache/kd_cache.sqlite
    python scripts/train_student.py --data builtin:python --autoencoder checkpoints/ae \\
        --kd_cache cache/kd_cache.sqlite ...

Rows are found again by their tokens: give the data flags, `--block_size`, the codec (or `--tokenizer` and
`--patch_size`) and `--data_seed` of the training. Held-out rows are labelled too, for its evaluation. Killed at any
time, the same command goes on where it was: row by row into SQLite, shard by shard into Parquet. `--verify N` then
scores N random rows again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class BuildArguments:
    """Who answers, and where to."""

    teacher: str | None = field(default=None, metadata={"help": "Causal LM: directory or Hub id."})
    teacher_dtype: str = field(default="auto", metadata={"help": "Of the teacher's weights: auto, float32, bfloat16."})
    device: str | None = field(default=None, metadata={"help": "Of the teacher. Default: cuda where there is one."})
    autoencoder: str | None = field(default=None, metadata={"help": "The codec: gives tokenizer and patch size."})
    tokenizer: str | None = field(default=None, metadata={"help": "Default: the codec's, else the teacher's."})
    patch_size: int | None = field(default=None, metadata={"help": "Default: the codec's, else 1."})
    data_seed: int = field(default=42, metadata={"help": "Of the training that will read the store."})

    format: Literal["sqlite", "parquet"] = field(
        default="sqlite", metadata={"help": "One file, or a folder of shards."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Default: cache/kd_cache.sqlite, for Parquet cache/kd_cache."}
    )
    top_k: int = field(default=20, metadata={"help": "Entries per token, draws included."})
    num_draws: int | None = field(
        default=None,
        metadata={
            "help": "How many of them are draws from the tail. Default: two of five of a teacher with full "
            "distributions, none of another."
        },
    )
    draw_seed: int = field(default=0, metadata={"help": "Of the draws."})
    batch_size: int = field(default=8, metadata={"help": "Rows that the teacher is asked about at once."})
    rows_per_shard: int = field(default=8192, metadata={"help": "8192 rows of 512 tokens are 250 MB of Parquet."})

    verify: int = field(default=0, metadata={"help": "Score so many random rows again and report the difference."})
    push_to: str | None = field(default=None, metadata={"help": "Hub dataset to push the Parquet shards to."})
    private: bool = field(default=False, metadata={"help": "With push_to: a new dataset is private."})
    copy_from: str | None = field(
        default=None, metadata={"help": "Parquet folder or Hub dataset to copy into `output` (SQLite); asks nobody."}
    )

    def __post_init__(self) -> None:
        if self.output is None:
            self.output = "cache/kd_cache.sqlite" if self.format == "sqlite" else "cache/kd_cache"
        if self.push_to is not None and self.format != "parquet":
            raise ValueError("push_to needs --format parquet: an SQLite file cannot be streamed from the Hub.")
        if self.copy_from is not None and (self.teacher is not None or self.format != "sqlite"):
            raise ValueError("copy_from makes an SQLite store out of Parquet shards: leave out teacher and format.")
        if self.copy_from is None and self.teacher is None:
            raise ValueError("teacher is missing: name the model whose answers are wanted.")
        for name in ("top_k", "batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= (self.num_draws or 0) <= self.top_k or self.verify < 0:
            raise ValueError("num_draws must lie between 0 and top_k, and verify must not be negative.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, label, verify, push; returns what was counted."""
    from trainers import DataArguments, parse_arguments
    from trainers.teachers.labelling import TeacherPool, label
    from trainers.teachers.store import Shape, SQLiteStore
    from trainers.teachers.store_parquet import ParquetFolder, ParquetStore

    args, data_args = parse_arguments(BuildArguments, DataArguments, argv=argv, description=__doc__)
    if args.copy_from is not None:
        return copy(args.copy_from, args.output)
    teachers = build_teachers(args)
    rows, source = load_rows(args, data_args, teachers)
    stored = stored_teacher(teachers)
    num_draws = args.num_draws
    if num_draws is None:
        num_draws = 2 * args.top_k // 5 if teachers[0].capabilities.form == "dense" else 0
    shape = Shape(min(args.top_k, stored.vocab_size) - num_draws, num_draws, args.draw_seed if num_draws else 0)
    target: Any = (
        SQLiteStore(args.output)
        if args.format == "sqlite"
        else ParquetFolder(args.output, stored, shape, {**source, "rows_per_shard": args.rows_per_shard})
    )
    pool = TeacherPool(teachers)
    with progress_bar(len(rows)) as bar:
        statistics = label(rows, pool, target, shape, args.batch_size, args.rows_per_shard, bar.update)
    print(f"{args.output}: {statistics.describe()}")
    result = {**vars(statistics), "dropped_out": pool.num_lost}
    store = target if args.format == "sqlite" else ParquetStore(args.output)
    if args.verify:
        result |= verify(store, teachers[0], args.verify)
    for one in (*teachers, store):
        one.close()
    if args.push_to is not None:
        push(args.output, args.push_to, args.private)
    return result


def build_teachers(args: BuildArguments) -> list[Any]:
    """The teachers that share the work: equal ones, wherever they run."""
    import torch

    from trainers.teachers import HFTeacher

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    teacher = HFTeacher(args.teacher, dtype=args.teacher_dtype, device=device)  # type: ignore[arg-type]
    teacher.check()
    return [teacher]


def stored_teacher(teachers: Sequence[Any]) -> Any:
    from trainers.teachers.labelling import common_teacher

    return common_teacher(teachers)


def load_rows(args: BuildArguments, data_args: Any, teachers: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    """Training and held-out rows in one, and what they are made of."""
    from datasets import concatenate_datasets
    from transformers import AutoConfig, AutoTokenizer

    from trainers import load_blocks

    if data_args.streaming:
        raise ValueError("streaming: the rows of a store are counted first; drop --streaming.")
    patch_size = args.patch_size
    if args.autoencoder is not None and patch_size is None:
        config = AutoConfig.from_pretrained(args.autoencoder)
        patch_size = getattr(config, "autoencoder_config", config).patch_size
    name = args.tokenizer or args.autoencoder or args.teacher
    tokenizer = AutoTokenizer.from_pretrained(name)
    for teacher in teachers:
        teacher.check_tokenizer(tokenizer)
    train, held_out = load_blocks(data_args, tokenizer, patch_size or 1, args.data_seed)
    source = {
        "data": data_args.data,
        "block_size": data_args.block_size,
        "patch_size": patch_size or 1,
        "data_seed": args.data_seed,
        "rows": [len(train), len(held_out)],
    }
    return concatenate_datasets([train, held_out]).with_format("numpy"), source


def progress_bar(total: int) -> Any:
    from datasets.utils import tqdm

    return tqdm(total=total, desc="Labelling", unit=" rows")


def verify(store: Any, teacher: Any, count: int) -> dict[str, Any]:
    """Score rows again, print and return what came out."""
    from trainers.teachers import verify_store

    verification = verify_store(store, teacher, count)
    print(verification.describe())
    return {"verification": vars(verification)}


def copy(source: str, output: str) -> dict[str, Any]:
    """Parquet shards, from here or the Hub, into an SQLite store."""
    from trainers.teachers.labelling import copy_rows
    from trainers.teachers.store import SQLiteStore
    from trainers.teachers.store_parquet import ParquetStore

    shards, store = ParquetStore(source), SQLiteStore(output)
    with progress_bar(len(shards)) as bar:
        count = copy_rows(shards.stream(), store, shards.teacher, shards.shape, bar.update)
    print(f"{output}: {count} rows from {source}, {shards.num_corrupt} damaged ones left out")
    store.close()
    return {"copied": count, "corrupt": shards.num_corrupt}


def push(folder: str, repo_id: str, private: bool) -> None:
    """The folder, as it is, to a Hub dataset."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    commit = api.upload_folder(
        folder_path=folder,
        repo_id=repo_id,
        repo_type="dataset",
        allow_patterns=["README.md", "manifest.json", "data/*.parquet"],
        commit_message="Answers of a teacher",
    )
    print(f"pushed to {commit.repo_url if hasattr(commit, 'repo_url') else repo_id}")


if __name__ == "__main__":
    main()
