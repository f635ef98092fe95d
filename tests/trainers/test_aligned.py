"""The aligned head: its noise, its training, and what it writes."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError

from modeling_latentforge import LatentForgeConfig
from tests.conftest import VOCAB, text_batch, tiny_student
from tests.trainers.training_helpers import ragged_rows, tiny_args, tiny_teacher
from trainers import KDConfig, KDTrainer, PatchCollator
from trainers.losses.aligned_noise import choice_interval, draw_from, sparse_choice_interval
from trainers.teachers import DenseSignal, HFTeacher, SparseSignal


def drawn_at(logits, noise):
    """What a teacher writes with this noise, by sorting and a running sum."""
    probs, order = torch.sort(logits.double().softmax(-1), dim=-1, descending=True, stable=True)
    place = (probs.cumsum(-1) <= noise.double()[:, None]).sum(-1, keepdim=True).clamp(max=logits.shape[1] - 1)
    return order.gather(1, place)[:, 0]


def test_a_tokens_noise_makes_the_teacher_write_that_token():
    """Noise of a neighbour's interval teaches the student that the teacher meant another token."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(500, 40)
    logits[::7] = logits[::7].round()  # ties
    ids = torch.randint(40, (500,))
    lower, width = choice_interval(logits, ids)
    plain = width > 1e-4  # below that fp32 has few numbers between an interval's ends
    assert plain.sum() > 300
    for share in (0.01, 0.5, 0.99):
        assert torch.equal(drawn_at(logits, lower + share * width)[plain], ids[plain])
    assert torch.equal(drawn_at(logits, torch.zeros(500)), logits.argmax(-1)), "0 is greedy"


