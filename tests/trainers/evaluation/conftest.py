"""What the tests of `make verify`'s rows share: a context, and a finished demo of tiny models."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.conftest import EOS, PAD, VOCAB, tiny_autoencoder, tiny_student
from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.evaluation.side_by_side import training_code
from trainers.verification import Context


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Of a row of the topic `main`."""
    work_dir = tmp_path / "verify" / "main" / "row"
    work_dir.mkdir(parents=True)
    return Context("main", "row", work_dir, work_dir.parent, say=lambda line: None)


@pytest.fixture(scope="session")
def tiny_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make demo` leaves behind, of untrained models over bytes; read only."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(0)
    # teacher and students as `LlamaConfig` of one shape; a text's end must come from nowhere else than the limit
    backbone = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    models = {
        "autoencoder": tiny_autoencoder(),
        "teacher": tiny_teacher(num_hidden_layers=4, eos_token_id=EOS, pad_token_id=PAD),
        "student": tiny_student(backbone=backbone),
        "student_parallel": tiny_student(decoder="parallel", backbone=backbone),
    }
    with torch.no_grad():  # the tiny models' weights are large, and rounding grows with them
        for model in models.values():
            for parameter in model.parameters():
                parameter *= 0.5 if parameter.dim() > 1 else 1.0
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "report").mkdir()
    (folder / "report" / "report.json").write_text("{}")
    (folder / "demo.json").write_text(json.dumps({"teacher": {"seconds": 1.0}}))
    return folder


@pytest.fixture
def demo(context: Context, tiny_demo: Path) -> Path:
    """A copy of it, where the row `demo` of this context would have left it."""
    folder = context.shared_dir / "demo" / "clone" / "runs" / "demo"
    shutil.copytree(tiny_demo, folder)
    (context.shared_dir / "demo" / "code").write_text(training_code())
    return folder
