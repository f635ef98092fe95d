"""Rows of `make verify TOPIC=wire`: one message, several frozen receivers.

No pretrained weights are reachable where this was written: receivers are small language models of three architectures
and tokenizers, trained on novels by `scripts/train_teacher.py`, and every figure says so.
"""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_latentforge import LatentForgeWire, LatentForgeWireConfig, Receiver

from ..tasks import Example, TextCut, load_task
from ..verification import ROOT, Context, Measured, Row
from ..wire_models import load_wire
from .answers import token_f1
from .rows_main import books
from .wire_methods import message_sizes, other_contexts, read, score_answers
from .wire_statistics import gain_share


# architecture and vocabulary; the first two learn with the encoder, the third joins when it is done
RECEIVERS = {"llama": ("llama", 4096), "neox": ("gpt_neox", 3072), "qwen": ("qwen3", 2048)}
TOGETHER = ("llama", "neox")
CONTEXT_TOKENS, ANSWER_TOKENS, RATIO = 128, 32, 4
TEXTS = (
    "receivers: 4 x 256, Llama (V=4096), GPT-NeoX (V=3072) and for the third row Qwen3 (V=2048), 4 M tokens of books"
)


# -- what is trained


def script(name: str, flags: Mapping[str, Any], output: Path) -> None:
    """Run a script of training to its end; one that was broken off goes on."""
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", *_values(value))]
    if list(output.glob("checkpoint-*")):
        words += ["--resume_from_checkpoint", "true"]
    words += ["--output_dir", str(output), "--report_to", "none", "--seed", "0"]
    subprocess.run([sys.executable, str(ROOT / "scripts" / name), *words], check=True)


def _values(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def tokenizer_folder(context: Context, name: str) -> Path:
    """Of novels; texts begin with EOS where blocks of training did, so that EOS is BOS too."""
    folder = context.shared_dir / "tokenizers" / name
    if not (folder / "tokenizer.json").exists():
        words = ["--data", books()["data"], "--vocab_size", str(RECEIVERS[name][1]), "--output_dir", str(folder)]
        subprocess.run([sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), *words], check=True)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.bos_token = tokenizer.eos_token
        tokenizer.save_pretrained(folder)
    return folder


def receiver_folder(context: Context, name: str) -> Path:
    """A language model with a tokenizer of its own, on novels; trained once."""
    folder = context.shared_dir / "receivers" / name
    if not (folder / "eval_results.json").exists():
        tokenizer = tokenizer_folder(context, name)
        context.say(f"receiver {name}")
        flags = {
            **books(),
            "tokenizer": tokenizer,
            "architecture": RECEIVERS[name][0],
            "block_size": 256,
            "max_train_tokens": 4 * 10**6,
            "max_eval_tokens": 2**16,
            "max_steps": 1952,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
            "save_steps": 244,
            "save_total_limit": 1,
        }
        script("train_teacher.py", flags, folder)
    return folder


def wire_folder(context: Context, name: str, receivers: Sequence[str], **flags: Any) -> Path:
    """A wire to these receivers, of a new encoder that begins as the first two layers of `llama` unless `flags` say
    otherwise; trained once."""
    folder = context.shared_dir / name
    if not (folder / "eval_results.json").exists():
        places = [f"{receiver}={receiver_folder(context, receiver)}" for receiver in receivers]
        if "init_wire" not in flags:
            flags = {
                "encoder": receiver_folder(context, "llama"),
                "encoder_layers": 2,
                "latent_size": 256,
                **flags,
            }
        context.say(f"wire {name}")
        defaults = {
            "receivers": places,
            "bos": "yes",
            "dataset": "text",
            "data": books()["data"],
            "context_tokens": CONTEXT_TOKENS,
            "continue_tokens": ANSWER_TOKENS,
            "max_eval_examples": 128,
            "per_device_train_batch_size": 16,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 100,
            "save_steps": 500,
            "save_total_limit": 1,
            "logging_steps": 50,
        }
        script("train_wire.py", {**defaults, **flags}, folder)
    return folder


