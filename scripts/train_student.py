"""Train a student around a trained codec, on text, on a teacher's distributions, or both.

    python scripts/train_student.py --data builtin:python --autoencoder checkpoints/ae --teacher runs/demo/teacher \\
        --output_dir checkpoints/student --hidden_size 256 --num_hidden_layers 4 --num_attention_heads 4 \\
        --intermediate_size 768 --max_steps 2000 --learning_rate 1e-3
    python scripts/train_student.py --config scripts/configs/seed.yaml:student --data corpus.jsonl \\
        --autoencoder checkpoints/ae --teacher meta-llama/Llama-3.2-1B --output_dir checkpoints/student --bf16
    python scripts/train_student.py --data corpus.jsonl --autoencoder checkpoints/ae --teacher Qwen/Qwen3-0.6B-Base \\
        --init_from_teacher --layers 0,2,4,6,8,10,12,14 --lora_r 16 --output_dir checkpoints/student
    python scripts/train_student.py --data corpus.jsonl --autoencoder checkpoints/ae --teacher_backend vllm-remote \\
        --teacher_dtype bfloat16 --teacher_revision main --output_dir checkpoints/student   (kept in cache/)
    python scripts/train_student.py --data corpus.jsonl --autoencoder checkpoints/ae \\
        --kd_cache cache/kd_cache.sqlite --output_dir checkpoints/student         (what build_kd_cache.py asked for)
    accelerate launch scripts/train_student.py ...          (or torchrun --nproc_per_node N; same flags)

Where the teacher is, says `--teacher_backend` (TEACHER_BACKEND); addresses and keys come from `.env` or the
environment, never from flags. A teacher that only writes (venice, openai, tgi) continues the beginning of every
training block; the student then learns from these texts, kept in `teacher_texts.jsonl`, so that a second run asks for
nothing twice.

The tokenizer is the codec's. Writes the model with the codec inside, the tokenizer, `eval_results.json`,
`trainer_state.json` (the log) and `README.md` (its model card) to `--output_dir`;
`AutoModelForCausalLM.from_pretrained` loads it. With `--lora_r` the adapter is merged into that model, and kept in
`adapter/`; the checkpoints of such a run are for resuming only.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class StudentArguments:
    """What the student is made of; see `LatentForgeConfig`."""

    autoencoder: str = field(metadata={"help": "The trained codec: a directory or Hub id with model and tokenizer."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "Causal LM with the codec's tokenizer (or see kd_alignment): directory or Hub id."},
    )
    teacher_dtype: str = field(
        default="auto",
        metadata={"help": "Of the teacher's weights: auto, float32, bfloat16; for a server, what you know of it."},
    )
    teacher_revision: str | None = field(
        default=None, metadata={"help": "Of the teacher's weights; for a server, what you know of it."}
    )
    teacher_backend: str | None = field(
        default=None,
        metadata={
            "help": "hf, vllm-local, vllm-remote, venice, openai or tgi. Default: TEACHER_BACKEND of .env or the "
            "environment, else hf."
        },
    )
    teacher_mode: Literal["score", "sample"] | None = field(
        default=None,
        metadata={"help": "score: it is asked about your text; sample: it writes. Default: what the backend can."},
    )
    kd_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Learn from so many ids per token only. Default: from full distributions where the teacher is at "
            "hand, which teach better; from what a store holds; 20 from a server or into a new store, over TGI 5."
        },
    )
    kd_num_draws: int | None = field(
        default=None,
        metadata={
            "help": "How many of kd_top_k are drawn from the tail, of a teacher at hand or a store of its answers. "
            "Default: two of five; 0 keeps the mass of the tail instead."
        },
    )
    kd_cache: str | None = field(
        default=None,
        metadata={
            "help": "KD store: what the teacher says is kept there and not asked for twice; without teacher, all is "
            "read from there. An SQLite file, or a folder or Hub dataset of build_kd_cache.py. `none`: keep nothing. "
            "Default: cache/kd_cache.sqlite for a teacher in vLLM; none for one at hand, whose full distributions "
            "teach better."
        },
    )
    teacher_patience: float = field(
        default=600.0, metadata={"help": "Seconds until a server that does not answer counts as away."}
    )
    teacher_prompt_tokens: int = field(
        default=64, metadata={"help": "sample: tokens of each block that the teacher continues."}
    )
    teacher_texts: str | None = field(
        default=None, metadata={"help": "sample: file of the texts. Default: teacher_texts.jsonl in output_dir."}
    )
    init_from_teacher: bool = field(default=False, metadata={"help": "Start the backbone from the teacher's layers."})
    layers: str | None = field(
        default=None, metadata={"help": "With init_from_teacher: which layers, as 0,2,4. Default: all."}
    )
    lora_r: int = field(
        default=0, metadata={"help": "With init_from_teacher: train the backbone by LoRA of this rank only."}
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "Default: 2 x lora_r."})
    lora_dropout: float | None = field(default=None, metadata={"help": "Default: 0."})

    architecture: Literal["llama", "qwen3", "gpt_neox"] | None = field(
        default=None, metadata={"help": "Of a new backbone. Default: llama."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Of a new backbone. Default: 768."})
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Of a new backbone. Default: 12."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Of a new backbone. Default: 12."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Default: num_attention_heads."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Of a new backbone. Default: 2048."})
    input_mode: Literal["tokens", "latents"] = field(
        default="tokens", metadata={"help": "How a patch enters the backbone."}
    )

    embedding_multiplier: float | None = field(
        default=None, metadata={"help": "Factor on a patch's token embeddings. Default: 16, or 1 with a teacher's."}
    )

    head_type: Literal["regression", "energy", "aligned"] = field(
        default="regression", metadata={"help": "aligned: learns from a teacher's noise, for decoder_type parallel."}
    )
    num_head_layers: int = field(default=1, metadata={"help": "Residual blocks of the head."})
    noise_size: int | None = field(default=None, metadata={"help": "energy: numbers of noise. Default: 64."})
    num_samples: int | None = field(default=None, metadata={"help": "energy: latents per patch. Default: 8."})
    num_targets: int | None = field(default=None, metadata={"help": "energy: codec draws per patch. Default: 16."})
    exponent: float | None = field(default=None, metadata={"help": "energy: power of the distance. Default: 1."})
    num_frequencies: int | None = field(
        default=None, metadata={"help": "aligned: octaves in which a number is read. Default: 6."}
    )

    decoder_type: Literal["autoregressive", "parallel"] = "autoregressive"
    train_decoder: bool = field(default=False, metadata={"help": "parallel: train a copy of the codec's decoder."})
    num_decoder_layers: int | None = field(default=None, metadata={"help": "autoregressive. Default: 1."})
    decoder_hidden_size: int | None = field(default=None, metadata={"help": "Default: the backbone's."})
    decoder_intermediate_size: int | None = None
    decoder_num_heads: int | None = None
    decoder_window: int | None = field(
        default=None, metadata={"help": "Tokens that the decoder sees. Default: 2 patches."}
    )
    decoder_conv_size: int | None = field(
        default=None, metadata={"help": "Tokens that its first convolution mixes. Default: 4."}
    )
    decoder_memory: Literal["none", "patches"] | None = field(
        default=None, metadata={"help": "Attend to earlier patch states. Default: patches."}
    )
    decoder_lookup: int | None = field(
        default=None,
        metadata={"help": "Longest ending of the text whose earlier continuation it reads; 0: none. Default: 16."},
    )
    decoder_output_size: int | None = field(
        default=None, metadata={"help": "Width of the output matrix; smaller is low-rank."}
    )
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "Decoder: one matrix reads and writes tokens. Default: no, or as the teacher."}
    )

    def __post_init__(self):
        self.keep_nothing = self.kd_cache == "none"
        if self.keep_nothing:
            self.kd_cache = None
        if self.kd_top_k is not None and self.kd_top_k < 1:
            raise ValueError(f"kd_top_k must be at least 1, got {self.kd_top_k}.")
        from trainers.teachers.env import read_env

        source = self.teacher or self.kd_cache or self.teacher_backend or read_env().get("TEACHER_BACKEND")
        self._refuse("kd_top_k", source is None, "is about a teacher's distributions: add teacher")
        self._refuse(
            "kd_num_draws",
            self.kd_top_k is None and self.kd_cache is None,
            "is about a part of a teacher's distributions: add kd_top_k",
        )
        if self.kd_top_k is not None and not 0 <= (self.kd_num_draws or 0) <= self.kd_top_k:
            raise ValueError(f"kd_num_draws must lie in 0 to kd_top_k ({self.kd_top_k}), got {self.kd_num_draws}.")
        if self.teacher_prompt_tokens < 1:
            raise ValueError(f"teacher_prompt_tokens must be at least 1, got {self.teacher_prompt_tokens}.")
        if self.init_from_teacher and self.teacher is None:
            raise ValueError(
                "init_from_teacher is set but there is no teacher: pass --teacher, or drop it for a new backbone."
            )
        if self.lora_r < 0:
            raise ValueError(f"lora_r must not be negative, got {self.lora_r}: 0 trains the whole backbone.")
        self._refuse(
            "layers lora_r", not self.init_from_teacher, "is about a teacher's backbone: add init_from_teacher"
        )
        self._refuse(NEW_BACKBONE, self.init_from_teacher, "is about a new backbone: drop it, or init_from_teacher")
        self._refuse("lora_alpha lora_dropout", not self.lora_r, "is about LoRA: add lora_r")
        self._refuse(ENERGY_HEAD, self.head_type != "energy", "is about an energy head: add head_type energy")
        self._refuse(ALIGNED_HEAD, self.head_type != "aligned", "is about an aligned head: add head_type aligned")
        parallel = self.decoder_type == "parallel"
        self._refuse(OWN_DECODER, parallel, "is about an autoregressive decoder, decoder_type is parallel: drop it")
        if self.layers is not None and not all(part.strip().isdigit() for part in self.layers.split(",")):
            raise ValueError(f"layers must read like 0,2,4, got {self.layers!r}.")

    def _refuse(self, names: str, means_nothing: bool, message: str) -> None:
        for name in names.split() if means_nothing else ():
            value = getattr(self, name)
            if value is not None and (name, value) != ("lora_r", 0):  # its default
                raise ValueError(f"{name} ({value}) {message}.")

    def config_kwargs(self) -> dict:
        """The fields of `LatentForgeConfig` that are given here; what is None has the config's default."""
        names = f"input_mode decoder_type train_decoder embedding_multiplier {OWN_DECODER}".split()
        kwargs = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        names = f"{ENERGY_HEAD} {ALIGNED_HEAD}".split()
        head = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        kwargs["head_config"] = {"head_type": self.head_type, "num_layers": self.num_head_layers, **head}
        return kwargs


