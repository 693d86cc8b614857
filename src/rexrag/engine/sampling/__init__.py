"""The local engine: any causal language model that transformers loads, on CPU or CUDA, in this process.

loading.py    configuration -> policy and learner
policy.py     rollouts and scores
sampler.py    many episodes at once; draw.py the drawing; cache.py the key-value cache they share
learner.py    optimizer updates; state.py what they leave on disk
packing.py    rows side by side without padding; attention.py makes the model's own forward see them so
"""