def test_stored_entries_give_the_intervals_that_are_known():
    """Twenty stored ids are what a server says; a token outside them still has a place, behind all of them."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(300, 40)
    ids = torch.randint(40, (300,))
    values, top = logits.log_softmax(-1).topk(10)
    lower, width = sparse_choice_interval(top, values, ids)
    exact = choice_interval(logits, ids)
    known = (top == ids[:, None]).any(-1)
    assert known.any() and not known.all()
    torch.testing.assert_close(lower[known], exact[0][known])
    torch.testing.assert_close(width[known], exact[1][known])
    torch.testing.assert_close(lower[~known], values.exp().sum(-1)[~known])
    torch.testing.assert_close((lower + width)[~known], torch.ones(int((~known).sum())))


def test_noise_of_text_that_the_teacher_wrote_is_even():
    """Where it is not, sampling with even noise asks the head for what it has never learned."""
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, VOCAB).expand(20_000, VOCAB)
    ids = torch.distributions.Categorical(logits=logits[0]).sample((20_000,))
    noise = draw_from(*choice_interval(logits, ids), torch.Generator().manual_seed(1)).sort().values
    even = (torch.arange(20_000) + 0.5) / 20_000
    assert float((noise - even).abs().max()) < 2.0 / math.sqrt(20_000)  # Kolmogorov-Smirnov, far in its tail
    assert float(noise.min()) >= 0 and float(noise.max()) < 1


@pytest.mark.parametrize("sparse", [False, True])
def test_noise_belongs_to_the_token_that_a_position_predicts(sparse):
    """One place off, the noise would be that of the next token; after padding, that of a pad."""
    torch.manual_seed(0)
    logits = 0.5 * torch.randn(2, 6, VOCAB)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]])
    ids = torch.randint(VOCAB, (2, 6))
    positions = torch.where(mask == 1, torch.arange(6), -1).cummax(1).values
    if sparse:
        values, top = logits.log_softmax(-1).topk(VOCAB)
        signal = SparseSignal(top, values, VOCAB, positions=positions)
    else:
        signal = DenseSignal.from_logits(logits, positions=positions)
    noise = signal.aligned_noise(ids, torch.Generator().manual_seed(0))
    assert noise.shape == ids.shape
    for row in (0, 1):
        for place in range(1, 6):
            said = int(positions[row, place - 1])
            if said >= 0:
                drawn = drawn_at(logits[row, said][None], noise[row, place][None])
                assert int(drawn) == int(ids[row, place]), (row, place)


def aligned_trainer(tmp_path, teacher, rows=32, **kwargs):
    torch.manual_seed(0)
    model = tiny_student("aligned", "parallel", train_decoder=True)
    return KDTrainer(
        model=model,
        args=tiny_args(KDConfig, tmp_path, **kwargs),
        teacher=teacher,
        train_dataset=ragged_rows(rows),
        eval_dataset=ragged_rows(8),
        data_collator=PatchCollator(4),
    )


def test_an_aligned_student_learns_to_read_its_noise(tmp_path):
    """A head that ignores the noise writes one patch only, and is a regression head with a teacher to pay."""
    trainer = aligned_trainer(tmp_path, HFTeacher(tiny_teacher()), max_steps=150, learning_rate=3e-3)
    trainer.teacher_callback.close_after_training = False
    trainer.train()
    right = trainer.evaluate()["eval_ce_given_noise"]
    assert "eval_nll" not in trainer.evaluate(), "it is no likelihood"
    model = trainer.model.eval()
    batch = PatchCollator(4)(ragged_rows(8))
    noise = (
        HFTeacher(tiny_teacher())
        .signal(batch["input_ids"], batch["attention_mask"])
        .aligned_noise(batch["input_ids"], torch.Generator().manual_seed(0))
    )
    with torch.no_grad():
        losses = [float(model(**batch, aligned_noise=x, output_logits=False).loss) for x in (noise, noise.roll(1, 1))]
    assert losses[0] < losses[1] - 0.2, "noise of the neighbours must be worse"
    assert right < math.log(VOCAB)
    trainer.end()


def test_an_aligned_head_refuses_what_it_cannot_learn_from(tmp_path):
    """Without noise, or with a KL given the noise, it would learn something else in silence."""
    with pytest.raises(ValueError, match="needs a teacher"):
        aligned_trainer(tmp_path, None)
    with pytest.raises(ValueError, match="kd_weight is 0.5"):
        aligned_trainer(tmp_path, HFTeacher(tiny_teacher()), kd_weight=0.5)
    model, ids = tiny_student("aligned", "parallel"), text_batch(2, 8)
    with pytest.raises(ValueError, match="aligned_noise"):
        model(ids, labels=ids)
    with pytest.raises(ValueError, match="is for aligned heads"):
        tiny_student("energy", "parallel")(ids, labels=ids, aligned_noise=torch.rand(2, 8))
    with pytest.raises(StrictDataclassClassValidationError, match="decoder_type='parallel'"):
        tiny_student("aligned", "autoregressive")


def write(model, ids, **kwargs):
    kwargs = {"max_new_tokens": 8, "eos_token_id": -1, **kwargs}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)[:, ids.shape[1] :]


def test_generation_writes_what_the_noise_stands_for():
    """Tokens drawn from the softmaxes on top of the noise would no longer belong together."""
    torch.manual_seed(0)
    model, ids = tiny_student("aligned", "parallel").eval(), text_batch(3, 8)
    with torch.no_grad():
        condition = model._conditions(model._lay_out(ids, None, 0), None, False)[0][:, -1:]

        def patch(noise):
            return model.get_output_embeddings()(model._decode_parallel(model.head.sample(condition, noise))).argmax(
                -1
            )

        assert torch.equal(write(model, ids, do_sample=False)[:, :4], patch(None))
        assert torch.equal(patch(None), patch(torch.zeros(3, 1, 4))), "greedy is noise 0"
        torch.manual_seed(5)
        noise = 0.7 * model.head.draw_noise((3, 1), condition)
        torch.manual_seed(5)
        assert torch.equal(write(model, ids, do_sample=True, top_p=0.7, top_k=0)[:, :4], patch(noise))


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.5}])
def test_generation_refuses_options_that_would_change_nothing(options):
    """A temperature that is ignored is believed."""
    with pytest.raises(ValueError, match="reshapes probabilities"):
        write(tiny_student("aligned", "parallel"), text_batch(1, 8), do_sample=True, **options)


def test_an_aligned_student_survives_saving(tmp_path):
    """Its frequencies are part of what its weights mean."""
    model = tiny_student("aligned", "parallel")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ids = text_batch(2, 8)
    torch.testing.assert_close(model.eval()(ids).logits, again.eval()(ids).logits)
    assert LatentForgeConfig.from_pretrained(tmp_path).head_config.num_frequencies == 6
