"""Predict the peak memory of training a student, part by part, and on request measure it.

    python scripts/estimate_memory.py --config scripts/configs/qwen3_0.6b.yaml:student_lora \\
        --autoencoder scripts/configs/qwen3_0.6b.yaml:autoencoder --device cuda
    python scripts/estimate_memory.py --autoencoder checkpoints/ae --teacher checkpoints/teacher --hidden_size 512 \\
        --num_hidden_layers 6 --num_attention_heads 8 --block_size 512 --per_device_train_batch_size 4 --measure
    python scripts/estimate_memory.py --config scripts/configs/seed.yaml:student \\
        --autoencoder scripts/configs/seed.yaml:autoencoder --vocab_size 32000 --device cpu

Takes every flag of train_student.py and tells what that training would need; nothing is loaded but configurations.
Of its own it has:

    --autoencoder   also FILE.yaml:SECTION, a recipe of train_autoencoder.py for a codec that is not trained yet
    --vocab_size N  with such a recipe: number of token ids. Default: the teacher's
    --device X      cpu or cuda, where the training shall run. Default: cuda where there is one
    --num_processes N  devices that train together, each with a copy of the model; the figures are those of one
    --measure       train three steps on this machine's CPU, in a process of its own, and compare (Linux). Codec and
                    teacher are stand-ins of the same shapes with random weights

The formula stands in trainers/evaluation/memory.py. MB are 10^6 bytes.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


# what a server gives a token where nobody asked for another number (trainers/teachers)
DEFAULT_ENTRIES = 20


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, build shapes, print the table; returns the predicted bytes."""
    own, argv = _own_flags(list(sys.argv[1:] if argv is None else argv))

    import torch

    from scripts.train_student import StudentArguments
    from trainers import DataArguments, KDConfig, parse_arguments
    from trainers.evaluation.memory import estimate_memory, measure_memory, save_stand_ins

    student_args, data_args, training_args = parse_arguments(
        StudentArguments, DataArguments, KDConfig, argv=argv, description=__doc__
    )
    device = own.device or ("cuda" if torch.cuda.is_available() else "cpu")
    teacher_config = _teacher_config(student_args)
    codec_config = _codec_config(student_args.autoencoder, own.vocab_size, teacher_config)
    model, plan = plan_training(
        student_args, data_args, training_args, codec_config, teacher_config, device, own.num_processes
    )
    estimate = estimate_memory(model, plan)
    print(estimate.table())
    if student_args.teacher_backend == "vllm-local":
        print("Not in the table: vLLM in this process, which takes the share VLLM_GPU_MEMORY_UTIL of the device.")
    if own.measure:
        if device != "cpu" or own.num_processes > 1 or student_args.kd_cache or _is_elsewhere(student_args):
            raise SystemExit("--measure is for one process on a CPU, with a teacher at hand or none.")
        with tempfile.TemporaryDirectory() as folder:
            dtype = _teacher_dtype(student_args, teacher_config)
            flags = save_stand_ins(Path(folder), codec_config, teacher_config, dtype)
            measured = measure_memory([*argv, "--use_cpu", *flags], Path(folder), data_args.block_size)
        error = estimate.total / measured - 1
        print(f"measured {measured / 1e6:,.0f} MB, predicted {estimate.total / 1e6:,.0f} MB: {error:+.1%}")
    return estimate.total


def _own_flags(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--vocab_size", type=int)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--measure", action="store_true")
    return parser.parse_known_args(argv)


