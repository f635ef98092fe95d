import random

import numpy as np
import pytest
import torch

from trainers.evaluation.answers import (
    common_subsequence,
    exact_match,
    f1,
    first_label,
    gsm8k_answer,
    gsm8k_match,
    label_accuracy,
    normalize_answer,
    rouge_l,
    token_f1,
)


TOPICS = ("World", "Sports", "Business", "Sci/Tech")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The Cat, a dog and an   owl!", "cat dog and owl"),
        ("U.S.-led", "usled"),  # punctuation goes before words are told apart
        ("a.the", "athe"),  # so that no article is left to find
        ("Theatre", "theatre"),
        ("\tÉcole\n«normale»\u2003", "école «normale»"),  # of punctuation only ASCII's
        ("The", ""),
        ("", ""),
    ],
)
def test_answers_are_normalized_by_squads_rules_in_their_order(text, expected):
    """Scores by other rules stand beside published ones and cannot be compared with them."""
    assert normalize_answer(text) == expected


def test_exact_match_is_with_any_reference():
    """SQuAD has three golds per question: the first alone makes every reader look worse."""
    assert exact_match("the Denver Broncos.", ["Carolina", "Denver Broncos"]) == 1
    assert exact_match("Denver", ["Carolina", "Denver Broncos"]) == 0
    assert exact_match("", ["Denver"]) == 0


def test_f1_is_the_best_over_references_and_counts_a_word_as_often_as_it_stands():
    """A set of words rewards a model that repeats itself."""
    # "new new york" against "new york city": 2 of 3 shared either way
    assert f1("New new York", ["the New York City"]) == pytest.approx(2 / 3)
    # 1 of 2 and 1 of 4: 2 * (1/2 * 1/4) / (3/4)
    assert f1("in 1973", ["oil crisis of 1973"]) == pytest.approx(1 / 3)
    assert f1("in 1973", ["oil crisis of 1973", "October 1973", "1973"]) == pytest.approx(2 / 3)
    assert f1("York New", ["New York"]) == 1


def test_nothing_against_nothing_is_right_and_against_something_wrong():
    """0 / 0 ends a run, and 0 for a right answer makes 100 % unreachable."""
    for score in (lambda a, b: f1(a, [b]), lambda a, b: exact_match(a, [b]), rouge_l):
        assert (score("", ""), score("", "word"), score("word", ""), score("!", "")) == (1, 0, 0, 1)
    assert (token_f1([], []), token_f1([], [1]), token_f1([1], [])) == (1, 0, 0)


@pytest.mark.parametrize("score", [exact_match, f1])
@pytest.mark.parametrize("references", [[], (), "gold"])
def test_a_question_without_a_list_of_references_is_refused(score, references):
    """A text is a list of letters: each would be taken for a gold answer."""
    with pytest.raises(ValueError, match="list of one right answer or more"):
        score("gold", references)


def test_accents_are_compared_as_they_are_written():
    """Whoever normalizes one side alone gets 0 for the right answer: neither is normalized here."""
    assert exact_match("Caf\u00c9", ["caf\u00e9"]) == 1  # lower case of one character
    assert exact_match("cafe\u0301", ["caf\u00e9"]) == 0  # e and its accent apart


def test_token_f1_counts_ids_whatever_holds_them():
    """Tensors of equal numbers are different keys of a count: every score would be 0."""
    expected = 2 * 3 / (4 + 5)  # 5, 5 and 7 are shared
    prediction, reference = [5, 5, 5, 7], [7, 5, 8, 9, 5]
    assert token_f1(prediction, reference) == pytest.approx(expected)
    assert token_f1(torch.tensor(prediction), torch.tensor(reference)) == pytest.approx(expected)
    assert token_f1(np.array(prediction), reference) == pytest.approx(expected)
    with pytest.raises(ValueError, match="one text"):
        token_f1(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("business, not sports", "Business"),
        ("It is SCI/TECH.", "Sci/Tech"),
        ("Worldwide businesses", None),
        ("", None),
        ("sports\nArticle: the world", "Sports"),
    ],
)
def test_the_first_label_that_is_a_word_counts(text, expected):
    """A model that goes on writing names every label in the end."""
    assert first_label(text, TOPICS) == expected


def test_a_longer_label_wins_over_its_beginning():
    """With labels NUM and NUM date every date would be a number."""
    assert first_label("num date", ["NUM", "NUM date"]) == "NUM date"
    assert first_label("num dates", ["NUM", "NUM date"]) == "NUM"


