"""Train a token-level causal LM: the demo's teacher, the baseline, the stand-in for a user's own LLM.

    python scripts/train_teacher.py --data builtin:python --tokenizer checkpoints/tokenizer \\
        --output_dir checkpoints/teacher --block_size 512 --max_steps 400
    python scripts/train_teacher.py --data my_books/ --tokenizer checkpoints/tokenizer \\
        --output_dir checkpoints/teacher --architecture gpt_neox --hidden_size 512 --num_hidden_layers 8 --bf16
    accelerate launch scripts/train_teacher.py ...              (or torchrun --nproc_per_node N; same flags)

With `--patch_size K` it learns from the very blocks a student with patches of K tokens learns from: fair comparisons.
Writes the model, its tokenizer, `eval_results.json` (nats per token and bits per byte on held-out text) and
`trainer_state.json` (the log) to `--output_dir`; `AutoModelForCausalLM.from_pretrained` loads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class TeacherArguments:
    """Shape of the model; see `trainers.token_lm.build_token_lm`."""

    tokenizer: str = field(metadata={"help": "Tokenizer: a Hub id or a directory."})
    architecture: Literal["granite", "llama", "gpt_neox", "qwen3"] = field(
        default="granite",
        metadata={"help": "Kind of decoder; granite is Llama with a factor on its embeddings, and learns faster."},
    )
    hidden_size: int = field(default=256, metadata={"help": "Width."})
    num_hidden_layers: int = 4
    num_attention_heads: int | None = field(default=None, metadata={"help": "Default: one per 64 of the width."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Default: as many as attention heads."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Default: 8/3 of the width (gpt_neox: 4)."})
    tie_word_embeddings: bool | None = field(
        default=None, metadata={"help": "One matrix reads and writes tokens; default, all but granite."}
    )
    patch_size: int = field(default=1, metadata={"help": "Patch size of the students it is compared with."})


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, build, train, evaluate, save; returns the final metrics."""
    from transformers import AutoTokenizer, set_seed

    from trainers.arguments import parse_arguments
    from trainers.command_line import check_writable, model_path
    from trainers.data import DataArguments, PatchCollator, load_blocks
    from trainers.evaluation.likelihood import held_out_likelihood
    from trainers.token_lm import TokenLMConfig, TokenLMTrainer, build_token_lm

    model_args, data_args, training_args = parse_arguments(
        TeacherArguments, DataArguments, TokenLMConfig, argv=argv, description=__doc__
    )
    if training_args.should_save:
        check_writable(training_args.output_dir)
    model_args.tokenizer = model_path("tokenizer", model_args.tokenizer)
    print(training_args.describe_process(), flush=True)
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer)
    train_dataset, eval_dataset = load_blocks(data_args, tokenizer, model_args.patch_size, training_args.data_seed)
    set_seed(training_args.seed)
    shape = {name: value for name, value in vars(model_args).items() if name not in ("tokenizer", "patch_size")}
    model = build_token_lm(tokenizer=tokenizer, max_position_embeddings=max(2048, data_args.block_size), **shape)
    trainer = TokenLMTrainer(
        model,
        training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=PatchCollator(model_args.patch_size),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training_args.checkpoint())
    trainer.save_model()
    trainer.save_state()
    metrics = {}
    if trainer.is_world_process_zero():
        likelihood = held_out_likelihood(model, eval_dataset, tokenizer, training_args.per_device_eval_batch_size)
        metrics = {f"eval_{name}": value for name, value in likelihood.items()}
        trainer.save_metrics("eval", metrics)
        print(f"{model.num_parameters() / 1e6:.2f} M parameters; held-out:", metrics)
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return metrics


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