def loaded(context: Context, folder: Path) -> LatentForgeWire:
    names = json.loads((folder / "config.json").read_text())["bridges"]
    return load_wire(str(folder), {name: str(receiver_folder(context, name)) for name in names})


def both(context: Context) -> Path:
    """The wire that most rows read: texts to be continued, two receivers, soft prompts."""
    flags = {"ratio": RATIO, "learning_rate": 1e-3, "max_steps": 1500, "kd_weight": 1.0}
    return wire_folder(context, "continue", TOGETHER, **flags)


# -- what is measured


def held_out(tokenizer: PreTrainedTokenizerBase, count: int, **cut: Any) -> list[Example]:
    """Windows of novels that nobody was trained on, cut by the encoder's tokens."""
    return load_task("text", "all", books()["eval_data"], count, text_cut=TextCut(tokenizer=tokenizer, **cut))


@torch.no_grad()
def nll_of(
    wire: LatentForgeWire, name: str, method: str, examples: Sequence[Example], batch_size: int = 16
) -> list[float]:
    """Nats per token of each continuation's first tokens, by a method of `wire_methods.read`."""
    contexts = other_contexts(examples, 0) if method == "shuffled" else [example.context for example in examples]
    found: list[float] = []
    for start in range(0, len(examples), batch_size):
        batch = slice(start, start + batch_size)
        reading = read(wire, name, method, contexts[batch])
        prompts = [example.prompt for example in examples[batch]]
        answers = [example.answers[0] for example in examples[batch]]
        found += [entry["nll"] for entry in score_answers(reading, prompts, answers, ANSWER_TOKENS)]
    return found


def shares(wire: LatentForgeWire, name: str, examples: Sequence[Example]) -> dict[str, dict[str, Any]]:
    """Of the gain that the context as text brings: `latent`, `shuffled` and `zero`, with intervals over novels'
    windows; see `gain_share`."""
    nll = {x: nll_of(wire, name, x, examples) for x in ("closed_book", "text", "latent", "shuffled", "zero")}
    return {x: gain_share(nll["closed_book"], nll[x], nll["text"]) for x in ("latent", "shuffled", "zero")}