def test_a_text_without_a_label_is_wrong_and_a_denied_label_stands():
    """Leaving out texts without a label lifts a model that rarely answers."""
    assert label_accuracy("positive, I think", "positive", ["negative", "positive"]) == 1
    assert label_accuracy("negative or positive", "positive", ["negative", "positive"]) == 0
    assert label_accuracy("I cannot tell", "positive", ["negative", "positive"]) == 0
    assert label_accuracy("not positive", "positive", ["negative", "positive"]) == 1


@pytest.mark.parametrize("labels", [[], "positive", ["", "positive"], ["positive", "Positive"]])
def test_labels_that_cannot_be_told_apart_are_refused(labels):
    """An empty label stands at the start of every text."""
    with pytest.raises(ValueError, match="differ in more than their case"):
        first_label("positive", labels)


def test_a_reference_that_is_no_label_is_refused():
    """A data set that writes its labels otherwise would score 0 % and look like a bad model."""
    with pytest.raises(ValueError, match="none of the labels"):
        label_accuracy("pos", "pos", ["negative", "positive"])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### $1,234,567.00.", "1234567"),
        ("#### -5", "-5"),
        ("#### -$5.50", "-5.5"),
        ("#### $-5", "-5"),
        ("#### −5", "-5"),
        ("#### 3 apples and 2 pears", "3"),
        ("#### 18\n\nQuestion: 7 ducks\n#### 9", "18"),
        ("so she has 5 ####", "5"),
        ("#### none\nbut 4", "4"),
        ("The answer is 18.", "18"),
        ("3 + 4 = 7.0", "7"),
        ("10 - 3", "3"),
        ("10-3", "3"),
        ("=-3", "-3"),
        ("1, 2", "2"),
        ("about .50", "0.5"),
        ("007", "7"),
        ("-0.00", "0"),
        ("100", "100"),
        ("50%", "50"),
        ("12345678901234567891", "12345678901234567891"),
        ("two", None),
        ("####", None),
        ("", None),
        ("\u0663", None),
    ],
)
def test_the_number_of_a_solution(text, expected):
    """A right sum that is written with a dollar, a comma or a full stop is right."""
    assert gsm8k_answer(text) == expected


def test_gsm8k_compares_numbers_and_not_texts():
    """A solution that ends in another number on its way must not count."""
    solution = "She has 16 - 3 = 13.\n13 * 2 = $26\n#### 1,026"
    assert gsm8k_match("That makes $1026.00.", solution) == 1
    assert gsm8k_match("That makes 26", solution) == 0
    assert gsm8k_match("I do not know", solution) == 0
    with pytest.raises(ValueError, match="no number"):
        gsm8k_match("no answer", "no answer")


@pytest.mark.parametrize(
    "prediction, expected",
    [
        ("police kill the gunman", 3 / 4),
        ("the gunman kill police", 2 / 4),
        ("the gunman police killed", 2 / 4),
        ("POLICE, killed... the gunman!", 1),
        ("gunman", 2 / 5),
    ],
)
def test_rouge_l_of_the_papers_own_example(prediction, expected):
    """Lin, ROUGE, 2004, section 3.1: words in order, not a bag of them."""
    assert rouge_l(prediction, "police killed the gunman") == pytest.approx(expected)


def test_rouge_l_knows_letters_beyond_ascii():
    """The common package drops them: every Greek summary is worth 0 there, and so is the right one."""
    assert rouge_l("το σπίτι", "Το μεγάλο σπίτι") == pytest.approx(4 / 5)


def test_the_longest_common_series_is_found_among_all():
    """A greedy match is right on short examples: here every choice of words is tried."""
    generator = random.Random(0)
    for _ in range(50):
        first, second = ([generator.randrange(3) for _ in range(generator.randrange(9))] for _ in range(2))
        longest = 0
        for chosen in range(2 ** len(first)):
            series = [item for place, item in enumerate(first) if chosen >> place & 1]
            rest = iter(second)
            if all(item in rest for item in series):
                longest = max(longest, len(series))
        assert common_subsequence(first, second) == common_subsequence(second, first) == longest


def test_rouge_l_is_the_common_packages_on_ascii():
    """A ROUGE of one's own is comparable with nothing unless it is the same."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    generator = random.Random(0)
    for _ in range(50):
        first, second = (
            " ".join(generator.choices("a-b The cat, sat_on U.S. it's 3.5 mat".split(), k=9)) for _ in "12"
        )
        assert rouge_l(first, second) == pytest.approx(scorer.score(second, first)["rougeL"].fmeasure)
