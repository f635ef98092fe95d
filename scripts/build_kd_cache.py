"""Label a data set once: what the teacher says about every row, kept for any number of trainings.

    python scripts/build_kd_cache.py --data builtin:python --autoencoder checkpoints/ae --teacher runs/demo/teacher
    python scripts/build_kd_cache.py --data corpus.jsonl --autoencoder checkpoints/ae --teacher Qwen/Qwen3-0.6B-Base \\
        --format parquet --output cache/qwen3 --push_to my-name/qwen3-answers
    python scripts/build_kd_cache.py --data corpus.jsonl --autoencoder checkpoints/ae --teacher_revision 1a2b3c \\
        --teacher_dtype bfloat16 --urls http://10.0.0.5:8000/v1 http://10.0.0.6:8000/v1   (vLLM servers of one model)
    python scripts/build_kd_cache.py --copy_from my-name/qwen3-answers --output cache/kd_cache.sqlite
    python scripts/train_student.py --data builtin:python --autoencoder checkpoints/ae \\
        --kd_cache cache/kd_cache.sqlite ...

Rows are found again by their tokens: give the data flags, `--block_size`, the codec (or `--tokenizer` and
`--patch_size`) and `--data_seed` of the training. Held-out rows are labelled too, for its evaluation. Killed at any
time, the same command goes on where it was: row by row into SQLite, shard by shard into Parquet. `--verify N` then
scores N random rows again. A server that is lost drops out, the others do its work, and it returns when it answers
again; one that is away at the start joins later.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal


@dataclass
class BuildArguments:
    """Who answers, and where to."""

    teacher: str | None = field(
        default=None,
        metadata={"help": "Causal LM: directory or Hub id; with urls the name under which it is served."},
    )
    teacher_backend: Literal["hf", "vllm-local"] = field(
        default="hf",
        metadata={
            "help": "In this process: transformers, with full distributions, or vLLM (in the environment of make "
            "setup-vllm)."
        },
    )
    urls: list[str] | None = field(
        default=None,
        metadata={
            "help": "vLLM servers that all serve the same weights; the key is VLLM_REMOTE_API_KEY, of .env or the "
            "environment."
        },
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Of the weights; must be said of a server's, which does not tell."}
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "Of the weights: auto, float32, bfloat16; must be said of a server's."},
    )
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
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Rows that a teacher is asked about at once. Default: 8, and 64 of a server."},
    )
    patience: float = field(
        default=600.0, metadata={"help": "Seconds that all servers may stay away before this is given up."}
    )
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
        if self.copy_from is not None and (self.teacher is not None or self.urls or self.format != "sqlite"):
            raise ValueError(
                "copy_from makes an SQLite store out of Parquet shards: leave out teacher, urls and format."
            )
        if self.copy_from is None and self.teacher is None and not self.urls:
            raise ValueError(
                "teacher is missing: name the model whose answers are wanted, or the urls of its servers."
            )
        if self.urls:
            if self.teacher_backend != "hf" or self.device is not None:
                raise ValueError("urls name servers: leave out teacher_backend and device, which are of this process.")
            if len(set(self.urls)) < len(self.urls):
                raise ValueError("urls names a server twice: it would be asked by two threads for nothing.")
            from trainers.teachers.env import read_env

            environment = read_env()
            self.teacher_revision = self.teacher_revision or environment.get("VLLM_REMOTE_REVISION")
            if self.teacher_dtype == "auto":
                self.teacher_dtype = environment.get("VLLM_REMOTE_DTYPE", "auto")
            if self.teacher_revision is None or self.teacher_dtype == "auto":
                raise ValueError(
                    "A server does not tell revision and dtype of its weights, and answers that are kept must say "
                    "them: pass teacher_revision and teacher_dtype, or set VLLM_REMOTE_REVISION and "
                    "VLLM_REMOTE_DTYPE."
                )
        if self.batch_size is None:
            self.batch_size = 64 if self.urls else 8
        if not self.patience > 0:
            raise ValueError(f"patience must be above 0 seconds, got {self.patience}.")
        for name in ("top_k", "batch_size", "rows_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not 0 <= (self.num_draws or 0) <= self.top_k or self.verify < 0:
            raise ValueError("num_draws must lie between 0 and top_k, and verify must not be negative.")
        from trainers.command_line import model_path

        for name in ("autoencoder", "tokenizer", *([] if self.urls else ["teacher"])):  # a server names its model
            if getattr(self, name) is not None:
                setattr(self, name, model_path(name, getattr(self, name)))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, label, verify, push; returns what was counted."""
    from trainers import DataArguments, parse_arguments
    from trainers.teachers.labelling import TeacherPool, label
    from trainers.teachers.store import Shape, SQLiteStore
    from trainers.teachers.store_parquet import ParquetFolder, ParquetStore

    args, data_args = parse_arguments(BuildArguments, DataArguments, argv=argv, description=__doc__)
    if args.copy_from is not None:
        return copy(args.copy_from, args.output)
    tokenizer, patch_size = load_tokenizer(args)
    teachers, late = build_teachers(args, tokenizer)
    rows, source = load_rows(args, data_args, tokenizer, patch_size)
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
    with TeacherPool(teachers, late, patience=args.patience) as pool:
        with progress_bar(len(rows)) as bar:
            statistics = label(rows, pool, target, shape, args.batch_size, args.rows_per_shard, bar.update)
        print(f"{args.output}: {statistics.describe()}")
        result = {**vars(statistics), "dropped_out": pool.num_lost, "teachers": len(pool.teachers)}
        store = target if args.format == "sqlite" else ParquetStore(args.output)
        if args.verify:
            result |= verify(store, teachers[0], args.verify)
    store.close()
    if args.push_to is not None:
        push(args.output, args.push_to, args.private)
    return result


