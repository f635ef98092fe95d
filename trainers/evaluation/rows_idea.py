"""Rows of `make verify TOPIC=idea`: a text as a few vectors, thought about and read out.

No pretrained weights are reachable where this was written: encoders and receivers are small language models trained
here by `scripts/train_teacher.py`, on novels or on the texts of the row, and every figure says so.
"""

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from modeling_latentforge import LatentForgeIdea, LatentForgeIdeaConfig, Receiver

from ..arithmetic import arithmetic_problems
from ..tasks import Example, TextCut, load_task
from ..verification import ROOT, Context, Measured, Row
from ..wire_build import new_encoder_config
from ..wire_models import byte_tokenizer, load_wire
from .answers import gsm8k_match, rouge_l, token_f1
from .paired_statistics import mcnemar, paired_difference
from .rows_main import books
from .rows_wire import script
from .wire_methods import other_contexts


MOST_STEPS = 6  # of a made-up problem


# -- what is trained


def tokenizer_folder(context: Context, name: str, data: str, vocab_size: int) -> Path:
    """Of these texts; EOS is BOS too, as at the beginning of a block of training."""
    folder = context.shared_dir / "tokenizers" / name
    if not (folder / "tokenizer.json").exists():
        words = ["--data", data, "--vocab_size", str(vocab_size), "--output_dir", str(folder)]
        subprocess.run([sys.executable, str(ROOT / "scripts" / "train_tokenizer.py"), *words], check=True)
        known = AutoTokenizer.from_pretrained(folder)
        known.bos_token = known.eos_token
        known.save_pretrained(folder)
    return folder


def receiver_folder(
    context: Context,
    name: str,
    data: str,
    steps: int,
    vocab_size: int = 4096,
    layers: int = 4,
    block_size: int = 256,
    learning_rate: float = 2e-3,
) -> Path:
    """A small language model of these texts with a tokenizer of its own; trained once."""
    folder = context.shared_dir / "receivers" / name
    if not (folder / "eval_results.json").exists():
        context.say(f"receiver {name}")
        flags = {
            "data": data,
            "tokenizer": tokenizer_folder(context, name, data, vocab_size),
            "architecture": "llama",
            "num_hidden_layers": layers,
            "block_size": block_size,
            "max_steps": steps,
            "per_device_train_batch_size": 8,
            "learning_rate": learning_rate,
            "save_steps": 250,
            "save_total_limit": 1,
        }
        script("train_teacher.py", flags, folder)
    return folder


