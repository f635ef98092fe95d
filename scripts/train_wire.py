"""Train a wire: an encoder whose latents frozen language models read in the place of the text.

    python scripts/train_wire.py --receivers llama=checkpoints/llama neox=checkpoints/neox --dataset text \\
        --data corpus.jsonl --encoder checkpoints/llama --encoder_layers 2 --ratio 4 --kd_weight 1 \\
        --output_dir checkpoints/wire --learning_rate 3e-4 --max_steps 2000
    python scripts/train_wire.py --config scripts/configs/wire/smoke/lora.yaml --receivers Qwen/Qwen3-0.6B \\
        --dataset squad,hotpot --output_dir checkpoints/wire_lora
    python scripts/train_wire.py --init_wire checkpoints/wire --freeze_encoder --receivers openai-community/gpt2 \\
        --dataset text --data corpus.jsonl --output_dir checkpoints/wire_of_three        (a third one, its bridge only)
    accelerate launch scripts/train_wire.py ...              (or torchrun --nproc_per_node N; same flags)

The flags of the first LatentWire (`use_deep_prefix`, `k_token_ce`, ...) are other words for fields here, see
`trainers/wire_flags.py`. Writes the wire (encoder, quantizer, bridges, the encoder's tokenizer, LoRA of receivers),
but no receiver, to `--output_dir`, with `eval_results.json`, `trainer_state.json` (the log), `diagnostics.jsonl` where
it was asked for, and `README.md` (its model card); `trainers.wire_models.load_wire` loads it with its receivers.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass
class WireArguments:
    """What the wire is made of; see `LatentForgeWireConfig`, `LatentBridge` and `Template`."""

    receivers: list[str] = field(
        metadata={"help": "Language models that read: name=folder or name=hub_id, or the folder or id alone."}
    )
    receiver_dtype: str = field(default="auto", metadata={"help": "Of their weights: auto, float32, bfloat16."})
    template: Literal["auto", "plain", "chat"] = field(
        default="auto", metadata={"help": "Around message and prompt; auto: chat where the tokenizer has a template."}
    )
    anchor: str = field(default="", metadata={"help": "Begins every answer, `Answer:` say."})
    bos: Literal["auto", "yes", "no"] = field(
        default="auto", metadata={"help": "Rows begin with BOS; auto: as template and tokenizer do."}
    )
    bridge: Literal["soft", "kv", "pooled_kv", "cross"] | None = field(
        default=None, metadata={"help": "How a receiver is given the message. Default: soft."}
    )
    bridge_hidden_size: int | None = field(default=None, metadata={"help": "Of its MLP. Default: 2 x latent_size."})
    static_slots: int = field(default=0, metadata={"help": "Learned vectors before every message."})
    pooled_slots: int | None = field(default=None, metadata={"help": "pooled_kv: places. Default: 2."})
    adapter_layers: str | None = field(
        default=None, metadata={"help": "cross: which layers, as 2,6,10. Default: every fourth from the third on."}
    )
    calibration: Literal["embed_rms", "none"] = field(
        default="embed_rms", metadata={"help": "soft: slots get the size of the receiver's embeddings, or stay."}
    )
    lora_r: int = field(default=0, metadata={"help": "Train the receivers too, by LoRA of this rank."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Default: 2 x lora_r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "On what LoRA reads."})
    lora_targets: str = field(default="all-linear", metadata={"help": "Names of layers, with commas."})

    init_wire: str | None = field(
        default=None, metadata={"help": "Go on from this wire; receivers that it has no bridge to get a new one."}
    )
    freeze_encoder: bool = field(
        default=False, metadata={"help": "With init_wire: train the bridges of `receivers` only."}
    )
    encoder: str | None = field(
        default=None, metadata={"help": "Start from a pretrained model, with its tokenizer: folder or Hub id."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Of a new encoder: folder or Hub id. Default: it reads bytes."}
    )
    encoder_layers: int | None = field(
        default=None, metadata={"help": "Of a pretrained encoder the first so many. Default: all; of a new one 2."}
    )
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "Of a new encoder. Default: 256."})
    encoder_heads: int | None = field(default=None, metadata={"help": "Of a new encoder. Default: one per 64."})
    encoder_intermediate_size: int | None = field(default=None, metadata={"help": "Of a new encoder."})
    encoder_positions: int | None = field(
        default=None, metadata={"help": "Longest text of a new encoder, in tokens or bytes. Default: 8192."}
    )
    latent_len: int | None = field(default=None, metadata={"help": "Latents of every message (learned queries)."})
    ratio: int | None = field(default=None, metadata={"help": "Or tokens per latent. Default: 4."})
    pooling: Literal["ratio", "queries", "mean", "patches"] | None = field(
        default=None, metadata={"help": "Default: queries with latent_len, else ratio."}
    )
    latent_size: int | None = field(default=None, metadata={"help": "Numbers of a latent. Default: 256."})
    pooling_layers: int | None = field(default=None, metadata={"help": "Default: 1."})
    refiner_layers: int | None = field(default=None, metadata={"help": "Default: 0."})
    quantizer: Literal["none", "fp16", "int8", "int4", "fsq"] | None = field(
        default=None, metadata={"help": "Default: none."}
    )
    quantizer_levels: str | None = field(
        default=None, metadata={"help": "fsq: levels of its dimensions, as 8,8,5,5. Default: sixteen of 5."}
    )
    show_answers: int = field(default=0, metadata={"help": "Print so many answers of each receiver at the end."})

    def check(self) -> None:
        """Raises ValueError for what cannot be meant. Not at once: other flags may still set fields."""
        if self.freeze_encoder and self.init_wire is None:
            raise ValueError("freeze_encoder is set, and the encoder would be a new one: add init_wire.")
        for name in ("lora_r", "static_slots", "show_answers"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        self._refuse(
            "quantizer", self.freeze_encoder, "changes the message, which is frozen: drop it, or freeze_encoder"
        )
        self._refuse(NEW_WIRE, self.init_wire is not None, "is about a new wire: drop it, or init_wire")
        self._refuse(NEW_ENCODER, self.encoder is not None, "is about a new encoder: drop it, or encoder")
        self._refuse("pooled_slots", self.bridge != "pooled_kv", "is about bridge pooled_kv: add it")
        self._refuse("adapter_layers", self.bridge != "cross", "is about bridge cross: add it")
        self._refuse("lora_alpha", not self.lora_r, "is about LoRA: add lora_r")
        self._refuse("quantizer_levels", self.quantizer != "fsq", "is about quantizer fsq: add it")
        self._refuse("ratio", self.latent_len is not None, "and latent_len both say how many latents: drop either")

    def _refuse(self, names: str, means_nothing: bool, message: str) -> None:
        for name in names.split() if means_nothing else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} ({getattr(self, name)}) {message}.")

    def config_kwargs(self) -> dict[str, Any]:
        """The fields of `LatentForgeWireConfig` that are given here."""
        names = {
            "num_latents": self.latent_len,
            "ratio": self.ratio,
            "pooling": self.pooling or (None if self.latent_len is None else "queries"),
            "latent_size": self.latent_size,
            "num_pooling_layers": self.pooling_layers,
            "num_refiner_layers": self.refiner_layers,
            "quantizer": self.quantizer,
            "quantizer_levels": _numbers("quantizer_levels", self.quantizer_levels),
        }
        return {name: value for name, value in names.items() if value is not None}

    def bridge_kwargs(self) -> dict[str, Any]:
        """The arguments of `add_receiver` that are given here."""
        names = {
            "mode": self.bridge or "soft",
            "hidden_size": self.bridge_hidden_size,
            "static_slots": self.static_slots,
            "pooled_slots": self.pooled_slots,
            "adapter_layers": _numbers("adapter_layers", self.adapter_layers),
            "calibration": self.calibration,
        }
        return {name: value for name, value in names.items() if value is not None}


# fields that mean something only where there is a new encoder, or any new wire
NEW_ENCODER = "tokenizer encoder_hidden_size encoder_heads encoder_intermediate_size encoder_positions"
NEW_WIRE = f"encoder encoder_layers {NEW_ENCODER} latent_len ratio pooling latent_size pooling_layers refiner_layers"


def _numbers(name: str, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ValueError(f"{name} must read like 8,8,5, got {value!r}.")
    return tuple(int(part) for part in parts)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Parse, build, train, evaluate, save; returns the final metrics."""
    from transformers import set_seed

    from trainers.arguments import parse_arguments
    from trainers.command_line import check_writable
    from trainers.model_card import license_of_all
    from trainers.wire_config import WireConfig
    from trainers.wire_data import WireDataArguments, load_examples, readable
    from trainers.wire_flags import TrainingAliases, apply_aliases
    from trainers.wire_models import parse_receivers
    from trainers.wire_trainer import WireTrainer

    wire_args, data_args, aliases, training_args = parse_arguments(
        WireArguments, WireDataArguments, TrainingAliases, WireConfig, argv=argv, description=__doc__
    )
    apply_aliases(aliases, wire_args, data_args, training_args)
    generation = aliases.generation_options()
    wire_args.check()
    training_args.check()
    receivers = parse_receivers(wire_args.receivers)
    if training_args.should_save:
        check_writable(training_args.output_dir)
    print(training_args.describe_process(), flush=True)
    set_seed(training_args.seed)
    wire, folder = build(wire_args, receivers)
    train_dataset, eval_dataset = (
        readable(wire, examples) for examples in load_examples(data_args, training_args.repeat_prompt)
    )
    if training_args.elastic:
        fit_batch(wire, train_dataset, training_args)
    trainer = WireTrainer(wire, training_args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trainer.train(resume_from_checkpoint=training_args.checkpoint())
    metrics = trainer.evaluate()
    trainer.save_model()
    if folder is not None and trainer.is_world_process_zero():
        keep_adapters(wire, folder, training_args.output_dir)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.create_model_card(
        finetuned_from=wire_args.encoder,
        dataset=data_args.describe(),
        license=license_of_all([path for path in (wire_args.encoder, *receivers.values()) if path is not None]),
    )
    if trainer.is_world_process_zero():
        print("held-out:", {name: round(value, 6) for name, value in metrics.items() if name.startswith("eval_")})
        show_answers(wire, eval_dataset[: wire_args.show_answers], generation)
    trainer.end()
    return metrics


def build(args: WireArguments, receivers: dict[str, str]) -> tuple[Any, Path | None]:
    """The wire with its receivers attached, and the folder it went on from, if any."""
    from transformers import AutoTokenizer

    from trainers.command_line import model_path
    from trainers.wire_build import (
        build_wire,
        new_encoder_config,
        pretrained_backbone,
        replace_quantizer,
        sees_ahead,
    )
    from trainers.wire_lora import add_adapter, has_adapter
    from trainers.wire_models import attach_receiver, load_encoder, load_receiver

    folder = None
    if args.init_wire is not None:
        wire, folder = load_encoder(args.init_wire)
        if args.quantizer is not None:
            replace_quantizer(wire, args.quantizer, _numbers("quantizer_levels", args.quantizer_levels))
        wire.requires_grad_(not args.freeze_encoder)
        for bridge in wire.bridges.values():
            bridge.requires_grad_(False)
    elif args.encoder is not None:
        path = model_path("encoder", args.encoder)
        backbone = pretrained_backbone(path, args.encoder_layers)
        wire = build_wire(backbone, AutoTokenizer.from_pretrained(path), **args.config_kwargs())
        if not sees_ahead(wire.encoder.backbone):
            print(f"{path}: a {backbone.config.model_type} keeps its causal mask: latents see less of a text's end.")
    else:
        tokenizer = None
        if args.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(model_path("tokenizer", args.tokenizer))
        sizes = {
            "hidden_size": args.encoder_hidden_size,
            "num_layers": args.encoder_layers,
            "num_heads": args.encoder_heads,
            "intermediate_size": args.encoder_intermediate_size,
            "max_positions": args.encoder_positions,
        }
        encoder_config = new_encoder_config(
            None if tokenizer is None else len(tokenizer),
            None if tokenizer is None else tokenizer.pad_token_id,
            **{name: size for name, size in sizes.items() if size is not None},
        )
        wire = build_wire(None, tokenizer, encoder_config=encoder_config, **args.config_kwargs())
    for name, path in receivers.items():
        if name in wire.bridges:
            attach_receiver(wire, folder or "", name, path, args.receiver_dtype)
            wire.bridges[name].requires_grad_(True)
        else:
            receiver = load_receiver(
                path,
                template=args.template,
                anchor=args.anchor,
                bos={"auto": None, "yes": True, "no": False}[args.bos],
                dtype=args.receiver_dtype,
            )
            wire.add_receiver(name, receiver, **args.bridge_kwargs())
        if args.lora_r and not has_adapter(wire.receivers[name]):
            add_adapter(wire.receivers[name], args.lora_r, args.lora_alpha, args.lora_dropout, args.lora_targets)
    trained = sum(x.numel() for x in wire.parameters() if x.requires_grad)
    print(f"wire: {wire.num_parameters() / 1e6:.2f} M parameters, {trained / 1e6:.2f} M of them trained", flush=True)
    return wire, folder


def fit_batch(wire: Any, examples: list, training_args: Any) -> None:
    """Rows per device and accumulation that the free memory allows, for the same number of rows in a step."""
    from trainers.elastic import elastic_plan, free_memory, sequence_bytes, training_bytes

    # rows of the longest texts, whose answers and prompts count too, with every latent as a place of the receiver
    rows = sorted(examples, key=lambda row: len(row.context))[-32:]
    tokens = max(wire.ids_of([row.context], "cpu")[0].shape[1] for row in rows)
    words = max(len(f"{row.prompt} {row.answers[0]}") for row in rows)  # a character a token: an upper bound
    reads_text = training_args.kd_weight or training_args.gist_weight or training_args.text_warmup_steps
    of_receiver = max(
        sequence_bytes(receiver.model.config, (2 if reads_text else 1) * (tokens + words), words)
        for receiver in wire.receivers.values()
    )
    row_bytes = sequence_bytes(wire.config.encoder_config, tokens) + of_receiver
    weights = sum(x.numel() * x.element_size() for x in wire.parameters())
    weights += sum(x.numel() * x.element_size() for r in wire.receivers.values() for x in r.model.parameters())
    fixed = training_bytes(wire) + (weights if training_args.device.type == "cuda" else 0)  # loaded here already
    size, steps = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    plan = elastic_plan(size * steps, [free_memory(training_args.device)], fixed, row_bytes)
    training_args.per_device_train_batch_size = plan.per_device_batch_size
    training_args.gradient_accumulation_steps = plan.accumulation_steps
    print(f"elastic: {plan.per_device_batch_size} rows at once, {plan.accumulation_steps} times a step", flush=True)


def keep_adapters(wire: Any, folder: Path, output_dir: str) -> None:
    """Copy the adapters of receivers that were not asked for in this run: their bridges are in the weights."""
    from trainers.wire_models import ADAPTERS

    for name in wire.bridges:
        source, target = folder / ADAPTERS / name, Path(output_dir) / ADAPTERS / name
        if name not in wire.receivers and source.is_dir() and source.resolve() != target.resolve():
            shutil.copytree(source, target, dirs_exist_ok=True)


def show_answers(wire: Any, examples: list, options: dict[str, Any]) -> None:
    """Print what each receiver answers."""
    for example in examples:
        print(f"{example.prompt.strip()} [{' | '.join(example.answers)[:120]}]")
        for name in wire.receivers:
            given = {"max_new_tokens": 32, "do_sample": False, **options}
            text = wire.generate(name, wire.encode([example.context]), [example.prompt], **given)[0]
            print(f"  {name}: {text}")


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
