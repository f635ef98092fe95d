"""Problems with their steps and dialogues with their summaries: what is read, thought and said."""

import json
import re

import pytest

from trainers.arithmetic import STEPS, arithmetic_problems
from trainers.evaluation.wire_methods import answer_quality
from trainers.tasks import TASKS, Example, load_task


def test_every_step_of_a_made_up_problem_is_right_and_follows_from_the_one_before():
    """A model that is taught a wrong sum and judged by it is a good model of nothing."""
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    lengths = set()
    for record in arithmetic_problems("validation", 300):
        example = TASKS["reasoning"].parse(record)[0]
        lengths.add(len(example.steps))
        value = int(re.search(r"has (\d+) ", example.context)[1])
        asked = example.context.split(". ")[1:-1]
        for step, sentence in zip(example.steps, asked, strict=True):
            first, sign, second, _, result = step.split()
            assert int(first) == value, "of what was there"
            assert re.search(r"\d+", sentence)[0] == second, "what the sentence says"
            assert sign != "/" or value % int(second) == 0
            value = operations[sign](value, int(second))
            assert int(result) == value and 1 <= value <= 99
        assert example.answers == (str(value),) and example.prompt == ""
    assert lengths == set(range(STEPS[0], STEPS[1] + 1))


def test_made_up_problems_are_the_same_everywhere_and_in_one_split_only():
    """A problem that was learned by heart is no measure of thinking."""
    splits = {name: [row["question"] for row in arithmetic_problems(name, 200)] for name in ("train", "test")}
    assert splits["train"] == [row["question"] for row in arithmetic_problems("train", 200)]
    assert splits["train"] != [row["question"] for row in arithmetic_problems("train", 200, seed=1)]
    assert len(set(splits["train"]) | set(splits["test"])) == 400
    assert splits["train"][0] == (
        "Ben has 9 eggs. Ben sells 4. A machine makes 4 of each. Ben keeps one of 2 equal parts. A friend brings "
        "17 eggs. The eggs are shared by 3, and Ben keeps one share. How many eggs does Ben have now?"
    )
    loaded = load_task("reasoning", "validation", "builtin:arithmetic", 5)
    assert len(loaded) == 5 and all(example.steps for example in loaded)
    with pytest.raises(ValueError, match="take train, validation, test"):
        load_task("reasoning", "all", "builtin:arithmetic")
    with pytest.raises(FileNotFoundError):
        load_task("gsm8k", "train", "./builtin:arithmetic")


def test_a_solution_is_its_lines_and_the_result_is_what_is_said():
    """A calculator's marks, or the result among the steps, are learned as language."""
    record = {"question": "How many?", "answer": "He has 2+2 = <<2+2=4>>4.\n\nThen 4*2 = $<<4*2=8>>8.\n#### 8"}
    example = TASKS["reasoning"].parse(record)[0]
    assert example.steps == ("He has 2+2 = 4.", "Then 4*2 = $8.") and example.answers == ("8",)
    assert TASKS["gsm8k"].parse(record)[0].steps == (), "where the whole solution is the answer"
    assert answer_quality("gsm8k", example, "that is 8", None) == {"gsm8k": 1.0}
    with pytest.raises(ValueError, match="a step is empty"):
        Example("a", "", ("b",), "", "a", steps=("",))


def test_a_dialogue_is_read_and_any_of_its_summaries_counts(tmp_path, caplog):
    """One summary of three makes the others wrong."""
    records = [
        {"id": "1", "dialogue": "A: Hi.\r\nB: Bye.", "summary": "They part."},
        {"id": "2", "dialogue": "A: No.", "summaries": ["A refuses.", "A says no.", "A refuses."]},
        {"id": "3", "dialogue": None, "summary": "Nothing."},
    ]
    for name in ("samsum", "dialogsum"):
        (tmp_path / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        first, second = load_task(name, "test", str(tmp_path))
        assert (first.context, first.answers, first.prompt) == ("A: Hi.\nB: Bye.", ("They part.",), "")
        assert second.answers == ("A refuses.", "A says no.")
        assert "no dialogue" in caplog.text
        found = answer_quality(TASKS[name].metric, second, "a says no", None)
        assert found == {"rouge_l": 1.0}


def test_steps_of_a_file_of_one_s_own_are_read():
    """Chains of thought are what people have in files of their own."""
    (example,) = TASKS["custom"].parse({"context": "a", "answer": "c", "steps": ["b", "b b"]})
    assert example.steps == ("b", "b b") and example.labels is None
