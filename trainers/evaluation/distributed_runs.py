"""Small trainings in several processes of one machine, for comparisons between ways to spread a step.

    python -m trainers.evaluation.distributed_runs FOLDER PROCESSES ACCUMULATION codec-ddp student-fsdp2 ...

Processes are forks of one that has imported everything: on two cores, imports would take longer than the trainings.
They run on the CPU, over gloo. A run writes `FOLDER/<case>.json`.
"""

import inspect
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.commands import launch
from accelerate.state import AcceleratorState
from accelerate.utils import merge_fsdp_weights
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM

from ..ae_config import AEConfig
from ..ae_trainer import AETrainer
from ..base_trainer import IGNORE_INDEX, LatentTrainer
from ..data import PatchCollator
from ..kd_config import KDConfig
from ..kd_trainer import KDTrainer
from ..teachers import HFTeacher
from ..verification import ROOT


STEPS, ROWS_A_STEP = 10, 8
PATCH, LENGTH, VOCAB = 4, 32, 256
BACKBONE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}


def launcher_environment(config_file: Path, *flags: str) -> dict[str, str]:
    """What `accelerate launch --config_file` tells the processes of FSDP."""
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(config_file), *flags, "script.py"])
    arguments, *_ = launch._validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith("FSDP_") or name.endswith("_FSDP")}


def rows(count: int) -> list[dict[str, list[int]]]:
    """Bytes of this file, each row with another number of labels: a mean of means is then not the mean."""
    text = list(inspect.getsource(sys.modules[__name__]).encode())
    data = []
    for row in range(count):
        ids = text[row * LENGTH : (row + 1) * LENGTH]
        asked = 1 + 7 * row % (LENGTH - 1)
        labels = [id if place < asked else IGNORE_INDEX for place, id in enumerate(ids)]
        data.append({"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": labels})
    return data


def codec() -> LatentForgeAutoencoder:
    shape = {
        "latent_size": 16,
        "hidden_size": 32,
        "intermediate_size": 48,
        "token_dropout": 0.0,
        "latent_dropout": 0.0,
    }
    return LatentForgeAutoencoder(
        LatentForgeAutoencoderConfig(vocab_size=VOCAB, patch_size=PATCH, initializer_range=0.1, **shape)
    )


def trainer_of(kind: str, output_dir: Path, accumulation: int, **kwargs: Any) -> LatentTrainer:
    """Of a `codec`, or of a `student` with a teacher; the same weights and rows whatever the number of processes."""
    torch.manual_seed(0)
    common = {
        "output_dir": str(output_dir),
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": STEPS,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **kwargs,
    }
    data: dict[str, Any] = {
        "train_dataset": rows(STEPS * ROWS_A_STEP),
        "eval_dataset": rows(5),
        "data_collator": PatchCollator(PATCH),
    }
    if kind == "codec":
        return AETrainer(codec(), AEConfig(**common), **data)
    student = LatentForgeForCausalLM.from_autoencoder(codec(), LlamaConfig(**BACKBONE), initializer_range=0.1)
    teacher = LlamaForCausalLM(LlamaConfig(**BACKBONE, initializer_range=0.3)).eval()
    return KDTrainer(student, KDConfig(**common, mse_weight=0.1), teacher=HFTeacher(teacher), **data)


def run_case(case: str, folder: Path, accumulation: int) -> dict[str, Any]:
    """Train, evaluate, save; what was logged, whether weights lie in shares, and how far the logits of the saved
    models are from those of the trained one.

    Nothing is drawn at random: noise would be another in every process, and no loss comparable.
    """
    kind, way = case.split("-")
    AcceleratorState._reset_state(True)
    for name in [name for name in os.environ if name.startswith("FSDP_") or name == "ACCELERATE_USE_FSDP"]:
        del os.environ[name]
    if way == "fsdp2":
        os.environ.update(launcher_environment(ROOT / "scripts" / "accelerate_configs" / "fsdp2.yaml"))
    output_dir = folder / case
    trainer = trainer_of(kind, output_dir, accumulation)
    with mock.patch("torch.randn_like", torch.zeros_like):
        trainer.train()
        # now: a forward without a backward leaves the root's weights gathered
        in_shares = {name: hasattr(weight, "device_mesh") for name, weight in trainer.model.named_parameters()}
        evaluated = trainer.evaluate()
    trainer.save_model()
    model = trainer.model.eval()
    ids = torch.tensor([row["input_ids"] for row in rows(3)])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    names = {"loss", "grad_norm", *trainer.part_names}
    found: dict[str, Any] = {
        "log": [{name: x[name] for name in sorted(names & set(x))} for x in trainer.state.log_history if "loss" in x],
        "eval_nll": evaluated["eval_nll"],
        "in_shares": [name for name, is_share in in_shares.items() if is_share],
        "whole": [name for name, is_share in in_shares.items() if not is_share],
        "logits_differ_by": {},
    }
    checkpoint = output_dir / f"checkpoint-{STEPS}"
    if way == "fsdp2":
        merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(checkpoint))  # waits for all processes
    if trainer.is_world_process_zero():
        model.config.save_pretrained(checkpoint)
        loaders: dict[str, Any] = {"codec": LatentForgeAutoencoder, "student": LatentForgeForCausalLM}
        for name, place in (("final", output_dir), ("checkpoint", checkpoint)):
            with torch.no_grad():
                logits = loaders[kind].from_pretrained(place).eval()(input_ids=ids).logits
            found["logits_differ_by"][name] = float((logits - expected).abs().max())
        (folder / f"{case}.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()
    return found


def in_processes(count: int, work: Callable[[int], None]) -> list[int]:
    """Call `work(rank)` in forks that find each other by torch's environment; their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            }
            torch.set_num_threads(1)
            work(rank)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(folder: str, processes: str, accumulation: str, *cases: str) -> int:
    def work(rank: int) -> None:
        for case in cases:
            run_case(case, Path(folder), int(accumulation))

    return max(abs(status) for status in in_processes(int(processes), work))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
