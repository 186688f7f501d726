"""Whole models on disk: writing and reading directories of safetensors files, atomically and validated.

It may import `hqq_oft.quant` and `hqq_oft.ops`; only the command line imports it.
"""