def plan_training(
    student_args: Any,
    data_args: Any,
    training_args: Any,
    codec_config: Any,
    teacher_config: Any = None,
    device: str = "cpu",
    num_processes: int = 1,
) -> tuple[Any, Any]:
    """The student that train_student.py would build, without memory for its weights, and its [`TrainingPlan`]."""
    import torch
    from transformers import AutoModelForCausalLM

    from modeling_latentforge import LatentForgeAutoencoder
    from scripts.train_student import build_student
    from trainers.evaluation.memory import TeacherPlan, TrainingPlan, weight_bytes

    student_args = copy.copy(student_args)
    teacher, starts_from = None, 0
    with torch.device("meta"):
        if teacher_config is not None:
            teacher_model = AutoModelForCausalLM.from_config(teacher_config, dtype=torch.float32)
            starts_from = weight_bytes(teacher_model) if student_args.init_from_teacher else 0
            student_args.teacher = teacher_model
        model = build_student(student_args, LatentForgeAutoencoder(codec_config), data_args.block_size)
    learns = training_args.kd_weight != 0
    if learns and (_is_elsewhere(student_args) or (teacher_config is None and student_args.kd_cache)):
        teacher = TeacherPlan(top_k=student_args.kd_top_k or DEFAULT_ENTRIES)
    elif learns and teacher_config is not None:
        text = teacher_config.get_text_config()
        number = _teacher_dtype(student_args, teacher_config).itemsize
        teacher = TeacherPlan(
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            vocab_size=text.vocab_size,
            weight_bytes=weight_bytes(teacher_model, number),
            number_bytes=number,
            top_k=student_args.kd_top_k or (DEFAULT_ENTRIES if student_args.kd_cache else None),
        )
    weights = {name: getattr(training_args, f"{name}_weight") for name in ("ce", "kd", "mse", "energy")}
    if weights["kd"] is None:
        weights["kd"] = float(teacher is not None)
    if weights["energy"] is None:
        weights["energy"] = float(student_args.head_type == "energy")
    plan = TrainingPlan(
        batch_size=training_args.per_device_train_batch_size,
        block_size=data_args.block_size,
        device=device,
        autocast=bool(training_args.bf16 or training_args.fp16),
        optimizer=getattr(training_args.optim, "value", training_args.optim),
        gradient_checkpointing=bool(training_args.gradient_checkpointing),
        accumulation_steps=training_args.gradient_accumulation_steps,
        num_processes=num_processes,
        loss_weights=weights,
        teacher=teacher,
        starts_from=starts_from,
    )
    return model, plan


def _is_elsewhere(student_args: Any) -> bool:
    return student_args.teacher_backend not in (None, "hf")


def _teacher_config(student_args: Any) -> Any:
    """None: there is no teacher at hand."""
    from transformers import AutoConfig

    from trainers.command_line import model_path

    if student_args.teacher is None or (_is_elsewhere(student_args) and not student_args.init_from_teacher):
        return None
    teacher = model_path("teacher", student_args.teacher)
    return AutoConfig.from_pretrained(teacher, revision=student_args.teacher_revision)


def _teacher_dtype(student_args: Any, config: Any) -> Any:
    import torch

    name = student_args.teacher_dtype
    if name != "auto":
        return getattr(torch, name)
    return getattr(config, "dtype", None) or torch.float32


def _codec_config(source: str, vocab_size: int | None, teacher_config: Any) -> Any:
    """Of a trained codec, or of a recipe `FILE.yaml:SECTION`.

    Raises:
        SystemExit: a recipe without `vocab_size` or a teacher that tells it.
    """
    from transformers import AutoConfig

    from modeling_latentforge import LatentForgeAutoencoderConfig
    from scripts.train_autoencoder import CodecArguments
    from trainers import AEConfig, DataArguments, parse_arguments
    from trainers.command_line import model_path

    if ".yaml" not in source:
        config = AutoConfig.from_pretrained(model_path("autoencoder", source))
        return getattr(config, "autoencoder_config", config)
    if vocab_size is None and teacher_config is None:
        raise SystemExit(f"{source} says nothing of the tokenizer: add --vocab_size.")
    codec_args, _, _ = parse_arguments(
        CodecArguments, DataArguments, AEConfig, argv=["--tokenizer", "none", "--config", source]
    )
    shape = dict(vars(codec_args))
    del shape["tokenizer"]
    return LatentForgeAutoencoderConfig(
        vocab_size=vocab_size or teacher_config.get_text_config().vocab_size, pad_token_id=0, eos_token_id=0, **shape
    )


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
