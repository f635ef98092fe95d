import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import make_toy_data, train_teacher, train_tokenizer
from trainers.data import DataArguments, PatchCollator, load_blocks
from trainers.token_lm import ARCHITECTURES, TokenLMConfig, TokenLMTrainer, build_token_lm


K = 4


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with toy.jsonl, a tokenizer and a cache."""
    folder = tmp_path_factory.mktemp("teacher")
    make_toy_data.main(["--output", str(folder / "toy.jsonl"), "--num_documents", "300"])
    train_tokenizer.main(
        ["--data", str(folder / "toy.jsonl"), "--output_dir", str(folder / "tokenizer"), "--vocab_size", "400"]
        + ["--cache_dir", str(folder / "cache")]
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(room):
    return AutoTokenizer.from_pretrained(room / "tokenizer")


@pytest.fixture(scope="module")
def blocks(room, tokenizer):
    args = DataArguments(data=str(room / "toy.jsonl"), block_size=64, cache_dir=str(room / "cache"))
    return load_blocks(args, tokenizer, K, seed=0)


def tiny(architecture, tokenizer, **kwargs):
    torch.manual_seed(0)
    return build_token_lm(
        architecture, tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, **kwargs
    )


def trainer_for(model, blocks, folder, **kwargs):
    args = TokenLMConfig(output_dir=str(folder), use_cpu=True, report_to="none", save_strategy="no", **kwargs)
    return TokenLMTrainer(model, args, train_dataset=blocks[0], eval_dataset=blocks[1], data_collator=PatchCollator(K))


def test_the_teacher_learns_real_text_and_loads_with_auto_classes(room, tmp_path, capsys):
    """The demo, the verify rows and every student start from this directory."""
    out = tmp_path / "teacher"
    metrics = train_teacher.main(
        ["--data", str(room / "toy.jsonl"), "--tokenizer", str(room / "tokenizer"), "--output_dir", str(out)]
        + ["--cache_dir", str(room / "cache"), "--block_size", "64", "--patch_size", str(K), "--hidden_size", "32"]
        + ["--num_hidden_layers", "2", "--num_attention_heads", "2", "--max_steps", "80", "--logging_steps", "20"]
        + ["--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--save_strategy", "no", "--use_cpu"]
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert metrics["eval_nats_per_token"] < math.log(len(tokenizer)) - 1.5
    assert json.loads((out / "eval_results.json").read_text())["eval_num_tokens"] == metrics["eval_num_tokens"] > 100
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert model.config.use_cache and not model.config.tie_word_embeddings  # granite
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    prompt = tokenizer("Dear Ada", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 4
    assert "world_size=1" in capsys.readouterr().out


def test_unknown_flags_stop_the_run(room, capsys):
    """A misspelt size would train another model than the one that is reported."""
    with pytest.raises(SystemExit):
        train_teacher.main(["--tokenizer", str(room / "tokenizer"), "--hiden_size", "64"])
    assert "did you mean --hidden_size" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_chunked_loss_is_the_models_own(architecture, tied, tokenizer, blocks, tmp_path, monkeypatch):
    """A faster loss that is a little different makes every comparison with other code wrong."""
    monkeypatch.setattr("modeling_latentforge.modeling_token_loss.chunk_tokens", lambda *_: 50)
    model = tiny(architecture, tokenizer, tie_word_embeddings=tied)
    trainer = trainer_for(model, blocks, tmp_path)
    batch = PatchCollator(K)([blocks[0][row] for row in range(3)])
    model.train()
    for count in (None, 77):
        own = super(TokenLMTrainer, trainer).compute_loss(model, dict(batch), num_items_in_batch=count)
        own_grads = torch.autograd.grad(own, list(model.parameters()))
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        torch.testing.assert_close(loss, own)
        for mine, theirs in zip(grads, own_grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_pads_change_nothing_the_model_says_about_text(tokenizer, blocks):
    """A teacher that reads pads would be another model on a student's blocks than on plain text."""
    model = tiny("llama", tokenizer).eval()
    batch = PatchCollator(K)([blocks[0][row] for row in range(8)])
    pads = batch["attention_mask"] == 0
    assert pads.any()
    other = batch["input_ids"].masked_fill(pads, 7)
    with torch.no_grad():
        logits = [model(ids, attention_mask=batch["attention_mask"]).logits for ids in (batch["input_ids"], other)]
    assert logits[0].isfinite().all()
    torch.testing.assert_close(logits[0][~pads], logits[1][~pads])


def test_accumulation_equals_one_large_batch(tokenizer, blocks, tmp_path):
    """Rows with pads hold fewer tokens: a mean of means weighs them wrongly."""
    weights = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny("llama", tokenizer)
        trainer = trainer_for(
            model,
            blocks,
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            seed=3,
        )
        trainer.train()
        weights.append(model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_pad_embedding_is_never_that_of_eos(architecture, tokenizer):
    """torch freezes the pad row of an embedding: as EOS's row it would hide from the model where documents end."""
    assert tiny(architecture, tokenizer).config.pad_token_id == tokenizer.pad_token_id
    tokenizer = AutoTokenizer.from_pretrained(tokenizer.name_or_path, pad_token="<|endoftext|>")
    model = tiny(architecture, tokenizer)
    assert model.config.pad_token_id is None
    assert model.get_input_embeddings().padding_idx is None
    assert model.generation_config.pad_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"architecture": "rnn"}, "unknown architecture 'rnn': take one of granite, llama, gpt_neox, qwen3"),
        (
            {"hidden_size": 50, "num_attention_heads": 4},
            "hidden_size .50. must be a multiple of num_attention_heads .4.",
        ),
        ({"hidden_size": 36, "num_attention_heads": 4}, "must be even"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must be a multiple of num_key_value_heads .3."),
        ({"architecture": "gpt_neox", "num_key_value_heads": 1}, "gpt_neox has no grouped heads"),
    ],
)
def test_impossible_shapes_are_refused_with_their_numbers(wrong, message, tokenizer):
    """They fail inside attention otherwise, with shapes nobody wrote."""
    with pytest.raises(ValueError, match=message):
        build_token_lm(**{"architecture": "llama", "tokenizer": tokenizer, "num_hidden_layers": 1, **wrong})
