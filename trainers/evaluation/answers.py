"""What a written answer is worth: one number from 0 to 1 per example, of what a model wrote and what is right.

Two rules hold for all scores here:

* nothing against nothing is worth 1, nothing against something 0. (For both empty SQuAD v1.1's script gives an F1 of 0
  beside an exact match of 1, and `rouge_score` 0: a right answer would not count as one.)
* characters are compared as they are: an accent that is one character in one text and two in the other differs, and
  numbers written as words ("two") are words.
"""

import re
import string
from collections import Counter
from collections.abc import Hashable, Sequence

import torch


ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)  # of ASCII, as SQuAD's script has it
ANSWER_MARK = "####"
# Commas only between groups of three, so that "1, 2" and "3,14" are two numbers each. A minus is a sign where it
# touches the number or its dollar and follows nothing that it could be taken from: "5-3" ends in 3.
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])(?:[-−]\$?|\$[-−]))?"
    r"(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def normalize_answer(text: str) -> str:
    """Lower case, without punctuation (ASCII's), without the words a, an, the, and with single spaces, as the official
    script of SQuAD v1.1 does it (Rajpurkar et al., arXiv 1606.05250), in its order: "U.S.-led" becomes "usled".

    An answer that is an article alone becomes empty.
    """
    return " ".join(ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split())


def known_references(references: Sequence[str]) -> Sequence[str]:
    """The same.

    Raises:
        ValueError: none, or a text, each character of which would be taken for a reference.
    """
    if isinstance(references, str) or not references:
        raise ValueError(f"`references` is a list of one right answer or more; got {references!r}")
    return references


def bag_f1(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of things that may occur several times, in any order."""
    if not prediction or not reference:
        return float(len(prediction) == len(reference))
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2 * shared / (len(prediction) + len(reference))


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction equals a reference, both as [`normalize_answer`] makes them.

    Raises:
        ValueError: no references.
    """
    return float(normalize_answer(prediction) in map(normalize_answer, known_references(references)))


def f1(prediction: str, references: Sequence[str]) -> float:
    """[`bag_f1`] of the words of [`normalize_answer`], the best over the references (SQuAD v1.1, arXiv 1606.05250).

    Raises:
        ValueError: no references.
    """
    words = normalize_answer(prediction).split()
    return max(bag_f1(words, normalize_answer(reference).split()) for reference in known_references(references))


def token_f1(prediction_ids: Sequence[int] | torch.Tensor, reference_ids: Sequence[int] | torch.Tensor) -> float:
    """[`bag_f1`] of token ids, `(T,)` and `(T',)`, of one tokenizer and without padding: for texts that are read back.

    Raises:
        ValueError: more than one text.
    """
    sides = []
    for ids in (prediction_ids, reference_ids):
        ids = torch.as_tensor(ids)
        if ids.ndim != 1:
            raise ValueError(f"token ids are of one text, (T,); got {tuple(ids.shape)}")
        sides.append(ids.tolist())  # tensors of equal numbers are different keys
    return bag_f1(*sides)


def first_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that stands first in the text as a word of its own, in any case; None where there is none.

    Of several labels the first counts, of two that begin together the longer one. What surrounds a label is not read:
    "not positive" says positive.

    Raises:
        ValueError: no labels, an empty one, or two that differ in case alone.
    """
    lowered = {label.lower() for label in labels}
    if isinstance(labels, str) or not labels or "" in lowered or len(lowered) < len(labels):
        raise ValueError(f"`labels` is a list of texts that differ in more than their case; got {labels!r}")
    found = []
    for label in labels:
        if match := re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE):
            found.append((match.start(), -len(label), label))
    return min(found)[2] if found else None


def label_accuracy(prediction: str, reference: str, labels: Sequence[str]) -> float:
    """1 where the [`first_label`] of the prediction is the reference; a text without a label is wrong, not left out.

    Raises:
        ValueError: a reference that is none of the labels, or as [`first_label`] says.
    """
    if reference not in labels:
        raise ValueError(f"the reference {reference!r} is none of the labels {list(labels)}")
    return float(first_label(prediction, labels) == reference)


def gsm8k_answer(text: str) -> str | None:
    """The number a solution ends in: the first on the line behind its first `####`, or else the text's last; None
    where there is no number. (A model that goes on to invent a next question writes a second `####`.)

    Without commas, dollar sign, zeros that change nothing and a full stop: "$1,000.00." is "1000", "-.50" is "-0.5".
    Not understood: fractions ("1/2" ends in 2), exponents, decimal commas, other digits than ASCII's. Format of the
    solutions: Cobbe et al., arXiv 2110.14168.
    """
    _, mark, behind = text.partition(ANSWER_MARK)
    match = NUMBER.search(behind.partition("\n")[0]) if mark else None
    matches = [match] if match else list(NUMBER.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    whole, _, fraction = match["number"].replace(",", "").partition(".")
    number = f"{whole.lstrip('0') or '0'}.{fraction.rstrip('0')}".removesuffix(".")
    return f"-{number}" if match["sign"] and number != "0" else number


def gsm8k_match(prediction: str, reference: str) -> float:
    """1 where both texts have the same [`gsm8k_answer`].

    Raises:
        ValueError: the reference, a number or a solution, has none.
    """
    right = gsm8k_answer(reference)
    if right is None:
        raise ValueError(f"the reference has no number to compare with: {reference!r}")
    return float(gsm8k_answer(prediction) == right)


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest series that is in both, in order and with gaps; `len(first) * len(second)` steps."""
    lengths = [0] * (len(second) + 1)  # of what is read of `first`, and so many of `second`
    for item in first:
        above = lengths
        lengths = [0]
        for place, other in enumerate(second):
            lengths.append(above[place] + 1 if item == other else max(above[place + 1], lengths[place]))
    return lengths[-1]


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L's F-measure over whole texts: of words in order, gaps allowed, precision and recall weighed alike (Lin,
    ROUGE, 2004, section 3.1 with beta 1). Words are runs of letters and digits in lower case, not stemmed; in ASCII
    the `rougeL` of the package `rouge_score`, which knows no other letters."""
    words = [re.findall(r"[^\W_]+", text.lower()) for text in (prediction, reference)]
    if not all(words):
        return float(words[0] == words[1])
    return 2 * common_subsequence(*words) / (len(words[0]) + len(words[1]))
