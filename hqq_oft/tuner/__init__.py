"""PEFT's side: the layer, its tuner models, patching and converting, merging, and the life of a rotation.

What is known about PEFT belongs here: which adapters are active, what is merged, when a rotation is computed or kept.
It may import `hqq_oft.quant`, `hqq_oft.functional` and `hqq_oft.ops`; only the command line imports it.
"""