def in_words(name: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    low, high = found["latent"]["interval"]
    return (
        f"{name}: {found['latent']['share']:.0%} ({low:.0%} to {high:.0%}) of {found['latent']['gain']:.3f} nats, "
        f"shuffled {found['shuffled']['share']:.0%}, zero {found['zero']['share']:.0%}"
    )


def continuation(context: Context, count: int = 2048) -> Measured:
    wire = loaded(context, both(context))
    examples = held_out(wire.tokenizer, count, context_tokens=CONTEXT_TOKENS, answer_tokens=ANSWER_TOKENS)
    found = {name: shares(wire, name, examples) for name in TOGETHER}
    passed = all(
        one["latent"]["gain_interval"][0] >= 0.2
        and one["latent"]["share"] >= 0.6
        and max(one["shuffled"]["share"], one["zero"]["share"]) <= 0.05
        for one in found.values()
    )
    mask = wire.encode([examples[0].context]).latent_mask
    assert mask is not None
    latents = int(mask.sum())
    figure = f"{latents} latents; " + "; ".join(in_words(name, one) for name, one in found.items())
    return Measured(figure, passed, found)


def third_receiver(context: Context, count: int = 512) -> Measured:
    """A bridge alone, behind the encoder of the other two, which stays as it is to the byte."""
    first = both(context)
    folder = wire_folder(
        context,
        "third",
        ["qwen"],
        init_wire=first,
        freeze_encoder="true",
        learning_rate=1e-3,
        max_steps=750,
        kd_weight=1.0,
    )
    wire, before = loaded(context, folder), loaded(context, first)
    own = {name: x for name, x in wire.state_dict().items() if not name.startswith("bridges.qwen.")}
    changed = [name for name, x in before.state_dict().items() if not torch.equal(x, own[name])]
    examples = held_out(wire.tokenizer, count, context_tokens=CONTEXT_TOKENS, answer_tokens=ANSWER_TOKENS)
    found = {name: shares(wire, name, examples) for name in RECEIVERS}
    others = statistics.mean(found[name]["latent"]["share"] for name in TOGETHER)
    relative = found["qwen"]["latent"]["share"] / others
    figure = f"{relative:.0%} of the first two's mean share; {in_words('qwen', found['qwen'])}; weights of the others "
    figure += "unchanged" if not changed else f"CHANGED: {changed[:3]}"
    return Measured(figure, relative >= 0.85 and not changed, found)


def fsq_packet(context: Context, count: int = 512) -> Measured:
    """The message as few bytes, learned with the rest, beside the one that is not rounded."""
    levels = ",".join(["5"] * 24)
    plain = both(context)
    flags = {"quantizer": "fsq", "quantizer_levels": levels, "learning_rate": 1e-3, "max_steps": 750}
    folder = wire_folder(context, "continue_fsq", TOGETHER, init_wire=plain, kd_weight=1.0, **flags)
    wire, before = loaded(context, folder), loaded(context, plain)
    examples = held_out(wire.tokenizer, count, context_tokens=CONTEXT_TOKENS, answer_tokens=ANSWER_TOKENS)
    sizes = message_sizes(wire, [example.context for example in examples])
    packet = statistics.mean(size["bytes"]["fsq"] for size in sizes)
    text = statistics.mean(size["context_bytes"] for size in sizes)
    found = {name: [shares(one, name, examples)["latent"]["share"] for one in (before, wire)] for name in TOGETHER}
    worst = max(first - second for first, second in found.values())
    figure = f"{packet:.0f} bytes for {text:.0f} of UTF-8 (largest {max(size['bytes']['fsq'] for size in sizes)}); "
    figure += ", ".join(f"{name} {second:.0%} ({first:.0%} unrounded)" for name, (first, second) in found.items())
    smaller = all(size["bytes"]["fsq"] <= size["context_bytes"] for size in sizes)
    return Measured(figure, smaller and worst <= 0.1, {"shares": found, "packet": packet, "text": text})


def reconstruction(context: Context, count: int = 256) -> Measured:
    """32 tokens through 8 vectors and a frozen receiver, which gets them as keys and values of each layer: of the
    bridges the quickest to learn this (docs/experiments.md)."""
    flags = {"ratio": 4, "bridge": "kv", "text_mode": "reconstruct", "context_tokens": 32}
    flags |= {"learning_rate": 1e-3, "max_steps": 1000}
    wire = loaded(context, wire_folder(context, "reconstruct", ["llama"], **flags))
    examples = held_out(wire.tokenizer, count, mode="reconstruct", context_tokens=32)
    tokenizer = wire.receiver("llama").tokenizer
    scores = []
    for start in range(0, count, 32):
        batch = examples[start : start + 32]
        texts = wire.generate(
            "llama", wire.encode([x.context for x in batch]), [x.prompt for x in batch], max_new_tokens=48
        )
        for example, text in zip(batch, texts, strict=True):
            ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in (text, example.answers[0])]
            scores.append(token_f1(*ids))
    mean = statistics.mean(scores)
    return Measured(f"{mean:.1%} token F1 of {count} windows, 8 vectors of 256", mean >= 0.9, {"scores": scores})


# -- what needs no training


