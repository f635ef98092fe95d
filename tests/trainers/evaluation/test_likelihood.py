import pytest
import torch

from tests.conftest import text_batch, tiny_student
from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.evaluation.likelihood import exact_likelihood, why_no_likelihood


def blocks(rows: int = 4, only: int | None = None):
    ids = text_batch(rows, 16)
    if only is not None:
        ids, rows = ids[only : only + 1], 1

    class Rows:
        def __len__(self):
            return rows

        def __getitem__(self, part):
            return {"input_ids": ids[part], "attention_mask": ids[part] * 0 + 1, "labels": ids[part]}

    return Rows()


@pytest.mark.parametrize(
    ("head", "decoder", "reason"),
    [
        ("energy", "parallel", "integral over that noise"),
        ("energy", "autoregressive", "integral over that noise"),
        ("regression", "parallel", "independent of each other"),
    ],
)
def test_a_likelihood_that_is_none_is_refused_with_what_to_ask_instead(head: str, decoder: str, reason: str):
    """A plausible figure of another distribution would stand in a table beside exact ones."""
    with pytest.raises(ValueError, match=f"no exact likelihood: .*{reason}.*BrierLM"):
        exact_likelihood(tiny_student(head, decoder), blocks())


def test_the_interval_covers_what_other_text_gives():
    """A difference of 0.01 nats on a hundred rows is read as a result unless the table says otherwise."""
    model = tiny_teacher()
    found = exact_likelihood(model, blocks(64), batch_size=2)
    low, high = found["nats_interval"]
    singles = [exact_likelihood(model, blocks(64, only=row), batch_size=1) for row in range(64)]
    spread = torch.tensor([one["nats_per_token"] for one in singles]).std() / 64**0.5
    assert low < found["nats_per_token"] < high
    assert (high - low) / 2 == pytest.approx(1.96 * float(spread), rel=0.5)


@pytest.mark.parametrize("make", [tiny_student, tiny_teacher])
def test_causal_models_have_one_in_nats_and_in_bits_per_byte(make):
    """Nats per token cannot be compared between tokenizers, bits per byte can."""
    model = make()
    assert why_no_likelihood(model) is None
    found = exact_likelihood(model, blocks(), byte_tokenizer())
    assert found["num_tokens"] == 4 * 15
    low, high = found["nats_interval"]
    assert low == high == pytest.approx(found["nats_per_token"]), "one piece of text tells nothing of another"
    bits = found["nats_per_token"] * found["num_tokens"] / 0.6931472
    assert found["bits_per_byte"] == pytest.approx(bits / found["num_bytes"])
