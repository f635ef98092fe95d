import pytest

from tests.conftest import text_batch, tiny_student
from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.evaluation.likelihood import exact_likelihood, why_no_likelihood


def blocks(rows: int = 4):
    ids = text_batch(rows, 16)

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


@pytest.mark.parametrize("make", [tiny_student, tiny_teacher])
def test_causal_models_have_one_in_nats_and_in_bits_per_byte(make):
    """Nats per token cannot be compared between tokenizers, bits per byte can."""
    model = make()
    assert why_no_likelihood(model) is None
    found = exact_likelihood(model, blocks(), byte_tokenizer())
    assert found["num_tokens"] == 4 * 15
    bits = found["nats_per_token"] * found["num_tokens"] / 0.6931472
    assert found["bits_per_byte"] == pytest.approx(bits / found["num_bytes"])
