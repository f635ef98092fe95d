"""Train the codec: K tokens -> 1 latent and back.

    python scripts/train_autoencoder.py --data builtin:python --tokenizer checkpoints/tokenizer \\
        --output_dir checkpoints/ae --patch_size 8 --latent_size 256 --hidden_size 256 --intermediate_size 768 \\
        --max_steps 2000 --learning_rate 3e-3
    python scripts/train_autoencoder.py --config scripts/configs/seed.yaml:autoencoder --data corpus.jsonl \\
        --tokenizer meta-llama/Llama-3.2-1B --output_dir checkpoints/ae --bf16
    accelerate launch scripts/train_autoencoder.py ...          (or torchrun --nproc_per_node N; same flags)

Writes the model, its tokenizer, `eval_results.json` (free-running reconstruction on held-out text),
`trainer_state.json` (the log) and `README.md` (its model card) to `--output_dir`; `AutoModel.from_pretrained` loads
it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class CodecArguments:
    """Shape and objective of the codec; see `LatentForgeAutoencoderConfig`."""

    tokenizer: str = field(
        metadata={"help": "Tokenizer: a Hub id or a directory. Take the teacher's, if there will be one."}
    )
    patch_size: int = field(default=8, metadata={"help": "K, tokens per patch."})
    latent_size: int | None = field(
        default=None, metadata={"help": "D, numbers per latent. Default: 32 x patch_size."}
    )
    hidden_size: int = field(default=512, metadata={"help": "Width of the codec's blocks."})
    intermediate_size: int = field(default=1280, metadata={"help": "Width of their MLP."})
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    token_dropout: float = field(default=0.15, metadata={"help": "Share of input tokens hidden in training."})
    latent_dropout: float = field(default=0.15, metadata={"help": "Share of latent numbers set to 0 in training."})
    kl_weight: float = 1e-3
    kl_clamp: float = field(
        default=0.5, metadata={"help": "Nats per latent dimension below which the KL does not push."}
    )
    tie_word_embeddings: bool = True
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, build, train, evaluate, save; returns the final metrics."""
    from transformers import AutoTokenizer, set_seed

    from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig
    from trainers import AEConfig, AETrainer, DataArguments, PatchCollator, load_blocks, parse_arguments
    from trainers.command_line import check_writable, model_path
    from trainers.model_card import describe_data

    codec_args, data_args, training_args = parse_arguments(
        CodecArguments, DataArguments, AEConfig, argv=argv, description=__doc__
    )
    if training_args.should_save:
        check_writable(training_args.output_dir)
    codec_args.tokenizer = model_path("tokenizer", codec_args.tokenizer)
    print(training_args.describe_process(), flush=True)
    set_seed(training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(codec_args.tokenizer)
    shape = dict(vars(codec_args))
    del shape["tokenizer"]
    config = LatentForgeAutoencoderConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    train_dataset, eval_dataset = load_blocks(data_args, tokenizer, config.patch_size, training_args.data_seed)
    set_seed(training_args.seed)  # the weights must not depend on whether the data came from the cache
    trainer = AETrainer(
        model=LatentForgeAutoencoder(config),
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=PatchCollator(config.patch_size),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=training_args.checkpoint())
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.create_model_card(**describe_data(data_args))
    if trainer.is_world_process_zero():
        print("held-out:", {name: round(value, 6) for name, value in metrics.items() if name.startswith("eval_")})
    trainer.end()
    return metrics


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
