"""`scripts/accelerate_configs/`: accelerate takes each file, and the processes are told what it says."""

import importlib.util
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from tests.conftest import tiny_student
from trainers.evaluation.distributed_runs import launcher_environment
from trainers.sharding import in_one_group, shard_on_cpu


FOLDER = Path(__file__).parents[2] / "scripts" / "accelerate_configs"
NAMES = ["cpu", "single_gpu", "multi_gpu", "multi_node", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"]


def parsed(name: str, *flags: str):
    words = ["--config_file", str(FOLDER / f"{name}.yaml"), *flags, "scripts/train_student.py", "--bf16"]
    arguments = launch.launch_command_parser().parse_args(words)
    return launch._validate_launch_command(arguments)[:2]


def test_there_is_one_for_every_way_to_train():
    """A file that no test names is one that nobody loads."""
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_takes_every_file(name):
    """accelerate refuses unknown keys, but only when eight GPUs have been waited for."""
    assert isinstance(load_config_from_file(str(FOLDER / f"{name}.yaml")), ClusterConfig)
    arguments, config = parsed(name)
    assert config.num_processes == arguments.num_processes >= 1
    assert arguments.mixed_precision == "no"  # the script's flags choose
    assert arguments.multi_gpu == name.startswith("multi_")
    assert arguments.use_deepspeed == name.startswith("deepspeed") and arguments.use_fsdp == (name == "fsdp2")
    known = {action.dest for action in launch.launch_command_parser()._actions} | {"fsdp_ignored_modules"}
    for section in (config.fsdp_config, config.deepspeed_config):
        assert set(section) <= known, set(section) - known  # of these accelerate takes any


def test_the_codec_is_whole_and_the_layers_are_shared():
    """A misspelt module would be sharded, or nothing would be, and only the memory tells."""
    environment = launcher_environment(FOLDER / "fsdp2.yaml")
    assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
    student = tiny_student()
    modules = dict(student.named_modules())
    assert environment["FSDP_IGNORED_MODULES"] in modules
    assert not any(weight.requires_grad for weight in modules[environment["FSDP_IGNORED_MODULES"]].parameters())
    assert student._no_split_modules == {"LlamaDecoderLayer"}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_takes_its_files(stage):
    """Validated by DeepSpeed's own class where it is installed; it is no dependency."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    arguments, config = parsed(f"deepspeed_zero{stage}")
    arguments.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == str(stage)
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            if key.startswith("ACCELERATE_"):
                patch.setenv(key, value)
        from accelerate.utils import DeepSpeedPlugin

        zero = DeepSpeedPlugin().deepspeed_config["zero_optimization"]
    validated = DeepSpeedZeroConfig(**zero)
    assert int(validated.stage) == stage
    assert validated.gather_16bit_weights_on_model_save == (stage == 3)


def test_sharding_leaves_alone_what_did_not_ask_for_it(monkeypatch):
    """One process, or several by DDP, must stay what they were."""
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True)
    before = accelerator.distributed_type
    shard_on_cpu(accelerator, None)
    assert accelerator.distributed_type == before and not hasattr(accelerator.state, "fsdp_plugin")


def test_the_output_matrix_is_hidden_from_accelerate_only_while_it_shards():
    """Generation and losses read it a moment later."""
    student = tiny_student()
    output = student.get_output_embeddings()
    with in_one_group(student):
        assert student.get_output_embeddings() is None and student.get_input_embeddings() is None
    assert student.get_output_embeddings() is output
    assert "get_output_embeddings" not in vars(student)
