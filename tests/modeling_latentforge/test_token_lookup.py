"""What followed the last time: the same for whole rows, token by token, and by the definition."""

import copy
import json

import pytest
import torch

from modeling_latentforge import LatentForgeForCausalLM
from modeling_latentforge.token_lookup import begin_history, ending_sizes, extend_history, find_continuations

from ..conftest import tiny_student


def by_definition(row: list[int], known: list[bool], sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """(id, level) of each place, straight from the words of the docstring."""
    found = []
    for end in range(len(row)):
        best = (0, 0)
        for level, size in enumerate(sizes, 1):
            ending = range(end - size + 1, end + 1)
            if ending[0] < 0 or not all(known[i] for i in ending):
                continue
            for place in range(end - 1, size - 2, -1):
                earlier = range(place - size + 1, place + 1)
                if all(known[j] for j in earlier) and [row[j] for j in earlier] == [row[i] for i in ending]:
                    best = (row[place + 1], level) if known[place + 1] else (0, 0)  # (any, 0)
                    break
        found.append(best)
    return found


@pytest.mark.parametrize("longest", [1, 4, 16, 64])
def test_whole_rows_are_looked_up_as_defined(longest):
    """A hash that confuses endings, or looks at the token it is to predict, would make held-out figures too good."""
    torch.manual_seed(0)
    ids = torch.randint(3, (8, 60))
    ids[0, 30:] = ids[0, :30]  # one long repetition
    mask = torch.rand(ids.shape) > 0.1
    mask[:2] = True
    sizes = ending_sizes(longest)
    found, levels = find_continuations(ids, mask, sizes)
    for row in range(len(ids)):
        expected = by_definition(ids[row].tolist(), mask[row].tolist(), sizes)
        assert list(zip((found[row] * (levels[row] > 0)).tolist(), levels[row].tolist(), strict=True)) == expected
    assert int(levels[0, 45]) == min(len(sizes), 5)


def test_token_by_token_finds_what_whole_rows_find():
    """Otherwise generation reads other hints than training did, and only the text's quality would tell."""
    torch.manual_seed(0)
    ids, mask = torch.randint(3, (6, 50)), torch.rand(6, 50) > 0.1
    lengths = [1, 7, 20, 33, 2, 20]
    sizes = ending_sizes(16)
    history, runs = begin_history(ids, mask, lengths, sizes)
    assert history.shape == (6, 33) and runs.shape == (6, 32)
    whole = find_continuations(ids, mask, sizes)
    boundaries = torch.tensor(sizes, dtype=torch.int8)
    rows = torch.arange(6)
    for step in range(15):
        places = torch.tensor(lengths) + step
        history, runs, found, levels = extend_history(history, runs, ids[rows, places], mask[rows, places], boundaries)
        assert torch.equal(levels, whole[1][rows, places])
        assert torch.equal(found[levels > 0], whole[0][rows, places][levels > 0])


def test_a_later_token_changes_nothing_before_it():
    """A causal model that looks ahead has a likelihood that is none."""
    torch.manual_seed(0)
    ids = torch.randint(4, (2, 40))
    changed = ids.clone()
    changed[:, 25:] = 9
    for one, other in zip(*(find_continuations(x, None, ending_sizes(8)) for x in (ids, changed)), strict=True):
        assert torch.equal(one[:, :25], other[:, :25])


def test_a_checkpoint_from_before_says_how_it_is_loaded(tmp_path):
    """Otherwise whoever has one hears of missing weights only."""
    student = tiny_student(decoder_lookup=0).eval()
    student.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["decoder_lookup"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="decoder_lookup=0"):
        LatentForgeForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    loaded = LatentForgeForCausalLM.from_pretrained(tmp_path, decoder_lookup=0)
    assert torch.equal(loaded(ids).logits, student(ids).logits)


def test_ids_of_any_integer_type_are_looked_up_alike():
    """Arrow and numpy hand out int32."""
    torch.manual_seed(0)
    student, ids = tiny_student().eval(), torch.randint(9, (2, 24))
    assert torch.equal(student(ids.int()).logits, student(ids).logits)
    found = [begin_history(x, None, [24, 24], ending_sizes(16)) for x in (ids, ids.int())]
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_lookup_teaches_a_decoder_to_repeat_what_lies_beyond_its_window():
    """What it is for: a name that the window no longer holds."""
    torch.manual_seed(0)
    losses = {}
    for longest in (0, 4):
        student = tiny_student(decoder_lookup=longest, decoder_memory="none", decoder_window=4, initializer_range=0.05)
        student.train()
        optimizer = torch.optim.AdamW([x for x in student.parameters() if x.requires_grad], lr=1e-2)
        for _ in range(100):
            first = torch.randint(student.config.vocab_size, (8, 16))
            ids = first.repeat(1, 2)
            labels = torch.where(torch.arange(32) >= 20, ids, -100)
            loss = student(ids, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[longest] = float(loss.detach())
    assert losses[4] < 0.2 * losses[0]


def add_one(student: LatentForgeForCausalLM) -> None:
    with torch.no_grad():
        student.decoder.embed_tokens.weight[:, ::2].add_(1)


def load_others(student: LatentForgeForCausalLM) -> None:
    torch.manual_seed(5)
    student.load_state_dict(tiny_student(initializer_range=0.5).state_dict())


def move_as_deepspeed_does(student: LatentForgeForCausalLM) -> None:
    student.train()
    student.decoder.lookup.level.weight.data.mul_(-3)  # no counter of torch tells
    student.eval()


def replace_storage(student: LatentForgeForCausalLM) -> None:
    weight = student.decoder.lookup.projection.weight
    weight.data = torch.randn_like(weight)


def adapt(*targets: str):
    def change(student: LatentForgeForCausalLM) -> None:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False)
        peft.inject_adapter_in_model(config, student)

    return pytest.param(change, id=" ".join(targets))


def learn_in_eval_mode(student: LatentForgeForCausalLM) -> None:
    found = student.decoder.embed_lookup(torch.tensor([[3, 7]]), torch.tensor([[1, 2]]))
    found.square().sum().backward()
    torch.optim.AdamW(student.parameters(), lr=0.1, fused=True).step()  # counts nothing either


def assign_in_inference_mode(student: LatentForgeForCausalLM) -> None:
    torch.manual_seed(5)
    others = tiny_student(initializer_range=0.5).state_dict()
    with torch.inference_mode():
        student.load_state_dict({name: x.clone() for name, x in others.items()}, assign=True)


@pytest.mark.parametrize(
    "change",
    [
        *(add_one, load_others, move_as_deepspeed_does, replace_storage, learn_in_eval_mode, assign_in_inference_mode),
        *(adapt("lookup.projection"), adapt("lookup.gate", "lookup.level")),
    ],
)
def test_steps_see_every_change_of_the_weights(change):
    """A table of an earlier state would go on writing, and only the text's quality would tell."""
    torch.manual_seed(0)
    student = tiny_student(initializer_range=0.5).eval()

    def step() -> torch.Tensor:
        with torch.no_grad():
            return student.decoder.step_lookup(torch.tensor([3, 7]), torch.tensor([1, 2]))[:, 0]

    def whole() -> torch.Tensor:
        with torch.no_grad():
            return student.decoder.embed_lookup(torch.tensor([[3, 7]]), torch.tensor([[1, 2]]))[0]

    before = step()
    assert student.decoder._lookup_table is not None
    torch.testing.assert_close(before, whole())
    change(student)
    torch.testing.assert_close(step(), whole())
    assert not torch.allclose(step(), before)
    if change is not assign_in_inference_mode:  # such weights cannot be converted outside of it
        assert student.to(torch.bfloat16) and step().dtype == torch.bfloat16


def test_steps_with_gradients_take_no_table():
    """It is made without them: the loss of a written text would teach the lookup nothing."""
    student = tiny_student(initializer_range=0.5).eval()
    with torch.no_grad():
        student.decoder.step_lookup(torch.tensor([3]), torch.tensor([1]))
    student.decoder.step_lookup(torch.tensor([3]), torch.tensor([1])).sum().backward()
    assert student.decoder.lookup.projection.weight.grad is not None


def test_steps_under_autocast_take_weights_of_two_dtypes():
    """A table is made without autocast, where such weights cannot be multiplied."""
    student = tiny_student(initializer_range=0.5).eval()
    student.decoder.embed_tokens.to(torch.bfloat16)
    ids, levels = torch.tensor([3, 7]), torch.tensor([1, 2])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        step, whole = student.decoder.step_lookup(ids, levels), student.decoder.embed_lookup(ids[None], levels[None])
    torch.testing.assert_close(step[:, 0], whole[0])


def test_a_table_stays_out_of_copies():
    """A pickle would be larger by it, and hold addresses of a process that is gone."""
    student = tiny_student().eval()
    with torch.no_grad():
        student.decoder.step_lookup(torch.tensor([3]), torch.tensor([1]))
    assert copy.deepcopy(student).decoder._lookup_table is None and student.decoder._lookup_table is not None
