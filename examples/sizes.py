"""Settings that let an example end in seconds; leave them out for a real run."""

SMALL = [
    "data.world_people=24",
    "data.world_questions=40",
    "data.dev_limit=8",
    "train.questions=4",
    "train.steps=2",
    "train.max_generated=0",
    "train.evals=1",
    "algorithm.rollouts=4",
]