GATES = {
    1: "tests/modeling_latentforge/test_wire.py -k contexts_own_embeddings",
    2: "tests/modeling_latentforge/test_wire.py -k next_tokens_cross_entropy",
    3: "tests/modeling_latentforge/test_wire.py -k first_target",
    4: "tests/modeling_latentforge/test_wire.py -k nothing_about_the_gold",
    5: "tests/modeling_latentforge/test_wire.py -k 'padding_of_a_message or alone_and_in_a_batch'",
    6: "tests/modeling_latentforge/test_wire.py tests/modeling_latentforge/test_latent_packet.py -k "
    "'packet_is_read or unpacked or formula'",
    7: "tests/trainers/test_wire_trainer.py -k latents_come_to_carry",
    8: "tests/modeling_latentforge/test_wire.py -k 'saved_wire or gradients_reach'",
    9: "tests/trainers/evaluation/test_paired_statistics.py -k 'scipy or binomial'",
    10: "tests/modeling_latentforge/test_idea.py -k 'shapes_of_the_seed or ends_of_an_interpolation or "
    "every_step_can_be_read or first_token_of_a_target'",
}


def gates(context: Context) -> Measured:
    """The tests of the gates, each by its own."""
    found: dict[str, Any] = {}
    for number, words in GATES.items():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *shlex.split(words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        found[str(number)] = {"passed": done.returncode == 0, "said": done.stdout.strip().splitlines()[-1:]}
        context.say(f"gate {number}: {found[str(number)]['said']}")
    failed = [number for number, one in found.items() if not one["passed"]]
    figure = f"{len(found) - len(failed)} of {len(found)}" + (f", failed {failed}" if failed else "")
    return Measured(figure, not failed, found)


def random_receivers(tokenizer: PreTrainedTokenizerBase) -> dict[str, Receiver]:
    common = {"vocab_size": len(tokenizer), "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    grouped = {"num_key_value_heads": 2, "head_dim": 64}
    models: dict[str, Any] = {
        "llama": LlamaForCausalLM(LlamaConfig(**common, intermediate_size=512)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**common, intermediate_size=512)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**common, **grouped, intermediate_size=512)),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_embd=256, n_layer=4, n_head=4)),
    }
    return {name: Receiver(model, tokenizer) for name, model in models.items()}


