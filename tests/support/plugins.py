"""Plug-ins for tests: some do what they should, most do not. Named "tests.support.plugins:NAME"."""

from __future__ import annotations

import math

import torch


def long_answer(rollout):
    return float(len(rollout.answer or ""))


def no_number(rollout):
    return "much"


def not_a_number(rollout):
    return math.nan


def endless(rollout):
    return math.inf


def needs_two(rollout, question):
    return 1.0


def begins_alike(answer, question):
    return question.answers[0].startswith(answer)


def maybe(answer, question):
    return "maybe"


def seven(answer, question):
    return 7


def minus_one(answer, question):
    return -1


def one_point_zero(answer, question):
    return 1.0


def nothing(*arguments):
    return None


def several(*arguments):
    return torch.tensor([[1.0, 2.0], [3.0, 4.0]])


def huge(rollout):
    return 10**400


def needs_three(answer, question, context):
    return True


def wrong_answers(rollouts, context):
    return [0.9 if rollout.answer == "y" else 0.1 for rollout in rollouts]


def too_few(rollouts, context):
    return [0.5] * (len(rollouts) - 1)


def above_one(rollouts, context):
    return [1.5] * len(rollouts)


def nan_chance(rollouts, context):
    return [math.nan] * len(rollouts)


def no_list(rollouts, context):
    return 0.5


def words(rollouts, context):
    return ["dead"] * len(rollouts)


def fails(*arguments):
    raise KeyError("gold")


def fails_to_start():
    raise OSError("no index here")


class Judges:
    @staticmethod
    def inner(rollouts, context):
        return [0.0] * len(rollouts)


VALUE = 3