# Seconds that one server's requests are tried again before its work goes to the others.
SERVER_PATIENCE = 20.0


def build_teachers(args: BuildArguments, tokenizer: Any) -> tuple[list[Any], list[Callable[[], Any]]]:
    """The teachers that share the work, equal ones, wherever they run; and for each server that does not answer yet
    what builds its teacher, as long as another does.

    Raises:
        TeacherUnavailable: none answers.
        ValueError: one of them cannot do what is asked, or has another tokenizer.
    """
    from trainers.command_line import choose_device
    from trainers.teachers import TeacherUnavailable, build_teacher, read_env

    environment = read_env()
    common: dict[str, Any] = {"dtype": args.teacher_dtype, "revision": args.teacher_revision, "k": args.top_k}
    if not args.urls:
        if args.teacher_backend == "vllm-local":
            return [build_teacher("vllm-local", tokenizer, environment, args.teacher, **common)], []
        device = choose_device(args.device)
        teacher = build_teacher("hf", tokenizer, environment, args.teacher, **common)
        teacher.to(device)
        teacher.check()
        return [teacher], []
    patience = args.patience if len(args.urls) == 1 else min(args.patience, SERVER_PATIENCE)

    def connect(url: str) -> Any:
        address = environment | {"VLLM_REMOTE_URL": url}
        return build_teacher("vllm-remote", tokenizer, address, args.teacher, patience=patience, **common)

    teachers: list[Any] = []
    late: list[Callable[[], Any]] = []
    for url in args.urls:
        try:
            teachers.append(connect(url))
        except TeacherUnavailable as error:
            late.append(partial(connect, url))
            if len(late) == len(args.urls):
                raise
            print(f"{url} does not answer and takes part when it does: {error}", file=sys.stderr)
    return teachers, late


def stored_teacher(teachers: Sequence[Any]) -> Any:
    from trainers.teachers.labelling import check_equal_answers, common_teacher

    stored = common_teacher(teachers)
    check_equal_answers(teachers)
    return stored


def load_tokenizer(args: BuildArguments) -> tuple[Any, int]:
    """The student's tokenizer, and its patch size."""
    from transformers import AutoConfig, AutoTokenizer

    patch_size = args.patch_size
    if args.autoencoder is not None and patch_size is None:
        config = AutoConfig.from_pretrained(args.autoencoder)
        patch_size = getattr(config, "autoencoder_config", config).patch_size
    name = args.tokenizer or args.autoencoder or args.teacher
    if name is None:
        raise ValueError("tokenizer is missing: pass autoencoder or tokenizer, the student's; servers lend none.")
    return AutoTokenizer.from_pretrained(name), patch_size or 1


def load_rows(args: BuildArguments, data_args: Any, tokenizer: Any, patch_size: int) -> tuple[Any, dict[str, Any]]:
    """Training and held-out rows in one, and what they are made of."""
    from datasets import concatenate_datasets

    from trainers import load_blocks

    if data_args.streaming:
        raise ValueError("streaming: the rows of a store are counted first; drop --streaming.")
    blocks: tuple[Any, Any] = load_blocks(data_args, tokenizer, patch_size, args.data_seed)
    train, held_out = blocks
    source = {
        "data": data_args.data,
        "block_size": data_args.block_size,
        "patch_size": patch_size,
        "data_seed": args.data_seed,
        "rows": [len(train), len(held_out)],
    }
    return concatenate_datasets([train, held_out]).with_format("numpy"), source


def progress_bar(total: int) -> Any:
    from datasets.utils import tqdm

    return tqdm(total=total, desc="Labelling", unit=" rows")


def verify(store: Any, teacher: Any, count: int) -> dict[str, Any]:
    """Score rows again, print and return what came out.

    Raises:
        ValueError: the rows are another model's.
    """
    from trainers.teachers import verify_store
    from trainers.teachers.labelling import FAR

    verification = verify_store(store, teacher, count)
    print(verification.describe())
    if verification.mean > FAR:
        raise ValueError(
            f"verify: what is stored differs from what {teacher!r} says now by {verification.mean:.2g} nats on "
            "average: those are other weights' answers. Nothing was pushed; label anew into another place."
        )
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
    from trainers.command_line import run

    run(main)
