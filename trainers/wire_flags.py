"""The flags of the first LatentWire and the first idea model, by their names: each is another word for a field that
exists anyway.

    use_deep_prefix                  bridge: kv
    use_prefix, prefix_len: 8        static_slots: 8
    kd_tau: 2                        kd_temperature: 2

`ALIASES` is all there is to them: nothing reads such a flag but [`apply_aliases`], which sets the field.
"""

from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from transformers import LogitsProcessorList

from modeling_latentforge.generation_wire import FirstTokenProcessor


@dataclass(frozen=True)
class Alias:
    """What a flag sets.

    Attributes:
        field: name of the field.
        value: of a switch, what it sets; None: what the flag was given.
        yields: a switch whose field may hold another value that somebody chose.
    """

    field: str
    value: Any = None
    yields: bool = False


ALIASES: dict[str, Alias] = {
    # bridges
    "use_prefix": Alias("static_slots", 16, yields=True),
    "prefix_len": Alias("static_slots"),
    "use_deep_prefix": Alias("bridge", "kv"),
    "use_coprocessor": Alias("bridge", "pooled_kv"),
    "use_latent_adapters": Alias("bridge", "cross"),
    "calibration": Alias("calibration"),
    "use_latent_refiner": Alias("refiner_layers", 2, yields=True),
    # receivers
    "use_lora": Alias("lora_r", 8, yields=True),
    "lora_r": Alias("lora_r"),
    "lora_alpha": Alias("lora_alpha"),
    "lora_dropout": Alias("lora_dropout"),
    "anchor_text": Alias("anchor"),
    "append_bos_after_prefix": Alias("bos"),  # it comes first, where attention rests
    # objectives
    "k_token_ce": Alias("answer_tokens"),
    "first_token_ce_weight": Alias("first_token_weight"),
    "kd_tau": Alias("kd_temperature"),
    "use_gist_head": Alias("gist_weight", 0.1, yields=True),
    "gist_weight": Alias("gist_weight"),
    "gist_target_len": Alias("gist_target_len"),
    # generation
    "eos_ban_steps": Alias("min_new_tokens"),
    "first_token_top_p": Alias("first_token_top_p"),
    # what is watched
    "debug": Alias("debug"),
    "profile_memory": Alias("skip_memory_metrics", False),
    "log_shapes": Alias("diagnose_steps", 1, yields=True),
    # the idea model's
    "batch_size": Alias("per_device_train_batch_size"),
    "epochs": Alias("num_train_epochs"),
    "max_train_samples": Alias("max_train_examples"),
}


@dataclass
class GenerationAliases:
    """How answers are written, by LatentWire's names."""

    eos_ban_steps: int | None = field(default=None, metadata={"help": "An answer has at least so many tokens."})
    first_token_top_p: float | None = field(
        default=None, metadata={"help": "Draw an answer's first token from this share of its probability."}
    )

    def generation_options(self) -> dict[str, Any]:
        """For `generate` of wire and receiver.

        Raises:
            ValueError: a share outside (0, 1], a negative number.
        """
        options: dict[str, Any] = {}
        if self.eos_ban_steps is not None:
            if self.eos_ban_steps < 0:
                raise ValueError(f"eos_ban_steps must not be negative, got {self.eos_ban_steps}.")
            options[ALIASES["eos_ban_steps"].field] = self.eos_ban_steps
        if self.first_token_top_p is not None:
            options["logits_processor"] = LogitsProcessorList([FirstTokenProcessor(self.first_token_top_p)])
        return options


@dataclass
class TrainingAliases(GenerationAliases):
    """What is trained, by LatentWire's names."""

    use_lora: bool = field(default=False, metadata={"help": "lora_r 8."})
    use_prefix: bool = field(default=False, metadata={"help": "static_slots 16."})
    prefix_len: int | None = field(default=None, metadata={"help": "static_slots."})
    use_deep_prefix: bool = field(default=False, metadata={"help": "bridge kv."})
    use_latent_adapters: bool = field(default=False, metadata={"help": "bridge cross."})
    use_coprocessor: bool = field(default=False, metadata={"help": "bridge pooled_kv."})
    use_gist_head: bool = field(default=False, metadata={"help": "gist_weight 0.1."})
    use_latent_refiner: bool = field(default=False, metadata={"help": "refiner_layers 2."})
    anchor_text: str | None = field(default=None, metadata={"help": "anchor."})
    append_bos_after_prefix: Literal["auto", "yes", "no"] | None = field(
        default=None, metadata={"help": "bos; it comes before the message."}
    )
    k_token_ce: int | None = field(default=None, metadata={"help": "answer_tokens."})
    first_token_ce_weight: float | None = field(default=None, metadata={"help": "first_token_weight."})
    kd_tau: float | None = field(default=None, metadata={"help": "kd_temperature."})
    profile_memory: bool = field(default=False, metadata={"help": "skip_memory_metrics false."})
    log_shapes: bool = field(default=False, metadata={"help": "diagnose_steps 1: shapes are in diagnostics.jsonl."})


@dataclass
class IdeaAliases:
    """What an idea model is trained with, by the first one's names."""

    batch_size: int | None = field(default=None, metadata={"help": "per_device_train_batch_size."})
    epochs: float | None = field(default=None, metadata={"help": "num_train_epochs."})
    max_train_samples: int | None = field(default=None, metadata={"help": "max_train_examples."})


def apply_aliases(aliases: GenerationAliases | IdeaAliases, *arguments: Any) -> None:
    """Set the fields that flags stand for, on whichever of `arguments` (dataclasses) has them.

    Raises:
        ValueError: two flags, or a flag and its field, that say different things.
    """
    switches = [name for name in vars(aliases) if ALIASES[name].value is not None and getattr(aliases, name)]
    given = [name for name in vars(aliases) if ALIASES[name].value is None and getattr(aliases, name) is not None]
    said: dict[str, str] = {}  # field -> flag
    for name in [*given, *sorted(switches, key=lambda name: ALIASES[name].yields)]:
        alias = ALIASES[name]
        value = getattr(aliases, name) if alias.value is None else alias.value
        for part in arguments:
            if alias.field not in {known.name for known in fields(part)}:
                continue
            held = getattr(part, alias.field)
            if not _is_default(part, alias.field) and held != value:
                if alias.yields:
                    continue
                other = f"{said[alias.field]} sets" if alias.field in said else "is given with"
                raise ValueError(
                    f"{name} is {alias.field} {value!r}, and {other} {alias.field} {held!r}: drop one of the two."
                )
            setattr(part, alias.field, value)
            said[alias.field] = name


def _is_default(part: Any, name: str) -> bool:
    known = next(known for known in fields(part) if known.name == name)
    return known.default is not MISSING and getattr(part, name) == known.default
