"""Scores of an answer against gold answers (METHOD §1)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

_VERDICTS = frozenset({"yes", "no", "noanswer"})
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop the articles a/an/the, squeeze white space.

    Source: the SQuAD 1.1 evaluation (Rajpurkar et al., 2016), used unchanged by Search-R1 and FlashRAG.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where prediction and any answer are equal after normalisation, else 0.0.

    Source: SQuAD's exact match; what Search-R1 calls `em_check`.
    """
    normalised = normalize_answer(prediction)
    return float(any(normalised == normalize_answer(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best token F1 of the normalised prediction against any answer, in [0, 1].

    SQuAD's bag-of-words F1, with HotpotQA's rule that yes, no and noanswer only match themselves, and SQuAD
    2.0's that two texts of which nothing is left ("A", "The The") are equal.
    """
    normalised = normalize_answer(prediction)
    return max((_token_f1(normalised, normalize_answer(answer)) for answer in answers), default=0.0)


def sub_exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 where any normalised answer occurs inside the normalised prediction, as characters, else 0.0.

    Source: Search-R1's `subem_check`; but an answer of nothing ("A") is found only in nothing.
    """
    normalised = normalize_answer(prediction)
    golds = [normalize_answer(answer) for answer in answers]
    return float(any(gold in normalised if gold else not normalised for gold in golds))


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """Fractions in [0, 1] of one answer."""

    em: float
    f1: float
    sub_em: float


def score_answer(answer: str | None, answers: Sequence[str]) -> AnswerScore:
    """EM, F1 and sub-EM of an answer; all 0 where there is none, whatever the gold answers are."""
    if answer is None:
        return AnswerScore(0.0, 0.0, 0.0)
    return AnswerScore(exact_match(answer, answers), f1(answer, answers), sub_exact_match(answer, answers))


def evidence_answers(answers: Sequence[str]) -> list[str]:
    """The normalised answers that a passage can hold: not yes, no or noanswer, and not nothing."""
    return [gold for gold in map(normalize_answer, answers) if gold and gold not in _VERDICTS]


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Does a passage hold one of `evidence_answers(answers)`, as whole words after normalisation?

    Source: DPR's answer match (Karpukhin et al., 2020), with SQuAD's normalisation instead of its tokenizer.
    """
    words = f" {normalize_answer(text)} "
    return any(f" {gold} " in words for gold in evidence_answers(answers))


def _token_f1(prediction: str, answer: str) -> float:
    if prediction == answer:
        return 1.0
    if {prediction, answer} & _VERDICTS:
        return 0.0
    said, gold = prediction.split(), answer.split()
    common = sum((Counter(said) & Counter(gold)).values())
    if not common:
        return 0.0
    precision, recall = common / len(said), common / len(gold)
    return 2 * precision * recall / (precision + recall)