@torch.no_grad()
def replay(context: Context) -> Measured:
    """The context's own embeddings in the place of latents: beside the same rows as ids, and beside transformers' own
    forward of each row alone."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(context, "llama"))
    examples = held_out(tokenizer, 8, context_tokens=CONTEXT_TOKENS, answer_tokens=ANSWER_TOKENS)
    examples = [replace(x, context=x.context[: len(x.context) - 40 * row]) for row, x in enumerate(examples)]  # ragged
    contexts, prompts = [x.context for x in examples], [x.prompt for x in examples]
    answers = [x.answers[0] for x in examples]
    exact, alone = {}, {}
    for name, receiver in random_receivers(tokenizer).items():
        said, targets = receiver.answer_logits(
            None, receiver.compose(receiver.text_injection(contexts), prompts, answers)
        )
        of_ids, _ = receiver.answer_logits(None, receiver.compose_text(contexts, prompts, answers))
        exact[name] = float((said - of_ids).abs().max())
        alone[name] = 0.0
        for row, context_of_row in enumerate(contexts):
            ids = receiver.compose_text([context_of_row], [prompts[row]], [answers[row]]).input_ids
            count = int((targets[row] != -100).sum())
            plain = receiver.model(ids).logits[0, -count - 1 : -1]
            alone[name] = max(alone[name], float((plain - said[row, :count]).abs().max()))
    figure = ", ".join(f"{name} {exact[name]:g} ({alone[name]:.0e} beside the row alone)" for name in exact)
    passed = max(exact.values()) == 0 and max(alone.values()) <= 1e-5
    return Measured(f"{figure}: largest difference of a logit", passed, {"exact": exact, "alone": alone})


def prefill(context: Context, length: int = 2048, repeats: int = 3) -> Measured:
    """FLOPs and seconds until the first token, of text and of its latents; random weights."""
    torch.manual_seed(0)
    vocabulary = 32_000
    sizes = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2048, "vocab_size": vocabulary}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=12, max_position_embeddings=4096)).eval()
    encoder = LlamaConfig(**sizes, num_hidden_layers=2, max_position_embeddings=4096).to_dict()
    wire = LatentForgeWire(LatentForgeWireConfig(encoder_config=encoder, ratio=RATIO, latent_size=256)).eval()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(context, "llama"))
    wire.add_receiver("llama", Receiver(model, tokenizer))
    ids = torch.randint(3, vocabulary, (1, length))
    mask = torch.ones_like(ids)

    def of_text() -> None:
        model(ids, logits_to_keep=1)

    def of_message(message: Any) -> None:
        model(inputs_embeds=wire.inject("llama", message).embeds, logits_to_keep=1)

    with torch.no_grad():
        message = wire(ids, mask)
        ways: dict[str, Callable[[], None]] = {
            "text": of_text,
            "encoded": lambda: of_message(wire(ids, mask)),
            "cached": lambda: of_message(message),
        }
        flops, seconds = {}, {}
        for name, way in ways.items():
            with FlopCounterMode(display=False) as counter:
                way()
            flops[name] = counter.get_total_flops()
        for name, way in ways.items():
            readings = []
            for _ in range(repeats):
                start = time.perf_counter()
                way()
                readings.append(time.perf_counter() - start)
            seconds[name] = statistics.median(readings)
    ratios = {name: (flops[name] / flops["text"], seconds[name] / seconds["text"]) for name in ("encoded", "cached")}
    figure = "; ".join(
        f"{name}: {of_flops:.2f}x FLOPs, {of_time:.2f}x time" for name, (of_flops, of_time) in ratios.items()
    )
    figure += f" (text: {flops['text'] / 1e9:.0f} GFLOP, {seconds['text']:.2f} s, {os.cpu_count()} cores)"
    passed = max(ratios["encoded"]) <= 0.5 and max(ratios["cached"]) <= 0.3
    return Measured(figure, passed, {"flops": flops, "seconds": seconds})


ROWS = [
    Row("gates", "the numeric gates of wire and idea", "all ten", gates, setup="tests at tiny size, by number"),
    Row(
        "replay",
        "a context's own embeddings in the place of latents against its ids: logits of 32 tokens",
        "exact in fp32, three architectures (1e-5 beside transformers' forward of a row alone)",
        replay,
        setup="4 x 256, random weights: Llama, GPT-NeoX, Qwen3, GPT-2; 8 contexts of 128 tokens",
    ),
    Row(
        "prefill",
        "FLOPs and time to the first token of a 2048-token context, as latents (4x) against text",
        "<= 0.5x; with the encoder's output cached <= 0.3x",
        prefill,
        setup="receiver 12 x 768, V=32,000, encoder of two such layers, random weights, fp32, medians of 3",
    ),
    Row(
        "continuation",
        "continuation after 128 context tokens sent as 32 latents: share of what the context as text brings",
        "gain >= 0.2 nats with CI; >= 60 % for both receivers; shuffled and zero latents <= 5 %",
        continuation,
        long=True,
        setup=f"{TEXTS}; one encoder of two layers that begin as the Llama's, soft prompts, 1,500 steps of 16; "
        "2,048 windows of novels nobody read, first 32 tokens",
    ),
    Row(
        "reconstruction",
        "32 tokens through the receiver from 8 vectors of 256",
        ">= 90 % token F1",
        reconstruction,
        long=True,
        setup=f"{TEXTS}; the Llama alone, bridge kv, 1,000 steps of 16 windows; 256 windows of novels nobody read",
    ),
    Row(
        "third_receiver",
        "a third receiver behind the encoder as it is, bridge only",
        ">= 85 % of the first two's share",
        third_receiver,
        long=True,
        setup=f"{TEXTS}; 750 steps of 16 windows",
    ),
    Row(
        "fsq_packet",
        "the message as FSQ codes, header included",
        "<= the UTF-8 bytes of the text, losing <= 10 points of the share",
        fsq_packet,
        long=True,
        setup=f"{TEXTS}; 24 dimensions of 5 levels a latent; the first row's wire, 750 steps on",
    ),
]