def idea_of(context: Context, name: str, receiver: Path, **flags: Any) -> LatentForgeIdea:
    """An idea model, trained once."""
    folder = context.shared_dir / name
    if not (folder / "eval_results.json").exists():
        context.say(f"idea model {name}")
        defaults = {
            "mode": "train",
            "receiver": receiver,
            "encoder": receiver,
            "encoder_layers": 2,
            "pooling_layers": 1,
            "prefix_len": 16,
            "train_backbone": "true",
            "max_eval_examples": 128,
            "batch_size": 16,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 100,
            "save_steps": 500,
            "save_total_limit": 1,
            "logging_steps": 50,
        }
        script("idea.py", {**defaults, **flags}, folder)
    (reader,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["bridges"]
    idea = load_wire(str(folder), {reader: str(receiver)})
    assert isinstance(idea, LatentForgeIdea)
    return idea


def said(idea: LatentForgeIdea, texts: Sequence[str], max_new_tokens: int, prompt: str = "") -> list[str]:
    """Greedy, in batches."""
    found: list[str] = []
    for start in range(0, len(texts), 32):
        part = texts[start : start + 32]
        found += idea.generate_batch(part, [prompt] * len(part), max_new_tokens=max_new_tokens)
    return found


# -- what is measured


def windows_of_novels(data: str, tokenizer: Any, limit: int | None = None) -> list[str]:
    """Those that are 32 tokens by themselves too."""
    cut = TextCut("reconstruct", 32, tokenizer=tokenizer)
    texts = (
        x.context.strip() for x in load_task("text", "all", data, None if limit is None else 2 * limit, text_cut=cut)
    )
    whole = [text for text in texts if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 32]
    return whole[:limit]


def reconstruction(context: Context, count: int = 256) -> Measured:
    """Windows of 32 tokens through N ideas; thinking is left out. The receiver has learned to say a window again, as
    any large language model can, and the vectors that it is given learn to be the embeddings of the tokens."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(context, "windows", books()["data"], 1024))
    windows = windows_of_novels(books()["data"], tokenizer, 100_000)
    half = len(windows) // 2  # of them for the receiver
    lines = ({"text": f"{text}\n{text}"} for text in windows[:half])
    twice = str(write_jsonl(context.shared_dir / "windows.jsonl", lines))
    # four documents of 32 + 1 + 32 tokens and EOS in a block
    receiver = receiver_folder(context, "windows", twice, 600, layers=2, block_size=264, learning_rate=3e-3)
    rows = [{"context": text, "prompt": "\n", "answer": text} for text in windows[half:]]
    data = context.shared_dir / "windows"
    write_jsonl(data / "train.jsonl", rows[256:])
    write_jsonl(data / "validation.jsonl", rows[:256])
    encoder = encoder_with_places(context, receiver)
    texts = windows_of_novels(books()["eval_data"], tokenizer, count)
    found: dict[str, float] = {}
    for ideas in (8, 1):
        idea = idea_of(
            context,
            f"reconstruct_{ideas}",
            receiver,
            encoder=encoder,
            dataset="custom",
            data=data,
            num_ideas=ideas,
            steps=0,
            prefix_len=32,
            compression_hidden=1024,
            batch_size=64,
            align_weight=1 / embed_mean_square(receiver),
            max_steps=3800 if ideas == 8 else 300,
        )
        ours = said(idea, texts, 40, prompt="\n")
        ids = [
            tokenizer([text.strip() for text in side], add_special_tokens=False)["input_ids"] for side in (ours, texts)
        ]
        found[f"{ideas} x 256"] = statistics.mean(token_f1(*pair) for pair in zip(*ids, strict=True))
        found[f"{ideas} x 256, whole"] = statistics.mean(one == other for one, other in zip(*ids, strict=True))
    figure = (
        "token F1 " + ", ".join(f"{n} x 256 {found[f'{n} x 256']:.1%}" for n in (8, 1)) + "; whole windows "
        f"{found['8 x 256, whole']:.0%} and {found['1 x 256, whole']:.0%}; {len(texts)} windows"
    )
    return Measured(figure, found["8 x 256"] >= 0.9, found)


def encoder_with_places(context: Context, receiver: Path) -> Path:
    """A BERT of two layers with random weights, which is told where a token stands: a mean forgets it."""
    folder = context.shared_dir / "encoders" / receiver.name
    tokenizer = AutoTokenizer.from_pretrained(receiver)
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 1024}
    BertModel(
        BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=64, **sizes)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def embed_mean_square(receiver: Path) -> float:
    """Of the embeddings: what the distance of a vector to them is counted in."""
    weight = AutoModelForCausalLM.from_pretrained(receiver).get_input_embeddings().weight
    return float(weight.detach().float().square().mean())


def dialogsum() -> Path:
    root = Path(os.environ.get("LATENTFORGE_DATA", ROOT.parent / "shared" / "data")) / "_noncommercial" / "dialogsum"
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not there: set LATENTFORGE_DATA to the folder that holds it")
    return root


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def lead_3(dialogue: str) -> str:
    """Its first three turns, without who says them."""
    return " ".join(re.sub(r"^#\w+#: ?", "", line) for line in dialogue.splitlines()[:3])


def summaries(context: Context, max_new_tokens: int = 64) -> Measured:
    """Against the same model trained without a dialogue, against another dialogue's vectors, and the first turns. The
    receiver learns to read by LoRA: frozen, it does not look at vectors that stand for a dialogue."""
    train = load_task("dialogsum", "train", str(dialogsum()))
    texts = [{"text": f"{example.context}\n{example.answers[0]}"} for example in train]
    receiver = receiver_folder(
        context, "dialogues", str(write_jsonl(context.shared_dir / "dialogues.jsonl", texts)), 500, vocab_size=2048
    )
    models = {}
    for name, is_read in (("summaries", True), ("summaries_without_input", False)):
        data = context.shared_dir / ("read" if is_read else "no_input")
        for split in ("train", "validation"):
            examples = load_task("dialogsum", split, str(dialogsum()))
            write_jsonl(data / f"{split}.jsonl", (summary_row(example, is_read) for example in examples))
        models[name] = idea_of(
            context,
            name,
            receiver,
            dataset="custom",
            data=data,
            num_ideas=8,
            steps=1,
            lora_r=64,
            max_steps=3000,
            train_sampling_strategy="group_by_length",
            max_eval_examples=256,
            eval_strategy="steps",
            eval_steps=250,
            save_steps=250,
            load_best_model_at_end="true",
        )
    idea, empty = models["summaries"], models["summaries_without_input"]
    test = load_task("dialogsum", "test", str(dialogsum()))
    dialogues = [example.context for example in test]
    written = {
        "idea": said(idea, dialogues, max_new_tokens, "\n"),
        "no input": said(empty, ["."], max_new_tokens, "\n") * len(test),
        "shuffled": said(idea, other_contexts(test, 0), max_new_tokens, "\n"),
        "LEAD-3": [lead_3(dialogue) for dialogue in dialogues],
    }
    scores = {name: [best_rouge(*pair) for pair in zip(found, test, strict=True)] for name, found in written.items()}
    against = {name: paired_difference(scores["idea"], scores[name]) for name in written if name != "idea"}
    figure = "ROUGE-L " + ", ".join(f"{name} {statistics.mean(values):.3f}" for name, values in scores.items())
    figure += "; " + ", ".join(f"p against {name} {found['p']:.4f}" for name, found in against.items())
    passed = all(against[name]["difference"] > 0 and against[name]["p"] < 0.01 for name in ("no input", "shuffled"))
    return Measured(figure, passed, {"against": against, "examples": len(test), "texts": written["idea"][:8]})


def summary_row(example: Example, is_read: bool) -> dict[str, Any]:
    """Of a file of one's own; a dialogue that is not read is a full stop."""
    context = example.context if is_read else "."
    common = {"prompt": "\n", "answer": example.answers[0]}
    return {"context": context, **common, "document": example.document, "id": example.id}


def best_rouge(text: str, example: Example) -> float:
    return max(rouge_l(text, answer) for answer in example.answers)


def thinking(context: Context, count: int = 1000) -> Measured:
    """As many steps as the longest chain, each read as its own text, against none. The model without steps has a wider
    compression, for as many trained parameters."""
    # the receiver knows how such texts read
    texts = [{"text": f"{row['question']}\n{row['answer']}"} for row in arithmetic_problems("train")]
    receiver = receiver_folder(
        context, "arithmetic", str(write_jsonl(context.shared_dir / "arithmetic.jsonl", texts)), 488, 512, 2
    )
    common = {"dataset": "reasoning", "data": "builtin:arithmetic", "max_steps": 2500, "sample_tokens": 16}
    models = {"steps": idea_of(context, "thinking", receiver, steps=MOST_STEPS, **common)}
    width = equal_width(models["steps"])
    models["none"] = idea_of(context, "no_thinking", receiver, steps=0, compression_hidden=width, **common)
    trained = {name: trained_parameters(model) for name, model in models.items()}
    test = load_task("reasoning", "test", "builtin:arithmetic", count)
    problems = [example.context for example in test]
    right = {
        name: [gsm8k_match(*pair) for pair in zip(said(model, problems, 8), (x.answers[0] for x in test), strict=True)]
        for name, model in models.items()
    }
    accuracy = {name: statistics.mean(values) for name, values in right.items()}
    test_of = mcnemar(right["steps"], right["none"])
    figure = (
        f"{MOST_STEPS} steps {accuracy['steps']:.1%}, none {accuracy['none']:.1%} (p {test_of['p']:.4f}); trained "
        f"parameters {trained}"
    )
    by_length = {
        str(length): {
            name: statistics.mean(x for x, example in zip(values, test, strict=True) if len(example.steps) == length)
            for name, values in right.items()
        }
        for length in sorted({len(example.steps) for example in test})
    }
    passed = accuracy["steps"] - accuracy["none"] >= 0.05 and test_of["p"] < 0.05
    return Measured(figure, passed, {"accuracy": accuracy, "test": test_of, "by_length": by_length})


def trained_parameters(idea: LatentForgeIdea) -> int:
    """Those that anything reads: without steps the middle model is there, and idle."""
    idle = 0 if idea.config.steps else sum(x.numel() for x in idea.middle.parameters())
    return sum(x.numel() for x in idea.parameters()) - idle


def equal_width(idea: LatentForgeIdea) -> int:
    """Of a compression that has as many parameters as this model's and its middle model's."""
    config = idea.config
    per_unit = config.encoder_config.hidden_size + config.latent_size + 1
    return config.compression_hidden + round(sum(x.numel() for x in idea.middle.parameters()) / per_unit)


def interpolation(context: Context, count: int = 32) -> Measured:
    """Alpha 0 and 1 against the texts themselves, written alone; random weights, which are as exact as any."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|eos|>"})
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "n_embd": 256,
        "n_layer": 4,
        "n_head": 4,
        "initializer_range": 0.2,
    }
    sizes |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    encoder = new_encoder_config(None, None)
    idea = LatentForgeIdea(LatentForgeIdeaConfig(encoder_config=encoder, source="bytes", receiver=None)).eval()
    idea.add_receiver("gpt2", Receiver(GPT2LMHeadModel(GPT2Config(**sizes)), tokenizer))
    texts = [record["question"] for record in arithmetic_problems("test", count)]
    options = {"max_new_tokens": 16}
    own = [idea.generate(text, **options) for text in texts]
    wrong = []
    for first, second in zip(range(count), [*range(1, count), 0], strict=True):
        for kind in ("linear", "slerp"):
            for alpha, place in ((0, first), (1, second)):
                found = idea.interpolate_and_generate(texts[first], texts[second], alpha, kind, **options)
                if found != own[place]:
                    wrong.append([first, second, kind, alpha])
    figure = f"{4 * count - len(wrong)} of {4 * count} ends are the text's own, {len(set(own))} texts that differ"
    return Measured(figure, not wrong and len(set(own)) > count // 2, {"wrong": wrong})


def gate(context: Context) -> Measured:
    """Shapes, gradients, first target, EOS, frozen backbones: their tests, slow ones too."""
    files = ["tests/modeling_latentforge/test_idea.py", "tests/trainers/test_idea_trainer.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    return Measured(last, done.returncode == 0, {"output": done.stdout[-4000:]})


ROWS = [
    Row(
        "gate",
        "shapes of the first model; gradients, first target token, EOS; backbones unchanged by training",
        "all tests",
        gate,
        setup="tests at tiny size",
        also=("tests/modeling_latentforge/test_idea.py", "tests/trainers/test_idea_trainer.py"),
    ),
    Row(
        "interpolation",
        "texts at alpha 0 and 1, linear and slerp",
        "exactly the endpoints' texts",
        interpolation,
        setup="8 x 256, random weights, encoder 2 x 256, GPT-2 of 4 x 256, 32 pairs",
    ),
    Row(
        "reconstruction",
        "sentences of at most 32 tokens that nobody was trained on, from 8 x 256 (and 1 x 256)",
        ">= 90 % token F1 at 8 x 256; 1 x 256 reported",
        reconstruction,
        long=True,
        setup="receiver 2 x 256 (Llama, V=1024), trained here on windows of novels that are said twice; encoder: BERT "
        "of 2 x 256, random weights, trained on; align_weight; 3,800 steps (1 x 256: 300) of 64 windows of 32 "
        "tokens each, 256 windows of other novels, greedy",
    ),
    Row(
        "summaries",
        "summaries of dialogues against the model without input, other dialogues' vectors and LEAD-3",
        "ROUGE-L above no input and shuffled, p < .01 each; LEAD-3 reported",
        summaries,
        long=True,
        setup="receiver 4 x 256 (Llama, V=2048), trained here on the training dialogues, LoRA of rank 64; encoder: "
        "its first two layers, trained on; DialogSum, 3,000 steps of 16, best held-out loss; best of the references",
    ),
    Row(
        "thinking",
        "accuracy on made-up word problems of 3 to 6 steps with 6 steps of thinking against none",
        ">= 5 points at equal trained parameters, p < .05 (McNemar), or the negative result",
        thinking,
        long=True,
        setup="receiver 2 x 256 (Llama, V=512), trained here on 20,000 such problems; its layers as encoder; "
        "2,500 steps of 16 each, 1,000 other problems",
    ),
]