# fields that mean something only where there is a new backbone, an energy head, a decoder of the student's own
NEW_BACKBONE = "architecture hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size"
BACKBONE_SIZES = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 2048}
ENERGY_HEAD = "noise_size num_samples num_targets exponent"
ALIGNED_HEAD = "num_frequencies"
OWN_DECODER = (
    "num_decoder_layers decoder_hidden_size decoder_intermediate_size decoder_num_heads decoder_window "
    "decoder_conv_size decoder_memory decoder_lookup decoder_output_size tie_word_embeddings"
)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, build, train, evaluate, save; returns the final metrics."""
    from transformers import AutoTokenizer, set_seed

    from trainers import DataArguments, KDConfig, KDTrainer, PatchCollator, load_blocks, parse_arguments
    from trainers.command_line import check_writable, model_path
    from trainers.model_card import describe_data, license_of, public_name

    student_args, data_args, training_args = parse_arguments(
        StudentArguments, DataArguments, KDConfig, argv=argv, description=__doc__
    )
    if training_args.should_save:
        check_writable(training_args.output_dir)
    student_args.autoencoder = model_path("autoencoder", student_args.autoencoder)
    print(training_args.describe_process(), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(student_args.autoencoder)
    codec = load_codec(student_args.autoencoder)
    if len(tokenizer) > codec.config.vocab_size:
        raise ValueError(
            f"The tokenizer in {student_args.autoencoder} has {len(tokenizer)} ids, the codec "
            f"{codec.config.vocab_size}: they do "
            "not belong together. Train the codec with this tokenizer."
        )
    teacher = load_teacher(student_args, training_args, data_args.block_size, tokenizer, codec.config.vocab_size)
    writes = teacher is not None and not teacher.capabilities.scores_given_tokens
    listens = training_args.kd_weight != 0 or student_args.head_type == "aligned"  # an aligned head, to its noise
    if teacher is not None and not writes and not listens:
        print("kd_weight is 0: the student does not learn from the teacher's distributions.")
        teacher.close()
        teacher = None

    train_dataset, eval_dataset = load_blocks(data_args, tokenizer, codec.config.patch_size, training_args.data_seed)
    told = describe_data(data_args)  # to the card's readers
    if writes:
        told["dataset"] = f"what {public_name(teacher.name)} wrote after beginnings of {told['dataset']}"
        told["license"] = license_of(teacher.name) or "unknown"  # its words are in the weights, with kd_weight 0 too
        path = student_args.teacher_texts or os.path.join(training_args.output_dir, "teacher_texts.jsonl")
        teacher, train_dataset, eval_dataset = have_text_written(
            teacher, tokenizer, train_dataset, data_args, student_args.teacher_prompt_tokens, path
        )
        if training_args.kd_weight == 0:
            teacher = None
    set_seed(training_args.seed)
    model = build_student(student_args, codec, data_args.block_size)
    trainer = KDTrainer(
        model=model,
        args=training_args,
        teacher=teacher,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=PatchCollator(codec.config.patch_size),
        processing_class=tokenizer,
    )
    owner = trainer.teacher_callback
    if owner is not None:
        owner.close_after_training = False  # the evaluation below asks it too
    try:
        trainer.train(resume_from_checkpoint=training_args.checkpoint())
        if not student_args.lora_r:
            # before the teacher is asked again: one that is away now must not cost the weights. Not pushed as yet
            trainer.save_model(_internal_call=True)
        metrics = trainer.evaluate()
        if student_args.kd_cache is not None and teacher is not None:
            print(f"KD store {student_args.kd_cache}: {teacher.statistics.describe()}")
    finally:
        if owner is not None:
            owner.close()
    if student_args.lora_r:
        merge_adapter(model, training_args.output_dir if trainer.is_world_process_zero() else None)
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    base = student_args.teacher if student_args.init_from_teacher else None
    trainer.create_model_card(finetuned_from=base, **told)
    if trainer.is_world_process_zero():
        print("held-out:", {name: round(value, 6) for name, value in metrics.items() if name.startswith("eval_")})
    trainer.end()
    return metrics


def load_teacher(student_args: StudentArguments, training_args, block_size: int, tokenizer, vocab_size: int):
    """The teacher that flags and environment name, connected and checked, in or around whatever `kd_alignment`,
    `kd_top_k` and `kd_cache` ask for; None: there is none.

    Raises:
        ValueError: another tokenizer without `kd_alignment`; a part of distributions with it; flags about a teacher
            where there is none.
    """
    from trainers.command_line import model_path
    from trainers.teachers import AlignedTeacher, CachedTeacher, HFTeacher, build_teacher, open_store, read_env
    from trainers.teachers.sparse import TOP_K

    environment = read_env()
    backend = student_args.teacher_backend or environment.get("TEACHER_BACKEND", "hf")
    if student_args.teacher is not None and backend in ("hf", "vllm-local"):  # a server names its models as it likes
        student_args.teacher = model_path("teacher", student_args.teacher)
    aligned = training_args.kd_alignment == "bytes"
    partial = backend != "hf" or student_args.kd_top_k or student_args.kd_cache
    if partial and training_args.kd_temperature != 1 and training_args.kd_weight != 0:
        # before anyone is asked: some teachers are paid by the word
        raise ValueError(
            f"kd_temperature is {training_args.kd_temperature}, and only a teacher with full distributions (backend "
            "hf, without kd_top_k and kd_cache) can be brought to another temperature than 1: set it to 1."
        )
    if backend != "hf" and student_args.kd_num_draws:
        raise ValueError(
            f"kd_num_draws is {student_args.kd_num_draws}, and teacher_backend {backend} gives the most likely ids "
            "alone, with nothing to draw from: drop kd_num_draws."
        )
    if aligned:
        if backend != "hf":
            raise ValueError(f"kd_alignment bytes needs a teacher at hand, and teacher_backend is {backend}: use hf.")
        if student_args.teacher is None:
            raise ValueError("kd_alignment is bytes but there is no teacher: add --teacher.")
        for name in ("kd_top_k", "kd_cache", "init_from_teacher"):
            if getattr(student_args, name):
                raise ValueError(
                    f"{name} is about a teacher with the codec's tokenizer, and kd_alignment bytes about one with "
                    "another: drop either."
                )
        return AlignedTeacher(
            HFTeacher(student_args.teacher, dtype=student_args.teacher_dtype, revision=student_args.teacher_revision),
            tokenizer,
            vocab_size,
        )
    if backend == "hf" and student_args.teacher is None:
        if student_args.kd_cache is None:
            return None
        teacher = None
    else:
        teacher = build_teacher(
            backend,
            tokenizer,
            environment,
            student_args.teacher,
            mode=student_args.teacher_mode,
            dtype=student_args.teacher_dtype,
            revision=student_args.teacher_revision,
            k=student_args.kd_top_k,
            max_tokens=max(block_size - student_args.teacher_prompt_tokens, 1),
            vocab_size=vocab_size,
            patience=student_args.teacher_patience,
        )
        print(f"teacher: {teacher.name} ({backend})", flush=True)
    if student_args.kd_cache is None:
        return _with_few_entries(_kept_by_default(teacher, student_args), student_args, training_args.seed)
    if teacher is not None and not teacher.capabilities.scores_given_tokens:
        raise ValueError(
            f"kd_cache keeps what is said of your text, and {teacher.name} writes its own: drop kd_cache."
        )
    dense = teacher is not None and teacher.capabilities.form == "dense"
    k = student_args.kd_top_k or (TOP_K if dense else None)
    num_draws = _num_draws(student_args, k or TOP_K) if dense else student_args.kd_num_draws
    store = open_store(student_args.kd_cache, read_only=teacher is None)
    cached = CachedTeacher(teacher, store, k=k, num_draws=num_draws)
    cached.check_tokenizer(tokenizer)
    return cached


def _kept_by_default(teacher, student_args: StudentArguments):
    """A teacher that gives top-k entries of given text, in the default store; as it is, where it cannot be kept."""
    from trainers.teachers import CachedTeacher
    from trainers.teachers.store import DEFAULT_STORE, SQLiteStore, StoreError

    scores = teacher is not None and teacher.capabilities.scores_given_tokens
    if student_args.keep_nothing or not scores or teacher.capabilities.form == "dense":
        return teacher
    try:
        identity = teacher.identity  # first: no file is made for answers that cannot be kept
        cached = CachedTeacher(teacher, SQLiteStore(DEFAULT_STORE), k=student_args.kd_top_k, identity=identity)
    except (ValueError, StoreError) as error:
        print(f"The teacher's answers are not kept: {error}", flush=True)
        return teacher
    student_args.kd_cache = DEFAULT_STORE
    print(f"The teacher's answers are kept in {DEFAULT_STORE} (--kd_cache none keeps nothing).", flush=True)
    return cached


def _num_draws(student_args: StudentArguments, k: int) -> int:
    return 2 * k // 5 if student_args.kd_num_draws is None else student_args.kd_num_draws


def _with_few_entries(teacher, student_args: StudentArguments, seed: int):
    from trainers.teachers import SparseTeacher

    if student_args.kd_top_k is None or getattr(teacher.capabilities, "form", None) != "dense":
        return teacher
    return SparseTeacher(teacher, student_args.kd_top_k, _num_draws(student_args, student_args.kd_top_k), seed)


def have_text_written(writer, tokenizer, blocks, data_args, prompt_tokens: int, path: str):
    """`writer` continues the beginning of every block: a teacher of these texts, and their rows, one in twenty of them
    (at least one) held out."""
    from trainers.teachers import WrittenTeacher, collect_texts, training_rows

    try:
        if data_args.streaming:
            raise ValueError("A teacher that writes needs to know its prompts: drop --streaming.")
        if data_args.eval_data is not None or data_args.eval_split is not None:
            raise ValueError(
                "A teacher that writes knows nothing of other text, and its student is judged on texts of its own "
                "that are held out: drop --eval_data and --eval_split. evaluate_model.py judges on any text."
            )
        prompts = []
        for row in blocks:
            ids = row["input_ids"][row["attention_mask"] != 0][:prompt_tokens].tolist()
            if len(ids) == prompt_tokens:
                prompts.append(ids)
        writer.check()
        texts = collect_texts(writer, prompts, path, say=lambda line: print(line, flush=True))
    finally:
        writer.close()
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = training_rows(texts, data_args.block_size, tokenizer.eos_token_id, pad)
    if len(rows) < 2:
        raise ValueError(
            f"{writer.name} wrote {len(rows)} usable texts for {len(prompts)} prompts: give more text, or a "
            "block_size that leaves room after teacher_prompt_tokens."
        )
    held_out = max(1, len(rows) // 20)
    return WrittenTeacher(texts, writer), rows[held_out:], rows[:held_out]


def load_codec(path: str):
    """The codec of a directory or Hub id; a student's own is taken out of it.

    Raises:
        ValueError: another kind of model.
    """
    from transformers import AutoConfig

    from modeling_latentforge import LatentForgeAutoencoder

    model_type = AutoConfig.from_pretrained(path).model_type
    if model_type not in ("latentforge_autoencoder", "latentforge"):
        raise ValueError(
            f"autoencoder ({path}) holds a {model_type} model, no codec: train one with train_autoencoder.py."
        )
    return LatentForgeAutoencoder.from_pretrained(path)


def build_student(student_args: StudentArguments, codec, block_size: int):
    """A new backbone, or the teacher's, around `codec`; with `lora_r`, wrapped."""
    from transformers import AutoConfig

    from modeling_latentforge import LatentForgeForCausalLM
    from trainers.token_lm import check_heads

    if not student_args.init_from_teacher:
        architecture = student_args.architecture or "llama"
        sizes = {name: getattr(student_args, name) for name in BACKBONE_SIZES}
        sizes = {name: BACKBONE_SIZES[name] if size is None else size for name, size in sizes.items()}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        hidden_size, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        check_heads(architecture, hidden_size, heads, student_args.num_key_value_heads)
        backbone = {
            **sizes,
            "max_position_embeddings": max(2048, block_size // codec.config.patch_size),
            "vocab_size": codec.config.vocab_size,
        }
        if architecture != "gpt_neox":
            backbone["num_key_value_heads"] = student_args.num_key_value_heads or heads
            backbone["head_dim"] = hidden_size // heads
        backbone_config = AutoConfig.for_model(architecture, **backbone)
        return LatentForgeForCausalLM.from_autoencoder(codec, backbone_config, **student_args.config_kwargs())

    layers = None if student_args.layers is None else [int(layer) for layer in student_args.layers.split(",")]
    model = LatentForgeForCausalLM.from_teacher(
        student_args.teacher, codec, layers=layers, **student_args.config_kwargs()
    )
    if student_args.lora_r:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("--lora_r needs peft: pip install 'latentforge[train]'.") from error
        # The backbone alone is wrapped: everything else is new and trained whole, and peft's copies of whole modules
        # would untie the output matrix. No task type: peft's causal-LM wrapper passes inputs_embeds a second time.
        alpha = 2 * student_args.lora_r if student_args.lora_alpha is None else student_args.lora_alpha
        lora = LoraConfig(
            r=student_args.lora_r,
            lora_alpha=alpha,
            lora_dropout=student_args.lora_dropout or 0.0,
            target_modules="all-linear",
        )
        model.model.backbone = get_peft_model(model.model.backbone, lora)
    return model


def merge_adapter(model, output_dir: str | None) -> None:
    """Save the LoRA of the backbone (to `output_dir/adapter`, unless None) and merge it into the weights."""
    wrapped = model.model.backbone
    if output_dir is not None:
        wrapped.save_pretrained(os.path.join(output_dir, "adapter"), save_embedding_layers=False)
    model.model.backbone = wrapped.merge_and_unload()


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
