"""Weights and caches of fewer bits, through transformers' own arguments."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, TorchAoConfig
from transformers.utils import is_optimum_quanto_available

from tests.conftest import PAD, TINY, VOCAB, text_batch, tiny_student


DECODERS = pytest.mark.parametrize("decoder", ["autoregressive", "parallel"])
NEEDS_TORCHAO = "needs torchao: pip install -e '.[dev]'"
NEEDS_BITSANDBYTES = "needs bitsandbytes: pip install bitsandbytes"
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": PAD, "max_new_tokens": 11}


def torchao_config(bits: int, **kwargs) -> TorchAoConfig:
    ao = pytest.importorskip("torchao.quantization", reason=NEEDS_TORCHAO)
    # its default changes torch's settings for the whole process
    kinds = {
        8: lambda: ao.Int8WeightOnlyConfig(set_inductor_config=False),
        4: lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
    }
    return TorchAoConfig(kinds[bits](), **kwargs)


def quantized_linears(model: torch.nn.Module) -> set[str]:
    """Names of the linear maps whose weight is no plain tensor of floats."""
    linears = {name: module.weight for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {
        name
        for name, weight in linears.items()
        if type(weight) is not torch.nn.Parameter or not weight.is_floating_point()
    }


def backbone_linears(model: torch.nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("model.backbone.")
    }


@pytest.fixture(params=["autoregressive", "parallel"])
def folder(tmp_path, request):
    tiny_student("regression", request.param).save_pretrained(tmp_path / "student")
    return tmp_path / "student"


# -- weights


@pytest.mark.parametrize("bits, bound", [(8, 0.05), (4, 0.5)])
def test_stock_quantisation_takes_the_backbone_and_nothing_else(folder, bits, bound):
    """transformers skips output matrix and tied weights only: the codec, which must stay the one of all students, and
    the small decoder that works at every token would lose bits too."""
    plain = AutoModelForCausalLM.from_pretrained(folder)
    student = AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao_config(bits))
    assert quantized_linears(student) == backbone_linears(student) == backbone_linears(plain)
    for name, tensor in plain.state_dict().items():
        if not name.startswith("model.backbone."):
            assert torch.equal(tensor, student.state_dict()[name]), name
    ids = text_batch(2, 12)
    with torch.no_grad():
        exact, rounded = plain(ids).logits, student(ids).logits
    error = (rounded - exact).std() / exact.std()
    assert 0 < error < bound
    assert student.generate(ids, **GREEDY).shape == (2, 23)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_student_is_saved_and_loaded_as_it_is(folder, tmp_path, bits):
    """A file of few bits that loads as random weights, or must be quantised again, is of no use on the Hub."""
    student = AutoModelForCausalLM.from_pretrained(folder, quantization_config=torchao_config(bits))
    student.save_pretrained(tmp_path / "small")
    saved = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert {"autoencoder", "head", "lm_head"} < set(saved["modules_to_not_convert"])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert quantized_linears(again) == backbone_linears(student)
    ids = text_batch(2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, student(ids).logits)
    assert torch.equal(again.generate(ids, **GREEDY), student.generate(ids, **GREEDY))


def test_a_list_of_ones_own_says_what_is_left_as_it_is(folder):
    """Whoever names modules means these, and the config that was passed is theirs."""
    config = torchao_config(8, modules_to_not_convert=["model.backbone.layers.0", "autoencoder", "decoder", "lm_head"])
    student = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    found = quantized_linears(student)
    assert "head.to_latent" in found and "model.backbone.layers.1.self_attn.q_proj" in found
    assert not [name for name in found if name.startswith(("model.backbone.layers.0", "autoencoder"))]
    default = torchao_config(8)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=default)
    assert default.modules_to_not_convert is None


@DECODERS
def test_torchao_quantises_the_backbone_in_place(decoder):
    """The other way that torchao's own pages show."""
    ao = pytest.importorskip("torchao.quantization", reason=NEEDS_TORCHAO)
    student, ids = tiny_student("regression", decoder), text_batch(2, 12)
    ao.quantize_(student.model.backbone, torchao_config(8).quant_type)
    assert quantized_linears(student) == backbone_linears(student)
    made = student.generate(ids, **GREEDY)
    assert torch.equal(made, student.generate(ids, **GREEDY, cache_implementation="static"))


def bitsandbytes_student(folder, device: str, **kwargs):
    config = BitsAndBytesConfig(**kwargs)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, device_map={"": device}, dtype=torch.bfloat16
    )


BITSANDBYTES = pytest.mark.parametrize(
    "options",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    ],
    ids=["int8", "nf4"],
)


def check_bitsandbytes(device: str, options: dict, tmp_path) -> None:
    # its 4-bit kernel for the CPU wants weights of whole blocks of 64
    sizes = {**TINY, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    folder = tmp_path / "student"
    tiny_student(backbone=LlamaConfig(**sizes)).save_pretrained(folder)
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=NEEDS_BITSANDBYTES)
    student, ids = bitsandbytes_student(folder, device, **options), text_batch(2, 12).to(device)
    kinds = (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.Linear4bit)
    found = {name for name, module in student.named_modules() if isinstance(module, kinds)}
    assert found == backbone_linears(student) and found
    student.save_pretrained(tmp_path / "small")  # before the first token: on a CPU that repacks 4-bit weights, rounded
    made = student.generate(ids, **GREEDY)
    assert made.shape == (2, 23) and made.max() < VOCAB
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map={"": device})
    assert torch.equal(again.generate(ids, **GREEDY), made)


@BITSANDBYTES
def test_bitsandbytes_takes_the_backbone_and_saves(tmp_path, options):
    """Its list of what is left has another name than everybody else's."""
    check_bitsandbytes("cpu", options, tmp_path)


@pytest.mark.gpu
@BITSANDBYTES
def test_bitsandbytes_takes_the_backbone_and_saves_on_a_gpu(tmp_path, options):
    """Its kernels for CUDA are others than those for the CPU."""
    check_bitsandbytes("cuda", options, tmp_path)


# -- caches


@DECODERS
# optimum-quanto compiles its kernels in C++ the first time
@pytest.mark.parametrize("backend", ["fp8", pytest.param("quanto", marks=pytest.mark.slow)])
def test_a_quantised_cache_holds_patches(decoder, backend):
    """A cache that transformers takes for one of tokens would be asked for K times its slots."""
    if backend == "quanto" and not is_optimum_quanto_available():
        pytest.skip("needs optimum-quanto: pip install optimum-quanto")
    student, ids = tiny_student("regression", decoder), text_batch(2, 24)
    config = {"backend": backend} | (
        {"nbits": 4, "q_group_size": 32, "residual_length": 2} if backend == "quanto" else {}
    )
    made = student.generate(
        ids, **GREEDY, cache_implementation="quantized", cache_config=config, return_dict_in_generate=True
    )
    assert made.sequences.shape == (2, 35)
    layer = made.past_key_values.backbone.layers[0]
    assert layer.get_seq_length() == 34 // 4 and layer._quantized_keys is not None
